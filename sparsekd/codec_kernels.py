"""Compiled twins of the loops that read a row, by numba (the extra `fast`); reached through `compiled.kernels()` only.

What a kernel does not take, it says no more of than `False` or -1: the numpy code beside its caller then runs on the
same bytes and refuses by name. So errors are the same by construction; the tests say that both take the same bytes.
Nothing checks bounds here: an index is checked before it is used, or counts up to a length that was.

All release the GIL, so that one thread reads ahead while another computes. They write into memory that is given where a
caller can use it again: fresh pages cost more than the work on them.

Shapes: T values of a list, P supervised positions, M entries of all of them, L tokens of a row, K entries of the
longest position.
"""

# mypy: no-check-untyped-defs
# What a variable is here, numba infers; mypy would see numpy's scalars.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

_BYTES, _NUMBERS, _SIZES, _FLAGS, _WEIGHTS = (
    types.Array(of, 1, "C", readonly=True)
    for of in (types.uint8, types.uint32, types.int64, types.boolean, types.float32)
)
_LONG, _OUT8, _OUT32 = types.int64, types.uint8[::1], types.uint32[::1]


def _compiled(*arguments: Any) -> Callable[[Any], Any]:
    """Compiles for these arguments when this module is imported, and keeps the code on disk: in __pycache__ or, if that
    is read-only, in the user's cache folder (numba's NUMBA_CACHE_DIR). Where neither works, each process
    compiles."""

    def compile_it(function: Any) -> Any:
        try:
            return numba.njit(arguments, nogil=True, cache=True)(function)
        except Exception:  # no folder to write to, a full disk, a damaged file: that can raise anything
            return numba.njit(arguments, nogil=True)(function)

    return compile_it


@_compiled(_BYTES, _BYTES, _LONG, _NUMBERS, _OUT32)
def ints(classes, data, end, first, values):
    """`codec_ints.decode_ints` below the zstd frame: fills values [T] and returns where the raw bytes end, or -1.

    Args:
        classes: [T].
        end: where the raw bytes begin in `data`, above 0.
        first: [256] the least value of each class.
    """
    lows, seconds = 0, 0
    for each in classes:
        lows += each >= 128
        seconds += each >= 240
    if end < 1 or end + lows + seconds > len(data) or len(values) < len(classes) or len(first) < 256:
        return -1
    low, second = np.uint64(end), np.uint64(end + lows)
    for i in range(len(classes)):
        one, two = np.uint64(classes[i] >= 128), np.uint64(classes[i] >= 240)
        # No branch: about half of all ids take a raw byte, and none can tell which. The others read byte 0, times 0.
        rest = np.uint64(data[low * one]) * one + (np.uint64(data[second * two]) * two << np.uint64(8))
        values[i] = np.uint64(first[classes[i]]) + rest
        low += one
        second += two
    return np.int64(second)


@_compiled(_NUMBERS, _LONG, _LONG, _LONG, _OUT8, _OUT32, _LONG)
def split(values, positions, rounds, width, starts, seen, mark):
    """`codec_split._decode` below its list of integers: whether it is sound, ids [M], counts [M], sizes [P].

    Args:
        values: [T].
        starts: scratch, at least T + 1.
        seen: scratch, at least `width`, nothing above mark; what is in it afterwards is at most mark + positions.
        mark: mark + positions is below 2^32.
    """
    none, no_sizes = np.empty(0, np.uint32), np.empty(0, np.int64)
    if not 0 < positions <= len(values) or len(starts) <= len(values) or len(seen) < width:
        return False, none, none, no_sizes
    total, filled = 0, 0
    for p in range(positions):
        total += np.int64(values[p])
        filled += values[p] > 0
    entries = len(values) - positions - total
    if entries < 0:
        return False, none, none, no_sizes
    counts, sizes = np.ones(entries, np.uint32), np.empty(positions, np.int64)
    starts[: entries + 1] = 0
    top, rest, at = positions, positions + filled, 0
    for p in range(positions):
        many, left, count = np.int64(values[p]), np.int64(rounds), np.int64(2)
        if at + many > entries:
            return False, none, none, no_sizes
        if many:
            for j in range(many - 1, 0, -1):  # the smallest count is 2 + its step
                step = np.int64(values[rest + j - 1])
                starts[at + j + 1] = step > 0
                count += step
                left -= count
                if left < 0:
                    return False, none, none, no_sizes
                counts[at + j] = count
            step = np.int64(values[top])
            starts[at + 1] = step > 0
            count += step
            left -= count
            counts[at] = count
            starts[at + many] = 1
            top += 1
            rest += many - 1
        if left < 0:
            return False, none, none, no_sizes
        starts[at] = 3  # of a run, and of a position
        sizes[p] = many + left
        at += many + left
    if at != entries:
        return False, none, none, no_sizes
    # All ids in one loop: a loop for each position, or run, ends with a branch mispredicted.
    ids = np.empty(entries, np.uint32)
    steps, token, here, one = np.uint64(positions + total), np.uint64(0), np.uint64(mark), np.uint64(1)
    for i in range(np.uint64(entries)):
        start = np.uint64(starts[i])
        here += start >> one
        follows = (start & one) - one  # all bits, or none where a run begins
        token = np.uint64(values[steps + i]) + ((token + one) & follows)
        if token >= np.uint64(width) or np.uint64(seen[token]) == here:
            return False, none, none, no_sizes
        seen[token] = here
        ids[i] = token
    return True, ids, counts, sizes


@_compiled(_NUMBERS, _NUMBERS, _SIZES, _FLAGS, _OUT32)
def inputs(values, ids, sizes, supervised, tokens):
    """`codec_split.decode_inputs` below its list: whether it is sound; fills tokens [L].

    Args:
        values: [P] which entry of its position each next token is, then what is spelled out.
        ids, sizes: [M], [P].
        supervised: [L] bool.
    """
    positions = len(sizes)
    if len(values) < positions or len(tokens) != len(supervised):
        return False
    spelled, p, first = positions, 0, 0
    for i in range(len(tokens)):
        entry = 0
        if i > 0 and supervised[i]:
            if p == positions:
                return False
            entry = np.int64(values[p])
            if entry > sizes[p] or first + sizes[p] > len(ids):
                return False
            first += sizes[p]
            p += 1
        if entry:
            tokens[i] = ids[first - sizes[p - 1] + entry - 1]
        else:
            if spelled == len(values):
                return False
            tokens[i] = values[spelled]
            spelled += 1
    return p == positions and spelled == len(values)


@_compiled(_NUMBERS, _OUT32)
def renumber(table, ids):
    """`ids[:] = table[ids]`, or False, and ids as they were, where one is none of the table's."""
    most = np.uint32(0)
    for each in ids:
        most = max(most, each)
    if len(ids) and most >= len(table):
        return False
    for i in range(len(ids)):
        ids[i] = table[ids[i]]
    return True


@_compiled(_NUMBERS, _WEIGHTS, _SIZES, _FLAGS, types.int64[:, ::1], types.float32[:, ::1])
def pad(ids, weights, sizes, supervised, ids_PK, weights_PK):
    """One row of `padded.pad_rows`, into zeros: whether all of it fitted."""
    at, row = 0, 0
    if len(weights) != len(ids) or len(ids_PK) != len(supervised) or ids_PK.shape != weights_PK.shape:
        return False
    for p in range(len(supervised)):
        if not supervised[p]:
            continue
        if row == len(sizes) or not 0 <= sizes[row] <= min(ids_PK.shape[1], len(ids) - at):
            return False
        for j in range(sizes[row]):
            ids_PK[p, j] = ids[at + j]
            weights_PK[p, j] = weights[at + j]
        at += sizes[row]
        row += 1
    return row == len(sizes) and at == len(ids)
