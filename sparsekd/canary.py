"""The alignment canary: how often the true next token is among a position's sampled ids.

A good teacher samples the token that really came next most of the time, and the token before or after it
rarely. Targets that slipped by one position, or belong to other rows, show at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .codec import FlatTargets
from .errors import MismatchError
from .order import permute

Array = NDArray[Any]
_SHIFTS = (0, 1, -1)
# A slipped cache fits its neighbour 3 to 30 times better than the next token; an honest one with a weak teacher,
# whose tied embeddings repeat the current token, was seen at 1.4 times. Neither is judged below a difference of 0.1.
# An untrained teacher reached 4 times (0.08 and 0.02, V=2048), but with a mean weight of some thousandths.
_CLEARLY, _AT_LEAST, _HEAVIER = 2.0, 0.1, 0.02


class _Record(Protocol):
    @property
    def input_ids(self) -> Array: ...
    @property
    def supervised(self) -> Array: ...
    @property
    def targets(self) -> FlatTargets: ...


class _Reader(Protocol):
    @property
    def stats(self) -> dict[str, Any]: ...
    def __len__(self) -> int: ...
    def record(self, index: int, /) -> Any: ...


def alignment(reader: _Reader, rows: Iterable[int]) -> dict[str, float]:
    """The share of supervised positions p whose set holds the token at p + 1, p + 2 and p, over some rows.

    Returns {"positions", "aligned", "shift_plus_1", "shift_minus_1"}; shares are 0 where there is nothing.
    "aligned_weight" and so on are the mean weights of the same tokens.
    """
    return _shares(_counts(reader, rows))


def check_alignment(reader: _Reader, sample: int = 64) -> dict[str, float]:
    """`alignment` over up to `sample` rows, compared with what the cache recorded when it was captured.

    Raises:
        MismatchError: the aligned share is not the recorded one (allowed: 0.02 and six standard errors), or
            the targets fit the token before or after far better than the next token,
            in shares and in mean weight.
    """
    rows = permute(np.arange(min(sample, len(reader))), len(reader), seed=0).tolist()
    counts = _counts(reader, rows)
    shares, stats = _shares(counts), reader.stats
    if not shares["positions"] or not stats["positions"]:
        return shares
    recorded = stats["next_token_hits"] / stats["positions"]
    allowed = 0.02 + 6 * _standard_error(counts[:, 0], recorded, len(reader))
    aligned = shares["aligned"]
    if abs(aligned - recorded) > allowed:
        raise MismatchError(
            f"targets do not fit their rows: the next token is among {aligned:.3f} of the sets, "
            f"{recorded:.3f} when captured (allowed difference {allowed:.3f}); capture again"
        )
    for name, where in (("shift_plus_1", "after"), ("shift_minus_1", "before")):
        in_more_sets = shares[name] > max(_CLEARLY * aligned, aligned + max(allowed, _AT_LEAST))
        if in_more_sets and shares[f"{name}_weight"] > shares["aligned_weight"] + _HEAVIER:
            raise MismatchError(
                f"targets look shifted by one: the token {where} the next one is in {shares[name]:.3f} of the "
                f"sets, the next token itself in {aligned:.3f}; target p must be the distribution of token p+1"
            )
    return shares


def _counts(reader: _Reader, rows: Iterable[int]) -> Array:
    """[rows, shifts, 3]: positions whose shifted token is in their set, those that have one, its weights."""
    records = (reader.record(row) for row in rows)
    counts = [[_hits(record, shift) for shift in _SHIFTS] for record in records]
    return np.array(counts, np.float64).reshape(-1, len(_SHIFTS), 3)


def _hits(record: _Record, shift: int) -> tuple[int, int, float]:
    tokens = np.flatnonzero(record.supervised[1:]) + 1 + shift
    inside = (tokens >= 0) & (tokens < len(record.input_ids))
    wanted = np.where(inside, record.input_ids[tokens * inside].astype(np.int64), -1)
    targets = record.targets
    hits = targets.matches(wanted)
    weight = float(targets.weights[hits].sum(dtype=np.float64))
    return len(np.unique(targets.positions[hits])), int(inside.sum()), weight


def _shares(counts: Array) -> dict[str, float]:
    hits, positions, weights = np.moveaxis(counts.sum(0), -1, 0)
    names = ("aligned", "shift_plus_1", "shift_minus_1")
    shares = zip(names, (hits / np.maximum(positions, 1)).tolist(), strict=True)
    means = zip(names, (weights / np.maximum(positions, 1)).tolist(), strict=True)
    return {"positions": int(positions[0]), **dict(shares), **{f"{name}_weight": mean for name, mean in means}}


def _standard_error(counts: Array, share: float, population: int) -> float:
    """Of the aligned share: binomial, or from how rows differ where that is larger; [rows, 3] counts.

    Positions of a row are alike (code beside prose), so the binomial error alone would refuse honest caches.
    """
    hits, positions = counts[:, :2].T
    total = int(positions.sum())
    binomial = share * (1 - share) / total
    spread = ((hits - share * positions) ** 2).sum() / max(1, len(counts) - 1) * len(counts) / total**2
    unseen = 1 - len(counts) / population
    return float(np.sqrt(max(binomial, spread * unseen)))
