"""Position budget: which positions get targets when there is room for a share of them only.

A position with teacher entropy H (nats) is kept with probability π(H) and its targets weigh share/π, so the sum over
kept positions is, on average, share times that over all: the mean loss over kept positions estimates that over all, as
it does where all are kept alike. What is lost is noise: a position that is dropped loses its whole gradient g = q - p,
so its variance is (v + ‖g‖²)/π - ‖g‖² where it was v, the squared error of its draws.

The law is fixed before the first row: π = min(1, scale · size(H)), at least a quarter of the share, with a scale that
is calibrated on a few rows and kept in the manifest. It hangs on the position alone, never on a batch. π is one of
2^(-l/8) with a whole l, so that a stored weight is the exact inverse of the probability.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import RecipeError
from sparsekd.flat import SCALE_OCTAVE
from sparsekd.rng import Keys

# What a position's probability is in proportion to. Measured (docs/LOG.md): a sure teacher's positions are few and pull
# the student most, so at half the positions keeping those less often ("entropy") makes twice the noise of keeping all
# alike, and keeping them more often ("certainty") 0.8 of it.
LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": lambda entropy_N: entropy_N,
    "certainty": lambda entropy_N: 1 / (1 + entropy_N),
}
_LEAST = 0.25  # of the share: no weight is above 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLaw:
    """π(H) = clip(scale · size(H), share/4, 1) on a grid of 2^(-1/8); `by` is a name of LAWS."""

    by: str
    share: float
    scale: float

    def levels(self, entropy_N: Tensor) -> Tensor:
        """[N] uint8 l of π = 2^(-l/8)."""
        wanted = (LAWS[self.by](entropy_N.double()) * self.scale).clamp(_LEAST * self.share, 1)
        return (-SCALE_OCTAVE * wanted.log2()).round().to(torch.uint8)

    def kept(self, levels_N: Tensor, keys: Keys) -> Tensor:
        """[N] bool; a coin of (seed, row, position) decides."""
        return keys.coins() < inclusion(levels_N)


def inclusion(levels_N: Tensor) -> Tensor:
    """[N] float64 π = 2^(-l/8)."""
    return torch.exp2(-levels_N.double() / SCALE_OCTAVE)


def entropies(logits_NV: Tensor) -> Tensor:
    """[N] float32 nats: `-(p * p.log()).sum(-1)`."""
    return torch.special.entr(logits_NV.float().softmax(-1)).sum(-1)


def calibrate(entropy_N: Tensor, by: str, share: float) -> PositionLaw:
    """The law `by` (a name of LAWS) whose mean probability over these positions is the share; its scale has six digits.

    Raises:
        RecipeError: a share below 2^-29.
    """
    if share < 2**-29:
        raise RecipeError(f"positions={share} is too small a share for positions_by={by}: at least {2**-29:.1g}")
    low, high = 2.0**-40, 2.0**40
    for _ in range(60):
        middle = math.sqrt(low * high)
        law = PositionLaw(by=by, share=share, scale=middle)
        below = float(inclusion(law.levels(entropy_N)).mean()) < share
        low, high = (middle, high) if below else (low, middle)
    return PositionLaw(by=by, share=share, scale=float(f"{high:.6g}"))


def law_settings(law: PositionLaw) -> dict[str, Any]:
    """What a manifest's `capture` says of it."""
    return {"positions": law.share, "positions_by": law.by, "positions_scale": law.scale}


def law_of(capture: Mapping[str, Any]) -> PositionLaw | None:
    """The law that a manifest's `capture` names; None where all positions are kept, or a share of them evenly."""
    if "positions_by" not in capture:
        return None
    return PositionLaw(by=capture["positions_by"], share=capture["positions"], scale=capture["positions_scale"])
