"""What a byte buys: one small run end to end, and how its findings follow from the numbers."""

from __future__ import annotations

import pytest
from conftest import SEQ_LEN

from sparsekd import frontier
from sparsekd import lab as lab_module
from sparsekd.cache import CacheReader
from sparsekd.lab import Arm, Lab, LabSettings
from sparsekd.reproduction import Cell, Settings

ANGLES = {
    "Random sampling 50": Cell(mean=4.0),
    "Systematic 6": Cell(mean=9.0),
    "Systematic 12": Cell(mean=6.0),
    "Systematic 30": Cell(mean=3.0),
    "Systematic 50": Cell(mean=1.0),
}
SIZES = {"Random sampling 50": 100.0, "Systematic 6": 8, "Systematic 12": 16, "Systematic 30": 25, "Systematic 50": 40}


def test_the_smallest_cache_of_the_same_gradient_is_named():
    """Of the systematic caches at 4 degrees or less the smallest: 30 rounds, a quarter of the bytes."""
    found = frontier._fewest(SIZES, ANGLES)
    assert found.holds is True
    assert "Systematic 30" in found.text
    assert "0.25×" in found.text
    far = {name: Cell(mean=cell.mean + (name != "Random sampling 50") * 10) for name, cell in ANGLES.items()}
    assert frontier._fewest(SIZES, far).holds is False


def test_a_seed_of_the_frontier_draws_its_caches_anew(world, tmp_path):
    """A redrawn arm's cache has the seed of its student and other draws; any other arm has one cache for all seeds."""
    sizes = LabSettings(seq_len=SEQ_LEN, student_rows=8, seeds=(0, 1))
    lab = Lab(tmp_path, sizes, rows=world.rows, teacher=world.teacher, say=lambda _: None)
    assert all(arm.redrawn == ("rounds" in arm.sampler) for arm in frontier.ARMS)
    redrawn, top = frontier.LINES["Systematic"][0], Arm(label="Top-K 5", sampler={"name": "top_k", "k": 5})
    first, second = (lab.cache(redrawn, student_seed=seed) for seed in (0, 1))
    assert [CacheReader(path).spec.sampler["seed"] for path in (first, second)] == [0, 1]
    assert (CacheReader(first).flat(3).ids.tolist()) != (CacheReader(second).flat(3).ids.tolist())
    assert lab.cache(top, student_seed=0) == lab.cache(top, student_seed=1)
    assert lab.student_folder(redrawn, 0) != lab.student_folder(redrawn, 1)


@pytest.mark.slow
def test_one_small_frontier(world, tmp_path, monkeypatch):
    """A line of two arms: the same counts are smaller by split, more rounds are nearer, the plot is drawn."""
    tiny = LabSettings(
        seq_len=SEQ_LEN,
        student={"family": "tiny", "hidden_size": 16, "intermediate_size": 32},
        batch_size=8,
        eval_rows=8,
    )
    monkeypatch.setitem(lab_module.SETTINGS, "quick", tiny)
    monkeypatch.setitem(frontier.SIZES, "quick", (64, 4))
    monkeypatch.setattr(frontier, "LEAST_SEEDS", 1)
    kept = ("Random sampling 50", "Systematic 6", "Systematic 50")
    monkeypatch.setattr(frontier, "ARMS", tuple(arm for arm in frontier.ARMS if arm.label in kept))
    monkeypatch.setattr(frontier, "CLAIMS", ())
    lines = {name: tuple(arm for arm in arms if arm.label in kept) for name, arms in frontier.LINES.items()}
    monkeypatch.setattr(frontier, "LINES", {name: arms for name, arms in lines.items() if arms})
    settings = Settings(seeds=1, rows=world.rows, teacher=world.teacher, say=lambda _: None)
    result = frontier.frontier(tmp_path / "frontier", settings)
    rows, names = result.ours.rows, [column.name for column in frontier.COLUMNS]
    size, split, angle = (names.index(name) for name in ("bytes per token", "by codec split", "gradient angle"))
    assert rows["Random sampling 50"][split].mean < rows["Random sampling 50"][size].mean
    assert rows["Systematic 50"][angle].mean < rows["Systematic 6"][angle].mean
    assert rows["Systematic 6"][size].mean == rows["Systematic 6"][split].mean
    assert frontier.plot_frontier(result).axes
