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

from .open_sets import OpenSets, open_sets
from .retokenise import Context, Contexts, Pair, cut_ids
from .vocab_bytes import NEVER, with_prefix

Array = NDArray[Any]

REJECTED, SHORT, OPEN, DECIDED = range(4)
_FATES = 4
_WORD = re.compile(rb"(?:\A[^']?|[A-Za-z0-9] )[A-Za-z]*[A-Za-z]\Z", re.DOTALL)
_LETTER = np.array([chr(byte).isascii() and chr(byte).isalpha() for byte in range(256)])
_SIGN = np.array([not (chr(byte).isascii() and (chr(byte).isalnum() or chr(byte).isspace())) for byte in range(256)])
_APOSTROPHE = ord("'")
_NEXT = -2  # of a context without a draw: its text is used up, what follows decides
# Answers kept at most; beyond, they are forgotten and found again. About 200 MB.
MOST_ANSWERS = 2**23


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


@dataclass(slots=True)
class Answers:
    """What every (context, draw) that was asked for gave, so that it is encoded once. Never changes a result.

    Attributes:
        joined: context V + draw -> the student's token 4 + fate.
        junctions: token V + token of the student's -> whether they stay apart when they meet inside a word.
        plain: [V] what each draw is if nothing stands before it, as in `joined`.
        known: per context what `Known` says, one array each.
        first_byte: [V] of each of the teacher's tokens, -1 for control tokens.
        sets: what open draws stand for.
    """

    pair: Pair
    contexts: Contexts = field(default_factory=Contexts)
    joined: Memo = field(default_factory=lambda: Memo())
    junctions: Memo = field(default_factory=lambda: Memo())
    plain: Array = field(init=False)
    known: Array = field(default_factory=lambda: np.zeros((0, 5), np.int64))
    first_byte: Array = field(init=False)
    sets: OpenSets = field(init=False)

    def __post_init__(self) -> None:
        pieces = [*self.pair.teacher.of_id, *[None] * (len(self.pair.control) - len(self.pair.teacher.of_id))]
        self.first_byte = np.array([-1 if not piece else piece[0] for piece in pieces])
        self.sets = open_sets(self.pair)
        self.plain = _solve(self, np.arange(len(pieces)))


class Known(NamedTuple):
    """What is known of a context without any draw.

    Attributes:
        alone: what it gives when nothing can join its text: -1 rejected, _NEXT (the draw decides), or a token.
        last_byte: of a tail that ends a word if the draw does not go on with it; else -1.
        wants: the byte that a draw must begin with, -1 for any.
        before: the student's token that the tail ends with, -1 where there is none.
        letters: 1 where the tail is a word of ASCII letters.
    """

    alone: int
    last_byte: int
    wants: int
    before: int
    letters: int


def answer(answers: Answers, contexts: Array, draws: Array) -> tuple[Array, Array]:
    """(fates [M], tokens [M]) of draws in their contexts (numbers of `answers.contexts`).

    Most draws need not be read after their context. Where no token of the student's has the bytes on both sides of the
    draw's beginning inside it, text and draw are cut apart. Where both are letters of one word, BPE cuts there iff the
    two tokens that meet stay apart by themselves.
    """
    _learn_contexts(answers)
    alone, last_byte, wants, before, letters = answers.known[contexts].T
    begins = answers.first_byte[draws]
    control = begins < 0
    hopeless = ~control & (wants >= 0) & (wants != begins)
    apart = control | ((last_byte >= 0) & ~answers.pair.crossed[last_byte, begins] & (wants < 0))
    # A run of signs may be one word (".'s" is not cut as "'s" is), and so may "'d" of "'def" or "foo's".
    apostrophe = (begins == _APOSTROPHE) | (last_byte == _APOSTROPHE)
    apart &= control | ~(_SIGN[begins] & _SIGN[last_byte] | apostrophe)
    inside = answers.pair.merges & ~apart & (letters > 0) & _LETTER[begins] & (wants < 0) & (alone != -1)
    fates, tokens = np.zeros(len(draws), np.int64), np.zeros(len(draws), np.int64)
    width = len(answers.pair.control)
    whole = ~hopeless & (inside | (apart & ~control & (alone == _NEXT)))
    tokens[whole], fates[whole] = np.divmod(answers.plain[draws[whole]], _FATES)
    meets = np.flatnonzero(inside & ~hopeless)
    stays = _stay_apart(answers, before[meets], tokens[meets]) & (fates[meets] != REJECTED)
    fates[meets[~stays]] = REJECTED
    done = ~hopeless & (alone >= 0) & apart
    done[meets[stays]] = alone[meets[stays]] >= 0
    fates[done], tokens[done] = DECIDED, alone[done]
    ends = control & (alone == _NEXT)
    theirs = answers.pair.control[draws[ends]]
    fates[ends], tokens[ends] = np.where(theirs >= 0, DECIDED, REJECTED), theirs.clip(0)
    ask = ~hopeless & ~apart & ~inside
    ask[meets[~stays]] = alone[meets[~stays]] >= 0  # the token became another one
    joined = find(answers.joined, contexts[ask] * width + draws[ask], lambda keys: _solve(answers, keys))
    tokens[ask], fates[ask] = np.divmod(joined, _FATES)
    return fates, tokens


def _stay_apart(answers: Answers, before: Array, after: Array) -> Array:
    """[M] bool: whether the student cuts the bytes of two of its tokens back into the two."""
    pair, of_id = answers.pair, answers.pair.student.of_id
    size = len(of_id)

    def solve(keys: Array) -> Array:
        both = [divmod(key, size) for key in keys.tolist()]
        found = cut_ids([(of_id[a] or b"") + (of_id[b] or b"") for a, b in both], pair)
        return np.array([ids == [a, b] for ids, (a, b) in zip(found, both, strict=True)], np.int64)

    return find(answers.junctions, before * size + after, solve) > 0


def _learn_contexts(answers: Answers) -> None:
    """What new contexts give by themselves."""
    new = answers.contexts.all[len(answers.known) :]
    if new:
        texts = list({context.tail for context in new})
        cut = dict(zip(texts, cut_ids(texts, answers.pair), strict=True))
        found = [_know(context, cut[context.tail], answers.pair) for context in new]
        answers.known = np.concatenate([answers.known, np.array(found, np.int64)])


def _know(context: Context, ids: list[int] | None, pair: Pair) -> Known:
    tail, head, cuts, opens = context
    begin, alone = len(head), -1
    if ids is not None and begin <= len(tail) and tail[:begin] == head:
        token = _token_at(ids, cuts, pair)
        alone = -1 if token is None else _NEXT if begin == len(tail) else token
    ends_word = bool(tail) and not tail[-1:].isspace()
    return Known(
        alone=alone,
        last_byte=tail[-1] if ends_word else -1,
        wants=head[len(tail)] if begin > len(tail) and not opens else -1,
        before=ids[-1] if ids else -1,
        letters=int(ids is not None and _ends_in_letters(tail, pair)),
    )


def _ends_in_letters(tail: bytes, pair: Pair) -> bool:
    """Whether the word that the tail ends with is one of ASCII letters, perhaps behind one other byte."""
    found = _WORD.search(tail)
    return found is not None and (found.start() == 0 or not pair.crossed[tail[found.start()], 32])


def _solve(answers: Answers, keys: Array) -> Array:
    """[M] token * 4 + fate of draws that nobody asked for before."""
    pair, values = answers.pair, np.full(len(keys), REJECTED, np.int64)
    of_id, asked = pair.teacher.of_id, []
    for n, (number, draw) in enumerate(
        zip(*(part.tolist() for part in np.divmod(keys, len(pair.control))), strict=True)
    ):
        context, piece = answers.contexts.all[number], of_id[draw]
        text = read_after(context, piece or b"", pair)
        if text is None:
            continue
        size = min(len(text), len(context.head))
        if text[:size] != context.head[:size]:
            continue
        if len(text) <= len(context.head):
            values[n] = SHORT
        else:
            asked.append((n, context, text))
    texts = list(dict.fromkeys(text for *_, text in asked))
    cut = dict(zip(texts, cut_ids(texts, pair), strict=True))
    for n, context, text in asked:
        ids = cut[text]
        token = None if ids is None else _token_at(ids, context.cuts, pair)
        if token is not None and token >= 0:
            ends = len(context.head) + int(pair.lengths[token]) == len(text)
            values[n] = token * _FATES + (OPEN if ends else DECIDED)
    tokens, fates = np.divmod(values, _FATES)
    closed = (fates == OPEN) & ~answers.sets.is_open(keys % len(pair.control), tokens)
    return values + (DECIDED - OPEN) * closed


def read_after(context: Context, piece: bytes, pair: Pair) -> bytes | None:
    """What the student reads when a draw follows a context; None where no text begins with such a draw."""
    if not context.opens:
        return context.tail + piece
    if pair.teacher.prefix == NEVER:
        return with_prefix(piece, pair.student)
    return with_prefix(piece[1:], pair.student) if piece.startswith(b" ") else None


def _token_at(ids: list[int], cuts: tuple[int, ...], pair: Pair) -> int | None:
    """The token after the last cut, -1 where the text ends there; None unless the tokens before end at the cuts."""
    if len(ids) < len(cuts):
        return None
    reached, lengths = 0, pair.lengths
    for token, cut in zip(ids, cuts, strict=False):
        reached += int(lengths[token])
        if reached != cut:
            return None
    return ids[len(cuts)] if len(ids) > len(cuts) else -1
