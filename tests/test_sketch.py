"""The sorted-curve sketch: exact masses, what ULD loses by it, and why a sample of ids cannot stand in."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from conftest import folder_bytes

from sparsekd import models
from sparsekd.batches import SparseKDCollator
from sparsekd.cache import CacheReader, verify
from sparsekd.capture import capture
from sparsekd.codec import FlatTargets, check_codec, decode, default_codec, encode
from sparsekd.errors import FormatError, MismatchError, RecipeError
from sparsekd.packed import RowsReader
from sparsekd.recompute import recompute
from sparsekd.sketch import TOP, SortedCurve, curve_edges, sorted_curve, spread, teacher_sketch
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


# --- stored -------------------------------------------------------------------------------------------------


def stored(values, curve, ids, width=8):
    return FlatTargets(
        ids=np.asarray(ids, np.uint32),
        values=np.asarray(values, np.float32),
        sizes=np.ones(len(ids), np.int64),
        curve=np.asarray(curve, np.float32),
    )


def spec_of(width, top):
    return default_codec(None, width, edges=curve_edges(width, top))


def test_golden_bytes():
    """V = 8, runs 0, 1, 2-3, 4-7. Position 0: token 5 of p = 1/4 (2 octaves: 2048); masses 1/2, 1/4, 1/8, 1/8.

    Means 1/2, 1/4, 1/16, 1/32: steps of 1, 1, 2, 1 octaves, 4096, 4096, 8192, 4096 units: codes 64, 64, 91 (8281, the
    nearest square), and 4096 - 89 left: 63 (3969). Position 1: token 7 of p = 1, masses 1, 0, 0, 0: 0, then the
    longest step 255 each.
    """
    spec = spec_of(8, 2)
    assert spec == {"name": "curve8", "logit_width": 8, "edges": [0, 1, 2, 4, 8]}
    flat = stored([0.25, 1.0], [[0.5, 0.25, 0.125, 0.125], [1, 0, 0, 0]], [5, 7])
    data = encode(flat, spec)
    assert data.hex(" ") == "05 00 07 00  00 08 00 00  40 40 5b 3f  00 ff ff ff".replace("  ", " ")
    again = decode(data, 2, spec)
    assert again.ids.tolist() == [5, 7]
    assert again.values.tolist() == [0.25, 1.0]
    assert again.curve[0, :2].tolist() == [0.5, 0.25]
    assert again.curve[0, 2] == pytest.approx(2 * 2 ** -((4096 * 2 + 8281) / 4096), rel=1e-6)
    assert again.curve[1, 1] == pytest.approx(2 ** -(65025 / 4096), rel=1e-6)


def test_storing_costs_one_percent_of_a_mass():
    """Every number is off by 1.1 % sqrt(o) at most, o the octaves between neighbours, or by what the one before was,
    and below 1/32 nat; bias and cosine are as before. 31 bytes a position at V = 32,000."""
    student, teacher = zipf_pair()
    kept = teacher_sketch(teacher, torch.arange(POSITIONS))
    flat = stored(kept.log_p.exp(), kept.curve.masses, kept.tokens)
    spec = spec_of(WIDTH, TOP)
    data = encode(flat, spec)
    assert len(data) == POSITIONS * (2 + 2 + 27)
    again = decode(data, POSITIONS, spec)
    lengths = np.diff(spec["edges"])
    means = -np.log2(flat.curve / lengths)
    octaves = np.diff(means, prepend=0, axis=-1)
    error = np.abs(np.log2(again.curve / flat.curve))
    before = np.pad(error[:, :-1], ((0, 0), (1, 0)))
    assert (error <= np.maximum(np.sqrt(octaves + before) / 64, before) + 3e-4).all()
    assert error.max() * math.log(2) <= 1 / 32
    assert np.abs(np.log(again.values / flat.values)).max() < 4e-4
    bias, cosine = bias_and_cosine(
        teacher, student, SortedCurve(masses=torch.from_numpy(again.curve), edges=tuple(spec["edges"]))
    )
    assert abs(bias) <= 0.01
    assert cosine >= 0.98


def test_encoding_what_was_decoded_changes_nothing():
    _, teacher = zipf_pair()
    kept = teacher_sketch(teacher, torch.arange(POSITIONS))
    spec = spec_of(WIDTH, TOP)
    data = encode(stored(kept.log_p.exp(), kept.curve.masses, kept.tokens), spec)
    assert encode(decode(data, POSITIONS, spec), spec) == data


@pytest.mark.parametrize(
    ("values", "curve", "words"),
    [
        ([0.5], [[0.5, 0.5]], "2 runs, the codec was set up for 4"),
        ([0.5], [[0.5, np.nan, 0, 0]], "a run of mass nan"),
        ([0.5], [[1.5, 0, 0, 0]], "a run of mass 1.5"),
        ([1.5], [[0.5, 0.5, 0, 0]], "a token of probability 1.5"),
    ],
)
def test_what_is_no_curve_is_not_stored(values, curve, words):
    with pytest.raises(MismatchError, match=words):
        encode(stored(values, curve, [3]), spec_of(8, 2))


def test_damaged_bytes_are_refused():
    """Another length, an id beyond the vocabulary, runs that fall below 2^-150."""
    spec = spec_of(4096, 16)
    runs = len(spec["edges"]) - 1
    with pytest.raises(FormatError, match="cannot be 1 positions"):
        decode(bytes(5), 1, spec)
    with pytest.raises(FormatError, match="id 65535"):
        decode(b"\xff\xff" + bytes(2 + runs), 1, spec)
    with pytest.raises(FormatError, match=r"below 2\^-150"):
        decode(bytes(4) + b"\xff" * runs, 1, spec)


@pytest.mark.parametrize("edges", [[0, 4], [1, 8], [0, 2, 2, 8], [0, 1.5, 8], "08", [0, 9, 8], [8]])
def test_a_spec_with_other_edges_is_refused(edges):
    with pytest.raises(RecipeError, match="codec curve8 needs edges"):
        check_codec({"name": "curve8", "logit_width": 8, "edges": edges})


@pytest.fixture(scope="module")
def curves(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("curves") / "cache"
    capture(rows=world.rows, teacher=world.teacher, out=out, sampler="sorted_curve", shard_rows=40, device="cpu")
    return str(out)


def test_a_capture_holds_the_teachers_curve(world, curves):
    """Every position's curve and token probability are those of the teacher's own logits, and `verify` is content."""
    teacher = models.open_model(world.teacher, dtype="float32", device="cpu")
    with CacheReader(curves) as reader, torch.no_grad():
        row = reader[3]
        logits = teacher(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0, :-1]
        assert reader.spec.codec["edges"] == list(curve_edges(reader.spec.logit_width))
        assert reader.spec.sampler["unbiased"] is False
        assert reader.stats["next_token_hits"] == reader.stats["positions"]
    want, kept = sorted_curve(logits).masses.numpy(), row.supervised[1:]
    np.testing.assert_allclose(row.targets.curve[kept], want[kept], rtol=0.04)
    tokens = row.input_ids[1:].astype(np.int64)
    p = logits.softmax(-1).numpy()[np.arange(len(tokens)), tokens]
    assert (row.targets.ids[kept, 0] == tokens[kept]).all()
    np.testing.assert_allclose(row.targets.weights[kept, 0], p[kept], rtol=5e-4)
    assert verify(curves).problems == []


def test_drawn_again_it_is_identical(world, curves):
    with CacheReader(curves) as reader:
        result = recompute(reader, world.teacher, rows=3)
    assert result["identical"] == 3
    assert result["drift"] == 0


def test_a_capture_resumes_byte_identically(world, curves, tmp_path):
    capture(
        rows=world.rows,
        teacher=world.teacher,
        out=tmp_path / "cache",
        sampler="sorted_curve",
        shard_rows=40,
        device="cpu",
        shard_range="1:2",
    )
    settings = {"rows": world.rows, "teacher": world.teacher, "out": tmp_path / "cache", "shard_rows": 40}
    capture(**settings, sampler="sorted_curve", device="cpu")
    assert folder_bytes(tmp_path / "cache") == folder_bytes(curves)


def test_a_sparse_loss_refuses_curves(curves, tmp_path):
    """By the trainer's collator, and by `train` before its first step."""
    with (
        CacheReader(curves) as reader,
        pytest.raises(MismatchError, match="sorted curves, which say nothing about ids"),
    ):
        SparseKDCollator()([reader[0], reader[1]])


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        ({"name": "sorted_curve", "top": 0}, "sampler.top=0 is out of range"),
        ({"name": "sorted_curve", "k": 3}, "has no parameter 'k'"),
        ({"name": "sorted_curve", "top": 1.5}, "not a whole number"),
    ],
)
def test_settings_of_the_sketch_are_checked(world, tmp_path, sampler, words):
    with pytest.raises(RecipeError, match=words):
        capture(rows=world.rows, teacher=world.teacher, out=tmp_path / "cache", sampler=sampler)


def test_a_codec_of_counts_does_not_hold_curves(world, tmp_path):
    with pytest.raises(RecipeError, match=r"codec=raw24 holds counts, sampler sorted_curve.*gives sorted curves"):
        capture(rows=world.rows, teacher=world.teacher, out=tmp_path / "c", sampler="sorted_curve", codec="raw24")
