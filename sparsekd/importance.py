"""Importance draws: counts of draws from a proposal q ∝ p^t, before they are weighed (paper, section 3.4).

Shapes: N positions, V vocabulary, K kept ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekd.inversion import (
    BLOCK,
    LOWEST,
    Points,
    block_sums,
    chunks,
    in_blocks,
    invert,
    merge_draws,
    shifted_logits,
    side_by_side,
)
from sparsekd.rng import Keys
from sparsekd.targets import SparseTargets


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
def importance_draws(
    logits_NV: Tensor, keys: Keys, *, points: Points, rounds: int = 50, temperature: float
) -> ImportanceDraws:
    """R draws from q ∝ p^temperature at `points` of its cumulative distribution, with all that their weights need."""
    parts = []
    for part_NV, part_keys in chunks(logits_NV, keys, extra=8 * BLOCK * rounds):
        shifted = shifted_logits(part_NV)
        total_p = block_sums(in_blocks(shifted.exp())).sum(-1, keepdim=True)
        # 0^0 is 0 here: q's support is p's, so a uniform proposal (t = 0) leaves out ids that are masked with -inf.
        mass = (shifted * temperature).exp_().masked_fill_(shifted <= LOWEST, 0)
        ids, counts = merge_draws(invert(in_blocks(mass), points(part_keys, rounds)))
        total_q = block_sums(in_blocks(mass)).sum(-1)
        log2_p = shifted.gather(-1, ids).double() / math.log(2) - total_p.log2()
        entropy = (total_q.log2() - temperature * total_p[:, 0].log2()) / (1 - temperature)
        parts.append((ids, counts, log2_p, entropy.clamp_(min=0)))
    ids_, counts_, log2_ps, entropies = zip(*parts, strict=True)
    return ImportanceDraws(
        ids=side_by_side(ids_),
        counts=side_by_side(counts_),
        log2_p=side_by_side(log2_ps),
        entropy=torch.cat(entropies),
        temperature=temperature,
        rounds=rounds,
    )
