"""Whether two tokens of a BPE stay apart where they meet: told from its merges alone, for many pairs at once.

    joints = joints_of(model)                   # of a tokenizer.json
    meet(joints, before, after) == APART        # where cutting the bytes of both gives [before, after] back

A merge reaches over the joint iff the last symbol of the one side and the first of the other are there at the time of
its rank. Which symbols those are, the two tokens tell: each was made of two by a merge, of a later rank than those that
made the two. So walking back in time, undoing the later of the two tokens, meets every pair that was ever side by side.

Shapes: M pairs, V vocabulary, R merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# DOUBTFUL: a merge is ranked before what it is made of, so that ranks are no times. Ask the tokenizer.
JOINED, APART, DOUBTFUL = range(3)
_NEVER = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Joints:
    """The merges of a BPE.

    Attributes:
        keys, ranks, into: [R] left V + right of each merge, ascending, its rank, and what it makes.
        left, right: [V] what each token is made of, -1 for a symbol.
        made: [V] the rank of the merge that makes it, -1 for a symbol.
        odd: [V] bool, whether it is made, at some time, by a merge that is ranked before what it is made of.
    """

    keys: Array
    ranks: Array
    into: Array
    left: Array
    right: Array
    made: Array
    odd: Array


def joints_of(model: Mapping[str, Any]) -> Joints:
    """The merges of a BPE `model`, a part of a tokenizer.json."""
    vocabulary = model["vocab"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made_by = {(vocabulary[a], vocabulary[b]): (n, vocabulary[a + b]) for n, (a, b) in enumerate(merges)}
    size = max(vocabulary.values(), default=-1) + 1
    ways: dict[int, list[tuple[int, int]]] = {}
    for parts, (_, whole) in made_by.items():
        ways.setdefault(whole, []).append(parts)
    left, right, made = (np.full(size, -1) for _ in range(3))
    for piece, token in vocabulary.items():
        several = ways.get(token, [])
        split = several[0] if len(several) == 1 else _last_merge(piece, vocabulary, made_by)
        if split is not None:
            left[token], right[token], made[token] = *split, made_by[split][0]
    keys = np.array([a * size + b for a, b in made_by], np.int64)
    order = np.argsort(keys)
    ranks, into = np.array(list(made_by.values()), np.int64).reshape(-1, 2)[order].T.copy()
    odd = _odd(left, right, made)
    return Joints(keys=keys[order], ranks=ranks, into=into, left=left, right=right, made=made, odd=odd)


def _last_merge(
    piece: str, vocabulary: Mapping[str, int], made_by: Mapping[tuple[int, int], tuple[int, int]]
) -> tuple[int, int] | None:
    """The two tokens that a piece's last merge joins, by merging it; None where merges do not give it."""
    symbols = [vocabulary.get(char, -1) for char in piece]
    while len(symbols) > 1:
        rank, at = min((made_by.get(pair, (_NEVER,))[0], n) for n, pair in enumerate(pairwise(symbols)))
        if rank == _NEVER:
            return None
        if len(symbols) == 2:
            return symbols[0], symbols[1]
        symbols[at : at + 2] = [made_by[symbols[at], symbols[at + 1]][1]]
    return None


def _odd(left: Array, right: Array, made: Array) -> Array:
    odd = np.zeros(len(made), bool)
    for token in np.argsort(made, kind="stable").tolist():
        a, b = left[token], right[token]
        odd[token] = made[token] >= 0 and (max(made[a], made[b]) >= made[token] or odd[a] or odd[b])
    return odd


def meet(joints: Joints, before: Array, after: Array) -> Array:
    """[M] int8: APART, JOINED or DOUBTFUL of tokens (ids, each one that the tokenizer gives for its own bytes).

    Equals `cut(bytes of before + bytes of after) == [before, after]` of a word that the tokenizer does not cut itself.
    """
    found = np.where(joints.odd[before] | joints.odd[after], DOUBTFUL, APART).astype(np.int8)
    at = np.flatnonzero(found == APART)
    x, y = before[at], after[at]
    x_ends = y_ends = np.full(len(at), _NEVER)  # the rank at which each becomes a part of the next
    while len(at):
        rank = _ranks(joints, x, y)
        x_made, y_made = joints.made[x], joints.made[y]
        meets = (rank < x_ends) & (rank <= y_ends)  # of equal ranks the left one comes first
        doubt = meets & (rank <= np.maximum(x_made, y_made))
        found[at[meets]], found[at[doubt]] = JOINED, DOUBTFUL
        undo_x = x_made > y_made
        goes_on = ~meets & (np.maximum(x_made, y_made) >= 0)
        x_ends, y_ends = np.where(undo_x, x_made, x_ends)[goes_on], np.where(undo_x, y_ends, y_made)[goes_on]
        x, y = np.where(undo_x, joints.right[x], x)[goes_on], np.where(undo_x, y, joints.left[y])[goes_on]
        at = at[goes_on]
    return found


def _ranks(joints: Joints, left: Array, right: Array) -> Array:
    """[M] the rank of the merge of two tokens, _NEVER where there is none."""
    keys = left * len(joints.made) + right
    at = np.searchsorted(joints.keys, keys)
    at[at == len(joints.keys)] = 0
    known = joints.keys[at] == keys if len(joints.keys) else np.zeros(len(keys), bool)
    return np.where(known, joints.ranks[at] if len(joints.keys) else 0, _NEVER)
