"""Approximate likelihood matching: which tokens make a chunk, its log-likelihoods, its minimum."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekd.alm import alm, chunk_log_p, coin_losses, realised_log_p, shared_chunks
from sparsekd.uld import Tokenized

X = -100


def tokenized(labels, pieces, before=1):
    """One row: `before` tokens that are no text, then pieces of a text; labels of all of them."""
    starts, ends, at = [-1] * before, [-1] * before, 0
    for piece in pieces:
        starts.append(at)
        at += len(piece)
        ends.append(at)
    return Tokenized(labels=torch.tensor([labels]), starts=torch.tensor([starts]), ends=torch.tensor([ends]))


def example():
    """ "abcdef" as ab|c|def|END and a|bc|d|ef|END: chunks abc, def, END."""
    student = tokenized([X, 1, 2, 3, 0], ["ab", "c", "def", ""])
    teacher = tokenized([X, 1, 2, 3, 4, 0], ["a", "bc", "d", "ef", ""])
    return student, teacher


def test_chunks_by_hand():
    """Position l holds the chunk of token l+1."""
    chunks = shared_chunks(*example())
    assert chunks.student.tolist() == [[0, 0, 1, 2, -1]]
    assert chunks.teacher.tolist() == [[0, 0, 1, 1, 2, -1]]
    assert chunks.count == 3


def test_chunks_of_several_rows_are_numbered_on():
    student, teacher = example()
    twice = [
        Tokenized(**{name: getattr(each, name).repeat(2, 1) for name in ("labels", "starts", "ends")})
        for each in (student, teacher)
    ]
    chunks = shared_chunks(*twice)
    assert chunks.count == 6
    assert chunks.student[1].tolist() == [3, 3, 4, 5, -1]


def test_a_chunk_with_an_unlabelled_token_is_left_out():
    """The prompt ends inside the teacher's token: nobody predicts the whole of "abc"."""
    student = tokenized([X, X, 2, 3, 0], ["ab", "c", "def", ""])
    chunks = shared_chunks(student, example()[1])
    assert chunks.student.tolist() == [[-1, -1, 0, 1, -1]]
    assert chunks.teacher.tolist() == [[-1, -1, 0, 0, 1, -1]]


def test_a_text_cut_off_inside_a_chunk_leaves_it_out():
    """The student's row ends within the teacher's "ef"."""
    student = tokenized([X, 1, 2, 3], ["ab", "c", "de"])
    chunks = shared_chunks(student, example()[1])
    assert chunks.count == 1
    assert chunks.student.tolist() == [[0, 0, -1, -1]]


def test_the_first_token_is_no_part_of_a_chunk():
    """Without a token before the text nothing predicts "ab", so "abc" is left out."""
    student = tokenized([1, 2, 3, 0], ["ab", "c", "def", ""], before=0)
    chunks = shared_chunks(student, example()[1])
    assert chunks.student.tolist() == [[-1, 0, 1, -1]]


def test_chunk_log_likelihoods_telescope_to_the_sequence():
    """Their sum is the log-likelihood of the whole text, under both tokenizations."""
    generator = torch.Generator().manual_seed(0)
    for tokens in example():
        logits = torch.randn(1, tokens.labels.shape[1], 7, generator=generator, dtype=torch.float64)
        log_p, chunks = realised_log_p(logits, tokens.labels), shared_chunks(*example())
        of = chunks.student if tokens.labels.shape == chunks.student.shape else chunks.teacher
        whole = logits.log_softmax(-1)[0, torch.arange(tokens.labels.shape[1] - 1), tokens.labels[0, 1:]].sum()
        torch.testing.assert_close(chunk_log_p(log_p, of, chunks.count).sum(), whole, atol=1e-12, rtol=0)


def test_value_by_hand():
    """τ = 2, p = .25, q = .04: p' = .5, q' = .2, l = -.5 log .2 - .5 log .8; q' = 1 counts 1 - q' as `smallest`."""
    p, q = torch.tensor([0.25, 0.25]).log(), torch.tensor([0.04, 1.0]).log()
    got = coin_losses(q, p, temperature=2.0)
    assert got[0].item() == pytest.approx(-0.5 * math.log(0.2) - 0.5 * math.log(0.8), abs=1e-6)
    assert got[1].item() == pytest.approx(-0.5 * math.log(1e-6), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_least_where_the_probabilities_are_equal(temperature):
    """The gradient is (q' - p') / (τ (1 - q')): 0 at q = p, and its sign leads there."""
    log_p = torch.linspace(-9, -0.05, 40, dtype=torch.float64)
    for shift in (-0.02, 0.0, 0.02):
        log_q = (log_p + shift).requires_grad_()
        coin_losses(log_q, log_p, temperature=temperature).sum().backward()
        q, p = (log_q.detach() / temperature).exp(), (log_p / temperature).exp()
        torch.testing.assert_close(log_q.grad, (q - p) / (temperature * (1 - q)), atol=1e-12, rtol=1e-9)


def test_float32_keeps_its_digits_at_a_large_temperature():
    log_q, log_p = torch.tensor([-0.01]), torch.tensor([-0.02])
    truth = coin_losses(log_q.double(), log_p.double())
    assert coin_losses(log_q, log_p).item() == pytest.approx(truth.item(), rel=1e-4)


def test_the_loss_is_the_mean_over_chunks():
    student, teacher = example()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 7, generator=generator, dtype=torch.float64)
    log_p = -torch.rand(1, 6, generator=generator, dtype=torch.float64)
    log_q = logits.log_softmax(-1)
    q = torch.stack([log_q[0, 0, 1] + log_q[0, 1, 2], log_q[0, 2, 3], log_q[0, 3, 0]])
    p = torch.stack([log_p[0, 0] + log_p[0, 1], log_p[0, 2] + log_p[0, 3], log_p[0, 4]])
    want = coin_losses(q, p).mean()
    got = alm(logits, log_p, tokens=student, teacher_tokens=teacher)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    mixed = alm(logits, log_p, tokens=student, teacher_tokens=teacher, ce_weight=0.5)
    torch.testing.assert_close(mixed, want - 0.5 * q.sum() / 4, atol=1e-12, rtol=0)


def test_gradient_against_finite_differences():
    student, teacher = example()
    logits = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = torch.full((1, 6), -0.7, dtype=torch.float64)

    def loss(leaf):
        return alm(leaf, log_p, tokens=student, teacher_tokens=teacher)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_nothing_shared_is_zero():
    student, teacher = example()
    nothing = Tokenized(labels=torch.full_like(student.labels, X), starts=student.starts, ends=student.ends)
    logits = torch.zeros(1, 5, 7, requires_grad=True)
    loss = alm(logits, torch.zeros(1, 6), tokens=nothing, teacher_tokens=teacher)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_misuse_names_the_values():
    student, teacher = example()
    logits = torch.zeros(1, 5, 7)
    with pytest.raises(ValueError, match=r"teacher_log_p \(1, 5\) and the teacher's labels \(1, 6\)"):
        alm(logits, torch.zeros(1, 5), tokens=student, teacher_tokens=teacher)
    with pytest.raises(ValueError, match="needs starts and ends"):
        alm(logits, torch.zeros(1, 6), tokens=Tokenized(labels=student.labels), teacher_tokens=teacher)
