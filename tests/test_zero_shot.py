"""The tables' zero-shot task: its questions are what they say, and its column follows from the students."""

from __future__ import annotations

import json
import shutil

import pytest

from sparsekd import zero_shot
from sparsekd.packed import RowsReader
from sparsekd.reproduction import Cell, Column, Table
from sparsekd.tables import with_column
from sparsekd.zero_shot import NAME, available, make_task, score


def test_the_right_answer_is_the_rows_other_half(world, tmp_path):
    """Every question is half a held-out row, its answer the other half; the wrong ones have two words swapped."""
    folder = make_task(world.rows, tmp_path / "a", questions=30)
    with RowsReader(world.rows, "heldout") as reader:
        tokenizer, whole = reader.tokenizer(), reader.batch(range(len(reader))).input_ids
    texts = [[tokenizer.decode(half.tolist(), skip_special_tokens=True) for half in (r[:16], r[16:])] for r in whole]
    lines = [json.loads(line) for line in (folder / f"{NAME}.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    for line in lines:
        right = line["choices"][line["answer"]]
        assert [line["question"], right] in texts
        assert len(set(line["choices"])) == 4
        for wrong in set(line["choices"]) - {right}:
            moved = [i for i, (a, b) in enumerate(zip(right.split(), wrong.split(), strict=True)) if a != b]
            assert len(moved) == 2
            assert moved[1] == moved[0] + 1
            assert sorted(right.split()) == sorted(wrong.split())
    assert {line["answer"] for line in lines} == {0, 1, 2, 3}
    again = make_task(world.rows, tmp_path / "b", questions=30)
    assert (again / f"{NAME}.jsonl").read_text() == (folder / f"{NAME}.jsonl").read_text()


@pytest.mark.skipif(not available(), reason="lm-eval is not installed: pip install 'sparsekd[eval]'")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::SyntaxWarning")
def test_a_score_is_asked_once(world, tmp_path, monkeypatch):
    """A trained model does better than guessing; the second time its answers are read from its folder."""
    import datasets

    from sparsekd import tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    model = tmp_path / "model"
    shutil.copytree(world.teacher, model)
    task = make_task(world.rows, tmp_path / "task", questions=40)
    found = score(model, task, device="cpu")
    assert found > 30
    monkeypatch.setattr(tasks, "run_tasks", lambda **_: pytest.fail("asked again"))
    assert score(model, task) == found


def test_a_column_more():
    """Rows keep their cells and gain one; a row that has none shows none."""
    base = Table(columns=(Column(name="loss"),), rows={"CE": (Cell(mean=1.0),), "ours": (Cell(mean=2.0),)})
    wider = with_column(base, zero_shot.ZERO_SHOT, {"CE": Cell(mean=40.0)})
    assert [column.name for column in wider.columns] == ["loss", "0-shot"]
    assert wider.rows == {"CE": (Cell(mean=1.0), Cell(mean=40.0)), "ours": (Cell(mean=2.0), None)}
