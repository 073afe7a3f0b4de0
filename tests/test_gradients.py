"""Gradients under sparse targets against full distillation's: exact where the targets are, and what a sample costs."""

from __future__ import annotations

import pytest
import torch

from sparsekd import models
from sparsekd.gradients import gradient_geometry

METHODS = {
    "all": ("full", {}),
    "10 rounds": ("random_sampling", {"rounds": 10}),
    "160 rounds": ("random_sampling", {"rounds": 160}),
    "top 5": ("top_k", {"k": 5}),
}


@pytest.fixture(scope="module")
def found(world, tmp_path_factory):
    torch.manual_seed(0)
    student = models.new_student({"family": "tiny", "hidden_size": 32}, vocab_size=300, seq_len=32)
    path = tmp_path_factory.mktemp("student")
    student.save_pretrained(path)
    return gradient_geometry(
        student=str(path), teacher=world.teacher, rows=world.rows, methods=METHODS, batch_rows=24, device="cpu"
    )


def test_every_probability_gives_the_gradient_of_full_distillation(found):
    """All V probabilities as sparse targets: angle 0, ratio 1, no error, to float32."""
    assert found["all"]["ids"] == 300
    assert found["all"]["error"] < 1e-5
    assert found["all"]["angle"] < 0.05
    assert found["all"]["ratio"] == pytest.approx(1, abs=1e-5)


def test_sixteen_times_the_rounds_are_a_quarter_of_the_error(found):
    """The error of an unbiased sample falls as 1/sqrt(rounds): 4 times here, within a factor of 1.6."""
    assert 2.5 < found["10 rounds"]["error"] / found["160 rounds"]["error"] < 6.4
    assert 1 < found["10 rounds"]["ids"] < found["160 rounds"]["ids"] < 160


def test_top_k_is_biased(found):
    """Five labels of 300, taken from the top, miss the direction by more than ten draws do."""
    assert found["top 5"]["angle"] > found["10 rounds"]["angle"] > found["160 rounds"]["angle"]
