"""`split_prob`: probabilities on a logarithmic grid, laid out like `split`, rounded to the nearest or without bias.

A grid of 1/32 octave (steps of 2.2 %) costs what a 7-bit ratio to the entry before does, once zstd has taken what is
common, and has no reach to run out of. Levels are whole numbers, so differences of sorted levels add up exactly: no
loop has to be closed, and every entry may be rounded on its own. Level 0 is the largest weight that a codec holds: 1
for probabilities, `most` = 2 for what `transcode` makes (a token that came, and a share of the draws beside it).

Shapes: P supervised positions, M entries of all of them, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec_ints import decode_ints, encode_ints
from .codec_split import (
    MOST_ENTRIES,
    check_ids,
    decode_inputs,
    encode_inputs,
    find_twice,
    id_steps,
    ids_of_steps,
    run_starts,
)
from .codec_weights import positive
from .errors import FormatError, MismatchError
from .flat import FlatTargets
from .order import splitmix
from .words import refuse

Array = NDArray[Any]
Spec = Mapping[str, Any]
Rounding = Callable[[FlatTargets], Array]

OCTAVE = 32
_DEEPEST = 149 * OCTAVE  # 2^-149, the smallest positive float32
_LEVEL_BITS, _ID_BITS = _DEEPEST.bit_length(), 20
POWERS = np.exp2(-np.arange(_DEEPEST + 1) / OCTAVE)


# --- rounding -------------------------------------------------------------------------------------------


def nearest(flat: FlatTargets) -> Array:
    """[M] int64 levels l, w = 2^(-l / 32): the nearest in the logarithm, a relative error of at most 1.1 %."""
    return np.rint(_exact(flat)).astype(np.int64)


def unbiased(flat: FlatTargets) -> Array:
    """[M] int64 levels: one of the two neighbours, so that the expected weight is w; an error of at most 2.2 %.

    The neighbour hangs on a hash of (position, id, w): the same targets always have the same bytes.
    """
    low = np.floor(_exact(flat)).astype(np.int64)
    high = np.minimum(low + 1, _DEEPEST)
    above, below = POWERS[low], POWERS[high]
    share = np.divide(flat.values - below, above - below, out=np.ones(len(low)), where=above > below)
    return np.where(_uniform(flat) < share, low, high)


def _exact(flat: FlatTargets) -> Array:
    levels: Array = (-np.log2(flat.values.astype(np.float64)) * OCTAVE).clip(0, _DEEPEST)
    return levels


def _uniform(flat: FlatTargets) -> Array:
    """[M] float64 in [0, 1): splitmix64 of position, id and the bits of the weight."""
    bits = flat.values.astype(np.float32).view(np.uint32).astype(np.uint64)
    state = splitmix(flat.positions.astype(np.uint64))
    state = splitmix(state + flat.ids.astype(np.uint64))
    return (splitmix(state + bits) >> np.uint64(11)) * 2.0**-53


# --- bytes ----------------------------------------------------------------------------------------------


def encode_weights(flat: FlatTargets, spec: Spec, *, rounding: Rounding, most: int = 1) -> bytes:
    """Four streams of integers, see docs/format.md; MismatchError for weights above 1.001 `most` or ids twice."""
    return _encode(_on_grid(flat, spec, rounding, most))


def _on_grid(flat: FlatTargets, spec: Spec, rounding: Rounding, most: int) -> FlatTargets:
    """Levels for weights, by rising level, then rising id; entries of weight 0 are left out."""
    flat = positive(flat)
    if len(flat.values) and float(flat.values.max()) > 1.001 * most:
        raise MismatchError(f"{spec['name']} holds weights up to {most}, got {flat.values.max()}; use prob40")
    flat = FlatTargets(ids=flat.ids, values=flat.values.astype(np.float64) / most, sizes=flat.sizes)
    if max(len(flat.ids), len(flat.sizes)) > MOST_ENTRIES:
        raise MismatchError(f"a row has {len(flat.ids)} entries, the format holds {MOST_ENTRIES}; make rows shorter")
    twice = find_twice(flat.ids, flat.sizes, spec["logit_width"])
    if twice is not None:
        raise MismatchError(f"supervised position {twice} has an id twice; add its weights up before encoding")
    # One number an entry: numpy sorts those ten times as fast as three columns.
    keys = (flat.positions << _LEVEL_BITS | rounding(flat)) << _ID_BITS | flat.ids
    keys.sort()
    levels = keys >> _ID_BITS & (1 << _LEVEL_BITS) - 1
    return FlatTargets(ids=(keys & (1 << _ID_BITS) - 1).astype(np.uint32), values=levels, sizes=flat.sizes)


def _encode(flat: FlatTargets) -> bytes:
    if not len(flat.sizes):
        return b""
    first = (np.cumsum(flat.sizes) - flat.sizes)[flat.sizes > 0]
    steps = np.diff(flat.values, prepend=0)
    rest = np.ones(len(steps), bool)
    rest[first] = False
    ids = id_steps(flat.ids, run_starts(flat.values, first))
    return encode_ints([flat.sizes, flat.values[first], steps[rest], ids])


def decode_weights(data: bytes, positions: int, spec: Spec, *, most: int = 1) -> FlatTargets:
    """float32 weights most · 2^(-l / 32), descending; FormatError for bytes that no encoder writes."""
    flat, used = _decode(data, positions, spec, most)
    if used != len(data):
        raise FormatError(f"the targets take {used} bytes of {len(data)}; the file is damaged")
    return flat


def _decode(data: bytes, positions: int, spec: Spec, most: int) -> tuple[FlatTargets, int]:
    if not positions:
        ids, sizes = np.zeros(0, np.uint32), np.zeros(0, np.int64)
        return FlatTargets(ids=ids, values=np.zeros(0, np.float32), sizes=sizes), 0
    values, used = decode_ints(data, positions * (1 + 2 * spec["logit_width"]))
    sizes = values[:positions].astype(np.int64)
    total, filled = int(sizes.sum()), np.flatnonzero(sizes)
    if len(values) != positions + 2 * total:
        raise FormatError(
            f"{total} entries of {positions} positions do not fill {len(values)} values; the file is damaged"
        )
    first = (np.cumsum(sizes) - sizes)[filled]
    levels = _levels(values[positions : positions + total], first, filled)
    starts = run_starts(levels, first)
    ids = ids_of_steps(values[positions + total :], starts, int(sizes.max()))
    check_ids(ids, sizes, spec["logit_width"])
    weights = (most * POWERS[levels]).astype(np.float32)
    return FlatTargets(ids=ids.astype(np.uint32, copy=False), values=weights, sizes=sizes), used


def _levels(coded: Array, first: Array, filled: Array) -> Array:
    """[M] int64 levels from every position's first one and the steps between the others."""
    steps, rest = np.empty(len(coded), np.int64), np.ones(len(coded), bool)
    rest[first] = False
    steps[first], steps[np.flatnonzero(rest)] = coded[: len(first)], coded[len(first) :]
    running = np.cumsum(steps)
    levels: Array = running - np.repeat((running - steps)[first], np.diff(first, append=len(coded)))
    if int(levels.max(initial=0)) > _DEEPEST:
        at = int(np.searchsorted(first, int(np.argmax(levels)), side="right")) - 1
        refuse(int(filled[at]), "a weight below 2^-149")
    return levels


def encode_weights_row(
    input_ids: Array, flat: FlatTargets, supervised: Array, spec: Spec, *, rounding: Rounding, most: int = 1
) -> bytes:
    """The targets, then the input ids, as in `split`."""
    flat = _on_grid(flat, spec, rounding, most)
    return _encode(flat) + encode_inputs(input_ids, flat, supervised)


def decode_weights_row(
    block: bytes, seq_len: int, supervised: Array, spec: Spec, *, most: int = 1
) -> tuple[Array, FlatTargets]:
    """input_ids [L] uint32 and the targets of the supervised positions."""
    flat, used = _decode(block, int(np.count_nonzero(supervised[1:])), spec, most)
    return decode_inputs(block[used:], flat, seq_len, supervised), flat
