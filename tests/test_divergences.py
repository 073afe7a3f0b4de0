"""Divergences: closed-form gradients in float64, zero at the teacher, and what sparse targets can and cannot give."""

from __future__ import annotations

import pytest
import torch
from test_losses import V, example, value_and_gradient

import sparsekd as skd
from sparsekd.divergences import DIVERGENCES, check_sparse_divergence, full_divergence, sparse_divergence
from sparsekd.targets import SparseTargets

BY_HAND = {
    "forward_kl": lambda p, t: p - t,
    "reverse_kl": lambda p, t: p * ((p / t).log() - (p * (p / t).log()).sum(-1, keepdim=True)),
    "forward_reverse_kl": lambda p, t: BY_HAND["forward_kl"](p, t) + BY_HAND["reverse_kl"](p, t),
    "l1": lambda p, t: p * ((p - t).sign() - (p * (p - t).sign()).sum(-1, keepdim=True)),
    "mse": lambda p, t: 2 * p * ((p - t) - (p * (p - t)).sum(-1, keepdim=True)),
}


def test_every_divergence_has_a_gradient_by_hand():
    assert BY_HAND.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_by_hand(divergence):
    """dL/dz equals the closed form to 1e-12, and vanishes with the loss at the teacher."""
    logits, teacher = example()[0], example(seed=1)[0]
    _, gradient = value_and_gradient(full_divergence, logits, teacher, divergence, reduction="sum")
    torch.testing.assert_close(
        gradient, BY_HAND[divergence](logits.softmax(-1), teacher.softmax(-1)), atol=1e-12, rtol=0
    )
    loss, gradient = value_and_gradient(full_divergence, teacher, teacher.clone(), divergence)
    assert abs(loss) < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("divergence", ["forward_kl", "mse"])
def test_sparse_equals_full_with_all_ids_and_on_average(divergence):
    """With all ids it is the full divergence; with sampled ids the gradient is right on average (5 standard errors)."""
    logits, teacher = example()[0][:1], example(seed=1)[0][:1]
    everything = SparseTargets(ids=torch.arange(V)[None], weights=teacher.softmax(-1))
    full = value_and_gradient(full_divergence, logits, teacher, divergence)
    torch.testing.assert_close(value_and_gradient(sparse_divergence, logits, everything, divergence), full)
    many = skd.sample(teacher.expand(4000, -1), "random_sampling", rounds=5)
    _, gradients = value_and_gradient(sparse_divergence, logits.expand(4000, -1), many, divergence, reduction="sum")
    error = gradients.std(0) / 4000**0.5
    judged = teacher.softmax(-1)[0] * 5 * 4000 >= 20  # rarer ids are Poisson: 5 sigma says nothing there
    assert judged.sum() > 30
    assert ((gradients.mean(0) - full[1][0]).abs() <= 5 * error + 1e-9)[judged].all()


@pytest.mark.parametrize(
    ("divergence", "words"),
    [
        ("reverse_kl", "infinite wherever the student puts mass on an id outside"),
        ("forward_reverse_kl", "its reverse part is infinite"),
        ("l1", "the sign of p - t"),
        ("kl", "is not one of forward_kl, reverse_kl"),
    ],
)
def test_what_sparse_targets_cannot_give_is_refused(divergence, words):
    with pytest.raises(ValueError, match=words):
        check_sparse_divergence(divergence)


def test_reverse_kl_is_finite_where_the_student_has_no_mass():
    """0 log 0 counts as 0, on either side."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    teacher = torch.tensor([[0.5, 0.0, 1.0]])
    assert torch.isfinite(full_divergence(logits, teacher, "reverse_kl"))
    assert torch.isfinite(full_divergence(teacher, logits, "forward_kl"))
