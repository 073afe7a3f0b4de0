"""Codecs of counts, all exact: `raw24`, `paper24`, `raw40`; and `ratio32`, `ratio48`, which add probabilities.

Shapes: P supervised positions, M entries of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec_weights import OCTAVE, SMALLEST, ratio_codes, ratio_levels
from .errors import FormatError, MismatchError
from .flat import FlatTargets, Importance
from .words import pack, refuse, unpack

Array = NDArray[Any]
Spec = Mapping[str, Any]

_ENTROPY = 2048  # entropies count 1/2048 bits: u16 reaches 32 bits, and log2 V is at most 20


# --- draws from p itself --------------------------------------------------------------------------------


def encode_counts(flat: FlatTargets, spec: Spec, *, width: int, id_bits: int) -> bytes:
    """One word per entry, ids ascending; MismatchError when counts do not sum to the spec's rounds."""
    order = _by_id(flat)
    ids, counts = flat.ids[order], flat.values[order]
    _check_sums(counts, flat.sizes, spec["rounds"])
    return pack(_words(ids, counts, id_bits), width)


def decode_counts(data: bytes, positions: int, spec: Spec, *, width: int, id_bits: int) -> FlatTargets:
    """k is implied: a position ends where the running sum of its counts reaches `rounds`."""
    words = unpack(data, width)
    ids = (words & words.dtype.type(2**id_bits - 1)).astype(np.uint32, copy=False)
    counts = (words >> words.dtype.type(id_bits)).astype(np.uint32, copy=False) + np.uint32(1)
    ends = _ends(counts, positions, spec["rounds"])
    falls = ids[1:] <= ids[:-1]
    falls[ends[:-1]] = False
    if falls.any():
        at = int(np.argmax(falls))
        refuse(int(np.searchsorted(ends, at + 1)), f"id {ids[at + 1]} after {ids[at]}, ids must ascend")
    return FlatTargets(ids=ids, values=counts, sizes=np.diff(ends, prepend=-1), rounds=spec["rounds"])


def _words(ids: Array, counts: Array, id_bits: int) -> Array:
    return ids.astype(np.uint64) | ((counts.astype(np.uint64) - np.uint64(1)) << np.uint64(id_bits))


def _by_id(flat: FlatTargets) -> Array | slice:
    """The order that sorts entries by id within each position; MismatchError when an id is there twice."""
    keys = (flat.positions.astype(np.uint64) << np.uint64(32)) | flat.ids.astype(np.uint64)
    if bool((keys[1:] > keys[:-1]).all()):
        return slice(None)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        position, token = divmod(int(keys[twice[0]]), 2**32)
        raise MismatchError(f"supervised position {position} has id {token} twice; add its counts up before encoding")
    return order


def _check_sums(counts: Array, sizes: Array, rounds: int) -> None:
    """MismatchError unless counts are at least 1 and sum to `rounds` in every position."""
    if len(counts) and int(counts.min()) < 1:
        raise MismatchError("a count is 0; leave such ids out")
    totals = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    ends = np.cumsum(sizes)
    sums = totals[ends] - totals[ends - sizes]
    bad = np.flatnonzero(sums != rounds)
    if len(bad):
        raise MismatchError(
            f"the counts of supervised position {bad[0]} sum to {sums[bad[0]]}, but rounds={rounds}; "
            "counts must be stored whole, not truncated"
        )


def _ends(counts: Array, positions: int, rounds: int) -> Array:
    """[P] the last entry of each position."""
    # int32 where it cannot overflow: decoding a row of 4096 tokens is 10 to 25 % faster.
    narrow = len(counts) * int(counts.max(initial=0)) < 2**31
    totals = np.cumsum(counts, dtype=np.int32 if narrow else np.int64)
    total = int(totals[-1]) if len(totals) else 0
    ends = np.flatnonzero(totals == totals // rounds * rounds)
    if total == positions * rounds and len(ends) == positions:
        return ends
    reached = totals[ends] // rounds
    wrong = np.flatnonzero(reached != np.arange(1, len(ends) + 1))
    position = min(int(wrong[0]) if len(wrong) else len(ends), positions)
    raise FormatError(
        f"counts do not fit from supervised position {position} on: {positions} positions of "
        f"{rounds} rounds need {positions * rounds}, the counts sum to {total}; the file is damaged"
    )


# --- draws from another distribution ----------------------------------------------------------------------
#
# Counts alone do not say what a draw is worth: that needs p of the drawn ids and, for the plain weighting, Σ p^t.
# Storing finished 16-bit weights (prob40) takes 5 bytes an entry and settles on one weighting for ever; this takes 4,
# keeps the counts exact, and leaves p, q and both weightings to the reader.


def encode_importance(flat: FlatTargets, spec: Spec, *, width: int, id_bits: int) -> bytes:
    """Entropies, largest probabilities, then per entry the counts' word with 8 more bits: the ratio to the one before.

    MismatchError as for counts, and for another temperature or a log2_p that is none.
    """
    given = _checked(flat, spec)
    _by_id(flat)
    _check_sums(flat.values, flat.sizes, spec["rounds"])
    order = np.lexsort((-given.log2_p, flat.positions))  # stable: equal probabilities keep their order
    levels = -given.log2_p[order].astype(np.float64).clip(-149, 0) * OCTAVE
    # Half a unit rounds up, so that what is left for the first step is less than half a unit, and that step is 0.
    tops = np.floor(levels[np.cumsum(flat.sizes) - flat.sizes] + 0.5).clip(0, 65535)
    codes = ratio_codes(levels, flat.sizes, start=tops, most=255)
    entropies = np.rint(given.entropy.astype(np.float64) * _ENTROPY).clip(0, 65535)
    words = _words(flat.ids[order], flat.values[order], id_bits) | (codes << np.uint64(8 * width - 8))
    return pack(entropies.astype(np.uint64), 2) + pack(tops.astype(np.uint64), 2) + pack(words, width)


def decode_importance(data: bytes, positions: int, spec: Spec, *, width: int, id_bits: int) -> FlatTargets:
    """Counts exactly, log2_p and entropy to the precision that docs/format.md states."""
    if len(data) < 4 * positions:
        raise FormatError(f"{len(data)} bytes cannot hold 2 numbers of {positions} positions; the file is damaged")
    heads, words = unpack(data[: 4 * positions], 2), unpack(data[4 * positions :], width)
    ids = (words & words.dtype.type(2**id_bits - 1)).astype(np.uint32)
    count_bits = 8 * width - 8 - id_bits
    counts = ((words >> words.dtype.type(id_bits)) & words.dtype.type(2**count_bits - 1)).astype(np.uint32)
    counts += np.uint32(1)
    sizes = np.diff(_ends(counts, positions, spec["rounds"]), prepend=-1)
    tops, codes = heads[positions:].astype(np.int64), words >> words.dtype.type(8 * width - 8)
    _check_first(codes, sizes, tops)
    levels = ratio_levels(codes, sizes, start=tops)
    importance = Importance(
        log2_p=(-levels / OCTAVE).astype(np.float32),  # exact: at most 18 bits
        entropy=(heads[:positions] / _ENTROPY).astype(np.float32),
        temperature=spec["temperature"],
        normalize=spec["normalize"],
    )
    flat = FlatTargets(ids=ids, values=counts, sizes=sizes, rounds=spec["rounds"], importance=importance)
    if int(levels.max(initial=0)) > SMALLEST:
        refuse(flat.positions[int(np.argmax(levels))], "a probability below 2^-150")
    return flat


def _checked(flat: FlatTargets, spec: Spec) -> Importance:
    given = flat.importance
    assert given is not None
    if given.temperature != spec["temperature"]:
        raise MismatchError(
            f"draws have temperature={given.temperature}, codec {spec['name']} was set up for "
            f"temperature={spec['temperature']}; draw and store with the same"
        )
    fine = np.isfinite(given.log2_p) & (given.log2_p < 0.001)
    if not fine.all():
        at = int(np.argmin(fine))
        raise MismatchError(
            f"supervised position {flat.positions[at]} has log2_p={given.log2_p[at]}; it is finite and at most 0"
        )
    if not np.isfinite(given.entropy).all():
        raise MismatchError(f"supervised position {np.argmin(np.isfinite(given.entropy))} has an entropy that is none")
    return given


def _check_first(codes: Array, sizes: Array, tops: Array) -> None:
    """The first entry's probability is the position's own number: a step goes beyond it only where that one ends."""
    odd = np.flatnonzero((codes[np.cumsum(sizes) - sizes] > 0) & (tops < 65535))
    if len(odd):
        refuse(odd[0], f"a first step of {codes[(np.cumsum(sizes) - sizes)[odd[0]]]} after its largest probability")
