"""A zero-shot task of our own for the tables' 0-shot columns: which of four texts is in its right order?

The paper's five tasks (appendix E.1) need a network and models of some size. This one is made of held-out rows: half of
a row is the question, its other half the answer, and the wrong answers are the same with two neighbouring words in each
other's place. All four have the same words, or the likelier words would decide. Guessing scores 25 %.

Shapes: Q questions, L tokens of a row.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.errors import SourceError
from sparsekd.files import write_atomically
from sparsekd.lab import Lab, Outcome
from sparsekd.packed import RowsReader
from sparsekd.reproduction import Cell, Column, over

NAME, QUESTIONS = "right_order", 400
_WORDS = 8  # different ones, for three swaps to choose from
ZERO_SHOT = Column(name="0-shot", unit="%", form=".1f")
ZERO_SHOT_SCALE = (
    f" 0-shot: the paper's five tasks on average; here {QUESTIONS} questions of our own, which of four texts has "
    "its words in the right order, after half a held-out row (guessing: 25 %)."
)
_YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def available() -> bool:
    """Whether lm-eval is installed, which asks the questions."""
    return importlib.util.find_spec("lm_eval") is not None


def zero_shot_scores(lab: Lab, outcomes: Sequence[Outcome]) -> dict[str, Cell | None]:
    """Each arm's % of right answers, over its students; None for an arm that diverged."""
    task, scores = make_task(lab.rows(), lab.folder / "zero_shot"), {}
    for outcome in outcomes:
        students = [] if outcome.diverged() else [lab.student_folder(outcome.arm, s) for s in lab.settings.seeds]
        scores[outcome.arm.label] = over(score(student, task, lab.settings.device) for student in students)
    return scores


def make_task(rows: str, folder: Path, questions: int = QUESTIONS, seed: int = 0) -> Path:
    """Write the task of some held-out rows into `folder`, which `tasks.run_tasks` takes as include_path."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.absolute() / f"{NAME}.jsonl"
    with RowsReader(rows, "heldout") as reader:
        lines = "".join(json.dumps(each) + "\n" for each in _questions(reader, questions, seed))
    write_atomically(data, lines.encode())
    write_atomically(folder / f"{NAME}.yaml", _YAML.format(name=NAME, data=json.dumps(str(data))).encode())
    return folder


def _questions(reader: RowsReader, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"question", "choices", "answer"}: every question is of another row while there are enough."""
    random, texts = np.random.default_rng(seed), _halves(reader)
    if not texts:
        raise SourceError(f"{reader.path} has no held-out row with {_WORDS} words in its second half to ask about")
    for index in np.resize(random.permutation(len(texts)), count):
        question, text = texts[index]
        choices, order = [text, *_swapped(text, random)], random.permutation(4)
        yield {"question": question, "choices": [choices[i] for i in order], "answer": int(order.argmin())}


def _swapped(text: str, random: np.random.Generator) -> list[str]:
    """Three copies of a text, in each of which two neighbouring words have changed places; spaces stay."""
    parts = re.split(r"(\s+)", text)
    places = [i for i in range(0, len(parts) - 2, 2) if parts[i] != parts[i + 2] and parts[i] and parts[i + 2]]
    copies = []
    for place in random.choice(places, 3, replace=False):
        copy = list(parts)
        copy[place], copy[place + 2] = parts[place + 2], parts[place]
        copies.append("".join(copy))
    return copies


def _halves(reader: RowsReader) -> list[list[str]]:
    """[[first, second]] of each row, without those of too few words (padding, tables of numbers)."""
    tokenizer, half = reader.tokenizer(), reader.seq_len // 2
    rows = reader.batch(range(len(reader))).input_ids
    texts = [[tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in np.split(r, [half])] for r in rows]
    return [both for both in texts if both[0].strip() and len(set(both[1].split())) >= _WORDS]


def score(model: Path, task: Path, device: str | None = None) -> float:
    """% of the questions answered right; kept in the model's folder as zero_shot/tasks.json."""
    from sparsekd.tasks import run_tasks

    kept = model / "zero_shot" / "tasks.json"
    if not kept.exists():
        with _silence():
            run_tasks(
                model=str(model), tasks=NAME, include_path=str(task), out=kept.parent, batch_size=32, device=device
            )
    return 100 * float(json.loads(kept.read_text())["tasks"][NAME]["acc"]["mean"])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr, from subprocesses neither: lm-eval shows a dozen bars a model, and asks git about itself."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
