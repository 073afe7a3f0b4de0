"""Samplers: teacher logits -> `SparseTargets`.

Shapes: N positions, V vocabulary, R rounds (draws), K kept ids.

Each sampler is a function `(logits_NV, keys, **parameters) -> SparseTargets`, listed in `SAMPLERS`; the property
tests run over that dict. Logits may be bf16, fp16, fp32 or fp64; no [N, V] float64 is ever made, and rows pass in
chunks of about `inversion.CHUNK_BYTES`, so V up to 2^20 needs no more memory than V = 2^10.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsekd.errors import RecipeError
from sparsekd.fused_parallel import VocabularyShard
from sparsekd.importance import ImportanceDraws, importance_draws
from sparsekd.inversion import (
    Points,
    block_masses,
    block_sums,
    chunks,
    draw_parts,
    even_points,
    ids_in,
    in_blocks,
    independent_points,
    join_parts,
    marked,
    merge_ascending,
    reaching,
    refuse,
    shifted_logits,
    stable_top,
    working_dtype,
)
from sparsekd.rng import Keys
from sparsekd.sampling_parallel import agree, importance_draws_split, sample_split
from sparsekd.targets import SparseTargets

__all__ = [
    "ORDERED",
    "SAMPLERS",
    "ImportanceDraws",
    "check_parameters",
    "count_rounds",
    "default_parameters",
    "draw",
    "draw_importance",
    "in_vocabulary",
    "is_unbiased",
    "sample",
    "sample_importance",
    "settled",
]


def sample(
    logits_NV: Tensor,
    sampler: str,
    *,
    seed: int = 0,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    order: Tensor | None = None,
    shard: VocabularyShard | None = None,
    **parameters: Any,
) -> SparseTargets:
    """Sparse targets for each row of `logits_NV` by the sampler of that name.

    Equals `settled(SAMPLERS[sampler](logits_NV, Keys(seed, rows, positions), **parameters))`; with an order,
    `in_vocabulary(sample(logits_NV[:, order], ...), order)`. Waits for an accelerator once (`draw` does not).

    Args:
        logits_NV: [N, V] teacher logits, any float type.
        sampler: a name in `SAMPLERS`.
        seed: 64-bit seed of the counter-based generator.
        rows: [N] int64, which row each position belongs to (default: all 0).
        positions: [N] int64, the position within the row (default: 0 .. N-1).
        order: [V] int64, a permutation of the ids (`vocabulary_order(head_VH)`), for `systematic` alone: draws pass
            over the ids in this order. No id's own law changes; among ids of little mass, neighbours stand for each
            other, so the noise of a gradient is less where neighbours are alike.
        shard: which ids `logits_NV` is of, when processes share the vocabulary: each passes its own, all get the
            targets of the whole, and no logits travel (`sampling_parallel.py`).
        parameters: of the sampler, e.g. `rounds=50, temperature=1.0` or `k=12`.

    Raises:
        RecipeError: unknown sampler or parameter, or a parameter out of range.
        ModelError: logits that are NaN or +inf.
        MismatchError: processes whose shards, positions or settings do not fit together.
    """
    keys: dict[str, Any] = {"seed": seed, "rows": rows, "positions": positions}
    return settled(draw(logits_NV, sampler, **keys, order=order, shard=shard, **parameters))


def draw(
    logits_NV: Tensor,
    sampler: str,
    *,
    seed: int = 0,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    order: Tensor | None = None,
    shard: VocabularyShard | None = None,
    **parameters: Any,
) -> SparseTargets:
    """`sample` without `settled`, for whoever reads the targets later: waits for no accelerator (but with an order or a
    shard). Weights are NaN where logits were not finite."""
    check_parameters(sampler, parameters)
    keys = _keys(logits_NV, seed, rows, positions)
    if shard is not None:
        _refuse_order(order)
        return sample_split(logits_NV, keys, shard, sampler, default_parameters(sampler) | parameters)
    drawn = SAMPLERS[sampler](_in_order(logits_NV, sampler, order), keys, **parameters)
    return drawn if order is None else in_vocabulary(drawn, order)


def sample_importance(
    logits_NV: Tensor,
    sampler: str = "random_sampling",
    *,
    rounds: int,
    temperature: float,
    seed: int = 0,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    order: Tensor | None = None,
    shard: VocabularyShard | None = None,
) -> ImportanceDraws:
    """The draws behind `sample(logits_NV, sampler, ...)` at a temperature that is not 1, before they are weighed: what
    a cache stores so that its reader can choose the weighting. Arguments and errors as in `sample`."""
    keys: dict[str, Any] = {"seed": seed, "rows": rows, "positions": positions, "order": order, "shard": shard}
    return settled(draw_importance(logits_NV, sampler, rounds=rounds, temperature=temperature, **keys))


def draw_importance(
    logits_NV: Tensor,
    sampler: str = "random_sampling",
    *,
    rounds: int,
    temperature: float,
    seed: int = 0,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    order: Tensor | None = None,
    shard: VocabularyShard | None = None,
) -> ImportanceDraws:
    """`sample_importance` without `settled`: see `draw`. Entropies are NaN where logits were not finite."""
    check_parameters(sampler, {"rounds": rounds, "temperature": temperature})
    if temperature == 1:
        raise RecipeError("at temperature=1 draws are from p itself and nothing is left to weigh; take sample(...)")
    points, keys = POINTS[sampler], _keys(logits_NV, seed, rows, positions)
    if shard is not None:
        _refuse_order(order)
        split = agree(logits_NV, keys, shard, (sampler, rounds, temperature))
        return importance_draws_split(points, logits_NV, keys, split, rounds=rounds, temperature=temperature)
    logits_NV = _in_order(logits_NV, sampler, order)
    drawn = importance_draws(logits_NV, keys, points=points, rounds=rounds, temperature=temperature)
    return drawn if order is None else in_vocabulary(drawn, order)


Drawn = TypeVar("Drawn", bound=SparseTargets | ImportanceDraws)


def settled(drawn: Drawn) -> Drawn:
    """What was drawn without the columns that are padding throughout; waits for an accelerator, once.

    Raises:
        ModelError: logits were NaN or +inf, or -inf throughout a row.
    """
    if isinstance(drawn, SparseTargets):
        sizes_NK, bad_N = drawn.weights, drawn.weights.sum(-1).isnan()
    else:
        sizes_NK, bad_N = drawn.counts, drawn.entropy.isnan()
    used_K = (sizes_NK != 0).any(0)
    last = (used_K * torch.arange(1, len(used_K) + 1, device=used_K.device)).amax().clamp(min=1)
    bad, width = torch.stack([bad_N.sum(), last]).tolist()
    if bad:
        refuse(bad_N)
    ids, sizes_NK = drawn.ids[:, :width], sizes_NK[:, :width]
    if isinstance(drawn, SparseTargets):
        return replace(drawn, ids=ids, weights=sizes_NK)
    return replace(drawn, ids=ids, counts=sizes_NK, log2_p=drawn.log2_p[:, :width])


def in_vocabulary(drawn: Drawn, order_V: Tensor) -> Drawn:
    """What was drawn from logits whose columns stand in another order, as ids of the vocabulary, ascending again."""
    size = drawn.weights if isinstance(drawn, SparseTargets) else drawn.counts
    order_V = order_V.to(drawn.ids.device)
    ids, slot = order_V[drawn.ids].masked_fill_(size == 0, len(order_V)).sort(-1)
    ids = ids.masked_fill_(ids == len(order_V), 0)  # padding, which now stands at the end
    if isinstance(drawn, SparseTargets):
        return replace(drawn, ids=ids, weights=drawn.weights.gather(-1, slot))
    return replace(drawn, ids=ids, counts=drawn.counts.gather(-1, slot), log2_p=drawn.log2_p.gather(-1, slot))


def _refuse_order(order: Tensor | None) -> None:
    if order is not None:
        raise RecipeError(
            "order would move ids between processes: split the head's rows in that order, draw without order=, and "
            "take in_vocabulary(targets, order)"
        )


def _in_order(logits_NV: Tensor, sampler: str, order: Tensor | None) -> Tensor:
    """The columns of the logits in the order that is asked for, checked."""
    if order is None:
        return logits_NV
    if sampler not in ORDERED:
        raise RecipeError(f"order is for {', '.join(ORDERED)}, whose draws hang together; {sampler} has no use for it")
    order, vocab = order.to(logits_NV.device), logits_NV.shape[1]
    if not torch.equal(order.sort().values, torch.arange(vocab, device=order.device)):
        raise RecipeError(f"order has shape {tuple(order.shape)}; it must hold each of the ids 0 to {vocab - 1} once")
    return logits_NV.index_select(1, order)


def _keys(logits_NV: Tensor, seed: int, rows: Tensor | None, positions: Tensor | None) -> Keys:
    if logits_NV.ndim != 2:
        raise ValueError(
            f"logits are {tuple(logits_NV.shape)}, draws are made from [N, V]: give logits.flatten(0, -2), and the "
            "positions' rows= and positions="
        )
    count, device = len(logits_NV), logits_NV.device
    return Keys(
        seed=seed,
        rows=torch.zeros(count, dtype=torch.int64, device=device) if rows is None else rows.to(device),
        positions=torch.arange(count, device=device) if positions is None else positions.to(device),
    )


def random_sampling(
    logits_NV: Tensor, keys: Keys, *, rounds: int = 50, temperature: float = 1.0, normalize: bool = True
) -> SparseTargets:
    """R independent draws with replacement from q ∝ p^temperature (paper, section 3.4), each worth p/q.

    At temperature 1 the weights are `counts / rounds`: they sum to 1 and their mean is p, exactly; each has variance
    p (1 - p) / R. At any other temperature `normalize=True` divides Σ over draws of p/q by itself, as section 3.4
    does: every position weighs 1, but a ratio of random sums is biased by O(1/R) towards q. `normalize=False` divides
    by R instead: exactly unbiased, but the sum is 1 only on average, and at temperatures near 0 a few positions of
    enormous sums carry a batch.

    Returns:
        ids [N, K] ascending and distinct, K the largest number of distinct ids among these positions.
    """
    return _drawn(logits_NV, keys, independent_points, rounds, temperature, normalize)


def systematic(
    logits_NV: Tensor, keys: Keys, *, rounds: int = 50, temperature: float = 1.0, normalize: bool = False
) -> SparseTargets:
    """R evenly spaced draws from q ∝ p^temperature: one uniform u a position, points (u + j) / R, j = 0 .. R-1.

    An id's count is the number of points in its interval of the cumulative distribution, so it is R q rounded down or
    up, up with probability f = frac(R q): E[count] = R q exactly, with variance f (1 - f) instead of R q (1 - q).
    Likely ids are nearly exact and unlikely ones are drawn without replacement. At temperature 1 the weights are
    `counts / rounds` and sum to 1. Elsewhere an id weighs count / R · p/q: unbiased too, by default without the
    normalisation that would bias it (see `random_sampling`).

    Two ids' counts are dependent through the order of ids. A gradient is linear in the weights, so dependence never
    moves its mean, and for a gradient that separates ids (the logits') not even its squared error; a parameter's
    gradient has 13 to 26 % less noise where neighbours are alike (`sample(order=)`, vocabulary_order.py, docs/LOG.md).

    Returns:
        ids [N, K] ascending and distinct, K the largest number of distinct ids among these positions.
    """
    return _drawn(logits_NV, keys, even_points, rounds, temperature, normalize)


@torch.no_grad()
def _drawn(
    logits_NV: Tensor, keys: Keys, points: Points, rounds: int, temperature: float, normalize: bool
) -> SparseTargets:
    """The ids at some points of the cumulative distribution of q ∝ p^temperature, weighed."""
    if temperature != 1:
        draws = importance_draws(logits_NV, keys, points=points, rounds=rounds, temperature=temperature)
        return draws.targets(normalize=normalize)
    parts = []
    for part_NV, part_keys in draw_parts(logits_NV, keys, rounds):
        masses = block_masses(part_NV)
        ids, counts = merge_ascending(ids_in(part_NV, masses, points(part_keys, rounds)))
        parts.append((ids, marked(counts / rounds, masses)))
    return join_parts(parts)


@torch.no_grad()
def top_k(logits_NV: Tensor, keys: Keys, *, k: int = 12) -> SparseTargets:
    """The k largest probabilities as they are (paper, section 2): biased; they sum to the top-k mass, below 1.

    Equals `softmax(logits, -1).topk(k)`. ids are in descending order of probability, ties in ascending id.
    """
    kept = min(k, logits_NV.shape[1])
    parts = []
    for part_NV, _ in chunks(logits_NV, keys):
        shifted = shifted_logits(part_NV)
        values, ids = stable_top(shifted, kept)
        total = block_sums(in_blocks(shifted.exp_())).sum(-1, keepdim=True)
        parts.append((ids, (values.double().exp() / total).float()))
    return join_parts(parts)


@torch.no_grad()
def top_p(logits_NV: Tensor, keys: Keys, *, p: float = 0.98, k: int = 100) -> SparseTargets:
    """Of the k largest probabilities, the fewest that reach mass p (paper, table 1, row *50): biased.

    The weights sum to at least p where k ids can reach it, and to the top-k mass elsewhere.
    """
    return reaching(p, top_k(logits_NV, keys, k=k))


@torch.no_grad()
def full(logits_NV: Tensor, keys: Keys) -> SparseTargets:
    """All V probabilities: dense, for online baselines and tests. Sums to 1, exact."""
    probabilities = logits_NV.to(working_dtype(logits_NV)).softmax(-1)
    ids = torch.arange(logits_NV.shape[1], device=logits_NV.device).expand_as(probabilities)
    return SparseTargets(ids=ids, weights=probabilities)


SAMPLERS: dict[str, Callable[..., SparseTargets]] = {
    "random_sampling": random_sampling,
    "systematic": systematic,
    "top_k": top_k,
    "top_p": top_p,
    "full": full,
}

# Where the samplers that count draws put them: what `sample_importance` can take.
POINTS: dict[str, Points] = {"random_sampling": independent_points, "systematic": even_points}

# The samplers whose draws depend on each other through the order of ids.
ORDERED = ("systematic",)

# (parameter, lowest, highest) for each sampler, whole numbers between whole ones; what is not listed is an unknown key.
_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "random_sampling": {"rounds": (1, 2**20), "temperature": (0.0, 10.0), "normalize": (0, 1)},
    "systematic": {"rounds": (1, 2**20), "temperature": (0.0, 10.0), "normalize": (0, 1)},
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
        whole = isinstance(low, int)
        if not isinstance(value, int if whole else int | float) or not low <= value <= high:
            numbers = f"{low} to {high}, whole numbers" if whole else f"{low:g} to {high:g}"
            raise RecipeError(f"sampler.{name}={value!r} is out of range: {numbers}")


def default_parameters(sampler: str) -> dict[str, Any]:
    """A sampler's parameters and their defaults, from its signature."""
    signature = inspect.signature(SAMPLERS[sampler]).parameters.values()
    return {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}


def is_unbiased(sampler: str, parameters: dict[str, Any]) -> bool:
    """Whether E[densify(targets)] equals the teacher's distribution exactly, as the property tests check."""
    settings = default_parameters(sampler) | parameters
    return sampler == "full" or (sampler in POINTS and (settings["temperature"] == 1 or not settings["normalize"]))


def count_rounds(sampler: str, parameters: dict[str, Any]) -> int | None:
    """R when every weight is an integer count over R (so the codec is lossless), else None."""
    settings = default_parameters(sampler) | parameters
    return int(settings["rounds"]) if sampler in POINTS and settings["temperature"] == 1 else None
