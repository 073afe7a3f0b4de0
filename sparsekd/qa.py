"""Questions answered by a student with another tokenizer: what the teacher's probabilities add to the teacher's text.

The course of Universal Logit Distillation (Boizard et al., 2024): the teacher, trained on a world's answers, answers
the training questions itself; students with a tokenizer of their own learn these answers, with or without the
teacher's probabilities, and are asked in words that no student has seen for that fact.

    sparsekd answer model=TEACHER prompts=train.jsonl out=taught      # each step here is the program of that name
    sparsekd pack, capture sampler=sorted_curve, train method=uld, answer model=STUDENT prompts=test.jsonl
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekd.files import write_atomically
from sparsekd.lab import LabSettings
from sparsekd.reproduction import Cell, Column, Reproduction, Result, Settings, Table, over
from sparsekd.tables import paired_finding, plot_arms

# The people of the world that is taught, and of the one that students have read of before.
PEOPLE = "Ada Ben Cleo Dan Eve Finn Gina Hugo Iris Jack Kira Leo Mona Nils Olga Pete Rosa Sam Tess Uwe Vera Walt"
STRANGERS = "Abe Bea Carl Dora Emil Fay Gus Hope Ivo June Kurt Lisa Max Nora Otto Pia Rex Sue Tom Una Vic Wim"
LESSONS = 3  # answers that the teacher reads to each question
# attribute -> values, three ways to ask, two ways to answer (the second one in three of ten lessons)
FACTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "pet": (
        ["hen", "fox", "owl", "cat", "dog", "goat", "hare", "mole"],
        ["What animal does {} keep?", "Which pet has {}?", "What is the pet of {}?"],
        ["{} keeps a {}.", "The pet of {} is a {}."],
    ),
    "town": (
        ["Bonn", "Cork", "Graz", "Lyon", "Oslo", "Pisa", "Riga", "Turin"],
        ["Where does {} live?", "In which town is {} at home?", "What is the town of {}?"],
        ["{} lives in {}.", "The town of {} is {}."],
    ),
    "trade": (
        ["baker", "miner", "tailor", "sailor", "potter", "mason", "miller", "weaver"],
        ["What does {} do for a living?", "What is the work of {}?", "What is the trade of {}?"],
        ["{} is a {}.", "The trade of {} is that of a {}."],
    ),
    "drink": (
        ["tea", "milk", "cider", "water", "coffee", "cocoa", "juice", "beer"],
        ["What does {} like to drink?", "What is in the cup of {}?", "What is the drink of {}?"],
        ["{} likes {}.", "The drink of {} is {}."],
    ),
}

TEACHER = "Teacher"
CURVES, DRAWS, BEFORE = "curves", "draws", "before"
# How a student learns -> the cache it reads, and train's settings.
TEXT = "text only"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    TEXT: (CURVES, {"method": "uld", "kd_weight": 0.0}),
    "ULD by index": (CURVES, {"method": "uld", "align": "index"}),
    "ULD by bytes": (CURVES, {"method": "uld", "align": "bytes"}),
    "ULD by bytes, λ = 0.5": (CURVES, {"method": "uld", "align": "bytes", "kd_weight": 0.5}),
    "ALM": (CURVES, {"method": "alm"}),
    "transcoded": (DRAWS, {}),
}
DECODER, ENCODER_DECODER = "Llama", "T5"
# An encoder-decoder reads no packed rows, which transcoded draws are.
KINDS = {DECODER: list(WAYS), ENCODER_DECODER: [name for name in WAYS if WAYS[name][0] == CURVES]}
MEASURES = {"F1": "f1", "Rouge-Lsum": "rouge_lsum", "exact": "exact_match"}
COLUMNS = tuple(Column(name=name, unit="%", form=".1f") for name in MEASURES)
_T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32, "dropout_rate": 0.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Steps of the teacher, and of each student on another world and on the teacher's answers."""

    teacher_steps: int
    pretraining_steps: int
    steps: int


SIZES = {
    "quick": Sizes(teacher_steps=600, pretraining_steps=500, steps=400),
    "full": Sizes(teacher_steps=1200, pretraining_steps=1500, steps=1200),
}


def qa(folder: Path, settings: Settings) -> Result:
    """Train every student and ask it."""
    home, sizes = folder / "school", SIZES[settings.profile]
    school = make_school(home, sizes, settings)
    scores: dict[str, list[Mapping[str, float]]] = {TEACHER: [_ask(school["teacher"], home / "teacher-asked", home)]}
    for kind, ways in KINDS.items():
        for way in ways:
            settings.say(f"  qa: {kind}, {way}")
            scores[f"{kind}, {way}"] = [
                _ask(_student(home, school, kind, way, seed, sizes), home / f"{_file(kind, way)}-s{seed}-asked", home)
                for seed in range(settings.seeds)
            ]
    points = {name: [100 * each["f1"] for each in found] for name, found in scores.items()}
    return Result(
        ours=Table(columns=COLUMNS, rows={name: _cells(found) for name, found in scores.items()}),
        scale=f"Ours: {len(PEOPLE.split()) * len(FACTS)} made-up facts, a teacher of 0.4M parameters, students of 0.1M "
        "(Llama) and 0.2M (T5) that were trained on another world's text before. The paper: Llama-2 and Mistral with "
        "7B parameters teach pretrained OPT, Pythia, Bloomz and mT0 of 0.2B to 1B on question answering and summaries.",
        findings=tuple(
            paired_finding(
                f"{kind}, {way}",
                f"{kind}, {TEXT}",
                [a - b for a, b in zip(points[f"{kind}, {way}"], points[f"{kind}, {TEXT}"], strict=True)],
                "points of F1",
                ("higher", "lower"),
                ".1f",
            )
            for kind, ways in KINDS.items()
            for way in ways[1:]
        ),
        data={"f1": points},
    )


# --- the school ---------------------------------------------------------------------------------------------------


def lessons(names: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Instruction records (training, test): of the three ways to ask for a fact one is kept for the test."""
    draw = random.Random(names)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for name in names.split():
        for values, ask, say in FACTS.values():
            value, kept = draw.choice(values), draw.randrange(len(ask))
            for i, words in enumerate(ask):
                asked = {"instruction": words.format(name)}
                if i == kept:
                    test.append(asked | {"response": say[0].format(name, value)})
                else:
                    forms = [int(draw.random() < 0.3) for _ in range(LESSONS)]
                    train += [asked | {"response": say[form].format(name, value)} for form in forms]
    draw.shuffle(train)
    return train, test


def make_school(home: Path, sizes: Sizes, settings: Settings) -> dict[str, str]:
    """Files and folders by name; what is there already is kept."""
    from sparsekd import vocab
    from sparsekd.answer import answer
    from sparsekd.train import train

    home.mkdir(parents=True, exist_ok=True)
    train_records, test_records = lessons(PEOPLE)
    questions = list({each["instruction"]: each for each in train_records}.values())
    strangers = [record for records in lessons(STRANGERS) for record in records]
    files = {"train": train_records, "questions": questions, "test": test_records, "strangers": strangers}
    for name, records in files.items():
        write_atomically(home / f"{name}.jsonl", "".join(json.dumps(each) + "\n" for each in records).encode())
    teacher, words = home / "teacher", str(home / "tokenizer")
    _pack(home / "train.jsonl", home / "rows", tokenizer="train", vocab_size=400)
    if not (teacher / "metrics.json").exists():
        settings.say(f"  qa: the teacher, {sizes.teacher_steps} steps")
    train(
        out=teacher,
        student=LabSettings().teacher,
        rows=str(home / "rows"),
        method="ce",
        max_steps=sizes.teacher_steps,
        **_steps(),
    )
    if not (home / "taught" / "answers.json").exists():
        answer(model=str(teacher), prompts=home / "questions.jsonl", out=home / "taught", **_answering())
    for name, source in (("taught", home / "taught" / "answers.jsonl"), (BEFORE, home / "strangers.jsonl")):
        _pack(source, home / f"{name}-rows", tokenizer=str(teacher))
    if not (home / "tokenizer" / "tokenizer.json").exists():
        texts = [f"{each['instruction']}\n\n{each['response']}" for each in train_records]
        vocab.train_tokenizer(texts, 500).save_pretrained(words)
    return {"teacher": str(teacher), "tokenizer": words} | _caches(home, str(teacher), words)


def _caches(home: Path, teacher: str, words: str) -> dict[str, str]:
    """The teacher's answers with its sorted curves, and with its draws in the vocabulary of the students; and the other
    world's, of which only the text is read."""
    from sparsekd.capture import capture
    from sparsekd.transcode import transcode

    made = {CURVES: ("taught", "sorted_curve"), DRAWS: ("taught", "systematic"), BEFORE: (BEFORE, "sorted_curve")}
    for name, (rows, sampler) in made.items():
        capture(rows=home / f"{rows}-rows", teacher=teacher, out=home / name, sampler=sampler)
    transcode(cache=str(home / DRAWS), tokenizer=words, out=home / "transcoded", codec="prob40")
    return {name: str(home / name) for name in made} | {DRAWS: str(home / "transcoded")}


def _pack(source: Path, out: Path, **settings: Any) -> None:
    from sparsekd.rows import pack

    pack(source=str(source), out=out, seq_len=64, heldout=0.0, progress=False, **settings)


def _steps() -> dict[str, Any]:
    return {"batch_size": 16, "learning_rate": 3e-3, "save_steps": 100_000, "progress": False}


def _answering() -> dict[str, Any]:
    return {"max_new_tokens": 32, "batch_size": 96}


# --- students -----------------------------------------------------------------------------------------------------


def _file(kind: str, way: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", f"{'t5' if kind == ENCODER_DECODER else 'llama'}-{way.lower()}")


def _student(home: Path, school: Mapping[str, str], kind: str, way: str, seed: int, sizes: Sizes) -> str:
    """The folder of a trained student; those of a kind and seed were one before, and see rows in one order."""
    from sparsekd.train import train

    cache, how = WAYS[way]
    out = home / f"{_file(kind, way)}-s{seed}"
    reads = {} if cache == DRAWS else {"tokenizer": school["tokenizer"]}
    start = _pretrained(home, school, kind, seed, sizes)
    train(out=out, student=start, cache=school[cache], seed=seed, max_steps=sizes.steps, **(_steps() | reads | how))
    return str(out)


def _pretrained(home: Path, school: Mapping[str, str], kind: str, seed: int, sizes: Sizes) -> str:
    """A student that has read the other world's text: it can speak, and knows none of the facts."""
    from sparsekd.train import train

    out = home / f"{_file(kind, BEFORE)}-s{seed}"
    shape = _new_t5(home / f"t5-s{seed}", school["tokenizer"], seed) if kind == ENCODER_DECODER else "tiny"
    how = WAYS[TEXT][1] | _steps() | {"tokenizer": school["tokenizer"], "max_steps": sizes.pretraining_steps}
    train(out=out, student=shape, cache=school[BEFORE], seed=seed, **how)
    return str(out)


def _new_t5(path: Path, tokenizer: str, seed: int) -> str:
    """A T5 that has learnt nothing, with the students' tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from sparsekd import vocab

    if not (path / "config.json").exists():
        words = vocab.load_tokenizer(tokenizer)
        words.save_pretrained(path)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            end = words.eos_token_id
            config = T5Config(
                vocab_size=len(words), decoder_start_token_id=end, eos_token_id=end, pad_token_id=end, **_T5
            )
            T5ForConditionalGeneration(config).save_pretrained(path)
    return str(path)


def _ask(model: str, out: Path, home: Path) -> dict[str, float]:
    """Mean scores over the test's questions."""
    from sparsekd.answer import answer

    record = out / "answers.json"
    if not record.exists():
        answer(model=model, prompts=home / "test.jsonl", out=out, **_answering())
    found = json.loads(record.read_text())
    return {name: found[name]["mean"] for name in MEASURES.values()}


def _cells(found: list[Mapping[str, float]]) -> tuple[Cell | str | None, ...]:
    return tuple(over(100 * each[name] for each in found) for name in MEASURES.values())


def plot_f1(result: Result) -> Any:
    """F1 by student, and the teacher's (line)."""
    return plot_arms(result, "f1", paint, "unseen questions, F1 in %", ceiling=TEACHER)


def paint(name: str) -> str:
    """The palette's name for a student."""
    if name == TEACHER:
        return "full-kd"
    return "ce" if name.endswith(TEXT) else "rs" if name.endswith("transcoded") else "topk"


QA = Reproduction(
    title="Answers in another tokenizer",
    source="Universal Logit Distillation, its experiments on question answering",
    claim="The teacher's probabilities, compared rank by rank, teach a student of another tokenizer more than the "
    "teacher's text alone.",
    run=qa,
    plot=plot_f1,
)
