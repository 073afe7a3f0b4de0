"""Adapting a teacher: it reads the new text better, stays a teacher of its kind, and is another teacher afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SEQ_LEN

from sparsekd import models
from sparsekd.adapt import adapt
from sparsekd.cache import CacheReader
from sparsekd.cli import app
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.evaluate import evaluate
from sparsekd.recompute import recompute
from sparsekd.rows import pack

FAST = {"max_steps": 40, "batch_size": 8, "learning_rate": 3e-3, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def new_rows(world, tmp_path_factory) -> str:
    """Text that the world's teacher never saw, in its tokens."""
    home = tmp_path_factory.mktemp("new")
    with (home / "new.jsonl").open("w") as file:
        for i in range(200):
            file.write(
                json.dumps({"text": f"A hen counts {i % 9} and {i % 9}, then the owl counts {i % 9}. " * 5}) + "\n"
            )
    tokenizer = world.rows + "/tokenizer"
    out = home / "rows"
    pack(source=str(home / "new.jsonl"), tokenizer=tokenizer, seq_len=SEQ_LEN, heldout=0.1, out=out, progress=False)
    return str(out)


@pytest.fixture(scope="module")
def adapted(world, new_rows, tmp_path_factory) -> tuple[str, dict]:
    out = tmp_path_factory.mktemp("adapt") / "teacher"
    return str(out), adapt(out=out, teacher=world.teacher, rows=new_rows, **FAST)


def loss(model: str, rows: str) -> float:
    return evaluate(model=model, rows=rows, out=Path(rows) / "judged", device="cpu")["loss"]["mean"]


def test_the_adapted_teacher_reads_the_new_text_better(world, new_rows, adapted):
    """Its held-out loss on the new rows is far below the original's."""
    assert loss(adapted[0], new_rows) < loss(world.teacher, new_rows) - 0.5


def test_a_cache_of_the_original_is_refused_under_the_adapted_teacher(world, adapted):
    """verify with the adapted teacher names both weights; with the original every row is the same bit for bit."""
    with CacheReader(world.cache) as cache:
        assert recompute(cache, world.teacher, 2)["identical"] == 2
        with pytest.raises(MismatchError, match=r"teacher differs.*give the same teacher") as refusal:
            recompute(cache, adapted[0], 2)
    words = str(refusal.value)
    assert adapted[1]["teacher"]["weights"][:12] in words
    assert adapted[1]["weights"][:12] in words


def test_the_fingerprints_are_those_of_the_models(world, adapted):
    """adapt.json holds the weights' hashes before and after, as a capture would record them."""
    facts = json.loads((Path(adapted[0]) / "adapt.json").read_text())
    assert facts["weights"] == models.weights_hash(models.open_model(adapted[0], device="cpu"))
    assert facts["teacher"]["weights"] == models.weights_hash(models.open_model(world.teacher, device="cpu"))
    assert facts["weights"] != facts["teacher"]["weights"]


def test_the_tokenizer_and_the_dtype_stay_those_of_the_original(world, new_rows, tmp_path):
    """A bfloat16 teacher with a chat template of its own comes out in bfloat16 with that template."""
    original, out = tmp_path / "original", tmp_path / "adapted"
    shutil.copytree(world.teacher, original)
    models.open_model(world.teacher, dtype="bfloat16", device="cpu").save_pretrained(original)
    (original / "chat_template.jinja").write_text("{{ messages[0].content }}")
    again = FAST | {"max_steps": 3}
    facts = adapt(out=out, teacher=str(original), rows=new_rows, **again)
    assert facts["teacher"]["dtype"] == "bfloat16"
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert facts["weights"] == models.weights_hash(models.open_model(str(out), dtype="bfloat16", device="cpu"))
    assert not list(out.glob(".*.tmp"))


def test_an_interruption_before_the_end_is_mended_by_the_same_call(world, new_rows, tmp_path):
    """Without adapt.json the last step is done again, with the same result; with it, nothing is done."""
    settings = {"out": tmp_path / "t", "teacher": world.teacher, "rows": new_rows} | FAST | {"max_steps": 2}
    first = adapt(**settings)
    (tmp_path / "t" / "adapt.json").unlink()
    assert adapt(**settings) == first
    before = (tmp_path / "t" / "adapt.json").stat().st_mtime_ns
    assert adapt(**settings) == first
    assert (tmp_path / "t" / "adapt.json").stat().st_mtime_ns == before


def test_what_is_no_teacher_is_refused(world, new_rows, tmp_path):
    """A name of a new model, the teacher's own folder as out, and whatever train refuses."""
    with pytest.raises(RecipeError, match="'tiny' names a new, untrained model"):
        adapt(out=tmp_path / "a", teacher="tiny", rows=new_rows, **FAST)
    with pytest.raises(RecipeError, match="is the teacher itself; give another out=FOLDER"):
        adapt(out=world.teacher, teacher=world.teacher, rows=new_rows, **FAST)
    with pytest.raises(RecipeError, match="learning_rate=-1"):
        adapt(out=tmp_path / "a", teacher=world.teacher, rows=new_rows, **FAST | {"learning_rate": -1})
    with pytest.raises(MismatchError, match="tokenizer differs"):
        adapt(out=tmp_path / "a", teacher=world.teacher, rows=_foreign_rows(world, tmp_path), **FAST)
    assert not (tmp_path / "a").exists()


def _foreign_rows(world, tmp_path: Path) -> str:
    out = tmp_path / "foreign"
    pack(source=world.corpus, tokenizer="train", vocab_size=280, seq_len=SEQ_LEN, out=out, progress=False)
    return str(out)


def test_the_verb_adapts_and_verify_tells_the_two_apart(world, new_rows, tmp_path, capsys):
    """`sparsekd adapt`, then `sparsekd verify CACHE --teacher ADAPTED`, which refuses."""
    words = [f"teacher={world.teacher}", f"rows={new_rows}", f"out={tmp_path / 'a'}", "max_steps=2", "device=cpu"]
    app(["adapt", *words], standalone_mode=False)
    assert capsys.readouterr().out.startswith("adapted in 2 steps, 512 tokens, train loss ")
    with pytest.raises(MismatchError, match="teacher differs"):
        app(["verify", world.cache, "--teacher", str(tmp_path / "a")], standalone_mode=False)
