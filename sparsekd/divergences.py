"""Other objectives than forward KL, on the whole teacher distribution and, where meaningful, on sparse targets.

Shapes: N positions (any leading shape), V vocabulary, K kept ids. With p the student's and t the teacher's
probabilities (paper, section 6.3 and table 12):

    forward_kl          Σ t log(t / p)
    reverse_kl          Σ p log(p / t)
    forward_reverse_kl  the sum of both ("F+R")
    l1                  Σ |p - t|
    mse                 Σ (p - t)²
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekd.losses import kept_positions, reduce, sparse_kl
from sparsekd.targets import SparseTargets


def forward_kl(log_p: Tensor, log_t: Tensor) -> Tensor:
    """Σ t log(t / p), [...]; dL/dz = p - t."""
    return _weighted(log_t, log_t - log_p)


def reverse_kl(log_p: Tensor, log_t: Tensor) -> Tensor:
    """Σ p log(p / t), [...]; dL/dz_j = p_j (log(p_j / t_j) - L). Infinite where p reaches an id with t = 0."""
    return _weighted(log_p, log_p - log_t)


def forward_reverse_kl(log_p: Tensor, log_t: Tensor) -> Tensor:
    """The sum of the two KL divergences, [...]."""
    return forward_kl(log_p, log_t) + reverse_kl(log_p, log_t)


def l1(log_p: Tensor, log_t: Tensor) -> Tensor:
    """Σ |p - t|, [...]: twice the total variation."""
    return (log_p.exp() - log_t.exp()).abs().sum(-1)


def mse(log_p: Tensor, log_t: Tensor) -> Tensor:
    """Σ (p - t)², [...], on probabilities; dL/dz_j = 2 p_j ((p_j - t_j) - Σ p (p - t))."""
    return (log_p.exp() - log_t.exp()).square().sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "forward_reverse_kl": forward_reverse_kl,
    "l1": l1,
    "mse": mse,
}


def full_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    divergence: str = "forward_kl",
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """A divergence of `DIVERGENCES` between log_softmax(logits) and log_softmax(teacher_logits), in plain torch."""
    check_divergence(divergence)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = DIVERGENCES[divergence](logits.to(dtype).log_softmax(-1), teacher_logits.to(dtype).log_softmax(-1))
    keep = kept_positions(losses.shape, labels, ignore_index, losses.device)
    return reduce(losses * keep, keep, reduction, num_items_in_batch)


def sparse_divergence(
    logits: Tensor,
    targets: SparseTargets | Any,
    divergence: str = "forward_kl",
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The same from sparse targets, for the divergences whose gradient is linear in t: forward_kl and mse.

    Linear in t, the gradient from an unbiased sample is right on average (paper, A.6). For the others no sample of a
    few ids will do, and they are refused.

    Raises:
        ValueError: a divergence that sparse targets cannot give.
    """
    check_sparse_divergence(divergence)
    settings = {"ignore_index": ignore_index, "reduction": reduction, "num_items_in_batch": num_items_in_batch}
    if divergence == "forward_kl":
        return sparse_kl(logits, targets, labels=labels, **settings)  # type: ignore[arg-type]
    targets = SparseTargets.of(targets).to(logits.device)
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    t = targets.weights.to(p.dtype)
    losses = p.square().sum(-1) - 2 * (t * p.gather(-1, targets.ids)).sum(-1) + t.square().sum(-1)
    keep = kept_positions(losses.shape, labels, ignore_index, losses.device)
    return reduce(losses * keep, keep, reduction, num_items_in_batch)


def check_divergence(divergence: str) -> None:
    """Raise ValueError for an unknown divergence."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is not one of {', '.join(DIVERGENCES)}")


def check_sparse_divergence(divergence: str) -> None:
    """Raise ValueError for a divergence that sparse targets cannot give, with the reason."""
    check_divergence(divergence)
    reasons = {
        "reverse_kl": "it is infinite wherever the student puts mass on an id outside the sparse targets",
        "forward_reverse_kl": "its reverse part is infinite wherever the student puts mass outside the sparse targets",
        "l1": "its gradient is the sign of p - t, so a sample of t does not give it on average",
    }
    if divergence in reasons:
        raise ValueError(
            f"divergence={divergence!r} has no meaning on sparse targets: {reasons[divergence]}; use forward_kl or "
            "mse, or method=full_kd with an online teacher"
        )


def _weighted(log_weights: Tensor, values: Tensor) -> Tensor:
    """Σ exp(log_weights) * values with 0 * anything = 0."""
    weights = log_weights.exp()
    return torch.where(weights > 0, weights * values, weights.new_zeros(())).sum(-1)
