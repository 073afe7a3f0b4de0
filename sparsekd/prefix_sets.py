"""Targets that are sets: all of a student's tokens that a draw may become, where it says no more than that.

A set is written as an id: V + s stands for set s of a table of S sets, V + S + s for the same set as a condition. Ids
below V are tokens as ever, so ordinary targets pay nothing, and a sampler, a codec and a cache carry all of them alike.
With z the student's logits, q = softmax(z), t the weights of tokens, t_C those of sets C and m_C those of conditions:

    loss      =  - Σ t_v log q_v  -  Σ (t_C - m_C) log q(C),     q(C) = Σ_{v in C} q_v
    dloss/dz  =  S q - t - Σ_C (t_C - m_C) q 1_C / q(C),         S = Σ t_v + Σ t_C - Σ m_C

A token with weight m and its set as a condition with weight m are - m log q(v | C), which says nothing of q(C) itself.
`redraw` says what they are for. Sets may lie inside one another.

Shapes: N positions (any leading shape), V vocabulary, K kept ids, M entries that are sets, E their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.losses import kept_positions, reduce, safe_labels
from sparsekd.targets import SparseTargets

# Tokens of sets that are gathered at once.
_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSets:
    """Sets of a vocabulary of V tokens: set s is `order[first[s] : last[s]]`; int64 [any], [S], [S]."""

    vocab_size: int
    order: Tensor
    first: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def to(self, device: torch.device | str) -> PrefixSets:
        """The same sets on another device."""
        order, first, last = (each.to(device) for each in (self.order, self.first, self.last))
        return PrefixSets(vocab_size=self.vocab_size, order=order, first=first, last=last)

    def tokens(self, sets: Tensor) -> tuple[Tensor, Tensor]:
        """(which of the sets [E], token [E]): the tokens of some sets [M], one set after another."""
        sizes = self.last[sets] - self.first[sets]
        begins = self.first[sets] - (sizes.cumsum(0) - sizes)
        which = torch.repeat_interleave(torch.arange(len(sets), device=sets.device), sizes)
        return which, self.order[begins[which] + torch.arange(len(which), device=sets.device)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """Flat targets taken apart: tokens [N, K] with weights (0 where the entry is a set), and M signed sets."""

    tokens: Tensor
    weights: Tensor
    rows: Tensor
    sets: Tensor
    signed: Tensor

    def mass(self) -> Tensor:
        """[N] S."""
        return self.weights.sum(-1).index_add(0, self.rows, self.signed)


def prefix_set_ce(
    logits: Tensor,
    targets: SparseTargets | Any,
    sets: PrefixSets,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy to tokens and sets of tokens, in nats; the equation at the head of this file.

    Equals, with member[s, v] = 1 where token v is in set s and t = targets.densify(V + 2 S):

        q = logits.softmax(-1)
        -(t[:, :V] * q.log() + (t[:, V : V + S] - t[:, V + S :]) * (q @ member.T).log()).sum(-1)

    A set's mass is a log-sum-exp over its own tokens, none is a difference of sums. Without a set among the targets it
    is `sparse_ce`.

    Args:
        logits: [..., V] or wider (a padded head); the loss is computed in float32 (float64 stays float64).
        targets: ids below V + 2 S and weights [..., K].
        labels, ce_weight, ignore_index, reduction, num_items_in_batch: as in `sparse_kl`.
    """
    targets = SparseTargets.of(targets).to(logits.device)
    width = logits.shape[-1]
    if width < sets.vocab_size:
        raise ValueError(f"the sets are of a vocabulary of {sets.vocab_size} tokens, the logits of {width}")
    keep = kept_positions(logits.shape[:-1], labels, ignore_index, logits.device)
    sets, dtype = sets.to(logits.device), torch.promote_types(logits.dtype, torch.float32)
    parts = _take_apart(targets.flatten(), sets, dtype)
    if ce_weight:
        parts = _with_labels(parts, safe_labels(labels, keep).flatten(), ce_weight)
    losses = _SetLoss.apply(logits.flatten(0, -2), parts, sets)
    return reduce(losses.view(keep.shape) * keep, keep, reduction, num_items_in_batch)


def _take_apart(flat: SparseTargets, sets: PrefixSets, dtype: torch.dtype) -> _Parts:
    weights = flat.weights.to(dtype)
    is_set = flat.ids >= sets.vocab_size
    rows, entries = (is_set & (weights > 0)).nonzero(as_tuple=True)
    places = flat.ids[rows, entries] - sets.vocab_size
    return _Parts(
        tokens=flat.ids.masked_fill(is_set, 0),
        weights=weights.masked_fill(is_set, 0),
        rows=rows,
        sets=places % len(sets),
        signed=torch.where(places >= len(sets), -weights[rows, entries], weights[rows, entries]),
    )


def _with_labels(parts: _Parts, labels: Tensor, ce_weight: float) -> _Parts:
    """α on the true token, 1 - α on everything else."""
    hard = parts.weights.new_full((len(labels), 1), ce_weight)
    return _Parts(
        tokens=torch.cat([parts.tokens, labels[:, None]], -1),
        weights=torch.cat([parts.weights * (1 - ce_weight), hard], -1),
        rows=parts.rows,
        sets=parts.sets,
        signed=parts.signed * (1 - ce_weight),
    )


class _SetLoss(torch.autograd.Function):
    """Losses per row [N]; saves the logits it was given and makes the gradient in one [N, V] buffer."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, parts: _Parts, sets: PrefixSets) -> Tensor:
        z = logits_NV.to(parts.weights.dtype)
        lse = z.logsumexp(-1)
        # A padding entry must not meet a logit of -inf: 0 * inf is NaN.
        picked = z.gather(-1, parts.tokens).masked_fill_(parts.weights == 0, 0)
        set_lse = torch.cat([each for *_, each in _set_lses(z, parts, sets)]) if len(parts.sets) else parts.signed
        ctx.save_for_backward(logits_NV, lse, set_lse)
        ctx.parts, ctx.sets = parts, sets
        losses = parts.mass() * lse - (parts.weights * picked).sum(-1)
        return losses.index_add(0, parts.rows, -parts.signed * set_lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, lse, set_lse = ctx.saved_tensors
        parts, sets = ctx.parts, ctx.sets
        z = logits_NV.to(grad_N.dtype)
        gradient = (z - lse[:, None]).exp_().mul_((grad_N * parts.mass())[:, None])
        gradient.scatter_add_(-1, parts.tokens, -grad_N[:, None] * parts.weights)
        flat = gradient.view(-1)
        for part, which, at in _chunks(z, parts, sets):
            shares = (z.view(-1)[at] - set_lse[part][which]).exp_()
            flat.index_add_(0, at, -(grad_N[parts.rows[part]] * parts.signed[part])[which] * shares)
        return gradient.to(logits_NV.dtype), None, None


def _chunks(z_NV: Tensor, parts: _Parts, sets: PrefixSets) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some entries that are sets at a time: (which, of each of their tokens the entry [E], its place in z [E])."""
    sizes = (sets.last - sets.first)[parts.sets].cumsum(0)
    start, count = 0, len(parts.sets)
    while start < count:
        before = int(sizes[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(sizes, before + _CHUNK, right=True)))
        part = slice(start, stop)
        which, tokens = sets.tokens(parts.sets[part])
        yield part, which, parts.rows[part][which] * z_NV.shape[-1] + tokens
        start = stop


def _set_lses(z_NV: Tensor, parts: _Parts, sets: PrefixSets) -> Iterator[tuple[slice, Tensor]]:
    """(entries, log Σ exp z over the tokens of each entry's set), chunk by chunk."""
    for part, which, at in _chunks(z_NV, parts, sets):
        values = z_NV.view(-1)[at]
        largest = values.new_full((part.stop - part.start,), -torch.inf).scatter_reduce_(0, which, values, "amax")
        largest.clamp_(min=torch.finfo(values.dtype).min)  # a set of logits of -inf
        sums = torch.zeros_like(largest).index_add_(0, which, (values - largest[which]).exp_())
        yield part, largest + sums.log()


def log_set_masses_one_by_one(log_q_NV: Tensor, rows: Tensor, tokens: Tensor, sets: PrefixSets) -> Tensor:
    """[M] log q(C) in row `rows[m]` of set `tokens[m]`, set by set: the readable twin of what the loss does at once."""
    parts = [
        log_q_NV[row, sets.order[sets.first[index] : sets.last[index]]].logsumexp(-1)
        for row, index in zip(rows.tolist(), tokens.tolist(), strict=True)
    ]
    return torch.stack(parts)
