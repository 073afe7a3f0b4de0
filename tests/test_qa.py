"""Questions in another tokenizer: what is taught, what is asked, and the whole course at a size that says nothing."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from sparsekd import qa
from sparsekd.reproduction import Settings


@pytest.mark.parametrize("people", [qa.PEOPLE, qa.STRANGERS])
def test_what_is_asked_was_never_asked_before(people):
    """Each fact has two ways to ask in the lessons and the third in the test, and all answers say the same value."""
    train, test = qa.lessons(people)
    assert len(test) == len(people.split()) * len(qa.FACTS) == len(train) / (2 * qa.LESSONS)
    assert not {each["instruction"] for each in train} & {each["instruction"] for each in test}
    said = defaultdict(set)
    for record in train + test:
        values = [(name, v) for name, (values, _, _) in qa.FACTS.items() for v in values if v in record["response"]]
        who = [name for name in people.split() if name in record["instruction"].replace("?", " ").split()]
        assert len(values) == len(who) == 1
        assert who[0] in record["response"]
        said[who[0], values[0][0]].add(values[0][1])
    assert len(said) == len(test)
    assert {len(values) for values in said.values()} == {1}


def test_the_two_worlds_share_nobody():
    assert not set(qa.PEOPLE.split()) & set(qa.STRANGERS.split())


def test_the_whole_course(tmp_path, monkeypatch):
    """Both kinds of student are taught and asked; a second run asks nobody again."""
    monkeypatch.setitem(qa.SIZES, "quick", qa.Sizes(teacher_steps=30, pretraining_steps=2, steps=2))
    ways = {qa.DECODER: ["text only", "transcoded"], qa.ENCODER_DECODER: ["text only", "ULD by bytes"]}
    monkeypatch.setattr(qa, "KINDS", ways)
    settings = Settings(seeds=1, say=lambda _: None)
    result = qa.qa(tmp_path / "qa", settings)
    assert list(result.ours.rows) == [
        qa.TEACHER,
        *(f"{kind}, {way}" for kind, several in ways.items() for way in several),
    ]
    for name, cells in result.ours.rows.items():
        assert all(0 <= cell.mean <= 100 for cell in cells), name
    assert len(result.findings) == 2
    (tmp_path / "qa/school/llama-transcoded-s0-asked/answers.json").write_text(
        json.dumps({name: {"mean": 0.25} for name in qa.MEASURES.values()})
    )
    again = qa.qa(tmp_path / "qa", settings)
    assert again.ours.rows[f"{qa.DECODER}, transcoded"][0].mean == 25.0
    assert qa.plot_f1(again).axes
