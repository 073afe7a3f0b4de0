"""Speculative acceptance of a student with another tokenizer, where it and its teacher have read the same bytes.

At a byte where both have a token begin, every token w of the teacher's goes through the transcoder's own map: p(w)
lands on the student's token that w begins with, on the set C of those that an open w may become, or nowhere, where no
text could go on with w so; what lands is brought to a sum of 1. That leaves mass on tokens and on sets, and what lies
inside a set the teacher has not said yet. With q the student's distribution, the acceptance is

    max over all p' that give every set's mass to tokens of it     Σ_v min(p'_v, q_v)

Where every set has one token, it is Σ min(p', q), exactly the chance that a drafted token is kept; where a set has
several, an upper bound of it: a student that agrees on the sets is not blamed for what is inside.

Shapes: P positions, V student's and W teacher's vocabulary, M masses of sets, S tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsekd import heads, models, vocab
from sparsekd.fates import OPEN, Answers, answer
from sparsekd.packed import PackedRow, RowsReader, size_without_padding
from sparsekd.pair import pair_of
from sparsekd.retokenise import StudentRow, retokenise
from sparsekd.set_table import SetTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a teacher says at P positions in the student's vocabulary.

    Attributes:
        points: [P, V] float64, the masses of tokens.
        position, sets, masses: [M] the masses of sets; with the points they sum to 1 at every position.
        table: of the sets.
    """

    points: np.ndarray
    position: np.ndarray
    sets: np.ndarray
    masses: np.ndarray
    table: SetTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """Held-out positions that both tokenizers have, each in both.

    Attributes:
        rows, own_rows: the rows in the student's and the teacher's tokens, int64 [S] each.
        places, own_places: [P, 2] (row, token) of the tokens that are predicted.
        said: what the teacher says in the student's vocabulary; own: [P, W] float64, in its own.
    """

    rows: list[np.ndarray]
    own_rows: list[np.ndarray]
    places: np.ndarray
    own_places: np.ndarray
    said: Said
    own: np.ndarray


def open_exam(
    *,
    teacher: str,
    rows: str | Path,
    tokenizer: str,
    split: str = "heldout",
    count: int = 16,
    device: str | None = None,
) -> Exam:
    """The positions of some rows, evenly spaced over a split, where teacher and student both begin a token.

    Args:
        rows: packed with the teacher's tokenizer; tokenizer: the student's.
        count: rows.
    """
    model = models.open_model(teacher, device=device)
    with RowsReader(rows, split) as reader:
        pair = pair_of(reader.tokenizer(), vocab.load_tokenizer(tokenizer), heads.logit_width(model))
        chosen = [reader[row] for row in np.unique(np.linspace(0, len(reader) - 1, count).astype(int)).tolist()]
    answers = Answers(pair=pair)
    own_rows = [_ids(row, pair.teacher.eos) for row in chosen]
    given = [(ids, row.starts[: len(ids)]) for row, ids in zip(chosen, own_rows, strict=True)]
    found = retokenise(given, pair, answers.contexts)
    shared = [_shared(row, answers) for row in found]
    places = _numbered(shared)
    own_places = _numbered([row.source[at] for row, at in zip(found, shared, strict=True)])
    own = probabilities(model, own_rows, own_places)
    context = np.concatenate([row.context[at] for row, at in zip(found, shared, strict=True)])
    kept, said = carried(own, context, answers)
    return Exam(
        rows=[row.ids for row in found],
        own_rows=own_rows,
        places=places[kept],
        own_places=own_places[kept],
        said=said,
        own=own[kept],
    )


def _ids(row: PackedRow, eos: int | None) -> np.ndarray:
    return row.input_ids[: size_without_padding(row.input_ids, row.supervised, eos)].astype(np.int64)


def _shared(row: StudentRow, answers: Answers) -> np.ndarray:
    """The student's tokens that begin where one of the teacher's does, both with something before them."""
    contexts = [answers.contexts.all[number] for number in row.context.tolist()]
    same = np.array([len(each.tail) == len(each.head) for each in contexts], bool)
    return np.flatnonzero(same & (row.source > 0) & (np.arange(len(same)) > 0))


def _numbered(tokens: list[np.ndarray]) -> np.ndarray:
    rows = np.repeat(np.arange(len(tokens)), [len(each) for each in tokens])
    return np.stack([rows, np.concatenate(tokens)], 1)


@torch.no_grad()
def probabilities(model: Any, rows: list[np.ndarray], places: np.ndarray) -> np.ndarray:
    """[P, vocabulary] float64: a model's distribution of each place's token given its row's tokens before it."""
    device, head, found = next(model.parameters()).device, heads.head_of(model), []
    for number, ids in enumerate(rows):
        before = torch.from_numpy(places[places[:, 0] == number, 1] - 1).to(device)
        if len(before):
            inputs = torch.from_numpy(ids).to(device)[None]
            hidden = heads.body_of(model)(input_ids=inputs, use_cache=False).last_hidden_state[0]
            found.append(head.logits(hidden[before]).double().softmax(-1).cpu().numpy())
    joined: np.ndarray = np.concatenate(found)
    return joined


def carried(own: np.ndarray, context: np.ndarray, answers: Answers) -> tuple[np.ndarray, Said]:
    """(the positions that anything comes of, what is said there): each of the W tokens as a draw of weight p(w).

    Args:
        own: [P, W] the teacher's distributions; context: [P] what its tokens are read after.
    """
    count, width = own.shape
    draws = np.tile(np.arange(width), count)
    position = np.repeat(np.arange(count), width)
    fates, tokens = answer(answers, context[position], draws)
    fine = (fates >= OPEN) & (own.ravel() > 0)
    position, draws, fates, tokens, mass = (each[fine] for each in (position, draws, fates, tokens, own.ravel()))
    kept, position = np.unique(position, return_inverse=True)
    mass = mass / np.bincount(position, mass)[position]
    size, open_ = answers.sets.table.vocab_size, fates == OPEN
    points = np.zeros((len(kept), size))
    np.add.at(points, (position[~open_], tokens[~open_]), mass[~open_])
    sets = answers.sets.of(draws[open_], tokens[open_])
    keys, inverse = np.unique(position[open_] * len(answers.sets.table) + sets, return_inverse=True)
    position, sets = np.divmod(keys, len(answers.sets.table))
    masses = np.bincount(inverse, mass[open_], len(keys))
    return kept, Said(points=points, position=position, sets=sets, masses=masses, table=answers.sets.table)


def acceptance(said: Said, q_PV: np.ndarray) -> np.ndarray:
    """[P] the maximum at the head of this file.

    Tokens take what they can of q, then sets, small ones first, what is left of theirs. That is the maximum wherever
    two sets lie inside one another or apart: a larger set has all tokens of a smaller one, and does not mind which of
    them that one took. Sets by the teacher's cuts are such, and so are sets by bytes.
    """
    kept = np.minimum(said.points, q_PV)
    left, found = q_PV - kept, kept.sum(-1)
    order = np.argsort(said.sets, kind="stable")
    sets, first = np.unique(said.sets[order], return_index=True)
    entries = dict(zip(sets.tolist(), np.split(order, first[1:]), strict=False))  # of nothing, split makes one part
    for index in sets[np.argsort((said.table.last - said.table.first)[sets], kind="stable")].tolist():
        rows = said.position[entries[index]]
        block = np.ix_(rows, said.table.members(index))
        free = left[block].sum(-1)
        taken = np.minimum(said.masses[entries[index]], free)
        left[block] *= 1 - np.divide(taken, free, out=np.zeros_like(free), where=free > 0)[:, None]
        found[rows] += taken
    return found


def own_acceptance(exam: Exam, model: Any) -> np.ndarray:
    """[P] Σ min(p, q) of a student with the teacher's own tokenizer, at the same bytes."""
    found: np.ndarray = np.minimum(exam.own, probabilities(model, exam.own_rows, exam.own_places)).sum(-1)
    return found


def cross_acceptance(exam: Exam, model: Any) -> np.ndarray:
    """[P] of a student with the tokenizer that the exam was opened with."""
    q_PV = probabilities(model, exam.rows, exam.places)
    return acceptance(exam.said, q_PV[:, : exam.said.points.shape[1]])
