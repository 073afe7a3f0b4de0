"""`split`: counts, the ids of equal counts as sets, and the row's input ids where the targets do not say them.

A set of g ids needs log2(g!) bits less than a list; draws have many ids of one count. So entries go by falling count,
ids ascend where counts are equal, and only steps between ids are stored. Of the counts, those above 1 are stored as
steps, from the smallest up; how many ids were drawn once follows from Σ counts = N. The next token is mostly among
the ids drawn for it: a row stores which one, and spells out the others.

Shapes: P supervised positions, M entries of all of them, C entries with a count above 1, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .codec_counts import _check_sums
from .codec_ints import MOST_VALUE, MOST_VALUES, decode_ints, encode_ints
from .errors import FormatError, MismatchError
from .flat import FlatTargets
from .words import refuse

Array = NDArray[Any]
Spec = Mapping[str, Any]

_BITS = 20  # of an id, of a count ; a position's number has the 24 that are left
_LOW = 2**_BITS - 1
MOST_ENTRIES = MOST_VALUES // 4  # so that all values of a row fit in one list


# --- targets --------------------------------------------------------------------------------------------


def encode_split(flat: FlatTargets, spec: Spec) -> bytes:
    """Four streams of integers, see docs/format.md; MismatchError when counts do not sum to the spec's rounds."""
    return _encode(_sorted(flat, spec))


def _encode(flat: FlatTargets) -> bytes:
    if not len(flat.sizes):
        return b""
    first = np.cumsum(flat.sizes) - flat.sizes
    many = flat.values > 1
    multiple = _sums(many, flat.sizes)
    counts = flat.values[np.flatnonzero(many)]
    top, last, rest = _ends_of(multiple)
    steps = counts - np.uint32(2)
    steps[:-1] -= steps[1:]
    steps[last] = counts[last] - np.uint32(2)
    return encode_ints([multiple, steps[top], steps[rest], id_steps(flat.ids, run_starts(flat.values, first))])


def _ends_of(sizes: Array) -> tuple[Array, Array, Array]:
    """Indices of each position's first entry, of its last one, and of all but the first; sizes may be 0."""
    after = np.cumsum(sizes)
    filled = np.flatnonzero(sizes)
    first, last = (after - sizes)[filled], after[filled] - 1
    rest = np.ones(int(after[-1]), bool)
    rest[first] = False
    return first, last, np.flatnonzero(rest)  # indices, for numpy selects by masks ten times as slowly


def _sorted(flat: FlatTargets, spec: Spec) -> FlatTargets:
    """The same targets by falling count, then rising id; MismatchError for ids twice or counts of another sum."""
    if max(len(flat.ids), len(flat.sizes)) > MOST_ENTRIES:
        raise MismatchError(f"a row has {len(flat.ids)} entries, split holds {MOST_ENTRIES}; make rows shorter")
    _check_sums(flat.values, flat.sizes, spec["rounds"])
    twice = find_twice(flat.ids, flat.sizes, spec["logit_width"])
    if twice is not None:
        raise MismatchError(f"supervised position {twice} has an id twice; add its counts up before encoding")
    heads = (np.arange(len(flat.sizes), dtype=np.uint64) << np.uint64(2 * _BITS)) + np.uint64(2 ** (2 * _BITS))
    keys = np.repeat(heads, flat.sizes)
    keys -= flat.values.astype(np.uint64) << np.uint64(_BITS)
    keys += flat.ids
    keys.sort()
    counts = (-(keys >> np.uint64(_BITS)).astype(np.int64)) & _LOW
    counts[counts == 0] = 2**_BITS
    return replace(flat, ids=(keys & np.uint64(_LOW)).astype(np.uint32), values=counts.astype(np.uint32))


def find_twice(ids: Array, sizes: Array, width: int) -> int | None:
    """The first position that has an id twice."""
    narrow = len(sizes) * width < 2**32  # uint32 sorts several times as fast
    keys: Array = np.zeros(len(ids), np.uint32 if narrow else np.uint64)
    filled = np.flatnonzero(sizes)
    keys[np.cumsum(sizes[filled])[:-1]] = width
    keys = np.cumsum(keys, dtype=keys.dtype, out=keys)
    keys += ids
    keys.sort()
    same = np.flatnonzero(keys[1:] == keys[:-1])
    return int(filled[int(keys[same[0]]) // width]) if len(same) else None


def run_starts(counts: Array, first: Array) -> Array:
    """Indices of the entries that begin a run of equal counts in a position."""
    starts = np.ones(len(counts), bool)
    np.not_equal(counts[1:], counts[:-1], out=starts[1:])
    starts[first] = True
    return np.flatnonzero(starts)


def id_steps(ids: Array, starts: Array) -> Array:
    """[M] the id where a run begins, else how many ids were passed over since the one before."""
    steps = ids.copy()
    steps[1:] -= ids[:-1] + np.uint32(1)
    steps[starts] = ids[starts]
    return steps


def decode_split(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    """The inverse, entries by falling count and rising id; FormatError for bytes that no encoder writes."""
    flat, used = _decode(data, positions, spec)
    if used != len(data):
        raise FormatError(f"the targets take {used} bytes of {len(data)}; the file is damaged")
    return flat


def _decode(data: bytes, positions: int, spec: Spec) -> tuple[FlatTargets, int]:
    rounds = spec["rounds"]
    if not positions:
        empty = np.zeros(0, np.uint32)
        return FlatTargets(ids=empty, values=empty, sizes=np.zeros(0, np.int64), rounds=rounds), 0
    most = positions * (1 + 2 * min(rounds, spec["logit_width"]))
    values, used = decode_ints(data, most, compiled.scratch("values"))
    return _split_quickly(values, positions, spec) or _split_list(values, positions, spec), used


def _split_quickly(values: Array, positions: int, spec: Spec) -> FlatTargets | None:
    """`_split_list`, compiled; None where that is not at hand, or refuses and does not say why."""
    fast, rounds, width = compiled.kernels(), spec["rounds"], spec["logit_width"]
    if fast is None:
        return None
    starts = compiled.scratch("starts")(len(values) + 1, np.uint8)
    sound, ids, counts, sizes = fast.split(
        values, positions, rounds, width, starts, *compiled.stamps(width, positions + 1)
    )
    return FlatTargets(ids=ids, values=counts, sizes=sizes, rounds=rounds) if sound else None


def _split_list(values: Array, positions: int, spec: Spec) -> FlatTargets:
    """The targets that the four streams say, or FormatError."""
    rounds = spec["rounds"]
    if len(values) < positions:
        raise FormatError(f"{len(values)} values cannot hold {positions} sizes; the file is damaged")
    multiple = values[:positions].astype(np.int64)
    total = int(multiple.sum())
    if total > len(values) - positions:
        raise FormatError(f"{total} counts do not fit in {len(values) - positions} values; the file is damaged")
    counts = _counts(values[positions : positions + total], multiple)
    if int(counts.max(initial=0)) > rounds:  # beside others its sum could wrap around
        owner = np.searchsorted(np.cumsum(multiple), int(np.argmax(counts)), side="right")
        refuse(int(owner), f"counts that sum to more than {rounds}")
    single = rounds - _sums(counts, multiple)
    if int(single.min()) < 0:
        refuse(int(np.argmin(single)), f"counts that sum to more than {rounds}")
    sizes, steps = multiple + single, values[positions + total :]
    if int(sizes.sum()) != len(steps):
        raise FormatError(f"the sizes sum to {sizes.sum()}, {len(steps)} ids follow; the file is damaged")
    first = np.cumsum(sizes) - sizes
    everything = np.ones(len(steps), np.uint32)
    everything[_places(first, multiple)] = counts
    ids = ids_of_steps(steps, run_starts(everything, first), rounds)
    check_ids(ids, sizes, spec["logit_width"])
    ids = ids.astype(np.uint32, copy=False)
    return FlatTargets(ids=ids, values=everything, sizes=sizes, rounds=rounds)


def _counts(steps: Array, multiple: Array) -> Array:
    """[C] int64 counts above 1 from the steps between them: first every position's largest, then the others."""
    if not len(steps):
        return np.zeros(0, np.int64)
    top, last, rest = _ends_of(multiple)
    placed = np.empty(len(steps), np.int64)
    placed[top], placed[rest] = steps[: len(top)], steps[len(top) :]
    ends = np.cumsum(placed)[last]
    falls = np.empty(len(steps) + 1, np.int64)
    falls[1:] = -placed
    # Counts fall by the steps; a position begins at its sum + 2, from where the one before ended, at 2.
    falls[top[1:]] -= ends[:-1] - ends[1:]
    falls[:1] = ends[:1] + 2
    return np.cumsum(falls[:-1])


def _places(first: Array, multiple: Array) -> Array:
    """[C] the indices first[p] .. first[p] + multiple[p] - 1 of all positions."""
    # A sum of jumps: np.repeat mispredicts a branch for every position.
    top, last, _ = _ends_of(multiple)
    jumps = np.ones(int(multiple.sum()), np.int64)
    filled = np.flatnonzero(multiple)
    jumps[top] = np.diff(first[filled], prepend=0)
    jumps[top[1:]] -= (last - top)[:-1]
    return np.cumsum(jumps)


def _sums(values: Array, sizes: Array) -> Array:
    """[P] the sum of each position's values."""
    running = np.concatenate([[0], np.cumsum(values)])
    after = np.cumsum(sizes)
    sums: Array = running[after] - running[after - sizes]
    return sums


def ids_of_steps(steps: Array, starts: Array, longest: int) -> Array:
    """[M] ids: the running sum of each run; one sum over all, whose runs begin by taking back the one before."""
    # A run's own sum must not wrap around; what the runs before it left may, and cancels.
    wide = np.uint32 if longest * MOST_VALUE < 2**32 else np.uint64
    rises = steps + wide(1)
    rises[starts] -= wide(1)
    running = np.cumsum(rises, dtype=wide)
    own = np.diff(running[starts[1:] - 1], prepend=wide(0))  # the last id of each run but the last
    rises[starts[1:]] -= own
    return np.cumsum(rises, dtype=wide, out=running)


def check_ids(ids: Array, sizes: Array, width: int) -> None:
    """FormatError for an id beyond the vocabulary or twice in a position."""
    if len(ids) and int(ids.max()) >= width:
        position = np.searchsorted(np.cumsum(sizes), int(np.argmax(ids)), side="right")
        refuse(int(position), f"id {ids.max()}, but logit_width={width}")
    twice = find_twice(ids.astype(np.uint32, copy=False), sizes, width)
    if twice is not None:
        refuse(twice, "an id twice")


# --- a row ----------------------------------------------------------------------------------------------


def encode_split_row(input_ids: Array, flat: FlatTargets, supervised: Array, spec: Spec) -> bytes:
    """The targets, then the input ids, as `encode_inputs` has them."""
    flat = _sorted(flat, spec)
    return _encode(flat) + encode_inputs(input_ids, flat, supervised)


def decode_split_row(block: bytes, seq_len: int, supervised: Array, spec: Spec) -> tuple[Array, FlatTargets]:
    """input_ids [L] uint32 and the targets of the supervised positions."""
    flat, used = _decode(block, int(np.count_nonzero(supervised[1:])), spec)
    return decode_inputs(block[used:], flat, seq_len, supervised), flat


def encode_inputs(input_ids: Array, flat: FlatTargets, supervised: Array) -> bytes:
    """Which of its position's entries each next token is, then the input ids that this does not say."""
    at = np.flatnonzero(flat.matches(input_ids[1:][supervised[1:]]))
    owners = flat.positions[at]
    slots = np.zeros(len(flat.sizes), np.int64)
    slots[owners] = at - (np.cumsum(flat.sizes) - flat.sizes)[owners] + 1
    return encode_ints([slots, input_ids[~_told(slots, supervised)]])


def decode_inputs(data: bytes, flat: FlatTargets, seq_len: int, supervised: Array) -> Array:
    """[L] uint32: the inverse, given the targets with their entries in the same order."""
    positions = len(flat.sizes)
    values, used = decode_ints(data, positions + seq_len, compiled.scratch("inputs"))
    if used != len(data):
        raise FormatError(f"the input ids take {used} bytes of {len(data)}; the file is damaged")
    input_ids, fast = np.empty(seq_len, np.uint32), compiled.kernels()
    if fast and fast.inputs(values, flat.ids, flat.sizes, supervised, input_ids):
        return input_ids
    slots, spelled = values[:positions].astype(np.int64), values[positions:]
    wrong = np.flatnonzero(slots > flat.sizes[: len(slots)])
    if len(wrong):
        refuse(int(wrong[0]), f"entry {slots[wrong[0]]} of {flat.sizes[wrong[0]]} as its next token")
    told = _told(slots, supervised) if len(slots) == positions else np.zeros(seq_len, bool)
    if len(slots) < positions or len(spelled) != seq_len - np.count_nonzero(told):
        raise FormatError(f"{len(values)} values do not make {seq_len} input ids; the file is damaged")
    input_ids[~told] = spelled
    input_ids[told] = flat.ids[((np.cumsum(flat.sizes) - flat.sizes) + slots - 1)[slots > 0]]
    return input_ids


def _told(slots: Array, supervised: Array) -> Array:
    """[L] bool: tokens that are one of the ids of the position before them."""
    told = np.zeros(len(supervised), bool)
    told[1:][supervised[1:]] = slots > 0
    return told
