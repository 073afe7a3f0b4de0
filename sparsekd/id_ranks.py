"""Short names for frequent ids: a shard's ids by falling frequency, so that a codec's small numbers are its common ids.

    given = id_ranks([record.targets for record in records], logit_width)   # .table is kept in the shard
    given.ranks[given.ids] == arange(V)

The table hangs on the shard's own rows alone, so it is the same whoever makes the shard.

Shapes: F ids of the table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .codec_ints import decode_ints, encode_ints
from .errors import FormatError
from .flat import FlatTargets

Array = NDArray[Any]

# An id of the table costs about 2 bytes once; a better rank saves about a bit each time it is used.
_LEAST = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class IdRanks:
    """table: the F most frequent ids as a shard keeps them; ids [V]: the id of each rank; ranks [V]: its inverse."""

    table: bytes
    ids: Array
    ranks: Array


def id_ranks(targets: Iterable[FlatTargets], logit_width: int, least: int = _LEAST) -> IdRanks:
    """Ranks by the number of entries; the table holds the ids of at least `least` (32 in a shard), ties by id."""
    uses = _uses((flat.ids for flat in targets), logit_width)
    frequent = np.flatnonzero(uses >= least)
    table = encode_ints([frequent[np.argsort(-uses[frequent], kind="stable")]])
    ids = ids_of_ranks(table, logit_width)
    ranks = np.empty(logit_width, np.uint32)
    ranks[ids] = np.arange(logit_width, dtype=np.uint32)
    return IdRanks(table=table, ids=ids, ranks=ranks)


def _uses(parts: Iterable[Array], logit_width: int) -> Array:
    """[V] how often each id below V is there."""
    uses, count, fast = np.zeros(logit_width, np.int64), 0, compiled.array_kernels()
    waiting: list[Array] = []
    for ids in parts:
        if fast and ids.dtype == np.uint32 and ids.flags.c_contiguous:
            fast.tally(ids, uses)
            continue
        waiting, count = [*waiting, ids[ids < logit_width]], count + len(ids)
        if count >= logit_width:  # each `bincount` makes V numbers, many more than a short row has ids
            uses += np.bincount(np.concatenate(waiting), minlength=logit_width)
            waiting, count = [], 0
    return uses + np.bincount(np.concatenate([np.zeros(0, np.uint32), *waiting]), minlength=logit_width)


def ids_of_ranks(data: bytes, logit_width: int) -> Array:
    """[V] uint32: the table's ids, then all others, ascending. FormatError for a table that is no such list."""
    table, used = decode_ints(data, logit_width)
    if used != len(data):
        raise FormatError(f"its id_rank takes {used} bytes of {len(data)}; the file is damaged")
    if len(table) and int(table.max()) >= logit_width:
        raise FormatError(f"its id_rank names id {table.max()}, but logit_width={logit_width}; the file is damaged")
    rest = np.ones(logit_width, bool)
    rest[table] = False
    others = np.flatnonzero(rest).astype(np.uint32)
    if len(table) + len(others) != logit_width:
        distinct = logit_width - len(others)
        raise FormatError(f"its id_rank names {len(table)} ids, {distinct} of them different; the file is damaged")
    return np.concatenate([table, others])
