"""Targets that are sets: all of a student's tokens that begin with certain bytes, where a draw says no more than that.

A set is written as an id: V + v stands for every token whose bytes begin with those of token v, v included. Ids below V
are tokens as ever, so ordinary targets pay nothing, and a sampler, a codec and a cache carry both alike. With z the
student's logits, q = softmax(z), t the weights of tokens and t_C those of sets C:

    loss = - Σ t_v log q_v - Σ t_C log q(C),    q(C) = Σ_{v in C} q_v

which is the likelihood of what the draws say. Sets may lie inside one another; of two sets, one contains the other or
they have no token in common.

Shapes: N positions (any leading shape), V vocabulary, K kept ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd.losses import kept_positions, reduce, safe_labels
from sparsekd.targets import SparseTargets

# Sums below this share of a row's largest probability are added up in logarithms: float32 ends at 1e-38.
_UNDERFLOW = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSets:
    """The sets of a vocabulary: token v's is `order[first[v] : last[v]]`; each [V] int64."""

    order: Tensor
    first: Tensor
    last: Tensor

    def membership(self, dtype: torch.dtype) -> Tensor:
        """[V, V] sparse: 1 where the column's token begins with the bytes of the row's."""
        sizes, size = self.last - self.first, len(self.order)
        begins = torch.repeat_interleave(self.first - (sizes.cumsum(0) - sizes), sizes)
        columns = self.order[begins + torch.arange(int(sizes.sum()), device=begins.device)]
        rows = torch.repeat_interleave(torch.arange(size, device=begins.device), sizes)
        ones = torch.ones(len(rows), dtype=dtype, device=begins.device)
        # As a context, not as an argument: torch 2.11 warns of what the argument says.
        with torch.sparse.check_sparse_tensor_invariants(True):
            return torch.sparse_coo_tensor(torch.stack([rows, columns]), ones, (size, size))

    def to(self, device: torch.device | str) -> PrefixSets:
        """The same sets on another device."""
        return PrefixSets(order=self.order.to(device), first=self.first.to(device), last=self.last.to(device))


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

    Equals, with member[u, v] = 1 where token v begins with token u's bytes and t = targets.densify(2 V):

        q = logits.softmax(-1)
        -(t[:, :V] * q.log() + t[:, V:] * (q @ member.T).log()).sum(-1)

    but sums that would underflow are taken as log-sum-exp over a set's own tokens; none is a difference of sums.
    Without a set among the targets it is `sparse_ce`.

    Args:
        logits: [..., V] or wider (a padded head); the loss is computed in float32 (float64 stays float64).
        targets: ids below 2 V and weights [..., K].
        labels, ce_weight, ignore_index, reduction, num_items_in_batch: as in `sparse_kl`.
    """
    targets = SparseTargets.of(targets).to(logits.device)
    size, width = len(sets.order), logits.shape[-1]
    if width < size:
        raise ValueError(f"the sets are of a vocabulary of {size} tokens, the logits of {width}")
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    flat, log_q_NV = targets.flatten(), log_q.flatten(0, -2)
    is_set = (flat.ids >= size) & (flat.weights > 0)
    tokens = flat.ids.where(~is_set & (flat.ids < size), flat.ids.new_zeros(()))
    weights = flat.weights.to(log_q.dtype)
    # A padding entry must not meet a log-probability of -inf: 0 * inf is NaN.
    picked = log_q_NV.gather(-1, tokens).where(~is_set & (weights > 0), weights.new_zeros(()))
    losses = -(weights * picked).sum(-1)
    rows, entries = is_set.nonzero(as_tuple=True)
    if len(rows):
        masses = log_set_masses(log_q_NV[:, :size], rows, flat.ids[rows, entries] - size, sets.to(logits.device))
        losses = losses.index_add(0, rows, -weights[rows, entries] * masses)
    keep = kept_positions(log_q.shape[:-1], labels, ignore_index, logits.device)
    losses = losses.view(keep.shape)
    if ce_weight:
        token_losses = -log_q.gather(-1, safe_labels(labels, keep)[..., None])[..., 0]
        losses = torch.lerp(losses, token_losses, ce_weight)
    return reduce(losses * keep, keep, reduction, num_items_in_batch)


def log_set_masses(log_q_NV: Tensor, rows: Tensor, tokens: Tensor, sets: PrefixSets) -> Tensor:
    """[M] log q(C) in row `rows[m]` of the set of token `tokens[m]`.

    Every set of every row at once: membership has some entries a token only (its beginnings that are tokens), so the
    sums are a product with a sparse matrix, relative to the row's largest probability. The few that this loses to
    underflow are a log-sum-exp over the set's own tokens, one by one.
    """
    largest = log_q_NV.detach().amax(-1, keepdim=True)
    sums_VN = torch.sparse.mm(sets.membership(log_q_NV.dtype), (log_q_NV - largest).exp().T)
    picked = sums_VN[tokens, rows]
    seen = picked > _UNDERFLOW
    # where() twice: the logarithm of an underflow must not reach the gradient, not even times 0.
    found = picked.where(seen, picked.new_ones(())).log() + largest[rows, 0]
    if not seen.all():
        lost = (~seen).nonzero()[:, 0]
        found = found.index_copy(0, lost, log_set_masses_one_by_one(log_q_NV, rows[lost], tokens[lost], sets))
    return found


def log_set_masses_one_by_one(log_q_NV: Tensor, rows: Tensor, tokens: Tensor, sets: PrefixSets) -> Tensor:
    """The same, set by set: the readable twin."""
    parts = [
        log_q_NV[row, sets.order[sets.first[token] : sets.last[token]]].logsumexp(-1)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
    ]
    return torch.stack(parts)
