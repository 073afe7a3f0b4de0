"""The loss on a GPU: the kernel that takes the place of `fused_chunks.chunk_losses_`, and products that add in float32.

Shapes: C rows, V vocabulary, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparsekd.row_losses import HeadForm, LossOptions, Rows, prepare
from sparsekd.targets import SparseTargets
from sparsekd.trust import agrees

RowLosses = Callable[[Tensor, Rows, Tensor | None, Tensor | None, HeadForm, LossOptions], Tensor]
# A bf16 number is within 2^-9 of what it stands for, and within 2^-8 where it is cut off, as Triton's interpreter does.
LARGEST_GAP = 2**-7


def row_kernel(device: torch.device, rows: Rows, twin: RowLosses) -> RowLosses | None:
    """The Triton kernel in the place of `twin`, where there is a GPU and Triton, it can compute `rows`, and it agrees
    with `twin` there."""
    if device.type != "cuda" or not find_spec("triton"):
        return None
    from sparsekd import fused_triton

    kernel = fused_triton.chunk_losses_
    fits = fused_triton.fits(rows) and agrees("the loss", kernel, twin, device, largest_gap, LARGEST_GAP)
    return kernel if fits else None


def largest_gap(kernel: Any, twin: Any, device: torch.device) -> float:
    """Between losses, and between gradients as shares of a row's largest: bf16 logits on `device`, float32 on a CPU."""
    generator = torch.Generator("cpu").manual_seed(0)
    products_CV = (4 * torch.randn(4, 20_011, generator=generator, device="cpu")).to(torch.bfloat16)
    ids = torch.randint(20_011, (4, 6), generator=generator, device="cpu")
    want_CV, found_CV = products_CV.float(), products_CV.to(device)
    want, found = _losses_(twin, want_CV, ids), _losses_(kernel, found_CV, ids.to(device)).cpu()
    off = (found_CV.cpu().float() - want_CV).abs() / want_CV.abs().amax(-1, keepdim=True)
    gap = torch.maximum(off.amax(), ((found - want) / want).abs().amax())
    return float(gap.nan_to_num(torch.inf))


def _losses_(losses_: RowLosses, products_CV: Tensor, ids: Tensor) -> Tensor:
    options = LossOptions(ce_weight=0.1, z_loss=1e-3)
    weights = torch.full(ids.shape, 1 / ids.shape[1], device=ids.device)
    rows = prepare(SparseTargets(ids=ids, weights=weights), ids[:, 0], options, products_CV.shape[1], torch.float32)
    return losses_(products_CV, rows, weights[:, 0], None, HeadForm(), options)


@cache
def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of two 16-bit matrices can be added to a float32 one there: `addmm` with an `out_dtype`, which
    some GPUs and versions of torch refuse."""
    one = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.full((16, 16), 2**-10, device=device)  # lost where a sum of 16 is rounded to 16 bits
    try:
        torch.addmm(total, one.T, one, out_dtype=torch.float32, beta=1, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 16 + 2**-10).all())
