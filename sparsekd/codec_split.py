"""`split`: counts, the ids of equal counts as sets, and the row's input ids where the targets do not say them.

A set of g ids needs log2(g!) bits less than a list; draws have many ids of one count. So entries go by falling count,
ids ascend where counts are equal, and only steps between ids are stored. Of the counts, those above 1 are stored as
steps, from the smallest up; how many ids were drawn once follows from Σ counts = N. The next token is mostly among
the ids drawn for it: a row stores which one, and spells out the others.

All of a row is one list of integers (codec_ints.py), its small numbers in one zstd block, its ids in another: blocks of
their own for each stream cost rows of 128 tokens 0.6 % of their bytes and a quarter to a half of zstd's time.

Shapes: P supervised positions, M entries of all of them, C entries with a count above 1, L tokens of a row, T values of
its list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

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
    nothing = np.zeros(0, np.uint32)
    return _encode(_sorted(flat, spec), nothing, nothing)


def _encode(flat: FlatTargets, slots: Array, spelled: Array) -> bytes:
    """The list of entries by falling count and rising id, with what a row adds to it."""
    if not len(flat.sizes) and not len(spelled):
        return b""
    first = np.cumsum(flat.sizes) - flat.sizes
    many = flat.values > 1
    multiple = _sums(many, flat.sizes)
    counts = flat.values[np.flatnonzero(many)]
    top, last, rest = _ends_of(multiple)
    steps = counts - np.uint32(2)
    steps[:-1] -= steps[1:]
    steps[last] = counts[last] - np.uint32(2)
    ids = id_steps(flat.ids, run_starts(flat.values, first))
    return encode_ints([_joined(multiple, steps[top], steps[rest], slots), _joined(ids, spelled)])


def _joined(*streams: Array) -> Array:
    return np.concatenate([np.asarray(each, np.uint32) for each in streams])


def _ends_of(sizes: Array) -> tuple[Array, Array, Array]:
    """Indices of each position's first entry, of its last one, and of all but the first; sizes may be 0."""
    after = np.cumsum(sizes)
    filled = np.flatnonzero(sizes)
    first, last = (after - sizes)[filled], after[filled] - 1
    rest = np.ones(int(sizes.sum()), bool)
    rest[first] = False
    return first, last, np.flatnonzero(rest)  # indices, for numpy selects by masks ten times as slowly


def _sorted(flat: FlatTargets, spec: Spec, length: int = 0) -> FlatTargets:
    """The same targets by falling count, then rising id; MismatchError for ids twice or counts of another sum."""
    if 4 * max(len(flat.ids), len(flat.sizes)) + length > MOST_VALUES:
        raise MismatchError(
            f"a row has {len(flat.ids)} entries and {length} input ids, split holds {MOST_VALUES} together, "
            "an entry as 4; make rows shorter"
        )
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
    if not positions and not data:
        return _no_targets(spec)
    flat, _, rest = _split_list(_whole_list(data, most_values(positions, 0, spec)), positions, 0, spec)
    if len(rest):
        _refuse_sizes(len(flat.ids), len(flat.ids) + len(rest))
    return flat


def most_values(positions: int, length: int, spec: Spec) -> int:
    """Of a list of so many positions and input ids: sizes, counts and ids, then slots and what is spelled out."""
    return positions * (1 + 2 * min(spec["rounds"], spec["logit_width"])) + (positions + length if length else 0)


def _whole_list(data: bytes, most: int) -> Array:
    values, used = decode_ints(data, most)
    if used != len(data):
        raise FormatError(f"its integers take {used} bytes of {len(data)}; the file is damaged")
    return values


def _no_targets(spec: Spec) -> FlatTargets:
    empty = np.zeros(0, np.uint32)
    return FlatTargets(ids=empty, values=empty, sizes=np.zeros(0, np.int64), rounds=spec["rounds"])


def _split_list(values: Array, positions: int, told: int, spec: Spec) -> tuple[FlatTargets, Array, Array]:
    """The targets, `told` slots and what follows of the list, or FormatError."""
    rounds = spec["rounds"]
    if len(values) < positions:
        raise FormatError(f"{len(values)} values cannot hold {positions} sizes; the file is damaged")
    multiple = values[:positions].astype(np.int64)
    total = int(multiple.sum())
    head = positions + total + told
    if head > len(values):
        raise FormatError(
            f"{total} counts and {told} slots do not fit in {len(values) - positions} values; the file is damaged"
        )
    counts = _counts(values[positions : positions + total], multiple)
    if int(counts.max(initial=0)) > rounds:  # beside others its sum could wrap around
        owner = np.searchsorted(np.cumsum(multiple), int(np.argmax(counts)), side="right")
        refuse(int(owner), f"counts that sum to more than {rounds}")
    single = rounds - _sums(counts, multiple)
    if int(single.min(initial=0)) < 0:
        refuse(int(np.argmin(single)), f"counts that sum to more than {rounds}")
    sizes = multiple + single
    entries = int(sizes.sum())
    if entries > len(values) - head:
        _refuse_sizes(entries, len(values) - head)
    steps, first = values[head : head + entries], np.cumsum(sizes) - sizes
    everything = np.ones(entries, np.uint32)
    everything[_places(first, multiple)] = counts
    ids = ids_of_steps(steps, run_starts(everything, first), rounds)
    check_ids(ids, sizes, spec["logit_width"])
    flat = FlatTargets(ids=ids.astype(np.uint32, copy=False), values=everything, sizes=sizes, rounds=rounds)
    return flat, values[head - told : head], values[head + entries :]


def _refuse_sizes(entries: int, ids: int) -> NoReturn:
    raise FormatError(f"the sizes sum to {entries}, {ids} ids follow; the file is damaged")


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
    """The targets and the input ids in one list."""
    flat = _sorted(flat, spec, len(input_ids))
    return _encode(flat, *input_streams(input_ids, flat, supervised))


def decode_split_row(block: bytes, seq_len: int, supervised: Array, spec: Spec) -> tuple[Array, FlatTargets]:
    """input_ids [L] uint32 and the targets of the supervised positions."""
    positions = int(np.count_nonzero(supervised[1:]))
    values = _whole_list(block, most_values(positions, seq_len, spec))
    flat, slots, spelled = _split_list(values, positions, positions, spec)
    return place_inputs(slots, spelled, flat, supervised), flat


def encode_inputs(input_ids: Array, flat: FlatTargets, supervised: Array) -> bytes:
    """Input ids as a list of their own, behind targets of another codec."""
    return encode_ints(input_streams(input_ids, flat, supervised))


def input_streams(input_ids: Array, flat: FlatTargets, supervised: Array) -> tuple[Array, Array]:
    """Slots [P], which of its position's entries each next token is, from 1 on, or 0; the input ids that are not told
    this way."""
    at = np.flatnonzero(flat.matches(input_ids[1:][supervised[1:]]))
    owners = flat.positions[at]
    slots = np.zeros(len(flat.sizes), np.int64)
    slots[owners] = at - (np.cumsum(flat.sizes) - flat.sizes)[owners] + 1
    return slots, input_ids[~_told(slots, supervised)]


def decode_inputs(data: bytes, flat: FlatTargets, seq_len: int, supervised: Array) -> Array:
    """[L] uint32: the inverse of `encode_inputs`, given the targets with their entries in the same order."""
    positions = len(flat.sizes)
    values, used = decode_ints(data, positions + seq_len)
    if used != len(data):
        raise FormatError(f"the input ids take {used} bytes of {len(data)}; the file is damaged")
    return place_inputs(values[:positions], values[positions:], flat, supervised)


def place_inputs(slots: Array, spelled: Array, flat: FlatTargets, supervised: Array) -> Array:
    """[L] uint32: the inverse of `input_streams`; FormatError for streams that do not fit."""
    input_ids, slots = np.empty(len(supervised), np.uint32), slots.astype(np.int64)
    wrong = np.flatnonzero(slots > flat.sizes[: len(slots)])
    if len(wrong):
        refuse(int(wrong[0]), f"entry {slots[wrong[0]]} of {flat.sizes[wrong[0]]} as its next token")
    if len(slots) + len(spelled) != len(flat.sizes) + len(supervised) - np.count_nonzero(slots):
        raise FormatError(
            f"{len(slots)} slots and {len(spelled)} ids do not make {len(supervised)} input ids; the file is damaged"
        )
    told = _told(slots, supervised)
    input_ids[~told] = spelled
    input_ids[told] = flat.ids[((np.cumsum(flat.sizes) - flat.sizes) + slots - 1)[slots > 0]]
    return input_ids


def _told(slots: Array, supervised: Array) -> Array:
    """[L] bool: tokens that are one of the ids of the position before them."""
    told = np.zeros(len(supervised), bool)
    told[1:][supervised[1:]] = slots > 0
    return told
