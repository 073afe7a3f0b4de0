"""Students with another tokenizer: what the shares are, by hand, and one small run end to end."""

from __future__ import annotations

import pytest
from conftest import SEQ_LEN

from sparsekd import crosstok
from sparsekd import lab as lab_module
from sparsekd.cache import CacheReader
from sparsekd.crosstok import BEST, CE, CE_THEIRS, CEILING, LABELS, cells, share
from sparsekd.lab import Arm, Lab, LabSettings, Outcome
from sparsekd.packed import RowsReader
from sparsekd.reproduction import Settings


def outcome(*bits):
    evaluations = tuple({"loss": {"mean": each}, "bits_per_byte": each} for each in bits)
    return Outcome(arm=Arm(label="any"), evaluations=evaluations, metrics=({},) * len(bits), cache=None)


def outcomes(sets=(2.2, 2.4)):
    """CE at 3.0 and 3.2; in the teacher's tokens 3.1 and 3.3, distilled 2.0 and 2.2."""
    return {
        CE: outcome(3.0, 3.2),
        BEST: outcome(*sets),
        CE_THEIRS: outcome(3.1, 3.3),
        CEILING: outcome(2.0, 2.2),
    }


def test_shares_of_the_way_and_of_the_gain():
    """0.8 bits below CE: 80 % of the 1.0 from CE to the ceiling, 73 % of the 1.1 that KD gains in its own tokens."""
    found = outcomes()
    assert share(found, BEST, CE, CEILING).mean == pytest.approx(80)
    assert share(found, BEST, CE, CEILING).standard_error == pytest.approx(0, abs=1e-9)
    assert share(found, BEST, CE_THEIRS, CEILING).mean == pytest.approx(100 * 0.8 / 1.1)
    assert share(found, CE, CE, CEILING).mean == pytest.approx(0)
    assert cells(found, CEILING)[-1] is None
    assert share(outcomes() | {CEILING: outcome(3.5, 3.5)}, BEST, CE, CEILING) is None


def test_the_goal_is_seventy_per_cent():
    """Judged by the mean share; without a gap, or with a diverged arm, it is missed."""
    assert crosstok._goal(outcomes()).holds is True
    assert crosstok._goal(outcomes(sets=(2.4, 2.6))).holds is False
    assert crosstok._goal(outcomes() | {CEILING: outcome(3.5, 3.5)}).holds is False
    assert crosstok._goal(outcomes(sets=(None, 2.0))).holds is False


def test_one_small_run(world, tmp_path, monkeypatch):
    """Every arm is trained; both exams hold the same bytes; both transcoded caches the same rows; it is kept."""
    tiny = LabSettings(
        seq_len=SEQ_LEN,
        student={"family": "tiny", "hidden_size": 16, "intermediate_size": 32},
        student_rows=32,
        student_steps=2,
        batch_size=8,
        eval_rows=4,
    )
    monkeypatch.setitem(lab_module.SETTINGS, "quick", tiny)
    monkeypatch.setattr(Lab, "_train", trained_here)
    monkeypatch.setattr(crosstok, "ACCEPTANCE_ROWS", 2)
    settings = Settings(seeds=1, rows=world.rows, teacher=world.teacher, say=lambda _: None)
    result = crosstok.crosstok(tmp_path / "crosstok", settings)
    assert set(result.ours.rows) == set(LABELS)
    assert all(len(values) == 1 for values in result.data["bits"].values())
    assert all(0 < value < 100 for [value] in result.data["acceptance"].values())
    assert crosstok.plot_bits(result).axes
    home = tmp_path / "crosstok-lab" / "world"
    readers = [RowsReader(home / f"heldout-{whose}", "train") for whose in ("student", "teacher")]
    assert readers[0].manifest["splits"]["train"]["bytes"] == readers[1].manifest["splits"]["train"]["bytes"]
    assert readers[0].tokenizer_hash != readers[1].tokenizer_hash
    lengths = [CacheReader(home / f"cache-{name}").spec.seq_len for name in ("sets", "point")]
    assert lengths[0] == lengths[1]
    assert crosstok.crosstok(tmp_path / "crosstok", settings) == result


def trained_here(self, jobs, teacher, exam):
    """Lab._train without processes."""
    for job in jobs:
        lab_module._train_one(self.settings, (self.rows(), teacher or self.teacher()), exam, job)
