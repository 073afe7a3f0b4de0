"""Closed forms of fidelity, each against draws of the sampler that it describes."""

from __future__ import annotations

import pytest
import torch
from test_samplers import VARIANTS

import sparsekd as skd
from sparsekd import variance
from sparsekd.errors import RecipeError

CLOSED = [name for name in VARIANTS if not name.endswith("_normalized")]


def logits_of(scale: float) -> torch.Tensor:
    """Three rows of 120 logits with some ids impossible."""
    logits = scale * torch.randn(3, 120, generator=torch.Generator().manual_seed(0))
    logits[:, ::7] = -torch.inf
    return logits


@pytest.mark.parametrize("variant", CLOSED)
def test_error_bias_and_ids_equal_those_of_draws(variant):
    """E‖t̂ - p‖², E[t̂] and the number of ids are within 5 standard errors of 4,000 draws, and float32's rounding."""
    sampler, parameters = VARIANTS[variant]
    for logits in logits_of(2.0):
        p = logits.double().softmax(-1)
        found = variance.fidelity(p[None], sampler, **parameters)
        targets = skd.sample(logits.expand(4000, -1), sampler, seed=11, **parameters)
        dense = targets.densify(120).double()
        for closed, drawn in (
            (found.squared_error, (dense - p).square().sum(-1)),
            (found.ids, (targets.weights > 0).sum(-1).double()),
        ):
            assert abs(closed - drawn.mean()) <= 5 * drawn.std() / 4000**0.5 + 2e-6 * closed + 1e-12
        slack = 5 * dense.std(0) / 4000**0.5 + 1e-6
        assert ((dense.mean(0) - found.mean_NV[0]).abs() <= slack)[p > 1e-3].all()


def test_every_sampler_has_a_closed_form():
    assert set(variance.FIDELITY) == set(skd.SAMPLERS)


def test_by_hand():
    """p = (0.6, 0.3, 0.1), R = 5: 5p = (3, 1.5, 0.5), so systematic errs by (0 + 0.25 + 0.25) / 25 with 2.5 ids;
    5 draws with replacement by (1 - 0.46) / 5; the largest alone misses 0.3² + 0.1²."""
    p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    even, drawn = (variance.fidelity(p, name, rounds=5) for name in ("systematic", "random_sampling"))
    assert even.squared_error.tolist() == pytest.approx([0.02], rel=1e-12)
    assert even.ids.tolist() == pytest.approx([2.5], rel=1e-12)
    assert drawn.squared_error.tolist() == pytest.approx([0.108], rel=1e-12)
    assert drawn.ids.tolist() == pytest.approx([3 - 0.4**5 - 0.7**5 - 0.9**5], rel=1e-12)
    assert variance.fidelity(p, "top_k", k=1).bias.tolist() == pytest.approx([0.1], rel=1e-12)
    halves = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)  # 0.5 is reached by one id, 0.51 by two
    for mass, left_out in ((0.5, 2 / 16), (0.51, 1 / 16), (1.0, 0)):
        assert variance.fidelity(halves, "top_p", p=mass, k=3).bias.tolist() == [left_out]


@pytest.mark.parametrize("rounds", [1, 7, 50, 1000])
def test_systematic_never_errs_more_than_draws_with_replacement(rounds):
    """At the same number of rounds, position by position; with one round they are the same law."""
    p = logits_of(3.0).double().softmax(-1)
    even, drawn = (variance.fidelity(p, name, rounds=rounds) for name in ("systematic", "random_sampling"))
    assert (even.squared_error <= drawn.squared_error * (1 + 1e-12)).all()
    assert (even.squared_error < drawn.squared_error * 0.99).all() == (rounds > 1)


def test_head_noise_is_that_of_gradients():
    """The squared distance of drawn from full gradients in the head's weight, over 3,000 draws of 3 positions."""
    logits, hidden = logits_of(2.0), torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    p = logits.double().softmax(-1)
    noise = []
    for seed in range(3000):
        drawn = skd.sample(logits, "systematic", rounds=4, seed=seed).densify(120).double()
        noise.append(float(((drawn - p).T @ hidden).square().sum()))
    noise = torch.tensor(noise)
    closed = variance.head_noise(variance.fidelity(p, "systematic", rounds=4).squared_error, hidden)
    assert abs(closed - noise.mean()) <= 5 * noise.std() / 3000**0.5


def test_self_normalised_weights_are_refused():
    """No closed form: an error, not a number that is nearly right."""
    with pytest.raises(RecipeError, match=r"temperature=0.8\) has no closed form; take sampler.normalize=false"):
        variance.fidelity(torch.full((1, 4), 0.25), "random_sampling", temperature=0.8)
