"""The Triton kernels compile for GPUs, on a machine without one, into code that keeps its numbers in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
PROGRAM = Path(__file__).parent.parent / "benchmarks" / "gpu_code.py"


@pytest.fixture(scope="module")
def kernels():
    if not Path(triton.knobs.nvidia.cuobjdump.path).exists():
        pytest.skip("this triton brings no tools for NVIDIA GPUs along")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, str(PROGRAM), "--generations", "80", "90"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["kernels"]


def test_nothing_spills(kernels):
    """With every option too: a spilled register is two trips through memory a block."""
    assert len(kernels) == 6
    for name, generations in kernels.items():
        assert {each["spilled"] for each in generations.values()} == {0}, name


def test_rows_are_read_sixteen_bytes_at_a_time(kernels):
    """16 logits of bf16 a thread in each of two passes are 2 wide loads, and 2 wide stores: nothing else is wide."""
    assert {each["wide"] for each in kernels["loss, bf16, 12 labels"].values()} == {6}


def test_one_row_of_logits_an_sm(kernels):
    """So that the second pass finds what the first one read in the GPU's cache."""
    assert {each["rows"] for name in kernels if name.startswith("loss") for each in kernels[name].values()} == {1}
