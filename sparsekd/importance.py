"""Importance draws: counts of draws from a proposal q ∝ p^t, before they are weighed (paper, section 3.4).

Shapes: N positions, V vocabulary, K kept ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekd.inversion import (
    LOWEST,
    Points,
    draw_parts,
    ids_in,
    merge_ascending,
    side_by_side,
    tilted_masses,
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
    for part_NV, part_keys in draw_parts(logits_NV, keys, rounds):
        masses, log2_q = tilted_masses(part_NV, temperature)
        _, log2_all = tilted_masses(part_NV, 1.0)
        ids, counts = merge_ascending(ids_in(part_NV, masses, points(part_keys, rounds), temperature))
        below_NK = part_NV.gather(-1, ids).double() - part_NV.amax(-1, keepdim=True).double()
        parts.append((ids, counts, *what_weighs(below_NK, log2_q, log2_all, temperature)))
    return join_draws(parts, temperature, rounds)


def what_weighs(below_NK: Tensor, log2_q: Tensor, log2_all: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[N, K] log2 p and [N] entropy, from logits below the largest and both normalisers (`tilted_masses`)."""
    # Padding is id 0, which may be masked with -inf: finite, so that a count of 0 stays a weight of 0.
    log2_p = below_NK.clamp(min=LOWEST) / math.log(2) - log2_all[:, None]
    return log2_p, ((log2_q - temperature * log2_all) / (1 - temperature)).clamp_(min=0)


def join_draws(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], temperature: float, rounds: int) -> ImportanceDraws:
    """One from chunks of (ids, counts, log2 p, entropy), of different widths."""
    ids_, counts_, log2_ps, entropies = zip(*parts, strict=True)
    return ImportanceDraws(
        ids=side_by_side(ids_),
        counts=side_by_side(counts_),
        log2_p=side_by_side(log2_ps),
        entropy=torch.cat(entropies),
        temperature=temperature,
        rounds=rounds,
    )
