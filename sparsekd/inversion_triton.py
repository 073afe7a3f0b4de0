"""The first level of `inversion` as a Triton kernel: one read of 16- or 32-bit logits, and a number and a half a block.

Torch makes a float32 softmax to sum it up: 12 bytes moved for each bf16 logit, where this moves 2.3. Needs the extra
`triton`; runs in Triton's interpreter in the tests. NOT YET RUN ON A GPU: `trust` checks it on each before its first
use.

Shapes: N rows, V vocabulary, B ids a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS, WARPS = 128, 4  # of a program: with 32 ids a block, 32 logits a thread


def peaks_and_sums(logits_NV: Tensor, temperature: float, block: int) -> tuple[Tensor, Tensor]:
    """Each block's max of temperature * z, and Σ exp(temperature * z - max): float32 [N, V / B], B a power of two.

    Equals, of x = temperature * logits.unflatten(-1, (-1, B)):

        x.amax(-1), (x - x.amax(-1, keepdim=True)).exp().sum(-1)

    Ids beyond the last are left out, and a block of -inf sums to 0.
    """
    logits_NV, (count, vocab) = logits_NV.contiguous() if logits_NV.stride(-1) != 1 else logits_NV, logits_NV.shape
    blocks = triton.cdiv(vocab, block)
    peaks = torch.empty(count, blocks, dtype=torch.float32, device=logits_NV.device)
    sums = torch.empty_like(peaks)
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current GPU
        _block_kernel[(count, triton.cdiv(blocks, BLOCKS))](
            logits_NV,
            logits_NV.stride(0),
            peaks,
            sums,
            vocab,
            blocks,
            temperature,
            BLOCK=block,
            BLOCKS=BLOCKS,
            num_warps=WARPS,
        )
    return peaks, sums


@triton.jit
def _block_kernel(
    logits_NV, stride, peaks, sums, vocab, blocks, temperature, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits_NV + row * stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32) * temperature
    peak = tl.max(x, 1)
    safe = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp(x - safe[:, None]), 1)  # NaN where a logit is NaN or +inf
    tl.store(peaks + row * blocks + block, peak, mask=block < blocks)
    tl.store(sums + row * blocks + block, total, mask=block < blocks)
