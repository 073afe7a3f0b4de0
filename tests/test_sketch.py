"""The sorted-curve sketch: exact masses, what ULD loses by it, and why a sample of ids cannot stand in."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F

from sparsekd.sketch import SortedCurve, curve_edges, sorted_curve, spread
from sparsekd.targets import SparseTargets
from sparsekd.uld import as_curve, sorted_distance

WIDTH, STUDENT_WIDTH, POSITIONS = 32_000, 24_000, 32


def zipf_pair():
    """Logits of a teacher and a student: power laws of other exponents at each position, with noise on every id.

    The exponents give entropies from 3 to 9 nats, and the top probabilities of a language model.
    """
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.linspace(1.1, 2.2, POSITIONS)[:, None]
    ranks = torch.arange(1, WIDTH + 1).float()
    teacher = -sharpness * (ranks + 2).log() + torch.randn(POSITIONS, WIDTH, generator=generator)
    student = 0.8 * teacher[:, torch.randperm(WIDTH, generator=generator)][:, :STUDENT_WIDTH]
    return student + 0.5 * torch.randn(POSITIONS, STUDENT_WIDTH, generator=generator), teacher


def value_and_gradient(function, logits, *args):
    leaf = logits.clone().requires_grad_()
    values = function(leaf, *args)
    values.sum().backward()
    return values.detach(), leaf.grad


def bias_and_cosine(teacher, student, curve):
    value, gradient = value_and_gradient(sorted_distance, student, curve)
    want, wanted = value_and_gradient(oracles.uld_plain, student, teacher)
    cosine = F.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0)
    return (value.mean() / want.mean() - 1).item(), cosine.item()


@pytest.mark.parametrize(
    ("width", "top", "edges"),
    [
        (100, 4, (0, 1, 2, 3, 4, 8, 16, 32, 64, 100)),
        (64, 4, (0, 1, 2, 3, 4, 8, 16, 32, 64)),
        (5, 4, (0, 1, 2, 3, 4, 5)),
        (3, 4, (0, 1, 2, 3)),
        (1, 1, (0, 1)),
    ],
)
def test_edges(width, top, edges):
    assert curve_edges(width, top) == edges


@pytest.mark.parametrize(("width", "numbers"), [(32_000, 27), (50_257, 28), (128_256, 29), (262_144, 30)])
def test_a_sketch_is_some_27_numbers(width, numbers):
    assert len(curve_edges(width)) - 1 == numbers


def test_masses_are_sums_of_sorted_probabilities():
    """Against slices of a float64 sort; they sum to 1, the smallest of them right to float32 as well."""
    _, teacher = zipf_pair()
    curve, ranked = sorted_curve(teacher), teacher.double().softmax(-1).sort(-1, descending=True).values
    want = torch.stack([ranked[:, a:b].sum(-1) for a, b in zip(curve.edges[:-1], curve.edges[1:], strict=True)], -1)
    torch.testing.assert_close(curve.masses.double(), want, atol=0, rtol=2e-5)
    torch.testing.assert_close(curve.masses.sum(-1), torch.ones(POSITIONS), atol=2e-5, rtol=0)


def test_a_full_curve_is_the_sorted_distribution():
    _, teacher = zipf_pair()
    ranked = teacher.softmax(-1).sort(-1, descending=True).values
    for curve in (sorted_curve(teacher, top=None), sorted_curve(teacher, top=WIDTH)):
        torch.testing.assert_close(spread(curve), ranked, atol=0, rtol=0)


def test_spread_keeps_every_mass():
    """The drawn ranks of a run sum to its mass; a run of no mass stays empty, and nothing is NaN."""
    _, teacher = zipf_pair()
    teacher[0, 100:] = -torch.inf
    curve = sorted_curve(teacher.double())
    ranks = spread(curve)
    again = torch.stack([ranks[:, a:b].sum(-1) for a, b in zip(curve.edges[:-1], curve.edges[1:], strict=True)], -1)
    torch.testing.assert_close(again, curve.masses, atol=1e-15, rtol=1e-12)
    assert (ranks[0, 128:] == 0).all()


def test_a_power_law_is_drawn_back():
    """Zipf's law itself comes back to 3.5 % at every rank (a run's mean lies a little above its middle rank's)."""
    logits = -1.3 * torch.arange(1, 5_001).double().log()[None]
    ranks = spread(sorted_curve(logits))
    relative = ranks / logits.softmax(-1) - 1
    assert relative.abs().max() < 0.035


def test_bias_and_cosine_against_the_dense_teacher():
    """What a sketch of 27 numbers costs: at most 1 % of the loss, and a gradient of cosine 0.98 or more."""
    student, teacher = zipf_pair()
    bias, cosine = bias_and_cosine(teacher, student, sorted_curve(teacher))
    assert abs(bias) <= 0.01
    assert cosine >= 0.98


def test_bias_and_cosine_for_a_trained_model(world):
    """The same between a trained teacher and itself at another temperature with noise: small, smooth differences."""
    from sparsekd import models
    from sparsekd.packed import RowsReader

    teacher = models.open_model(world.teacher, dtype="float32", device="cpu")
    with RowsReader(world.rows) as rows, torch.no_grad():
        ids = torch.from_numpy(rows.batch(range(8)).input_ids.astype("int64"))
        logits = teacher(input_ids=ids).logits.flatten(0, 1)
    noise = 0.5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    bias, cosine = bias_and_cosine(logits, 0.8 * logits + noise, sorted_curve(logits))
    assert abs(bias) <= 0.01
    assert cosine >= 0.98


@pytest.mark.parametrize("rounds", [12, 50])
def test_sampled_targets_bias_the_loss_and_averaging_does_not_help(rounds):
    """The reason for the refusal: all of 8 resamples are far too large, and their spread is a tenth of that at most."""
    student, teacher = zipf_pair()
    want = oracles.uld_plain(student, teacher).mean()
    generator, biases = torch.Generator().manual_seed(1), []
    for _ in range(8):
        ids = teacher.softmax(-1).multinomial(rounds, replacement=True, generator=generator)
        counts = torch.zeros_like(teacher).scatter_add_(-1, ids, torch.ones(ids.shape))
        weights, kept = (counts / rounds).topk(rounds)
        drawn = as_curve(SparseTargets(ids=kept, weights=weights), allow_biased=True)
        biases.append((sorted_distance(student, drawn).mean() / want - 1).item())
    assert min(biases) > 0.6
    assert max(biases) - min(biases) < 0.1 * min(biases)


def test_curves_are_indexed_by_position():
    curve = SortedCurve(masses=torch.rand(2, 3, 5), edges=(0, 1, 2, 3, 4, 9))
    assert curve[1].masses.shape == (3, 5)
    assert curve[torch.tensor([0, 1]), torch.tensor([2, 2])].masses.shape == (2, 5)
