"""The order in which systematic draws pass over a vocabulary: ids that a head treats alike stand side by side.

A systematic draw hits the cumulative distribution at even steps, so among neighbours of little mass it keeps their sum
and lets chance choose which of them stands for all. The noise that reaches a student's hidden states is W^T (t̂ - p),
W the rows of the head: it is small where neighbours have like rows. So the ids are halved along the principal direction
of their rows, and the halves again.

The order is the same on every machine, on any device, with any number of threads: rows are whole numbers, and so is
every product and sum on the way, below 2^53, where float64 is exact in whatever order a library adds. Workers of one
cache need not hand it to each other.

Shapes: V vocabulary, H hidden size, D columns of the grid, n ids of a segment.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekd.errors import ModelError

# Entries of the head count up to 2^12 and what they are multiplied with up to 2^15: with groups of at most 2^6 columns,
# 2^8 columns of the grid and 2^8 rows that set a direction, no sum reaches 2^43.
_GRID, _LONGEST = 2**12, 2**15
COLUMNS, ROWS, STEPS = 256, 256, 3
# Rows that are float64 at a time.
_CHUNK = 2**11


@torch.no_grad()
def vocabulary_order(head_VH: Tensor) -> Tensor:
    """[V] int64, where the head is: the ids, those with like rows of `head_VH` together; `order[i]` is the i-th id.

    Each run of 2^k ids is sorted along the principal direction of its own rows, then each of 2^(k-1), down to pairs.
    """
    grid_VD = _on_grid(head_VH)
    order_V = torch.arange(len(grid_VD), device=grid_VD.device)
    size = 1 << (len(order_V) - 1).bit_length()
    while size > 1:
        for part, n in _runs(len(order_V), size):
            rank = _ranks(grid_VD[part].unflatten(0, (-1, n)))
            moved = (rank + torch.arange(len(rank), device=rank.device)[:, None] * n).flatten()
            grid_VD[part], order_V[part] = grid_VD[part][moved], order_V[part][moved]
        size //= 2
    return order_V


def order_hash(order_V: Tensor) -> str:
    """sha256 of the ids in their order, as little-endian int32."""
    return hashlib.sha256(order_V.to("cpu", torch.int32).numpy().astype("<i4").tobytes()).hexdigest()


def _on_grid(head_VH: Tensor) -> Tensor:
    """[V, D] float32 whole numbers: the rows on a grid, beyond `COLUMNS` their signed sums in groups of columns."""
    width = head_VH.shape[1]
    parts = head_VH.split(max(1, _CHUNK * COLUMNS // width))
    largest = float(torch.stack([rows.abs().max() for rows in parts]).max())
    if not math.isfinite(largest):
        raise ModelError("the teacher's head holds NaN or inf, there is no order of its rows; take sampler.order=ids")
    group = -(-width // COLUMNS)
    # A column's sign from a multiplicative hash: signed sums of hidden dimensions keep distances, on average.
    signs = 1 - 2 * ((torch.arange(width, device=head_VH.device) * 2654435769 >> 31) & 1).float()
    # Written into one tensor: results that stay between the buffers of each part kept ten times their size from reuse.
    grid_VD = torch.empty(len(head_VH), -(-width // group), dtype=torch.float32, device=head_VH.device)
    for rows, out in zip(parts, grid_VD.split(len(parts[0])), strict=True):
        whole = (rows.float() * (_GRID / max(largest, 1e-30))).round_().mul_(signs)
        torch.sum(torch.nn.functional.pad(whole, (0, -width % group)).unflatten(-1, (group, -1)), 1, out=out)
    return grid_VD


def _runs(count: int, size: int) -> Iterator[tuple[slice, int]]:
    """(ids, length of a run): whole runs of `size`, some at a time, then the run that is left."""
    step, whole = max(1, _CHUNK // min(size, ROWS)) * size, count // size * size
    for start in range(0, whole, step):
        yield slice(start, min(start + step, whole)), size
    if whole < count:
        yield slice(whole, count), count - whole


def _ranks(rows_SnD: Tensor) -> Tensor:
    """[S, n] the order of each run's rows along its own axis."""
    some = rows_SnD[:, :: -(-rows_SnD.shape[1] // ROWS)].double()
    axis_SD1 = _axes(some)[..., None]
    along = [(part.double() @ axis_SD1)[..., 0] for part in rows_SnD.split(ROWS, dim=1)]
    return torch.cat(along, dim=1).argsort(dim=1, stable=True)


def _axes(rows_SnD: Tensor) -> Tensor:
    """[S, D] about the principal direction of each run's rows: power iteration from the way that leads from the run
    before to the run after. C^k is positive, so the axis never points against that way."""
    mean_SD = (rows_SnD.sum(1) / rows_SnD.shape[1]).round_()
    centred = rows_SnD - mean_SD[:, None]
    ends = torch.cat([mean_SD[:1], mean_SD, mean_SD[-1:]])
    way_SD = ends[2:] - ends[:-2]
    way_SD[(way_SD == 0).all(-1)] = 1
    axis_SD1 = _scaled(way_SD[..., None])
    for _ in range(STEPS):
        axis_SD1 = _scaled(centred.mT @ _scaled(centred @ axis_SD1))
    return axis_SD1[..., 0]


def _scaled(values_SD1: Tensor) -> Tensor:
    """Whole numbers up to `_LONGEST`, in proportion."""
    return (values_SD1 / values_SD1.abs().amax(1, keepdim=True).clamp(min=1) * _LONGEST).round_()
