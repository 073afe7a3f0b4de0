"""Draws of a teacher rewritten into the student's vocabulary, one by one, so that an unbiased sample stays unbiased.

For any map f of draws, E[f(p̂)] = f(p); here f is what a draw is in the student's vocabulary (see `fates`). A draw that
is OPEN stands for several of the student's tokens, and only the text that came says which. How that is told is one of
`UNRESOLVED`:

point, drop     The draw becomes the token as it stands, or nothing. A realised one first goes on into the next
                position's draws, weights multiplied. Both are biased: towards short tokens, or away from open draws.
kernel          As point, but the draw is spread over the tokens of its set, by what such sets became elsewhere in the
                rows (see `open_kernel`). Biased as far as that depends on more than the set.
set             With w the draws, p(w) their probability, C_w the student's tokens that an open w may become (see
                `open_sets`; a decided one is its token) and r(v | w) the student's after w, the cross-entropy splits:

                    - Σ_v p(v) log q(v)  =  - Σ_w p(w) log q(C_w)  -  Σ_w p(w) Σ_v r(v | w) log q(v) / q(C_w)

                Draws estimate the first sum at every position. The second is an expectation over the w that come, and
                the text is a sample of them: at each position the realised w* alone, if it is open, stands for it with
                weight 1 (not the draw's share, which it has on average already). r(v | w*) are the draws at the next
                position, brought to a sum of 1; those of them that are open are sets in turn, and so on, up to `chain`
                times; then the text's own token. So no other labels are needed, and the sum is unbiased where the text
                is the teacher's. Where it is not, q(C_w) is still the teacher's, and the inside of C_w the teacher's
                after w*: weighing the insides by the text's frequencies changes no minimiser that both can reach.

Shapes: M draws, V teacher vocabulary, P student positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .fates import OPEN, REJECTED, SHORT, Answers, answer, read_after
from .open_kernel import spread
from .open_sets import OpenSets
from .retokenise import Context

Array = NDArray[Any]

# Two sums of weights that differ by less are equal: they were added up in another order.
_ROUNDING = 1e-12
MASSES = ("accepted", "rejected", "short", "open", "dropped", "label")


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
class Places:
    """P student positions.

    Attributes:
        source: [P] the teacher token whose draws speak about each, or -1.
        context: [P] what its draws are read after, a number of `Answers.contexts`.
        labels: [P] the student's token that is there, or -1 where the text does not tell its end (a row's last one).
        chance: [P] a number in [0, 1) of each, uniform over positions: what `kernel` samples large sets by; else None.
    """

    source: Array
    context: Array
    labels: Array
    chance: Array | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """Weighted student tokens of P positions, [M] entries by position and token, and what became of their mass.

    Attributes:
        position, token, weight: [M]; ids from the vocabulary's size on are sets and given sets, see `prefix_sets`. The
            weights of a position, those of given sets subtracted, sum to what its draws summed to.
        masses: of each of `MASSES` [P] float64; accepted + rejected + short + dropped = the sum of the draws; open is
            the part of them that `unresolved` treats, label that at positions which learn the text's own token instead.
    """

    position: Array
    token: Array
    weight: Array
    masses: dict[str, Array]


def rewrite(draws: Draws, places: Places, answers: Answers, *, chain: int, unresolved: str = "point") -> Rewritten:
    """The draws for some places in the student's vocabulary; `chain` and `unresolved` as at the head of this file.

    "kernel" takes `answers.kernel` and `places.chance`.
    """
    return UNRESOLVED[unresolved](draws, places, answers, chain)


def became(draws: Draws, places: Places, answers: Answers, chain: int) -> tuple[Array, Array]:
    """(sets [any], the token that each became [any]): of realised draws that are open, followed up to `chain` times."""
    layer, sets, tokens = _first_layer(places), [], []
    for _ in range(chain + 1):
        realised, labels = draws.realised[layer.where], places.labels[layer.position]
        fates, ends_in = answer(answers, layer.context, realised)
        found = answers.sets.of(realised, ends_in)
        inside = (fates == OPEN) & answers.sets.holds(found, labels) & (labels >= 0)
        sets.append(found[inside])
        tokens.append(labels[inside])
        goes_on = inside & (draws.following[layer.where] >= 0)
        if not goes_on.any():
            break
        layer = _next_layer(draws, layer, goes_on, answers)
    return np.concatenate(sets), np.concatenate(tokens)


class Layer(NamedTuple):
    """Positions that draws are read for: each item's position, teacher token and context."""

    position: Array
    where: Array
    context: Array


class Seen(NamedTuple):
    """The draws of a layer's items, [M]: of which item, id, weight, and what they are in the student's vocabulary."""

    item: Array
    ids: Array
    weight: Array
    fates: Array
    tokens: Array


def _first_layer(places: Places) -> Layer:
    spoken = np.flatnonzero(places.source >= 0)
    return Layer(spoken, places.source[spoken], places.context[spoken])


def _look(draws: Draws, layer: Layer, answers: Answers) -> Seen:
    item, entries = _entries(draws, layer.where)
    ids = draws.ids[entries]
    return Seen(item, ids, draws.weights[entries], *answer(answers, layer.context[item], ids))


def _next_layer(draws: Draws, layer: Layer, items: Array, answers: Answers) -> Layer:
    """What follows some of a layer's items (indices or a mask), after what came there."""
    where, context = layer.where[items], layer.context[items]
    width = len(answers.pair.control)
    keys, inverse = np.unique(context * width + draws.realised[where], return_inverse=True)
    numbers = []
    for number, draw in zip(*(part.tolist() for part in np.divmod(keys, width)), strict=True):
        before = answers.contexts.all[number]
        tail = read_after(before, answers.pieces[draw], answers.pair)
        numbers.append(answers.contexts.number(Context(tail or b"", before.head, before.cuts)))
    return Layer(layer.position[items], draws.following[where], np.array(numbers, np.int64)[inverse])


def _entries(draws: Draws, where: Array) -> tuple[Array, Array]:
    """(item [M], entry [M]): the draws of each of some teacher tokens; -1 has none."""
    sizes = np.where(where >= 0, draws.sizes[where], 0)
    ends = np.cumsum(sizes)
    item = np.repeat(np.arange(len(where)), sizes)
    return item, np.repeat(draws.first[where] - (ends - sizes), sizes) + np.arange(int(sizes.sum()))


def _no_masses(count: int) -> dict[str, Array]:
    return {name: np.zeros(count) for name in MASSES}


def _add_lost(masses: dict[str, Array], position: Array, fates: Array, weight: Array) -> None:
    for name, fate in (("rejected", REJECTED), ("short", SHORT)):
        masses[name] += np.bincount(position[fates == fate], weight[fates == fate], len(masses[name]))


class Entries(NamedTuple):
    """Weighted ids [M] of positions: the student's tokens, then sets and given sets (see `prefix_sets`)."""

    position: Array
    token: Array
    weight: Array


# --- tokens for a draw: point, drop, kernel ---------------------------------------------------------------


def _as_tokens(
    treat: Callable[[Entries, Places, Answers], Entries], draws: Draws, places: Places, answers: Answers, chain: int
) -> Rewritten:
    """A realised draw that is open goes on, up to `chain` times; what is open at the end is treated by `treat`."""
    count = len(places.source)
    layer, masses = _first_layer(places), _no_masses(count)
    factor = np.ones(len(layer.where))
    kept: list[Entries] = []
    for left in range(chain, -1, -1):
        seen = _look(draws, layer, answers)
        position, weight = layer.position[seen.item], seen.weight * factor[seen.item]
        goes_on = (seen.fates == OPEN) & (seen.ids == draws.realised[layer.where[seen.item]]) & (left > 0)
        goes_on &= _has_draws(draws, draws.following[layer.where[seen.item]])
        _add_lost(masses, position, seen.fates, weight)
        stays = (seen.fates >= OPEN) & ~goes_on
        ids = _ids(answers.sets, seen.ids, seen.fates, seen.tokens)
        kept.append(Entries(position[stays], ids[stays], weight[stays]))
        if not goes_on.any():
            break
        layer = _next_layer(draws, layer, seen.item[goes_on], answers)
        factor = weight[goes_on] / _sums(draws, layer.where)
    found = _together(kept)
    masses["open"] = np.bincount(found.position, found.weight * _is_set(found, answers), count)
    return _joined(found, treat(found, places, answers), masses)


def _ids(sets: OpenSets, draws: Array, fates: Array, tokens: Array) -> Array:
    """[M] each draw's id: its token, or the set of an open one."""
    found: Array = np.where(fates == OPEN, sets.of(draws, tokens) + sets.table.vocab_size, tokens)
    return found


def _has_draws(draws: Draws, tokens: Array) -> Array:
    return (tokens >= 0) & (draws.sizes[tokens] > 0)


def _sums(draws: Draws, where: Array) -> Array:
    item, entries = _entries(draws, where)
    return np.bincount(item, draws.weights[entries], len(where))


def _joined(entries: Entries, treated: Entries, masses: dict[str, Array]) -> Rewritten:
    """Entries of one position and token added up, and every position brought back to the sum it had."""
    count = len(masses["open"])
    treated = _added_up(treated)
    masses["accepted"] = np.bincount(treated.position, treated.weight, count)
    masses["dropped"] = (np.bincount(entries.position, entries.weight, count) - masses["accepted"]).clip(0)
    masses["dropped"][masses["dropped"] < _ROUNDING] = 0
    lost = masses["rejected"] + masses["short"] + masses["dropped"]
    scale = (masses["accepted"] + lost) / np.where(masses["accepted"] > 0, masses["accepted"], 1)
    weight = treated.weight * scale[treated.position]
    return Rewritten(position=treated.position, token=treated.token, weight=weight, masses=masses)


def _added_up(entries: Entries) -> Entries:
    keys = entries.position * (int(entries.token.max(initial=0)) + 1) + entries.token
    order = _stable_order(keys)
    sorted_ = Entries(*(part[order] for part in entries))
    keys = keys[order]
    firsts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    sums = np.add.reduceat(sorted_.weight, firsts) if len(firsts) else sorted_.weight
    return Entries(sorted_.position[firsts], sorted_.token[firsts], sums)


def _stable_order(keys: Array) -> Array:
    """`np.argsort(keys, kind="stable")` of integers from 0 on, by sorting numbers: several times as fast."""
    bits = len(keys).bit_length()
    if int(keys.max(initial=0)).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    return np.sort((keys << bits) + np.arange(len(keys))) & ((1 << bits) - 1)


def _is_set(entries: Entries, answers: Answers) -> Array:
    found: Array = entries.token >= answers.sets.table.vocab_size
    return found


def _as_points(entries: Entries, places: Places, answers: Answers) -> Entries:
    """The token as it stands, which has two sets: biased towards short tokens."""
    return entries._replace(token=entries.token % answers.sets.table.vocab_size)


def _dropped(entries: Entries, places: Places, answers: Answers) -> Entries:
    """Left out; what is left of the position takes its weight."""
    return Entries(*(part[~_is_set(entries, answers)] for part in entries))


def _spread(entries: Entries, places: Places, answers: Answers) -> Entries:
    """Each set as tokens of it."""
    if answers.kernel is None or places.chance is None:
        raise ValueError("unresolved='kernel' needs answers with a kernel (see open_kernel) and places with chance")
    position, sets, weight = (part[_is_set(entries, answers)] for part in entries)
    which, tokens, weight = spread(
        answers.kernel, sets - answers.sets.table.vocab_size, weight, places.chance[position]
    )
    return _together([_dropped(entries, places, answers), Entries(position[which], tokens, weight)])


# --- sets, and what lies inside the realised one ----------------------------------------------------------


def _as_sets(draws: Draws, places: Places, answers: Answers, chain: int) -> Rewritten:
    """The sum at the head of this file, one level after another; inside a set only what lies inside it counts."""
    sets, masses = answers.sets, _no_masses(len(places.source))
    layer = _first_layer(places)
    layer = Layer(*(part[_has_draws(draws, layer.where)] for part in layer))
    known = np.full(len(layer.where), -1)  # the set that each item's token is known to lie in; -1 any
    kept: list[Entries] = []
    for level in range(chain + 1):
        seen, labels, count = _look(draws, layer, answers), places.labels[layer.position], len(layer.where)
        fine, token = _inside(sets, known[seen.item], seen.ids, seen.fates, seen.tokens)
        realised = draws.realised[layer.where]
        fates, tokens = answer(answers, layer.context, realised)
        agrees = _inside(sets, known, realised, fates, tokens)[0] & _comes_to(sets, labels, realised, fates, tokens)
        accepted = np.bincount(seen.item[fine], seen.weight[fine], count)
        spoken = (accepted > 0) & (agrees | (labels < 0))
        total: Array = np.ones(count)
        if not level:
            total = np.bincount(seen.item, seen.weight, count)
            _count_masses(masses, layer.position, seen, realised, spoken)
        told = fine & spoken[seen.item]
        weight = seen.weight * (total / np.where(spoken, accepted, 1))[seen.item]
        kept.append(Entries(layer.position[seen.item][told], token[told], weight[told]))
        silent = ~spoken & (labels >= 0)
        kept.append(Entries(layer.position[silent], labels[silent], total[silent]))
        kept.append(_given(layer.position, known, sets))
        goes_on = spoken & agrees & (fates == OPEN)
        layer, known = _next_layer(draws, layer, goes_on, answers), sets.of(realised, tokens)[goes_on]
        if not len(known):
            break
    kept.append(Entries(layer.position, places.labels[layer.position], np.ones(len(known))))
    kept.append(_given(layer.position, known, sets))
    return _netted(kept, masses, sets)


def _comes_to(sets: OpenSets, labels: Array, draws: Array, fates: Array, tokens: Array) -> Array:
    """[M] bool: whether the text's own token is one of those that a draw leaves."""
    inside: Array = (labels == tokens) | ((fates == OPEN) & sets.holds(sets.of(draws, tokens), labels))
    return (labels >= 0) & inside


def _inside(sets: OpenSets, known: Array, draws: Array, fates: Array, tokens: Array) -> tuple[Array, Array]:
    """(whether each draw is told and lies in the known set, its id: a token or a set)."""
    open_, ids = fates == OPEN, _ids(sets, draws, fates, tokens)
    found = np.where(open_, ids - sets.table.vocab_size, 0)
    inside = np.where(open_, sets.holds_set(known, found), sets.holds(known, tokens))
    return (fates >= OPEN) & inside, ids


def _count_masses(masses: dict[str, Array], position: Array, seen: Seen, realised: Array, spoken: Array) -> None:
    where, count = position[seen.item], len(masses["open"])
    _add_lost(masses, where, seen.fates, seen.weight)
    fine = seen.fates >= OPEN
    untold = fine & (seen.fates == OPEN) & (seen.ids != realised[seen.item])
    masses["accepted"] = np.bincount(where[fine], seen.weight[fine], count)
    masses["open"] = np.bincount(where[untold], seen.weight[untold], count)
    masses["label"] = np.bincount(where, seen.weight * ~spoken[seen.item], count)


def _given(position: Array, known: Array, sets: OpenSets) -> Entries:
    """-1 on sets that are known: what is learnt beside it is conditional on them."""
    some = known >= 0
    return Entries(position[some], known[some] + sets.table.vocab_size, np.full(int(some.sum()), -1.0))


def _together(kept: list[Entries]) -> Entries:
    return Entries(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))


def _netted(kept: list[Entries], masses: dict[str, Array], sets: OpenSets) -> Rewritten:
    """Entries of one token added up; a set with less than nothing left is a condition."""
    found = _added_up(_together(kept))
    found = Entries(*(part[np.abs(found.weight) > _ROUNDING] for part in found))
    token = found.token + len(sets.table) * (found.weight < 0)
    order = _stable_order(found.position * sets.table.width() + token)
    return Rewritten(
        position=found.position[order], token=token[order], weight=np.abs(found.weight)[order], masses=masses
    )


UNRESOLVED: dict[str, Callable[[Draws, Places, Answers, int], Rewritten]] = {
    "set": _as_sets,
    "kernel": partial(_as_tokens, _spread),
    "point": partial(_as_tokens, _as_points),
    "drop": partial(_as_tokens, _dropped),
}
