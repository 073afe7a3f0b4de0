"""The sparse losses straight from hidden states: the head's logits exist for one chunk of rows at a time.

Shapes: N positions, H hidden size, V vocabulary, K kept ids, C rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.losses import CHUNK_BYTES, Mix, kept_positions, losses_, safe_labels
from sparsekd.targets import SparseTargets


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadForm:
    """How hidden states become logits: z = softcap * tanh(scale * (h Wᵀ + bias) / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


def fused_linear_sparse_kl(
    hidden: Tensor,
    head_VH: Tensor,
    targets: SparseTargets | Any,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    residual: str = "none",
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """`sparse_kl` of the head's logits, which never exist as a whole.

    Equals, in value and gradients:

        z = scale * (hidden @ head.T + bias)
        z = softcap * tanh(z / softcap)                              # when softcap is given
        sparse_kl(z, targets, labels=labels, ce_weight=..., ...)

    Gradients are made chunk by chunk in the forward pass; beyond them the peak is about one [chunk_rows, V] float32
    buffer (two with a softcap, or with both ce_weight and temperature). Products run in the dtype of `hidden` (or of
    autocast), softmax and the gradient of the head in float32.

    Args:
        hidden: [..., H] states after the final norm.
        head_VH: [V, H] output embedding; may be frozen (its product is then skipped).
        targets: ids and weights [..., K].
        bias: [V] of the head.
        scale, softcap: the model's logit multiplier and final soft-cap.
        reduction: "mean" or "sum"; per-position losses need `sparse_kl`.
        chunk_rows: rows of a chunk; default: about 32 MiB of float32 logits on a CPU, 256 MiB elsewhere.
        (others: as in `sparse_kl`)
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not one of mean, sum; sparse_kl on logits offers 'none'")
    positions = hidden.shape[:-1]
    targets = SparseTargets.of(targets).to(hidden.device)
    if targets.ids.shape[:-1] != positions:
        raise ValueError(f"hidden {tuple(hidden.shape)} and targets {tuple(targets.ids.shape)} differ in positions")
    keep = kept_positions(positions, labels, ignore_index, hidden.device)
    mix = Mix(ce_weight=ce_weight, temperature=temperature, residual=residual)
    flat_labels = safe_labels(labels, keep).flatten() if mix.needs_labels else None
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, device=hidden.device)
    else:
        items = keep.sum().clamp(min=1) if reduction == "mean" else torch.ones((), device=hidden.device)
    flat = targets.flatten()
    loss: Tensor = _FusedLoss.apply(
        hidden.flatten(0, -2),
        head_VH,
        bias,
        flat.ids,
        flat.weights,
        flat_labels,
        keep.flatten(),
        items,
        None if token_weights is None else token_weights.to(hidden.device).flatten(),
        mix,
        HeadForm(scale=scale, softcap=softcap),
        chunk_rows,
    )
    return loss


class _FusedLoss(torch.autograd.Function):
    """Σ losses / items; the gradients are ready when forward returns and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        weights: Tensor,
        labels: Tensor | None,
        keep: Tensor,
        items: Tensor,
        token_weights: Tensor | None,
        mix: Mix,
        form: HeadForm,
        chunk_rows: int | None,
    ) -> Tensor:
        want = ctx.needs_input_grad[:3]
        rows = keep.nonzero()[:, 0]  # ignored positions cost nothing
        compute = _compute_dtype(hidden_NH)
        working = torch.promote_types(compute, torch.float32)
        head = head_VH.to(compute)
        grad_hidden = torch.zeros_like(hidden_NH) if want[0] else None
        grad_head = torch.zeros(head_VH.shape, dtype=working, device=head.device) if want[1] else None
        grad_bias = torch.zeros(len(head), dtype=working, device=head.device) if want[2] else None
        step = chunk_rows or _default_rows(head)
        buffer = torch.empty(min(step, max(len(rows), 1)), len(head), dtype=working, device=head.device)
        loss = torch.zeros((), dtype=working, device=head.device)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                hidden_CH = hidden_NH[part].to(compute)
                logits_CV = _head_logits(hidden_CH, head, bias, form, buffer[: len(part)])
                slope = None if form.softcap is None else 1 - (logits_CV / form.softcap).square_()
                targets = SparseTargets(ids=ids[part], weights=weights[part].to(working))
                part_labels = None if labels is None else labels[part]
                factors = torch.ones((), dtype=working, device=head.device).expand(len(part))
                if token_weights is not None:
                    factors = token_weights[part].to(working)
                each = factors / items.to(working) if any(want) else None
                loss += (losses_(logits_CV, targets, part_labels, mix, each) * factors).sum()
                if any(want):
                    if slope is not None:
                        logits_CV *= slope
                    if form.scale != 1:
                        logits_CV *= form.scale
                    _accumulate(logits_CV, hidden_CH, head, part, grad_hidden, grad_head, grad_bias)
        grads = [None if g is None else g.to(x.dtype) for g, x in ((grad_hidden, hidden_NH), (grad_head, head_VH))]
        ctx.gradients = [*grads, None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)]
        return loss / items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * grad.to(g.dtype) for g in ctx.gradients]
        return (*gradients, *[None] * 9)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _default_rows(head_VH: Tensor) -> int:
    budget = CHUNK_BYTES.get(head_VH.device.type, CHUNK_BYTES["cuda"])
    return max(128, budget // (4 * len(head_VH)))


def _head_logits(hidden_CH: Tensor, head_VH: Tensor, bias: Tensor | None, form: HeadForm, out: Tensor) -> Tensor:
    """[C, V] logits in `out` (float32 or float64)."""
    if out.dtype == head_VH.dtype:
        torch.mm(hidden_CH, head_VH.T, out=out)
    else:
        out.copy_(hidden_CH @ head_VH.T)
    if bias is not None:
        out += bias
    if form.scale != 1:
        out *= form.scale
    if form.softcap is not None:
        out.div_(form.softcap).tanh_().mul_(form.softcap)
    return out


def _accumulate(
    grad_CV: Tensor,
    hidden_CH: Tensor,
    head_VH: Tensor,
    part: Tensor,
    grad_hidden: Tensor | None,
    grad_head: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Add a chunk's gradients: dh = g W at its rows, dW += gᵀ h, db += Σ g."""
    if grad_bias is not None:
        grad_bias += grad_CV.sum(0)
    narrow_CV = grad_CV.to(head_VH.dtype)
    if grad_hidden is not None:
        grad_hidden[part] = (narrow_CV @ head_VH).to(grad_hidden.dtype)
    if grad_head is None:
        return
    if grad_head.dtype == head_VH.dtype:
        grad_head.addmm_(narrow_CV.T, hidden_CH)
    else:
        grad_head += narrow_CV.T @ hidden_CH
