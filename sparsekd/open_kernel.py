"""What an open draw becomes where no text tells: a Markov kernel from sets to their tokens, counted on a cache's rows.

Where the teacher's token that really came was open (see `fates`), the text shows which of its set's tokens it became.
Counted over rows, that says what other draws of the same set may become, whatever the context:

    M(v | s)  =  (n(s, v) + d(s) / |s|) / (n(s) + d(s))

with n(s, v) how often set s became v, n(s) their sum over v, and d(s) how many different v it became (at least 1):
Witten and Bell's smoothing. Every token of a set has some mass, and each set's sum to 1. So the mean over draws is what
the kernel makes of the teacher's distribution, exactly; that is the teacher only as far as what came before does not
tell more than s does. Backing off to the tokens' own frequencies, not to all of the set alike, is worse on held-out
rows: they are the same counts once more, and what was never seen is discounted twice (docs/LOG.md).

Shapes: S sets, E tokens of all sets (one in several sets counts in each), M weighted sets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .set_table import SetTable

Array = NDArray[Any]

# A set of more tokens than both together becomes its likeliest tokens and a sample of the others: 0.5 to 5 % more noise
# than the draws have, and 108 ids a position where whole sets take 268 (docs/LOG.md).
LIKELIEST, SAMPLED = 4, 2


class Counts(NamedTuple):
    """How often each set became each token.

    Attributes:
        keys: [K] int64 set V + token, ascending; counts: [K] int64, none 0.
    """

    keys: Array
    counts: Array

    def sha256(self) -> str:
        """Equal for equal counts."""
        return hashlib.sha256(np.concatenate(self).astype("<i8").tobytes()).hexdigest()


def counted(sets: Array, tokens: Array, table: SetTable) -> Counts:
    """Counts of sets [any] and the token that each became [any]."""
    return Counts(*np.unique(sets * table.vocab_size + tokens, return_counts=True))


def added(parts: Sequence[Counts]) -> Counts:
    """Counts of several parts as one; in whatever order they come."""
    keys, inverse = np.unique(np.concatenate([part.keys for part in parts]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, inverse, np.concatenate([part.counts for part in parts]))
    return Counts(keys, counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """M(v | s): set s has the entries `first[s]` to `first[s + 1]`, likeliest first.

    Attributes:
        first: [S + 1] int64.
        tokens: [E] int64.
        shares: [E] float64, a set's sum to 1; ends: [E] their running sum over all sets.
    """

    first: Array
    tokens: Array
    shares: Array
    ends: Array


def kernel_of(counts: Counts, table: SetTable) -> Kernel:
    """The kernel at the head of this file."""
    size = table.last - table.first
    which = np.repeat(np.arange(len(table)), size)
    first = np.cumsum([0, *size.tolist()])
    tokens = table.order[np.arange(first[-1]) + (table.first - first[:-1])[which]]
    came = _of(counts, which * table.vocab_size + tokens)
    kinds = np.bincount(which, came > 0, len(table)).clip(1)
    shares = (came + (kinds / size)[which]) / (np.bincount(which, came, len(table)) + kinds)[which]
    order = np.lexsort((-shares, which))  # equal ones as they stand in the table: by bytes, not by number
    return Kernel(first=first, tokens=tokens[order], shares=shares[order], ends=np.cumsum(shares[order]))


def _of(counts: Counts, keys: Array) -> Array:
    """[any] the count of each key, 0 where there is none."""
    at, known = np.searchsorted(counts.keys, keys), np.append(counts.keys, -1)
    return np.where(known[at] == keys, np.append(counts.counts, 0)[at], 0)


def spread(kernel: Kernel, sets: Array, weights: Array, chance: Array) -> tuple[Array, Array, Array]:
    """Weighted sets [M] as weighted tokens: (which of the sets [any], token, weight); each set keeps its weight.

    Equals weights[m] M(v | sets[m]) for every token v of sets of up to LIKELIEST + SAMPLED tokens. Of larger ones the
    LIKELIEST have that too, and SAMPLED tokens, drawn systematically from the others, share what those have: unbiased
    where `chance` [M] is uniform in [0, 1).
    """
    size = kernel.first[sets + 1] - kernel.first[sets]
    large = size > LIKELIEST + SAMPLED
    whole = np.where(large, LIKELIEST, size)
    which = np.repeat(np.arange(len(sets)), whole)
    at = np.arange(len(which)) + (kernel.first[sets] - np.cumsum(whole) + whole)[which]
    weight = weights[which] * kernel.shares[at]
    rest = weights - np.bincount(which, weight, len(sets))
    some = np.repeat(np.flatnonzero(large), SAMPLED)
    drawn = _drawn(kernel, sets[some], (np.arange(len(some)) % SAMPLED + chance[some]) / SAMPLED)
    return (
        np.concatenate([which, some]),
        kernel.tokens[np.concatenate([at, drawn])],
        np.concatenate([weight, rest[some] / SAMPLED]),
    )


def _drawn(kernel: Kernel, sets: Array, points: Array) -> Array:
    """[any] the entry, beyond a set's likeliest ones, that each point of [0, 1) falls on."""
    after, last = kernel.first[sets] + LIKELIEST, kernel.first[sets + 1] - 1
    low, high = kernel.ends[after - 1], kernel.ends[last]
    found: Array = np.searchsorted(kernel.ends, low + (high - low) * points, side="right")
    return found.clip(after, last)
