"""Draws from a head whose vocabulary is split over processes: each holds the logits of its own ids, and none travels.

The processes' shares of the distribution are one level more above the blocks of `inversion`. All hold the same keys,
so all know the same points; a process finds the ids of the points that fall into its share.

    shard = VocabularyShard(group=group, start=rank * V // world, vocab_size=V)
    sample(own_logits, "systematic", rounds=50, shard=shard)          # the same targets in every process

What travels for a position: 16 bytes of each process (its largest logit, its sum of exponentials; 24 at a temperature
that is not 1), the ids of R draws as int32 (4 R bytes), and at other temperatures the logits of the K ids drawn. Before
them 48 bytes a call say who holds what. Entropies take 24 bytes of each process; `whole_logits` is for what has no
such way. Whatever one process finds wrong (NaN, shares that leave a gap, another seed) travels before it is raised, in
all of them alike: none is left waiting.

Shapes: N positions, W processes, R draws, K kept ids, P of a process's own points.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.errors import MismatchError, RecipeError
from sparsekd.fused_parallel import VocabularyShard
from sparsekd.importance import ImportanceDraws, join_draws, what_weighs
from sparsekd.inversion import (
    LOWEST,
    Points,
    block_sums,
    chunks,
    draw_parts,
    even_points,
    ids_within,
    in_blocks,
    independent_points,
    join_parts,
    locate,
    merge_ascending,
    reaching,
    refuse,
    running_sums,
    stable_top,
    tilted,
    tilted_masses,
    working_dtype,
)
from sparsekd.rng import Keys
from sparsekd.targets import SparseTargets


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Split:
    """A vocabulary over processes, found whole.

    Attributes:
        group: process group.
        ranks: [W] ranks of the group in the order of their ids.
        place: where in that order this process is.
        start, vocab_size: as in `VocabularyShard`.
    """

    group: Any
    ranks: Tensor
    place: int
    start: int
    vocab_size: int

    def gather(self, own: Tensor) -> Tensor:
        """[W, ...] every process's tensor, in the order of their ids."""
        return _gathered(own, self.group)[self.ranks]

    def largest(self, own: Tensor) -> Tensor:
        """The largest over the processes of each entry, in place."""
        dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self.group)
        return own


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Some positions' distribution q ∝ p^temperature, as all processes know it.

    Attributes:
        masses: [N, blocks] of the own ids, normalised among them.
        ends: [N, W] float64, cumulative mass of the processes.
        peak: [N] float64, the largest logit.
        log2_total: [N] float64, log2 Σ exp(temperature (z - peak)).
    """

    masses: Tensor
    ends: Tensor
    peak: Tensor
    log2_total: Tensor


@torch.no_grad()
def sample_split(
    logits_NV: Tensor, keys: Keys, shard: VocabularyShard, sampler: str, parameters: dict[str, Any]
) -> SparseTargets:
    """`SAMPLERS[sampler](whole_logits, keys, **parameters)`, with all parameters given, in every process.

    The same ids, but where a point lies within 1e-6 of the end of an id's interval (float32 rounds it).

    Raises:
        RecipeError: a sampler that a split head does not have.
        MismatchError: shares that do not make up the vocabulary, or processes that do not sample the same.
        ModelError: logits that are NaN or +inf in any process, or -inf in all.
    """
    check_split(sampler)
    split = agree(logits_NV, keys, shard, (sampler, sorted(parameters.items())))
    return SPLIT_SAMPLERS[sampler](logits_NV, keys, split, **parameters)


def check_split(sampler: str) -> None:
    """RecipeError for a sampler that a split head does not have."""
    if sampler not in SPLIT_SAMPLERS:
        raise RecipeError(f"{sampler} keeps all V probabilities; a split head has: {', '.join(SPLIT_SAMPLERS)}")


def agree(logits_NV: Tensor, keys: Keys, shard: VocabularyShard, settings: Any) -> Split:
    """Who holds which ids, after all processes have told what they hold and are about to draw: 48 bytes of each."""
    heads = _gathered(_head(logits_NV, keys, shard, settings), shard.group).cpu()
    _check_shares(*heads[:, :3].T.tolist())
    _check_alike(heads[:, 3:])
    ranks = heads[:, 0].argsort()
    place = ranks.tolist().index(dist.get_rank(shard.group))
    ranks = ranks.to(logits_NV.device)
    return Split(group=shard.group, ranks=ranks, place=place, start=shard.start, vocab_size=shard.vocab_size)


# What follows the three numbers of a share in a process's head.
ALIKE = ("number of positions", "sampler, parameters, seed, dtype or device", "rows or positions")
# Mixes rows and positions into a sum modulo 2^64 in which others, or another order of them, show.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64


def _head(logits_NV: Tensor, keys: Keys, shard: VocabularyShard, settings: Any) -> Tensor:
    """[6] int64: the share, and what must be the same everywhere."""
    (count, own), device = logits_NV.shape, logits_NV.device
    said = zlib.crc32(repr((settings, keys.seed, logits_NV.dtype, device.type)).encode())
    at = 2 * torch.arange(count, device=device) + 1
    keyed = ((keys.rows * _FACTOR + keys.positions) * at).sum()
    numbers = torch.tensor([shard.start, own, shard.vocab_size, count, said], device=device)
    return torch.cat([numbers, keyed[None]])


def _check_alike(heads: Tensor) -> None:
    for what, values in zip(ALIKE, heads.T.tolist(), strict=True):
        if len(set(values)) > 1:
            found = f": {values}" if what == ALIKE[0] else ""
            raise MismatchError(f"processes differ in {what}{found}; each passes the same, with its own ids' logits")


def _check_shares(starts: list[int], counts: list[int], sizes: list[int]) -> None:
    """Shares of at least one id that follow each other from 0 to the vocabulary's size."""
    spans = sorted((start, start + count) for start, count in zip(starts, counts, strict=True))
    ends = [0, *(end for _, end in spans)]
    follow = all(start == end < last for (start, last), end in zip(spans, ends[:-1], strict=True))
    if not follow or {ends[-1]} != set(sizes):
        held = ", ".join(f"[{start}, {end})" for start, end in spans)
        raise MismatchError(
            f"processes hold the ids {held} of a vocabulary of {sorted(set(sizes))}; "
            "shares must follow each other from 0 to its size, none empty"
        )


def _gathered(own: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.stack(parts)


def shares(logits_NV: Tensor, split: Split, temperatures: tuple[float, ...]) -> list[Shares]:
    """The distributions at some temperatures: one all-gather of [N, 1 + temperatures] float64.

    Raises:
        ModelError: in all processes, for logits of any that are NaN or +inf, or a row that is -inf in all.
    """
    own_peak = logits_NV.amax(-1).double()
    impossible = own_peak == -torch.inf  # a share of ids that are all masked: padding of the vocabulary
    found = [tilted_masses(logits_NV, each) for each in temperatures]
    totals = [log2.masked_fill(impossible, -torch.inf) for _, log2 in found]
    peak_WN, *totals_WN = split.gather(torch.stack([own_peak, *totals])).unbind(1)
    peak = _peak(peak_WN)
    together = []
    for (masses, _), temperature, total_WN in zip(found, temperatures, totals_WN, strict=True):
        # Rounded as `tilted_masses` rounds logits: a share is as heavy as its own ids are.
        tilted_WN = tilted(peak_WN.to(working_dtype(logits_NV), copy=True), temperature).double()
        below_WN = (tilted_WN - tilted_WN.amax(0)).masked_fill_(peak_WN == -torch.inf, 0)
        ends = (total_WN + below_WN / math.log(2)).exp2().T.cumsum(-1)
        masses = masses.masked_fill_(impossible[:, None], 1)  # no point falls there, but a search must end
        together.append(Shares(masses=masses, ends=ends, peak=peak, log2_total=ends[:, -1].log2()))
    return together


def _peak(peak_WN: Tensor) -> Tensor:
    """[N] the largest logits of all processes; NaN and inf of any of them are refused in all."""
    peak = peak_WN.amax(0)
    if not bool(torch.isfinite(peak).all()):
        refuse(~torch.isfinite(peak))
    return peak


def ids_at_split(logits_NV: Tensor, points_NR: Tensor, split: Split, own: Shares, temperature: float = 1.0) -> Tensor:
    """`ids_in` of the whole head, in every process: one all-reduce of [N, R] int32.

    Returns:
        [N, R] int64, ascending in each row.
    """
    holder, share = locate(own.ends, points_NR)
    block, fraction = locate(running_sums(own.masses), share)
    first = torch.arange(len(block), device=block.device)[:, None] * own.masses.shape[1]
    # Those of the others' points too, for nothing: an accelerator would have to be asked which the own ones are.
    found = ids_within(logits_NV, (first + block).flatten(), fraction.flatten(), temperature).view_as(block)
    ids = (split.start + found).masked_fill_(holder != split.place, -1).int()
    drawn = split.largest(ids).long()
    if bool((drawn < 0).any()):
        raise MismatchError(
            "processes disagree in the last bit about whose a draw is: different devices or versions of torch in one "
            "group? give the group machines of one kind"
        )
    return drawn


def drawn(
    points: Points,
    logits_NV: Tensor,
    keys: Keys,
    split: Split,
    *,
    rounds: int,
    temperature: float,
    normalize: bool,
) -> SparseTargets:
    """`random_sampling` and `systematic`, which differ in their points."""
    if temperature != 1:
        draws = importance_draws_split(points, logits_NV, keys, split, rounds=rounds, temperature=temperature)
        return draws.targets(normalize=normalize)
    parts = []
    for part_NV, part_keys in draw_parts(logits_NV, keys, rounds, split.vocab_size):
        (own,) = shares(part_NV, split, (1.0,))
        ids, counts = merge_ascending(ids_at_split(part_NV, points(part_keys, rounds), split, own))
        parts.append((ids, counts / rounds))
    return join_parts(parts)


def importance_draws_split(
    points: Points, logits_NV: Tensor, keys: Keys, split: Split, *, rounds: int, temperature: float
) -> ImportanceDraws:
    """`importance_draws` of the whole head: the logits of the ids drawn travel too, [N, K]."""
    parts = []
    for part_NV, part_keys in draw_parts(logits_NV, keys, rounds, split.vocab_size):
        own, plain = shares(part_NV, split, (temperature, 1.0))
        ids, counts = merge_ascending(ids_at_split(part_NV, points(part_keys, rounds), split, own, temperature))
        below_NK = logits_of(part_NV, ids, split).double() - own.peak[:, None]
        parts.append((ids, counts, *what_weighs(below_NK, own.log2_total, plain.log2_total, temperature)))
    return join_draws(parts, temperature, rounds)


def logits_of(logits_NV: Tensor, ids_NK: Tensor, split: Split) -> Tensor:
    """`whole_logits.gather(-1, ids)` in every process: one all-reduce of [N, K]."""
    own = ids_NK - split.start
    held = logits_NV.gather(-1, own.clamp(0, logits_NV.shape[1] - 1)).to(working_dtype(logits_NV))
    return split.largest(held.masked_fill_((own < 0) | (own >= logits_NV.shape[1]), -torch.inf))


def top_k(logits_NV: Tensor, keys: Keys, split: Split, *, k: int) -> SparseTargets:
    """`top_k` of the whole head, from k candidates of each process: all-gathers of [N, k] twice and of [N] twice.

    Of ids that tie for the last place another may be kept than one process keeps.
    """
    kept, own = min(k, split.vocab_size), min(k, logits_NV.shape[1])
    peak = _peak(split.gather(logits_NV.amax(-1).double()))
    parts = [part_NV for part_NV, _ in chunks(logits_NV, keys)]
    found = [_own_top(*part, own) for part in zip(parts, peak.split([len(part) for part in parts]), strict=True)]
    values, ids, total = (torch.cat(column) for column in zip(*found, strict=True))
    missing = (0, kept - own)  # of a process that has fewer ids than are kept
    values = split.gather(torch.nn.functional.pad(values, missing, value=-torch.inf))
    ids = split.gather(torch.nn.functional.pad((ids + split.start).int(), missing))
    values, slot = values.transpose(0, 1).flatten(1).sort(dim=-1, descending=True, stable=True)
    ids = ids.transpose(0, 1).flatten(1).long().gather(-1, slot[:, :kept])
    weights = values[:, :kept].double().exp() / split.gather(total).sum(0)[:, None]
    return SparseTargets(ids=ids, weights=weights.float())


def _own_top(logits_NV: Tensor, peak_N: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, k] values below the peak and their ids, and [N] sums of exponentials, of the own ids."""
    below_NV = (logits_NV - peak_N.to(working_dtype(logits_NV))[:, None]).clamp_(min=LOWEST)
    values, ids = stable_top(below_NV, k)
    return values, ids, block_sums(in_blocks(below_NV.exp_())).sum(-1)


def top_p(logits_NV: Tensor, keys: Keys, split: Split, *, p: float, k: int) -> SparseTargets:
    """`top_p` of the whole head: what `top_k` keeps travels."""
    return reaching(p, top_k(logits_NV, keys, split, k=k))


@torch.no_grad()
def entropies_split(logits_NV: Tensor, shard: VocabularyShard) -> Tensor:
    """`position_budget.entropies` of the whole head, in every process: one all-gather of [N, 3] float64.

    With each process's largest logit m, its sum s of exp(z - m) and its sum t of (z - m) exp(z - m), all of them
    brought to the same m: H = log Σs - Σt / Σs.
    """
    peak = logits_NV.float().amax(-1, keepdim=True).clamp_(min=LOWEST)  # of a share that is all masked too
    below = (logits_NV.float() - peak).clamp_(min=LOWEST)
    p = below.exp()
    own = torch.stack([peak[:, 0].double(), p.sum(-1).double(), (p * below).sum(-1).double()])
    peak_WN, total_WN, moment_WN = _gathered(own, shard.group).unbind(1)
    below_WN = peak_WN - peak_WN.amax(0)
    total = (below_WN.exp() * total_WN).sum(0)
    return (total.log() - (below_WN.exp() * (moment_WN + below_WN * total_WN)).sum(0) / total).float()


@torch.no_grad()
def whole_logits(logits_NV: Tensor, shard: VocabularyShard) -> Tensor:
    """[N, V] the logits of all ids, in every process, for what needs them all: one all-gather of V numbers a position.

    Raises:
        MismatchError: shares that do not make up the vocabulary.
    """
    share = torch.tensor([shard.start, logits_NV.shape[1], shard.vocab_size], device=logits_NV.device)
    starts, counts, sizes = _gathered(share, shard.group).T.tolist()
    _check_shares(starts, counts, sizes)
    parts = _gathered(torch.nn.functional.pad(logits_NV, (0, max(counts) - logits_NV.shape[1])), shard.group)
    ranks = sorted(range(len(starts)), key=starts.__getitem__)
    return torch.cat([parts[rank, :, : counts[rank]] for rank in ranks], -1)


# The samplers that a split head has.
SPLIT_SAMPLERS: dict[str, Callable[..., SparseTargets]] = {
    "random_sampling": partial(drawn, independent_points),
    "systematic": partial(drawn, even_points),
    "top_k": top_k,
    "top_p": top_p,
}
