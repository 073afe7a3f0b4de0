"""Whether loops run compiled (`pip install 'sparsekd[fast]'`), and memory that a thread uses again for each row.

    fast = kernels()          # the module codec_kernels, or None: numpy does the same, more slowly
    values = scratch("values")(1000, np.uint32)

Without numba, or with NUMBA_DISABLE_JIT=1, everything works and gives the same arrays, bytes and errors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# About a million tokens with a dozen ids: numpy has read them in half the time that numba takes to start.
_SOON_ENOUGH = 2**24
_MOST_KEPT = 2**24  # bytes of one array: what a hostile row asked for is not kept
_local = threading.local()
_read = 0


def kernels(values: int = 0) -> Any:
    """The module `codec_kernels`, or None without numba, and until a process has read many values: a short command is
    not kept waiting for numba. `values`: how many are read now."""
    global _read
    _read += values
    return load() if _read >= _SOON_ENOUGH else None


def array_kernels() -> Any:
    """The module `array_kernels`, or None as `kernels`."""
    if kernels() is None:
        return None
    from . import array_kernels

    return array_kernels


def encode_kernels(values: int) -> Any:
    """The module `encode_kernels`, or None as `kernels`. `values`: how many are written now."""
    if kernels(values) is None:
        return None
    from . import encode_kernels

    return encode_kernels


@cache
def load() -> Any:
    """The module `codec_kernels`, imported now (half a second; the first time ever some 9 s, to compile), or None."""
    try:
        from numba import config

        if config.DISABLE_JIT:
            return None
        from . import codec_kernels
    except ImportError:
        return None
    return codec_kernels


def scratch(name: str) -> Callable[[int, Any], Array]:
    """`np.empty`, but from memory of this thread that is used again by the next call for the same name.

    What earlier calls left is still in it; memory that was never used is 0.
    """

    def empty(size: int, dtype: Any) -> Array:
        kept: Array | None = getattr(_local, name, None)
        if kept is None or len(kept) < size:
            kept = np.zeros(size + size // 4, dtype)
            if kept.nbytes <= _MOST_KEPT:
                setattr(_local, name, kept)
        return kept[:size]

    return empty


def fresh(name: str) -> Callable[[int, Any], Array]:
    """`np.empty`, where `scratch` could be given: for arrays that the caller keeps."""
    return np.empty


def stamps(size: int, count: int) -> tuple[Array, int]:
    """A set of numbers below `size` that needs no clearing: [size] uint32 and a `mark` above all that is in it.

    The caller writes mark, mark + 1, ... below mark + count, for `count` sets one after another.
    """
    seen, mark = scratch("stamps")(size, np.uint32), getattr(_local, "mark", 1)
    if mark + count >= 2**32:
        _local.stamps[:], mark = 0, 1
    _local.mark = mark + count
    return seen, mark
