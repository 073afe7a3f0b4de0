"""The tables on the teacher's side: adapted to the data or not (11), reading the rows of the student or not (13)."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekd.files import write_atomically, write_json
from sparsekd.lab import Lab, Outcome, is_trained, write_stats
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, Settings, Table, exact, over
from sparsekd.tables import CE, COLUMNS, FULL, USES, Claim, drawn, judge, lab_of, plot_losses, scale_of, table

# --- table 13: rows packed alike or not -----------------------------------------------------------------

ALIGNED, SHUFFLED, SHORT = "Same seed, same length", "Different seed, same length", "Different seed, a quarter"
TABLE13_PAPER = {
    "CE": (None, None, 0.0, None, None),
    SHORT: (None, 2.760, 79, None, None),
    SHUFFLED: (None, 2.753, 90, None, None),
    ALIGNED: (None, 2.749, 96, None, None),
    "FullKD": (None, None, 100.0, None, None),
}


def table13(folder: Path, settings: Settings) -> Result:
    """Students on one packing, under targets that the teacher made on it, on another order, on another length (D.3)."""
    lab = lab_of(folder, settings)
    caches, kept = packings(lab)
    arms = [drawn(50, SHORT, allow_misaligned=True), drawn(50, SHUFFLED, allow_misaligned=True), drawn(50, ALIGNED)]
    by_arm = caches | {"CE": caches[ALIGNED], "FullKD": caches[ALIGNED]}
    outcomes = {outcome.arm.label: outcome for outcome in lab.run([CE, *arms, FULL], caches=by_arm)}
    return Result(
        ours=table(outcomes, list(TABLE13_PAPER)),
        paper=Table(columns=COLUMNS, rows={name: exact(*values) for name, values in TABLE13_PAPER.items()}),
        scale=scale_of(lab, "300M students on rows of 4,096 tokens, a teacher that read rows of 1,024 or 4,096")
        + f" Every student learns from the same {kept:,} positions; FullKD is the teacher run online on the student's "
        f"rows. A quarter is {lab.seq_len() // 4} tokens.",
        findings=(
            judge(outcomes, Claim(better=ALIGNED, worse=SHORT)),
            judge(outcomes, Claim(better=SHUFFLED, worse=SHORT)),
            judge(outcomes, Claim(better=ALIGNED, worse=SHUFFLED)),
            _as_online(outcomes),
        ),
        data=_losses(outcomes),
    )


def _as_online(outcomes: Mapping[str, Outcome]) -> Finding:
    """The paper's "the offline run was within random error of the online run"."""
    found = judge(outcomes, Claim(better="FullKD", worse=ALIGNED))
    sure = len(outcomes[ALIGNED].losses()) > 1  # one seed has no random error to be within
    return Finding(text=f"Offline against online: {found.text}", holds=found.holds is not True if sure else None)


def packings(lab: Lab) -> tuple[dict[str, str], int]:
    """({label: cache}, positions): one packing's rows with targets made on it, on another order and a shorter length.

    The documents are those of the lab's training rows, as many as its students read once. All caches hold the same
    rows and the same supervised positions.
    """
    from sparsekd.misalign import keep_common, misalign

    length, home = lab.seq_len(), lab.folder / "packings"
    shapes = {ALIGNED: (0, length), SHUFFLED: (1, length), SHORT: (1, length // 4)}
    rows = {label: _packed(lab, home / f"rows-seed{seed}-{size}", seed, size) for label, (seed, size) in shapes.items()}
    made = {label: lab.cache(drawn(50), rows=path) for label, path in rows.items()}
    copies = {label: home / f"cache-seed{seed}_{size}" for label, (seed, size) in shapes.items()}
    if not (home / "kept.json").exists():
        for label in (SHUFFLED, SHORT):
            carried = home / f"carried-{Path(made[label]).name}"
            misalign(cache=made[label], rows=rows[ALIGNED], out=carried, i_know_this_is_misaligned=True)
            made[label] = str(carried)
        kept = keep_common({made[label]: copies[label] for label in shapes})
        for copy in copies.values():
            write_stats(copy)
        write_json(home / "kept.json", kept)
    return {label: str(copy) for label, copy in copies.items()}, json.loads((home / "kept.json").read_text())


def _packed(lab: Lab, out: Path, seed: int, seq_len: int) -> str:
    """The lab's training documents as text, packed again with another seed or length; none is held out."""
    source = out.parent / "documents.jsonl"
    if not source.exists():
        write_documents(texts_of(lab.rows(), limit_rows=lab.settings.student_steps * lab.settings.batch_size), source)
    return _pack(lab, source, out, seed=seed, seq_len=seq_len, heldout=0.0)


def _pack(lab: Lab, source: Path, out: Path, **settings: Any) -> str:
    """Rows of a file of documents, with the lab's tokenizer."""
    from sparsekd.rows import pack

    pack(source=str(source), tokenizer=f"{lab.rows()}/tokenizer", out=out, progress=False, **settings)
    return str(out)


def texts_of(rows: str, split: str = "train", limit_rows: int | None = None) -> Iterator[str]:
    """The text of each document of packed rows, or of their first ones; control tokens and padding are left out."""
    import numpy as np

    from sparsekd.packed import RowsReader

    with RowsReader(rows, split) as reader:
        tokenizer, count = reader.tokenizer(), min(len(reader), limit_rows or len(reader))
        batch = reader.batch(range(count))
    for document in np.split(batch.input_ids.ravel(), np.flatnonzero(batch.starts)[1:]):
        yield tokenizer.decode(document.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def write_documents(texts: Iterable[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())


# --- table 11: the teacher adapted first ----------------------------------------------------------------

ORIGINAL, ADAPTED = "KD w/o adaptation", "KD with adaptation"
TABLE11_PAPER = {"CE": (2.99,), ORIGINAL: (2.98,), ADAPTED: (2.96,)}


def table11(folder: Path, settings: Settings) -> Result:
    """Students under a teacher of other text, and under the same one fine-tuned on the student's text (6.2)."""
    lab = lab_of(folder, settings)
    original = lab.teacher() if settings.teacher else other_teacher(lab)
    teachers = {ORIGINAL: original, ADAPTED: adapted_teacher(lab, original, own=not settings.teacher)}
    outcomes = {"CE": lab.run([CE])[0]}
    outcomes |= {label: lab.run([drawn(50, label)], teacher=path)[0] for label, path in teachers.items()}
    columns = (
        Column(name="teacher's loss", unit="nats/token", form=".3f"),
        Column(name="LM loss", unit="nats/token", form=".3f"),
        Column(name="below CE", unit="nats/token", form=".3f"),
    )
    losses = {label: Cell(mean=_heldout_loss(lab, path)) for label, path in teachers.items()}
    rows = {label: (losses.get(label), over(o.losses()), _gain(outcomes, label)) for label, o in outcomes.items()}
    paper = {label: exact(loss, TABLE11_PAPER["CE"][0] - loss) for label, (loss,) in TABLE11_PAPER.items()}
    return Result(
        ours=Table(columns=columns, rows=rows),
        paper=Table(columns=columns[1:], rows=paper),
        scale=scale_of(lab, "300M students on FineWeb-Edu under Llama 3 8B, adapted on 50B tokens")
        + f" {_history(lab, settings)}",
        findings=(
            judge(outcomes, Claim(better=ADAPTED, worse=ORIGINAL)),
            judge(outcomes, Claim(better=ADAPTED, worse="CE")),
            judge(outcomes, Claim(better=ORIGINAL, worse="CE")),
        ),
        data=_losses(outcomes),
    )


def _history(lab: Lab, settings: Settings) -> str:
    if settings.teacher:
        return f"The original is {settings.teacher}, adapted for {_adapt_steps(lab)} steps."
    return (
        f"The original was trained for {lab.settings.teacher_steps} steps on the standard library printed anew from "
        "its syntax trees (no comments, other quotes and line breaks; held-out files left out), and adapted for "
        f"{_adapt_steps(lab)} steps on the student's rows."
    )


def _gain(outcomes: Mapping[str, Outcome], label: str) -> Cell | None:
    """By how much a student's loss lies below that of cross-entropy, paired by seed."""
    return over([c - x for c, x in zip(outcomes["CE"].losses(), outcomes[label].losses(), strict=True)])


def _losses(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {"loss": {name: outcome.losses() for name, outcome in outcomes.items() if not outcome.diverged()}}


def _heldout_loss(lab: Lab, teacher: str) -> float:
    from sparsekd.evaluate import evaluate

    s, out = lab.settings, lab.folder / "evaluations" / Path(teacher).name
    found = evaluate(model=teacher, rows=lab.rows(), out=out, batch_size=32, limit_rows=s.eval_rows, device=s.device)
    return float(found["loss"]["mean"])


def _adapt_steps(lab: Lab) -> int:
    return max(1, lab.settings.teacher_steps // 2)


def adapted_teacher(lab: Lab, teacher: str, *, own: bool) -> str:
    """The teacher fine-tuned on the lab's rows; one of the lab's `own` size learns at a third of its first rate."""
    from sparsekd.adapt import adapt

    s, out = lab.settings, lab.folder / "adapted"
    if not (out / "adapt.json").exists():
        lab.say(f"  lab: adapting {teacher}, {_adapt_steps(lab)} steps")
        adapt(
            out=out,
            teacher=teacher,
            rows=lab.rows(),
            max_steps=_adapt_steps(lab),
            batch_size=s.batch_size,
            device=s.device,
            dtype=s.dtype,
            learning_rate=s.learning_rate / 3 if own else 1e-5,
            progress=False,
        )
    return str(out)


def other_teacher(lab: Lab) -> str:
    """A teacher of the lab's size and tokenizer that was trained on other text: the same code in another hand."""
    home = lab.folder / "other"
    out, source = home / "teacher", home / "documents.jsonl"
    if is_trained(out):
        return str(out)
    if not source.exists():
        write_documents(_other_texts(set(texts_of(lab.rows(), "heldout"))), source)
    rows = _pack(lab, source, home / "rows", seq_len=lab.seq_len())
    lab.say(f"  lab: training a teacher on other text, {lab.settings.teacher_steps} steps")
    lab.train_teacher(out, rows)
    return str(out)


def _other_texts(heldout: set[str]) -> Iterator[str]:
    """The standard library's files printed anew, those left out on which students are judged."""
    from sparsekd.corpus import documents

    texts = (printed_anew(document.text) for document in documents("builtin") if document.text not in heldout)
    return (text for text in texts if text)


def printed_anew(source: str) -> str:
    """A Python file as its syntax tree prints it; "" where it is not Python.

    The same code in another hand: no comments, other quotes, blank lines and line breaks.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about the file's own escapes
            return ast.unparse(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError):
        return ""


TEACHER_TABLES: dict[str, Reproduction] = {
    "table11": Reproduction(
        title="Adapting the teacher",
        source="table 11, section 6.2",
        claim="A teacher of other data gives little over cross-entropy; fine-tuned on the student's data, more.",
        run=table11,
        plot=plot_losses,
        uses=USES,
    ),
    "table13": Reproduction(
        title="Aligning teacher and student",
        source="table 13, section D.3",
        claim="Targets made on another packing cost a part of the gain, more so with shorter rows; aligned, offline "
        "equals online.",
        run=table13,
        plot=plot_losses,
        uses=USES,
    ),
}
