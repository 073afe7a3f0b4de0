"""What a draw of the teacher is in the student's vocabulary, given the student's text so far.

A drawn token's bytes are read after the student's word so far, and the student's token that begins at the byte in
question is taken (see `retokenise.Context`). A draw has one of four fates:

    DECIDED     the student's token ends inside the text, or no longer one may come of it
    OPEN        more text might make it a longer token: one of a set (see `open_sets`)
    SHORT       the draw ends before the byte in question
    REJECTED    it contradicts the student's tokens so far: other bytes, or other cuts; or it has no counterpart

Shapes: M draws, V teacher vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .align import token_starts
from .cutting import Blob, after, blob_of, ready
from .joints import APART, JOINED, meet
from .open_kernel import Kernel
from .open_sets import OpenSets, open_sets
from .pair import Pair, cut_flat
from .retokenise import Context, Contexts
from .vocab_bytes import NEVER, PATTERNS, SPACES, with_prefix

Array = NDArray[Any]

REJECTED, SHORT, OPEN, DECIDED = range(4)
_FATES = 4
_WORD = re.compile(rb"(?:\A[^']?|[A-Za-z0-9] )[A-Za-z]*[A-Za-z]\Z", re.DOTALL)
_LETTER = np.array([chr(byte).isascii() and chr(byte).isalpha() for byte in range(256)])
_SIGN = np.array([not (chr(byte).isascii() and (chr(byte).isalnum() or chr(byte).isspace())) for byte in range(256)])
_APOSTROPHE = ord("'")
# What a context gives by itself, beside tokens: REJECTED (or SHORT); what the draw gives after `Known.rest`.
_NONE, _NEXT = -1, -2
# How text and draw meet: only reading both tells; cut apart; inside a word, as two tokens decide, and not apart there.
_READ, _APART, _INSIDE, _JOINED = range(4)
# The text's edge: its last byte, 256 + that where letters end it, or one of these. A control token begins with 256.
_UNKNOWN, _EMPTY, _EDGES = 512, 513, 514
_CONTROL, _BEGINS = 256, 257
# Answers and contexts kept at most; beyond, they are forgotten and found again. About 200 MB each.
MOST_ANSWERS, MOST_CONTEXTS = 2**23, 2**19


@dataclass(slots=True)
class Memo:
    """Integers by integer keys, as arrays: keys [M] ascending, values [M]."""

    keys: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    values: Array = field(default_factory=lambda: np.zeros(0, np.int64))


def find(memo: Memo, keys: Array, solve: Callable[[Array], Array]) -> Array:
    """[M] the value of each key; `solve` gives those of new keys, which are remembered."""
    unique, inverse = np.unique(keys, return_inverse=True)
    values, known = np.zeros(len(unique), np.int64), np.zeros(len(unique), bool)
    at = np.searchsorted(memo.keys, unique)
    inside = at < len(memo.keys)
    known[inside] = memo.keys[at[inside]] == unique[inside]
    values[known] = memo.values[at[known]]
    if not known.all():
        values[~known] = solve(unique[~known])
        if len(memo.keys) > MOST_ANSWERS:
            memo.keys, memo.values = memo.keys[:0], memo.values[:0]
        joined = np.concatenate([memo.keys, unique[~known]])
        order = np.argsort(joined, kind="stable")
        memo.keys, memo.values = joined[order], np.concatenate([memo.values, values[~known]])[order]
    return values[inverse]


class Known(NamedTuple):
    """What is known of contexts without any draw: an array each.

    Attributes:
        alone: what it gives where text and draw are cut apart: a token of the text's, _NEXT or _NONE.
        rest: the context without its text: what the draw itself must be like. 0 where that is nothing.
        wants: the byte that a draw must begin with, -1 for any.
        joint: 1 where the draw must be cut apart from the text.
        before: the student's token that the text ends with, -1 where there is none.
        edge: how the text ends.
    """

    alone: Any
    rest: Any
    wants: Any
    joint: Any
    before: Any
    edge: Any


@dataclass(slots=True)
class Answers:
    """What every (context, draw) that was asked for gave, so that it is encoded once. Never changes a result.

    Attributes:
        joined: context V + draw -> the student's token 4 + fate.
        plain: [V] what each draw is if nothing stands before it, as in `joined`.
        known: what is known of the contexts so far.
        pieces, blob: [V] the bytes of the teacher's tokens, none for control tokens.
        begins: [V] the first of them, _CONTROL for control tokens.
        meets: [_EDGES, _BEGINS] how a text that ends so and a draw that begins so meet.
        sets: what open draws stand for.
        kernel: what they became in some rows, where that is asked for.
    """

    pair: Pair
    contexts: Contexts = field(default_factory=Contexts)
    joined: Memo = field(default_factory=Memo)
    plain: Array = field(init=False)
    known: Known = field(default_factory=lambda: _nothing_known())
    pieces: list[bytes] = field(init=False)
    blob: Blob = field(init=False)
    begins: Array = field(init=False)
    meets: Array = field(init=False)
    sets: OpenSets = field(init=False)
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        of_id = self.pair.teacher.of_id
        self.pieces = [piece or b"" for piece in of_id] + [b""] * (len(self.pair.control) - len(of_id))
        self.blob = blob_of(self.pieces)
        self.begins = np.array([piece[0] if piece else _CONTROL for piece in self.pieces])
        self.meets = _meets(self.pair)
        self.sets = open_sets(self.pair)
        theirs = self.pair.control
        control = np.where(theirs >= 0, theirs * _FATES + DECIDED, REJECTED)
        self.plain = np.where(self.begins == _CONTROL, control, _solve(self, np.arange(len(self.pieces))))


def _nothing_known() -> Known:
    return Known(*np.zeros((len(Known._fields), 0), np.int64))


def forget(answers: Answers) -> None:
    """If there are too many contexts, begin anew: their numbers say nothing any more. Between chunks of rows."""
    if len(answers.contexts.all) > MOST_CONTEXTS:
        answers.contexts, answers.known, answers.joined = Contexts(), _nothing_known(), Memo()


def _meets(pair: Pair) -> Array:
    """See `Answers.meets`.

    Where no token of the student's has the bytes on both sides of the draw's beginning inside it, text and draw are cut
    apart. But a run of signs may be one word (".'s" is not cut as "'s" is), and so may "'d" of "'def" or "foo's".
    """
    found = np.full((_EDGES, _BEGINS), _READ)
    apostrophe = np.arange(256) == _APOSTROPHE
    one_word = _SIGN[:, None] & _SIGN | apostrophe[:, None] | apostrophe
    bytes_ = found[:512].reshape(2, 256, _BEGINS)[:, :, :256]
    if pair.joints is not None:
        bytes_[1, _LETTER[:, None] & _LETTER] = _INSIDE
    bytes_[:, ~pair.crossed & ~one_word] = _APART
    if pair.joints is not None and pair.words != PATTERNS:
        bytes_[1, :128, :128] = _INSIDE
    if pair.words == SPACES:
        bytes_[1, :128, ord(" ")] = _APART
    found[_EMPTY], found[:, _CONTROL] = _APART, _APART
    return found


def answer(answers: Answers, contexts: Array, draws: Array) -> tuple[Array, Array]:
    """(fates [M], tokens [M]) of draws in their contexts (numbers of `answers.contexts`).

    Most draws need not be read after their context. Where text and draw are cut apart (see `_meets`), or BPE keeps the
    two tokens apart that meet inside a word, either the text has the token in question or the draw, read by itself.
    """
    _learn_contexts(answers)
    known, begins, width = answers.known, answers.begins[draws], len(answers.pair.control)
    wants = known.wants[contexts]
    possible = (wants < 0) | (wants == begins)
    meets = np.where(possible, answers.meets.reshape(-1)[known.edge[contexts] * _BEGINS + begins], -1)
    _tell_inside(answers, contexts, draws, meets)
    alone, found = known.alone[contexts], np.full(len(draws), REJECTED)
    apart = meets == _APART
    mine, theirs = apart & (alone >= 0), apart & (alone == _NEXT) & (wants < 0)
    found[mine] = alone[mine] * _FATES + DECIDED
    found[theirs] = answers.plain[draws[theirs]]
    longer = (wants >= 0) & (apart | (meets == _JOINED))
    numbers = np.where(longer, known.rest[contexts], contexts)
    ask = longer | (meets == _READ)
    told = find(answers.joined, numbers[ask] * width + draws[ask], lambda keys: _solve(answers, keys))
    cut = longer & ~(apart & (alone == _NEXT))
    found[ask] = np.where(cut[ask] & (told != SHORT), REJECTED, told)
    tokens, fates = np.divmod(found, _FATES)
    return fates, tokens


def _tell_inside(answers: Answers, contexts: Array, draws: Array, meets: Array) -> None:
    """Put what they are into `meets` where it is _INSIDE."""
    inside = np.flatnonzero(meets == _INSIDE)
    if answers.pair.joints is None or not len(inside):
        return
    numbers, size = contexts[inside], len(answers.pair.lengths)
    tokens, fates = np.divmod(answers.plain[draws[inside]], _FATES)
    keys, inverse = np.unique(answers.known.before[numbers] * size + tokens, return_inverse=True)
    stay = meet(answers.pair.joints, *np.divmod(keys, size))[inverse]
    joined = np.where(answers.known.joint[numbers] > 0, _JOINED, _READ)
    told = np.where(stay == APART, _APART, np.where(stay == JOINED, joined, _READ))
    meets[inside] = np.where(fates == REJECTED, _READ, told)


def _learn_contexts(answers: Answers) -> None:
    """What new contexts give by themselves."""
    while new := answers.contexts.all[len(answers.known.alone) :]:
        texts = {text: n for n, text in enumerate(dict.fromkeys(context.tail for context in new))}
        read = _read(list(texts), answers.pair)
        found = np.array([_know(context, read, texts[context.tail], answers) for context in new])
        answers.known = Known(*(np.append(old, each) for old, each in zip(answers.known, found.T, strict=True)))


def _know(context: Context, read: _Read, which: int, answers: Answers) -> tuple[int, ...]:
    """`Known` of one context."""
    tail, head, cuts, opens = context
    size, first, last = len(tail), read.first[which], read.first[which + 1]
    is_text, longer = last > first or not tail, len(head) > size and not opens
    alone, rest, wants = _NONE, 0, -1
    if longer:
        wants = head[size]
        rest = answers.contexts.number(Context(b"", head[size:], tuple([cut - size for cut in cuts if cut > size])))
        alone = _NEXT if is_text and tuple(read.ends[first:last]) == cuts[: last - first] else _NONE
    elif is_text and tail.startswith(head):
        alone, _ = _token_at(read, which, cuts)
    before = read.ids[last - 1] if last > first else -1
    return alone, rest, wants, size in cuts or not tail, before, _edge(context, is_text, wants, answers.pair)


def _edge(context: Context, is_text: bool, wants: int, pair: Pair) -> int:
    """How a context's text ends; white space may be cut otherwise before some draws, and half a character is none."""
    tail, head, _, opens = context
    if not tail:
        return _UNKNOWN if opens else _EMPTY
    if wants >= 0 and (not is_text or 0x80 <= wants < 0xC0 or not head.startswith(tail)):
        return _UNKNOWN
    if is_text and pair.words != PATTERNS:
        return 256 + tail[-1]
    if tail[-1:].isspace():
        return _UNKNOWN
    return tail[-1] + 256 * (is_text and _ends_in_letters(tail, pair))


def _ends_in_letters(tail: bytes, pair: Pair) -> bool:
    """Whether the word that the tail ends with is one of ASCII letters, perhaps behind one other byte."""
    found = _WORD.search(tail)
    return found is not None and (found.start() == 0 or not pair.crossed[tail[found.start()], 32])


def _solve(answers: Answers, keys: Array) -> Array:
    """[M] token * 4 + fate of draws that nobody asked for before."""
    numbers, draws = np.divmod(keys, len(answers.pair.control))
    values, cutter = np.full(len(keys), -1), answers.pair.cutter
    loops = ready(cutter, len(keys))
    if cutter is not None and loops is not None and len(keys):
        used, which = np.unique(numbers, return_inverse=True)
        contexts = [answers.contexts.all[number] for number in used.tolist()]
        values = after(loops, cutter, contexts, answers.blob, which, draws)
    left = np.flatnonzero(values < 0)
    values[left] = _ask(answers, numbers[left], draws[left])
    tokens, fates = np.divmod(values, _FATES)
    closed = (fates == OPEN) & ~answers.sets.is_open(draws, tokens)
    return values + (DECIDED - OPEN) * closed


def _ask(answers: Answers, numbers: Array, draws: Array) -> Array:
    """[M] token * 4 + fate of draws in contexts, all ends of words OPEN: by the tokenizer."""
    values, asked = np.full(len(draws), REJECTED, np.int64), []
    texts: dict[bytes, int] = {}
    for n, (number, draw) in enumerate(zip(numbers.tolist(), draws.tolist(), strict=True)):
        context = answers.contexts.all[number]
        text = read_after(context, answers.pieces[draw], answers.pair)
        if text is None:
            continue
        if len(text) > len(context.head):
            if text.startswith(context.head):
                asked.append((n, context.cuts, texts.setdefault(text, len(texts))))
        elif context.head.startswith(text):
            values[n] = SHORT
    read = _read(list(texts), answers.pair)
    for n, cuts, which in asked:
        token, is_last = _token_at(read, which, cuts)
        if token >= 0:
            values[n] = token * _FATES + (OPEN if is_last else DECIDED)
    return values


def read_after(context: Context, piece: bytes, pair: Pair) -> bytes | None:
    """What the student reads when a draw follows a context; None where no text begins with such a draw."""
    if not context.opens:
        return context.tail + piece
    if pair.teacher.prefix == NEVER:
        return with_prefix(piece, pair.student)
    return with_prefix(piece[1:], pair.student) if piece.startswith(b" ") else None


class _Read(NamedTuple):
    """Texts in the student's tokens, one after another: ids, the byte at which each ends in its text, and where each
    text's tokens begin (at last, how many there are); none of a text that does not come back."""

    ids: list[int]
    ends: list[int]
    first: list[int]


def _read(texts: list[bytes], pair: Pair) -> _Read:
    ids, sizes = cut_flat(texts, pair)
    first = token_starts(np.array(sizes, np.int64).clip(0))
    lengths = pair.lengths[np.array(ids, np.int64)]
    reached = token_starts(lengths)
    ends = reached[1:] - np.repeat(reached[first[:-1]], np.diff(first))
    return _Read(ids, ends.tolist(), first.tolist())


def _token_at(read: _Read, which: int, cuts: tuple[int, ...]) -> tuple[int, bool]:
    """(the token of a text after the last cut, whether the text ends with it): _NEXT for the token where the text ends
    with the last cut, _NONE unless the tokens before end at the cuts."""
    first, last = read.first[which], read.first[which + 1]
    at = first + len(cuts)
    if at > last or tuple(read.ends[first:at]) != cuts:
        return _NONE, False
    return (_NEXT, True) if at == last else (read.ids[at], at + 1 == last)
