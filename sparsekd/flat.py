"""`FlatTargets`: sparse targets of P positions as flat arrays, the form in which codecs and shards hold them.

Shapes: P supervised positions, M entries of all of them, K entries of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError

Array = NDArray[Any]

_MOST_PADDED = 2**31  # bytes; a file of some MB must not make us allocate more
SCALE_OCTAVE = 8  # levels of an octave of a position's `scale`
_SMALLEST = 2.0**-149  # the smallest positive float32: a positive weight never becomes padding


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """What turns counts of draws from q ∝ p^t into weights (paper, section 3.4), for either of its two weightings.

    An id drawn c times in N rounds stands for c draws, each worth p/q. With H, the teacher's Rényi entropy of order t
    in bits, Σ_j p_j^t = 2^((1-t) H), so p/q = (2^H p)^(1-t), and

    - plain (`normalize=False`): w = c/N (2^H p)^(1-t). E[w] = p exactly for every id, so the expected gradient is that
      of full distillation; but a position's sum is 1 on average only, and where q misses p (t near 0) a few
      positions of enormous sums carry a batch.
    - self-normalised (`normalize=True`, what section 3.4 does): the same, divided by its sum over the position. Every
      position weighs 1, and H cancels; but a ratio of two random sums is biased by O(1/N) towards the proposal: at
      N = 1 every draw has weight 1 whatever its p, which is q and not p.

    At t = 1 both are c/N. With t = 0 the draws are uniform over the vocabulary.

    Attributes:
        log2_p: [M] float32 (or [P, K], padded), log2 of the teacher's probability of each id.
        entropy: [P] float32, H in bits: log2(Σ_j p_j^t) / (1 - t), from 0 to log2 V.
        temperature: t, not 1.
        normalize: which weighting `FlatTargets.weights` is.
    """

    log2_p: Array
    entropy: Array
    temperature: float
    normalize: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatTargets:
    """Sparse targets of P positions as flat arrays: position i owns the next `sizes[i]` entries.

    Attributes:
        ids: [M] uint32.
        values: [M] uint32 counts when `rounds` is set, else [M] float32 weights.
        sizes: [P] int64.
        rounds: N of random sampling; the counts of every position sum to it.
        importance: where draws were not from p itself, what weighs their counts.
        curve: [P, C] float32, the teacher's sorted probabilities in runs (see `sketch`); then each position has one
            entry, the token that came next and its probability.
        scale: [P] float64, what all weights of a position are multiplied with: the share of the positions that were
            kept over the probability of this one (see `position_budget`), share · 2^(l/8) with a whole l.
    """

    ids: Array
    values: Array
    sizes: Array
    rounds: int | None = None
    importance: Importance | None = None
    curve: Array | None = None
    scale: Array | None = None

    def __post_init__(self) -> None:
        total = int(self.sizes.sum())
        if not len(self.ids) == len(self.values) == total:
            raise ValueError(f"{len(self.ids)} ids and {len(self.values)} values, but the sizes sum to {total}")
        if self.curve is not None and not (len(self.curve) == len(self.sizes) == int((self.sizes == 1).sum())):
            raise ValueError(f"{len(self.curve)} curves, but {int((self.sizes == 1).sum())} positions have one entry")
        if self.scale is not None and len(self.scale) != len(self.sizes):
            raise ValueError(f"{len(self.scale)} scales, but there are {len(self.sizes)} positions")
        if self.importance is None:
            return
        lengths = len(self.importance.log2_p), len(self.importance.entropy)
        if lengths != (total, len(self.sizes)) or self.rounds is None:
            raise ValueError(
                f"{lengths[0]} log2_p and {lengths[1]} entropies with rounds={self.rounds}, but there are {total} "
                f"counts of {len(self.sizes)} positions"
            )

    @classmethod
    def from_padded(
        cls, ids: Array, values: Array, rounds: int | None = None, importance: Importance | None = None
    ) -> FlatTargets:
        """The targets of [P, K] arrays where a value of 0 is padding: counts with `rounds`, else weights."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
            raise ValueError(f"ids span {ids.min()}..{ids.max()}, the format holds 0..4294967295")
        kept = values != 0
        dtype = np.float32 if rounds is None else np.uint32
        return cls(
            ids=ids[kept].astype(np.uint32),
            values=values[kept].astype(dtype),
            sizes=kept.sum(-1, dtype=np.int64),
            rounds=rounds,
            importance=importance and replace(importance, log2_p=importance.log2_p[kept].astype(np.float32)),
        )

    @property
    def weights(self) -> Array:
        """[M] float32: the stored weights, counts / rounds, or as `importance` says; times their position's scale."""
        if self.scale is not None:
            return (replace(self, scale=None).weights * np.repeat(self.scale, self.sizes)).astype(np.float32)
        if self.rounds is None:
            return self.values
        if self.importance is not None:
            return _importance_weights(self, self.importance)
        return (self.values / np.float64(self.rounds)).astype(np.float32)

    @property
    def positions(self) -> Array:
        """[M] int64: the position that owns each entry."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def matches(self, tokens: Array) -> Array:
        """[M] bool: whether an entry's id is the token given for its position; tokens [P]."""
        found: Array = np.repeat(tokens, self.sizes) == self.ids
        return found

    def take(self, positions: Array) -> FlatTargets:
        """The targets of some positions (integers, in any order, repeats allowed), in that order."""
        chosen = np.asarray(positions, np.int64)
        sizes = self.sizes[chosen]
        first = (np.cumsum(self.sizes) - self.sizes)[chosen]
        entries = np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        weighing = self.importance
        if weighing is not None:
            weighing = replace(weighing, log2_p=weighing.log2_p[entries], entropy=weighing.entropy[chosen])
        return replace(
            self,
            ids=self.ids[entries],
            values=self.values[entries],
            sizes=sizes,
            importance=weighing,
            curve=None if self.curve is None else self.curve[chosen],
            scale=None if self.scale is None else self.scale[chosen],
        )

    def parts(self, counts: Array) -> Iterator[FlatTargets]:
        """The targets of the first counts[0] positions, of the next counts[1], and so on, as views; of counts and
        weights only, without scales."""
        ends, first, begin = np.cumsum(self.sizes), 0, 0
        for last in np.cumsum(counts).tolist():
            end = int(ends[last - 1]) if last else 0
            ids, values = self.ids[begin:end], self.values[begin:end]
            yield FlatTargets(ids=ids, values=values, sizes=self.sizes[first:last], rounds=self.rounds)
            first, begin = last, end

    @classmethod
    def join(cls, parts: Sequence[FlatTargets]) -> FlatTargets:
        """The positions of one or more targets of a kind, one after another."""
        weighing = parts[0].importance
        if weighing is not None:
            each = [part.importance for part in parts if part.importance is not None]
            weighing = replace(
                weighing,
                log2_p=np.concatenate([one.log2_p for one in each]),
                entropy=np.concatenate([one.entropy for one in each]),
            )
        return replace(
            parts[0],
            ids=np.concatenate([part.ids for part in parts]),
            values=np.concatenate([part.values for part in parts]),
            sizes=np.concatenate([part.sizes for part in parts]),
            importance=weighing,
            curve=_joined([part.curve for part in parts if part.curve is not None]),
            scale=_joined([part.scale for part in parts if part.scale is not None]),
        )

    def padded(self) -> tuple[Array, Array]:
        """ids [P, K] int64 and weights [P, K] float32; id 0 with weight 0 is padding, and K is at least 1.

        Raises:
            FormatError: one hostile position would blow the arrays up beyond 2 GiB.
        """
        width = max(1, int(self.sizes.max(initial=0)))
        if len(self.sizes) * width * 12 > _MOST_PADDED:
            raise FormatError(
                f"padding {len(self.sizes)} positions to {width} entries needs "
                f"{len(self.sizes) * width * 12} bytes, over {_MOST_PADDED}; use the flat arrays"
            )
        kept = np.arange(width) < self.sizes[:, None]
        ids = np.zeros(kept.shape, np.int64)
        weights = np.zeros(kept.shape, np.float32)
        ids[kept] = self.ids
        weights[kept] = self.weights
        return ids, weights


def add_counts(parts: Sequence[FlatTargets]) -> FlatTargets:
    """Counts of the same positions, id by id; the rounds add up. ids ascend within each position.

    Equals `sum(densified counts)`, position by position.
    """
    sizes = parts[0].sizes
    keys = np.concatenate([part.positions << 32 | part.ids for part in parts])
    distinct, slot = np.unique(keys, return_inverse=True)
    counts = np.zeros(len(distinct), np.uint32)
    np.add.at(counts, slot, np.concatenate([part.values for part in parts]))
    return FlatTargets(
        ids=(distinct & 0xFFFFFFFF).astype(np.uint32),
        values=counts,
        sizes=np.bincount(distinct >> 32, minlength=len(sizes)),
        rounds=sum(part.rounds or 0 for part in parts),
    )


def _importance_weights(flat: FlatTargets, importance: Importance) -> Array:
    """[M] float32, in float64 up to the last step."""
    assert flat.rounds is not None
    power = 1 - importance.temperature
    logs = np.log2(flat.values.astype(np.float64)) + power * importance.log2_p.astype(np.float64)
    if importance.normalize:
        # Divided by the largest first: 2^x of a hostile or extreme position would overflow float64.
        logs -= np.repeat(_largest(logs, flat.sizes), flat.sizes)
        totals = np.bincount(flat.positions, weights=np.exp2(logs), minlength=len(flat.sizes))
        logs -= np.repeat(np.log2(np.maximum(totals, 1)), flat.sizes)
    else:
        logs += np.repeat(power * importance.entropy.astype(np.float64), flat.sizes) - np.log2(flat.rounds)
    return np.exp2(logs.clip(-149, 127.99)).clip(_SMALLEST).astype(np.float32)


def _joined(arrays: list[Array]) -> Array | None:
    return np.concatenate(arrays) if arrays else None


def _largest(values: Array, sizes: Array) -> Array:
    """[P] the largest value of each position, 0 for a position without entries."""
    largest, filled = np.zeros(len(sizes)), np.flatnonzero(sizes)
    if len(filled):
        largest[filled] = np.maximum.reduceat(values, (np.cumsum(sizes) - sizes)[filled])
    return largest
