"""The demo: everything from text to report.html, resumable, and true to one profile per folder."""

from __future__ import annotations

import json

import pytest

from sparsekd import lab
from sparsekd.demo import METHODS, PROFILES, run_demo
from sparsekd.errors import MismatchError, RecipeError

pytestmark = pytest.mark.slow  # one whole run, most of a minute


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with a whole smoke run, interrupted once after its caches, and what it said."""
    folder, said = tmp_path_factory.mktemp("demo") / "demo", []

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "ProcessPoolExecutor", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(out=folder, profile="smoke", progress=said.append)
    kept = stamps(folder, "rows", "teacher", "caches")
    said.clear()
    run_demo(out=folder, profile="smoke", progress=said.append)
    return folder, said, kept


def stamps(folder, *names):
    """Path and time of the files below these folders."""
    return {path: path.stat().st_mtime_ns for name in names for path in (folder / name).rglob("*") if path.is_file()}


def test_the_report_compares_the_methods(ran):
    """report.html names every method; report.json holds a loss for each method and seed."""
    folder, said, _ = ran
    page = (folder / "report.html").read_text(encoding="utf-8")
    for arm in METHODS.values():
        assert arm.label in page
        assert any(arm.label in line for line in said)
    results = json.loads((folder / "report.json").read_text())
    assert "nan" not in json.dumps(results).lower()
    for name in METHODS:
        for seed in PROFILES["smoke"].seeds:
            evaluation = json.loads((folder / "students" / f"{name}-s{seed}" / "evaluation.json").read_text())
            assert 0 < evaluation["loss"]["mean"] < 8
            assert 0 < evaluation["acceptance"]["mean"] < 1


def test_methods_of_a_seed_start_alike(ran):
    """All students see the same number of tokens; seeds differ."""
    folder, _, _ = ran
    metrics = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("students/*/metrics.json")}
    assert len(metrics) == len(METHODS) * len(PROFILES["smoke"].seeds)
    assert len({entry["tokens"] for entry in metrics.values()}) == 1
    assert metrics["rs-s0"]["train_loss"] != metrics["rs-s1"]["train_loss"]


def test_an_interrupted_run_goes_on(ran):
    """Rows, teacher and caches made before the interrupt are not made again."""
    folder, _, kept = ran
    made = {path for path in kept if path.name != "evaluation.json"}
    assert any(path.suffix == ".safetensors" for path in made)
    now = stamps(folder, "rows", "teacher", "caches")
    assert {path: now[path] for path in made} == {path: kept[path] for path in made}


def test_a_complete_run_only_reports_again(ran):
    """Running it again touches no model, cache or evaluation."""
    folder, _, _ = ran
    before = stamps(folder, "rows", "teacher", "caches", "students")
    (folder / "report.html").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekd.models.open_model", lambda *_, **__: pytest.fail("a model was opened"))
        run_demo(out=folder, profile="smoke", progress=lambda _: None)
    assert (folder / "report.html").exists()
    assert stamps(folder, "rows", "teacher", "caches", "students") == before


def test_a_folder_belongs_to_one_profile(ran):
    """Another profile, or another definition of the same one, is refused with the way out."""
    folder, _, _ = ran
    with pytest.raises(MismatchError, match=r"holds a demo of profile 'smoke'.*sparsekd demo FOLDER"):
        run_demo(out=folder, profile="quick", progress=lambda _: None)


def test_an_unknown_profile_is_refused(tmp_path):
    """The profiles are listed, and nothing is made."""
    with pytest.raises(RecipeError, match="profile='huge' is not one of smoke, quick, full"):
        run_demo(out=tmp_path / "d", profile="huge", progress=lambda _: None)
    assert not (tmp_path / "d").exists()
