"""A cached row in the student's tokens, with the bytes that each token of both spells: what ULD and ALM are paired by.

    rows = OverlaidRows(CacheReader("curves/"), pair_of(teacher_tokenizer, student_tokenizer))
    rows[17].student.ids, rows[17].student.starts, rows[17].teacher.starts

Bytes are counted through a row: documents follow each other, and a control token that both have (the end of a document)
takes one byte of its own, so that it is never one with the token after it.

Shapes: T teacher tokens and S student tokens of a row, C runs of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .align import last_start_before
from .cache import CacheReader, Row
from .pair import Cut, Pair, cut_texts
from .retokenise import Stretch, stretches


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlaid:
    """One tokenizer's tokens of a row: ids, starts and ends int64 (-1: no part of the text), supervised bool, and
    opens bool, where documents start."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    supervised: np.ndarray
    opens: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlaidRow:
    """A row twice, and what the cache knows of the teacher.

    Attributes:
        log_p: [T] float32, natural logarithm of the probability of token t+1; 0 where it is not supervised.
        curve: [T, C] float32, the masses of the distribution of token t+1.
    """

    student: Overlaid
    teacher: Overlaid
    log_p: np.ndarray
    curve: np.ndarray


class OverlaidRows:
    """The rows of a cache of sorted curves, one `OverlaidRow` each, cut to `max_length` student tokens.

    Goes to data loader workers as the reader does. Of a cache of counts, curves are the counts in falling order, which
    is biased (`uld.uld`), and `log_p` says nothing.

    Attributes:
        edges: of the curves, as `sketch.SortedCurve` has them.
    """

    def __init__(self, reader: CacheReader, pair: Pair, max_length: int | None = None) -> None:
        self.reader, self.pair, self.max_length = reader, pair, max_length
        codec = reader.spec.codec
        self.edges = tuple(codec.get("edges") or range(min(codec["rounds"], reader.spec.logit_width) + 1))

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> OverlaidRow:
        row = self.reader[index]
        student, teacher = overlay(row.input_ids, row.starts, row.supervised, self.pair)
        log_p, curve = log_probabilities(row), self.curve_of(row)
        return OverlaidRow(student=head_of(student, self.max_length), teacher=teacher, log_p=log_p, curve=curve)

    def curve_of(self, row: Row) -> np.ndarray:
        """[T, C] float32, zeros at the last token."""
        found = row.targets.curve
        ranked = -np.sort(-row.targets.weights, -1) if found is None else found
        return np.pad(ranked, ((0, 1), (0, len(self.edges) - 1 - ranked.shape[-1])))

    def close(self) -> None:
        """Let the reader's files go."""
        self.reader.close()


def overlay(ids: np.ndarray, starts: np.ndarray, supervised: np.ndarray, pair: Pair) -> tuple[Overlaid, Overlaid]:
    """(student's, teacher's) tokens of a row; [T] ids, document starts and mask are the teacher's.

    A student token is supervised where all teacher tokens that it touches are. A stretch whose text does not come back
    from the student's tokens (a normaliser changed it) has no bytes: its tokens are learnt, but never paired.
    """
    parts = list(stretches(ids.astype(np.int64), starts.astype(bool), pair))
    learnt, begins, ends = supervised.astype(bool), np.full(len(ids), -1), np.full(len(ids), -1)
    cuts = _cuts(parts, learnt, pair)
    pieces, at = [], 0
    for stretch, cut in zip(parts, cuts, strict=True):
        control = _shared_control(stretch, pair)
        inside = slice(stretch.first, stretch.last)
        begins[inside], ends[inside] = at + stretch.starts[:-1], at + stretch.starts[1:]
        pieces.append(_student_piece(stretch, cut, control, at, learnt, pair))
        at += len(stretch.text)
        if control is not None:
            begins[stretch.last], ends[stretch.last] = at, at + 1
            at += 1
    return _join(pieces), Overlaid(
        ids=ids.astype(np.int64), starts=begins, ends=ends, supervised=learnt, opens=starts.astype(bool)
    )


def _cuts(parts: list[Stretch], learnt: np.ndarray, pair: Pair) -> list[Cut]:
    """The stretches by the student's tokenizer, each cut where a prompt ends: a model that is asked sees it alone."""
    texts = [_segments(stretch, learnt) for stretch in parts]
    found = iter(cut_texts([text for several in texts for text in several], pair))
    return [_joined([next(found) for _ in several]) for several in texts]


def _segments(stretch: Stretch, learnt: np.ndarray) -> list[bytes]:
    flips = np.flatnonzero(np.diff(learnt[stretch.first : stretch.last])) + 1
    edges = [0, *stretch.starts[flips].tolist(), len(stretch.text)]
    return [stretch.text[a:b] for a, b in pairwise(edges)]


def _joined(cuts: list[Cut]) -> Cut:
    offsets = np.cumsum([0, *(cut.starts[-1] for cut in cuts)])
    starts = [cut.starts[:-1] + offset for cut, offset in zip(cuts, offsets, strict=False)]
    return Cut(
        ids=[token for cut in cuts for token in cut.ids],
        starts=np.concatenate([*starts, offsets[-1:]]),
        words=np.concatenate([cut.words for cut in cuts]),
        comes_back=all(cut.comes_back for cut in cuts),
    )


def _shared_control(stretch: Stretch, pair: Pair) -> int | None:
    """The student's counterpart of the control token that ends a stretch, where there is one."""
    found = -1 if stretch.control is None else int(pair.control[stretch.control])
    return None if found < 0 else found


def _student_piece(
    stretch: Stretch, cut: Cut, control: int | None, at: int, learnt: np.ndarray, pair: Pair
) -> Overlaid:
    """The student's tokens of a stretch: its BOS where a document opens, the text, the control token."""
    opens = stretch.opens and pair.student.bos is not None and control != pair.student.bos
    head = [pair.student.bos] if opens and pair.student.bos is not None else []
    tail = [] if control is None else [control]
    begins = at + cut.starts[:-1] if cut.comes_back else np.full(len(cut.ids), -1)
    ends = at + cut.starts[1:] if cut.comes_back else begins
    last = at + len(stretch.text)
    ids = np.array([*head, *cut.ids, *tail], np.int64)
    after_bos = stretch.bare and pair.student.bos is None  # the teacher's was left out: the document starts here
    return Overlaid(
        ids=ids,
        opens=(np.arange(len(ids)) == 0) & (stretch.opens or after_bos),
        starts=np.concatenate([np.full(len(head), -1), begins, np.full(len(tail), last)]).astype(np.int64),
        ends=np.concatenate([np.full(len(head), -1), ends, np.full(len(tail), last + 1)]).astype(np.int64),
        supervised=np.array(
            [False] * len(head) + _learnt(stretch, cut, learnt) + [bool(learnt[stretch.last]) for _ in tail], bool
        ),
    )


def _learnt(stretch: Stretch, cut: Cut, learnt: np.ndarray) -> list[bool]:
    """Whether all teacher tokens that a student token touches are supervised."""
    inside = learnt[stretch.first : stretch.last]
    if not cut.comes_back or not len(inside):
        return [bool(inside.all())] * len(cut.ids)
    first = last_start_before(stretch.starts[:-1], cut.starts[:-1])
    last = last_start_before(stretch.starts[:-1], np.maximum(cut.starts[1:] - 1, cut.starts[:-1]))
    missing = np.concatenate([[0], np.cumsum(~inside)])
    learnt_all: list[bool] = (missing[last + 1] == missing[first]).tolist()
    return learnt_all


def _join(pieces: list[Overlaid]) -> Overlaid:
    return Overlaid(
        **{
            name: np.concatenate([getattr(piece, name) for piece in pieces])
            for name in ("ids", "starts", "ends", "supervised", "opens")
        }
    )


def log_probabilities(row: Row) -> np.ndarray:
    """[T] float32, natural logarithm of the probability of token t+1; 0 where it is not supervised, or not known."""
    log_p = np.zeros(len(row.input_ids), np.float32)
    if row.targets.curve is None:
        return log_p
    kept = row.supervised[1:]
    log_p[:-1][kept] = np.log(row.targets.weights[kept, 0])
    return log_p


def head_of(tokens: Overlaid, most: int | None) -> Overlaid:
    """The first tokens."""
    return Overlaid(
        ids=tokens.ids[:most],
        starts=tokens.starts[:most],
        ends=tokens.ends[:most],
        supervised=tokens.supervised[:most],
        opens=tokens.opens[:most],
    )
