"""Universal Logit Distillation (Boizard et al., 2024): distillation between models of different vocabularies.

Shapes: B rows, L student's and M teacher's tokens of a row, V student's and W teacher's vocabulary, N paired positions.

At each pair of positions both distributions are sorted in descending order, the shorter is filled with zeros, and
ULD = Σ_r |q_(r) - t_(r)|, from 0 to 2: the optimal transport between them where every token is as far from any other.
With s_r = sign(q_(r) - t_(r)), carried from ranks back to ids, the gradient with respect to the student's logits is
q (s - Σ q s).

ULD does not know which token is which: where the teacher is certain and the student prefers another token than the
label, CE + λ ULD has for λ > 1 a local minimum with q = 1/(2λ) of the label, and the student stays there (1/3 at the
published λ = 1.5). Students that start from scratch fall into it; pretrained ones mostly prefer the label already.

A position is where a token is predicted: position l predicts token l+1, so a label at the first token has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.errors import RecipeError
from sparsekd.losses import row_chunks, shared_out
from sparsekd.sketch import SortedCurve, sorted_curve, spread
from sparsekd.targets import SparseTargets

IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenized:
    """One model's view of B texts.

    Attributes:
        labels: [B, L] ids of the tokens to be learnt, -100 elsewhere (prompts, padding), not shifted.
        starts, ends: [B, L] the bytes of the common text that each token spells, -1 where it is no part of it. An end
            token spells none: both are the length of the text.
    """

    labels: Tensor
    starts: Tensor | None = None
    ends: Tensor | None = None

    def on_host(self) -> Tokenized:
        """The same on the host, which finds out what belongs together: a loop over rows that asks at every turn."""
        labels, starts, ends = (None if each is None else each.cpu() for each in (self.labels, self.starts, self.ends))
        assert labels is not None
        return Tokenized(labels=labels, starts=starts, ends=ends)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """N paired positions, ordered by row: `student` of row `rows` faces `teacher` of the same row; each [N] int64."""

    rows: Tensor
    student: Tensor
    teacher: Tensor

    def to(self, device: torch.device) -> Pairs:
        """The same pairs on another device."""
        rows, student, teacher = (
            each.to(device, non_blocking=True) for each in (self.rows, self.student, self.teacher)
        )
        return Pairs(rows=rows, student=student, teacher=teacher)


# --- pairing ------------------------------------------------------------------------------------------------


def pair_by_index(student: Tokenized, teacher: Tokenized, *, skip_student_eos: bool = True) -> Pairs:
    """The i-th predicted token of an answer with the teacher's i-th, cut to the shorter answer: as published.

    `skip_student_eos` leaves the student's last one out (so do the authors; the teacher keeps its own). The published
    code takes a run of positions from the first label on; this takes the predicted tokens, so that answers in several
    segments never pair prompt tokens, and an answer without a prompt is not one token off.
    """

    def pair(row: int) -> tuple[Tensor, Tensor]:
        mine, other = _predicted(student.labels[row]), _predicted(teacher.labels[row])
        mine = mine[:-1] if skip_student_eos else mine
        count = min(len(mine), len(other))
        return mine[:count], other[:count]

    return _join([pair(row) for row in range(len(student.labels))])


def pair_by_bytes(student: Tokenized, teacher: Tokenized, *, skip_student_eos: bool = False) -> Pairs:
    """The positions where both models have read the same bytes: their next tokens begin at one byte of the text."""
    if student.starts is None or teacher.starts is None:
        raise ValueError("align='bytes' needs the starts of both: the byte of the text where each token begins")
    mine_starts, other_starts = student.starts, teacher.starts

    def pair(row: int) -> tuple[Tensor, Tensor]:
        mine, mine_at = _begins(student.labels[row], mine_starts[row])
        other, other_at = _begins(teacher.labels[row], other_starts[row])
        if skip_student_eos:
            mine, mine_at = mine[:-1], mine_at[:-1]
        return mine[torch.isin(mine_at, other_at)], other[torch.isin(other_at, mine_at)]

    return _join([pair(row) for row in range(len(student.labels))])


PAIRINGS: dict[str, Callable[..., Pairs]] = {"index": pair_by_index, "bytes": pair_by_bytes}


def _predicted(labels_L: Tensor) -> Tensor:
    """The positions that predict a labelled token."""
    return (labels_L[1:] != IGNORED).nonzero()[:, 0]


def _begins(labels_L: Tensor, starts_L: Tensor) -> tuple[Tensor, Tensor]:
    """(positions, bytes) where a predicted token begins; of several at one byte the last, which spells it."""
    positions = _predicted(labels_L)
    at = starts_L.to(labels_L.device)[positions + 1]
    kept = at >= 0
    kept[:-1] &= at[1:] != at[:-1]
    return positions[kept], at[kept]


def _join(pairs: list[tuple[Tensor, Tensor]]) -> Pairs:
    student, teacher = zip(*pairs, strict=True)
    rows = [torch.full_like(each, row) for row, each in enumerate(student)]
    return Pairs(rows=torch.cat(rows), student=torch.cat(student), teacher=torch.cat(teacher))


# --- the loss -----------------------------------------------------------------------------------------------


def uld(
    logits: Tensor,
    teacher: Tensor | SortedCurve | SparseTargets,
    *,
    tokens: Tokenized,
    teacher_tokens: Tokenized,
    align: str = "index",
    skip_student_eos: bool | None = None,
    uld_weight: float = 1.5,
    ce_weight: float = 1.0,
    allow_biased: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`ce_weight` · CE + `uld_weight` · ULD: the mean over positions, then over rows, of the sorted differences.

    Equals, at each pair of positions, with the shorter vocabulary filled up with zeros:

        (softmax(z).sort(descending=True).values - softmax(z_teacher).sort(descending=True).values).abs().sum(-1)

    CE is the mean over all labelled tokens. No tensor that is passed in is changed.

    Args:
        logits: [B, L, V] the student's.
        teacher: its logits [B, M, W], or its curve [B, M, C] (`sketch.sorted_curve`).
        tokens, teacher_tokens: labels [B, L] and [B, M], for align="bytes" also where tokens begin in the text.
        align: "index" as published, "bytes" where both have read the same text; a name of `PAIRINGS`.
        skip_student_eos: leave the student's last position out; default: as published for "index", not for "bytes".
        allow_biased: take sparse targets all the same. Sorted draws are steeper than what they were drawn from: ULD
            came out 20 to 370 % too large with 50 draws. A mean over more rows does not help.
        num_items_in_batch: divide both sums over positions by it instead, so that gradient accumulation and data
            parallelism change nothing; a position without a pair then counts as 0.

    Raises:
        ValueError: an unknown alignment, shapes that do not belong together.
        RecipeError: sparse targets without `allow_biased`.
    """
    if align not in PAIRINGS:
        raise ValueError(f"align={align!r} is not one of {', '.join(PAIRINGS)}")
    _check_shapes(logits, teacher, tokens.labels, teacher_tokens.labels)
    rule = {} if skip_student_eos is None else {"skip_student_eos": skip_student_eos}
    pairs = PAIRINGS[align](tokens.on_host(), teacher_tokens.on_host(), **rule).to(logits.device)
    distances = paired_distances(logits, teacher, pairs, allow_biased=allow_biased)
    loss = uld_weight * _mean_of_rows(distances, pairs.rows, len(logits), num_items_in_batch)
    return loss + ce_weight * next_token_loss(logits, tokens.labels, num_items_in_batch) if ce_weight else loss


def paired_distances(
    logits: Tensor, teacher: Tensor | SortedCurve | SparseTargets, pairs: Pairs, *, allow_biased: bool = False
) -> Tensor:
    """[N] the ULD of each pair, from 0 to 2."""
    curve = as_curve(_at(teacher, pairs), allow_biased=allow_biased).to(logits.device)
    return sorted_distance(logits[pairs.rows.to(logits.device), pairs.student.to(logits.device)], curve)


def sorted_distance(logits_NV: Tensor, curve: SortedCurve) -> Tensor:
    """[N] Σ_r |q_(r) - t_(r)| between softmax(logits), sorted, and a curve; ranks that only one has count in full.

    Float32 (float64 stays); the gradient is made with the value, in one [N, V] buffer.
    """
    distances: Tensor = _SortedDistance.apply(logits_NV, curve.masses, curve.edges)
    return distances


def as_curve(teacher: Tensor | SortedCurve | SparseTargets, *, allow_biased: bool = False) -> SortedCurve:
    """A teacher of N positions as sorted masses: logits [N, W] rank by rank, curves as they are.

    Raises:
        RecipeError: sparse targets without `allow_biased`.
    """
    if isinstance(teacher, SortedCurve):
        return teacher
    if isinstance(teacher, Tensor):
        return sorted_curve(teacher, top=None)
    if not allow_biased:
        raise RecipeError(
            "ULD sorts the teacher's probabilities, and sorting is not linear: sampled or truncated targets give a "
            "curve that is too steep, a loss 20 to 370 % too large and another gradient, however many rows are "
            "averaged; capture with sampler=sorted_curve, or set allow_biased=true to measure that"
        )
    ranked = teacher.weights.sort(dim=-1, descending=True).values
    return SortedCurve(masses=ranked, edges=tuple(range(ranked.shape[-1] + 1)))


def next_token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of the labelled tokens (0 without any), or their sum over `num_items_in_batch`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat, wanted = logits[:, :-1].flatten(0, 1).to(dtype), labels[:, 1:].flatten().to(logits.device)
    total = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    count = (wanted != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return shared_out(total, count)


def _at(teacher: Tensor | SortedCurve | SparseTargets, pairs: Pairs) -> Any:
    first = (
        teacher if isinstance(teacher, Tensor) else teacher.masses if isinstance(teacher, SortedCurve) else teacher.ids
    )
    return teacher[pairs.rows.to(first.device), pairs.teacher.to(first.device)]


def _mean_of_rows(distances_N: Tensor, rows_N: Tensor, count: int, num_items: Tensor | int | None) -> Tensor:
    """The mean over rows of their means (0 for a row without a pair), or the sum over `num_items`."""
    if num_items is not None:
        return shared_out(distances_N.sum(), num_items)
    sums = distances_N.new_zeros(count).index_add(0, rows_N, distances_N)
    pairs = torch.zeros_like(sums).index_add_(0, rows_N, torch.ones_like(distances_N))
    return (sums / pairs.clamp(min=1)).mean()


def _check_shapes(logits: Tensor, teacher: Any, labels: Tensor, teacher_labels: Tensor) -> None:
    other = teacher if isinstance(teacher, Tensor) else getattr(teacher, "masses", None)
    other = teacher.ids if other is None else other
    for who, positions, wanted in (("student", logits, labels), ("teacher", other, teacher_labels)):
        if positions.ndim != 3 or positions.shape[:2] != wanted.shape:
            raise ValueError(
                f"the {who}'s labels {tuple(wanted.shape)} and positions {tuple(positions.shape)} differ; give one "
                "label for each token of each row"
            )
    if len(logits) != len(other):
        raise ValueError(f"student and teacher have {len(logits)} and {len(other)} rows; give both the same texts")


class _SortedDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, masses_NC: Tensor, edges: tuple[int, ...]) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        distances = torch.empty(len(logits_NV), dtype=dtype, device=logits_NV.device)
        gradient = torch.empty_like(logits_NV) if wanted else None
        for part in row_chunks(logits_NV):
            q = logits_NV[part].to(dtype).softmax(-1)
            ranked, order = q.sort(dim=-1, descending=True, stable=True)
            other = spread(SortedCurve(masses=masses_NC[part].to(dtype), edges=edges))
            shared = min(q.shape[-1], edges[-1])
            difference = ranked[:, :shared] - other[:, :shared]
            distances[part] = difference.abs().sum(-1) + ranked[:, shared:].sum(-1) + other[:, shared:].sum(-1)
            if gradient is not None:
                signs = F.pad(difference.sign(), (0, q.shape[-1] - shared), value=1.0)
                signs = torch.empty_like(q).scatter_(-1, order, signs)
                gradient[part] = q * (signs - (q * signs).sum(-1, keepdim=True))
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NV,) = ctx.saved_tensors
        return (gradient_NV * grad_N[:, None]).to(gradient_NV.dtype), None, None
