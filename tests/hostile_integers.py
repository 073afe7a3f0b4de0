"""Lists of integers that no encoder wrote: sound ones, changed."""

from __future__ import annotations

import numpy as np

from sparsekd.codec_ints import MOST_VALUE


def spoilt(values: np.ndarray, rng: np.random.Generator, times: int) -> np.ndarray:
    """The int64 list with `times` integers changed a little or much, dropped, or repeated elsewhere."""
    for _ in range(times):
        at, change = int(rng.integers(len(values))), int(rng.integers(6))
        if change < 3:
            values[at] = max(0, values[at] + [-1, 1, rng.choice([2, 40, MOST_VALUE - 9])][change])
        elif change == 3:
            values = np.delete(values, at) if len(values) > 1 else values
        else:
            values = np.insert(values, at, values[int(rng.integers(len(values)))])
    return np.minimum(values, MOST_VALUE - 1)
