"""Draws from a row of logits by its cumulative distribution, in two levels: what the samplers that draw stand on.

Shapes: N positions, V vocabulary, B ids per block, R draws, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import ModelError
from sparsekd.rng import Keys
from sparsekd.targets import SparseTargets
from sparsekd.trust import agrees

# 32 ids a block: the cost per position is V / B block sums plus up to R * B gathered entries, least near
# B = sqrt(V / R), which is 50 at V = 128k and R = 50, and 6 at V = 2k; 32 is within 5 % of the best at 2k .. 128k.
BLOCK = 32
# A CPU's buffers stay small enough to be reused from the heap: fresh pages cost more than the arithmetic.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Stands in for -inf, whose product with a temperature of 0 would be NaN; exp of it is 0 in every float.
LOWEST = -1e4

# Of a GPU's masses from a CPU's: float32 sums of 20k numbers, each within 1e-7 of what it should be.
LARGEST_GAP = 1e-5

# Within a block, points and the ends of ids' intervals are rounded down to whole numbers of 2^-40; draws hang on that.
FRACTION_BITS = 40

# [N, R] points of the cumulative distribution, in [0, 1), of R rounds, ascending.
Points = Callable[[Keys, int], Tensor]


def independent_points(keys: Keys, rounds: int) -> Tensor:
    """R independent uniforms a position: draws with replacement."""
    return keys.uniforms(rounds).sort(-1).values


def even_points(keys: Keys, rounds: int) -> Tensor:
    """(u + j) / R for j = 0 .. R-1 with one uniform u a position: systematic draws, ascending."""
    return (keys.uniforms(1) + torch.arange(rounds, device=keys.rows.device)) / rounds


def merge_draws(ids_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids per row, ascending, and how often each was drawn: ids [N, K], counts [N, K] (0 = padding)."""
    return merge_ascending(ids_NR.sort(-1).values)


def merge_ascending(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_draws` of ids that ascend in each row already, [N, R]: columns that are padding throughout stay, for an
    accelerator would have to be asked which they are (`samplers.settled` does)."""
    first = torch.ones_like(drawn)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = first.cumsum(-1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(-1, slot, torch.ones_like(drawn))
    return torch.zeros_like(drawn).scatter_(-1, slot, drawn), counts


def ids_at(logits_NV: Tensor, points_NR: Tensor) -> Tensor:
    """The id whose interval of softmax(logits)'s cumulative distribution holds each point; points ascend in each row.

    Equals `invert(in_blocks(softmax(logits)), points)` within the rounding of float32, and so do its two levels; but
    probabilities exist for `CHUNK_BYTES` of rows at a time only to be summed, and a block is opened once, however many
    points fall into it: a sharp row's 50 points share a few blocks.

    Returns:
        [N, R] int64, ascending in each row; any ids in a row whose `block_masses` are NaN.
    """
    return ids_in(logits_NV, block_masses(logits_NV), points_NR)


def ids_in(logits_NV: Tensor, masses: Tensor, points_NR: Tensor, temperature: float = 1.0) -> Tensor:
    """`ids_at` of q ∝ p^temperature, whose [N, blocks] masses are given (`block_masses` or `tilted_masses`)."""
    block, fraction = locate(running_sums(masses), points_NR)
    first = torch.arange(len(block), device=block.device)[:, None] * masses.shape[1]
    return ids_within(logits_NV, (first + block).flatten(), fraction.flatten(), temperature).view_as(block)


def running_sums(values_NK: Tensor) -> Tensor:
    """`values.cumsum(-1)` in float64. A single row is added up as one of several: CUDA's sums of one row alone are cut
    into parts that join in the order in which they finish (pytorch issue 75240)."""
    if len(values_NK) != 1:
        return values_NK.cumsum(-1, dtype=torch.float64)
    return values_NK.expand(2, -1).cumsum(-1, dtype=torch.float64)[:1]


def ids_within(logits_NV: Tensor, block_P: Tensor, fraction_P: Tensor, temperature: float = 1.0) -> Tensor:
    """[P] the ids that lie a fraction in [0, 1) into the mass of a block of q ∝ p^temperature.

    Blocks are counted through the rows (`row * blocks + block`); equal ones stand together and are opened once.
    """
    opens = torch.ones_like(block_P, dtype=torch.bool)
    torch.ne(block_P[1:], block_P[:-1], out=opens[1:])
    opened_P = opens.cumsum(0) - 1
    block_O = block_P[opens] if block_P.device.type == "cpu" else _opened_unasked(block_P, opened_P)
    running = _running_masses(tilted(_block_logits(logits_NV, block_O), temperature))
    return block_P % _blocks(logits_NV) * BLOCK + _offsets(running, opened_P, fraction_P)


def _opened_unasked(block_P: Tensor, opened_P: Tensor) -> Tensor:
    """[P] the O blocks that are opened, and behind them block 0 for nothing: no accelerator is asked what O is."""
    return torch.zeros_like(block_P).scatter_(0, opened_P, block_P)


def _offsets(running_OB: Tensor, opened_P: Tensor, fraction_P: Tensor) -> Tensor:
    """[P] how many ids of its opened block end at or below a point: `searchsorted(ends, point, right=True)` of
    `ends = floor(running / running[-1] * 2^FRACTION_BITS)` and `point = floor(fraction * 2^FRACTION_BITS)`.

    Each point is brought through its own block by halves, and only the ends it meets are divided: one search over all
    ends takes 20 steps a point, most of them out of the cache, and all ends have to be made.
    """
    running, first = running_OB.flatten(), opened_P * BLOCK
    total = running.index_select(0, first + (BLOCK - 1))
    # A whole number is at or below another one if what it was rounded down from is below the next. The last id's end is
    # 1, above every point.
    above = (fraction_P * 2**FRACTION_BITS).floor_().clamp_(max=2**FRACTION_BITS - 1).add_(1)
    at, step = first.clone(), BLOCK // 2
    while step:
        end = running.index_select(0, at + (step - 1)).div_(total).mul_(2**FRACTION_BITS)
        at.add_(end < above, alpha=step)
        step //= 2
    return at.sub_(first)


def block_masses(logits_NV: Tensor) -> Tensor:
    """[N, blocks] float64: the probability of each block of `BLOCK` ids; the last block may be shorter. NaN in a row
    whose logits hold NaN or +inf, or nothing above -inf."""
    if _kernel_on(logits_NV):
        return kernel_masses(logits_NV)[0]
    masses = _no_masses(logits_NV)
    for rows, p in _softmaxes(logits_NV):
        _sum_blocks(p, masses[rows])
    return masses


def tilted_masses(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`block_masses` of q ∝ p^temperature, and [N] float64 log2 Σ exp(temperature (z - max z)), which normalises it."""
    if temperature and _kernel_on(logits_NV):
        return kernel_masses(logits_NV, temperature)
    return torch_masses(logits_NV, temperature)


def torch_masses(logits_NV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`tilted_masses` by torch's softmax."""
    masses, largest = _no_masses(logits_NV), torch.empty(len(logits_NV), dtype=torch.float64, device=logits_NV.device)
    for rows, q in _softmaxes(logits_NV, temperature):
        _sum_blocks(q, masses[rows])
        largest[rows] = q.amax(-1)
    return masses, (masses.sum(-1) / largest).log2()


def kernel_masses(logits_NV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`tilted_masses` from one read of the logits (`inversion_triton`), for a temperature above 0."""
    from sparsekd.inversion_triton import peaks_and_sums

    peaks, sums = peaks_and_sums(logits_NV, temperature, BLOCK)
    masses = (peaks - peaks.amax(-1, keepdim=True)).exp_().mul_(sums).double()
    total = masses.sum(-1, keepdim=True)
    return masses.div_(total), total[:, 0].log2()


def _kernel_on(logits_NV: Tensor) -> bool:
    """Whether the logits are on a GPU with Triton, where the kernel's masses are torch's, and not in float64."""
    device = logits_NV.device
    if device.type != "cuda" or logits_NV.dtype == torch.float64 or not find_spec("triton"):
        return False
    return agrees("the samplers", kernel_masses, torch_masses, device, _gap, LARGEST_GAP)


def _gap(kernel: Any, twin: Any, device: torch.device) -> float:
    """Between two ways to masses: total variation, and their total's logarithm."""
    generator = torch.Generator("cpu").manual_seed(0)
    logits = (4 * torch.randn(4, 20_011, generator=generator, device="cpu")).to(torch.bfloat16)
    (want, log2_want), (found, log2_found) = twin(logits, 0.9), kernel(logits.to(device), 0.9)
    gap = (found.cpu() - want).abs().sum(-1) + (log2_found.cpu() - log2_want).abs()
    return float(gap.amax().nan_to_num(torch.inf))


def _blocks(logits_NV: Tensor) -> int:
    return -(-logits_NV.shape[1] // BLOCK)


def _no_masses(logits_NV: Tensor) -> Tensor:
    return torch.empty(len(logits_NV), _blocks(logits_NV), dtype=torch.float64, device=logits_NV.device)


def _softmaxes(logits_NV: Tensor, temperature: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
    """softmax(temperature * logits) of a few rows at a time, in a buffer that the next ones are written over."""
    count, vocab = logits_NV.shape
    step = max(1, _budget(logits_NV) // (4 * vocab))
    dtype, device = working_dtype(logits_NV), logits_NV.device
    buffer = torch.empty(min(step, count), vocab, dtype=dtype, device=device)
    scaled = buffer if temperature == 1 else torch.empty_like(buffer)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = logits_NV[rows]
        p = buffer[: len(part)]
        torch.softmax(
            part if temperature == 1 else tilted(scaled[: len(part)].copy_(part), temperature), -1, dtype=dtype, out=p
        )
        yield rows, p


def _sum_blocks(p_NV: Tensor, masses: Tensor) -> None:
    whole = p_NV.shape[1] // BLOCK * BLOCK
    masses[:, : whole // BLOCK] = p_NV[:, :whole].unflatten(-1, (whole // BLOCK, BLOCK)).sum(-1)
    if whole < p_NV.shape[1]:
        masses[:, -1] = p_NV[:, whole:].sum(-1)


def tilted(logits: Tensor, temperature: float) -> Tensor:
    """temperature * logits, in place; 0 * -inf is -inf here: q's support is p's, so a uniform proposal (temperature 0)
    leaves out ids that are masked."""
    logits.mul_(temperature)
    return logits.nan_to_num_(nan=-torch.inf) if temperature == 0 else logits


def locate(cumulative: Tensor, points_NR: Tensor) -> tuple[Tensor, Tensor]:
    """[N, R] the block that holds each point, and how far into the block's mass it lies, in [0, 1)."""
    total = cumulative[:, -1:]
    point = _below(points_NR * total, total)
    # Beyond the last block only where masses are NaN, which whoever reads the draws refuses.
    block = torch.searchsorted(cumulative, point, right=True).clamp_(max=cumulative.shape[1] - 1)
    upper = cumulative.gather(-1, block)
    lower = cumulative.gather(-1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0)
    return block, (point - lower) / (upper - lower)


def _block_logits(logits_NV: Tensor, block_O: Tensor) -> Tensor:
    """[O, BLOCK] logits of the opened blocks; -inf beyond the last id."""
    vocab, dtype = logits_NV.shape[1], working_dtype(logits_NV)
    if vocab % BLOCK == 0 and logits_NV.is_contiguous():
        return logits_NV.view(-1, BLOCK).index_select(0, block_O).to(dtype)
    row, block = block_O // _blocks(logits_NV), block_O % _blocks(logits_NV)
    ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = logits_NV[row[:, None], ids.clamp(max=vocab - 1)].to(dtype)
    return inside.masked_fill_(ids >= vocab, -torch.inf)


def _running_masses(logits: Tensor) -> Tensor:
    """[opened, BLOCK] float64: the running sums of exp(logits - max) within each block; `logits` is written over."""
    return logits.sub_(logits.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=torch.float64)


def invert(mass: Tensor, uniforms_NR: Tensor) -> Tensor:
    """The id whose interval of the cumulative distribution holds each uniform; `mass` is [N, blocks, B], unnormalised.

    Two levels: float64 sums over blocks, then one block per draw. A single float32 cumulative sum over 128k ids leaves
    the ids of the tail without any interval (TV up to 1e-3; bf16 0.6), this one is within 1e-6 of the float64 law.
    The readable twin of `ids_at`.
    """
    block, fraction = locate(running_sums(block_sums(mass)), uniforms_NR)
    row = torch.arange(len(mass), device=mass.device)[:, None] * mass.shape[1]
    inner = mass.flatten(0, 1).index_select(0, (row + block).flatten()).cumsum(-1, dtype=torch.float64)
    total = inner[:, -1:]
    offset = torch.searchsorted(inner, _below(fraction.flatten()[:, None] * total, total), right=True)
    return block * mass.shape[-1] + offset.view_as(block)


def _below(point: Tensor, end: Tensor) -> Tensor:
    """`point`, strictly below `end`: rounding must never step past the last id that has mass."""
    return torch.minimum(point, torch.nextafter(end, torch.zeros_like(end)))


def working_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def shifted_logits(logits_NV: Tensor) -> Tensor:
    """[N, V] logits minus their maximum, in float32 (float64 stays), a fresh buffer; NaN stays, and stands for +inf and
    for rows of nothing above -inf."""
    return (logits_NV - logits_NV.amax(-1, keepdim=True).to(working_dtype(logits_NV))).clamp_(min=LOWEST)


def reaching(p: float, targets: SparseTargets) -> SparseTargets:
    """Of each position's targets, the fewest from the first on that reach mass p."""
    before = targets.weights.cumsum(-1) - targets.weights
    weights = targets.weights * (before < p)
    return SparseTargets(ids=targets.ids * (weights > 0), weights=weights)


def stable_top(values_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, in descending order, ties in ascending id."""
    _, ids = values_NV.topk(k, dim=-1)
    ids = ids.sort(-1).values
    values, order = values_NV.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def refuse(bad_N: Tensor) -> None:
    """Raise ModelError about these positions."""
    raise ModelError(
        f"logits are NaN or inf at {int(bad_N.sum())} of {len(bad_N)} positions; "
        "a half-precision overflow in the teacher? try dtype=bfloat16 or dtype=float32"
    )


def in_blocks(mass_NV: Tensor) -> Tensor:
    """[N, blocks, B], the last block filled with zeros; a view where V is a multiple of B."""
    return torch.nn.functional.pad(mass_NV, (0, -mass_NV.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def block_sums(mass: Tensor) -> Tensor:
    return mass.sum(-1).double()


def chunks(logits_NV: Tensor, keys: Keys, extra: int = 0) -> Iterator[tuple[Tensor, Keys]]:
    """Rows in parts whose float32 copy, with `extra` bytes a row beside it, fits the budget."""
    return parts_of(logits_NV, keys, 4 * logits_NV.shape[1] + extra)


def draw_parts(
    logits_NV: Tensor, keys: Keys, rounds: int, vocab_size: int | None = None
) -> Iterator[tuple[Tensor, Keys]]:
    """Rows in parts whose block sums and opened blocks, in `ids_at`, fit the budget in float64: small V needs many rows
    at a time, or calling operators costs more than they do. `vocab_size`: of all processes, where they share it."""
    blocks = -(-(vocab_size or logits_NV.shape[1]) // BLOCK)
    return parts_of(logits_NV, keys, 8 * (blocks + BLOCK * min(rounds, blocks) + rounds))


def parts_of(logits_NV: Tensor, keys: Keys, row_bytes: int) -> Iterator[tuple[Tensor, Keys]]:
    """As many rows at a time as fit `CHUNK_BYTES`."""
    step = max(1, _budget(logits_NV) // row_bytes)
    for start in range(0, max(len(logits_NV), 1), step):
        part = slice(start, start + step)
        yield logits_NV[part], keys[part]


def _budget(logits_NV: Tensor) -> int:
    return CHUNK_BYTES.get(logits_NV.device.type, CHUNK_BYTES["cuda"])


def marked(weights_NK: Tensor, masses: Tensor) -> Tensor:
    """The weights, NaN in rows whose masses are: draws from those mean nothing, and whoever reads weights sees it."""
    return weights_NK.masked_fill_(masses.sum(-1, keepdim=True).isnan(), torch.nan)


def join_parts(parts: list[tuple[Tensor, Tensor]]) -> SparseTargets:
    """One SparseTargets from chunks of different widths."""
    ids, weights = zip(*parts, strict=True)
    return SparseTargets(ids=side_by_side(ids), weights=side_by_side(weights).float())


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[N, K] from chunks of different widths, padded with zeros."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
