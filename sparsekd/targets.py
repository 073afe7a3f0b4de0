"""The one noun: `SparseTargets`, a few weighted token ids that stand for a teacher's distribution.

Shapes: N positions, K kept ids, V vocabulary. Samplers return it, the codec stores it, losses take it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseTargets:
    """Weighted token ids for N positions; a weight of 0 is padding, so no mask is needed.

    Equals the dense `weights.new_zeros(N, V).scatter_add(-1, ids, weights)`. An unbiased sampler has
    E[densify] = teacher distribution. Weights need not sum to 1: the losses are exact for any sum.

    Attributes:
        ids: [..., K] int64, in [0, V); repeated ids add up.
        weights: [..., K] float, probabilities (not log-probabilities).
    """

    ids: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        if self.ids.shape != self.weights.shape:
            raise ValueError(
                f"ids and weights differ in shape: {tuple(self.ids.shape)} and {tuple(self.weights.shape)}"
            )

    @classmethod
    def of(cls, targets: Any) -> SparseTargets:
        """Anything with `.ids` and `.weights` (a cached row's numpy targets, for one) as tensors."""
        if isinstance(targets, cls):
            return targets
        return cls(ids=torch.as_tensor(targets.ids).long(), weights=torch.as_tensor(targets.weights).float())

    def densify(self, vocab_size: int) -> Tensor:
        """[..., V] float: the dense targets. For tests and toys: a cache's targets never need it."""
        dense = self.weights.new_zeros(*self.ids.shape[:-1], vocab_size)
        return dense.scatter_add(-1, self.ids, self.weights)

    def mass(self) -> Tensor:
        """[...] float: the sum of the weights; 1 minus it is the teacher mass that was left out."""
        return self.weights.sum(-1)

    def flatten(self) -> SparseTargets:
        """The same targets with all leading dimensions joined into one: ids [N, K]."""
        return SparseTargets(ids=self.ids.flatten(0, -2), weights=self.weights.flatten(0, -2))

    def to(self, device: torch.device | str) -> SparseTargets:
        """The same targets on another device."""
        return SparseTargets(
            ids=self.ids.to(device, non_blocking=True), weights=self.weights.to(device, non_blocking=True)
        )

    def __getitem__(self, index: Any) -> SparseTargets:
        """The targets of some positions (indexes the leading dimensions only)."""
        return SparseTargets(ids=self.ids[index], weights=self.weights[index])

    def __len__(self) -> int:
        return len(self.ids)
