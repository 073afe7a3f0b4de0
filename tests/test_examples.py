"""The examples run as they stand, and a run that was cut off ends like one that was not."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs one with the words that its first line names."""

    def run(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # Trainer's default
def test_a_trainer(example, world, tmp_path):
    example("trainer.py", world.cache, world.teacher, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(next((tmp_path / "out").glob("checkpoint-*")))


def test_a_loop_with_accelerate_goes_on_where_it_was(example, world, tmp_path):
    """To the last bit, across the end of an epoch: 12 rows of 8 a step."""
    for steps in (11, 13):
        example("accelerate_loop.py", world.cache, world.teacher, tmp_path / "cut", steps)
    example("accelerate_loop.py", world.cache, world.teacher, tmp_path / "whole", 13)
    cut, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole"))
    assert cut == whole
