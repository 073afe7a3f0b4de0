"""Two tokenizations of one text, laid over each other by bytes.

    starts_t, starts_s = token_starts(lengths_t), token_starts(lengths_s)      # the same text twice
    index_t, index_s = shared_starts(starts_t, starts_s)                       # tokens that start at one byte

Shapes: T and S tokens of the text; a tokenization's T + 1 (S + 1) boundaries are its tokens' starts and the text's end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def token_starts(lengths: Array) -> Array:
    """[T + 1] int64: the byte at which each token starts, and at last the number of bytes of the text.

    Equals `concatenate([[0], cumsum(lengths)])`, lengths [T] in bytes.
    """
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def shared_starts(starts_a: Array, starts_b: Array) -> tuple[Array, Array]:
    """(index_a, index_b), both [M]: the boundaries that both tokenizations have, in the text's order.

    Includes 0 and the text's end. Where tokens of no bytes share a start (control tokens), the last one counts: the
    token that follows them is the one that says something.

    Raises:
        ValueError: texts of different lengths: they are not one text.
    """
    _check_one_text(starts_a, starts_b)
    shared = np.intersect1d(starts_a, starts_b)
    return (
        np.searchsorted(starts_a, shared, side="right") - 1,
        np.searchsorted(starts_b, shared, side="right") - 1,
    )


def identical_spans(starts_a: Array, starts_b: Array) -> tuple[Array, Array]:
    """(index_a, index_b), both [M]: the tokens that cover the very same bytes in both tokenizations."""
    index_a, index_b = shared_starts(starts_a, starts_b)
    alike = (np.diff(index_a) == 1) & (np.diff(index_b) == 1)
    return index_a[:-1][alike], index_b[:-1][alike]


def last_start_before(starts: Array, bytes_: Array) -> Array:
    """[M] int64: for each byte b the token whose start is the last one ≤ b; b = 0 has one, the text's end has none."""
    found: Array = np.searchsorted(starts, bytes_, side="right") - 1
    return found


def _check_one_text(starts_a: Array, starts_b: Array) -> None:
    if starts_a[-1] != starts_b[-1]:
        raise ValueError(
            f"the tokenizations cover {starts_a[-1]} and {starts_b[-1]} bytes; they are not of one text: compare what "
            "`vocab_bytes.text_of` gives for both"
        )
