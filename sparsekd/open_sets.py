"""Which of the student's tokens a draw of the teacher leaves open.

A draw w that spells exactly the student's token u leaves open whether u it is, or a longer token. Not every token that
begins with u's bytes can follow: a teacher writes a text in one way, so that from " " none comes that begins with the
teacher's token " the". What is left are the tokens whose own text the teacher cuts as it cuts u's, and then goes on:

    CUTS    { v : teacher's cutting of v begins with the teacher's cutting of u }
    BYTES   { v : v's bytes begin with u's }

CUTS are far smaller, and CUTS of two draws never meet unless one draw's tokens begin the other's. Where u does not end
as the teacher's cutting of u does (w begins before u, say), the bytes are all that is known.

Shapes: M draws, V student's vocabulary; sets 0 .. V-1 are the CUTS of each token, V .. 2V-1 the BYTES.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pair import Pair, teachers_cuts
from .set_table import SetTable, joined
from .vocab_bytes import prefix_ranges

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSets:
    """The sets of a pair of tokenizers.

    Attributes:
        table: all 2 V of them.
        rank: [2 V] where token v stands among the CUTS (entry v) and the BYTES (V + v).
        ends_in: [V] the teacher's token that the teacher's cutting of each token ends in, -1 where it has none.
    """

    table: SetTable
    rank: Array
    ends_in: Array

    def of(self, draws: Array, tokens: Array) -> Array:
        """[M] the set of each draw that ends with a token of the student's."""
        return np.where(self.ends_in[tokens] == draws, tokens, tokens + self.table.vocab_size)

    def is_open(self, draws: Array, tokens: Array) -> Array:
        """[M] bool: whether that set has more than the token itself."""
        found = self.of(draws, tokens)
        more: Array = self.table.last[found] - self.table.first[found] > 1
        return more

    def holds(self, sets: Array, tokens: Array) -> Array:
        """[M] bool: whether each token lies in each set; set -1 is the whole vocabulary."""
        size = self.table.vocab_size
        rank = self.rank[tokens + np.where(sets >= size, size, 0)]
        return (sets < 0) | ((self.table.first[sets] <= rank) & (rank < self.table.last[sets]))

    def holds_set(self, outer: Array, inner: Array) -> Array:
        """[M] bool: whether each of the inner sets lies in the outer one; BYTES in CUTS count as if they did not."""
        size = self.table.vocab_size
        return (outer < 0) | (self.holds(outer, inner % size) & ((outer >= size) | (inner < size)))


def open_sets(pair: Pair) -> OpenSets:
    """The sets of a pair."""
    return sets_of_cuts(teachers_cuts(pair), pair.student.of_id)


def sets_of_cuts(cuts: Sequence[Sequence[int] | None], of_id: Sequence[bytes | None]) -> OpenSets:
    """The sets of V tokens, by the teacher's cutting of each and by their bytes; None lies in no other's set."""
    # Four bytes a token: then one cutting begins with another iff its bytes do.
    as_bytes = [None if not cut else np.array(cut, ">u4").tobytes() for cut in cuts]
    tables = []
    for keys in (as_bytes, of_id):
        order, first, last = prefix_ranges(keys)
        tables.append(SetTable(vocab_size=len(of_id), order=order, first=first, last=last))
    return OpenSets(
        table=joined(tables),
        rank=np.concatenate([np.argsort(table.order) + at * len(of_id) for at, table in enumerate(tables)]),
        ends_in=np.array([cut[-1] if cut else -1 for cut in cuts], np.int64),
    )
