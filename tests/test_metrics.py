"""Each metric against a slow float64 twin or a case worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from sparsekd import metrics
from sparsekd.errors import MismatchError


def random_logits(n: int, v: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_softmax(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [e / math.fsum(exps) for e in exps]


# -- means and errors


def test_standard_error_by_hand() -> None:
    """Values 1, 2, 3, 4: mean 2.5, sample variance 5/3, so the error is sqrt(5/12)."""
    got = metrics.mean_and_standard_error([1.0, 2.0, 3.0, 4.0])
    assert got.mean == 2.5
    assert got.standard_error == pytest.approx(math.sqrt(5 / 12), rel=1e-15)


def test_one_value_has_no_standard_error() -> None:
    """A single value is its own mean and knows nothing of its spread; no value is refused."""
    got = metrics.mean_and_standard_error([7.0])
    assert got.mean == 7.0
    assert math.isnan(got.standard_error)
    with pytest.raises(ValueError, match="no values"):
        metrics.mean_and_standard_error([])


def test_ratio_with_equal_counts_is_the_plain_mean() -> None:
    """Rows of equal length: the ratio's mean and error are those of the row means."""
    sums = [12.0, 9.0, 15.0, 10.5]
    ratio = metrics.ratio_of_sums(sums, [3, 3, 3, 3])
    plain = metrics.mean_and_standard_error([s / 3 for s in sums])
    assert ratio.mean == pytest.approx(plain.mean, rel=1e-14)
    assert ratio.standard_error == pytest.approx(plain.standard_error, rel=1e-14)


def test_ratio_by_hand() -> None:
    """Sums (2, 9) over counts (2, 3): R = 11/5; residuals ∓12/5; error = sqrt(2·2·(12/5)²)/5 = 24/25."""
    got = metrics.ratio_of_sums([2.0, 9.0], [2, 3])
    assert got.mean == pytest.approx(2.2, rel=1e-15)
    assert got.standard_error == pytest.approx(24 / 25, rel=1e-14)


def test_ratio_error_covers_the_truth_as_often_as_it_says() -> None:
    """In 93-97 % of 2,000 simulated splits with unequal rows, |estimate - truth| < 1.96 errors."""
    g = torch.Generator().manual_seed(5)
    inside = 0
    for _ in range(2000):
        counts = torch.randint(20, 200, (60,), generator=g).double()
        row_means = 3.0 + 0.5 * torch.randn(60, generator=g, dtype=torch.float64)
        got = metrics.ratio_of_sums(row_means * counts, counts)
        inside += abs(got.mean - 3.0) < 1.96 * got.standard_error
    assert 0.93 < inside / 2000 < 0.97


def test_ratio_refuses_what_it_cannot_divide() -> None:
    """No tokens, or lists of different lengths, are errors with both numbers."""
    with pytest.raises(ValueError, match=r"positive total count, not 0\.0"):
        metrics.ratio_of_sums([0.0], [0])
    with pytest.raises(ValueError, match="differ in length: 2 and 1"):
        metrics.ratio_of_sums([0.0, 1.0], [1])


# -- losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_losses_equal_the_slow_twin(dtype: torch.dtype) -> None:
    """-log softmax at the label, on the very logits given: low precision inputs cost no extra error."""
    logits = random_logits(40, 33).to(dtype)
    labels = torch.arange(40) % 33
    want = [-math.log(slow_softmax(row)[i]) for row, i in zip(logits.double().tolist(), labels.tolist(), strict=True)]
    got = metrics.token_losses(logits, labels)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.tolist() == pytest.approx(want, rel=1e-12 if dtype == torch.float64 else 2e-6, abs=2e-6)


def test_token_losses_survive_huge_logits() -> None:
    """Logits of ±1e4 give 0 for the certain label and the exact distance for the impossible one."""
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]])
    assert metrics.token_losses(logits, torch.tensor([0, 1])).tolist() == [0.0, 20000.0]


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_ignored_labels_are_refused(label: int) -> None:
    """-100 never turns into a loss of 0: the caller selects positions, the error says so."""
    with pytest.raises(ValueError, match=f"label {label} is outside the 5 logits; drop ignored"):
        metrics.token_losses(torch.zeros(2, 5), torch.tensor([0, label]))
    with pytest.raises(ValueError, match=f"label {label} is outside"):
        metrics.top1(torch.zeros(2, 5), torch.tensor([0, label]))


def test_shapes_must_fit() -> None:
    """Unflattened logits are refused with both shapes."""
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) and \(2, 3\); flatten both"):
        metrics.token_losses(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    """A uniform guess over 2,048 tokens has loss ln 2048 and perplexity 2,048; overflow is inf."""
    loss = float(metrics.token_losses(torch.zeros(1, 2048, dtype=torch.float64), torch.tensor([7])))
    assert metrics.perplexity(loss) == pytest.approx(2048)
    assert metrics.perplexity(1e6) == math.inf


def test_bits_per_byte_by_hand() -> None:
    """100 tokens of ln 256 nats over 100 bytes are 8 bits per byte; over 400 bytes, 2."""
    assert metrics.bits_per_byte(math.log(256), tokens=100, text_bytes=100) == pytest.approx(8)
    assert metrics.bits_per_byte(math.log(256), tokens=100, text_bytes=400) == pytest.approx(2)
    with pytest.raises(ValueError, match="size in bytes, not 0"):
        metrics.bits_per_byte(1.0, tokens=1, text_bytes=0)


# -- calibration


def slow_ece(confidence: list[float], correct: list[int], bins: int) -> float:
    total = 0.0
    for m in range(bins):
        low, high = m / bins, (m + 1) / bins
        members = [i for i, c in enumerate(confidence) if low < c <= high or (m == 0 and c == 0)]
        if members:
            accuracy = statistics.fmean(correct[i] for i in members)
            total += len(members) / len(confidence) * abs(accuracy - statistics.fmean(confidence[i] for i in members))
    return total


def draws(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=g, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_ece_equals_the_slow_twin(bins: int) -> None:
    """Bin by bin in plain Python, the same number; under- and overconfident bins do not cancel."""
    confidence, luck = draws(700)
    correct = luck < 0.5
    want = slow_ece(confidence.tolist(), correct.int().tolist(), bins)
    assert metrics.expected_calibration_error(confidence, correct, bins).ece == pytest.approx(want, rel=1e-12)


def test_ece_by_hand() -> None:
    """Four at 0.9 with two right and six at 0.5 with three right: ECE = 0.4·|0.5-0.9| + 0.6·0 = 0.16."""
    confidence = torch.tensor([0.9] * 4 + [0.5] * 6, dtype=torch.float64)
    correct = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 0, 0]).bool()
    got = metrics.expected_calibration_error(confidence, correct)
    assert got.ece == pytest.approx(0.16, rel=1e-14)
    filled = {i: b for i, b in enumerate(got.reliability) if b.count}
    assert {i: (b.count, b.accuracy) for i, b in filled.items()} == {7: (6, 0.5), 13: (4, 0.5)}
    assert [b.confidence for b in filled.values()] == pytest.approx([0.5, 0.9], rel=1e-14)
    assert len(got.reliability) == 15
    assert got.reliability[0].confidence is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bin_edges_belong_to_the_bin_below(dtype: torch.dtype) -> None:
    """A confidence of m/15, rounded to its type, counts in bin m-1; 0 in the first, 1 in the last."""
    for m in range(16):
        edge = torch.tensor([m / 15], dtype=torch.float64).to(dtype)
        got = metrics.expected_calibration_error(edge, torch.tensor([True]))
        assert [b.count for b in got.reliability].index(1) == max(m - 1, 0)


def test_a_calibrated_predictor_has_no_error_beyond_chance() -> None:
    """Right with exactly the stated probability: the ECE of n draws is chance, shrinking as 1/√n."""
    for n in (2_000, 200_000):
        confidence, luck = draws(n, seed=n)
        got = metrics.expected_calibration_error(confidence, luck < confidence)
        # Each bin's gap has standard deviation about sqrt(c(1-c)/count) <= 1/2 sqrt(15/n).
        assert 0 < got.ece < 0.5 * math.sqrt(15 / n)


def test_an_overconfident_predictor_shows_its_gap() -> None:
    """Stating c in [0.3, 1] while right with c - 0.2 gives an ECE of 0.2."""
    u, luck = draws(200_000, seed=3)
    confidence = 0.3 + 0.7 * u
    got = metrics.expected_calibration_error(confidence, luck < confidence - 0.2)
    assert got.ece == pytest.approx(0.2, abs=4 * 0.5 / math.sqrt(200_000))


def test_streamed_bins_equal_one_pass() -> None:
    """Chunks, and merged halves, give the result of adding everything at once."""
    confidence, luck = draws(1000)
    correct = luck < 0.5
    left, right = metrics.CalibrationBins(), metrics.CalibrationBins()
    for start in range(0, 600, 7):
        left.add(confidence[start : min(start + 7, 600)], correct[start : min(start + 7, 600)])
    right.add(confidence[600:], correct[600:])
    left.merge(right)
    want = metrics.expected_calibration_error(confidence, correct)
    assert left.result().ece == pytest.approx(want.ece, rel=1e-12)
    assert [b.count for b in left.result().reliability] == [b.count for b in want.reliability]
    json.dumps(asdict(left.result()), allow_nan=False)


def test_bad_confidences_are_refused() -> None:
    """Logits, percentages and nan are not probabilities; nothing to average is said plainly."""
    bins = metrics.CalibrationBins()
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], not"):
            bins.add(torch.tensor([0.5, bad]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="no predictions"):
        bins.result()
    with pytest.raises(ValueError, match="cannot merge 10 calibration bins into 15"):
        bins.merge(metrics.CalibrationBins(10))
    with pytest.raises(ValueError, match=r"differ in shape: \(2,\) and \(1,\)"):
        bins.add(torch.tensor([0.5, 0.5]), torch.tensor([True]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_top1_is_the_largest_probability(dtype: torch.dtype) -> None:
    """Confidence and correctness as a plain loop finds them; never above 1."""
    logits = random_logits(50, 9, seed=1).to(dtype)
    labels = torch.arange(50) % 9
    probabilities = [slow_softmax(row) for row in logits.double().tolist()]
    confidence, correct = metrics.top1(logits, labels)
    assert confidence.tolist() == pytest.approx([max(p) for p in probabilities], rel=2e-6)
    assert correct.tolist() == [p.index(max(p)) == i for p, i in zip(probabilities, labels.tolist(), strict=True)]
    assert float(metrics.top1(torch.tensor([[200.0, 0.0]]), torch.tensor([0]))[0]) == 1.0


# -- student against teacher


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_acceptance_is_one_minus_total_variation(dtype: torch.dtype) -> None:
    """Σ min(p, q) = 1 - ½ Σ |p - q|, the latter computed in plain Python."""
    teacher, student = random_logits(30, 17, seed=1).to(dtype), random_logits(30, 17, seed=2).to(dtype)
    want = []
    for p_row, q_row in zip(teacher.double().tolist(), student.double().tolist(), strict=True):
        p, q = slow_softmax(p_row), slow_softmax(q_row)
        want.append(1 - 0.5 * math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)))
    assert metrics.speculative_acceptance(teacher, student).tolist() == pytest.approx(want, rel=1e-5)


def test_acceptance_is_one_only_for_equal_distributions() -> None:
    """A shift of all logits changes nothing and is accepted always; a change of one logit is not."""
    logits = random_logits(8, 12, scale=1.0)
    assert metrics.speculative_acceptance(logits, logits + 5.0).tolist() == pytest.approx([1.0] * 8, abs=1e-12)
    other = logits.clone()
    other[:, 0] += 0.01
    assert (metrics.speculative_acceptance(logits, other) < 1 - 1e-6).all()


def test_acceptance_is_what_speculative_sampling_accepts() -> None:
    """Drafting from q and accepting with min(1, p/q) keeps Σ min(p, q) of 200,000 drafts, within 4 errors."""
    teacher, student = random_logits(1, 6, seed=4, scale=1.0), random_logits(1, 6, seed=5, scale=1.0)
    p, q = teacher.softmax(-1)[0], student.softmax(-1)[0]
    g = torch.Generator().manual_seed(0)
    drafts = torch.multinomial(q, 200_000, replacement=True, generator=g)
    accepted = torch.rand(200_000, generator=g, dtype=torch.float64) < (p / q)[drafts]
    want = float(metrics.speculative_acceptance(teacher, student))
    assert float(accepted.double().mean()) == pytest.approx(want, abs=4 * 0.5 / math.sqrt(200_000))


def test_agreement_by_hand() -> None:
    """The same top token, whatever the rest says."""
    teacher = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]).bfloat16()
    student = torch.tensor([[0.0, 9.0, 8.0], [0.0, 0.0, 1.0]]).bfloat16()
    assert metrics.top1_agreement(teacher, student).tolist() == [True, False]


def test_logits_of_different_width_are_refused() -> None:
    """A padded teacher vocabulary is named with both shapes and the way out."""
    for function in (metrics.speculative_acceptance, metrics.top1_agreement):
        with pytest.raises(MismatchError, match=r"teacher's are \(2, 8\), the student's \(2, 6\); cut both"):
            function(torch.zeros(2, 8), torch.zeros(2, 6))


# -- gradients


def test_angle_and_norm_ratio_equal_the_slow_twin() -> None:
    """Over all tensors as one vector, in float64, from bf16 gradients too."""
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        a = [torch.randn(3, 4, generator=g).to(dtype), torch.randn(7, generator=g).to(dtype)]
        b = [torch.randn(3, 4, generator=g).to(dtype), torch.randn(7, generator=g).to(dtype)]
        flat_a = list(itertools.chain.from_iterable(x.double().flatten().tolist() for x in a))
        flat_b = list(itertools.chain.from_iterable(x.double().flatten().tolist() for x in b))
        dot = math.fsum(x * y for x, y in zip(flat_a, flat_b, strict=True))
        want = math.degrees(math.acos(dot / (math.hypot(*flat_a) * math.hypot(*flat_b))))
        assert metrics.gradient_angle(a, b) == pytest.approx(want, rel=1e-12)
        assert metrics.norm_ratio(a, b) == pytest.approx(math.hypot(*flat_a) / math.hypot(*flat_b), rel=1e-12)


def test_angles_of_known_vectors() -> None:
    """0° to itself scaled, 180° to its opposite, 90° across, 45° between; ratio of norms √2."""
    east, north = [torch.tensor([1.0]), torch.tensor([0.0])], [torch.tensor([0.0]), torch.tensor([1.0])]
    both = [torch.tensor([1.0]), torch.tensor([1.0])]
    assert metrics.gradient_angle(both, [3 * x for x in both]) == pytest.approx(0.0, abs=1e-13)
    assert metrics.gradient_angle(both, [-x for x in both]) == pytest.approx(180.0, rel=1e-15)
    assert metrics.gradient_angle(east, north) == pytest.approx(90.0, rel=1e-15)
    assert metrics.gradient_angle(east, both) == pytest.approx(45.0, rel=1e-15)
    assert metrics.norm_ratio(both, east) == pytest.approx(math.sqrt(2), rel=1e-15)


def test_tiny_angles_keep_their_digits() -> None:
    """An angle of 1e-9 radians is measured to nine digits, where the arccosine would say 0 or 1.5e-8."""
    a = [torch.tensor([1.0, 0.0], dtype=torch.float64)]
    b = [torch.tensor([1.0, 1e-9], dtype=torch.float64)]
    assert metrics.gradient_angle(a, b) == pytest.approx(math.degrees(1e-9), rel=1e-9)


def test_gradients_without_direction_are_refused() -> None:
    """A zero gradient, or gradients of different parameters, are errors and not an angle."""
    one, zero = [torch.ones(2)], [torch.zeros(2)]
    with pytest.raises(ValueError, match="no direction"):
        metrics.gradient_angle(one, zero)
    with pytest.raises(ValueError, match=r"norm 0\.0 is undefined"):
        metrics.norm_ratio(one, zero)
    with pytest.raises(ValueError, match="different parameters"):
        metrics.gradient_angle(one, [torch.ones(3)])


# -- the tally


def test_tally_by_hand() -> None:
    """Two rows of 2 and 3 tokens with sums 2 and 9: the hand-worked ratio, whatever the order of tokens."""
    tally = metrics.Tally()
    tally.add(torch.tensor([1, 0, 1, 0, 1]), loss=torch.tensor([4.0, 0.5, 3.0, 1.5, 2.0]))
    assert (tally.rows, tally.tokens, tally.total("loss")) == (2, 5, 11.0)
    assert tally.estimate("loss").mean == pytest.approx(2.2)
    assert tally.estimate("loss").standard_error == pytest.approx(24 / 25)


def test_tally_in_chunks_and_merged_equals_one_pass() -> None:
    """A row may arrive in pieces and in two processes; the estimates do not notice."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 9, (500,), generator=g)
    loss, right = torch.rand(500, generator=g), torch.rand(500, generator=g) < 0.4
    whole, left, right_half = metrics.Tally(), metrics.Tally(), metrics.Tally()
    whole.add(rows, loss=loss, correct=right)
    for i in range(0, 300, 13):
        part = slice(i, min(i + 13, 300))
        left.add(rows[part], loss=loss[part], correct=right[part])
    right_half.add(rows[300:], loss=loss[300:], correct=right[300:])
    left.merge(right_half)
    assert left.rows == whole.rows
    assert left.tokens == whole.tokens == 500
    for name, want in whole.estimates().items():
        assert left.estimate(name).mean == pytest.approx(want.mean, rel=1e-12)
        assert left.estimate(name).standard_error == pytest.approx(want.standard_error, rel=1e-9)
    assert whole.estimate("correct").mean == pytest.approx(float(right.double().mean()), rel=1e-12)


def test_tally_of_bf16_values_sums_in_float64() -> None:
    """Ten thousand bf16 losses of 0.1 sum to 10,000 times bf16(0.1), where a bf16 sum would stall at 32."""
    tally = metrics.Tally()
    tally.add(torch.zeros(10_000, dtype=torch.long), loss=torch.full((10_000,), 0.1, dtype=torch.bfloat16))
    assert tally.total("loss") == pytest.approx(10_000 * 0.10009765625, rel=1e-12)


def test_tally_refuses_a_quantity_that_comes_and_goes() -> None:
    """Counting a quantity for some tokens only would bend its mean: the names are fixed by the first add."""
    tally = metrics.Tally()
    tally.add(torch.zeros(2), loss=torch.ones(2))
    with pytest.raises(ValueError, match=r"counts \['loss'\], not \['accepted', 'loss'\]"):
        tally.add(torch.zeros(2), loss=torch.ones(2), accepted=torch.ones(2))
    with pytest.raises(ValueError, match="loss has 3 values for 2 tokens"):
        tally.add(torch.zeros(2), loss=torch.ones(3))
    other = metrics.Tally()
    other.add(torch.zeros(1), accepted=torch.ones(1))
    with pytest.raises(ValueError, match="cannot merge tallies"):
        tally.merge(other)
