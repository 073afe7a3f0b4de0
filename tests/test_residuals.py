"""Treatments of the missing mass: each against its dense formula in float64 autograd, and its own closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_losses import N, V, example, value_and_gradient

import sparsekd as skd
from sparsekd.residuals import RESIDUALS, hard_token_weights
from sparsekd.targets import SparseTargets


def dense_treated(residual, targets, labels):
    """[N, V] the treated target by the definition in the paper; ghost has none."""
    t = targets.densify(V)
    rest = (1 - t.sum(-1, keepdim=True)).clamp(min=0)
    return {
        "none": lambda: t,
        "renormalize": lambda: t / t.sum(-1, keepdim=True),
        "smooth": lambda: t + rest / V,
        "label": lambda: t + rest * F.one_hot(labels.clamp(min=0), V),
    }[residual]()


def dense_loss(logits, targets, labels, residual, ce_weight=0.0, temperature=1.0, z_loss=0.0):
    log_p = (logits / temperature).log_softmax(-1)
    if residual == "ghost":
        t, kept = targets.densify(V), targets.densify(V) > 0
        inside = (torch.xlogy(t, t) - t * log_p).sum(-1)
        outside = log_p.masked_fill(kept, -torch.inf).logsumexp(-1)
        rest = 1 - t.sum(-1)
        kd = inside + torch.xlogy(rest, rest) - rest * outside
    else:
        t = dense_treated(residual, targets, labels)
        kd = (torch.xlogy(t, t) - t * log_p).sum(-1)
    loss = (1 - ce_weight) * temperature**2 * kd + z_loss * logits.logsumexp(-1) ** 2
    if ce_weight:
        loss = loss + ce_weight * F.cross_entropy(logits, labels, reduction="none")
    return loss * (labels != -100)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce_weight": 0.3},
        {"temperature": 2.0},
        {"ce_weight": 0.3, "temperature": 2.0, "z_loss": 0.01},
        {"ce_weight": 0.2, "z_loss": 0.01},
    ],
)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_gradient_is_that_of_the_dense_formula(residual, options):
    """Value and gradient equal float64 autograd of the definition to 1e-12, on logits and from hidden states."""
    logits, targets, labels = example(mass=0.6)
    labels[0] = targets.ids[0, 0]  # the true token among the kept ids
    targets.ids[targets.weights == 0], labels[3] = 0, 0  # and one that is the id of padding
    args = {"labels": labels, "residual": residual, **options}
    ours = value_and_gradient(skd.sparse_kl, logits, targets, reduction="none", **args)
    want = value_and_gradient(dense_loss, logits, targets, **args)
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=0)
    eye = torch.eye(V, dtype=torch.float64)
    fused = value_and_gradient(skd.fused_linear_sparse_kl, logits, eye, targets, reduction="sum", chunk_rows=4, **args)
    torch.testing.assert_close(fused[1], want[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(fused[0], want[0].sum(), atol=1e-12, rtol=0)


def test_ghost_token_closed_form():
    """Appendix A.5: kept ids get p - t, the others p (S - P) / (1 - P)."""
    logits, targets, _ = example(mass=0.7)
    _, gradient = value_and_gradient(skd.sparse_kl, logits, targets, residual="ghost", reduction="sum")
    p, t = logits.softmax(-1), targets.densify(V)
    kept = t > 0
    inside = (p * kept).sum(-1, keepdim=True)
    by_hand = torch.where(kept, p - t, p * (0.7 - inside) / (1 - inside))
    torch.testing.assert_close(gradient, by_hand, atol=1e-12, rtol=0)


def test_ghost_token_of_targets_above_one_is_the_plain_loss():
    """Where the targets sum to 1.7 nothing is missing: dL/dz = S p - t."""
    logits, targets, _ = example(mass=1.7)
    plain = value_and_gradient(skd.sparse_kl, logits, targets, reduction="sum")
    ghost = value_and_gradient(skd.sparse_kl, logits, targets, residual="ghost", reduction="sum")
    torch.testing.assert_close(ghost, plain, atol=1e-12, rtol=0)


def test_ghost_token_stays_exact_when_the_student_puts_nearly_all_inside():
    """With 1 - P = 1e-9, float32 loses nothing: the mass outside is summed, not subtracted."""
    logits = torch.full((1, V), -21.0)
    logits[0, 0] = 0.0
    targets = SparseTargets(ids=torch.tensor([[0]]), weights=torch.tensor([[0.9]]))
    loss, gradient = value_and_gradient(skd.sparse_kl, logits, targets, residual="ghost")
    exact = value_and_gradient(skd.sparse_kl, logits.double(), targets, residual="ghost")
    torch.testing.assert_close(loss.double(), exact[0], rtol=5e-7, atol=0)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=3e-6, atol=0)


@pytest.mark.parametrize("residual", [name for name in RESIDUALS if name != "none"])
def test_zero_at_its_own_optimum(residual):
    """Where the student matches what the treatment asks for, the loss is 0 and the gradient vanishes."""
    _, targets, labels = example(mass=0.6)
    labels = labels.clamp(min=0)
    if residual == "ghost":  # the kept ids right, the others in any proportion
        t = targets.densify(V)
        others = torch.rand(N, V, dtype=torch.float64) * (t == 0)
        optimum = t + 0.4 * others / others.sum(-1, keepdim=True)
    else:
        optimum = dense_treated(residual, targets, labels)
    loss, gradient = value_and_gradient(
        skd.sparse_kl, optimum.log().clamp(min=-700), targets, labels=labels, residual=residual
    )
    assert abs(loss) < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("residual", RESIDUALS)
def test_full_targets_need_no_treatment(residual):
    """When nothing is missing, all treatments are the plain loss."""
    logits, targets, labels = example(mass=1.0)
    labels = labels.clamp(min=0)
    plain = value_and_gradient(skd.sparse_kl, logits, targets)
    treated = value_and_gradient(skd.sparse_kl, logits, targets, labels=labels, residual=residual)
    torch.testing.assert_close(treated, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_positions_without_targets_cost_nothing(residual):
    """A row of padding (an unsupervised position) has loss 0 and gradient 0 under every treatment."""
    logits, targets, labels = example()
    empty = SparseTargets(ids=torch.zeros_like(targets.ids), weights=torch.zeros_like(targets.weights))
    loss, gradient = value_and_gradient(skd.sparse_kl, logits, empty, labels=labels.clamp(min=0), residual=residual)
    assert loss == 0
    assert (gradient == 0).all()


def test_unknown_residual_names_the_known_ones():
    logits, targets, _ = example()
    with pytest.raises(ValueError, match="residual='tail' is not one of none, renormalize, smooth, ghost, label"):
        skd.sparse_kl(logits, targets, residual="tail")
    with pytest.raises(ValueError, match="residual='label' need labels"):
        skd.sparse_kl(logits, targets, residual="label")


def test_hard_tokens_take_the_ratio_and_keep_the_average():
    """Hard tokens weigh `ratio` times the easy ones, the mean over supervised positions is 1, ignored ones are 0."""
    _, targets, labels = example()
    labels = torch.where(torch.arange(N) % 2 == 0, targets.ids[:, 0], labels)
    factors = hard_token_weights(targets, labels, ratio=3.0)
    keep = labels != -100
    assert abs(factors[keep].mean() - 1) < 1e-6
    assert (factors[~keep] == 0).all()
    low, high = factors[keep].unique()
    assert abs(high / low - 3) < 1e-5
    score = (targets.weights * (targets.ids == labels[:, None])).sum(-1)
    assert score[factors == high].max() <= score[factors == low].min()
    torch.testing.assert_close(hard_token_weights(targets, labels, ratio=1.0), keep.float())


def test_tokens_that_are_equally_hard_are_all_hard():
    """Where the targets say nothing of most true tokens, these are the hard ones, though more than half."""
    labels = torch.arange(10)
    ids = torch.where(labels < 7, labels + 50, labels)[:, None]
    factors = hard_token_weights(SparseTargets(ids=ids, weights=torch.ones(10, 1)), labels, ratio=3.0)
    torch.testing.assert_close(factors, torch.tensor([3.0] * 7 + [1.0] * 3) * 10 / 24, rtol=1e-6, atol=0)


def test_token_weights_scale_losses_and_gradients():
    """Factors multiply each position's loss and gradient, on logits and from hidden states alike."""
    logits, targets, labels = example()
    factors = torch.rand(N, dtype=torch.float64)
    none, _ = value_and_gradient(skd.sparse_kl, logits, targets, labels=labels, reduction="none")
    args = {"labels": labels, "token_weights": factors, "reduction": "sum"}
    loss, gradient = value_and_gradient(skd.sparse_kl, logits, targets, **args)
    torch.testing.assert_close(loss, (none * factors).sum(), rtol=1e-14, atol=0)
    plain = value_and_gradient(skd.sparse_kl, logits, targets, labels=labels, reduction="sum")[1]
    torch.testing.assert_close(gradient, plain * factors[:, None], rtol=0, atol=1e-14)
    eye = torch.eye(V, dtype=torch.float64)
    fused = value_and_gradient(skd.fused_linear_sparse_kl, logits, eye, targets, **args)
    torch.testing.assert_close(fused, (loss, gradient), atol=1e-12, rtol=0)
