"""Samplers: teacher logits -> `SparseTargets`.

Shapes: N positions, V vocabulary, R rounds (draws), K kept ids, B ids per block.

Each sampler is a function `(logits_NV, keys, **parameters) -> SparseTargets`, listed in `SAMPLERS`; the property
tests run over that dict. Logits may be bf16, fp16, fp32 or fp64; no [N, V] float64 is ever made, and rows pass in
chunks of about `CHUNK_BYTES`, so V up to 2^20 needs no more memory than V = 2^10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import ModelError, RecipeError
from sparsekd.rng import Keys
from sparsekd.targets import SparseTargets

# 64 ids a block: the cost per position is V / B block sums plus R * B gathered entries, least near B = sqrt(V / R),
# which is 50 at V = 128k and R = 50 (benchmarks/samplers.py).
BLOCK = 64
# A CPU's buffers stay small enough to be reused from the heap: fresh pages cost more than the arithmetic.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Stands in for -inf, whose product with a temperature of 0 would be NaN; exp of it is 0 in every float.
_LOWEST = -1e4


def sample(
    logits_NV: Tensor,
    sampler: str,
    *,
    seed: int = 0,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    **parameters: Any,
) -> SparseTargets:
    """Sparse targets for each row of `logits_NV` by the sampler of that name.

    Equals `SAMPLERS[sampler](logits_NV, Keys(seed, rows, positions), **parameters)`.

    Args:
        logits_NV: [N, V] teacher logits, any float type.
        sampler: a name in `SAMPLERS`.
        seed: 64-bit seed of the counter-based generator.
        rows: [N] int64, which row each position belongs to (default: all 0).
        positions: [N] int64, the position within the row (default: 0 .. N-1).
        parameters: of the sampler, e.g. `rounds=50, temperature=1.0` or `k=12`.

    Raises:
        RecipeError: unknown sampler or parameter, or a parameter out of range.
        ModelError: logits that are NaN or +inf.
    """
    check_parameters(sampler, parameters)
    return SAMPLERS[sampler](logits_NV, _keys(logits_NV, seed, rows, positions), **parameters)


def sample_importance(
    logits_NV: Tensor,
    *,
    rounds: int,
    temperature: float,
    seed: int = 0,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
) -> ImportanceDraws:
    """The draws behind `sample(logits_NV, "random_sampling", ...)` at a temperature that is not 1, before they are
    weighed: what a cache stores so that its reader can choose the weighting. Arguments and errors as in `sample`."""
    check_parameters("random_sampling", {"rounds": rounds, "temperature": temperature})
    keys = _keys(logits_NV, seed, rows, positions)
    return importance_draws(logits_NV, keys, rounds=rounds, temperature=temperature)


def _keys(logits_NV: Tensor, seed: int, rows: Tensor | None, positions: Tensor | None) -> Keys:
    count, device = len(logits_NV), logits_NV.device
    return Keys(
        seed=seed,
        rows=torch.zeros(count, dtype=torch.int64, device=device) if rows is None else rows.to(device),
        positions=torch.arange(count, device=device) if positions is None else positions.to(device),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceDraws:
    """R draws a position from q ∝ p^t (t not 1), and what weighs them.

    With H, the Rényi entropy of order t of p in bits, Σ p^t = 2^((1-t) H), so p/q = (2^H p)^(1-t).

    Attributes:
        ids: [N, K] int64, ascending and distinct.
        counts: [N, K] int64, how often each was drawn; 0 is padding.
        log2_p: [N, K] float64, log2 of the probability of each id.
        entropy: [N] float64, H = log2(Σ p^t) / (1 - t), from 0 to log2 V.
        temperature: t.
        rounds: R.
    """

    ids: Tensor
    counts: Tensor
    log2_p: Tensor
    entropy: Tensor
    temperature: float
    rounds: int

    def targets(self, *, normalize: bool) -> SparseTargets:
        """Each id weighs counts * p/q, over its own sum (`normalize`) or over the rounds; see `random_sampling`."""
        log2_w = self.counts.double().log2() + (1 - self.temperature) * (self.log2_p + self.entropy[:, None])
        weights = (log2_w * math.log(2)).softmax(-1) if normalize else log2_w.exp2() / self.rounds
        return SparseTargets(ids=self.ids, weights=weights.float())


@torch.no_grad()
def importance_draws(logits_NV: Tensor, keys: Keys, *, rounds: int = 50, temperature: float) -> ImportanceDraws:
    """R independent draws with replacement from q ∝ p^temperature, with all that their weights need."""
    parts = []
    for part_NV, part_keys in _chunks(logits_NV, keys, extra=8 * BLOCK * rounds):
        shifted = _shifted(part_NV)
        total_p = _block_sums(_padded(shifted.exp())).sum(-1, keepdim=True)
        # 0^0 is 0 here: q's support is p's, so a uniform proposal (t = 0) leaves out ids that are masked with -inf.
        mass = (shifted * temperature).exp_().masked_fill_(shifted <= _LOWEST, 0)
        ids, counts = merge_draws(_invert(_padded(mass), part_keys.uniforms(rounds)))
        total_q = _block_sums(_padded(mass)).sum(-1)
        log2_p = shifted.gather(-1, ids).double() / math.log(2) - total_p.log2()
        entropy = (total_q.log2() - temperature * total_p[:, 0].log2()) / (1 - temperature)
        parts.append((ids, counts, log2_p, entropy.clamp_(min=0)))
    ids_, counts_, log2_ps, entropies = zip(*parts, strict=True)
    return ImportanceDraws(
        ids=_side_by_side(ids_),
        counts=_side_by_side(counts_),
        log2_p=_side_by_side(log2_ps),
        entropy=torch.cat(entropies),
        temperature=temperature,
        rounds=rounds,
    )


@torch.no_grad()
def random_sampling(
    logits_NV: Tensor, keys: Keys, *, rounds: int = 50, temperature: float = 1.0, normalize: bool = True
) -> SparseTargets:
    """R independent draws with replacement from q ∝ p^temperature (paper, section 3.4), each worth p/q.

    At temperature 1 the weights are `counts / rounds`: they sum to 1 and their mean is p, exactly. At any other
    temperature `normalize=True` divides Σ over draws of p/q by itself, as section 3.4 does: every position weighs 1,
    but a ratio of random sums is biased by O(1/R) towards q. `normalize=False` divides by R instead: exactly unbiased,
    but the sum is 1 only on average, and at temperatures near 0 a few positions of enormous sums carry a batch.

    Returns:
        ids [N, K] ascending and distinct, K the largest number of distinct ids among these positions.
    """
    if temperature != 1:
        return importance_draws(logits_NV, keys, rounds=rounds, temperature=temperature).targets(normalize=normalize)
    parts = []
    for part_NV, part_keys in _chunks(logits_NV, keys, extra=8 * BLOCK * rounds):
        mass = _shifted(part_NV).exp_()
        ids, counts = merge_draws(_invert(_padded(mass), part_keys.uniforms(rounds)))
        parts.append((ids, counts / rounds))
    return _join(parts)


@torch.no_grad()
def top_k(logits_NV: Tensor, keys: Keys, *, k: int = 12) -> SparseTargets:
    """The k largest probabilities as they are (paper, section 2): biased; they sum to the top-k mass, below 1.

    Equals `softmax(logits, -1).topk(k)`. ids are in descending order of probability, ties in ascending id.
    """
    kept = min(k, logits_NV.shape[1])
    parts = []
    for part_NV, _ in _chunks(logits_NV, keys):
        shifted = _shifted(part_NV)
        values, ids = _stable_top(shifted, kept)
        total = _block_sums(_padded(shifted.exp_())).sum(-1, keepdim=True)
        parts.append((ids, (values.double().exp() / total).float()))
    return _join(parts)


@torch.no_grad()
def top_p(logits_NV: Tensor, keys: Keys, *, p: float = 0.98, k: int = 100) -> SparseTargets:
    """Of the k largest probabilities, the fewest that reach mass p (paper, table 1, row *50): biased.

    The weights sum to at least p where k ids can reach it, and to the top-k mass elsewhere.
    """
    targets = top_k(logits_NV, keys, k=k)
    before = targets.weights.cumsum(-1) - targets.weights
    weights = targets.weights * (before < p)
    width = max(int((weights > 0).sum(-1).max()), 1) if len(weights) else 1
    return SparseTargets(ids=targets.ids[:, :width] * (weights[:, :width] > 0), weights=weights[:, :width])


@torch.no_grad()
def full(logits_NV: Tensor, keys: Keys) -> SparseTargets:
    """All V probabilities: dense, for online baselines and tests. Sums to 1, exact."""
    probabilities = logits_NV.to(_working_dtype(logits_NV)).softmax(-1)
    ids = torch.arange(logits_NV.shape[1], device=logits_NV.device).expand_as(probabilities)
    return SparseTargets(ids=ids, weights=probabilities)


SAMPLERS: dict[str, Callable[..., SparseTargets]] = {
    "random_sampling": random_sampling,
    "top_k": top_k,
    "top_p": top_p,
    "full": full,
}

# (parameter, lowest, highest) for each sampler; what is not listed here is an unknown key.
_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "random_sampling": {"rounds": (1, 2**20), "temperature": (0.0, 10.0), "normalize": (0, 1)},
    "top_k": {"k": (1, 2**16 - 1)},
    "top_p": {"p": (0.0, 1.0), "k": (1, 2**16 - 1)},
    "full": {},
}


def check_parameters(sampler: str, parameters: dict[str, Any]) -> None:
    """Raise RecipeError for an unknown sampler, an unknown parameter or one out of range."""
    if sampler not in SAMPLERS:
        raise RecipeError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    ranges = _RANGES[sampler]
    for name, value in parameters.items():
        if name not in ranges:
            known = ", ".join(ranges) or "none"
            raise RecipeError(f"sampler {sampler} has no parameter {name!r}; it has: {known}")
        low, high = ranges[name]
        if not isinstance(value, int | float) or not low <= value <= high:
            raise RecipeError(f"sampler.{name}={value!r} is out of range: {low:g} to {high:g}")


def is_unbiased(sampler: str, parameters: dict[str, Any]) -> bool:
    """Whether E[densify(targets)] equals the teacher's distribution exactly, as the property tests check."""
    if sampler == "random_sampling":
        return parameters.get("temperature", 1.0) == 1.0 or not parameters.get("normalize", True)
    return sampler == "full"


def count_rounds(sampler: str, parameters: dict[str, Any]) -> int | None:
    """R when every weight is an integer count over R (so the codec is lossless), else None."""
    if sampler == "random_sampling" and parameters.get("temperature", 1.0) == 1.0:
        return int(parameters.get("rounds", 50))
    return None


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


def _invert(mass: Tensor, uniforms_NR: Tensor) -> Tensor:
    """The id whose interval of the cumulative distribution holds each uniform; `mass` is [N, blocks, B], unnormalised.

    Two levels: float64 sums over blocks, then one block per draw. A single float32 cumulative sum over 128k ids leaves
    the ids of the tail without any interval (TV up to 1e-3; bf16 0.6), this one is within 1e-6 of the float64 law.
    """
    sums = _block_sums(mass)
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


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _shifted(logits_NV: Tensor) -> Tensor:
    """[N, V] logits minus their maximum, in float32 (float64 stays), a fresh buffer."""
    largest = logits_NV.amax(-1, keepdim=True).to(_working_dtype(logits_NV))
    shifted = (logits_NV - largest).clamp_(min=_LOWEST)
    if not bool(torch.isfinite(shifted.sum())):
        bad = (~torch.isfinite(largest[:, 0]) | ~torch.isfinite(shifted).all(-1)).sum()
        raise ModelError(
            f"logits are NaN or inf at {int(bad)} of {len(logits_NV)} positions; "
            "a half-precision overflow in the teacher? try dtype=bfloat16 or dtype=float32"
        )
    return shifted


def _padded(mass_NV: Tensor) -> Tensor:
    """[N, blocks, B], the last block filled with zeros; a view where V is a multiple of B."""
    return torch.nn.functional.pad(mass_NV, (0, -mass_NV.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _block_sums(mass: Tensor) -> Tensor:
    return mass.sum(-1).double()


def _stable_top(values_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, in descending order, ties in ascending id."""
    _, ids = values_NV.topk(k, dim=-1)
    ids = ids.sort(-1).values
    values, order = values_NV.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _chunks(logits_NV: Tensor, keys: Keys, extra: int = 0) -> Iterator[tuple[Tensor, Keys]]:
    """Rows in parts whose float32 copy, with `extra` bytes a row beside it, fits the budget."""
    budget = CHUNK_BYTES.get(logits_NV.device.type, CHUNK_BYTES["cuda"])
    step = max(1, budget // (4 * logits_NV.shape[1] + extra))
    for start in range(0, max(len(logits_NV), 1), step):
        part = slice(start, start + step)
        yield logits_NV[part], keys[part]


def _join(parts: list[tuple[Tensor, Tensor]]) -> SparseTargets:
    """One SparseTargets from chunks of different widths."""
    ids, weights = zip(*parts, strict=True)
    return SparseTargets(ids=_side_by_side(ids), weights=_side_by_side(weights).float())


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[N, K] from chunks of different widths, padded with zeros."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
