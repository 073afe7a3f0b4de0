"""A head's products, chunk by chunk of rows: loss and gradients, made in one [C, V] buffer.

Shapes: N rows, C rows of a chunk, H hidden size, V vocabulary (of this process), K kept ids.

    logits_CV = hidden_CH @ head_VH.T, times a factor;   row_losses turns them into g = dloss/d(product) in place;
    dhidden_CH = g @ head_VH;            dhead_VH += g.T @ hidden_CH

Three products and no more: gradients are made with the forward pass. The rows of `row_losses` are worked on in float32
tiles that stay in a CPU's cache, so that what is not a product costs one trip through the buffer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekd.fused_gpu import adds_in_float32, row_kernel
from sparsekd.row_losses import HeadForm, LossOptions, Rows, Seen, read_, row_chunks, write_

# Rows of a chunk: enough that reading and writing dhead once a chunk is small beside the products.
CHUNK_ROWS = {torch.float32: 256, torch.float64: 256, torch.bfloat16: 1024, torch.float16: 1024}
# On a GPU each chunk reads and writes dhead from its memory, 8 V H bytes: with 1,024 rows that lasts up to a quarter as
# long as the three products (3.4 TB/s, 700 TFLOP/s), with the 4,096 of 1 GiB at V = 128k a fifteenth.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}
# A GPU's products make tiles of 128 rows, and read 16-bit rows that begin at multiples of 16 bytes fastest.
TILE_ROWS, ALIGNED = 128, 64
# A block of dhead's rows in 16 bits, before it is added in float32: stays in a CPU's cache.
BLOCK_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}
# Columns of logits that one thread makes at a time: MKL then packs into 1.4 MiB, not 5.5, and is 7 to 9 % faster.
COLUMNS = 1024

_CPU = torch.cpu.get_capabilities()
# Dtypes that this CPU has instructions to multiply matrices in; in others, float32 is several times faster.
FAST_ON_CPU = {torch.float32, torch.float64}
FAST_ON_CPU |= {torch.bfloat16} if any(_CPU.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else set()
FAST_ON_CPU |= {torch.float16} if any(_CPU.get(name) for name in ("avx512_fp16", "amx_fp16", "fp16_arith")) else set()

# What sums the passes' findings over processes that hold other parts of the vocabulary, see `fused_parallel`.
Merge = Callable[[list[Seen], float], list[Seen]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which gradients to make."""

    hidden: bool
    head: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.head or self.bias


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """d Σ losses of hidden_NH, head_VH and bias_V; None where not wanted.

    Attributes:
        pending: dlogits [C, V] and hidden states [C, H] of the last chunk, where `head` waits for their product.
        started: whether `head` holds other chunks' products; without, it is uninitialised memory.
    """

    hidden: Tensor | None
    head: Tensor | None
    bias: Tensor | None
    pending: tuple[Tensor, Tensor] | None = None
    started: bool = True


def loss_and_gradients(
    hidden_NH: Tensor,
    head_VH: Tensor,
    bias: Tensor | None,
    rows: Rows,
    scale_N: Tensor,
    *,
    picks: Tensor | None,
    form: HeadForm,
    options: LossOptions,
    wanted: Wanted,
    compute: torch.dtype,
    chunk_rows: int | None = None,
    merge: Merge | None = None,
    into: Tensor | None = None,
    defer: bool = False,
) -> tuple[Tensor, Gradients]:
    """Σ scale_N * losses and its gradients.

    Args:
        rows, scale_N: of the picked rows.
        picks: [P] the rows of `hidden_NH` that count, or None for all of them.
        compute: dtype of the products; softmax, loss and the sum of head gradients are float32 (or float64).
        merge: sums over processes, for a head that is split by vocabulary.
        into: [V, H] where the head's gradient is added to, instead of a new tensor.
        defer: leave the head's last product to `finish_`, which knows what the loss was multiplied by.
    """
    head, working = head_VH.to(compute), torch.promote_types(compute, torch.float32)
    step = chunk_rows or even_rows(len(rows), head)
    total = torch.zeros((), dtype=working, device=head.device)
    grad_hidden = None
    if wanted.hidden:
        grad_hidden = torch.empty_like(hidden_NH) if picks is None else torch.zeros_like(hidden_NH)
    grad_head = _HeadGradient(head_VH, compute, single=len(rows) <= step, into=into) if wanted.head else None
    grad_bias = torch.zeros(len(head), dtype=working, device=head.device) if wanted.bias else None
    pending = None
    for part in _parts(len(rows), step):
        chosen = part if picks is None else picks[part]
        hidden_CH = hidden_NH[chosen].to(compute)
        scale = scale_N[part] if wanted.any else None
        kernel = row_kernel(head.device, rows, chunk_losses_) if merge is None else None
        logits_CV = head_product(hidden_CH, head, 1.0 if kernel else form.factor(options.temperature))
        if kernel is not None:
            losses = kernel(logits_CV, rows[part], scale, bias, form, options)
        else:
            losses = chunk_losses_(logits_CV, rows[part], scale, bias, form, options, merge)
        total += (losses * scale_N[part]).sum()
        if grad_bias is not None:
            grad_bias += logits_CV.sum(0, dtype=working)
        if grad_hidden is not None:
            _put(grad_hidden, chosen, logits_CV, head)
        if defer and part.stop == len(rows):
            pending = logits_CV, hidden_CH
            _held.buffer = None  # until `finish_`
        elif grad_head is not None:
            grad_head.add_(logits_CV, hidden_CH)
    if grad_head is not None and pending is not None:
        return total, Gradients(
            hidden=grad_hidden,
            head=grad_head.total,
            bias=None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            pending=pending,
            started=grad_head.started,
        )
    return total, Gradients(
        hidden=grad_hidden,
        head=None if grad_head is None else grad_head.result(),
        bias=None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def finish_(head_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor, factor: float, started: bool) -> Tensor:
    """factor * (head_VH + grad_CV.T @ hidden_CH) in place: a product scales what it adds to, and no pass is needed."""
    torch.addmm(head_VH, grad_CV.T, hidden_CH, beta=factor if started else 0, alpha=factor, out=head_VH)
    _held.buffer = grad_CV.new_empty(0).set_(grad_CV.untyped_storage())  # whole: the last chunk may be a small one
    return head_VH


def finish_on_device_(
    head_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor, factor: Tensor, started: bool, dtype: torch.dtype
) -> Tensor:
    """`finish_` for a factor that is on an accelerator, whose products take theirs from the host.

    One chunk's factor goes to its hidden states; that of more, to the pass that rounds their sum to `dtype`.
    """
    if not started:
        _add_product_(head_VH, grad_CV, hidden_CH * factor, started)
        return head_VH.to(dtype)
    _add_product_(head_VH, grad_CV, hidden_CH, started)
    if head_VH.dtype == dtype:
        return head_VH.mul_(factor)
    return torch.mul(head_VH, factor, out=torch.empty_like(head_VH, dtype=dtype))


def head_product(hidden_CH: Tensor, head_VH: Tensor, factor: float = 1.0) -> Tensor:
    """factor * hidden_CH @ head_VH.T in the thread's workspace; a product has a factor for nothing."""
    logits_CV = workspace(len(hidden_CH), head_VH)
    nothing = torch.zeros((), dtype=logits_CV.dtype, device=logits_CV.device)
    whole = logits_CV.device.type != "cpu" or torch.get_num_threads() > 1  # threads would meet once a block
    for block in _parts(len(head_VH), len(head_VH) if whole else COLUMNS):
        torch.addmm(nothing, hidden_CH, head_VH[block].T, beta=0, alpha=factor, out=logits_CV[:, block])
    return logits_CV


def chunk_losses_(
    logits_CV: Tensor,
    rows: Rows,
    scale: Tensor | None,
    bias: Tensor | None,
    form: HeadForm,
    options: LossOptions,
    merge: Merge | None = None,
) -> Tensor:
    """Losses [C] of a chunk's products h Wᵀ, which come times `form.factor`.

    Overwrites them with `scale` [C] times the loss's derivative by h Wᵀ.
    """
    working, parts = rows.mass.dtype, list(row_chunks(logits_CV))
    bias = None if bias is None else bias.to(working) * form.factor(options.temperature)
    scale = None if scale is None else scale * form.scale
    losses = torch.empty_like(rows.mass)

    def read(part: slice) -> tuple[Tensor, Tensor | None, Seen]:
        tile = logits_CV[part].to(working)  # the same memory when it is float32 already
        slope = _apply_(tile, bias, form, options.temperature)
        return tile, slope, read_(tile, rows[part], options)

    def write(part: slice, tile: Tensor, slope: Tensor | None, seen: Seen) -> None:
        losses[part] = write_(tile, rows[part], seen, options, None if scale is None else scale[part])
        if scale is None:
            return
        if slope is not None:
            tile *= slope
        if logits_CV.dtype != working:
            logits_CV[part] = tile

    if merge is None:
        for part in parts:
            write(part, *read(part))
        return losses
    tiles, slopes, seens = zip(*map(read, parts), strict=True)
    for part, tile, slope, seen in zip(parts, tiles, slopes, merge(list(seens), options.temperature), strict=True):
        write(part, tile, slope, seen)
    return losses


def _put(grad_NH: Tensor, chosen: slice | Tensor, grad_CV: Tensor, head_VH: Tensor) -> None:
    """grad_NH[chosen] = grad_CV @ head_VH, without a [C, H] in between where it can be."""
    if isinstance(chosen, slice) and grad_NH.dtype == grad_CV.dtype:
        torch.mm(grad_CV, head_VH, out=grad_NH[chosen])
    else:
        grad_NH[chosen] = torch.mm(grad_CV, head_VH).to(grad_NH.dtype)


def _apply_(tile_CV: Tensor, bias: Tensor | None, form: HeadForm, temperature: float) -> Tensor | None:
    """A tile of products (and a bias), times `form.factor`, becomes z / T; returns a soft-cap's slope."""
    if bias is not None:
        tile_CV += bias
    if form.softcap is None:
        return None
    slope = tile_CV.tanh_().square().neg_().add_(1)
    tile_CV *= form.softcap / temperature
    return slope


class _HeadGradient:
    """Σ over chunks of gᵀ h, summed in float32 (float64) whatever the products' dtype."""

    def __init__(self, head_VH: Tensor, compute: torch.dtype, *, single: bool, into: Tensor | None) -> None:
        working = torch.promote_types(compute, torch.float32)
        dtype = compute if single and head_VH.dtype == compute else working
        self.dtype, self.started = head_VH.dtype, into is not None
        self.total = torch.empty(head_VH.shape, dtype=dtype, device=head_VH.device) if into is None else into

    def add_(self, grad_CV: Tensor, hidden_CH: Tensor) -> None:
        _add_product_(self.total, grad_CV, hidden_CH, self.started)
        self.started = True

    def result(self) -> Tensor:
        return self.total.to(self.dtype) if self.started else torch.zeros_like(self.total, dtype=self.dtype)


def _add_product_(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor, started: bool) -> None:
    """total_VH (or nothing) + grad_CV.T @ hidden_CH, whose sum is rounded to the total's dtype alone."""
    if total_VH.dtype == grad_CV.dtype:
        torch.addmm(total_VH, grad_CV.T, hidden_CH, beta=int(started), out=total_VH)
    elif total_VH.device.type == "cuda" and adds_in_float32(total_VH.device, grad_CV.dtype):
        dtype = total_VH.dtype
        torch.addmm(total_VH, grad_CV.T, hidden_CH, out_dtype=dtype, beta=int(started), out=total_VH)
    else:
        for block in _parts(len(total_VH), _block_rows(total_VH)):
            product = torch.mm(grad_CV[:, block].T, hidden_CH)
            total_VH[block] = total_VH[block].add_(product) if started else product


def _parts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _block_rows(total_VH: Tensor) -> int:
    return max(64, BLOCK_BYTES.get(total_VH.device.type, BLOCK_BYTES["cuda"]) // (2 * total_VH.shape[1]))


def default_rows(head_VH: Tensor) -> int:
    """Rows of a chunk for a head in the products' dtype."""
    budget = CHUNK_BYTES.get(head_VH.device.type, CHUNK_BYTES["cuda"])
    return max(CHUNK_ROWS[head_VH.dtype], budget // (head_VH.element_size() * len(head_VH)))


def even_rows(count: int, head_VH: Tensor) -> int:
    """Rows of a chunk for so many: on a GPU all chunks are alike, and whole tiles, but for what the last one lacks."""
    most = default_rows(head_VH)
    if head_VH.device.type == "cpu" or count <= most:
        return most
    each = -(-count // -(-count // most))
    return -(-each // TILE_ROWS) * TILE_ROWS


_held = threading.local()


def workspace(rows: int, head_VH: Tensor) -> Tensor:
    """An uninitialised [rows, V] buffer in the head's dtype and device.

    On a CPU a thread keeps its last one: fresh pages cost more than the softmax. Accelerators' allocators keep theirs,
    and its rows begin where their products are fast, whatever V is.
    """
    width = len(head_VH)
    if head_VH.device.type != "cpu":
        stride = -(-width // ALIGNED) * ALIGNED if head_VH.element_size() == 2 else width
        return torch.empty(rows, stride, dtype=head_VH.dtype, device=head_VH.device)[:, :width]
    size, dtype = rows * width, head_VH.dtype
    held = getattr(_held, "buffer", None)
    if held is None or held.dtype != dtype or held.numel() < size:
        _held.buffer = None  # freed before its successor is made
        del held
        held = _held.buffer = torch.empty(size, dtype=dtype)
    return held[:size].view(rows, width)
