"""Slow, dense, float64 twins: what the fast paths are judged against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.targets import SparseTargets


def dense_loss(
    logits: Tensor,
    targets: SparseTargets,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = True,
    z_loss: float = 0.0,
) -> Tensor:
    """Losses [N] by the dense formula, for autograd to differentiate."""
    t = targets.densify(logits.shape[-1]).to(logits.dtype)
    kd = -(t * (logits / temperature).log_softmax(-1)).sum(-1)
    if entropy:
        kd = kd + torch.xlogy(t, t).sum(-1)
    loss = (1 - ce_weight) * temperature**2 * kd + z_loss * logits.logsumexp(-1) ** 2
    if ce_weight:
        assert labels is not None
        loss = loss + ce_weight * F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    return loss if labels is None else loss * (labels != ignore_index)


def head_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    logits = scale * F.linear(hidden, head, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def blocked_cdf_law(logits: Tensor) -> Tensor:
    """The float64 distribution."""
    return logits.double().softmax(-1)


def philox_plain(counter: tuple[int, int, int, int], seed: int) -> tuple[int, ...]:
    """Philox4x32-10 in plain Python integers."""
    c, k0, k1, mask = list(counter), seed & 0xFFFFFFFF, seed >> 32, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return tuple(c)


def systematic_plain(p: list[float], u: float, rounds: int) -> list[int]:
    """How many of the points (u + j) / rounds fall into each id's interval of the cumulative distribution: a loop."""
    counts, end = [], 0.0
    points = [(u + j) / rounds for j in range(rounds)]
    for mass in p:
        start, end = end, end + mass
        counts.append(sum(start <= point < end for point in points))
    return counts


def uld_plain(logits_NV: Tensor, teacher_NW: Tensor) -> Tensor:
    """[N] Σ |sorted student probabilities - sorted teacher probabilities|, the shorter filled with zeros."""
    width = max(logits_NV.shape[-1], teacher_NW.shape[-1])
    ranked = [
        F.pad(logits.softmax(-1).sort(-1, descending=True).values, (0, width - logits.shape[-1]))
        for logits in (logits_NV, teacher_NW)
    ]
    return (ranked[0] - ranked[1]).abs().sum(-1)
