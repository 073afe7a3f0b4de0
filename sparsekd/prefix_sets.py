"""Targets that are sets: all of a student's tokens that a draw may become, where it says no more than that.

A set is written as an id: V + s stands for set s of a table of S sets, V + S + s for the same set as a condition. Ids
below V are tokens as ever, so ordinary targets pay nothing, and a sampler, a codec and a cache carry all of them alike.
With z the student's logits, q = softmax(z / T), t the weights of tokens, t_C of sets C and m_C of conditions:

    loss        =  - Σ t_v log q_v  -  Σ (t_C - m_C) log q(C),     q(C) = Σ_{v in C} q_v
    T dloss/dz  =  S q - t - Σ_C (t_C - m_C) q 1_C / q(C),         S = Σ t_v + Σ t_C - Σ m_C

So a set is a target whose weight the student itself spreads over its tokens, and is subtracted from the softmax where
tokens are. A token with weight m and its set as a condition with weight m are - m log q(v | C), which says nothing of
q(C) itself. `redraw` says what they are for. Sets may lie inside one another.

Shapes: C rows, V vocabulary, K kept ids, M entries that are sets, E their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekd.targets import SparseTargets


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

    def within(self, start: int, count: int) -> PrefixSets:
        """What the sets have of the tokens [start, start + count), which become 0, 1, ...; sets may be empty then."""
        own = (self.order >= start) & (self.order < start + count)
        before = torch.nn.functional.pad(own.cumsum(0), (1, 0))
        first, last = before[self.first], before[self.last]
        return PrefixSets(vocab_size=count, order=self.order[own] - start, first=first, last=last)

    def sizes(self, index: Tensor) -> Tensor:
        """[M] how many tokens some sets have."""
        return self.last.index_select(0, index) - self.first.index_select(0, index)

    def tokens(self, index: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
        """(which of the sets [E], token [E]): the tokens of some sets [M], one set after another.

        With `count` = E nothing waits for a device.
        """
        sizes = self.sizes(index)
        begins = self.first.index_select(0, index) - (sizes.cumsum(0) - sizes)
        which = torch.repeat_interleave(sizes, output_size=count)
        places = begins.index_select(0, which).add_(torch.arange(len(which), device=which.device))
        return which, self.order.index_select(0, places)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetEntries:
    """The entries of C rows that are sets, one row after another.

    Attributes:
        sets: what they stand for.
        row, index, signed: [M] whose they are, which set, and t_C or - m_C.
        cuts: C + 1 times [entries, tokens of entries] before a row, up to a constant; on the host, so that a part of
            the rows is found without waiting for a device.
    """

    sets: PrefixSets
    row: Tensor
    index: Tensor
    signed: Tensor
    cuts: list[list[int]]

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, part: slice) -> SetEntries:
        start, stop, _ = part.indices(len(self))
        cuts = self.cuts[start : stop + 1]
        span = slice(cuts[0][0] - self.cuts[0][0], cuts[-1][0] - self.cuts[0][0])
        row, index, signed = self.row[span] - start, self.index[span], self.signed[span]
        return SetEntries(sets=self.sets, row=row, index=index, signed=signed, cuts=cuts)

    def sums(self, values: Tensor) -> Tensor:
        """[C] the sum of something [M] over each row's entries."""
        return values.new_zeros(len(self)).index_add_(0, self.row, values)

    def within(self, start: int, count: int) -> SetEntries:
        """The same entries for a process that has the tokens [start, start + count)."""
        return _entries(self.sets.within(start, count), self.row, self.index, self.signed, len(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class SetsSeen:
    """What was read of the sets of some rows; of a part of the vocabulary, or (see `fused_parallel`) of all of it.

    Attributes:
        lse: [M] log Σ_{v in C} exp(z_v / T).
        unit: [M] what `shares` of its set must be multiplied by to be q_v / q(C).
        shares: [E] exp(z_v / T - largest of the set).
        which, at: [E] the entry of each token, and its place in the flat [C, V].
    """

    lse: Tensor
    unit: Tensor
    shares: Tensor
    which: Tensor
    at: Tensor


def take_apart(targets: SparseTargets, sets: PrefixSets) -> tuple[SparseTargets, SetEntries]:
    """Targets [C, K] as tokens (weight 0 where the entry is a set) and as sets. Waits for an accelerator."""
    is_set = targets.ids >= sets.vocab_size
    row, place = (is_set & (targets.weights > 0)).nonzero(as_tuple=True)
    index, weights = targets.ids[row, place] - sets.vocab_size, targets.weights[row, place]
    given = index >= len(sets)
    tokens = SparseTargets(ids=targets.ids.masked_fill(is_set, 0), weights=targets.weights.masked_fill(is_set, 0))
    index, signed = index - len(sets) * given, weights.where(~given, -weights)
    if len(index) and (beyond := int(index.max())) >= len(sets):
        last = sets.vocab_size + 2 * len(sets) - 1
        raise ValueError(f"targets name id {last + 1 + beyond - len(sets)}, tokens and sets end at {last}; other sets?")
    return tokens, _entries(sets, row, index, signed, len(targets))


def _entries(sets: PrefixSets, row: Tensor, index: Tensor, signed: Tensor, count: int) -> SetEntries:
    counts = torch.zeros(2, count + 1, dtype=torch.long, device=row.device)
    for each, values in zip(counts, (torch.ones_like(row), sets.sizes(index)), strict=True):
        each[1:].scatter_add_(0, row, values)
    return SetEntries(sets=sets, row=row, index=index, signed=signed, cuts=counts.cumsum(1).T.tolist())


def read_sets(logits_CV: Tensor, entries: SetEntries) -> SetsSeen:
    """Log-sum-exps of z / T over the rows' sets, each over its own tokens: a difference of sums loses small masses."""
    which, tokens = entries.sets.tokens(entries.index, entries.cuts[-1][1] - entries.cuts[0][1])
    at = (entries.row * logits_CV.shape[-1]).index_select(0, which).add_(tokens)
    shares = logits_CV.view(-1).index_select(0, at)
    lse, unit = within_sets_(shares, which, len(entries.row))
    return SetsSeen(lse=lse, unit=unit, shares=shares, which=which, at=at)


def within_sets_(logits_E: Tensor, which: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exps [M] of z / T [E] over the entry that each is `which` of; z / T becomes `SetsSeen.shares`, and the
    second result is its `unit`."""
    lowest = logits_E.new_full((count,), torch.finfo(logits_E.dtype).min)  # where all of a set's logits are -inf
    largest = lowest.scatter_reduce_(0, which, logits_E, "amax")
    logits_E.sub_(largest.index_select(0, which)).exp_()
    sums = torch.zeros_like(largest).scatter_add_(0, which, logits_E)
    return largest + sums.log(), sums.clamp(min=torch.finfo(sums.dtype).tiny).reciprocal()


def subtract_sets_(grad_CV: Tensor, entries: SetEntries, seen: SetsSeen, scale: Tensor) -> None:
    """grad_CV -= scale [C] times Σ_C (t_C - m_C) q 1_C / q(C)."""
    factors = scale.index_select(0, entries.row) * entries.signed * seen.unit
    grad_CV.view(-1).scatter_add_(0, seen.at, factors.neg_().index_select(0, seen.which).mul_(seen.shares))
