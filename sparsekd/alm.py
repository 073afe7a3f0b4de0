"""Approximate likelihood matching (Minixhofer et al., 2025): equal probabilities for equal stretches of text.

Shapes: B rows, L student's and M teacher's tokens of a row, V student's vocabulary, C chunks.

A chunk is the text between two neighbouring bytes at which tokens of both models begin. Its probability is, by the
chain rule, the product over its tokens, in either vocabulary. With p and q the teacher's and the student's, and τ the
temperature, a chunk's loss is the cross-entropy of two coins:

    l = - p^(1/τ) log q^(1/τ) - (1 - p^(1/τ)) log(1 - q^(1/τ))

Of the teacher it needs one number a token: the log-probability of the token that came.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.losses import shared_out
from sparsekd.uld import IGNORED, Tokenized, next_token_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Which chunk (0 .. count-1, over the whole batch) each position's next token belongs to, -1 for none.

    Attributes:
        student: [B, L] int64.
        teacher: [B, M] int64.
        count: C.
    """

    student: Tensor
    teacher: Tensor
    count: int


def shared_chunks(tokens: Tokenized, teacher_tokens: Tokenized) -> Chunks:
    """The chunks that both models predict whole: every token of theirs is labelled, and both end at one byte.

    The bytes are those of `Tokenized.starts` and `.ends`. An end token, which spells nothing, is a chunk by itself.
    """
    student = torch.full_like(tokens.labels, -1)
    teacher = torch.full_like(teacher_tokens.labels, -1)
    count = 0
    for row in range(len(student)):
        mine, other = _row(tokens, row), _row(teacher_tokens, row)
        shared = torch.unique(mine.starts[torch.isin(mine.starts, other.starts)])
        shared = shared[shared >= 0]
        of_mine, of_other = mine.assign(shared), other.assign(shared)
        ends, other_ends = mine.ends_of(of_mine, len(shared)), other.ends_of(of_other, len(shared))
        whole = (ends >= 0) & (ends == other_ends)
        number = torch.where(whole, whole.cumsum(0) - 1 + count, -1)
        number = F.pad(number, (0, 1), value=-1)  # for a chunk of -1
        student[row, :-1], teacher[row, :-1] = number[of_mine][1:], number[of_other][1:]
        count += int(whole.sum())
    return Chunks(student=student, teacher=teacher, count=count)


def chunk_log_p(log_p: Tensor, chunks: Tensor, count: int) -> Tensor:
    """[C] the log-probabilities of chunks: the sums of their tokens'; log_p and chunks [B, L], by position."""
    slots = chunks.where(chunks >= 0, count).to(log_p.device, non_blocking=True)  # the last is for what is in none
    return log_p.new_zeros(count + 1).index_add(0, slots.flatten(), log_p.flatten())[:count]


def realised_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, L] log-probability of the token that came next at each position, 0 where it has no label."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    flat = F.cross_entropy(logits.flatten(0, 1).to(dtype), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return -flat.view(wanted.shape)


def alm(
    logits: Tensor,
    teacher_log_p: Tensor,
    *,
    tokens: Tokenized,
    teacher_tokens: Tokenized,
    temperature: float = 100.0,
    smallest: float = 1e-6,
    alm_weight: float = 1.0,
    ce_weight: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`alm_weight` times the mean of l over the chunks, plus `ce_weight` times the cross-entropy of the labels.

    The least value is where every chunk has q = p; it is the entropy of the teacher's coins, not 0.

    Args:
        logits: [B, L, V] the student's.
        teacher_log_p: [B, M] natural logarithms: entry l is that of token l+1 (`realised_log_p` of its logits, or a
            cache of sampler=sorted_curve).
        tokens, teacher_tokens: labels, starts and ends.
        temperature: τ. Large ones weigh likely and unlikely chunks alike.
        smallest: 1 - q^(1/τ) counts as at least this much: a certain chunk would be infinitely wrong.
        num_items_in_batch: divides both sums instead of their counts; see `uld.uld`.

    Raises:
        ValueError: no bytes given, or shapes that do not belong together.
    """
    if teacher_log_p.shape != teacher_tokens.labels.shape:
        raise ValueError(
            f"teacher_log_p {tuple(teacher_log_p.shape)} and the teacher's labels "
            f"{tuple(teacher_tokens.labels.shape)} differ; give one number for each token"
        )
    chunks = shared_chunks(tokens.on_host(), teacher_tokens.on_host())
    log_q = chunk_log_p(realised_log_p(logits, tokens.labels), chunks.student, chunks.count)
    log_p = chunk_log_p(teacher_log_p.to(log_q), chunks.teacher, chunks.count)
    losses = coin_losses(log_q, log_p, temperature=temperature, smallest=smallest)
    count = max(chunks.count, 1) if num_items_in_batch is None else num_items_in_batch
    loss = alm_weight * shared_out(losses.sum(), count)
    return loss + ce_weight * next_token_loss(logits, tokens.labels, num_items_in_batch) if ce_weight else loss


def coin_losses(log_q: Tensor, log_p: Tensor, *, temperature: float = 100.0, smallest: float = 1e-6) -> Tensor:
    """[C] l of this file's head; dl/dlog q = (q' - p') / (τ (1 - q')), with q' = q^(1/τ) and p' = p^(1/τ)."""
    scaled, p = log_q / temperature, (log_p / temperature).exp()
    # log(1 - exp(x)) by expm1: near x = 0, where τ = 100 puts every chunk, 1 - exp(x) has lost its digits in float32.
    return -p * scaled - (1 - p) * (-torch.expm1(scaled)).clamp(min=smallest).log()


# --- one row ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    starts: Tensor
    ends: Tensor
    labelled: Tensor

    def assign(self, shared: Tensor) -> Tensor:
        """[L] the chunk that each token lies in, -1 before the first and for tokens that are no text."""
        found = torch.searchsorted(shared, self.starts, right=True) - 1
        return torch.where(self.starts >= 0, found, -1)

    def ends_of(self, of: Tensor, count: int) -> Tensor:
        """[C] the byte where each chunk's last token ends, -1 where a token of it has no label."""
        inside = of >= 0
        ends = torch.full((count,), -1, device=of.device).scatter_reduce_(0, of[inside], self.ends[inside], "amax")
        unlabelled = of[inside & ~self.labelled]
        return ends.index_fill_(0, unlabelled, -1)


def _row(tokens: Tokenized, row: int) -> _Row:
    if tokens.starts is None or tokens.ends is None:
        raise ValueError("alm needs starts and ends of both: the bytes of the text that each token spells")
    labelled = tokens.labels[row] != IGNORED
    labelled[0] = False  # nothing predicts the first token
    device = tokens.labels.device
    return _Row(starts=tokens.starts[row].to(device), ends=tokens.ends[row].to(device), labelled=labelled)
