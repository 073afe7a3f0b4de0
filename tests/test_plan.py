"""The plan: its closed forms against draws, its bytes against a capture's, its choice by hand."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import sparsekd as skd
from sparsekd import heads, models
from sparsekd.capture import capture
from sparsekd.cli import app
from sparsekd.codec import encode_row
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.packed import RowsReader
from sparsekd.plan import candidates, choose, plan, plan_text
from sparsekd.position_budget import calibrate, entropies, inclusion
from sparsekd.rng import Keys
from sparsekd.shard import row_index_bytes
from sparsekd.vocab import train_tokenizer

SMALL = {"rounds": [10, 20], "top_k": [5], "device": "cpu"}


@pytest.fixture(scope="module")
def planned(world, tmp_path_factory):
    """Every row of the held-out split, so that the plan's numbers are those of the whole."""
    out, reader = tmp_path_factory.mktemp("plan") / "plan", RowsReader(world.rows, "heldout")
    settings = {"split": "heldout", "sample_tokens": len(reader) * reader.seq_len, "plot": True} | SMALL
    return plan(rows=world.rows, teacher=world.teacher, out=out, tokens=1e9, **settings)


def option(result, name, size):
    return next(o for o in result["options"] if list(o["sampler"].values()) == [name, size])


def stored_bytes(folder):
    """Of a cache's shards, their JSON headers left out, and of its tokens."""
    files = sorted(Path(folder).glob("shard-*"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    return sum(file.stat().st_size for file in files) - headers, skd.CacheReader(str(folder)).manifest["stats"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [(10**9, "2,222.2 hours"), (450_000, "1.0 hours"), (7_500, "1.0 minutes"), (750, "0.1 minutes")],
)
def test_the_pass_over_all_tokens_takes_as_long_as_that_over_some(planned, tokens, words):
    """500 tokens in 4 seconds are 125 a second."""
    text = plan_text(planned | {"sampled_tokens": 500, "teacher_seconds": 4.0, "tokens": tokens})
    assert f"which one process like this one does in {words} (125 tokens/s)\n" in text
    assert planned["teacher_seconds"] > 0


def test_bytes_are_those_of_a_capture(world, planned, tmp_path):
    """The same rows captured with the same seed: bytes and ids per token agree to the last bits of logits."""
    sampler = {"name": "systematic", "rounds": 20}
    settings = {"sampler": sampler, "split": "heldout", "codec": "raw24", "device": "cpu"}
    capture(rows=world.rows, teacher=world.teacher, out=tmp_path / "c", **settings)
    size, stats = stored_bytes(tmp_path / "c")
    found = option(planned, "systematic", 20)
    assert found["bytes_by_codec"]["raw24"] == pytest.approx(size / stats["tokens"], rel=0.01)
    assert found["ids"] == pytest.approx(stats["pairs"] / stats["positions"], rel=0.02)
    assert found["gigabytes"] == pytest.approx(found["bytes"])
    assert found["bytes"] == min(found["bytes_by_codec"].values()) == found["bytes_by_codec"][found["codec"]]


def test_bytes_of_split_are_those_of_a_whole_cache(world, tmp_path, monkeypatch):
    """A third of the rows tells the files' bytes a token to 2 %; so does capture's first batch, before it begins.

    Without the ranks that a shard gives its ids, blocks would be more than 2 % too large."""
    capture_module = importlib.import_module("sparsekd.capture")
    known = {"rows": world.rows, "teacher": world.teacher, "device": "cpu"}
    estimates, own = [], capture_module._preflight
    monkeypatch.setattr(capture_module, "_preflight", lambda *words: estimates.append(own(*words)) or estimates[-1])
    capture(**known, out=tmp_path / "c", batch_size=32, shard_rows=96)
    size, stats = stored_bytes(tmp_path / "c")
    reader = RowsReader(world.rows)
    sampled = {"sample_tokens": len(reader) * reader.seq_len // 3, "rounds": [50], "top_k": [5]}
    result = plan(**known, out=tmp_path / "p", tokens=96 * 16 * reader.seq_len, **sampled)
    assert option(result, "systematic", 50)["bytes_by_codec"]["split"] == pytest.approx(
        size / stats["tokens"], rel=0.02
    )
    assert estimates == [pytest.approx(size / stats["tokens"], rel=0.02)]
    cache, plain = skd.CacheReader(str(tmp_path / "c")), 0
    for row in range(len(reader)):
        plain += len(encode_row(cache[row].input_ids, cache.flat(row), cache[row].supervised, cache.spec.codec))
    assert plain / stats["tokens"] + row_index_bytes(32) / 32 > 1.02 * size / stats["tokens"]


@torch.no_grad()
def head_world(world):
    """(hidden, logits, tokens of the stand-in) of every position of the held-out split."""
    reader, model = RowsReader(world.rows, "heldout"), models.open_model(world.teacher, device="cpu")
    tokens = torch.from_numpy(reader.batch(range(len(reader))).input_ids.astype(np.int64))
    hidden = heads.body_of(model)(input_ids=tokens).last_hidden_state[:, :-1].flatten(0, 1)
    return hidden.double(), model(input_ids=tokens).logits[:, :-1].flatten(0, 1)


def test_errors_and_angles_are_those_of_draws(world, planned):
    """Gradients of the loss in the head's weight, over 40 seeds; a biased sampler's angle is exact."""
    hidden, logits = head_world(world)
    p = logits.double().softmax(-1)
    q = p.mean(0)
    full = (q - p).T @ hidden
    for name, setting, size in (("systematic", "rounds", 10), ("random_sampling", "rounds", 20), ("top_k", "k", 5)):
        errors, gaps, ids = [], [], []
        for seed in range(40 if setting == "rounds" else 1):
            targets = skd.sample(logits, name, seed=seed, **{setting: size})
            dense = targets.densify(300).double()
            errors.append(float((dense - p).square().sum(-1).mean()))
            ids.append(float((targets.weights > 0).sum(-1).double().mean()))
            gaps.append((dense.sum(-1, keepdim=True) * q - dense).T @ hidden)
        found = option(planned, name, size)
        assert found["squared_error"] == pytest.approx(np.mean(errors), rel=0.03)
        assert found["ids"] == pytest.approx(np.mean(ids), rel=0.02)
        if setting == "k":
            cosine = (gaps[0] * full).sum() / gaps[0].norm() / full.norm()
            assert found["angle"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-3)
            assert found["squared_bias"] == found["squared_error"]
        else:
            noise = math.sqrt(np.mean([float((gap - full).square().sum()) for gap in gaps]))
            assert found["angle"] == pytest.approx(math.degrees(math.atan2(noise, float(full.norm()))), rel=0.05)
            assert found["squared_bias"] == 0


def test_a_larger_batch_quiets_draws_not_bias(world, planned, tmp_path):
    """Four times the batch halves the tangent of an unbiased angle; top-k's stays."""
    reader = RowsReader(world.rows, "heldout")
    settings = {"split": "heldout", "sample_tokens": len(reader) * reader.seq_len} | SMALL
    batch = 4 * len(reader) * reader.seq_len
    larger = plan(rows=world.rows, teacher=world.teacher, out=tmp_path / "p", batch_tokens=batch, **settings)
    for before, after in zip(planned["options"], larger["options"], strict=True):
        tangents = [math.tan(math.radians(o["angle"])) for o in (before, after)]
        assert tangents[0] / tangents[1] == pytest.approx(2 if before["unbiased"] else 1, rel=1e-4)


@torch.no_grad()
def test_the_price_of_half_the_positions_is_that_of_draws(world, tmp_path):
    """Over 60 seeds: positions kept by the law's coins, weighing the inverse; evenly is worked out by hand."""
    student = tmp_path / "student"
    models.new_student({"family": "tiny"}, vocab_size=300, seq_len=64).save_pretrained(student)
    reader = RowsReader(world.rows, "heldout")
    whole = {"split": "heldout", "sample_tokens": len(reader) * reader.seq_len, "fidelity": "paper"}
    settings = whole | SMALL | {"student": str(student), "rounds": [40]}
    result = plan(rows=world.rows, teacher=world.teacher, out=tmp_path / "p", **settings)
    assert "half the positions" in plan_text(result)
    tokens = torch.from_numpy(reader.batch(range(len(reader))).input_ids.astype(np.int64))
    teacher, learner = (models.open_model(str(path), device="cpu") for path in (world.teacher, student))
    logits = teacher(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    hidden = heads.body_of(learner)(input_ids=tokens).last_hidden_state[:, :-1].flatten(0, 1).double()
    p, q = logits.double().softmax(-1), learner(input_ids=tokens).logits[:, :-1].flatten(0, 1).double().softmax(-1)
    full = (q - p).T @ hidden
    rows = torch.arange(len(reader)).repeat_interleave(tokens.shape[1] - 1)
    positions = torch.arange(tokens.shape[1] - 1).repeat(len(reader))
    sampler = dict(result["options"][result["chosen"]]["sampler"])
    name, found = sampler.pop("name"), result["half_the_positions"]
    for by in found:
        pi = torch.full((len(p),), 0.5, dtype=torch.float64)
        if by != "evenly":
            pi = inclusion(calibrate(entropies(logits), by, 0.5).levels(entropies(logits)))
        noise = []
        for seed in range(60):
            keys = Keys(seed=seed, rows=rows, positions=positions)
            drawn = skd.sample(logits, name, seed=seed, rows=rows, positions=positions, **sampler).densify(300).double()
            gradient = ((q - drawn) * (keys.coins() < pi)[:, None] / pi[:, None]).T @ hidden
            noise.append(float((gradient - full).square().sum()))
        angle = math.degrees(math.atan2(math.sqrt(np.mean(noise)), float(full.norm())))
        assert found[by] == pytest.approx(angle, rel=0.06)
    assert result["options"][result["chosen"]]["angle"] < min(found.values())


def test_a_student_of_ones_own(world, tmp_path):
    """student=MODEL: an untrained student's head; the teacher itself has no gradient left to be compared with."""
    student = tmp_path / "student"
    models.new_student({"family": "tiny"}, vocab_size=300, seq_len=64).save_pretrained(student)
    settings = {"sample_tokens": 256, "student": str(student)} | SMALL
    own = plan(rows=world.rows, teacher=world.teacher, out=tmp_path / "p", **settings)
    assert all(0 < o["angle"] < 90 for o in own["options"])
    itself = plan(rows=world.rows, teacher=world.teacher, out=tmp_path / "q", **settings | {"student": world.teacher})
    assert all(o["angle"] > 89 for o in itself["options"] if o["unbiased"])
    models.new_student({"family": "tiny"}, vocab_size=200, seq_len=64).save_pretrained(tmp_path / "narrow")
    with pytest.raises(
        MismatchError,
        match=r"the rows' tokenizer has 300 tokens, student .* makes 200 logits; an angle needs one vocabulary",
    ):
        plan(
            rows=world.rows,
            teacher=world.teacher,
            out=tmp_path / "r",
            **settings | {"student": str(tmp_path / "narrow")},
        )


def test_a_teacher_of_another_tokenizer_is_refused(world, tmp_path):
    """As capture would: a plan for it would be one of noise."""
    shutil.copytree(world.teacher, tmp_path / "foreign")
    train_tokenizer(["Quick zebras jump over vexing walls. " * 50], 300).save_pretrained(tmp_path / "foreign")
    with pytest.raises(MismatchError, match=r"tokenizer differs: .* teacher .*foreign comes with"):
        plan(rows=world.rows, teacher=str(tmp_path / "foreign"), out=tmp_path / "p", sample_tokens=64, **SMALL)


def line(name, size, **values):
    defaults = {"unbiased": name != "top_k", "error_over_paper": 1.0, "squared_error": 1.0, "angle": 5.0}
    sampler = {"name": name, "k" if name == "top_k" else "rounds": size}
    return {"sampler": sampler} | defaults | values | {"gigabytes": values["bytes"] * 10}


def test_the_choice_by_hand():
    """fidelity: the cheapest unbiased one as exact as the paper's; angle: the cheapest; budget: the least angle."""
    options = [
        line("random_sampling", 50, bytes=36.0),
        line("systematic", 20, bytes=12.0, error_over_paper=1.2, angle=5.5),
        line("systematic", 25, bytes=14.0, error_over_paper=0.9, angle=4.7),
        line("systematic", 50, bytes=22.0, error_over_paper=0.4, angle=3.0),
        line("top_k", 12, bytes=9.0, error_over_paper=0.1, angle=30.0),
    ]
    assert choose(options, {"fidelity": "paper"}) == 2
    assert choose(options, {"angle": 5.6}) == 1
    assert choose(options, {"angle": 31}) == 4
    assert choose(options, {"budget_gb": 200}) == 2
    assert choose(options, {"budget_gb": 1000}) == 3
    with pytest.raises(RecipeError, match=r"no sampler .* meets angle=1; systematic 50 comes to 3.00 degrees"):
        choose(options, {"angle": 1})
    with pytest.raises(RecipeError, match=r"meets budget_gb=80; top_k 12 takes 90 GB"):
        choose(options, {"budget_gb": 80})


def test_the_papers_setting_is_always_compared_with():
    assert {"name": "random_sampling", "rounds": 50} in candidates([7], [3])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"angle": 2.0, "budget_gb": 5.0}, "angle and budget_gb are two goals; give one"),
        ({"fidelity": "best"}, "fidelity='best' is unknown; there is fidelity=paper, or give angle=2"),
        ({"angle": -1.0}, r"angle=-1.0 must be above 0"),
        ({"rounds": [0]}, r"sampler.rounds=0 is out of range"),
    ],
)
def test_misuse_is_refused(world, tmp_path, settings, words):
    with pytest.raises(RecipeError, match=words):
        plan(rows=world.rows, teacher=world.teacher, out=tmp_path / "p", **SMALL | settings)
    assert not (tmp_path / "p").exists()


def test_the_verb_and_the_recipe_it_writes(world, planned, tmp_path, monkeypatch):
    """plan prints a table with the choice marked; the recipe captures as it stands."""
    monkeypatch.chdir(tmp_path)
    words = [f"rows={world.rows}", f"teacher={world.teacher}", "rounds=[10,60]", "top_k=[5]", "sample_tokens=128"]
    result = CliRunner().invoke(app, ["plan", *words, "device=cpu", "out=plan", "--budget-gb", "5"])
    assert result.exit_code == 0, result.output
    marked = [each for each in result.output.splitlines() if each.startswith("→")]
    assert len(marked) == 1
    recipe = yaml.safe_load(Path("plan/capture.yaml").read_text())
    assert marked[0].split()[1:3] == [str(value) for value in recipe["sampler"].values()]
    made = CliRunner().invoke(app, ["capture", "-c", "plan/capture.yaml", "limit_rows=8", "device=cpu"])
    assert made.exit_code == 0, made.output
    assert skd.CacheReader("cache").spec.sampler["name"] == recipe["sampler"]["name"]
    assert json.loads(Path("plan/plan.json").read_text())["goal"] == {"budget_gb": 5.0}


def test_the_figure_is_drawn(planned):
    """plan.png lies beside plan.json."""
    assert (Path(planned["recipe"]).parent / "plan.png").read_bytes()[:4] == b"\x89PNG"
