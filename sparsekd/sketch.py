"""A sorted-curve sketch: what Universal Logit Distillation needs of a teacher, in some 27 numbers without any id.

Shapes: N positions (any leading shape), V student's and W teacher's vocabulary, C runs of a curve.

ULD compares sorted probabilities, rank by rank. A curve keeps the `top` largest alone and, of the ranks beyond, only
the masses of runs that double in length: ranks 16..31, 32..63, ..., W-1. `spread` draws the ranks of a run back:
straight lines of log p over log rank (a power law) between the runs' means, then each run scaled to its own mass.
Comparing the masses alone, |Q_run - T_run|, loses 1 to 1.6 % of the loss between a teacher and its students, for their
curves cross within runs; spread, it is off by 0.2 % (docs/LOG.md). A sample of ids cannot stand in: sorting is
not linear, and the counts of N draws are far steeper than what they were drawn from (`uld.uld` refuses them).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparsekd.losses import row_chunks

TOP = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SortedCurve:
    """Sorted probabilities of some positions, in runs of ranks.

    Attributes:
        masses: [..., C] float, the probability of all ranks of a run, in order of rank.
        edges: C+1 ascending ranks; run i holds the ranks edges[i] .. edges[i+1]-1, and edges[-1] is W.
    """

    masses: Tensor
    edges: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.masses.shape[-1] != len(self.edges) - 1:
            raise ValueError(f"a curve of {self.masses.shape[-1]} runs has {len(self.edges)} edges; one more is needed")

    def __getitem__(self, index: Any) -> SortedCurve:
        """The curves of some positions (indexes the leading dimensions only)."""
        return SortedCurve(masses=self.masses[index], edges=self.edges)

    def to(self, device: torch.device | str) -> SortedCurve:
        """The same curves on another device."""
        return SortedCurve(masses=self.masses.to(device, non_blocking=True), edges=self.edges)


def curve_edges(width: int, top: int = TOP) -> tuple[int, ...]:
    """0, 1, ..., top, 2 top, 4 top, ..., width: each of the first `top` ranks alone, then runs that double."""
    edges, last = list(range(min(top, width) + 1)), top
    while edges[-1] < width:
        last *= 2
        edges.append(min(last, width))
    return tuple(edges)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSketch:
    """What capture keeps of N positions: the curve, and for `alm` the token that came, with its log-probability.

    Attributes:
        tokens: [N] int64.
        log_p: [N] float, natural logarithm.
        curve: masses [N, C].
    """

    tokens: Tensor
    log_p: Tensor
    curve: SortedCurve


@torch.no_grad()
def teacher_sketch(logits_NV: Tensor, tokens_N: Tensor, *, top: int = TOP) -> TeacherSketch:
    """`sorted_curve` and log_softmax(logits)[token]."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    log_p = torch.empty(len(logits_NV), dtype=dtype, device=logits_NV.device)
    for part in row_chunks(logits_NV):
        log_p[part] = logits_NV[part].to(dtype).log_softmax(-1).gather(-1, tokens_N[part, None])[:, 0]
    return TeacherSketch(tokens=tokens_N, log_p=log_p, curve=sorted_curve(logits_NV, top=top))


@torch.no_grad()
def sorted_curve(logits: Tensor, *, top: int | None = TOP) -> SortedCurve:
    """The curve of softmax(logits), [..., C]; float32 (float64 stays). `top=None` keeps every rank: nothing is lost.

    Equals `softmax(logits, -1).sort(descending=True).values`, added up between `curve_edges(W, top)`.
    """
    width = logits.shape[-1]
    edges = curve_edges(width, width if top is None else top)
    flat = logits.reshape(-1, width)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    masses = torch.empty(len(flat), len(edges) - 1, dtype=dtype, device=logits.device)
    for part in row_chunks(flat):
        ranked = flat[part].to(dtype).softmax(-1).sort(dim=-1, descending=True).values
        masses[part] = run_sums(ranked, edges)
    return SortedCurve(masses=masses.view(*logits.shape[:-1], len(edges) - 1), edges=edges)


def run_sums(ranked_NW: Tensor, edges: tuple[int, ...]) -> Tensor:
    """[N, C] the sums of the ranks of each run."""
    alone = _alone(edges)
    # Each run is summed by itself: differences of one cumulative sum would lose the masses of the tail.
    runs = [ranked_NW[:, a:b].sum(-1) for a, b in pairwise(edges[alone:])]
    return torch.cat([ranked_NW[:, :alone], *(run[:, None] for run in runs)], -1)


def spread(curve: SortedCurve) -> Tensor:
    """[N, W] probabilities by rank: exact where a run is one rank, elsewhere the power laws of this file's head.

    They sum to the runs' masses. For chunks of positions: the whole of a batch would be as large as its logits.
    """
    masses, edges, alone = curve.masses, curve.edges, _alone(curve.edges)
    if alone == len(edges) - 1:
        return masses
    at = torch.tensor(edges).to(masses.device, non_blocking=True)
    lengths = at.diff()
    means = (masses / lengths).clamp(min=torch.finfo(masses.dtype).tiny).log()
    middle = ((at[:-1] + at[1:] + 1) / 2).log().to(masses.dtype)  # of the ranks counted from 1
    ranks = torch.arange(alone + 1, edges[-1] + 1, device=masses.device).log().to(masses.dtype)
    right = torch.searchsorted(middle, ranks).clamp(1, len(middle) - 1)  # beyond the last middle: its line goes on
    share = (ranks - middle[right - 1]) / (middle[right] - middle[right - 1])
    tail = torch.lerp(means[:, right - 1], means[:, right], share).exp()
    sums = run_sums(tail, tuple(edge - alone for edge in edges[alone:]))
    scale = masses[:, alone:] / sums.clamp(min=torch.finfo(masses.dtype).tiny)
    scale = scale.repeat_interleave(lengths[alone:], -1, output_size=tail.shape[-1])
    return torch.cat([masses[:, :alone], tail * scale], -1)


def _alone(edges: tuple[int, ...]) -> int:
    """How many ranks, from the first on, are runs by themselves."""
    return next((i for i in range(len(edges) - 1) if edges[i + 1] != i + 1), len(edges) - 1)
