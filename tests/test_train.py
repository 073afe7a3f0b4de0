"""Training: exact resumption, the same steps however they are split, and everything that is refused beforehand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SEQ_LEN, write_corpus
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

import sparsekd as skd
from sparsekd import heads, models
from sparsekd.batches import RowBatch
from sparsekd.cache import CacheWriter, RowRecord
from sparsekd.errors import (
    FormatError,
    IncompleteError,
    MismatchError,
    ModelError,
    RecipeError,
    SourceError,
    StorageError,
    VersionError,
)
from sparsekd.packed import RowsReader
from sparsekd.train import train
from sparsekd.training_run import last_checkpoint, mean_logged, readable_log

STUDENT = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def run(world, out, **settings: Any) -> dict[str, Any]:
    """Six steps of four rows from the world's cache, unless said otherwise."""
    source = {} if "rows" in settings else {"cache": world.cache}
    defaults = {"student": STUDENT, "max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_steps": 1}
    return train(out=out, device="cpu", progress=False, **{**source, **defaults, **settings})


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(ours: str | Path, theirs: str | Path, **tolerance: float) -> None:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


def losses(metrics: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in metrics["log"] if "loss" in entry]


class Interrupt(TrainerCallback):
    """Ctrl-C after some step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args, state, control, **_):
        if state.global_step >= self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def sft(world, tmp_path_factory) -> tuple[str, str]:
    """(rows, cache) of prompts and responses of very unequal lengths: rows differ in their supervised tokens."""
    from sparsekd.capture import capture
    from sparsekd.rows import pack

    home = tmp_path_factory.mktemp("sft")
    with (home / "chats.jsonl").open("w") as file:
        for i in range(90):
            prompt = "The cat sees the dog. " * (1 + i % 7)
            file.write(json.dumps({"prompt": prompt + str(i), "response": " and counts 1 2 3" * (1 + i % 3)}) + "\n")
    pack(
        source=str(home / "chats.jsonl"),
        tokenizer=world.rows + "/tokenizer",
        seq_len=SEQ_LEN,
        heldout=0.2,
        out=home / "rows",
        progress=False,
    )
    sampler = {"name": "random_sampling", "rounds": 20}
    capture(
        rows=home / "rows",
        teacher=world.teacher,
        out=home / "cache",
        device="cpu",
        threads=1,
        sampler=sampler,
    )
    return str(home / "rows"), str(home / "cache")


# --- stopping and going on ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows_read(monkeypatch_module) -> list[int]:
    """Every row number that a training set hands out, in order."""
    seen: list[int] = []
    real = skd.CacheDataset.__getitems__

    def spying(self, indices):
        rows = real(self, indices)
        seen.extend(row.index for row in rows if self.shuffle)
        return rows

    monkeypatch_module.setattr(skd.CacheDataset, "__getitems__", spying)
    return seen


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


WORKERS = pytest.mark.filterwarnings("ignore:a cache on a local disk is read by worker processes")


@WORKERS
@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        pytest.param({"grad_accum": 2, "batch_size": 3}, 5, id="mid-epoch, accumulating"),
        pytest.param({"batch_size": 40, "max_steps": 8, "log_steps": 5}, 7, id="across an epoch, logged seldom"),
        pytest.param({"batch_size": 40, "max_steps": 8, "dataloader_workers": 2}, 5, id="with workers"),
        pytest.param({"method": "ce", "dtype": "bfloat16"}, 3, id="bfloat16, at a checkpoint"),
    ],
)
def test_resuming_changes_nothing(world, tmp_path, rows_read, settings, stop):
    """A run stopped anywhere and resumed ends in the same bits, log and rows as one that never stopped."""
    rows_read.clear()
    whole = run(world, tmp_path / "whole", save_steps=3, **settings)
    order = list(rows_read)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "parts", save_steps=3, callbacks=[Interrupt(stop)], **settings)
    assert not (tmp_path / "parts" / "metrics.json").exists()
    rows_read.clear()
    parts = run(world, tmp_path / "parts", save_steps=3, **settings)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert parts["log"] == whole["log"]
    assert parts["train_loss"] == whole["train_loss"]
    if not settings.get("dataloader_workers"):  # workers read in processes of their own
        per_step = settings.get("batch_size", 4) * settings.get("grad_accum", 1)
        done = stop // 3 * 3 * per_step
        assert rows_read[: len(order) - done] == order[done:]


@WORKERS
def test_workers_follow_the_epoch(world, tmp_path):
    """Loader processes see each epoch's own order: two epochs with workers end in the bits of two without."""
    settings = {"batch_size": 32, "max_steps": 8, "save_steps": 100}
    alone = run(world, tmp_path / "alone", **settings)
    helped = run(world, tmp_path / "helped", dataloader_workers=2, **settings)
    assert alone["log"] == helped["log"]
    assert_same_weights(tmp_path / "alone", tmp_path / "helped")


def test_killed_after_its_last_step(world, tmp_path, monkeypatch):
    """A run that dies between its last step and its metrics takes no step too many when it is resumed."""
    from sparsekd import train as module

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    whole = run(world, tmp_path / "whole", save_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path / "parts", save_steps=2)
    parts = run(world, tmp_path / "parts", save_steps=2)
    assert parts["steps"] == whole["steps"] == 6
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_half_a_checkpoint_is_passed_over(world, tmp_path):
    """A checkpoint whose last file was cut off by a kill is not resumed from; the one before it is."""
    run(world, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "parts", save_steps=2, callbacks=[Interrupt(5)])
    state = tmp_path / "parts" / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            steps.append(state.global_step)

    run(world, tmp_path / "parts", save_steps=2, callbacks=[Watch()])
    assert steps == [2, 3, 4, 5]
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 587008 vs 586900")),
        (
            "transformers.modeling_utils.safe_save_file",
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ),
        ("transformers.trainer_callback.TrainerState.save_to_json", OSError(28, "No space left on device")),
    ],
)
def test_a_disk_that_fills_up_under_a_checkpoint(world, tmp_path, monkeypatch, where, error):
    """One sentence whoever writes; with room again the same command goes on from the checkpoint before."""

    def full(*_: object, **__: object) -> None:
        raise error

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                monkeypatch.setattr(where, full)

    with pytest.raises(
        StorageError, match=r"the disk of .* is full; free some space, or give keep_checkpoints=1, and run"
    ):
        run(world, tmp_path / "parts", save_steps=2, callbacks=[Fill()])
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "parts").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    run(world, tmp_path / "parts", save_steps=2)
    run(world, tmp_path / "whole", save_steps=2)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_the_newest_whole_checkpoint_is_gone_on_with(tmp_path, monkeypatch):
    """Newest by number, not by name; whole for as many processes as there are now."""
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("trainer_state.json", "rng_state_0.pth", "rng_state_1.pth")[: 12 - step]:
            (folder / name).write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert last_checkpoint(tmp_path) is None


def test_the_log_by_hand():
    """Three steps of 2 on average and two of 1 are 8/5 a step; what JSON cannot say is None, other entries go."""
    history = [
        {"loss": 2.0, "grad_norm": math.inf, "step": 3},
        {"eval_loss": 7.0, "step": 3},
        {"loss": 1.0, "grad_norm": 0.5, "step": 5},
        {"train_runtime": 9.0, "step": 5},
    ]
    log = readable_log(history)
    assert log == [history[0] | {"grad_norm": None}, *history[1:3]]
    assert mean_logged(log) == pytest.approx(8 / 5, rel=1e-15)
    assert mean_logged([]) == 0


def test_a_finished_run_is_not_trained_again(world, tmp_path):
    """The same call on a finished run returns its metrics from disk and takes no step."""
    first = run(world, tmp_path / "s", max_steps=2)
    assert run(world, tmp_path / "s", max_steps=2, callbacks=[Interrupt(0)]) == first


def test_an_epoch_is_whole_steps(world, tmp_path, rows_read):
    """Each epoch visits whole steps of distinct rows; what is left over changes with the epoch."""
    count = len(skd.CacheReader(world.cache))
    per_epoch = count // 28
    rows_read.clear()
    metrics = run(world, tmp_path / "s", batch_size=7, grad_accum=4, max_steps=-1, epochs=2.0)
    assert metrics["steps"] == 2 * per_epoch
    assert metrics["tokens"] == len(rows_read) * SEQ_LEN == 2 * per_epoch * 28 * SEQ_LEN
    first, second = rows_read[: per_epoch * 28], rows_read[per_epoch * 28 :]
    assert len(set(first)) == len(first)
    assert len(set(second)) == len(second)
    assert set(first) != set(second)
    assert count % 28


# --- one step, however it is split ----------------------------------------------------------------------


def test_accumulated_batches_are_one_batch(sft, tmp_path, world):
    """2 x 2 accumulated rows and 4 rows give the same losses and weights though their token counts differ."""
    for method, source in (("cached", {"cache": sft[1]}), ("ce", {"rows": sft[0], "cache": None})):
        settings = {"method": method, "ce_weight": 0.0, "max_steps": 5, **source}
        one = run(world, tmp_path / f"{method}1", batch_size=4, **settings)
        two = run(world, tmp_path / f"{method}2", batch_size=1, grad_accum=4, **settings)
        np.testing.assert_allclose(losses(one), losses(two), rtol=2e-6)
        assert_same_weights(tmp_path / f"{method}1", tmp_path / f"{method}2", rtol=1e-5, atol=1e-6)


def test_two_processes_are_one_with_twice_the_batch(world, sft, tmp_path):
    """Under torchrun, two processes of 2 x 2 rows take the steps of one process of 8: losses, norms, evaluation."""
    settings = {"method": "cached", "max_steps": 4, "eval_rows": sft[0], "eval_steps": 2, "learning_rate": 1e-2}
    one = run(world, tmp_path / "one", cache=sft[1], batch_size=8, **settings)
    shape = [f"student.{key}={value}" for key, value in STUDENT.items()]
    words = [f"{key}={value}" for key, value in settings.items()] + shape
    words += [f"cache={sft[1]}", f"out={tmp_path / 'two'}", "batch_size=2", "grad_accum=2", "log_steps=1", "device=cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "sparsekd", "train", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for a, b in zip(one["log"], two["log"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert two["tokens"] == one["tokens"]
    assert_same_weights(tmp_path / "one", tmp_path / "two", rtol=1e-4, atol=2e-5)


def test_supervised_tokens_are_spread_unevenly(sft):
    """The two tests above can fail: rows differ much in their supervised tokens."""
    with skd.CacheReader(sft[1]) as reader:
        counts = [int(reader[i].supervised[1:].sum()) for i in range(len(reader))]
    assert max(counts) > 3 * (min(counts) + 1)


def test_a_step_without_supervised_tokens_harms_nothing(world, sft, tmp_path, monkeypatch):
    """Where no token counts, the loss is 0 and not 0/0: the run goes on with finite weights."""
    real = skd.SparseKDCollator.__call__
    calls = []

    def blank(self, rows):
        batch = real(self, rows)
        if isinstance(rows, RowBatch):  # handed to a step, and not made ahead of one
            calls.append(1)
            return batch | ({"labels": torch.full_like(batch["labels"], -100)} if len(calls) == 2 else {})
        return batch

    monkeypatch.setattr(skd.SparseKDCollator, "__call__", blank)
    for method in ("ce", "cached", "full_kd"):
        calls.clear()
        teacher = world.teacher if method == "full_kd" else None
        metrics = run(world, tmp_path / method, method=method, teacher=teacher, max_steps=3)
        assert losses(metrics)[1] == 0
        assert losses(metrics)[2] > 1
        assert all(w.isfinite().all() for w in weights(tmp_path / method).values())


def test_the_evaluation_is_the_mean_over_tokens(world, sft, tmp_path):
    """eval_loss is Σ loss / supervised tokens of the held-out rows, the last partial batch included."""
    metrics = run(world, tmp_path / "s", cache=sft[1], eval_rows=sft[0], max_steps=2, batch_size=5)
    model = models.open_model(str(tmp_path / "s"), device="cpu")
    total, tokens = 0.0, 0
    for row in RowsReader(sft[0], "heldout"):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        with torch.no_grad():
            each = -model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total += float(each[torch.from_numpy(row.supervised[1:])].sum())
        tokens += int(row.supervised[1:].sum())
    assert metrics["log"][-1]["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


# --- methods, schedules, precision ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "cached", "full_kd"])
def test_every_method_learns(world, tmp_path, method):
    """The loss falls, the held-out loss beats a uniform guess by far, metrics are strict JSON, no tracker starts."""
    teacher = world.teacher if method == "full_kd" else None
    metrics = run(
        world,
        tmp_path / "s",
        method=method,
        teacher=teacher,
        max_steps=40,
        batch_size=8,
        eval_rows=world.rows,
        eval_limit=8,
    )
    assert np.mean(losses(metrics)[-5:]) < 0.8 * np.mean(losses(metrics)[:5])
    assert metrics["log"][-1]["eval_loss"] < 0.75 * math.log(300)
    stored = (tmp_path / "s" / "metrics.json").read_text()
    assert json.loads(stored, parse_constant=lambda word: pytest.fail(f"{word} in metrics.json")) == metrics
    assert metrics["steps"] == 40
    assert metrics["tokens"] == 40 * 8 * SEQ_LEN
    assert metrics["train_loss"] == pytest.approx(np.mean(losses(metrics)))
    assert metrics["fingerprint"] == RowsReader(world.rows).fingerprint
    assert not [p for p in (tmp_path / "s").iterdir() if p.name in ("runs", "wandb", "mlruns")]
    again = models.open_model(str(tmp_path / "s"), device="cpu")
    assert heads.logit_width(again) == 300


def test_the_learning_rates_are_those_stated(world, tmp_path):
    """Linear from 0 over the first warmup_ratio of the steps; then constant, or a cosine down to min_lr_ratio."""
    settings = {"max_steps": 20, "warmup_ratio": 0.2, "batch_size": 1, "learning_rate": 1e-3, "method": "ce"}
    found = {}
    for schedule in ("cosine", "constant"):
        log = run(world, tmp_path / schedule, schedule=schedule, min_lr_ratio=0.1, **settings)["log"]
        found[schedule] = [entry["learning_rate"] for entry in log]
    rise = [step / 4 for step in range(4)]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)) for step in range(4, 20)]
    np.testing.assert_allclose(found["cosine"], 1e-3 * np.array(rise + cosine), rtol=1e-6)
    np.testing.assert_allclose(found["constant"], 1e-3 * np.array(rise + [1.0] * 16), rtol=1e-6)


def test_gradients_are_clipped_and_precision_is_mixed(world, tmp_path):
    """A tiny max_grad_norm bends the run, bfloat16 hardly does; weights stay float32."""
    free = run(world, tmp_path / "free")
    bent = run(world, tmp_path / "bent", max_grad_norm=1e-9)  # below Adam's epsilon: nothing moves
    half = run(world, tmp_path / "half", dtype="bfloat16")
    assert losses(free)[0] == losses(bent)[0]
    assert losses(bent)[-1] > losses(free)[-1] + 0.05
    assert losses(half) != losses(free)
    np.testing.assert_allclose(losses(half), losses(free), rtol=0.02)
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "half").values())


def test_checkpointed_activations_change_nothing(world, tmp_path):
    """gradient_checkpointing trades time for memory and leaves every loss as it is."""
    plain = run(world, tmp_path / "plain", max_steps=3)
    saved = run(world, tmp_path / "saved", max_steps=3, gradient_checkpointing=True)
    np.testing.assert_allclose(losses(plain), losses(saved), rtol=1e-6)


def test_a_student_from_a_checkpoint_continues_from_its_weights(world, tmp_path):
    """The first loss of a continued student is that of its checkpoint, far below a new one's."""
    run(world, tmp_path / "first", max_steps=40, batch_size=8, method="ce")
    new = run(world, tmp_path / "new", max_steps=1, method="ce")
    on = run(world, tmp_path / "on", max_steps=1, method="ce", student=str(tmp_path / "first"))
    assert losses(on)[0] < 0.8 * losses(new)[0]


def test_an_adapter_is_no_checkpoint_to_go_on_from(world, tmp_path):
    """transformers opens it with every weight frozen; merged into its base it is a checkpoint like any other."""
    import peft

    model = peft.get_peft_model(models.open_model(world.teacher), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter is a PEFT adapter, .*; save it merged into its base model"):
        run(world, tmp_path / "s", student=str(tmp_path / "adapter"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert run(world, tmp_path / "s", student=str(tmp_path / "merged"), max_steps=1)["steps"] == 1


def test_the_seed_is_the_student_and_the_order(world, tmp_path):
    """Equal seeds give equal bits, other seeds other students on other rows."""
    a = run(world, tmp_path / "a", max_steps=2)
    torch.manual_seed(99)
    b = run(world, tmp_path / "b", max_steps=2)
    c = run(world, tmp_path / "c", max_steps=2, seed=1)
    assert a["log"] == b["log"] != c["log"]
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_divergence_stops_the_run(world, tmp_path):
    """A loss that is no number ends the run by name, and no metrics pretend that it finished."""
    with pytest.raises(ModelError, match=r"the loss is nan at step \d+: training has diverged; lower learning_rate"):
        run(world, tmp_path / "s", learning_rate=1e30, max_grad_norm=0.0, max_steps=8)
    assert not (tmp_path / "s" / "metrics.json").exists()


# --- refused before the first step ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"cache": None}, RecipeError, "give cache=FOLDER, or rows=FOLDER"),
        ({"rows": "r", "cache": "c"}, RecipeError, "one of them, not both"),
        ({"cache": None, "rows": "ROWS"}, RecipeError, "method=cached needs cache=FOLDER"),
        ({"method": "full_kd"}, RecipeError, "give teacher=MODEL"),
        ({"teacher": "t"}, RecipeError, "teacher= is for method=full_kd; method=cached runs none"),
        ({"method": "kd"}, RecipeError, "method='kd' is not one of ce, cached, full_kd"),
        ({"schedule": "step"}, RecipeError, "schedule='step' is not one of cosine, constant"),
        ({"dtype": "float8"}, RecipeError, "dtype='float8' is not one of float32, bfloat16"),
        ({"batch_size": 0}, RecipeError, "batch_size=0 is too small; give at least 1"),
        ({"epochs": -1.0}, RecipeError, "epochs=-1.0 must be above 0"),
        ({"max_steps": 0}, RecipeError, "max_steps=0 must be at least 1, or -1"),
        ({"learning_rate": float("nan")}, RecipeError, "learning_rate=nan must be above 0"),
        ({"warmup_ratio": 1.5}, RecipeError, "warmup_ratio=1.5 must be between 0 and 1"),
        ({"seed": -1}, RecipeError, r"seed=-1 must be in \[0, 2\^32\)"),
        ({"adam_betas": (0.9, 1.0)}, RecipeError, "adam_betas=.* two numbers"),
        ({"batch_size": 50, "grad_accum": 9}, RecipeError, r"one step takes 450 rows .*, the training set has \d+"),
        ({"student": "gigantic-nowhere/none"}, ModelError, "cannot open 'gigantic-nowhere/none'"),
    ],
)
def test_settings_that_cannot_be(world, tmp_path, settings, error, words):
    """Settings that contradict each other or leave their range are refused, with the value and the way out."""
    settings = {k: world.rows if v == "ROWS" else v for k, v in settings.items()}
    with pytest.raises(error, match=words):
        run(world, tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(world, tmp_path):
    """device=cuda without one, and a device that is none, are refused."""
    for device, words in (("cuda", "torch finds 0 accelerators"), ("banana", "is not one of cpu, cuda")):
        with pytest.raises(RecipeError, match=words):
            train(out=tmp_path / "s", student=STUDENT, cache=world.cache, device=device)


def test_students_that_do_not_fit(world, tmp_path):
    """Another tokenizer, too few logits, too short a context: refused with both values."""
    from sparsekd.vocab import train_tokenizer

    torch.manual_seed(0)
    foreign = train_tokenizer(["Quick zebras jump over vexing walls. " * 50], 300)
    foreign.save_pretrained(tmp_path / "tokenizer")
    shutil.copytree(world.teacher, tmp_path / "foreign")
    foreign.save_pretrained(tmp_path / "foreign")
    tiny = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32}
    models.new_student(tiny, vocab_size=200, seq_len=SEQ_LEN).save_pretrained(tmp_path / "narrow")
    short = models.new_student({**tiny, "max_position_embeddings": 16}, vocab_size=300, seq_len=16)
    short.save_pretrained(tmp_path / "short")
    models.new_student(tiny, vocab_size=320, seq_len=SEQ_LEN).save_pretrained(tmp_path / "wide")
    cases = [
        (
            {"student": str(tmp_path / "foreign")},
            r"tokenizer differs: the rows were made with \w{12}, student .* \w{12}",
        ),
        ({"tokenizer": str(tmp_path / "tokenizer")}, "tokenizer differs: .* give the one that the rows were packed"),
        ({"student": str(tmp_path / "narrow")}, "the rows' tokenizer has 300 tokens, the student makes 200 logits"),
        ({"student": str(tmp_path / "short")}, "seq_len=32 is beyond the student's context of 16"),
    ]
    for settings, words in cases:
        with pytest.raises(MismatchError, match=words):
            run(world, tmp_path / "s", **settings)
    kd = {"method": "full_kd"}
    with pytest.raises(MismatchError, match="the teacher makes 300 logits, the student 320; take a student no wider"):
        run(world, tmp_path / "s", **kd, teacher=world.teacher, student=str(tmp_path / "wide"))
    with pytest.raises(MismatchError, match=r"tokenizer differs: .*, teacher .*foreign comes with"):
        run(world, tmp_path / "s", **kd, teacher=str(tmp_path / "foreign"))
    for teacher, width in (("narrow", 200), ("wide", 320)):
        with pytest.raises(MismatchError, match=f"the training set has 300 logits, teacher .* makes {width}"):
            run(world, tmp_path / "s", **kd, teacher=str(tmp_path / teacher))
    assert not (tmp_path / "s").exists()
    # Plain rows know their tokenizer only: a teacher padded beyond it makes a student as wide.
    run(world, tmp_path / "s", **kd, teacher=str(tmp_path / "wide"), rows=world.rows, max_steps=1)
    assert heads.logit_width(models.open_model(str(tmp_path / "s"), device="cpu")) == 320


def test_a_teacher_padded_further_than_its_student(world, tmp_path):
    """The padding of the teacher's head is left out, cached or online; a student that lacks real mass is refused."""
    from sparsekd.capture import capture

    torch.manual_seed(0)
    models.new_student(STUDENT, vocab_size=300, seq_len=SEQ_LEN).save_pretrained(tmp_path / "student")
    frequent = int(np.bincount(RowsReader(world.rows)[0].input_ids).argmax())
    for width, likeness in ((301, 0), (320, 1)):
        teacher = models.open_model(world.teacher, device="cpu")
        teacher.resize_token_embeddings(width, mean_resizing=False)
        with torch.no_grad():
            head_VH = teacher.get_output_embeddings().weight
            head_VH[300:] = likeness * head_VH[frequent]
        teacher.save_pretrained(tmp_path / str(width))
        capture(rows=world.rows, teacher=str(tmp_path / str(width)), out=tmp_path / f"c{width}", device="cpu")
    settings = {"student": str(tmp_path / "student"), "max_steps": 2}
    teachers = {"plain": world.teacher, "padded": str(tmp_path / "320")}
    for name, teacher in teachers.items():
        run(world, tmp_path / name, method="full_kd", rows=world.rows, teacher=teacher, **settings)
    assert_same_weights(tmp_path / "plain", tmp_path / "padded")
    assert skd.CacheReader(tmp_path / "c301").stats["id_max"] == 300
    run(world, tmp_path / "s", cache=str(tmp_path / "c301"), **settings)
    with pytest.raises(MismatchError, match=r"% of a batch's weight is on ids from 300 on, which the student lacks"):
        run(world, tmp_path / "t", cache=str(tmp_path / "c320"), **settings)
    rows = skd.CacheDataset(skd.CacheReader(tmp_path / "c301"), shuffle=False).__getitems__(range(8))
    whole, cut = skd.SparseKDCollator()(rows), skd.SparseKDCollator(vocab_size=300)(rows)
    there = whole["kd_ids"] < 300
    assert not there.all()
    assert torch.equal(cut["kd_weights"], whole["kd_weights"] * there)
    assert torch.equal(cut["kd_ids"], whole["kd_ids"] * there)


def test_evaluation_rows_that_do_not_fit(world, tmp_path):
    """Rows of another packing or corpus, or without a held-out split, are refused with both values."""
    from sparsekd.rows import pack

    shared = {"tokenizer": world.rows + "/tokenizer", "progress": False}
    pack(source=world.corpus, seq_len=16, heldout=0.1, out=tmp_path / "short", **shared)
    other = write_corpus(tmp_path / "other.jsonl", documents=40, seed=1)
    pack(source=other, seq_len=SEQ_LEN, heldout=0.2, out=tmp_path / "other", **shared)
    cases = [
        ("short", r"the training set has seq_len=32, .*short has 16; re-pack with seq_len=32"),
        ("other", r"rows differ: the training set was made from rows \w{12}, .*other holds \w{12}"),
    ]
    for name, words in cases:
        with pytest.raises(MismatchError, match=words):
            run(world, tmp_path / "s", eval_rows=str(tmp_path / name))
    pack(source=world.corpus, seq_len=SEQ_LEN, heldout=0.0, out=tmp_path / "none", **shared)
    with pytest.raises(SourceError, match="held"):
        run(world, tmp_path / "s", rows=str(tmp_path / "none"), method="ce", eval_rows=str(tmp_path / "none"))


@pytest.mark.parametrize("shift", [1, -1])
def test_targets_off_by_one_are_refused(world, tmp_path, shift):
    """A cache whose targets slipped by one position, either way, is refused before the first step."""
    with skd.CacheReader(world.cache) as reader:
        writer = CacheWriter(tmp_path / "c", reader.spec)
        for shard in writer.missing():
            writer.write(shard, [rolled(reader.record(i), shift) for i in reader.spec.shard_range(shard)])
        writer.finalize()
    with pytest.raises(MismatchError, match="targets look shifted by one"):
        run(world, tmp_path / "s", cache=str(tmp_path / "c"))


def rolled(record: RowRecord, shift: int) -> RowRecord:
    """The same row with each position's targets moved to the next (or the one before)."""
    from sparsekd.codec import FlatTargets

    flat = record.targets
    groups = np.roll(np.arange(len(flat.sizes)), shift)
    ends = np.cumsum(flat.sizes)
    chosen = np.concatenate([np.arange(ends[g] - flat.sizes[g], ends[g]) for g in groups])
    moved = FlatTargets(ids=flat.ids[chosen], values=flat.values[chosen], sizes=flat.sizes[groups], rounds=flat.rounds)
    return dataclasses.replace(record, targets=moved)


def test_broken_caches_are_refused(world, tmp_path):
    """A newer format, a missing shard, a flipped byte: refused by name, no step is taken."""
    for name in ("newer", "missing", "damaged"):
        shutil.copytree(world.cache, tmp_path / name)
    manifest = json.loads((tmp_path / "newer" / "manifest.json").read_text())
    (tmp_path / "newer" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    shards = {name: sorted((tmp_path / name).glob("shard-*")) for name in ("missing", "damaged")}
    shards["missing"][1].unlink()
    for shard in shards["damaged"]:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 0xFF
        shard.write_bytes(data)
    for name, error, words in [
        ("newer", VersionError, "99"),
        ("missing", IncompleteError, "1"),
        ("damaged", FormatError, "shard-"),
    ]:
        with pytest.raises(error, match=words):
            run(world, tmp_path / "s", cache=str(tmp_path / name))
    assert not (tmp_path / "s").exists()


def test_folders_that_hold_something_else(world, tmp_path):
    """A foreign folder, a file, a run with other settings, or on other targets, is not written into."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(MismatchError, match="is not empty and holds no training run"):
        run(world, tmp_path / "foreign")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="is a file, not a folder; give another out"):
        run(world, tmp_path / "file")
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "s", callbacks=[Interrupt(1)])
    with pytest.raises(MismatchError, match=r"holds a run with learning_rate=0\.01, this one has 0\.5"):
        run(world, tmp_path / "s", learning_rate=0.5)
    recipe = json.loads((tmp_path / "s" / "recipe.json").read_text())
    recipe["data"]["teacher"] = "0" * 64
    (tmp_path / "s" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(MismatchError, match=f"the training set's teacher differ.* was started with {'0' * 64}"):
        run(world, tmp_path / "s")


def test_a_run_that_moves_with_its_cache(world, tmp_path):
    """A folder moved together with what it was made from is the same run; one that finds another cache is not."""
    home, moved = tmp_path / "home", tmp_path / "moved"
    shutil.copytree(world.cache, home / "cache")
    with pytest.raises(KeyboardInterrupt):
        run(world, home / "s", cache=str(home / "cache"), save_steps=1, callbacks=[Interrupt(2)])
    home.rename(moved)
    finished = run(world, moved / "s", cache=str(moved / "cache"), save_steps=1)
    assert finished["steps"] == 6
    assert run(world, moved / "s", cache=str(moved / "cache"), save_steps=1) == finished
    with pytest.raises(MismatchError, match=r"holds a run with cache='.*moved/cache', this one has '.*world.*cache'"):
        run(world, moved / "s", save_steps=1)
