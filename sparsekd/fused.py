"""The sparse losses straight from hidden states: the head's logits exist for one chunk of rows at a time.

Shapes: N positions, H hidden size, V vocabulary, K kept ids, P positions that count.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.fused_chunks import FAST_ON_CPU, Gradients, Wanted, finish_, finish_on_device_, loss_and_gradients
from sparsekd.fused_parallel import VocabularyShard, gathered
from sparsekd.losses import LossWords, kept_positions, safe_labels
from sparsekd.prefix_sets import PrefixSets
from sparsekd.row_losses import HeadForm, LossOptions, prepare
from sparsekd.targets import SparseTargets


def fused_linear_sparse_kl(
    hidden: Tensor,
    head_VH: Tensor,
    targets: SparseTargets | Any,
    *,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
    accumulate_into: Tensor | None = None,
    sets: PrefixSets | None = None,
    **options: Unpack[LossWords],
) -> Tensor:
    """`sparse_kl` of the head's logits, which never exist as a whole.

    Equals, in value and gradients:

        z = scale * (hidden @ head.T + bias)
        z = softcap * tanh(z / softcap)                              # when softcap is given
        sparse_kl(z, targets, labels=labels, **options)

    Gradients are made chunk by chunk in the forward pass; beyond them the peak is one [chunk_rows, V] buffer in the
    products' dtype, for every option. Products run in the dtype of `hidden` (or of autocast; in float32 on a CPU that
    has no instructions for that dtype), softmax and the sum of the head's gradient in float32. Ignored positions are
    left out before the first product; on an accelerator only if `labels` are on the CPU, as nothing waits for a device.

    One node under `torch.compile`; works under gradient checkpointing, DDP and FSDP2 (a
    head that is a DTensor is gathered for the step). No second derivative, and one backward: it ends and scales the
    gradients in place. The last chunk's product waits for it, so that a factor on the loss costs no pass.

    Args:
        hidden: [..., H] states after the final norm.
        head_VH: [V, H] output embedding; may be frozen (its product is then skipped).
        targets: ids and weights [..., K].
        labels, options: as in `sparse_kl`; reduction "mean" or "sum" (per-position losses need `sparse_kl`).
        bias: [V] of the head.
        scale, softcap: the model's logit multiplier and final soft-cap.
        chunk_rows: rows of a chunk; default: 256 in float32, 1024 in 16 bits, more where V is small or on a GPU (as
            many as make 1 GiB of logits).
        shard: which rows of the vocabulary `head_VH` and `bias` are, when processes share it (`fused_parallel.py`).
        accumulate_into: [V, H] that the head's gradient is added to in the forward pass (`head.weight.grad`); autograd
            then gives the head none. Only for a loss that is itself what `backward` is called on: a factor on it is
            refused, as the sum is made already. Not seen by DDP.
        sets: what ids beyond the vocabulary stand for (`prefix_sets`); the value is then that of `sparse_ce`, without
            the constant Σ t log t, which a condition does not have. An accelerator is waited for.

    Raises:
        ValueError: shapes or options that do not fit together.
    """
    if not isinstance(head_VH, Tensor):
        raise ValueError(f"head_VH is a {type(head_VH).__name__}, not a tensor [V, H]; of a layer give its weight")
    if accumulate_into is not None and hasattr(head_VH, "device_mesh"):
        raise ValueError("accumulate_into takes a plain head, this one is a DTensor (FSDP): leave accumulate_into out")
    head_VH, bias = gathered(head_VH), gathered(bias)
    settings = LossOptions(**options)
    if settings.reduction == "none":
        raise ValueError("reduction='none' is not one of mean, sum; sparse_kl on logits offers 'none'")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive, or None")
    positions = hidden.shape[:-1]
    targets = SparseTargets.of(targets).to(hidden.device)
    if targets.ids.shape[:-1] != positions:
        raise ValueError(f"hidden {tuple(hidden.shape)} and targets {tuple(targets.ids.shape)} differ in positions")
    if head_VH.dim() != 2 or head_VH.shape[1] != hidden.shape[-1]:
        turned = "; give head.T" if head_VH.dim() == 2 and head_VH.shape[0] == hidden.shape[-1] else ""
        raise ValueError(f"hidden {tuple(hidden.shape)} and head {tuple(head_VH.shape)} differ in H{turned}")
    if accumulate_into is not None and accumulate_into.shape != head_VH.shape:
        raise ValueError(f"accumulate_into {tuple(accumulate_into.shape)} and head {tuple(head_VH.shape)} differ")
    # Where labels are, not where hidden states are: rows can be left out without waiting for a device.
    keep = kept_positions(positions, labels, settings.ignore_index, hidden.device if labels is None else labels.device)
    flat, device = targets.flatten(), hidden.device
    step = (
        hidden.flatten(0, -2),
        head_VH,
        bias,
        flat.ids,
        flat.weights,
        safe_labels(labels, keep).flatten() if settings.needs_labels else None,
        None if labels is None else keep.flatten(),
        _items(settings, keep).to(device, non_blocking=True),
        None if settings.token_weights is None else settings.token_weights.to(device).flatten(),
        *((None, None, None) if sets is None else (x.to(device) for x in (sets.order, sets.first, sets.last))),
        0 if sets is None else sets.vocab_size,
        [settings.ce_weight, settings.temperature, settings.z_loss, scale, 0.0 if softcap is None else softcap],
        settings.residual,
        chunk_rows or 0,
        _compute_dtype(hidden),
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head_VH, bias)],
    )
    defer = accumulate_into is None and _can_defer(*step[:2], compute=step[-2], head_wanted=step[-1][1])
    if shard is None and accumulate_into is None and not defer:
        loss: Tensor = _fused_loss(*step)[0]
    else:
        loss = _DirectLoss.apply(*step, shard, accumulate_into, defer)
    return loss


def _can_defer(hidden: Tensor, head: Tensor, *, compute: torch.dtype, head_wanted: bool) -> bool:
    """Whether the head's last product can wait for backward, as part of which a factor on the loss costs nothing.

    Not in a traced graph; on a CPU not where the sum is rounded to 16 bits at its end.
    """
    plain = all(type(each) in (Tensor, torch.nn.Parameter) for each in (hidden, head))
    exact = head.dtype == compute and compute in (torch.float32, torch.float64)
    return plain and not torch.compiler.is_compiling() and head_wanted and (exact or not _on_host(hidden))


def _on_host(x: Tensor) -> bool:
    """Whether a number of its device is read without a wait."""
    return x.device.type == "cpu"


def _items(options: LossOptions, keep: Tensor) -> Tensor:
    """What the sum of losses is divided by, as a tensor: no value is read off a device."""
    if options.num_items_in_batch is not None:
        return torch.as_tensor(options.num_items_in_batch)
    return keep.sum().clamp(min=1) if options.reduction == "mean" else torch.ones(())


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    # Not is_autocast_available: torch 2.11's compiler cannot trace it. Meta tensors have no autocast to ask for.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
    return torch.float32 if kind == "cpu" and dtype not in FAST_ON_CPU else dtype


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _step(
    hidden_NH: Tensor,
    head_VH: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    keep: Tensor | None,
    items: Tensor,
    token_weights: Tensor | None,
    order: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    set_vocab: int,
    numbers: list[float],
    residual: str,
    chunk_rows: int,
    compute: torch.dtype,
    want: list[bool],
    shard: VocabularyShard | None = None,
    into: Tensor | None = None,
    defer: bool = False,
) -> tuple[Tensor, Gradients]:
    """The arguments of an operator, which are numbers and tensors, as `loss_and_gradients` takes them."""
    alpha, temperature, zeta, scale, softcap = numbers
    sets = None
    if order is not None and first is not None and last is not None:
        sets = PrefixSets(vocab_size=set_vocab, order=order, first=first, last=last)
    options = LossOptions(
        ce_weight=alpha, temperature=temperature, z_loss=zeta, residual=residual, entropy=sets is None
    )
    device, working = hidden_NH.device, torch.promote_types(compute, torch.float32)
    picks, factor_N = None, (1 / items.to(working)).expand(len(hidden_NH))
    if token_weights is not None:
        factor_N = factor_N * token_weights
    labels = None if labels is None else labels.to(device, non_blocking=True)
    if keep is not None and keep.device.type == "cpu":
        found = keep.nonzero()[:, 0]
        picks = found.to(device, non_blocking=True) if len(found) < len(keep) else None
    elif keep is not None:
        factor_N = factor_N * keep
    if picks is not None:
        ids, weights, factor_N = ids[picks], weights[picks], factor_N[picks]
        labels = None if labels is None else labels[picks]
    width = len(head_VH) if shard is None else shard.vocab_size
    rows = prepare(SparseTargets(ids=ids, weights=weights), labels, options, width, working, sets)
    with _no_autocast(device.type):
        total, gradients = loss_and_gradients(
            hidden_NH,
            head_VH,
            bias,
            rows if shard is None else shard.own(rows, len(head_VH)),
            factor_N.to(working),
            picks=picks,
            form=HeadForm(scale=scale, softcap=softcap or None),
            options=options,
            wanted=Wanted(hidden=want[0], head=want[1], bias=want[2]),
            compute=compute,
            chunk_rows=chunk_rows or None,
            merge=None if shard is None else shard.merge,
            into=into,
            defer=defer,
        )
    return total, gradients


@torch.library.custom_op("sparsekd::fused_linear_sparse_kl", mutates_args=())
def _fused_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    keep: Tensor | None,
    items: Tensor,
    token_weights: Tensor | None,
    order: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    set_vocab: int,
    numbers: list[float],
    residual: str,
    chunk_rows: int,
    compute: torch.dtype,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and the gradients of hidden states, head and bias (empty where not wanted): one node of a graph."""
    loss, gradients = _step(
        hidden_NH, head_VH, bias, ids, weights, labels, keep, items, token_weights, order, first, last,
        set_vocab, numbers, residual, chunk_rows, compute, want,
    )  # fmt: skip
    found = (gradients.hidden, gradients.head, gradients.bias)
    return loss, *(hidden_NH.new_empty(0) if x is None else x for x in found)  # type: ignore[return-value]


@_fused_loss.register_fake
def _(hidden_NH: Tensor, head_VH: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute, want = rest[-2:]
    loss = hidden_NH.new_empty((), dtype=torch.promote_types(compute, torch.float32))
    found = [x if wanted else None for x, wanted in zip((hidden_NH, head_VH, bias), want, strict=True)]
    return loss, *(  # type: ignore[return-value]
        hidden_NH.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in found
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else backward makes zeros as large as dhead: for an output, it has a "gradient"
    ctx.save_for_backward(*output[1:])
    ctx.want, ctx.arguments = inputs[-1], len(inputs)


def _scale_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    found = [x if want else None for x, want in zip(ctx.saved_tensors, ctx.want, strict=True)]
    return (*_scaled_(found, grad), *[None] * (ctx.arguments - 3))


_fused_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _scaled_(gradients: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The gradients times `grad`, in place; a second backward is then an error of torch's, not a wrong number."""
    if type(grad) is not Tensor:  # being traced into a graph, whose compiler decides where results go
        return [None if x is None else x * grad for x in gradients]
    if grad.device.type == "cpu" and grad.item() == 1:
        return gradients
    return [None if x is None else x.mul_(grad) for x in gradients]


class _DirectLoss(torch.autograd.Function):
    """The same outside a compiled graph: a process group to talk to, a gradient to add to, or a product that waits."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        shard, into, _ = arguments[-3:]
        ctx.arguments, ctx.into, ctx.spent = len(arguments), into is not None, False
        loss, found = _step(*arguments)
        if shard is not None and found.hidden is not None:
            shard.add_up(found.hidden)
        tensors = (found.hidden, None if ctx.into else found.head, found.bias, *(found.pending or ()))
        ctx.present, ctx.started, ctx.dtype = [x is not None for x in tensors], found.started, arguments[1].dtype
        ctx.save_for_backward(*(x for x in tensors if x is not None))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.into:
            torch._assert_async(  # raises at once on a CPU, without a wait on an accelerator
                grad == 1,
                "accumulate_into holds the gradient of the loss itself, but backward came with a factor on it; "
                "scale with num_items_in_batch or token_weights instead",
            )
        if ctx.spent:
            raise RuntimeError(
                "a second backward through fused_linear_sparse_kl: its gradients are made in place, once"
            )
        saved = iter(ctx.saved_tensors)
        found: list[Any] = [next(saved) if present else None for present in ctx.present]
        hidden, head, bias, *pending = found
        if pending:
            ctx.spent = True
            head = _finish_(ctx, head, pending, grad)
            hidden, bias = _scaled_([hidden, bias], grad)
        else:
            hidden, head, bias = _scaled_([hidden, head, bias], grad)
        return (hidden, head, bias, *[None] * (ctx.arguments - 3))


def _finish_(ctx: Any, head: Tensor, pending: list[Tensor], grad: Tensor) -> Tensor:
    grad_CV, hidden_CH = pending
    if _on_host(head):
        return finish_(head, grad_CV, hidden_CH, factor=grad.item(), started=ctx.started)
    return finish_on_device_(head, grad_CV, hidden_CH, factor=grad, started=ctx.started, dtype=ctx.dtype)
