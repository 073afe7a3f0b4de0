"""Sparse targets of some rows as padded arrays, one entry after another into place.

Shapes: B rows, P positions of each, M entries of a row, K entries of the longest position of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .errors import FormatError
from .flat import FlatTargets

Array = NDArray[Any]

_MOST_BYTES = 2**31  # of one row; a file of some MB must not make us allocate more


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedRows:
    """B rows as a student reads them: input_ids [B, L] uint32, supervised [B, L] bool, ids [B, L - 1, K] int64 and
    weights [B, L - 1, K] float32, as `pad_rows` makes them."""

    input_ids: Array
    supervised: Array
    ids: Array
    weights: Array


def pad_rows(rows: Sequence[FlatTargets], supervised_BP: Array) -> tuple[Array, Array]:
    """ids [B, P, K] int64 and weights [B, P, K] float32; weight 0 is padding, or a position that is not supervised.

    Row b equals `rows[b].padded()` laid at its supervised positions and widened to K, the longest of all rows. Written
    once, into arrays of the final size: a copy of a row costs more than decoding it (fresh pages).

    Args:
        rows: the targets of each row's supervised positions, in order.
        supervised_BP: [B, P] bool, which positions they are.

    Raises:
        FormatError: one hostile position would blow a row up beyond 2 GiB.
    """
    count, positions = supervised_BP.shape
    width = max([1, *(int(row.sizes.max(initial=0)) for row in rows)])
    if positions * width * 12 > _MOST_BYTES:
        raise FormatError(
            f"padding {positions} positions to {width} entries needs {positions * width * 12} bytes a row, over "
            f"{_MOST_BYTES}; use the flat arrays"
        )
    ids = np.zeros((count, positions, width), np.int64)
    weights = np.zeros((count, positions, width), np.float32)
    slots, sizes = np.arange(width, dtype=np.int32), np.zeros(positions, np.int32)
    for row, supervised, row_ids, row_weights in zip(rows, supervised_BP, ids, weights, strict=True):
        if _pad_quickly(row, supervised, row_ids, row_weights):
            continue
        sizes[:] = 0
        sizes[supervised] = row.sizes
        kept = slots < sizes[:, None]
        row_ids[kept] = row.ids
        row_weights[kept] = row.weights
    return ids, weights


def pad_joined(flat: FlatTargets, supervised_BP: Array) -> tuple[Array, Array] | None:
    """`pad_rows` of rows that `FlatTargets.join` put together, in one call that writes the padding too.

    None where numba is not at hand, for targets that are neither counts nor weights, and for arrays beyond 2 GiB: take
    `pad_rows`.
    """
    count, positions = supervised_BP.shape
    shape, fast = (count, positions, max(1, int(flat.sizes.max(initial=0)))), compiled.array_kernels()
    plain = flat.importance is None and flat.scale is None and flat.curve is None
    if fast is None or not plain or 12 * math.prod(shape) > _MOST_BYTES:
        return None
    ids, weights = np.empty(shape, np.int64), np.empty(shape, np.float32)
    try:
        loop = fast.pad_weights if flat.rounds is None else fast.pad_counts
        fitted = loop(flat.ids, flat.values, flat.sizes, flat.rounds or 1, supervised_BP, ids, weights)
    except TypeError:  # arrays of other types or strides than a decoder's
        return None
    return (ids, weights) if fitted else None


def _pad_quickly(row: FlatTargets, supervised: Array, ids: Array, weights: Array) -> bool:
    """One row into its place, compiled; False where that is not at hand or finds that they do not fit together."""
    fast = compiled.array_kernels()
    if fast is None:
        return False
    try:
        return bool(fast.pad(row.ids, row.weights, row.sizes, np.ascontiguousarray(supervised, bool), ids, weights))
    except TypeError:  # arrays of other types or strides than a decoder's
        return False
