"""Distillation losses on logits, one function per equation, with hand-written gradients.

Shapes: N positions (any leading shape), V vocabulary, K kept ids, C rows of a chunk.
With z the student's logits, p = softmax(z/T), t the targets, S = Σt their sum, y the label, α the CE weight and T the
temperature:

    loss     = (1-α) T² Σ_i t_i (log t_i - log p_i)  -  α log softmax(z)_y
    dloss/dz = (1-α) T  (S p - t)  +  α (softmax(z) - onehot(y))                     (paper, eq. 4 and section 5.3)

S need not be 1. Gradients are exact for every S: nothing is renormalised behind the caller's back. What becomes of the
missing mass 1 - S is the caller's choice, one of `residuals.RESIDUALS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.residuals import RESIDUALS, Treated
from sparsekd.targets import SparseTargets

# Rows of a [N, V] tensor are worked on in chunks of about this size, so temporaries stay far below [N, V].
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """How a position's loss is put together: α, T, the missing mass, and whether the constant Σ t log t is part."""

    ce_weight: float = 0.0
    temperature: float = 1.0
    residual: str = "none"
    entropy: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight={self.ce_weight} is out of range: 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={self.residual!r} is not one of {', '.join(RESIDUALS)}")

    @property
    def needs_labels(self) -> bool:
        """Whether the loss reads the true next token."""
        return self.ce_weight > 0 or self.residual == "label"


def sparse_kl(
    logits: Tensor,
    targets: SparseTargets | Any,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    residual: str = "none",
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Forward KL from sparse targets to the student, in nats; zero where softmax(z/T) equals them.

    Equals, without a dense target and with no [N, V] buffer but the gradient:

        t, log_p = targets.densify(V), log_softmax(logits / T, -1)
        (1 - ce_weight) * T**2 * (xlogy(t, t) - t * log_p).sum(-1) + ce_weight * cross_entropy(logits, labels)

    The targets must stand for the teacher at the same temperature (a cache's do at T = 1, the default). With sampled
    targets the value lies above the full KL by the targets' own noise; the gradient is unbiased (paper, A.6).

    Args:
        logits: [..., V] student logits; the loss is computed in float32 (float64 stays float64).
        targets: ids and weights [..., K]; distinct ids (repeats add up in the gradient).
        labels: [...] int64; positions equal to `ignore_index` count for nothing. Needed when ce_weight > 0.
        ce_weight: α in [0, 1].
        temperature: T of the student's softmax in the KL term.
        residual: what becomes of the teacher's mass that the targets left out; a name of `residuals.RESIDUALS`.
        token_weights: [...] factors of the positions' losses (see `hard_token_weights`); the mean still divides by the
            number of positions.
        reduction: "mean" over positions that are not ignored, "sum", or "none" ([...], 0 where ignored).
        num_items_in_batch: divides the sum instead of the count, so that gradient accumulation and data
            parallelism weigh every position alike (as transformers' Trainer passes it).
    """
    mix = Mix(ce_weight=ce_weight, temperature=temperature, residual=residual)
    return _sparse_loss(logits, targets, labels, mix, token_weights, ignore_index, reduction, num_items_in_batch)


def sparse_ce(
    logits: Tensor,
    targets: SparseTargets | Any,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    residual: str = "none",
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy to sparse targets, -Σ t log p (paper, A.2): `sparse_kl` without the constant Σ t log t.

    The same gradient; the value is an unbiased estimate of the cross-entropy to the full teacher.
    """
    mix = Mix(ce_weight=ce_weight, temperature=temperature, residual=residual, entropy=False)
    return _sparse_loss(logits, targets, labels, mix, token_weights, ignore_index, reduction, num_items_in_batch)


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
    mix = Mix(ce_weight=ce_weight, temperature=temperature)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = (logits.to(dtype) / temperature).log_softmax(-1)
    log_t = (teacher_logits.to(dtype) / temperature).log_softmax(-1)
    losses = (log_t.exp() * (log_t - log_p)).sum(-1) * temperature**2
    keep = kept_positions(losses.shape, labels, ignore_index, losses.device)
    if mix.ce_weight:
        token_losses = -logits.to(dtype).log_softmax(-1).gather(-1, safe_labels(labels, keep)[..., None])[..., 0]
        losses = torch.lerp(losses, token_losses, mix.ce_weight)
    return reduce(losses * keep, keep, reduction, num_items_in_batch)


def _sparse_loss(
    logits: Tensor,
    targets: SparseTargets | Any,
    labels: Tensor | None,
    mix: Mix,
    token_weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    targets = SparseTargets.of(targets).to(logits.device)
    if targets.ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.ids.shape)} differ in their positions"
        )
    keep = kept_positions(logits.shape[:-1], labels, ignore_index, logits.device)
    flat_labels = safe_labels(labels, keep).flatten() if mix.needs_labels else None
    flat = targets.flatten()
    losses: Tensor = _SparseLoss.apply(logits.flatten(0, -2), flat.ids, flat.weights, flat_labels, mix)
    factors = keep if token_weights is None else keep * token_weights.to(losses.device)
    return reduce(losses.view(keep.shape) * factors, keep, reduction, num_items_in_batch)


class _SparseLoss(torch.autograd.Function):
    """Losses per row [N]; saves the logits it was given and makes the gradient in one [N, V] buffer."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids: Tensor, weights: Tensor, labels: Tensor | None, mix: Mix) -> Tensor:
        ctx.save_for_backward(logits_NV, ids, weights, *(() if labels is None else (labels,)))
        ctx.mix = mix
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        losses = torch.empty(len(logits_NV), dtype=dtype, device=logits_NV.device)
        for part in row_chunks(logits_NV):
            buffer = logits_NV[part].to(dtype, copy=True)
            targets = SparseTargets(ids=ids[part], weights=weights[part].to(dtype))
            losses[part] = losses_(buffer, targets, None if labels is None else labels[part], mix)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, ids, weights, *rest = ctx.saved_tensors
        gradient = torch.empty_like(logits_NV)
        dtype = grad_N.dtype
        for part in row_chunks(logits_NV):
            same = logits_NV.dtype == dtype
            buffer = gradient[part].copy_(logits_NV[part]) if same else logits_NV[part].to(dtype)
            targets = SparseTargets(ids=ids[part], weights=weights[part].to(dtype))
            losses_(buffer, targets, rest[0][part] if rest else None, ctx.mix, gradient_scale=grad_N[part])
            if not same:
                gradient[part] = buffer
        return gradient, None, None, None, None


def losses_(
    logits_CV: Tensor,
    targets: SparseTargets,
    labels: Tensor | None,
    mix: Mix,
    gradient_scale: Tensor | None = None,
) -> Tensor:
    """Losses [C] of a chunk; overwrites `logits_CV` with `gradient_scale` [C] times dloss/dlogits (or with scratch).

    The one place where the equations at the head of this file are computed. `logits_CV` is float32 or float64.
    """
    alpha, temperature = mix.ce_weight, mix.temperature
    if temperature != 1 and alpha:  # two different softmaxes: a second chunk-sized buffer
        return _two_softmaxes_(logits_CV, targets, labels, mix, gradient_scale)
    treated = RESIDUALS[mix.residual](targets, labels, logits_CV.shape[-1])
    logits_CV /= temperature
    # A padding entry must not meet a student's logit of -inf: 0 * inf is NaN.
    picked = logits_CV.gather(-1, treated.ids).where(treated.weights > 0, treated.weights.new_zeros(()))
    all_logits = None if treated.uniform is None else logits_CV.sum(-1)
    label_logit = logits_CV.gather(-1, labels[:, None])[:, 0] if alpha and labels is not None else None
    log_total = _softmax_numerator_(logits_CV)
    total = logits_CV.sum(-1)
    share, log_rest = _outside(logits_CV, treated, total)
    kd_scale = (1 - alpha) * temperature**2
    losses = kd_scale * _kd_losses(treated, picked, all_logits, log_total, log_rest, mix.entropy, logits_CV.shape[-1])
    if label_logit is not None:
        losses += alpha * (log_total - label_logit)
    if gradient_scale is not None:
        outer = gradient_scale / temperature
        logits_CV *= (outer * (kd_scale * share + alpha) / total)[:, None]
        added = -kd_scale * treated.weights
        if log_rest is not None:  # the kept ids were taken out: they get p - t, not a difference of large numbers
            added += (kd_scale + alpha) * _inside(picked, log_total, treated)
        logits_CV.scatter_add_(-1, treated.ids, outer[:, None] * added)
        if treated.uniform is not None:
            logits_CV -= (outer * kd_scale * treated.uniform)[:, None]
        if label_logit is not None and labels is not None:
            logits_CV.scatter_add_(-1, labels[:, None], (-outer * alpha)[:, None])
    return losses


def _kd_losses(
    treated: Treated,
    picked: Tensor,
    all_logits: Tensor | None,
    log_total: Tensor,
    log_rest: Tensor | None,
    entropy: bool,
    vocab_size: int,
) -> Tensor:
    """Σ τ (log τ - log p) over all ids, [C], where τ is the treated target; without Σ τ log τ unless `entropy`."""
    weights = treated.weights
    losses = weights.sum(-1) * log_total - (weights * picked).sum(-1)
    if treated.uniform is not None and all_logits is not None:
        losses += treated.uniform * (vocab_size * log_total - all_logits)
        weights = torch.where(weights > 0, weights + treated.uniform[:, None], weights)
        alone = vocab_size - (weights > 0).sum(-1)
        if entropy:
            losses += alone * torch.xlogy(treated.uniform, treated.uniform)
    if log_rest is not None:
        rest = treated.missing()
        losses -= rest * log_rest
        if entropy:
            losses += torch.xlogy(rest, rest)
    return losses + torch.xlogy(weights, weights).sum(-1) if entropy else losses


def _outside(numerators_CV: Tensor, treated: Treated, total: Tensor) -> tuple[Tensor, Tensor | None]:
    """What multiplies p in the gradient, [C], and for the ghost token the log of the student's mass outside the set.

    The mass outside is summed over the ids outside: 1 - Σ_K p would cancel where the set holds nearly everything. A
    ghost's kept ids are left at 0 in the buffer.
    """
    mass = treated.weights.sum(-1)
    if not treated.ghost:
        uniform = 0 if treated.uniform is None else treated.uniform * numerators_CV.shape[-1]
        return mass + uniform, None
    inside = numerators_CV.gather(-1, treated.ids) * (treated.weights > 0)
    numerators_CV.scatter_add_(-1, treated.ids, -inside)
    rest = numerators_CV.sum(-1).clamp(min=torch.finfo(total.dtype).tiny)
    return 1 - treated.missing() * total / rest, rest.log() - total.log()


def _inside(picked: Tensor, log_total: Tensor, treated: Treated) -> Tensor:
    """The student's probabilities of the kept ids, [C, K], 0 at padding."""
    return (picked - log_total[:, None]).exp() * (treated.weights > 0)


def _softmax_numerator_(logits_CV: Tensor) -> Tensor:
    """exp(z - max) in place; returns log Σ exp(z), [C]."""
    largest = logits_CV.amax(-1, keepdim=True)
    logits_CV -= largest
    torch.exp_(logits_CV)
    return largest[:, 0] + logits_CV.sum(-1).log()


def _two_softmaxes_(
    logits_CV: Tensor,
    targets: SparseTargets,
    labels: Tensor | None,
    mix: Mix,
    gradient_scale: Tensor | None,
) -> Tensor:
    """α CE at temperature 1 plus (1-α) KD at T: the two parts by themselves, added."""
    alpha = mix.ce_weight
    hard = logits_CV.clone()
    scales = (None, None) if gradient_scale is None else (alpha * gradient_scale, (1 - alpha) * gradient_scale)
    none = SparseTargets(ids=targets.ids[:, :0], weights=targets.weights[:, :0])
    losses = alpha * losses_(hard, none, labels, Mix(ce_weight=1.0), scales[0])
    soft = Mix(temperature=mix.temperature, residual=mix.residual, entropy=mix.entropy)
    losses += (1 - alpha) * losses_(logits_CV, targets, labels, soft, scales[1])
    logits_CV += hard
    return losses


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
        return total / torch.as_tensor(num_items, device=total.device)
    return total if reduction == "sum" else total / keep.sum().clamp(min=1)


def row_chunks(logits_NV: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Slices of rows whose float32 copy is about `CHUNK_BYTES` (or of `rows` rows)."""
    budget = CHUNK_BYTES.get(logits_NV.device.type, CHUNK_BYTES["cuda"])
    step = rows or max(1, budget // (4 * logits_NV.shape[-1]))
    for start in range(0, len(logits_NV), step):
        yield slice(start, start + step)
