"""Two rows of one text, cut differently by one tokenizer: the targets of one on the tokens of the other.

Rows come to one vocabulary on different ways. A row that kept its own teacher's tokens may begin inside a word, or was
cut where a prompt ended, where a row that was read again is not. Behind the first bytes both are cut alike.

Shapes: L tokens of a row, P supervised positions, M entries of all of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .flat import FlatTargets
from .folder import RowRecord
from .packed import size_without_padding
from .vocab_bytes import VocabBytes

# Stands for a control token: no token of text holds it, for it is in no UTF-8.
_CONTROL = b"\xff"


def laid_over(record: RowRecord, onto: RowRecord, vocabulary: VocabBytes) -> RowRecord | None:
    """`onto` with the targets of `record` at the tokens that both have, from byte to byte; None: not one text.

    A target is about the bytes before its token and its realised token alone, so it is the same in both rows there. Of
    texts that are cut off at different places, the longer must go on from the shorter.
    """
    (text, mine), (other, theirs) = (_spelled(each, vocabulary) for each in (record, onto))
    shorter = min(len(text), len(other))
    if text[:shorter] != other[:shorter]:
        return None
    _, at, there = np.intersect1d(mine, theirs, return_indices=True)
    told = record.supervised[at] & (at > 0) & (there > 0)
    at, there = at[told], there[told]
    supervised = np.zeros_like(onto.supervised)
    supervised[there] = True
    return replace(onto, supervised=supervised, targets=_of_tokens(record, at))


def _spelled(record: RowRecord, vocabulary: VocabBytes) -> tuple[bytes, np.ndarray]:
    """(bytes of the row, for each token its first byte and the one after its last in one number [L])."""
    size = size_without_padding(record.input_ids, record.supervised, vocabulary.eos)
    pieces = [vocabulary.of_id[token] for token in record.input_ids[:size].tolist()]
    spelled = [_CONTROL if piece is None else piece for piece in pieces]
    ends = np.cumsum([len(piece) for piece in spelled], dtype=np.int64)
    return b"".join(spelled), np.concatenate([np.zeros(min(1, size), np.int64), ends[:-1]]) << 32 | ends


def _of_tokens(record: RowRecord, tokens: np.ndarray) -> FlatTargets:
    """The targets of some supervised tokens, in order; weights as they count."""
    position = np.cumsum(record.supervised[1:]) - 1
    chosen = position[tokens - 1]
    kept = np.zeros(len(record.targets.sizes), bool)
    kept[chosen] = True
    entries = kept[record.targets.positions]
    return FlatTargets(
        ids=record.targets.ids[entries],
        values=record.targets.weights[entries].astype(np.float32),
        sizes=record.targets.sizes[kept],
    )
