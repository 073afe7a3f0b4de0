"""Texts cut as a SentencePiece tokenizer cuts them, but by compiled loops: for the many short ones that draws make.

    cutter = cutter_of(model, vocabulary, words, joints)  # None behind patterns: no loop does regular expressions
    if loops := ready(cutter, len(texts)):
        ids, sizes = cut_all(loops, cutter, blob_of(texts))  # what `pair.cut_ids` asks the tokenizer for

The tokenizer itself is what counts: its ids, for every text that its tokens give back, and none for the others.

Shapes: N nodes of the trie of the tokens, V tokens, M draws, C contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .align import token_starts
from .joints import Joints
from .vocab_bytes import PATTERNS, SPACES, VocabBytes, decoded

Array = NDArray[Any]

# What a text weighs against numba's start (see `compiled`): the tokenizer takes 7 µs for it.
_WEIGHT = 2**8
_UNKNOWN_PENALTY = 10.0  # below the least score: tokenizers' and SentencePiece's


# A `retokenise.Context`: tail, head, cuts, opens.
Before = tuple[bytes, bytes, tuple[int, ...], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutter:
    """A model as arrays.

    Attributes:
        trie: of the tokens' texts: [256] the node of each first byte, -1 for none; [N + 1] where each node's children
            begin; [N] the bytes that lead to them, ascending for each node; [N] the children; [N] the token that a node
            ends, or -1.
        lossy: [V] bool, tokens that do not stand for the text that they are found by.
        fallback: [256] the token of each byte for what no token has, or -1.
        spaces: whether a space begins a word.
        scores, unknown: [V] of a Unigram, and that of a character which no token has.
        merges: of a BPE, as in `joints.Joints`: keys, ranks, into; empty for a Unigram.
    """

    trie: tuple[Array, ...]
    lossy: Array
    fallback: Array
    spaces: bool
    scores: Array
    unknown: float
    merges: tuple[Array, ...]

    def arrays(self) -> tuple[Any, ...]:
        """As the loops take it."""
        return tuple(getattr(self, name) for name in self.__slots__)


def cutter_of(model: Mapping[str, Any], vocabulary: VocabBytes, words: str, joints: Joints | None) -> Cutter | None:
    """The model of a `plain_description` as a cutter, None if something before it does more than make spaces and cut at
    them, or if it has no merges and no token for the unknown; `words` as by `words_of`, `joints` of a BPE."""
    if words == PATTERNS or (joints is None) != (model["type"] == "Unigram"):
        return None
    if (joints is None and model.get("unk_id") is None) or (joints is not None and not len(joints.keys)):
        return None
    pieces = _pieces(model)
    texts = [piece.replace("▁", " ").encode() for piece in pieces]
    if any(" " in piece for piece in pieces) or len(set(texts)) < len(texts):
        return None
    ids = {piece: token for token, piece in enumerate(pieces)} if model.get("byte_fallback") else {}
    of_id = [*vocabulary.of_id, *[None] * (len(texts) - len(vocabulary.of_id))]
    scores = np.array([score for _, score in model["vocab"]] if joints is None else [], np.float64)
    none = np.zeros(0, np.int64)
    return Cutter(
        trie=_trie(texts),
        lossy=np.array([mine != theirs for mine, theirs in zip(texts, of_id, strict=False)]),
        fallback=np.array([ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)]),
        spaces=words == SPACES,
        scores=scores,
        unknown=float(scores.min() if len(scores) else 0) - _UNKNOWN_PENALTY,
        merges=(none, none, none) if joints is None else (joints.keys, joints.ranks, joints.into),
    )


def _pieces(model: Mapping[str, Any]) -> list[str]:
    """[V] the tokens' texts by id; ids that no token has are empty."""
    if model["type"] == "Unigram":
        return [piece for piece, _ in model["vocab"]]
    found = [""] * (max(model["vocab"].values(), default=-1) + 1)
    for piece, token in model["vocab"].items():
        found[token] = piece
    return found


def _trie(texts: Sequence[bytes]) -> tuple[Array, ...]:
    """See `Cutter.trie`; nodes are numbered level by level, those of a level by what they spell."""
    order = np.array(sorted(range(len(texts)), key=texts.__getitem__), np.int64)  # texts of a node stand together
    data = np.frombuffer(b"".join([texts[token] for token in order.tolist()]), np.uint8)
    sizes = np.array([len(text) for text in texts], np.int64)[order]
    first, at, node = token_starts(sizes), np.arange(len(order)), np.full(len(order), -1)
    parents, labels, count = [node[:0]], [data[:0]], 0
    for depth in range(int(sizes.max(initial=0))):
        at = at[sizes[at] > depth]
        parent, byte = node[at], data[first[at] + depth]
        new = np.r_[True, (parent[1:] != parent[:-1]) | (byte[1:] != byte[:-1])]
        node[at] = count + np.cumsum(new) - 1
        count += int(new.sum())
        parents.append(parent[new])
        labels.append(byte[new])
    above, label = np.concatenate(parents), np.concatenate(labels)
    root, token_of, below = np.full(256, -1), np.full(count, -1), np.flatnonzero(above >= 0)
    root[label[above < 0]] = np.flatnonzero(above < 0)
    token_of[node[sizes > 0]] = order[sizes > 0]
    return root, token_starts(np.bincount(above[below], minlength=count)), label[below], below, token_of


def ready(cutter: Cutter | None, texts: int) -> Any:
    """The compiled loops for so many texts, or None: no cutter, no numba, or too few texts to wait for it."""
    if cutter is None or compiled.kernels(texts * _WEIGHT) is None:
        return None
    from . import cut_kernels

    return cut_kernels


class Blob(NamedTuple):
    """Texts one after another, where each begins (and the end), and whether each is UTF-8: no loop takes the others."""

    data: Array
    first: Array
    is_text: Array

    def longest(self) -> int:
        """Bytes."""
        return int(np.diff(self.first).max(initial=0))


def blob_of(texts: Sequence[bytes]) -> Blob:
    """Texts as the loops take them."""
    is_text = np.array([text.isascii() or decoded(text) is not None for text in texts], bool)
    first = token_starts(np.array([len(text) for text in texts], np.int64))
    return Blob(np.frombuffer(b"".join(texts), np.uint8), first, is_text)


def cut_all(loops: Any, cutter: Cutter, texts: Blob) -> tuple[list[int], list[int]]:
    """(ids, sizes) of texts, all UTF-8: one after another, and how many each has, -1 where it does not come back."""
    ids, sizes = np.empty(len(texts.data), np.int64), np.empty(len(texts.is_text), np.int64)
    count = loops.cut(cutter.arrays(), texts[:2], texts.longest(), ids, sizes)
    return ids[:count].tolist(), sizes.tolist()


def after(loops: Any, cutter: Cutter, contexts: Sequence[Before], pieces: Blob, which: Array, draws: Array) -> Array:
    """[M] int64 token 4 + fate (see `fates`; every token that ends where the draw does is OPEN) of draws, each in one
    of the contexts; -1 for bytes that are no text, and at the beginning of documents: ask the tokenizer."""
    all_tails, all_heads, all_cuts, opens = zip(*contexts, strict=True)
    tails, heads = blob_of(all_tails), blob_of(all_heads)
    cuts = np.array([cut for each in all_cuts for cut in each], np.int64)
    begins = token_starts(np.array([len(each) for each in all_cuts], np.int64))
    values = np.full(len(which), -1)
    fine = np.flatnonzero((tails.is_text & ~np.array(opens))[which] & pieces.is_text[draws])
    found, longest = np.empty(len(fine), np.int64), tails.longest() + pieces.longest()
    given = (*tails[:2], *heads[:2], cuts, begins)
    loops.draws(cutter.arrays(), given, pieces[:2], longest, which[fine], draws[fine], found)
    values[fine] = found
    return values
