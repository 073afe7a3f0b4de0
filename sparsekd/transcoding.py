"""Rows of a cache -> rows of a cache in another tokenizer's vocabulary: the same text, the same teacher's words.

A row stays a row, for the teacher saw its tokens and nothing before them: it gets as many of the student's tokens as
its text has, then padding that is not learnt (or it is cut at seq_len).

Shapes: L tokens of a teacher's row, S of a student's, P student tokens of several rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .fates import Answers, forget
from .flat import FlatTargets
from .folder import RowRecord
from .open_kernel import Counts, counted
from .order import permute
from .packed import size_without_padding
from .pair import Pair
from .redraw import Draws, Places, Rewritten, became, rewrite
from .retokenise import StudentRow, retokenise
from .shard import hash_ids

# Rows that are rewritten together, in teacher tokens: enough to encode in batches, little enough to keep in memory.
CHUNK_TOKENS = 2**15
_CHANCES = 2**40


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the rows of a transcoded cache depend on: S, and `redraw.rewrite`'s `unresolved` and `chain`."""

    seq_len: int
    unresolved: str
    chain: int


def renumbered(record: RowRecord, same: np.ndarray) -> RowRecord:
    """A row for a tokenizer that cuts every text alike and differs in its ids only: nothing is lost or estimated."""
    targets = replace(record.targets, ids=same[record.targets.ids.astype(np.int64)].astype(np.uint32))
    return replace(record, input_ids=same[record.input_ids.astype(np.int64)].astype(np.uint32), targets=targets)


def sizes_of(records: Sequence[RowRecord], pair: Pair) -> list[int]:
    """How many tokens of each row are no padding."""
    eos = pair.teacher.eos
    return [size_without_padding(record.input_ids, record.supervised, eos) for record in records]


def transcode_records(
    records: Sequence[RowRecord], answers: Answers, settings: Settings
) -> tuple[list[RowRecord], dict[str, float]]:
    """Rows in the student's tokens, with counts and masses summed over them.

    Args:
        records: rows of one cache.

    Returns:
        The rows, and `StudentRow.counts` with: positions (student tokens that follow another in their row), covered
        (those with targets), cut (tokens beyond seq_len), accepted, rejected, short, open, dropped, label (mean masses
        times spoken, the positions with draws), noise (Σ over covered positions of 1 / accepted share).
    """
    rows, draws, places = _laid_over(records, answers)
    found = rewrite(draws, places, answers, chain=settings.chain, unresolved=settings.unresolved)
    counts = {name: float(sum(row.counts[name] for row in rows)) for name in rows[0].counts}
    return _records(rows, found, answers.pair, settings, counts), counts


def count_sets(records: Sequence[RowRecord], answers: Answers, chain: int) -> Counts:
    """What the open draws that came became in some rows."""
    _, draws, places = _laid_over(records, answers)
    return counted(*became(draws, places, answers, chain), answers.sets.table)


def _laid_over(records: Sequence[RowRecord], answers: Answers) -> tuple[list[StudentRow], Draws, Places]:
    forget(answers)
    sizes = sizes_of(records, answers.pair)
    given = [
        (record.input_ids[:size].astype(np.int64), record.starts[:size])
        for record, size in zip(records, sizes, strict=True)
    ]
    rows = retokenise(given, answers.pair, answers.contexts)
    before = np.cumsum([0, *sizes])
    source = [np.where(row.source >= 0, row.source + first, -1) for row, first in zip(rows, before, strict=False)]
    places = Places(
        source=np.concatenate(source),
        context=np.concatenate([row.context for row in rows]),
        labels=np.concatenate([np.append(row.ids[:-1], [-1] * bool(len(row.ids))) for row in rows]),
        chance=np.concatenate([_chances(ids, len(row.ids)) for (ids, _), row in zip(given, rows, strict=True)])
        if answers.kernel
        else None,
    )
    return rows, draws_of(records, sizes), places


def _chances(ids: np.ndarray, count: int) -> np.ndarray:
    """[count] numbers in [0, 1), which hang on a row's tokens alone: not on its shard, nor on who makes it."""
    return permute(np.arange(count), _CHANCES, seed=hash_ids(ids)) / _CHANCES


def draws_of(records: Sequence[RowRecord], sizes: Sequence[int]) -> Draws:
    """The draws for every token of some rows, one row after another; a token nobody drew for has none."""
    per_token, realised, following = [], [], []
    before = 0
    for record, size in zip(records, sizes, strict=True):
        entries = np.zeros(len(record.supervised), np.int64)
        entries[1:][record.supervised[1:]] = record.targets.sizes
        per_token.append(entries[:size])
        realised.append(record.input_ids[:size].astype(np.int64))
        after = np.arange(before + 1, before + size + 1)
        after[:-1][record.starts[1:size]] = -1
        after[-1:] = -1
        following.append(after)
        before += size
    entries = np.concatenate(per_token)
    return Draws(
        ids=np.concatenate([record.targets.ids for record in records]).astype(np.int64),
        weights=np.concatenate([_weights(record.targets) for record in records]),
        first=np.cumsum(entries) - entries,
        sizes=entries,
        realised=np.concatenate(realised),
        following=np.concatenate(following),
    )


def _weights(targets: FlatTargets) -> np.ndarray:
    """[M] float64; counts over rounds exactly as far as float64 goes."""
    if targets.rounds is None or targets.importance is not None or targets.scale is not None:
        return targets.weights.astype(np.float64)
    return targets.values.astype(np.float64) / targets.rounds


def _records(
    rows: Sequence[StudentRow], found: Rewritten, pair: Pair, settings: Settings, counts: dict[str, float]
) -> list[RowRecord]:
    size = settings.seq_len
    positions = np.concatenate([np.arange(len(row.ids)) for row in rows])
    inside = (positions > 0) & (positions < size)
    entries_of = np.bincount(found.position, minlength=len(positions))
    covered = (entries_of > 0) & inside
    _sum_up(found, positions, inside, covered, counts)
    ends = np.cumsum([0, *(len(row.ids) for row in rows)])
    per_position = entries_of * covered
    kept = covered[found.position]
    ids, weights = found.token[kept].astype(np.uint32), found.weight[kept].astype(np.float32)
    entries = np.cumsum([0, *per_position.tolist()])
    made = []
    for row, first, last in zip(rows, ends, ends[1:], strict=False):
        part = slice(entries[first], entries[last])
        sizes = per_position[first:last][covered[first:last]]
        targets = FlatTargets(ids=ids[part], values=weights[part], sizes=sizes.astype(np.int64))
        made.append(_padded(row, targets, covered[first:last], pair, size))
    return made


def _padded(row: StudentRow, targets: FlatTargets, covered: np.ndarray, pair: Pair, size: int) -> RowRecord:
    input_ids, masks = np.full(size, pair.student.eos or 0, np.uint32), np.zeros((2, size), bool)
    used = min(size, len(row.ids))
    input_ids[:used] = row.ids[:used]
    masks[0, :used], masks[1, :used] = row.starts[:used], covered[:used]
    return RowRecord(input_ids=input_ids, targets=targets, starts=masks[0], supervised=masks[1])


def _sum_up(
    found: Rewritten, positions: np.ndarray, inside: np.ndarray, covered: np.ndarray, counts: dict[str, float]
) -> None:
    masses = found.masses
    total = masses["accepted"] + masses["rejected"] + masses["short"] + masses["dropped"]
    spoken = (total > 0) & inside
    share = {name: float((mass[spoken] / total[spoken]).sum()) for name, mass in masses.items()}
    drawn = covered & (masses["accepted"] > 0)
    noise = float((total[drawn] / masses["accepted"][drawn]).sum())
    counts |= {"positions": float((positions > 0).sum()), "covered": float(covered.sum()), **share}
    counts |= {"cut": float((positions > 0).sum() - inside.sum()), "spoken": float(spoken.sum()), "noise": noise}


def sum_counts(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Counts of several chunks as one."""
    return {name: float(sum(part[name] for part in parts)) for name in parts[0]} if parts else {}
