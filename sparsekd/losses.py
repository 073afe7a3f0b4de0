"""Distillation losses on logits, one function per equation, with hand-written gradients.

Shapes: N positions (any leading shape), V vocabulary, K kept ids, C rows of a chunk.
With z the student's logits, p = softmax(z/T), t the targets, S = Σt their sum, y the label, α the CE weight and T the
temperature:

    loss     = (1-α) T² Σ_i t_i (log t_i - log p_i)  -  α log softmax(z)_y
    dloss/dz = (1-α) T  (S p - t)  +  α (softmax(z) - onehot(y))                     (paper, eq. 4 and section 5.3)

`row_losses.py` computes them, with what else a loss may have (`LossOptions`).

S need not be 1. Gradients are exact for every S: nothing is renormalised behind the caller's back. What becomes of the
missing mass 1 - S is the caller's choice, one of `residuals.RESIDUALS`.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.prefix_sets import PrefixSets
from sparsekd.row_losses import LossOptions, Rows, losses_, prepare, row_chunks
from sparsekd.targets import SparseTargets


class LossWords(TypedDict, total=False):
    """The fields of `LossOptions` as keywords, for type checkers and editors."""

    ce_weight: float
    temperature: float
    residual: str
    z_loss: float
    token_weights: Tensor | None
    ignore_index: int
    reduction: str
    num_items_in_batch: Tensor | int | None


def sparse_kl(
    logits: Tensor, targets: SparseTargets | Any, *, labels: Tensor | None = None, **options: Unpack[LossWords]
) -> Tensor:
    """Forward KL from sparse targets to the student, in nats; zero where softmax(z/T) equals them.

    Equals, without a dense target and with no [N, V] buffer but the gradient:

        t, log_p = targets.densify(V), log_softmax(logits / T, -1)
        (1 - ce_weight) * T**2 * (xlogy(t, t) - t * log_p).sum(-1) + ce_weight * cross_entropy(logits, labels)
            + z_loss * logits.logsumexp(-1) ** 2

    The targets must stand for the teacher at the same temperature (a cache's do at T = 1, the default). With sampled
    targets the value lies above the full KL by the targets' own noise; the gradient is unbiased (paper, A.6).

    Args:
        logits: [..., V] student logits; the loss is computed in float32 (float64 stays float64).
        targets: ids and weights [..., K]; distinct ids (repeats add up in the gradient).
        labels: [...] int64; positions equal to `ignore_index` count for nothing. Needed when ce_weight > 0.
        options: ce_weight, temperature, residual, z_loss, token_weights, ignore_index, reduction and
            num_items_in_batch, as `LossOptions` has them.
    """
    return _sparse_loss(logits, targets, labels, LossOptions(**options))


def sparse_ce(
    logits: Tensor,
    targets: SparseTargets | Any,
    *,
    labels: Tensor | None = None,
    sets: PrefixSets | None = None,
    **options: Unpack[LossWords],
) -> Tensor:
    """Cross-entropy to sparse targets, -Σ t log p (paper, A.2): `sparse_kl` without the constant Σ t log t.

    The same gradient; the value is an unbiased estimate of the cross-entropy to the full teacher.

    With `sets`, ids from their V on stand for sets of tokens, and for sets as conditions (`prefix_sets`); logits may be
    wider than V (a padded head), `residual` must be "none". Then it equals, with t = targets.densify(V + 2 S) and
    member[s, v] = 1 where token v is in set s:

        p = softmax(logits / T, -1)[:, :V]
        -(t[:, :V] * p.log() + (t[:, V : V + S] - t[:, V + S :]) * (p @ member.T).log()).sum(-1)
    """
    return _sparse_loss(logits, targets, labels, LossOptions(**options, entropy=False), sets)


def full_kl(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Forward KL to the whole teacher distribution (paper, eq. 3), in plain torch: the online baseline.

    Equals T**2 * F.kl_div(log_softmax(z/T), log_softmax(z_teacher/T), log_target=True).sum(-1), mixed with α
    cross-entropy as in `sparse_kl`. Vocabularies must have the same width.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    options = LossOptions(ce_weight=ce_weight, temperature=temperature, reduction=reduction)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = (logits.to(dtype) / temperature).log_softmax(-1)
    log_t = (teacher_logits.to(dtype) / temperature).log_softmax(-1)
    losses = (log_t.exp() * (log_t - log_p)).sum(-1) * temperature**2
    keep = kept_positions(losses.shape, labels, ignore_index, losses.device)
    if options.ce_weight:
        token_losses = -logits.to(dtype).log_softmax(-1).gather(-1, safe_labels(labels, keep)[..., None])[..., 0]
        losses = torch.lerp(losses, token_losses, options.ce_weight)
    return reduce(losses * keep, keep, reduction, num_items_in_batch)


def _sparse_loss(
    logits: Tensor,
    targets: SparseTargets | Any,
    labels: Tensor | None,
    options: LossOptions,
    sets: PrefixSets | None = None,
) -> Tensor:
    targets = SparseTargets.of(targets).to(logits.device)
    if targets.ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.ids.shape)} differ in their positions"
        )
    keep = kept_positions(logits.shape[:-1], labels, options.ignore_index, logits.device)
    flat_labels = safe_labels(labels, keep).flatten() if options.needs_labels else None
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if sets is not None:
        sets, logits = sets.to(logits.device), logits.contiguous()  # a token's place is one number
    rows = prepare(targets.flatten(), flat_labels, options, logits.shape[-1], dtype, sets)
    losses: Tensor = _SparseLoss.apply(logits.flatten(0, -2), rows, options)
    weights = options.token_weights
    factors = keep if weights is None else keep * weights.to(losses.device)
    return reduce(losses.view(keep.shape) * factors, keep, options.reduction, options.num_items_in_batch)


class _SparseLoss(torch.autograd.Function):
    """Losses per row [N]; saves the logits it was given and makes the gradient in one [N, V] buffer."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, rows: Rows, options: LossOptions) -> Tensor:
        ctx.save_for_backward(logits_NV)
        ctx.rows, ctx.options = rows, options
        losses = torch.empty_like(rows.mass)
        for part in row_chunks(logits_NV):
            tile = logits_NV[part].to(losses.dtype, copy=True)
            losses[part] = losses_(tile, rows[part], options)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (logits_NV,) = ctx.saved_tensors
        gradient = torch.empty_like(logits_NV)
        for part in row_chunks(logits_NV):
            same = logits_NV.dtype == grad_N.dtype
            tile = gradient[part].copy_(logits_NV[part]) if same else logits_NV[part].to(grad_N.dtype)
            losses_(tile, ctx.rows[part], ctx.options, grad_N[part])
            if not same:
                gradient[part] = tile
        return gradient, None, None


def kept_positions(shape: torch.Size, labels: Tensor | None, ignore_index: int, device: torch.device) -> Tensor:
    """[...] bool: the positions that count."""
    if labels is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if labels.shape != shape:
        raise ValueError(f"labels {tuple(labels.shape)} and logits' positions {tuple(shape)} differ")
    return labels.to(device) != ignore_index


def safe_labels(labels: Tensor | None, keep: Tensor) -> Tensor:
    """Labels with 0 at ignored positions, so that they can be gathered."""
    if labels is None:
        raise ValueError("ce_weight > 0 and residual='label' need labels")
    return labels.to(keep.device).where(keep, torch.zeros((), dtype=labels.dtype, device=keep.device))


def reduce(losses: Tensor, keep: Tensor, reduction: str, num_items: Tensor | int | None) -> Tensor:
    """Sum, mean over kept positions, or sum / num_items when that is given."""
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not one of mean, sum, none")
    total = losses.sum()
    if num_items is not None:
        return shared_out(total, num_items)
    return total if reduction == "sum" else total / keep.sum().clamp(min=1)


def shared_out(total: Tensor, count: Tensor | int) -> Tensor:
    """total / count, and an accelerator is not waited for to take a count that the host knows."""
    return total / (count.to(total.device, non_blocking=True) if isinstance(count, Tensor) else count)
