"""Instruction rows for encoder-decoder students: the encoder reads a prompt, the decoder learns its answer.

    rows = PromptedRows(CacheReader("curves/"), pair_of(teacher_tokenizer, student_tokenizer))
    rows[17].prompt, rows[17].student.ids        # what the encoder reads, what the decoder learns

An answer is a run of supervised tokens, its prompt all of its document before it. Answers whose document begins in an
earlier row have lost (a part of) their prompt and are left out.

Shapes: T teacher's and S student's tokens of an answer, E tokens of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .cache import CacheReader
from .errors import RecipeError
from .overlay import Overlaid, OverlaidRow, OverlaidRows, head_of, log_probabilities, overlay
from .pair import Pair


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptedRow(OverlaidRow):
    """An answer twice, as an `OverlaidRow`, and its prompt.

    Attributes:
        student: [S] the answer as a text of its own; label l is token l.
        teacher: [T+1] the prompt's last token, which predicts the first one of the answer, and the answer.
        prompt: [E] int64 in the student's tokens, ended by its EOS.
    """

    prompt: np.ndarray


class PromptedRows(OverlaidRows):
    """The answers in the rows of a cache of sorted curves, one `PromptedRow` each.

    Of an answer the first `max_length` student tokens are kept, of a prompt the last.

    Raises:
        RecipeError: no row holds an answer with its prompt, or the cache holds a share of the positions only.
    """

    def __init__(self, reader: CacheReader, pair: Pair, max_length: int | None = None) -> None:
        super().__init__(reader, pair, max_length)
        if (share := reader.spec.capture.get("positions", 1.0)) != 1:
            raise RecipeError(
                f"the cache was captured with positions={share}: answers with holes cannot be told apart; capture with "
                "positions=1 for an encoder-decoder student"
            )
        found = [answers_of(row.starts, row.supervised) for row in map(reader.record, range(len(reader)))]
        self.places = [(number, *place) for number, places in enumerate(found) for place in places]
        if not self.places:
            raise RecipeError(
                "an encoder-decoder student learns answers to prompts, and no row of the cache holds an answer with "
                "its prompt; pack instruction data (prompt_field=, response_field=, or chats) in long enough rows"
            )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> PromptedRow:
        number, opens, first, last = self.places[index]
        row = self.reader[number]
        starts = row.starts.astype(bool).copy()
        starts[first] = True  # the decoder begins with the answer
        (prompt, _), (student, teacher) = (
            overlay(row.input_ids[part], starts[part], row.supervised[part], self.pair)
            for part in (slice(opens, first), slice(first, last))
        )
        return PromptedRow(
            student=head_of(student, self.max_length),
            teacher=_after(row.input_ids[first - 1], teacher),
            log_p=log_probabilities(row)[first - 1 : last],
            curve=self.curve_of(row)[first - 1 : last],
            prompt=_ended(prompt.ids, self.pair.student.eos, self.max_length),
        )


def answers_of(starts: np.ndarray, supervised: np.ndarray) -> list[tuple[int, int, int]]:
    """(first token of its document, first, last + 1) of each answer of a row whose prompt is there; [T] bool both."""
    starts, learnt = starts.astype(bool), supervised.astype(bool)
    before = np.concatenate([[False], learnt[:-1]])
    found = []
    for first in np.flatnonzero(learnt & (~before | starts)).tolist():
        opened = np.flatnonzero(starts[: first + 1])
        ends = np.flatnonzero(~learnt[first + 1 :] | starts[first + 1 :])
        last = first + 1 + int(ends[0]) if len(ends) else len(learnt)
        if len(opened) and opened[-1] < first:
            found.append((int(opened[-1]), first, last))
    return found


def _after(token: int, teacher: Overlaid) -> Overlaid:
    """The answer behind the token that predicts its first one, which is no part of it."""
    return Overlaid(
        ids=np.concatenate([[token], teacher.ids]).astype(np.int64),
        starts=np.concatenate([[-1], teacher.starts]),
        ends=np.concatenate([[-1], teacher.ends]),
        supervised=np.concatenate([[False], teacher.supervised]),
        opens=np.concatenate([[False], teacher.opens]),
    )


def _ended(ids: np.ndarray, eos: int | None, most: int | None) -> np.ndarray:
    """A prompt as encoders were trained to read one."""
    whole = ids if eos is None else np.append(ids, eos)
    return whole[-most:] if most else whole
