"""Little-endian words of 2 to 8 bytes <-> unsigned integers: what every codec is made of."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError

Array = NDArray[Any]


def pack(words: Array, width: int) -> bytes:
    """Unsigned integers [M] as `width` little-endian bytes each."""
    as_bytes = np.ascontiguousarray(words, "<u8").view(np.uint8).reshape(-1, 8)
    return as_bytes[:, :width].tobytes()


def unpack(data: bytes, width: int) -> Array:
    """[M] unsigned integers of `width` little-endian bytes, read as overlapping wider words and masked."""
    if len(data) % width:
        raise FormatError(f"{len(data)} bytes are no whole number of {width}-byte words; the file is damaged")
    wide = np.dtype("<u4" if width <= 4 else "<u8")
    padded = bytes(data) + bytes(wide.itemsize - width)
    words: Array = np.ndarray((len(data) // width,), wide, padded, strides=(width,))
    return words & wide.type(2 ** (8 * width) - 1)


def refuse(position: int, what: str) -> NoReturn:
    """FormatError that names a supervised position of a row."""
    raise FormatError(f"supervised position {position} has {what}; the file is damaged")
