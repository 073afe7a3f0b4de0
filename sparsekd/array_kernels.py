"""Loops over arrays that every reader and writer of rows needs, compiled by numba (the extra `fast`); `compiled_for`.

They are reached behind `compiled.kernels()` only, as those of codec_kernels.py are, and say `False` of what they do not
take: the numpy code beside the caller then does it.

Shapes: P positions, M entries of all of them, B rows, K entries of the longest position.
"""

# mypy: no-check-untyped-defs
# What a variable is here, numba infers; mypy would see numpy's scalars.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

BYTES, NUMBERS, SIZES, FLAGS, WEIGHTS = (
    types.Array(of, 1, "C", readonly=True)
    for of in (types.uint8, types.uint32, types.int64, types.boolean, types.float32)
)
LONG, OUT8, OUT32 = types.int64, types.uint8[::1], types.uint32[::1]
FLAGS_2D = types.Array(types.boolean, 2, "C", readonly=True)


def compiled_for(*arguments: Any) -> Callable[[Any], Any]:
    """Compiles for these arguments when this module is imported, and keeps the code on disk: in __pycache__ or, if that
    is read-only, in the user's cache folder (numba's NUMBA_CACHE_DIR). Where neither works, each process
    compiles."""

    def compile_it(function: Any) -> Any:
        try:
            return numba.njit(arguments, nogil=True, cache=True)(function)
        except Exception:  # no folder to write to, a full disk, a damaged file: that can raise anything
            return numba.njit(arguments, nogil=True)(function)

    return compile_it


@compiled_for(NUMBERS, types.int64[::1])
def tally(ids, uses):
    """`uses[each] += 1` for each id that is below len(uses)."""
    for each in ids:
        if each < len(uses):
            uses[each] += 1


@compiled_for(NUMBERS, OUT32)
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


@compiled_for(NUMBERS, WEIGHTS, SIZES, FLAGS, types.int64[:, ::1], types.float32[:, ::1])
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


def _pad_joined(ids, values, sizes, rounds, supervised, ids_BPK, weights_BPK):
    """`padded.pad_joined`, padding written too: whether all of it fitted. Weights are values / rounds."""
    at, row = 0, 0
    if len(values) != len(ids) or ids_BPK.shape != weights_BPK.shape or ids_BPK.shape[:2] != supervised.shape:
        return False
    for b in range(supervised.shape[0]):
        for p in range(supervised.shape[1]):
            size = 0
            if supervised[b, p]:
                if row == len(sizes) or not 0 <= sizes[row] <= min(ids_BPK.shape[2], len(ids) - at):
                    return False
                size = sizes[row]
                row += 1
            for j in range(size):
                ids_BPK[b, p, j] = ids[at + j]
            for j in range(size):
                weights_BPK[b, p, j] = np.float32(np.float64(values[at + j]) / np.float64(rounds))
            ids_BPK[b, p, size:] = 0
            weights_BPK[b, p, size:] = 0
            at += size
    return row == len(sizes) and at == len(ids)


_JOINED = (SIZES, LONG, FLAGS_2D, types.int64[:, :, ::1], types.float32[:, :, ::1])
pad_counts = compiled_for(NUMBERS, NUMBERS, *_JOINED)(_pad_joined)
pad_weights = compiled_for(NUMBERS, WEIGHTS, *_JOINED)(_pad_joined)
