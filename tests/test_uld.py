"""Universal Logit Distillation: its value by hand, its gradient against float64 autograd, its pairs of positions."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from sparsekd import row_losses
from sparsekd.errors import RecipeError
from sparsekd.sketch import SortedCurve, sorted_curve
from sparsekd.targets import SparseTargets
from sparsekd.uld import Tokenized, as_curve, pair_by_bytes, pair_by_index, sorted_distance, uld

X = -100


def logits_of(*rows):
    """Logits whose softmax is each row."""
    return torch.tensor(rows, dtype=torch.float64).log()


def random_logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def distance(logits, teacher):
    return sorted_distance(logits, as_curve(teacher))


# --- one position


def test_value_by_hand():
    """(.6 .3 .1) against (.2 .4 .3 .1), sorted: |.6-.4| + |.3-.3| + |.1-.2| + |0-.1| = .4."""
    student, teacher = logits_of([0.3, 0.1, 0.6]), logits_of([0.2, 0.4, 0.3, 0.1])
    assert distance(student, teacher).item() == pytest.approx(0.4, abs=1e-12)
    assert distance(teacher, student).item() == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize(("width", "teacher_width"), [(97, 97), (97, 60), (60, 97)])
def test_value_and_gradient_are_those_of_the_dense_formula(width, teacher_width):
    """Value and hand-written gradient equal float64 autograd through sort and abs to 1e-12, for any two widths."""
    logits, teacher = random_logits(13, width), random_logits(13, teacher_width, seed=1)
    weights = torch.linspace(-1, 2, 13, dtype=torch.float64)
    ours, truth = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got, want = distance(ours, teacher), oracles.uld_plain(truth, teacher)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.grad, truth.grad, atol=1e-12, rtol=0)
    assert ours.grad.abs().max() > 1e-3


def test_rows_beyond_a_chunk_change_nothing(monkeypatch):
    logits, teacher = random_logits(9, 50), random_logits(9, 50, seed=1)
    whole = distance(logits, teacher)
    monkeypatch.setitem(row_losses.TILE_BYTES, "cpu", 1)
    torch.testing.assert_close(distance(logits, teacher), whole, atol=0, rtol=0)


def test_zero_at_the_teacher_in_any_vocabulary():
    """Equal logits, a permuted vocabulary, and one with ids that have no mass: 0; for equal bits, no gradient."""
    teacher = random_logits(5, 40)
    padded = torch.nn.functional.pad(teacher, (0, 7), value=-torch.inf)
    for student in (teacher, teacher[:, torch.randperm(40)], padded):
        assert distance(student, teacher).max() < 1e-14
    leaf = teacher.clone().requires_grad_()
    distance(leaf, teacher).sum().backward()
    assert (leaf.grad == 0).all()


def test_bounds():
    """0 <= ULD <= 2; one certain token against many even ones comes near 2."""
    values = distance(random_logits(200, 30, scale=8), random_logits(200, 50, seed=1, scale=0.1))
    assert (values >= 0).all()
    assert (values <= 2).all()
    even, certain = torch.zeros(1, 10_000), torch.nn.functional.pad(torch.tensor([[80.0]]), (0, 9_999))
    assert distance(even, certain).item() == pytest.approx(2 - 2e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    logits, teacher = random_logits(6, 300).to(dtype), random_logits(6, 200, seed=1).to(dtype)
    leaf = logits.clone().requires_grad_()
    value = distance(leaf, teacher)
    value.sum().backward()
    truth = oracles.uld_plain(logits.double(), teacher.double())
    assert value.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(value.double(), truth, atol=1e-5, rtol=0)


# --- pairs of positions


def tokenized(*labels, starts=None):
    return Tokenized(labels=torch.tensor(labels), starts=None if starts is None else torch.tensor(starts))


def paired(pairs):
    return list(zip(pairs.rows.tolist(), pairs.student.tolist(), pairs.teacher.tolist(), strict=True))


def test_pairs_by_index_are_the_published_ones():
    """A prompt of 3 and 4 tokens in answer: positions 2, 3, 4 (the last, EOS, is skipped) with the teacher's 1, 2, 3.

    The published rule by hand: the leading -100s end at 3, so its slice begins at 2; 4 labels less the EOS are 3.
    """
    student, teacher = tokenized([X, X, X, 5, 6, 7, 2]), tokenized([X, X, 8, 9, 3, 4, 2, X])
    assert paired(pair_by_index(student, teacher)) == [(0, 2, 1), (0, 3, 2), (0, 4, 3)]
    kept = pair_by_index(student, teacher, skip_student_eos=False)
    assert paired(kept) == [(0, 2, 1), (0, 3, 2), (0, 4, 3), (0, 5, 4)]
    short = tokenized([X, 9, 2, X, X, X, X, X])
    assert paired(pair_by_index(student, short)) == [(0, 2, 0), (0, 3, 1)]


def test_an_answer_without_a_prompt_is_not_one_token_off():
    """Position 0 predicts token 1, of which nothing predicts the one before. The published slice starts at 0 too, but
    is as long as the labels, so that its last position predicts what comes after the answer."""
    everything, masked = tokenized([4, 5, 6, 2]), tokenized([X, X, 5, 6, 2])
    pairs = paired(pair_by_index(everything, masked, skip_student_eos=False))
    assert pairs == [(0, 0, 1), (0, 1, 2), (0, 2, 3)]


def test_answers_in_segments_never_pair_prompt_tokens():
    """Labels with a gap: the published slice would run over the gap's prompt tokens (positions 2, 3)."""
    turns = tokenized([X, 5, 6, X, X, 7, 2])
    assert paired(pair_by_index(turns, turns, skip_student_eos=False)) == [(0, i, i) for i in (0, 1, 4, 5)]


def test_pairs_by_bytes_are_where_both_read_the_same_text():
    """ab|c|de and a|bc|de: both have a token that begins at byte 0 and one at byte 3, and the end token at 5."""
    student = tokenized([X, 1, 2, 3, 9], starts=[[-1, 0, 2, 3, 5]])
    teacher = tokenized([X, X, 1, 2, 3, 9, X], starts=[[-1, -1, 0, 1, 3, 5, -1]])
    assert paired(pair_by_bytes(student, teacher)) == [(0, 0, 1), (0, 2, 3), (0, 3, 4)]


def test_of_tokens_at_one_byte_the_last_is_paired():
    """A token that spells nothing stands before the one that does."""
    student = tokenized([X, 1, 1, 2], starts=[[-1, 0, 0, 4]])
    teacher = tokenized([X, 1, 2, 2], starts=[[-1, 0, 4, -1]])
    assert paired(pair_by_bytes(student, teacher)) == [(0, 1, 0), (0, 2, 1)]


def test_unlabelled_tokens_are_not_paired_by_bytes():
    student = tokenized([X, X, 2, 3], starts=[[0, 1, 2, 3]])
    teacher = tokenized([X, 1, X, 3], starts=[[0, 1, 2, 3]])
    assert paired(pair_by_bytes(student, teacher)) == [(0, 2, 2)]


# --- the loss


def batch():
    """Two rows, student of 3 ids and teacher of 4, with the labels of `test_value_of_the_whole_loss_by_hand`."""
    a, b, c = [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.8, 0.1, 0.1]
    t, u = [0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.7, 0.1]
    student = torch.stack([logits_of(a, a, b, c, c), logits_of(c, b, b, b, a)])
    teacher = torch.stack([logits_of(t, u, t, u), logits_of(u, t, u, t)])
    labels = torch.tensor([[X, X, 1, 0, 2], [X, 0, 1, X, X]])
    teacher_labels = torch.tensor([[X, 3, 2, 1], [X, X, 2, 1]])
    return student, teacher, {"tokens": Tokenized(labels=labels), "teacher_tokens": Tokenized(labels=teacher_labels)}


def test_value_of_the_whole_loss_by_hand():
    """CE + 1.5 ULD, with these distances:

    Row 0 (labels at 2, 3, 4; last skipped): student positions 1, 2 (a, b) with teacher 0, 1 (t, u):
        a-t |.6-.4| + 0 + |.1-.2| + .1 = .4;  b-u |.5-.7| + |.3-.1| + |.2-.1| + .1 = .6;  mean .5
    Row 1 (labels at 1, 2; last skipped): student position 0 (c) with teacher 1 (t):
        c-t |.8-.4| + |.1-.3| + |.1-.2| + .1 = .8
    ULD = (.5 + .8) / 2 = .65.  CE: -log of .3 (a, 1), .2 (b, 0), .1 (c, 2), .8 (c, 0), .5 (b, 1), mean of five.
    """
    student, teacher, labels = batch()
    cross_entropy = -sum(map(math.log, (0.3, 0.2, 0.1, 0.8, 0.5))) / 5
    assert uld(student, teacher, **labels).item() == pytest.approx(cross_entropy + 1.5 * 0.65, abs=1e-12)
    assert uld(student, teacher, **labels, ce_weight=0, uld_weight=1).item() == pytest.approx(0.65, abs=1e-12)


def test_reads_and_never_writes_its_arguments():
    """The logits come back as they were (the published code overwrites them), and backward works though another
    loss has saved them."""
    student, teacher, labels = batch()
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    other = logits.softmax(-1).square().sum()
    loss = uld(logits, teacher, **labels) + other
    loss.backward()
    torch.testing.assert_close(logits.detach(), student, atol=0, rtol=0)
    assert torch.isfinite(leaf.grad).all()


def test_gradient_of_the_whole_loss_against_finite_differences():
    _, _, labels = batch()
    student, teacher = random_logits(2, 5, 3), random_logits(2, 4, 4, seed=1)  # no ties: |x| has no gradient at 0
    assert torch.autograd.gradcheck(lambda z: uld(z, teacher, **labels), student.requires_grad_())


def rows(tokens, row):
    return {name: Tokenized(labels=each.labels[row : row + 1]) for name, each in tokens.items()}


def test_accumulation_changes_nothing():
    """With num_items_in_batch, the rows one by one add up to the whole batch."""
    student, teacher, labels = batch()
    whole = uld(student, teacher, **labels, num_items_in_batch=5)
    parts = sum(uld(student[i : i + 1], teacher[i : i + 1], **rows(labels, i), num_items_in_batch=5) for i in (0, 1))
    torch.testing.assert_close(whole, parts)


def test_a_row_without_pairs_counts_nothing():
    """No label at all: the loss is 0 and no NaN, and so is its gradient."""
    student, teacher, labels = batch()
    leaf = student.clone().requires_grad_()
    loss = uld(
        leaf, teacher, **{name: Tokenized(labels=torch.full_like(each.labels, X)) for name, each in labels.items()}
    )
    loss.backward()
    assert loss.item() == 0
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("weight", [1.0, 1.5, 2.5])
def test_a_weight_above_one_can_hold_a_student_at_the_wrong_token(weight):
    """A certain teacher, and a student that prefers another token than the label: up to q = 1/2, CE + λ ULD is
    -log q + 2 λ q. The way to the label goes up from q = 1/(2 λ) on; for λ <= 1 it never does before 1/2."""
    teacher = torch.tensor([[[60.0, 0.0]] * 2], dtype=torch.float64)
    tokens = tokenized([X, 0])
    for q in torch.arange(0.05, 0.5, 0.01, dtype=torch.float64).tolist():
        logits = torch.tensor([[[q, 1 - q]] * 2], dtype=torch.float64).log().requires_grad_()
        both = {"tokens": tokens, "teacher_tokens": tokens, "skip_student_eos": False}
        loss = uld(logits, teacher, **both, uld_weight=weight)
        loss.backward()
        assert loss.item() == pytest.approx(-math.log(q) + 2 * weight * q, abs=1e-9)
        pulls_to_label = logits.grad[0, 0, 0] < 0
        assert bool(pulls_to_label) == (q < 1 / (2 * weight)) or abs(q - 1 / (2 * weight)) < 1e-9


def test_a_curve_of_all_ranks_is_the_dense_teacher():
    student, teacher, labels = batch()
    curve = sorted_curve(teacher, top=4)
    torch.testing.assert_close(uld(student, curve, **labels), uld(student, teacher, **labels), atol=1e-14, rtol=0)


def test_sparse_targets_are_refused_with_the_reason():
    student, _, labels = batch()
    drawn = SparseTargets(ids=torch.zeros(2, 4, 2, dtype=torch.long), weights=torch.full((2, 4, 2), 0.5))
    with pytest.raises(RecipeError, match=r"sorting is not linear.*20 to 370 %.*allow_biased=true"):
        uld(student, drawn, **labels)
    assert torch.isfinite(uld(student, drawn, **labels, allow_biased=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"align": "words"}, "align='words' is not one of index, bytes"),
        ({"align": "bytes"}, "needs the starts of both"),
        ({"tokens": tokenized([X, 1, 2], [X, 1, 2])}, r"student's labels \(2, 3\) and positions \(2, 5, 3\)"),
        ({"teacher_tokens": tokenized([X, 1], [X, 1])}, r"teacher's labels \(2, 2\)"),
    ],
)
def test_misuse_names_the_values(change, words):
    student, teacher, labels = batch()
    with pytest.raises(ValueError, match=words):
        uld(student, teacher, **(labels | change))


def test_a_curve_needs_its_edges():
    with pytest.raises(ValueError, match="2 runs has 2 edges"):
        SortedCurve(masses=torch.ones(1, 2), edges=(0, 1))
