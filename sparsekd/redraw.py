"""Draws of a teacher rewritten into the student's vocabulary, one by one, so that an unbiased sample stays unbiased.

For any map f of draws, E[f(p̂)] = f(p). Here f reads a drawn token's bytes after the student's word so far and takes the
student's token that begins at the byte in question (see `retokenise.Context`). A draw has one of four fates:

    DECIDED     the student's token ends inside the text, or no longer one begins with its bytes
    OPEN        more text might make it a longer token; a realised draw goes on into the next position's draws
    SHORT       the draw ends before the byte in question
    REJECTED    it contradicts the student's tokens so far: other bytes, or other cuts; or it has no counterpart

Shapes: M draws, V teacher vocabulary, P student positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .retokenise import Context, Contexts, Pair, cut_ids
from .vocab_bytes import NEVER, with_prefix

Array = NDArray[Any]

REJECTED, SHORT, OPEN, DECIDED = range(4)
_FATES = 4
_NEXT = -2  # of a context without a draw: its text is used up, what follows decides
# Answers kept at most; beyond, they are forgotten and found again. About 200 MB.
MOST_ANSWERS = 2**23


@dataclass(slots=True)
class Answers:
    """What every (context, draw) that was asked for gave, so that it is encoded once. Never changes a result.

    Attributes:
        keys: [M] int64, ascending: context V + draw; values: [M] int64: the student's token 4 + fate.
        alone: per context, what it gives when nothing more can join its text: -1 rejected, _NEXT, or a token.
    """

    pair: Pair
    contexts: Contexts = field(default_factory=Contexts)
    keys: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    values: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    alone: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    after_word: Array = field(default_factory=lambda: np.zeros(0, bool))
    begins_space: Array = field(init=False)
    is_control: Array = field(init=False)

    def __post_init__(self) -> None:
        pieces = [*self.pair.teacher.of_id, *[None] * (len(self.pair.control) - len(self.pair.teacher.of_id))]
        self.is_control = np.array([piece is None for piece in pieces])
        self.begins_space = np.array([piece is not None and piece.startswith(b" ") for piece in pieces])


def answer(answers: Answers, contexts: Array, draws: Array) -> tuple[Array, Array]:
    """(fates [M], tokens [M]) of draws in their contexts (numbers of `answers.contexts`)."""
    _learn_contexts(answers)
    fates, tokens = np.zeros(len(draws), np.int64), np.zeros(len(draws), np.int64)
    control = answers.is_control[draws]
    # After a word, a space begins another one: the text so far and the draw are read apart.
    apart = answers.begins_space[draws] & answers.after_word[contexts]
    alone = np.where(control | apart, answers.alone[contexts], -1)
    done = alone >= 0
    fates[done], tokens[done] = DECIDED, alone[done]
    ends = control & (alone == _NEXT)
    theirs = answers.pair.control[draws[ends]]
    fates[ends], tokens[ends] = np.where(theirs >= 0, DECIDED, REJECTED), theirs.clip(0)
    fresh = apart & ~control & (alone == _NEXT)
    ask = fresh | ~(control | apart)
    values = _look_up(answers, np.where(fresh, 0, contexts)[ask] * len(answers.pair.control) + draws[ask])
    tokens[ask], fates[ask] = np.divmod(values, _FATES)
    return fates, tokens


def _look_up(answers: Answers, keys: Array) -> Array:
    unique, inverse = np.unique(keys, return_inverse=True)
    at = np.searchsorted(answers.keys, unique)
    known = np.zeros(len(unique), bool)
    inside = at < len(answers.keys)
    known[inside] = answers.keys[at[inside]] == unique[inside]
    values = np.zeros(len(unique), np.int64)
    values[known] = answers.values[at[known]]
    if not known.all():
        values[~known] = _solve(answers, unique[~known])
        _remember(answers, unique[~known], values[~known])
    return values[inverse]


def _remember(answers: Answers, keys: Array, values: Array) -> None:
    if len(answers.keys) + len(keys) > MOST_ANSWERS:
        answers.keys, answers.values = answers.keys[:0], answers.values[:0]
    joined = np.concatenate([answers.keys, keys])
    order = np.argsort(joined, kind="stable")
    answers.keys, answers.values = joined[order], np.concatenate([answers.values, values])[order]


def _learn_contexts(answers: Answers) -> None:
    """What new contexts give by themselves."""
    new = answers.contexts.all[len(answers.alone) :]
    if not new:
        return
    cut = dict(zip(texts := list({c.tail for c in new}), cut_ids(texts, answers.pair), strict=True))
    found = [_alone(context, cut[context.tail], answers.pair) for context in new]
    words = [bool(c.tail) and not c.tail[-1:].isspace() and answers.pair.splits_at_space for c in new]
    # A space that a draw brings cannot be apart from text that it must first agree with.
    words = [word and len(c.head) <= len(c.tail) for word, c in zip(words, new, strict=True)]
    answers.alone = np.concatenate([answers.alone, np.array(found, np.int64)])
    answers.after_word = np.concatenate([answers.after_word, np.array(words, bool)])


def _alone(context: Context, ids: list[int] | None, pair: Pair) -> int:
    begin = len(context.head)
    if begin > len(context.tail) or ids is None or context.tail[:begin] != context.head:
        return -1
    token = _token_at(ids, context.cuts, pair)
    return -1 if token is None else _NEXT if begin == len(context.tail) else token


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
    texts = list(dict.fromkeys(text for _, _, text in asked))
    cut = dict(zip(texts, cut_ids(texts, pair), strict=True))
    for n, context, text in asked:
        ids = cut[text]
        token = None if ids is None else _token_at(ids, context.cuts, pair)
        if token is not None and token >= 0:
            ends = len(context.head) + int(pair.lengths[token]) == len(text)
            values[n] = token * _FATES + (OPEN if ends and pair.extends[token] else DECIDED)
    return values


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


# --- positions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """The draws of some teacher tokens: token t owns `sizes[t]` entries from `first[t]`.

    Attributes:
        ids, weights: [M]; weights float64.
        realised: [T] the token that really came; following: [T] the token after it if its draws go on, else -1.
    """

    ids: Array
    weights: Array
    first: Array
    sizes: Array
    realised: Array
    following: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """Weighted student tokens of P positions, [M] entries by position and token, and what became of their mass.

    Attributes:
        position, token, weight: [M]; the weights of a position sum to what its draws summed to.
        still_open: [M] bool entries, tokens that more text might have made longer ones.
        masses: {"accepted", "rejected", "short", "open", "dropped"}: [P] float64; accepted + rejected + short +
            dropped = the sum of the draws.
    """

    position: Array
    token: Array
    weight: Array
    still_open: Array
    masses: dict[str, Array]


def rewrite(
    draws: Draws, source: Array, context: Array, answers: Answers, *, chain: int, unresolved: str = "point"
) -> Rewritten:
    """The draws for `source` [P] in their contexts [P], in the student's vocabulary; source -1 has none.

    A realised draw that is OPEN goes on into the next teacher token's draws, up to `chain` times, weights multiplied.
    What is OPEN at the end is treated as `unresolved` says, a name of `UNRESOLVED`.
    """
    count = len(source)
    spoken = np.flatnonzero(source >= 0)
    at, where, how, factor = spoken, source[spoken], context[spoken], np.ones(len(spoken))
    kept: list[tuple[Array, ...]] = []
    masses = {name: np.zeros(count) for name in ("accepted", "rejected", "short", "open", "dropped")}
    for left in range(chain, -1, -1):
        item, entries = _entries(draws, where)
        ids, weight = draws.ids[entries], draws.weights[entries] * factor[item]
        fates, tokens = answer(answers, how[item], ids)
        position = at[item]
        goes_on = (fates == OPEN) & (ids == draws.realised[where[item]]) & (left > 0)
        goes_on &= _has_draws(draws, draws.following[where[item]])
        for name, fate in (("rejected", REJECTED), ("short", SHORT)):
            masses[name] += np.bincount(position[fates == fate], weight[fates == fate], count)
        stays = (fates >= OPEN) & ~goes_on
        kept.append((position[stays], tokens[stays], weight[stays], fates[stays] == OPEN))
        if not goes_on.any():
            break
        following = draws.following[where[item][goes_on]]
        how = _further(answers, how[item][goes_on], ids[goes_on])
        factor = weight[goes_on] / _sums(draws, following)
        at, where = position[goes_on], following
    return _joined(kept, masses, unresolved, count)


def _entries(draws: Draws, where: Array) -> tuple[Array, Array]:
    """(item [M], entry [M]): the draws of each of some teacher tokens."""
    sizes = draws.sizes[where]
    ends = np.cumsum(sizes)
    item = np.repeat(np.arange(len(where)), sizes)
    return item, np.repeat(draws.first[where] - (ends - sizes), sizes) + np.arange(int(sizes.sum()))


def _has_draws(draws: Draws, tokens: Array) -> Array:
    return (tokens >= 0) & (draws.sizes[tokens] > 0)


def _sums(draws: Draws, where: Array) -> Array:
    item, entries = _entries(draws, where)
    return np.bincount(item, draws.weights[entries], len(where))


def _further(answers: Answers, contexts: Array, draws: Array) -> Array:
    """The contexts in which the draws after a realised draw are read."""
    width = len(answers.pair.control)
    keys, inverse = np.unique(contexts * width + draws, return_inverse=True)
    numbers = []
    for number, draw in zip(*(part.tolist() for part in np.divmod(keys, width)), strict=True):
        before = answers.contexts.all[number]
        tail = read_after(before, answers.pair.teacher.of_id[draw] or b"", answers.pair)
        numbers.append(answers.contexts.number(Context(tail or b"", before.head, before.cuts)))
    return np.array(numbers, np.int64)[inverse]


def _joined(kept: list[tuple[Array, ...]], masses: dict[str, Array], unresolved: str, count: int) -> Rewritten:
    """Entries of one position and token added up, and every position brought back to the sum it had."""
    entries = Entries(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))
    masses["open"] = np.bincount(entries.position, entries.weight * entries.still_open, count)
    treated = _added_up(UNRESOLVED[unresolved](entries))
    masses["accepted"] = np.bincount(treated.position, treated.weight, count)
    masses["dropped"] = np.bincount(entries.position, entries.weight, count) - masses["accepted"]
    lost = masses["rejected"] + masses["short"] + masses["dropped"]
    scale = (masses["accepted"] + lost) / np.where(masses["accepted"] > 0, masses["accepted"], 1)
    return Rewritten(
        position=treated.position,
        token=treated.token,
        weight=treated.weight * scale[treated.position],
        still_open=treated.still_open,
        masses=masses,
    )


def _added_up(entries: Entries) -> Entries:
    order = np.lexsort((entries.still_open, entries.token, entries.position))
    sorted_ = Entries(*(part[order] for part in entries))
    begins = np.ones(len(order), bool)
    for part in (sorted_.position, sorted_.token, sorted_.still_open):
        begins[1:] &= part[1:] == part[:-1]
    begins[1:] = ~begins[1:]
    firsts = np.flatnonzero(begins)
    sums = np.add.reduceat(sorted_.weight, firsts) if len(firsts) else sorted_.weight
    return Entries(sorted_.position[firsts], sorted_.token[firsts], sums, sorted_.still_open[firsts])


# --- what more text might have made another token ---------------------------------------------------------


class Entries(NamedTuple):
    """Weighted student tokens [M] of positions, and whether more text might have made a longer token of each."""

    position: Array
    token: Array
    weight: Array
    still_open: Array


def _as_points(entries: Entries) -> Entries:
    """The token as it stands: biased towards short tokens."""
    return entries._replace(still_open=np.zeros(len(entries.token), bool))


def _dropped(entries: Entries) -> Entries:
    """Left out; what is left of the position takes its weight."""
    return Entries(*(part[~entries.still_open] for part in entries))


UNRESOLVED: dict[str, Callable[[Entries], Entries]] = {"point": _as_points, "drop": _dropped}
