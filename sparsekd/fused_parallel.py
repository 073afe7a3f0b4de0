"""A head whose vocabulary is split over processes: each holds V / world rows, and no process sees the others' logits.

Shapes: C rows of a chunk, J reads of a row. What travels is one all-gather a chunk of a few numbers a row
(largest logit, sum of exponentials, Σ sparse z), one of a number an entry that is a set, and, once a step, the sum of
dhidden.

`gathered` is the other way to hold parts, FSDP2's: the whole head is put together for the step, each process has its
own positions.

    shard = VocabularyShard(group=group, start=rank * V // world, vocab_size=V)
    fused_linear_sparse_kl(hidden, own_rows_of_head, targets, shard=shard)        # the same loss in every process
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.prefix_sets import SetsSeen
from sparsekd.row_losses import Rows, Seen

# What is known of a row after one pass over its logits, and travels.
NUMBERS = ("largest", "total", "dot", "hard_total", "rest")


def gathered(tensor: Any) -> Any:
    """The whole of a parameter that is a DTensor (FSDP2 of the head as a group of its own); any other as it is.

    Equals `tensor.full_tensor()`, whose gradient goes back to the parts as the mean over the processes: what FSDP2 does
    with every parameter, and no change where all processes made the same (a tensor-parallel head).
    """
    if not hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    whole = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:  # divided before it is summed: gloo has no mean
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VocabularyShard:
    """Which ids a process's rows of the head are.

    All processes of the group pass the same hidden states and targets; each gets the whole loss, the whole gradient of
    the hidden states and the gradient of its own rows.

    Attributes:
        group: process group over which the vocabulary is split; None for the default group.
        start: id of the first own row.
        vocab_size: V of all processes together.
    """

    start: int
    vocab_size: int
    group: Any = None

    def own(self, rows: Rows, count: int) -> Rows:
        """`rows` with what the own ids [start, start + count) have: others' entries count 0; sums stay those of all."""
        if self.start < 0 or self.start + count > self.vocab_size:
            raise ValueError(
                f"own rows [{self.start}, {self.start + count}) lie outside the vocabulary [0, {self.vocab_size})"
            )
        own = (rows.ids >= self.start) & (rows.ids < self.start + count)
        return replace(
            rows,
            ids=(rows.ids - self.start).where(own, torch.zeros_like(rows.ids)),
            sparse=rows.sparse * own,
            kept=None if rows.kept is None else rows.kept & own,
            sets=None if rows.sets is None else rows.sets.within(self.start, count),
        )

    def merge(self, seens: list[Seen], temperature: float) -> list[Seen]:
        """The findings of all tiles of a chunk, over all processes: one all-gather of [C, 3 to 5] numbers."""
        names = [name for name in NUMBERS if getattr(seens[0], name) is not None]
        own_NC = torch.stack([torch.cat([getattr(seen, name) for seen in seens]) for name in names])
        parts = [torch.empty_like(own_NC) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own_NC, group=self.group)
        found = [dict(zip(names, part, strict=True)) for part in parts]
        whole = {name: torch.stack([part[name] for part in found]) for name in names}
        largest = whole["largest"].amax(0)
        soft = (whole["largest"] - largest).exp()
        hard = soft if temperature == 1 else (temperature * (whole["largest"] - largest)).exp()
        factors = {"total": soft, "rest": soft, "hard_total": hard, "dot": torch.ones_like(soft)}
        sums = {name: (whole[name] * factors[name]).sum(0) for name in names if name != "largest"}
        rank = dist.get_rank(self.group)
        sizes = [len(seen.largest) for seen in seens]
        sums |= {"largest": largest}
        split = [
            dict(zip(sums, part, strict=True)) for part in zip(*(x.split(sizes) for x in sums.values()), strict=True)
        ]
        units = zip(soft[rank].split(sizes), hard[rank].split(sizes), strict=True)
        return [
            replace(
                seen,
                **part,
                unit=seen.unit * own,
                hard_unit=None if seen.hard_unit is None else seen.hard_unit * own_hard,
                sets=sets,
            )
            for seen, part, (own, own_hard), sets in zip(seens, split, units, self._merge_sets(seens), strict=True)
        ]

    def _merge_sets(self, seens: list[Seen]) -> list[SetsSeen | None]:
        """What was read of sets, over all processes: one more all-gather of a number an entry, where there are any."""
        found = [seen.sets for seen in seens if seen.sets is not None]
        if not found:
            return [None] * len(seens)
        own_M = torch.cat([each.lse for each in found])
        parts = [torch.empty_like(own_M) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own_M, group=self.group)
        whole = torch.stack(parts).logsumexp(0).split([len(each.lse) for each in found])
        return [
            replace(each, lse=lse, unit=each.unit * (each.lse - lse).exp())
            for each, lse in zip(found, whole, strict=True)
        ]

    def add_up(self, grad_hidden: Tensor) -> None:
        """Sum over processes, in place."""
        dist.all_reduce(grad_hidden, group=self.group)
