"""What a sampler costs in fidelity, exactly: E‖t̂ - p‖² from a given p in closed form, without drawing.

Shapes: N positions, V vocabulary. R is a sampler's number of rounds, q ∝ p^t its proposal.

A loss's gradient is linear in the targets t̂, so an unbiased sampler keeps its mean, and its noise is the covariance of
t̂ seen through the student. In logit space that is E‖t̂ - p‖² itself, whatever the dependence between ids; at the
head's weight W it is Σ over positions of ‖h‖² E‖t̂ - p‖² (positions draw independently), see `head_noise`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import RecipeError
from sparsekd.samplers import check_parameters, default_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """What a sampler does to N positions, on average over its draws.

    Attributes:
        mean_NV: E[t̂], the dense targets on average: p itself when the sampler is unbiased.
        variance: [N] Σ over ids of Var[t̂_i].
        bias: [N] ‖E[t̂] - p‖².
        ids: [N] expected number of distinct ids, what is stored; `raw24` takes 3 bytes each.
    """

    mean_NV: Tensor
    variance: Tensor
    bias: Tensor
    ids: Tensor

    @property
    def squared_error(self) -> Tensor:
        """[N] E‖t̂ - p‖² = variance + bias."""
        return self.variance + self.bias


def fidelity(p_NV: Tensor, sampler: str, **parameters: Any) -> Fidelity:
    """The exact fidelity of `sample(p_NV.log(), sampler, **parameters)`, in float64.

    `fidelity(p, ...).squared_error` equals the mean over seeds of `((targets.densify(V) - p) ** 2).sum(-1)`, and `.ids`
    that of `(targets.weights > 0).sum(-1)`.

    Raises:
        RecipeError: unknown sampler or parameter; or self-normalised importance weights, which have no closed form.
    """
    check_parameters(sampler, parameters)
    return FIDELITY[sampler](p_NV.double(), **(default_parameters(sampler) | parameters))


def _random_sampling(p_NV: Tensor, *, rounds: int, temperature: float, normalize: bool) -> Fidelity:
    """Multinomial counts: Var[c_i] = R q (1 - q), each worth p / (R q)."""
    _check_plain(temperature, normalize)
    q_NV = _proposal(p_NV, temperature)
    variance = (p_NV.square() * (1 / q_NV - 1)).where(q_NV > 0, 0).sum(-1) / rounds
    ids = -torch.expm1(rounds * torch.log1p(-q_NV)).sum(-1)
    return _unbiased(p_NV, variance, ids)


def _systematic(p_NV: Tensor, *, rounds: int, temperature: float, normalize: bool) -> Fidelity:
    """Counts are R q rounded down or up: Var[c_i] = f (1 - f), f = frac(R q), each worth p / (R q)."""
    _check_plain(temperature, normalize)
    expected_NV = rounds * _proposal(p_NV, temperature)
    f_NV = expected_NV.frac()
    worth_NV = (p_NV / expected_NV).where(expected_NV > 0, 0)
    variance = (worth_NV.square() * f_NV * (1 - f_NV)).sum(-1)
    return _unbiased(p_NV, variance, expected_NV.clamp(max=1).sum(-1))


def _top_k(p_NV: Tensor, *, k: int) -> Fidelity:
    """No draws: the mass of the ids that are left out is the error."""
    kept = p_NV.topk(min(k, p_NV.shape[-1]), dim=-1)
    return _deterministic(p_NV, torch.zeros_like(p_NV).scatter_(-1, kept.indices, kept.values))


def _top_p(p_NV: Tensor, *, p: float, k: int) -> Fidelity:
    kept = p_NV.topk(min(k, p_NV.shape[-1]), dim=-1)
    values = kept.values * (kept.values.cumsum(-1) - kept.values < p)
    return _deterministic(p_NV, torch.zeros_like(p_NV).scatter_(-1, kept.indices, values))


def _full(p_NV: Tensor) -> Fidelity:
    return _deterministic(p_NV, p_NV)


# One closed form for each of SAMPLERS; a test draws from each and compares.
FIDELITY: dict[str, Callable[..., Fidelity]] = {
    "random_sampling": _random_sampling,
    "systematic": _systematic,
    "top_k": _top_k,
    "top_p": _top_p,
    "full": _full,
}


def head_noise(squared_error: Tensor, hidden_NH: Tensor) -> Tensor:
    """E‖G(t̂) - E[G(t̂)]‖² for the gradient G = Σₙ (mₙ qₙ - t̂ₙ) hₙᵀ of a loss in its head's weight, mₙ = 1.

    Equals Σₙ ‖hₙ‖² · variance; exact because positions draw independently, whatever ids of one position do.
    """
    return (squared_error * hidden_NH.double().square().sum(-1)).sum()


def _proposal(p_NV: Tensor, temperature: float) -> Tensor:
    """q ∝ p^t on p's support."""
    if temperature == 1:
        return p_NV
    mass = p_NV.pow(temperature).where(p_NV > 0, 0)
    return mass / mass.sum(-1, keepdim=True)


def _check_plain(temperature: float, normalize: bool) -> None:
    if temperature != 1 and normalize:
        raise RecipeError(
            f"the error of self-normalised draws (sampler.temperature={temperature}) has no closed form; "
            "take sampler.normalize=false"
        )


def _unbiased(p_NV: Tensor, variance: Tensor, ids: Tensor) -> Fidelity:
    return Fidelity(mean_NV=p_NV, variance=variance, bias=torch.zeros_like(variance), ids=ids)


def _deterministic(p_NV: Tensor, targets_NV: Tensor) -> Fidelity:
    bias = (targets_NV - p_NV).square().sum(-1)
    ids = (targets_NV > 0).sum(-1).double()
    return Fidelity(mean_NV=targets_NV, variance=torch.zeros_like(bias), bias=bias, ids=ids)
