"""Adding: draws of the same positions, from several caches, as the draws of one.

Shapes: P positions, M entries of a part, K entries of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .flat import FlatTargets, Importance, add_counts

Array = NDArray[Any]


def add_draws(parts: Sequence[FlatTargets]) -> FlatTargets:
    """Counts id by id, rounds added up (`add_counts`), and for draws from q ∝ p^t what weighs them.

    Plain weights of the sum are the parts' mean, weighed by their rounds: an id's worth (2^H p)^(1-t) is the parts'
    mean by counts. Parts of one teacher agree on p and H but for how they were rounded, so nothing is estimated here.
    """
    whole = add_counts([replace(part, importance=None) for part in parts])
    given = [part.importance for part in parts if part.importance is not None]
    return replace(whole, importance=_weighing(whole, parts, given)) if given else whole


def _weighing(whole: FlatTargets, parts: Sequence[FlatTargets], given: Sequence[Importance]) -> Importance:
    power, rounds = 1 - given[0].temperature, np.array([part.rounds for part in parts], np.float64)
    entropy = np.sum([n * each.entropy.astype(np.float64) for n, each in zip(rounds, given, strict=True)], 0)
    entropy /= rounds.sum()
    keys = whole.positions << 32 | whole.ids  # ascending, and every part's are among them
    slots = [np.searchsorted(keys, part.positions << 32 | part.ids) for part in parts]
    worths = [
        power * (each.log2_p.astype(np.float64) + each.entropy.astype(np.float64)[part.positions])
        for part, each in zip(parts, given, strict=True)
    ]
    largest = np.full(len(keys), -np.inf)  # 2^x of an extreme worth would overflow
    for slot, worth in zip(slots, worths, strict=True):
        np.maximum.at(largest, slot, worth)
    total = np.zeros(len(keys))
    for part, slot, worth in zip(parts, slots, worths, strict=True):
        np.add.at(total, slot, part.values * np.exp2(worth - largest[slot]))
    mean = np.log2(total / whole.values) + largest
    log2_p = np.minimum(mean / power - entropy[whole.positions], 0)
    return replace(given[0], log2_p=log2_p.astype(np.float32), entropy=entropy.astype(np.float32))
