"""The rows of `row_losses` as one Triton kernel, in place on 16- or 32-bit logits: two reads and one write a logit.

Shapes: C rows, V vocabulary, J reads a row. Equals `fused_chunks.chunk_losses_` (its oracle), except that nothing is
held in between: the first pass keeps a running maximum and sums, the second writes

    scale * (soft exp(z / T - lse_T) + hard exp(z - lse_1) - uniform) * dz/dproduct

and the J places where `sparse` is subtracted are written last, from logits read in float32 before. What targets that
are sets subtract is made from few logits, before they are written over, and put in after it.

Needs the extra `triton`; runs in Triton's interpreter on a CPU (TRITON_INTERPRET=1), where the tests run it, and is
compiled for GPUs by them, without spills. NOT YET RUN ON A GPU: `trust` checks it on each before its first use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekd.prefix_sets import SetEntries, within_sets_
from sparsekd.row_losses import HeadForm, LossOptions, Rows

# With 16 logits a thread, 1,024 threads are one row's and all that an SM has registers for (`benchmarks/gpu_code.py`).
# An H100 has 132 rows of 128k bf16 logits under way then, 34 MB, and the second pass finds them in its cache of 50.
LARGEST_BLOCK = 16384
LOGITS_OF_A_WARP = 512
MOST_WARPS = 16 if torch.version.hip else 32  # 1,024 threads either way
MOST_READS = 128  # repeated ids are found by comparing all pairs


def fits(rows: Rows) -> bool:
    """Whether the kernel computes these: not the ghost token (which sums what is outside a set), nor float64."""
    return rows.kept is None and rows.ids.shape[-1] <= MOST_READS and rows.mass.dtype == torch.float32


def chunk_losses_(
    logits_CV: Tensor, rows: Rows, scale: Tensor | None, bias: Tensor | None, form: HeadForm, options: LossOptions
) -> Tensor:
    """Losses [C] of a chunk's products h Wᵀ; overwrites them with `scale` [C] times the loss's derivative by them."""
    if rows.sets is None:
        return _row_losses_(logits_CV, rows, scale, bias, form, options)
    loss_C, places, share_E = _of_sets(logits_CV, rows.sets, bias, form, options.temperature)
    losses = _row_losses_(logits_CV, rows, scale, bias, form, options) - loss_C
    if scale is not None:
        logits_CV.index_put_(places, (-scale[places[0]] * share_E).to(logits_CV.dtype), accumulate=True)
    return losses


def _of_sets(
    logits_CV: Tensor, entries: SetEntries, bias: Tensor | None, form: HeadForm, temperature: float
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """What sets take from the losses [C]; their tokens' places, row [E] and id [E]; and the derivative of it there."""
    which, tokens = entries.sets.tokens(entries.index, entries.cuts[-1][1] - entries.cuts[0][1])
    places = entries.row.index_select(0, which), tokens
    z_E = logits_CV[places].float()
    z_E = form.scale * (z_E if bias is None else z_E + bias.float()[tokens])
    bent = None if form.softcap is None else torch.tanh(z_E / form.softcap)
    share_E = (z_E if bent is None or form.softcap is None else form.softcap * bent) / temperature
    lse, unit = within_sets_(share_E, which, len(entries.row))
    share_E *= (form.scale / temperature * entries.signed * unit).index_select(0, which)
    share_E = share_E if bent is None else share_E * (1 - bent.square())
    return entries.sums(entries.signed * lse), places, share_E


def _row_losses_(
    logits_CV: Tensor, rows: Rows, scale: Tensor | None, bias: Tensor | None, form: HeadForm, options: LossOptions
) -> Tensor:
    """`chunk_losses_` of the entries that are tokens."""
    count, width = logits_CV.shape
    reads, losses = rows.ids.shape[1], torch.empty_like(rows.mass)
    placeholder = losses
    with torch.cuda.device_of(logits_CV):  # where kernels go, whatever the process's current GPU is
        _row_kernel[(count,)](
            logits_CV,
            logits_CV.stride(0),
            placeholder if bias is None else bias,
            rows.ids,
            rows.sparse,
            rows.mass,
            rows.constant,
            placeholder if rows.uniform is None else rows.uniform,
            placeholder if scale is None else scale,
            losses,
            width,
            reads,
            1 / options.temperature,
            options.ce_weight,
            options.z_loss,
            form.scale,
            form.softcap or 1.0,
            BIAS=bias is not None,
            SOFTCAP=form.softcap is not None,
            UNIFORM=rows.uniform is not None,
            GRADIENT=scale is not None,
            TWO=options.two_softmaxes,
            READS=max(2, triton.next_power_of_2(max(reads, 1))),
            **launch(width),
        )
    return losses


def launch(width: int) -> dict[str, int]:
    """Logits that a row's threads take at a time, and how many warps they are."""
    block = min(LARGEST_BLOCK, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(MOST_WARPS, max(4, block // LOGITS_OF_A_WARP))}


@triton.jit
def _logit(x, bias_V, at, mask, scale, cap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """z of a product, and dz/dproduct."""
    x = x.to(tl.float32)
    if BIAS:
        x += tl.load(bias_V + at, mask=mask, other=0.0).to(tl.float32)
    x = x * scale
    slope = tl.zeros_like(x) + scale
    if SOFTCAP:
        bent = 2 * tl.sigmoid(2 * x / cap) - 1  # tanh
        slope = scale * (1 - bent * bent)
        x = cap * bent
    return x, slope


@triton.jit
def _row_kernel(
    logits_CV,
    stride,
    bias_V,
    ids_CJ,
    sparse_CJ,
    mass_C,
    constant_C,
    uniform_C,
    scale_C,
    losses_C,
    width,
    reads,
    inverse_temperature,
    alpha,
    zeta,
    form_scale,
    cap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIFORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_CV + row * stride
    here = tl.arange(0, READS)
    wanted = here < reads
    ids = tl.load(ids_CJ + row * reads + here, mask=wanted, other=0)
    sparse = tl.load(sparse_CJ + row * reads + here, mask=wanted, other=0.0)
    picked, picked_slope = _logit(
        tl.load(logits_V + ids, mask=wanted, other=0.0), bias_V, ids, wanted, form_scale, cap, BIAS, SOFTCAP
    )
    dot = tl.sum(tl.where(sparse != 0, sparse * picked, 0.0), 0)

    largest, total, hard_total, everything = -float("inf"), 0.0, 0.0, 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        x = tl.load(logits_V + at, mask=mask, other=0.0)
        z, _ = _logit(x, bias_V, at, mask, form_scale, cap, BIAS, SOFTCAP)
        if UNIFORM:
            everything += tl.sum(tl.where(mask, z, 0.0), 0)
        z = tl.where(mask, z, -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(z, 0))
        safe = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp((before - safe) * inverse_temperature)
        total += tl.sum(tl.exp((z - safe) * inverse_temperature), 0)
        if TWO:
            hard_total = hard_total * tl.exp(before - safe) + tl.sum(tl.exp(z - safe), 0)

    mass, uniform = tl.load(mass_C + row), 0.0
    lse = largest * inverse_temperature + tl.log(total)
    hard_lse = lse
    if TWO:
        hard_lse = largest + tl.log(hard_total)
    if UNIFORM:
        uniform = tl.load(uniform_C + row)
        dot += uniform * everything
    loss = mass * lse - dot + tl.load(constant_C + row)
    # alpha = zeta = 0 at a temperature needs no hard_lse, and lse stands in for it times 0.
    tl.store(losses_C + row, loss + (alpha + zeta * hard_lse) * hard_lse)

    if GRADIENT:
        scale = tl.load(scale_C + row)
        soft, hard = mass * inverse_temperature, alpha + 2 * zeta * hard_lse
        repeats = tl.sum(tl.where(ids[:, None] == ids[None, :], sparse[None, :], 0.0), 1)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < width
            x = tl.load(logits_V + at, mask=mask, other=0.0)
            z, slope = _logit(x, bias_V, at, mask, form_scale, cap, BIAS, SOFTCAP)
            p = tl.exp(z * inverse_temperature - lse)
            gradient = (soft if TWO else soft + hard) * p
            if TWO:
                gradient += hard * tl.exp(z - hard_lse)
            tl.store(logits_V + at, (scale * slope * (gradient - uniform)).to(x.dtype), mask=mask)
        tl.debug_barrier()  # the block's stores are done before single places are written again
        p = tl.exp(picked * inverse_temperature - lse)
        gradient = (soft if TWO else soft + hard) * p
        if TWO:
            gradient += hard * tl.exp(picked - hard_lse)
        gradient = scale * picked_slope * (gradient - uniform - repeats)
        tl.store(logits_V + ids, gradient.to(logits_CV.dtype.element_ty), mask=wanted)
