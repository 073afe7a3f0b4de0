"""Codecs of weights: `prob40` (16-bit logarithms) and `prob24` (the paper's ratio code, in the logarithm).

Shapes: P supervised positions, M entries of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, MismatchError
from .flat import FlatTargets
from .words import pack, refuse, unpack

Array = NDArray[Any]
Spec = Mapping[str, Any]

OCTAVE = 1024  # log-codes count 1/1024 octaves: half a unit is a relative error of 0.034 %
SMALLEST = 150 * OCTAVE  # 2^-149 is the smallest positive float32


def positive(flat: FlatTargets) -> FlatTargets:
    """The entries of positive weight; MismatchError for a weight that is negative or not finite."""
    fine = np.isfinite(flat.values) & (flat.values >= 0)
    if not fine.all():
        at = int(np.argmin(fine))
        raise MismatchError(
            f"supervised position {flat.positions[at]} has weight {flat.values[at]}; weights are finite and >= 0"
        )
    kept, sizes = flat.values > 0, flat.sizes
    if not kept.all():
        sizes = np.bincount(flat.positions[kept], minlength=len(flat.sizes)).astype(np.int64)
    if int(sizes.max(initial=0)) > 0xFFFF:
        raise MismatchError(f"a position has {sizes.max()} entries, the format holds 65535; keep fewer ids")
    return FlatTargets(ids=flat.ids[kept], values=flat.values[kept], sizes=sizes)


def _with_sizes(sizes: Array, words: Array, width: int) -> bytes:
    return pack(sizes, 2) + pack(words, width)


def _split_sizes(data: bytes, positions: int, width: int) -> tuple[Array, Array]:
    """sizes [P] int64 and words [M]; FormatError when they do not fill the bytes exactly."""
    head = 2 * positions
    if len(data) < head:
        raise FormatError(f"{len(data)} bytes cannot hold {positions} sizes; the file is damaged")
    sizes, words = unpack(data[:head], 2).astype(np.int64), unpack(data[head:], width)
    if int(sizes.sum()) != len(words):
        raise FormatError(f"the sizes sum to {sizes.sum()}, {len(words)} entries follow; the file is damaged")
    return sizes, words


@cache
def _power_table() -> Array:
    """[150 * 1024 + 1] float32: 2^(-i / 1024), computed in float64."""
    table: Array = np.exp2(-np.arange(SMALLEST + 1) / OCTAVE).astype(np.float32)
    return np.maximum(table, np.float32(2.0**-149))


def encode_prob40(flat: FlatTargets, spec: Spec) -> bytes:
    """Weights up to 2^16, each as its own logarithm."""
    flat = positive(flat)
    if len(flat.values) and float(flat.values.max()) > 1.0003 * 2**16:
        raise MismatchError(
            f"prob40 holds weights up to 65536, got {flat.values.max()}; draw more rounds, or at a temperature nearer 1"
        )
    codes = np.rint((16 - np.log2(flat.values.astype(np.float64))) * OCTAVE).clip(0, 65535)
    words = flat.ids.astype(np.uint64) | (codes.astype(np.uint64) << np.uint64(24))
    return _with_sizes(flat.sizes, words, 5)


def decode_prob40(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    """The inverse, to 0.034 %."""
    sizes, words = _split_sizes(data, positions, 5)
    ids = (words & np.uint64(2**24 - 1)).astype(np.uint32)
    weights = _power_table()[words >> np.uint64(24)] * np.float32(2**16)
    return FlatTargets(ids=ids, values=weights, sizes=sizes)


def encode_prob24(flat: FlatTargets, spec: Spec) -> bytes:
    """Probabilities in descending order, each as its ratio to the one before."""
    flat = positive(flat)
    if len(flat.values) and float(flat.values.max()) > 1.001:
        raise MismatchError(f"prob24 holds probabilities, got a weight of {flat.values.max()}; use prob40")
    order = np.lexsort((-flat.values, flat.positions))
    levels = -np.log2(flat.values[order].astype(np.float64)) * OCTAVE
    codes = ratio_codes(levels, flat.sizes, start=np.zeros(len(flat.sizes)), most=127)
    return _with_sizes(flat.sizes, flat.ids[order].astype(np.uint64) | (codes << np.uint64(17)), 3)


def decode_prob24(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    """The inverse, to 2.2 % sqrt(o), o the octaves between neighbours."""
    sizes, words = _split_sizes(data, positions, 3)
    levels = ratio_levels(words >> np.uint32(17), sizes, start=np.zeros(len(sizes), np.int64))
    flat = FlatTargets(ids=words & np.uint32(2**17 - 1), values=levels, sizes=sizes)
    if int(levels.max(initial=0)) > SMALLEST:
        refuse(flat.positions[int(np.argmax(levels))], "a weight below 2^-150")
    return FlatTargets(ids=flat.ids, values=_power_table()[levels], sizes=sizes)


def ratio_codes(levels: Array, sizes: Array, *, start: Array, most: int) -> Array:
    """[M] uint64 codes c (0 .. most): the i-th level of a position decodes to start + c_1^2 + ... + c_i^2.

    Closed loop: each code corrects the rounding of those before it, so errors never add up. Squares put the
    fine steps where neighbours are alike: with o octaves between neighbours the error is 2.2 % * sqrt(o).

    Args:
        levels: [M] float64, ascending within a position, in 1/1024 octaves below 1.
        start: [P], the level that the first step of each position begins at.
    """
    codes, level = np.zeros(len(levels), np.uint64), start.astype(np.float64)
    first = np.cumsum(sizes) - sizes
    for rank in range(int(sizes.max(initial=0))):
        longer = np.flatnonzero(sizes > rank)
        gap = levels[first[longer] + rank] - level[longer]
        code = np.floor(np.sqrt((gap - 0.25).clip(0)) + 0.5).clip(0, most)
        codes[first[longer] + rank] = code.astype(np.uint64)
        level[longer] += code**2
    return codes


def ratio_levels(codes: Array, sizes: Array, *, start: Array) -> Array:
    """[M] int64: the inverse of `ratio_codes`."""
    running = np.concatenate([[0], np.cumsum(codes.astype(np.int64) ** 2)])
    first = np.cumsum(sizes) - sizes
    levels: Array = running[1:] - np.repeat(running[first] - start, sizes)
    return levels
