"""Losses: hand-written gradients against float64 autograd on the dense formula, and the zero of every loss."""

from __future__ import annotations

import dataclasses

import oracles
import pytest
import torch

import sparsekd as skd
from sparsekd import row_losses
from sparsekd.targets import SparseTargets

N, V, K = 13, 97, 5


def example(dtype=torch.float64, mass=1.0, seed=0):
    """Logits, targets of the given mass (with padding in some rows), labels with ignored positions."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(N, V, generator=generator, dtype=torch.float64)).to(dtype)
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    weights = torch.rand(N, K, generator=generator, dtype=torch.float64) + 0.01
    weights[::3, -2:] = 0
    weights = mass * weights / weights.sum(-1, keepdim=True)
    labels = torch.randint(V, (N,), generator=generator)
    labels[1::4] = -100
    return logits, SparseTargets(ids=ids, weights=weights), labels


OPTIONS = {
    "plain": {},
    "mixed": {"ce_weight": 0.3},
    "only_ce": {"ce_weight": 1.0},
    "hot": {"temperature": 2.5},
    "cold_mixed": {"temperature": 0.7, "ce_weight": 0.25},
    "z": {"z_loss": 0.01},
    "all": {"temperature": 1.5, "ce_weight": 0.25, "z_loss": 0.02},
}
LOSSES = {"sparse_kl": (skd.sparse_kl, True), "sparse_ce": (skd.sparse_ce, False)}


def value_and_gradient(function, logits, *args, **kwargs):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("mass", [1.0, 0.4, 1.7])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_that_of_the_dense_formula(loss, option, mass):
    """Value and gradient equal float64 autograd to 1e-12, whatever the targets sum to (paper, eq. 4)."""
    function, entropy = LOSSES[loss]
    logits, targets, labels = example(mass=mass)
    got = value_and_gradient(function, logits, targets, labels=labels, reduction="none", **OPTIONS[option])
    want = value_and_gradient(oracles.dense_loss, logits, targets, labels=labels, entropy=entropy, **OPTIONS[option])
    torch.testing.assert_close(got[0], want[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(got[1], want[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_the_dense_twin(dtype, option):
    """Against float64 truth, ours may err as much as plain torch in the same dtype, plus a rounding."""
    logits, targets, labels = example(dtype)
    truth = value_and_gradient(oracles.dense_loss, logits.double(), targets, labels=labels, **OPTIONS[option])
    plain = value_and_gradient(oracles.dense_loss, logits, targets, labels=labels, **OPTIONS[option])
    ours = value_and_gradient(skd.sparse_kl, logits, targets, labels=labels, reduction="none", **OPTIONS[option])
    for index in (0, 1):
        scale = truth[index].abs().max()
        slack = 4 * torch.finfo(dtype if index else torch.float32).eps * scale
        allowed = (plain[index].double() - truth[index]).abs().max() + slack
        assert (ours[index].double() - truth[index]).abs().max() <= allowed


def test_gradient_is_mass_times_p_minus_t():
    """dL/dz = (Σt) p - t, by hand, for targets that sum to 0.4 (paper, eq. 5)."""
    logits, targets, _ = example(mass=0.4)
    _, gradient = value_and_gradient(skd.sparse_kl, logits, targets, reduction="sum")
    by_hand = 0.4 * logits.softmax(-1) - targets.densify(V)
    torch.testing.assert_close(gradient, by_hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_zero_at_the_teacher(temperature):
    """With the teacher's own logits and full targets, value and gradient vanish."""
    logits, _, _ = example()
    targets = SparseTargets(ids=torch.arange(V).expand(N, V), weights=(logits / temperature).softmax(-1))
    loss, gradient = value_and_gradient(skd.sparse_kl, logits, targets, temperature=temperature)
    assert abs(loss) < 1e-12
    assert gradient.abs().max() < 1e-12
    loss, gradient = value_and_gradient(skd.full_kl, logits, logits.clone(), temperature=temperature)
    assert abs(loss) < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("option", [name for name in OPTIONS if "z_loss" not in OPTIONS[name]])
def test_full_kl_is_sparse_kl_with_all_ids(option):
    """The dense baseline and the sparse loss are one loss when nothing is left out."""
    logits, _, labels = example()
    teacher, _, _ = example(seed=1)
    temperature = OPTIONS[option].get("temperature", 1.0)
    targets = SparseTargets(ids=torch.arange(V).expand(N, V), weights=(teacher / temperature).softmax(-1))
    dense = value_and_gradient(skd.full_kl, logits, teacher, labels=labels, **OPTIONS[option])
    sparse = value_and_gradient(skd.sparse_kl, logits, targets, labels=labels, **OPTIONS[option])
    torch.testing.assert_close(dense[0], sparse[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(dense[1], sparse[1], atol=1e-12, rtol=0)


def test_reductions_agree():
    """mean = sum / kept positions; num_items_in_batch divides the sum; an ignored position counts for nothing."""
    logits, targets, labels = example()
    none = skd.sparse_kl(logits, targets, labels=labels, reduction="none")
    kept = (labels != -100).sum()
    assert (none[labels == -100] == 0).all()
    torch.testing.assert_close(
        skd.sparse_kl(logits, targets, labels=labels, reduction="sum"), none.sum(), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(skd.sparse_kl(logits, targets, labels=labels), none.sum() / kept, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        skd.sparse_kl(logits, targets, labels=labels, num_items_in_batch=torch.tensor(40)),
        none.sum() / 40,
        rtol=1e-14,
        atol=0,
    )
    # Two halves with the whole batch's item count add up to the whole batch: accumulation changes nothing.
    halves = sum(
        skd.sparse_kl(logits[part], targets[part], labels=labels[part], num_items_in_batch=kept)
        for part in (slice(0, 6), slice(6, N))
    )
    torch.testing.assert_close(halves, none.sum() / kept, rtol=1e-14, atol=0)


def test_all_positions_ignored_is_zero_not_nan():
    """A batch with no supervised position has loss 0 and gradient 0."""
    logits, targets, labels = example()
    loss, gradient = value_and_gradient(skd.sparse_kl, logits, targets, labels=torch.full_like(labels, -100))
    assert loss == 0
    assert (gradient == 0).all()


def test_targets_of_a_batch_keep_their_shape():
    """[batch, length, V] logits with [batch, length, K] targets equal the flattened call."""
    logits, targets, labels = example()
    pick = slice(0, 12)
    shaped = SparseTargets(ids=targets.ids[pick].view(3, 4, K), weights=targets.weights[pick].view(3, 4, K))
    torch.testing.assert_close(
        skd.sparse_kl(logits[pick].view(3, 4, V), shaped, labels=labels[pick].view(3, 4)),
        skd.sparse_kl(logits[pick], targets[pick], labels=labels[pick]),
    )


def test_a_target_far_below_the_rest_stays_finite():
    """Logits 200 apart: p underflows in float32, loss and gradient stay finite and right."""
    logits = torch.zeros(1, V)
    logits[0, 0] = 200.0
    targets = SparseTargets(ids=torch.tensor([[3]]), weights=torch.tensor([[1.0]]))
    loss, gradient = value_and_gradient(skd.sparse_kl, logits, targets)
    assert abs(loss - 200) < 1e-3
    assert gradient[0, 3] == -1
    assert gradient[0, 0] == 1


def test_rows_beyond_a_chunk_change_nothing(monkeypatch):
    """Chunks are an implementation detail: one row at a time gives the same loss and gradient."""
    logits, targets, labels = example()
    whole = value_and_gradient(skd.sparse_kl, logits, targets, labels=labels, ce_weight=0.1)
    monkeypatch.setitem(row_losses.TILE_BYTES, "cpu", 1)
    single = value_and_gradient(skd.sparse_kl, logits, targets, labels=labels, ce_weight=0.1)
    torch.testing.assert_close(whole, single, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ce_weight": 0.5}, "ce_weight > 0 and residual=.label. need labels"),
        ({"ce_weight": 1.5, "labels": torch.zeros(N, dtype=torch.long)}, "ce_weight=1.5 is out of range"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"z_loss": -1.0}, "z_loss=-1.0 must not be negative"),
        ({"reduction": "avg"}, "reduction='avg' is not one of mean, sum, none"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels \(3,\) and logits' positions \(13,\) differ"),
    ],
)
def test_misuse_names_the_value(change, words):
    logits, targets, _ = example()
    with pytest.raises(ValueError, match=words):
        skd.sparse_kl(logits, targets, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"ce_weight": 1.5}, "ce_weight=1.5 is out of range"),
        ({"ce_weight": 0.5}, "need labels"),
        ({"reduction": "avg"}, "reduction='avg' is not one of mean, sum, none"),
        ({"teacher_logits": torch.zeros(N, V + 1)}, r"differ in shape: \(13, 97\) and \(13, 98\)"),
    ],
)
def test_misuse_of_the_baseline_names_the_value(change, words):
    logits, _, _ = example()
    with pytest.raises(ValueError, match=words):
        skd.full_kl(**({"logits": logits, "teacher_logits": logits} | change))


def test_keywords_are_the_fields_of_the_options():
    """What a type checker accepts is what `LossOptions` has (`entropy` is a choice of function, not of the caller)."""
    fields = {field.name for field in dataclasses.fields(row_losses.LossOptions)}
    assert set(skd.losses.LossWords.__annotations__) == fields - {"entropy"}
    logits, targets, _ = example()
    with pytest.raises(TypeError, match="ce_wieght"):
        skd.sparse_kl(logits, targets, ce_wieght=0.5)


def test_misaligned_targets_are_refused():
    logits, targets, _ = example()
    with pytest.raises(ValueError, match="differ in their positions"):
        skd.sparse_kl(logits, targets[:-1])
