"""`split_ratio`: draws from q ∝ p^t, their counts as `split` has them, their probabilities as fine as weights need.

A weight is count/N (2^H p)^(1-t): it moves by 1/32 octave (2.2 %) where p moves by 1/(32 |1 - t|) octaves. That is
the grid of p here, 6.4 levels an octave at t = 0.8, where `split_prob` needs 32. Entries stay in the order of `split`,
which makes ids cheap; sorted by probability, levels are cheaper and ids dearer, 5 % more in all (docs/LOG.md).

Shapes: P supervised positions, M entries of all of them, L tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec_counts import _checked
from .codec_ints import decode_ints, encode_ints
from .codec_split_fast import decode_counts, decode_counts_row, encode_counts, encode_counts_row
from .errors import FormatError
from .flat import FlatTargets, Importance
from .order import splitmix
from .words import refuse

Array = NDArray[Any]
Spec = Mapping[str, Any]
# (real levels, coins in [0, 1), octaves that a weight rises by from a level to the next) -> whole levels
Rounding = Callable[[Array, Array, float], Array]

_OCTAVE = 32  # levels of an octave of the weight
_FINER = 8  # levels of the entropy, which all weights of a position share, to one of a probability
_DEEPEST, _MOST_BITS = 149, 32  # log2 p from 0 to -149; an entropy of at most 32 bits


# --- rounding -------------------------------------------------------------------------------------------


def nearest(exact: Array, coins: Array, rise: float) -> Array:
    """The nearest level: a weight errs by at most half a step."""
    return np.rint(exact)


def unbiased(exact: Array, coins: Array, rise: float) -> Array:
    """The level below or above, so that the expected weight is the weight; it errs by at most a step."""
    low = np.floor(exact)
    share = (np.exp2(rise) - np.exp2(rise * (exact - low))) / np.expm1(rise * math.log(2))
    up: Array = low + (coins >= share)
    return up


def _coins(flat: FlatTargets, log2_p: Array) -> tuple[Array, Array]:
    """[M] and [P] float64 in [0, 1) by splitmix64 of a position's number and of all that was drawn there.

    Ids are left out: a cache's are ranks, and the same draws checked against their teacher's are not.
    """
    bits = log2_p.astype(np.float32).view(np.uint32).astype(np.uint64)
    own: Array = splitmix(bits << np.uint64(32) | flat.values.astype(np.uint64))
    whole: Array = np.add.reduceat(own, np.cumsum(flat.sizes) - flat.sizes) if len(own) else own
    whole = splitmix(whole + np.arange(len(flat.sizes), dtype=np.uint64))
    each: Array = np.bitwise_xor(own, np.repeat(whole, flat.sizes))
    entries = splitmix(each)
    return (entries >> np.uint64(11)) * 2.0**-53, (splitmix(whole) >> np.uint64(11)) * 2.0**-53


# --- bytes ----------------------------------------------------------------------------------------------


def encode_ratios(flat: FlatTargets, spec: Spec, *, rounding: Rounding) -> bytes:
    """A list of levels, then `split`'s targets, see docs/format.md; MismatchError for draws of another temperature."""
    flat = _in_order(flat, spec)
    counts = encode_counts(replace(flat, importance=None), spec)  # first: it refuses counts of another sum
    return _levels(flat, spec, rounding) + counts


def encode_ratios_row(
    input_ids: Array, flat: FlatTargets, supervised: Array, spec: Spec, *, rounding: Rounding
) -> bytes:
    """A list of levels, then `split`'s row."""
    flat = _in_order(flat, spec)
    counts = encode_counts_row(input_ids, replace(flat, importance=None), supervised, spec)
    return _levels(flat, spec, rounding) + counts


def _in_order(flat: FlatTargets, spec: Spec) -> FlatTargets:
    """The same draws in the order of `split`: by falling count, then rising id."""
    given = _checked(flat, spec)
    order = np.lexsort((flat.ids, -flat.values.astype(np.int64), flat.positions))
    importance = replace(given, log2_p=given.log2_p[order])
    counts = flat.values[order].astype(np.uint32, copy=False)
    return replace(flat, ids=flat.ids[order], values=counts, importance=importance)


def _levels(flat: FlatTargets, spec: Spec, rounding: Rounding) -> bytes:
    """Three streams: P entropies, the probabilities of ids drawn more than once, those of ids drawn once."""
    if not len(flat.sizes):
        return b""
    assert flat.importance is not None
    log2_p, fine = flat.importance.log2_p, _fineness(spec)
    rise = math.copysign(1 / _OCTAVE, spec["temperature"] - 1)  # of a weight, from a probability to the next smaller
    coins_M, coins_P = _coins(flat, log2_p)
    levels = rounding((-log2_p.astype(np.float64)).clip(0, _DEEPEST) * fine, coins_M, rise)
    entropies = flat.importance.entropy.astype(np.float64).clip(0, _MOST_BITS) * (fine * _FINER)
    many = flat.values > 1
    return encode_ints([rounding(entropies, coins_P, -rise / _FINER), levels[many], levels[~many]])


def _fineness(spec: Spec) -> float:
    """Levels of an octave of p."""
    return float(_OCTAVE * abs(1 - spec["temperature"]))


def decode_ratios(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    """Counts exactly, log2_p and entropy to the grid; FormatError for bytes that no encoder writes."""
    values, used = _read_levels(data, positions, spec)
    return _weighed(decode_counts(data[used:], positions, spec), values, spec)


def decode_ratios_row(block: bytes, seq_len: int, supervised: Array, spec: Spec) -> tuple[Array, FlatTargets]:
    """input_ids [L] uint32 and the targets of the supervised positions."""
    values, used = _read_levels(block, int(np.count_nonzero(supervised[1:])), spec)
    input_ids, flat = decode_counts_row(block[used:], seq_len, supervised, spec)
    return input_ids, _weighed(flat, values, spec)


def _read_levels(data: bytes, positions: int, spec: Spec) -> tuple[Array, int]:
    if not positions:
        return np.zeros(0, np.uint32), 0
    return decode_ints(data, positions * (1 + min(spec["rounds"], spec["logit_width"])))


def _weighed(flat: FlatTargets, values: Array, spec: Spec) -> FlatTargets:
    """The counts with what weighs them."""
    positions, fine = len(flat.sizes), _fineness(spec)
    if len(values) != positions + len(flat.ids):
        raise FormatError(
            f"{len(values)} levels do not fit {len(flat.ids)} entries of {positions} positions; the file is damaged"
        )
    entropies, levels = values[:positions], np.empty(len(flat.ids), np.uint32)
    levels[np.concatenate([np.flatnonzero(flat.values > 1), np.flatnonzero(flat.values <= 1)])] = values[positions:]
    for found, most, owner, words in (
        (levels, _DEEPEST * fine, flat.positions, "a probability below 2^-149"),
        (entropies, _MOST_BITS * fine * _FINER, np.arange(positions), f"an entropy above {_MOST_BITS} bits"),
    ):
        if int(found.max(initial=0)) > math.ceil(most):
            refuse(int(owner[int(np.argmax(found))]), words)
    importance = Importance(
        log2_p=(levels / -fine).astype(np.float32),
        entropy=(entropies / (fine * _FINER)).astype(np.float32),
        temperature=spec["temperature"],
        normalize=spec["normalize"],
    )
    return replace(flat, importance=importance)
