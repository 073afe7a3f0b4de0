"""The language-model tables: how cells and claims follow from students, and one lab run end to end."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import SEQ_LEN

from sparsekd import lab as lab_module
from sparsekd import measures, tables, unique_tokens
from sparsekd.errors import MismatchError
from sparsekd.lab import Lab, LabSettings, Outcome
from sparsekd.reproduction import Settings
from sparsekd.tables import CE, FULL, Claim, drawn, gap, judge, top
from sparsekd.unique_tokens import power_law


def outcome(arm, losses, ece=0.01, ids=None):
    bins = [{"count": 10, "confidence": 0.5, "accuracy": 0.4}, {"count": 0, "confidence": None, "accuracy": None}]
    rest = {"ece": ece, "acceptance": {"mean": 0.5}, "reliability": bins}
    evaluations = tuple({"loss": {"mean": loss}} | rest for loss in losses)
    cache = None if ids is None else {"unique_ids": {"mean": ids}}
    return Outcome(arm=arm, evaluations=evaluations, metrics=({},) * len(losses), cache=cache)


def three(losses, **more):
    """CE at 5, FullKD at 4, and one arm."""
    arm = drawn(50, "ours")
    return {
        "CE": outcome(CE, [5.0, 5.2, 4.8]),
        "FullKD": outcome(FULL, [4.0, 4.2, 3.8]),
        "ours": outcome(arm, losses, ids=12.0, **more),
    }


def test_gap_is_zero_at_ce_and_hundred_at_full_kd():
    """% CE to FullKD as in the paper's tables, by hand: half way is 50 ± 0."""
    outcomes = three([4.5, 4.7, 4.3])
    assert gap(outcomes, "CE").mean == pytest.approx(0)
    assert gap(outcomes, "FullKD").mean == pytest.approx(100)
    half = gap(outcomes, "ours")
    assert half.mean == pytest.approx(50)
    assert half.standard_error == pytest.approx(0, abs=1e-9)


def test_claims_hold_beyond_the_interval_only():
    """A paired difference beyond the 95 % interval decides; within it nothing is claimed; the sign counts."""
    claim = Claim(better="ours", worse="CE")
    assert judge(three([4.5, 4.7, 4.3]), claim).holds is True
    assert judge(three([5.5, 5.7, 5.3]), claim).holds is False
    assert judge(three([4.0, 6.0, 4.8]), claim).holds is None
    assert judge(three([4.5, 4.7, 4.3], ece=0.05), Claim(better="CE", worse="ours", metric="ece")).holds is True


def test_one_seed_decides_nothing():
    """Without an interval no claim is judged, however large the difference, and the sentence says so."""
    outcomes = {name: outcome(arm, [loss]) for name, arm, loss in (("CE", CE, 5.0), ("FullKD", FULL, 1.0))}
    found = judge(outcomes, Claim(better="FullKD", worse="CE"))
    assert found.holds is None
    assert "4.000 nats lower, from one seed, which decides nothing." in found.text


def test_a_diverged_arm_is_said_to_have_diverged():
    """An arm without a finite loss shows the word and loses every claim."""
    outcomes = three([4.5, None, 4.3])
    assert outcomes["ours"].diverged()
    assert "diverged" in tables.cells(outcomes, "ours")
    assert judge(outcomes, Claim(better="CE", worse="ours")).holds is True
    assert judge(outcomes, Claim(better="ours", worse="CE")).holds is False


def test_arms_are_known_by_what_they_do():
    """Equal work under two labels is one folder; any other setting is another."""
    assert top(12, "a").key() == top(12, "b").key()
    others = [top(12), top(13), top(12, residual="ghost"), drawn(12), CE, FULL]
    assert len({arm.key() for arm in others}) == len(others)


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_name_the_papers_rows(name):
    """Every row of the paper that is no baseline is an arm of ours, and every claim is about a row."""
    ours = {"CE", "FullKD"} | {a.label for a in getattr(tables, f"{name.upper()}_ARMS")}
    assert set(getattr(tables, f"{name.upper()}_PAPER")) <= ours


def test_exact_variance_of_proposals():
    """E‖t̂ - p‖² for q ∝ p^t equals a Monte Carlo of the sampler's plain weights, within 5 standard errors."""
    import sparsekd as skd

    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    log_p = logits.double().log_softmax(-1)
    for t in (0.6, 1.0, 1.4):
        log_q = (t * log_p).log_softmax(-1)
        exact = float((2 * log_p - log_q).exp().sum() - (2 * log_p).exp().sum()) / 10
        settings = {"rounds": 10, "temperature": t, "normalize": False}
        drawn_ = skd.sample(logits.expand(20000, -1), "random_sampling", **settings).densify(40).double()
        errors = (drawn_ - log_p.exp()).square().sum(-1)
        assert abs(errors.mean() - exact) < 5 * errors.std() / math.sqrt(20000)


@pytest.mark.slow
def test_a_lab_trains_what_is_asked_and_keeps_it(world, tmp_path, monkeypatch):
    """CE, ghost and FullKD students on the world's rows; a second run trains nothing; a diverged arm is recorded."""
    tiny = LabSettings(
        seq_len=SEQ_LEN,
        student={"family": "tiny", "hidden_size": 16, "intermediate_size": 32},
        student_rows=64,
        student_steps=8,
        batch_size=8,
        eval_rows=8,
        seeds=(0,),
    )
    monkeypatch.setitem(lab_module.SETTINGS, "quick", tiny)
    settings = Settings(seeds=1, rows=world.rows, teacher=world.teacher, say=lambda _: None)
    run = tables.language_table([top(5, "Ghost", residual="ghost")], {}, [Claim(better="FullKD", worse="CE")], "x")
    result = run(tmp_path / "table", settings)
    assert list(result.ours.rows) == ["CE", "Ghost", "FullKD"]
    assert result.ours.rows["Ghost"][0].mean == pytest.approx(5, abs=0.01)
    assert 1 < result.ours.rows["Ghost"][1].mean < 7
    monkeypatch.setattr(Lab, "_train", lambda self, jobs, *_: pytest.fail("trained again") if jobs else None)
    assert run(tmp_path / "table", settings) == result
    speeds = measures.table4(tmp_path / "table4", settings).ours.rows
    assert speeds["FullKD"][0].mean == 1
    lossless = measures.quantisation(tmp_path / "quantisation", settings)
    assert [finding.holds for finding in lossless.findings] == [True, True]
    with pytest.raises(MismatchError, match="holds a lab with other settings"):
        Lab(tmp_path / "lab", LabSettings(), rows=world.rows, teacher=world.teacher)
    assert json.loads((tmp_path / "lab" / "lab.json").read_text())["student_steps"] == 8


# -- figure 5


def test_a_power_law_is_recovered():
    """3 r^0.5 has exponent 0.5, prefactor 3 and R² = 1; a bent curve has a lower R²."""
    rounds = [1, 2, 5, 10]
    assert power_law(rounds, [3 * r**0.5 for r in rounds]) == pytest.approx((0.5, 3, 1))
    assert power_law(rounds, [1, 2, 2.1, 2.2])[2] < 0.9


def test_fig5_counts_a_teachers_ids_over_seeds(world, tmp_path, monkeypatch):
    """One round is one id for teacher and Zipf law; every cell beyond it has the error of the seeds' rows and draws."""
    monkeypatch.setattr(unique_tokens, "LM_VOCAB", 2000)
    settings = Settings(seeds=3, teacher=world.teacher, rows=world.rows, say=lambda _: None)
    result = unique_tokens.fig5(tmp_path / "fig5", settings)
    unique = [cells[0].mean for cells in result.ours.rows.values()]
    assert unique[0] == 1
    assert unique == sorted(unique) == result.data["unique"]
    assert result.ours.rows["1 round"][2].mean == 1
    for name, (ours, _, of_zipf) in result.ours.rows.items():
        assert (ours.n, of_zipf.n) == (3, 3)
        assert name == "1 round" or min(ours.standard_error, of_zipf.standard_error) > 0
    assert world.teacher in result.scale
