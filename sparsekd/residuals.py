"""What becomes of the teacher's mass that sparse targets leave out: 1 - S, where S = Σt (paper, sections 2 and 3).

Shapes: C rows, K kept ids, V vocabulary. Each treatment is a function `(targets, labels, V) -> Treated`, listed in
`RESIDUALS`; the losses compute value and gradient for whatever a `Treated` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekd.targets import SparseTargets


@dataclass(frozen=True, kw_only=True, slots=True)
class Treated:
    """A target τ = weights at ids, plus `uniform` at every id, plus (ghost) the missing mass on all other ids at once.

    Attributes:
        ids, weights: [C, K]; distinct ids where weights > 0.
        uniform: [C] mass given to each of the V ids, or None.
        ghost: whether the missing mass is compared with the student's own mass outside the set.
    """

    ids: Tensor
    weights: Tensor
    uniform: Tensor | None = None
    ghost: bool = False

    def missing(self) -> Tensor:
        """[C] max(0, 1 - S)."""
        return _missing(self.weights)


def _missing(weights: Tensor) -> Tensor:
    return (1 - weights.sum(-1)).clamp(min=0)


def none(targets: SparseTargets, labels: Tensor | None, vocab_size: int) -> Treated:
    """The targets as they are: dL/dz = S p - t (eq. 5). The optimum is t / S: over-confident where S < 1."""
    return Treated(ids=targets.ids, weights=targets.weights)


def renormalize(targets: SparseTargets, labels: Tensor | None, vocab_size: int) -> Treated:
    """t / S: the same optimum as `none`, each position with weight 1. dL/dz = p - t / S."""
    mass = targets.weights.sum(-1, keepdim=True)
    return Treated(ids=targets.ids, weights=targets.weights / mass.where(mass > 0, torch.ones_like(mass)))


def smooth(targets: SparseTargets, labels: Tensor | None, vocab_size: int) -> Treated:
    """The missing mass spread evenly over all V ids (section 3.1). dL/dz = p - t - (1 - S) / V."""
    uniform = _missing(targets.weights) / vocab_size
    return Treated(ids=targets.ids, weights=targets.weights, uniform=uniform * (targets.weights > 0).any(-1))


def ghost(targets: SparseTargets, labels: Tensor | None, vocab_size: int) -> Treated:
    """One ghost token holds the missing mass, for teacher and student alike (section 3.2, appendix A.5).

    L = Σ_K t log(t / p) + (1 - S) log((1 - S) / (1 - P)), where P = Σ_K p. dL/dz_j = p_j - t_j for the kept ids and
    p_j (S - P) / (1 - P) for the others: they share what is missing in their own proportions.
    """
    return Treated(ids=targets.ids, weights=targets.weights, ghost=True)


def label(targets: SparseTargets, labels: Tensor | None, vocab_size: int) -> Treated:
    """The missing mass goes to the true next token, the naive fix (section 3.3). dL/dz = p - t - (1 - S) onehot(y)."""
    assert labels is not None
    rest = _missing(targets.weights) * (targets.weights > 0).any(-1)
    here = (targets.ids == labels[:, None]) & (targets.weights > 0)
    added = rest[:, None] * here
    appended = rest * ~here.any(-1)
    return Treated(
        ids=torch.cat([targets.ids, labels[:, None]], -1),
        weights=torch.cat([targets.weights + added, appended[:, None]], -1),
    )


RESIDUALS: dict[str, Callable[[SparseTargets, Tensor | None, int], Treated]] = {
    "none": none,
    "renormalize": renormalize,
    "smooth": smooth,
    "ghost": ghost,
    "label": label,
}


def hard_token_weights(
    targets: SparseTargets, labels: Tensor, *, ratio: float, hard_share: float = 0.5, ignore_index: int = -100
) -> Tensor:
    """Loss factors [...]: hard tokens take `ratio` times the learning rate of easy ones, 1 on average (section 5.3).

    Hard are the `hard_share` of a batch's positions where the targets put least on the true next token; ignored
    positions get 0. `ratio=1` gives 1 everywhere.
    """
    keep = labels != ignore_index
    score = (targets.weights * (targets.ids == labels[..., None])).sum(-1)
    # Of the kept ones, without asking an accelerator how many they are; NaN, and nothing is hard, where there are none.
    cut = score.float().where(keep, torch.nan).nanquantile(hard_share)
    hard = (score <= cut) & keep
    factors = torch.where(hard, float(ratio), 1.0) * keep
    return factors * keep.sum() / factors.sum().clamp(min=1e-12)
