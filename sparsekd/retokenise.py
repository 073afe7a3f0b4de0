"""A teacher's row as the student would read it: the same text cut by the student's tokenizer, laid over the teacher's.

    row = retokenise([record], pair_of(teacher_tokenizer, student_tokenizer), Contexts())[0]
    row.ids                     # the student's tokens of the row
    row.source                  # for each: the teacher token whose draws speak about it, or -1
    row.context                 # for each: what a draw must be joined with before the student's tokenizer reads it

A student token that starts at byte b is spoken about by the draws for the teacher token that starts last at or before
b. Such a draw is read after the student's word so far (`tail`), and must give back the student's tokens up to b.

Shapes: T teacher tokens and S student tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .align import identical_spans, last_start_before, shared_starts, token_starts
from .errors import MismatchError
from .pair import Cut, Pair, cut_texts
from .vocab_bytes import NEVER, with_prefix

# Draws are read together with at most so many bytes of the text before them: words are shorter, SentencePiece's BPE
# without a pre-tokenizer takes the whole text for one word.
TAIL_BYTES = 96
_WHITE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


class Context(NamedTuple):
    """What decides how a draw is read, given all that came before it.

    A draw w is read as the student's tokens of `tail` + w. They must be cut at `cuts` and nowhere else up to the last
    of them (byte 0 without cuts), and agree with `head` up to there; the token that begins there is the answer.

    Attributes:
        tail: the student's text from the start of the word that w may go on with, to where w begins.
        head: the student's text from there to where its token begins; shorter or longer than the tail.
        cuts: ends of the student's tokens in `head`.
        opens: whether w begins a document, where tokenizers add and drop spaces.
    """

    tail: bytes = b""
    head: bytes = b""
    cuts: tuple[int, ...] = ()
    opens: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentRow:
    """One row in the student's tokens.

    Attributes:
        ids: [S] int64; starts: [S] bool, where documents start.
        source: [S] int64, the row's teacher token whose draws speak about the token, or -1.
        context: [S] int64, an index into the pair's `Contexts`.
        counts: teacher and student tokens, starts and spans that both have, tokens of text that does not come back.
    """

    ids: np.ndarray
    starts: np.ndarray
    source: np.ndarray
    context: np.ndarray
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class Contexts:
    """All contexts seen so far, numbered; 0 is the empty one: a word starts here and so does the draw."""

    all: list[Context] = field(default_factory=lambda: [Context()])
    index: dict[Context, int] = field(default_factory=lambda: {Context(): 0})

    def number(self, context: Context) -> int:
        """The context's number; a new one is put at the end."""
        found = self.index.get(context)
        if found is None:
            found = self.index[context] = len(self.all)
            self.all.append(context)
        return found


# --- a row's text, in stretches between control tokens ----------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Teacher tokens [first, last) of a row that are text, and the control token at `last`, if there is one.

    Attributes:
        opens: whether a document starts here; bare: whether the text does (perhaps after a BOS).
        text: the bytes as the student reads them.
        starts: [last - first + 1] where the teacher's tokens start in `text`.
    """

    first: int
    last: int
    control: int | None
    opens: bool
    bare: bool
    text: bytes
    starts: np.ndarray


def stretches(ids: np.ndarray, starts: np.ndarray, pair: Pair) -> Iterator[Stretch]:
    """A row's teacher tokens in order: text, and the control token after it."""
    of_id, size = pair.teacher.of_id, len(ids)
    is_control = np.array([of_id[token] is None for token in ids.tolist()], bool)
    first = 0
    while first < size:
        later = np.flatnonzero(is_control[first:] | np.r_[False, starts[first + 1 :]])
        last = first + int(later[0]) if len(later) else size
        opens_next = last > first and last < size and starts[last]  # a BOS: the next document's, not this one's end
        control = int(ids[last]) if last < size and is_control[last] and not opens_next else None
        after_bos = first > 0 and starts[first - 1] and ids[first - 1] == pair.teacher.bos
        yield _stretch(ids, first, last, control, bool(starts[first]), bool(after_bos), pair)
        first = last + (control is not None)


def _stretch(
    ids: np.ndarray, first: int, last: int, control: int | None, opens: bool, after_bos: bool, pair: Pair
) -> Stretch:
    pieces = [pair.teacher.of_id[token] or b"" for token in ids[first:last].tolist()]
    text, begins = b"".join(pieces), token_starts(np.array([len(piece) for piece in pieces], np.int64))
    bare = opens or after_bos
    if bare:
        read = with_prefix(text[pair.teacher.prefix != NEVER and text.startswith(b" ") :], pair.student)
        begins[1:] += len(read) - len(text)
        text = read
    return Stretch(first=first, last=last, control=control, opens=opens, bare=bare, text=text, starts=begins.clip(0))


def retokenise(rows: Sequence[tuple[np.ndarray, np.ndarray]], pair: Pair, contexts: Contexts) -> list[StudentRow]:
    """Rows, each (ids [T], starts [T] bool), in the student's tokens.

    Raises:
        MismatchError: a row has a control token that the student's tokenizer has no counterpart for.
    """
    several = [list(stretches(ids, starts, pair)) for ids, starts in rows]
    cuts = iter(cut_texts([stretch.text for each in several for stretch in each], pair))
    return [_student_row([(s, next(cuts)) for s in each], pair, contexts) for each in several]


def _student_row(parts: list[tuple[Stretch, Cut]], pair: Pair, contexts: Contexts) -> StudentRow:
    ids: list[int] = []
    starts: list[int] = []
    source: list[np.ndarray] = []
    context: list[np.ndarray] = []
    counts = {"teacher_tokens": 0, "student_tokens": 0, "shared_starts": 0, "identical_spans": 0, "lost_tokens": 0}
    for stretch, cut in parts:
        if stretch.opens:
            starts.append(len(ids))
            if pair.student.bos is not None and not _is_bos(stretch, pair):
                ids.append(pair.student.bos)
                source.append(np.array([-1]))
                context.append(np.array([0]))
        control = _control_after(stretch, pair)
        spoken = np.full(len(cut.ids) + len(control), -1)
        numbers = np.zeros(len(spoken), np.int64)
        if cut.comes_back:
            spoken, numbers = _spoken_about(stretch, cut, len(spoken), contexts)
        ids += cut.ids + control
        source.append(spoken)
        context.append(numbers)
        _count(stretch, cut, counts)
    whole = np.array(ids, np.int64)
    opening = np.zeros(len(ids), bool)
    opening[[at for at in starts if at < len(ids)]] = True
    return StudentRow(
        ids=whole,
        starts=opening,
        source=np.concatenate([*source, np.zeros(0, np.int64)]).astype(np.int64),
        context=np.concatenate([*context, np.zeros(0, np.int64)]).astype(np.int64),
        counts=counts,
    )


def _is_bos(stretch: Stretch, pair: Pair) -> bool:
    return stretch.first == stretch.last and stretch.control is not None and stretch.control == pair.teacher.bos


def _control_after(stretch: Stretch, pair: Pair) -> list[int]:
    """The student's counterpart of the control token that ends a stretch; none for a BOS that it does not write."""
    if stretch.control is None:
        return []
    found = int(pair.control[stretch.control])
    if found >= 0:
        return [found]
    if stretch.control == pair.teacher.bos:
        return []
    raise no_counterpart(stretch.control, pair)


def no_counterpart(control: int, pair: Pair) -> MismatchError:
    """The refusal of rows with a control token of the teacher's that the student's tokenizer does not have."""
    string = next((s for s, token in pair.teacher.control.items() if token == control), "")
    return MismatchError(
        f"the rows have the control token {string!r} (id {control} of {pair.teacher.name}), and "
        f"{pair.student.name} has no control token of that name; add one to it (tokenizer.add_special_tokens)"
    )


def _spoken_about(stretch: Stretch, cut: Cut, count: int, contexts: Contexts) -> tuple[np.ndarray, np.ndarray]:
    """For the student's tokens of a stretch (and its control token): the teacher token and the context's number."""
    begins = cut.starts[:count]
    which = last_start_before(stretch.starts[:-1], begins) if stretch.last > stretch.first else np.zeros(count, int)
    at_end = begins >= stretch.starts[-1]
    which[at_end] = stretch.last - stretch.first  # the control token, if there is one
    where = stretch.starts[which]
    numbers = np.fromiter(map(contexts.number, _contexts(stretch, cut, which, where)), np.int64, count)
    return stretch.first + which, numbers


def _contexts(stretch: Stretch, cut: Cut, which: np.ndarray, where: np.ndarray) -> Iterator[Context]:
    """Of each of a stretch's tokens, spoken about by the teacher's token `which`, which begins at byte `where`."""
    text, starts = stretch.text, cut.starts.tolist()
    opening = _tail_starts(text, cut, where)
    at_start = (which == 0) & stretch.bare
    for i, (first, byte, opens) in enumerate(zip(opening.tolist(), where.tolist(), at_start.tolist(), strict=True)):
        begin = starts[first]
        cuts = tuple([start - begin for start in starts[first + 1 : i + 1]])
        yield Context(text[begin:byte], text[begin : starts[i]], cuts, opens)


def _tail_starts(text: bytes, cut: Cut, where: np.ndarray) -> np.ndarray:
    """For each byte: the student's token that starts the word of the byte before it (or one TAIL_BYTES bytes back).

    Of the byte before: a draw may go on with the word that the text ended there. Where that is white space, its whole
    run: how pre-tokenizers cut a run depends on what follows it.
    """
    if not cut.ids:
        return np.zeros(len(where), np.int64)
    solid = ~_WHITE[np.frombuffer(text, np.uint8)]
    run = np.where(solid, np.arange(len(text)), np.maximum.accumulate(np.where(solid, np.arange(len(text)), -1)) + 1)
    last = last_start_before(cut.starts[:-1], run[(where - 1).clip(0)]).clip(0)
    word = np.maximum.accumulate(np.where(cut.words, np.arange(len(cut.ids)), 0))[last]
    near = np.searchsorted(cut.starts[:-1], where - TAIL_BYTES)
    found: np.ndarray = np.maximum(word, np.minimum(near, last))
    return np.where(where > 0, found, 0)


def _count(stretch: Stretch, cut: Cut, counts: dict[str, int]) -> None:
    counts["teacher_tokens"] += stretch.last - stretch.first + (stretch.control is not None)
    counts["student_tokens"] += len(cut.ids) + (stretch.control is not None)
    if not cut.comes_back:
        counts["lost_tokens"] += max(1, len(cut.ids))  # no token at all is no less lost
        return
    counts["shared_starts"] += len(shared_starts(stretch.starts, cut.starts)[1]) - 1 + (stretch.control is not None)
    counts["identical_spans"] += len(identical_spans(stretch.starts, cut.starts)[1]) + (stretch.control is not None)
