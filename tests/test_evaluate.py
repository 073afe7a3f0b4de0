"""Judging: every number against a slow dense twin, what changes nothing, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEQ_LEN

from sparsekd import evaluate as module
from sparsekd import models
from sparsekd.errors import MismatchError, ModelError, RecipeError, SourceError
from sparsekd.evaluate import evaluate, unique_ids
from sparsekd.packed import RowsReader
from sparsekd.rows import pack
from sparsekd.train import train

BINS = 15


@pytest.fixture(scope="module")
def student(world, tmp_path_factory) -> str:
    """A student that learnt a little, so that it differs from its teacher."""
    out = tmp_path_factory.mktemp("judged") / "student"
    shape = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    settings = {"max_steps": 30, "batch_size": 8, "learning_rate": 1e-2}
    train(out=out, student=shape, cache=world.cache, device="cpu", progress=False, **settings)
    return str(out)


@pytest.fixture(scope="module")
def sft_rows(world, tmp_path_factory) -> str:
    """Rows of prompts and responses: many positions do not count."""
    home = tmp_path_factory.mktemp("sft")
    with (home / "chats.jsonl").open("w") as file:
        for i in range(60):
            prompt = "The cat sees the dog. " * (1 + i % 5) + str(i)
            file.write(json.dumps({"prompt": prompt, "response": " and counts 1 2 3" * (1 + i % 3)}) + "\n")
    tokenizer = world.rows + "/tokenizer"
    pack(
        source=str(home / "chats.jsonl"),
        tokenizer=tokenizer,
        seq_len=SEQ_LEN,
        heldout=0.3,
        out=home / "rows",
        progress=False,
    )
    return str(home / "rows")


@dataclass(frozen=True)
class Twin:
    """The same quantities in float64 from whole [L, V] tables; per supervised token, and its row."""

    rows: np.ndarray
    values: dict[str, np.ndarray]
    confidence: np.ndarray

    def mean(self, name: str) -> float:
        return float(self.values[name].mean())

    def standard_error(self, name: str) -> float:
        sums = np.array([self.values[name][self.rows == r].sum() for r in np.unique(self.rows)])
        counts = np.array([(self.rows == r).sum() for r in np.unique(self.rows)])
        residual = sums - counts * sums.sum() / counts.sum()
        n = len(sums)
        return float(np.sqrt(n / (n - 1) * (residual**2).sum()) / counts.sum())

    def ece(self) -> float:
        total, bins = 0.0, np.ceil(self.confidence * BINS).astype(int) - 1
        for index in range(BINS):
            inside = bins == index
            if inside.any():
                gap = self.values["accuracy"][inside].mean() - self.confidence[inside].mean()
                total += inside.mean() * abs(gap)
        return total


@torch.no_grad()
def twin(path: str, rows: str, teacher: str, limit: int | None = None) -> Twin:
    judged, other = (models.open_model(p, device="cpu").double() for p in (path, teacher))
    found: dict[str, list[np.ndarray]] = {}
    numbers, confidences = [], []
    for index, row in enumerate(RowsReader(rows, "heldout")):
        if limit is not None and index >= limit:
            break
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        keep = row.supervised[1:]
        log_q = judged(ids[None]).logits[0, :-1].log_softmax(-1).numpy()[keep]
        log_p = other(ids[None]).logits[0, :-1].log_softmax(-1).numpy()[keep]
        labels = row.input_ids[1:][keep].astype(int)
        p, q = np.exp(log_p), np.exp(log_q)
        made = {
            "loss": -log_q[np.arange(len(labels)), labels],
            "accuracy": (q.argmax(-1) == labels).astype(float),
            "acceptance": np.minimum(p, q).sum(-1),
            "agreement": (p.argmax(-1) == q.argmax(-1)).astype(float),
            "teacher_kl": (p * (log_p - log_q)).sum(-1),
        }
        for name, value in made.items():
            found.setdefault(name, []).append(value)
        numbers.append(np.full(len(labels), index))
        confidences.append(q.max(-1))
    values = {name: np.concatenate(each) for name, each in found.items()}
    return Twin(rows=np.concatenate(numbers), values=values, confidence=np.concatenate(confidences))


def judge(model, rows, **settings):
    return evaluate(model=model, rows=rows, device="cpu", **settings)


@pytest.mark.parametrize("kind", ["plain", "prompts"])
def test_every_number_equals_a_slow_dense_twin(world, student, sft_rows, tmp_path, kind):
    """Means, errors over rows, ECE, perplexity and bits per byte, over supervised tokens only, in float64 by hand."""
    rows = {"plain": world.rows, "prompts": sft_rows}[kind]
    want = twin(student, rows, world.teacher)
    got = judge(student, rows, teacher=world.teacher, out=tmp_path)
    assert got["tokens"] == len(want.rows)
    assert got["rows"] == len(np.unique(want.rows))
    for name in want.values:
        assert got[name]["mean"] == pytest.approx(want.mean(name), rel=1e-4, abs=1e-6), name
        assert got[name]["standard_error"] == pytest.approx(want.standard_error(name), rel=1e-3), name
    assert got["ece"] == pytest.approx(want.ece(), abs=2e-3)
    assert got["perplexity"] == pytest.approx(math.exp(want.mean("loss")), rel=1e-4)
    split = RowsReader(rows, "heldout").manifest["splits"]["heldout"]
    text = split["supervised_bytes"] if kind == "prompts" else split["bytes"]
    bits = want.mean("loss") / math.log(2) * split["supervised"] / text
    assert got["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert sum(b["count"] for b in got["reliability"]) == got["tokens"]
    if kind == "prompts":
        assert got["tokens"] < 0.7 * len(RowsReader(rows, "heldout")) * (SEQ_LEN - 1)
        assert text < 0.7 * split["bytes"]


def test_batches_and_chunks_change_nothing(world, student, tmp_path, monkeypatch):
    """Batch size and chunk size are a matter of memory: every number stays, to rounding."""
    want = judge(student, world.rows, teacher=world.teacher, out=tmp_path)
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 4 * 300 * 7)
    got = judge(student, world.rows, teacher=world.teacher, out=tmp_path, batch_size=3)
    for name in ("loss", "accuracy", "acceptance", "agreement", "teacher_kl"):
        assert got[name]["mean"] == pytest.approx(want[name]["mean"], rel=1e-5)
        assert got[name]["standard_error"] == pytest.approx(want[name]["standard_error"], rel=1e-4)
    assert got["ece"] == pytest.approx(want["ece"], abs=1e-4)
    assert (got["tokens"], got["rows"]) == (want["tokens"], want["rows"])


def test_a_teacher_agrees_with_itself(world, tmp_path):
    """Judged by itself a model is always accepted, always agrees, and has no divergence."""
    got = judge(world.teacher, world.rows, teacher=world.teacher, out=tmp_path)
    assert got["acceptance"]["mean"] == pytest.approx(1, abs=1e-6)
    assert got["agreement"]["mean"] == 1
    assert got["teacher_kl"]["mean"] == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_nothing_is_said_of_one(world, student, tmp_path):
    """Only the model's own numbers are there, and they are the same as beside a teacher."""
    alone, beside = (judge(student, world.rows, teacher=t, out=tmp_path) for t in (None, world.teacher))
    assert alone == {name: beside[name] for name in alone}
    assert beside.keys() - alone.keys() == {"acceptance", "agreement", "teacher_kl"}


def test_a_padded_teacher_is_judged_by_without_its_padding(world, student, tmp_path):
    """Against a teacher whose head has 20 rows more, likely ones, everything is as against the teacher itself."""
    teacher = models.open_model(world.teacher, device="cpu")
    plain = judge(student, world.rows, teacher=world.teacher, out=tmp_path / "a")
    teacher.resize_token_embeddings(320, mean_resizing=False)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[300:] *= 100
    teacher.save_pretrained(tmp_path / "padded")
    assert judge(student, world.rows, teacher=str(tmp_path / "padded"), out=tmp_path / "b") == plain


def test_one_row_has_no_standard_error(world, student, tmp_path):
    """The error over one row is unknown: null in evaluation.json, which is strict JSON and what was returned."""
    got = judge(student, world.rows, limit_rows=1, out=tmp_path / "deep" / "er")
    assert got["loss"]["standard_error"] is None
    assert got["rows"] == 1
    stored = (tmp_path / "deep" / "er" / "evaluation.json").read_text()
    assert json.loads(stored, parse_constant=lambda word: pytest.fail(f"{word} in evaluation.json")) == got
    assert got["loss"]["mean"] == pytest.approx(twin(student, world.rows, world.teacher, 1).mean("loss"), rel=1e-4)


def test_an_infinite_perplexity_is_null(world, student, tmp_path):
    """A model that is certain and wrong has a loss beyond exp's range: still strict JSON."""
    shutil.copytree(student, tmp_path / "m")
    model = models.open_model(student, device="cpu")
    with torch.no_grad():
        for weight in model.model.norm.parameters():
            weight *= 1e5
    model.save_pretrained(tmp_path / "m")
    got = judge(str(tmp_path / "m"), world.rows, limit_rows=2)
    assert got["loss"]["mean"] > 710
    assert got["perplexity"] is None
    assert json.loads((tmp_path / "m" / "evaluation.json").read_text()) == got


def test_progress_counts_rows(world, student, tmp_path):
    """progress is told the rows done and the rows in all, up to the limit."""
    seen: list[tuple[int, int]] = []
    judge(student, world.rows, limit_rows=7, batch_size=3, out=tmp_path, progress=lambda a, b: seen.append((a, b)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_models_that_do_not_fit_are_refused(world, student, tmp_path):
    """Another tokenizer, too few logits, a teacher of another width, a short context, no model: with both values."""
    from sparsekd.vocab import train_tokenizer

    torch.manual_seed(0)
    shutil.copytree(student, tmp_path / "foreign")
    train_tokenizer(["Quick zebras jump over vexing walls. " * 50], 300).save_pretrained(tmp_path / "foreign")
    for name, width, context in (("narrow", 200, SEQ_LEN), ("wide", 1400, SEQ_LEN), ("short", 300, 16)):
        shape = {"family": "tiny", "max_position_embeddings": context}
        models.new_student(shape, vocab_size=width, seq_len=context).save_pretrained(tmp_path / name)
    cases = [
        ("foreign", None, r"tokenizer differs: the rows were made with \w{12}, model .* comes with \w{12}"),
        ("narrow", None, "the rows' tokenizer has 300 tokens, model .* makes 200 logits"),
        ("short", None, "seq_len=32 is beyond the model's context of 16"),
        ("wide", world.teacher, "model and teacher make 1400 and 300 logits for 300 tokens"),
    ]
    for name, teacher, words in cases:
        with pytest.raises(MismatchError, match=words):
            judge(str(tmp_path / name), world.rows, teacher=teacher)
        assert not (tmp_path / name / "evaluation.json").exists()
    with pytest.raises(ModelError, match="does not exist"):
        judge(str(tmp_path / "nowhere"), world.rows)


def test_nothing_to_judge_on_is_refused(world, student, tmp_path):
    """No held-out rows, no such split, rows without a supervised token, sizes below 1: refused by name."""
    tokenizer = world.rows + "/tokenizer"
    pack(source=world.corpus, tokenizer=tokenizer, seq_len=SEQ_LEN, heldout=0.0, out=tmp_path / "r", progress=False)
    with pytest.raises(SourceError, match="heldout"):
        judge(student, tmp_path / "r")
    with pytest.raises(SourceError, match="has no split 'test'; it has"):
        judge(student, world.rows, split="test")
    for setting in ("batch_size", "limit_rows"):
        with pytest.raises(RecipeError, match=f"{setting}=0"):
            judge(student, world.rows, **{setting: 0})
    shutil.copytree(world.rows, tmp_path / "mute")
    mask = tmp_path / "mute" / "heldout_supervised.npy"
    np.save(mask, np.zeros_like(np.load(mask)))
    with pytest.raises(SourceError, match="no supervised token"):
        judge(student, tmp_path / "mute")
    with pytest.raises(SourceError, match="no supervised token"):
        unique_ids(teacher=world.teacher, rows=tmp_path / "mute", device="cpu")


# --- distinct ids against rounds ------------------------------------------------------------------------


def test_distinct_ids_grow_slower_than_rounds(world):
    """One round draws one id; more rounds never fewer ids and never more than rounds; the exponent is below 1."""
    rounds = (1, 2, 5, 20, 100)
    got = unique_ids(teacher=world.teacher, rows=world.rows, rounds=rounds, limit_rows=6, device="cpu")
    assert got["rounds"] == list(rounds)
    assert got["unique"][0] == 1
    assert got["unique"] == sorted(got["unique"])
    assert all(1 <= u <= r for u, r in zip(got["unique"], rounds, strict=True))
    assert 0 < got["power_law"]["exponent"] < 1
    heldout = RowsReader(world.rows, "heldout")
    assert got["positions"] == sum(int(heldout[i].supervised[1:].sum()) for i in range(6))


def test_distinct_ids_have_their_known_mean(world, monkeypatch):
    """Σ over ids of 1 - (1 - p)^R, whatever the chunk size: draws of different positions are independent."""
    got = {}
    for chunk in (32 * 2**20, 4 * 300 * 11):
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk)
        got[chunk] = unique_ids(teacher=world.teacher, rows=world.rows, rounds=(1, 3, 30), limit_rows=12, device="cpu")
    assert len({json.dumps(each) for each in got.values()}) == 1
    model, means, spread = models.open_model(world.teacher, device="cpu"), [], []
    for row in RowsReader(world.rows, "heldout").batch(range(12)).input_ids.astype(np.int64):
        with torch.no_grad():
            p = model(torch.from_numpy(row)[None]).logits[0, :-1].double().softmax(-1)
        seen = torch.stack([1 - (1 - p) ** r for r in (3, 30)])
        means.append(seen.sum(-1))
        spread.append((seen * (1 - seen)).sum(-1))  # an upper bound: ids compete for draws
    keep = torch.from_numpy(RowsReader(world.rows, "heldout").batch(range(12)).supervised[:, 1:].copy()).flatten()
    want = torch.cat(means, 1)[:, keep].mean(-1)
    error = (torch.cat(spread, 1)[:, keep].sum(-1)).sqrt() / keep.sum()
    found = torch.tensor(next(iter(got.values()))["unique"][1:])
    assert ((found - want).abs() < 5 * error).all()


def test_a_seed_takes_other_rows_and_other_draws(world):
    """Seed s reads the s-th rows, round and round: two seeds of all rows differ by their draws alone."""
    rows = len(RowsReader(world.rows, "heldout"))
    one, two, three = (_unique(world, seed, 4) for seed in (0, 1, 2))
    assert len({json.dumps(each) for each in (one, two, three)}) == 3
    heldout = RowsReader(world.rows, "heldout")
    assert two["positions"] == sum(int(heldout[i % rows].supervised[1:].sum()) for i in range(4, 8))
    whole, again = _unique(world, 0, rows), _unique(world, 1, rows)
    assert whole["positions"] == again["positions"]
    assert whole["unique"] != again["unique"]
    assert whole["unique"] == pytest.approx(again["unique"], rel=0.1)


def _unique(world, seed, limit):
    return unique_ids(teacher=world.teacher, rows=world.rows, rounds=(2, 10), limit_rows=limit, seed=seed, device="cpu")


def test_a_curve_needs_two_points(world):
    """A power law through one number of rounds is refused."""
    for rounds in ((5,), (5, 5), (0, 5)):
        with pytest.raises(RecipeError, match="needs two different numbers of rounds"):
            unique_ids(teacher=world.teacher, rows=world.rows, rounds=rounds)


def test_evaluation_lands_beside_the_model(world, student, tmp_path):
    """Without out=, evaluation.json is written into the model's folder."""
    shutil.copytree(student, tmp_path / "m")
    got = judge(str(tmp_path / "m"), world.rows, limit_rows=2)
    assert json.loads(Path(tmp_path / "m" / "evaluation.json").read_text()) == got
