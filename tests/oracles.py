"""Slow, dense, float64 twins: what the fast paths are judged against."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.prefix_sets import PrefixSets
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
    sets: PrefixSets | None = None,
) -> Tensor:
    """Losses [N] by the dense formula, for autograd to differentiate; with `sets`, of a cross-entropy."""
    width, count = (logits.shape[-1], 0) if sets is None else (sets.vocab_size, len(sets))
    t, log_p = targets.densify(width + 2 * count).to(logits.dtype), (logits / temperature).log_softmax(-1)
    kd = -(t[:, :width] * log_p[:, :width]).sum(-1)
    if sets is not None:
        kd = kd - ((t[:, width : width + count] - t[:, width + count :]) * log_set_masses(log_p, sets)).sum(-1)
    elif entropy:
        kd = kd + torch.xlogy(t, t).sum(-1)
    loss = (1 - ce_weight) * temperature**2 * kd + z_loss * logits.logsumexp(-1) ** 2
    if ce_weight:
        assert labels is not None
        loss = loss + ce_weight * F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    return loss if labels is None else loss * (labels != ignore_index)


def log_set_masses(log_p_NV: Tensor, sets: PrefixSets) -> Tensor:
    """[N, S] log p(C), set by set."""
    bounds = zip(sets.first.tolist(), sets.last.tolist(), strict=True)
    return torch.stack([log_p_NV[:, sets.order[first:last]].logsumexp(-1) for first, last in bounds], -1)


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


def splitmix_plain(x: int) -> int:
    """The finaliser of splitmix64, of x modulo 2^64, in plain Python integers."""
    word = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def systematic_plain(p: list[float], u: float, rounds: int) -> list[int]:
    """How many of the points (u + j) / rounds fall into each id's interval of the cumulative distribution: a loop."""
    counts, end = [], 0.0
    points = [(u + j) / rounds for j in range(rounds)]
    for mass in p:
        start, end = end, end + mass
        counts.append(sum(start <= point < end for point in points))
    return counts


def importance_plain(logits_NV: Tensor, points_NR: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N, R] at some points of q ∝ p^temperature, log2 p of each, and the Rényi entropy [N]: dense, in float64."""
    p = logits_NV.double().softmax(-1)
    q = p.pow(temperature).where(p > 0, 0)
    total = q.sum(-1, keepdim=True)
    ids = torch.searchsorted((q / total).cumsum(-1).contiguous(), points_NR, right=True).clamp(max=len(p[0]) - 1)
    return ids, p.gather(-1, ids).log2(), total[:, 0].log2() / (1 - temperature)


def vocabulary_order_plain(head_VH: Tensor, columns: int, rows: int, steps: int) -> list[int]:
    """The order of ids run by run, all products and sums in int64: what float64 does exactly on any machine."""

    def scaled(values: np.ndarray) -> np.ndarray:
        return np.rint(values / max(int(np.abs(values).max()), 1) * 2.0**15).astype(np.int64)

    def mean(of: np.ndarray) -> np.ndarray:
        return np.rint(of.sum(0) / len(of)).astype(np.int64)

    scale = np.float32(2**12 / float(head_VH.abs().max()))
    whole = np.rint(head_VH.float().numpy() * scale).astype(np.int64)
    group = -(-whole.shape[1] // columns)
    whole *= np.array([-1 if (j * 2654435769) & 2**31 else 1 for j in range(whole.shape[1])])
    grid = np.pad(whole, ((0, 0), (0, -whole.shape[1] % group))).reshape(len(whole), group, -1).sum(1)
    ids, size = np.arange(len(grid)), 1 << (len(grid) - 1).bit_length()
    while size > 1:
        full = len(ids) // size
        runs = [ids[i * size : (i + 1) * size] for i in range(full)]
        some = [grid[run][:: -(-size // rows)] for run in runs]
        means = [mean(each) for each in some]
        ways = [means[min(i + 1, full - 1)] - means[max(i - 1, 0)] for i in range(full)]
        if len(ids) % size:  # the run that is left looks at nobody
            runs.append(ids[full * size :])
            some.append(grid[runs[-1]][:: -(-len(runs[-1]) // rows)])
            means.append(mean(some[-1]))
            ways.append(np.zeros_like(means[-1]))
        for i, run in enumerate(runs):
            axis = scaled(ways[i] if ways[i].any() else np.ones_like(ways[i]))
            for _ in range(steps):
                axis = scaled((some[i] - means[i]).T @ scaled((some[i] - means[i]) @ axis))
            runs[i] = run[np.argsort(grid[run] @ axis, kind="stable")]
        ids, size = np.concatenate(runs), size // 2
    return ids.tolist()


def uld_plain(logits_NV: Tensor, teacher_NW: Tensor) -> Tensor:
    """[N] Σ |sorted student probabilities - sorted teacher probabilities|, the shorter filled with zeros."""
    width = max(logits_NV.shape[-1], teacher_NW.shape[-1])
    ranked = [
        F.pad(logits.softmax(-1).sort(-1, descending=True).values, (0, width - logits.shape[-1]))
        for logits in (logits_NV, teacher_NW)
    ]
    return (ranked[0] - ranked[1]).abs().sum(-1)
