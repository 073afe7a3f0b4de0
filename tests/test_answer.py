"""Answers: scores by hand, greedy text, and ULD's experiment from the teacher's text to F1, tiny and made up."""

from __future__ import annotations

import json
import random

import pytest

from sparsekd.answer import answer, exact_match, token_f1
from sparsekd.capture import capture
from sparsekd.errors import RecipeError, SourceError
from sparsekd.rows import pack
from sparsekd.train import train

NOUNS, VERBS = ["cat", "dog", "fox", "owl", "hen"], ["sees", "hears", "likes", "fears"]
TINY = {"family": "tiny", "hidden_size": 48, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("text", "reference", "f1", "exact"),
    [
        ("The cat.", "a cat", 1.0, 1.0),
        ("a black cat", "the cat", 2 / 3, 0.0),
        ("cat cat dog", "cat dog dog", 2 * 2 / 6, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),
    ],
)
def test_scores_by_hand(text, reference, f1, exact):
    """SQuAD's: lower case, no punctuation, no articles, shared words as multisets."""
    assert token_f1(text, reference) == pytest.approx(f1)
    assert exact_match(text, reference) == exact


def write_questions(path, count, seed):
    """Who does what to whom: the answer is a word of the context."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            who, verb, whom = draw.choice(NOUNS), draw.choice(VERBS), draw.choice(NOUNS)
            record = {
                "instruction": "Who is it?",
                "context": f"The {who} {verb} the {whom}.",
                "response": f"It is the {whom}.",
            }
            file.write(json.dumps(record) + "\n")
    return path


def rows(source, folder, **settings):
    pack(source=source, seq_len=64, heldout=0.05, out=folder, progress=False, **settings)
    return str(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    home = tmp_path_factory.mktemp("questions")
    write_questions(home / "train.jsonl", 240, seed=0)
    write_questions(home / "test.jsonl", 6, seed=1)
    return home


@pytest.fixture(scope="module")
def teacher(questions):
    """Trained on the references, with a tokenizer of 280 ids."""
    train_rows = rows(questions / "train.jsonl", questions / "rows", tokenizer="train", vocab_size=280)
    settings = {"method": "ce", "max_steps": 60, "batch_size": 8, "learning_rate": 1e-2, "device": "cpu"}
    train(out=questions / "teacher", student=TINY, rows=train_rows, progress=False, **settings)
    return str(questions / "teacher")


def test_greedy_answers_hang_on_the_prompt_alone(questions, teacher, tmp_path):
    """One by one or all together: the same text, in the prompts' order."""
    for size in (1, 6):
        answer(
            model=teacher,
            prompts=questions / "test.jsonl",
            out=tmp_path / str(size),
            batch_size=size,
            max_new_tokens=10,
            device="cpu",
        )
    read = [(tmp_path / f"{size}/answers.jsonl").read_text() for size in (1, 6)]
    assert read[0] == read[1]
    records = [json.loads(line) for line in read[0].splitlines()]
    assert [record["reference"] for record in records][:2] == [
        json.loads(line)["response"] for line in (questions / "test.jsonl").read_text().splitlines()
    ][:2]


def test_from_the_teachers_text_to_the_students_f1(questions, teacher, tmp_path):
    """Teacher's answers -> rows -> curves -> a student with another tokenizer -> F1, Rouge-Lsum, exact match."""
    taught = answer(
        model=teacher, prompts=questions / "train.jsonl", limit=96, out=tmp_path / "t", max_new_tokens=10, device="cpu"
    )
    assert taught["f1"]["mean"] > 0.5
    source = tmp_path / "t/answers.jsonl"
    curves = tmp_path / "curves"
    capture(
        rows=rows(source, tmp_path / "rows", tokenizer=f"{questions}/rows/tokenizer"),
        teacher=teacher,
        out=curves,
        sampler="sorted_curve",
        device="cpu",
    )
    tokenizer = rows(source, tmp_path / "own", tokenizer="train", vocab_size=300) + "/tokenizer"
    settings = {
        "max_steps": 100,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "kd_weight": 1.0,
        "device": "cpu",
        "progress": False,
    }
    train(out=tmp_path / "s", cache=str(curves), method="uld", student=TINY, tokenizer=tokenizer, **settings)
    scores = answer(
        model=str(tmp_path / "s"),
        prompts=questions / "test.jsonl",
        out=tmp_path / "scores",
        max_new_tokens=10,
        device="cpu",
    )
    assert scores["counts"]["answers"] == 6
    assert scores["f1"]["mean"] > 0.4
    assert scores["rouge_lsum"]["mean"] > 0.4
    assert json.loads((tmp_path / "scores/answers.json").read_text())["f1"] == scores["f1"]


def test_misuse_is_refused(questions, teacher, tmp_path):
    with pytest.raises(RecipeError, match="prompt_format='chatty'"):
        answer(model=teacher, prompts=questions / "test.jsonl", out=tmp_path, prompt_format="chatty")
    with pytest.raises(SourceError, match=r"missing\.jsonl"):
        answer(model=teacher, prompts=tmp_path / "missing.jsonl", out=tmp_path)
