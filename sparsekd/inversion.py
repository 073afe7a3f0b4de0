"""Draws from a row of logits by its cumulative distribution, in two levels: what the samplers that draw stand on.

Shapes: N positions, V vocabulary, B ids per block, R draws, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparsekd.errors import ModelError
from sparsekd.rng import Keys
from sparsekd.targets import SparseTargets

# 64 ids a block: the cost per position is V / B block sums plus R * B gathered entries, least near B = sqrt(V / R),
# which is 50 at V = 128k and R = 50 (benchmarks/samplers.py).
BLOCK = 64
# A CPU's buffers stay small enough to be reused from the heap: fresh pages cost more than the arithmetic.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Stands in for -inf, whose product with a temperature of 0 would be NaN; exp of it is 0 in every float.
LOWEST = -1e4

# [N, R] points of the cumulative distribution, in [0, 1), of R rounds.
Points = Callable[[Keys, int], Tensor]


def independent_points(keys: Keys, rounds: int) -> Tensor:
    """R independent uniforms a position: draws with replacement."""
    return keys.uniforms(rounds)


def even_points(keys: Keys, rounds: int) -> Tensor:
    """(u + j) / R for j = 0 .. R-1 with one uniform u a position: systematic draws, ascending."""
    return (keys.uniforms(1) + torch.arange(rounds, device=keys.rows.device)) / rounds


def merge_draws(ids_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids per row, ascending, and how often each was drawn: ids [N, K], counts [N, K] (0 = padding)."""
    drawn = ids_NR.sort(-1).values
    first = torch.ones_like(drawn)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = first.cumsum(-1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(-1, slot, torch.ones_like(drawn))
    ids = torch.zeros_like(drawn).scatter_(-1, slot, drawn)
    width = int(slot[:, -1].max()) + 1 if len(slot) else 1
    return ids[:, :width], counts[:, :width]


def invert(mass: Tensor, uniforms_NR: Tensor) -> Tensor:
    """The id whose interval of the cumulative distribution holds each uniform; `mass` is [N, blocks, B], unnormalised.

    Two levels: float64 sums over blocks, then one block per draw. A single float32 cumulative sum over 128k ids leaves
    the ids of the tail without any interval (TV up to 1e-3; bf16 0.6), this one is within 1e-6 of the float64 law.
    """
    sums = block_sums(mass)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    point = _below(uniforms_NR * total, total)
    block = torch.searchsorted(cumulative, point, right=True)
    upper = cumulative.gather(-1, block)
    lower = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    blocks = mass.shape[1]
    row = torch.arange(len(mass), device=mass.device)[:, None] * blocks
    inner = mass.flatten(0, 1).index_select(0, (row + block).flatten()).cumsum(-1, dtype=torch.float64)
    inner_total = inner[:, -1:]
    fraction = ((point - lower) / (upper - lower)).flatten()[:, None]
    offset = torch.searchsorted(inner, _below(fraction * inner_total, inner_total), right=True)
    return block * mass.shape[-1] + offset.view_as(block)


def _below(point: Tensor, end: Tensor) -> Tensor:
    """`point`, strictly below `end`: rounding must never step past the last id that has mass."""
    return torch.minimum(point, torch.nextafter(end, torch.zeros_like(end)))


def working_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def shifted_logits(logits_NV: Tensor) -> Tensor:
    """[N, V] logits minus their maximum, in float32 (float64 stays), a fresh buffer."""
    largest = logits_NV.amax(-1, keepdim=True).to(working_dtype(logits_NV))
    shifted = (logits_NV - largest).clamp_(min=LOWEST)
    if not bool(torch.isfinite(shifted.sum())):
        bad = (~torch.isfinite(largest[:, 0]) | ~torch.isfinite(shifted).all(-1)).sum()
        raise ModelError(
            f"logits are NaN or inf at {int(bad)} of {len(logits_NV)} positions; "
            "a half-precision overflow in the teacher? try dtype=bfloat16 or dtype=float32"
        )
    return shifted


def in_blocks(mass_NV: Tensor) -> Tensor:
    """[N, blocks, B], the last block filled with zeros; a view where V is a multiple of B."""
    return torch.nn.functional.pad(mass_NV, (0, -mass_NV.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def block_sums(mass: Tensor) -> Tensor:
    return mass.sum(-1).double()


def chunks(logits_NV: Tensor, keys: Keys, extra: int = 0) -> Iterator[tuple[Tensor, Keys]]:
    """Rows in parts whose float32 copy, with `extra` bytes a row beside it, fits the budget."""
    budget = CHUNK_BYTES.get(logits_NV.device.type, CHUNK_BYTES["cuda"])
    step = max(1, budget // (4 * logits_NV.shape[1] + extra))
    for start in range(0, max(len(logits_NV), 1), step):
        part = slice(start, start + step)
        yield logits_NV[part], keys[part]


def join_parts(parts: list[tuple[Tensor, Tensor]]) -> SparseTargets:
    """One SparseTargets from chunks of different widths."""
    ids, weights = zip(*parts, strict=True)
    return SparseTargets(ids=side_by_side(ids), weights=side_by_side(weights).float())


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[N, K] from chunks of different widths, padded with zeros."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
