"""Pool: an ensemble in one cache, the weighted mean of several teachers' targets on the same rows.

Teachers of one tokenizer are captured on the same rows; of several, `repack` writes the rows for each and `transcode`
brings the caches into the student's vocabulary first. A student then learns from Σ α_c p_c / Σ α_c, for the price of
one cache.

Shapes: P supervised positions, M entries of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord
from sparsekd.codec import CODECS, CURVES, codec_spec
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.flat import FlatTargets
from sparsekd.making import copy_tokenizer
from sparsekd.manifest import weights_codec
from sparsekd.same_text import laid_over
from sparsekd.set_table import SetTable, joined, read_table, write_table
from sparsekd.vocab import load_tokenizer
from sparsekd.vocab_bytes import VocabBytes, vocabulary_bytes

# (a row, the row of the same text that its targets go to, its number, the caches of both) -> the second with them
Lay = Callable[[RowRecord, RowRecord, int, tuple[CacheReader, CacheReader]], RowRecord]


def pool(
    *,
    caches: list[str],
    out: str | Path,
    weights: list[float] | None = None,
    codec: str | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """The weighted mean of caches of the same rows. A position that some of them have no targets for is the mean of
    the others. Run it again to resume.

    Rows are the first cache's. Where another's is the same text cut differently, its targets count at the tokens that
    both have (see `same_text`).

    Args:
        caches: two or more folders, of the same rows in the same tokenizer (transcoded ones, say).
        weights: of each cache, positive; default: all alike. Only their ratios matter.
        out: the folder that takes the new cache.
        codec: split_weight_unbiased or prob40, as for `transcode`.
        progress: called with (shards done, shards) after each.

    Returns:
        The manifest.

    Raises:
        RecipeError: fewer than two caches, or weights that do not fit them.
        MismatchError: caches of other rows or another tokenizer, or without ids.
    """
    shares = _shares(caches, weights)
    with ExitStack() as stack:
        readers = [stack.enter_context(CacheReader(path)) for path in caches]
        for reader in readers:
            _check_same(readers[0], reader)
        sets = _sets(readers)
        spec = _spec(readers, shares, sets, codec)
        writer = CacheWriter(out, spec)
        copy_tokenizer(Path(readers[0].path), Path(out))
        if sets.table is not None:
            write_table(sets.table, out)
        todo, lay = writer.missing(), _laying(readers[0])
        for done, shard in enumerate(todo, 1):
            writer.write(shard, [_pooled(readers, shares, sets, row, lay) for row in spec.shard_range(shard)])
            if progress:
                progress(done, len(todo))
        return writer.finalize()


def _shares(caches: list[str], weights: list[float] | None) -> list[float]:
    given = [1.0] * len(caches) if weights is None else weights
    if len(caches) < 2 or len(given) != len(caches) or not all(0 < each < float("inf") for each in given):
        raise RecipeError(
            f"pool takes two caches or more and a positive weight for each, got {len(caches)} caches and "
            f"weights={weights}; for example caches=[A, B] weights=[0.7, 0.3]"
        )
    return [each / sum(given) for each in given]


def _check_same(first: CacheReader, other: CacheReader) -> None:
    if CODECS[other.spec.codec["name"]].holds == CURVES:
        raise MismatchError(
            f"{other.path} holds sorted curves, which have no ids to pool; capture with another sampler"
        )
    here, there = _meaning(first.spec), _meaning(other.spec)
    for name, was in here.items():
        if was != there[name]:
            raise MismatchError(
                f"{first.path} has {name}={was}, {other.path} has {name}={there[name]}; pool takes caches of the same "
                "rows in one tokenizer: transcode both with the same tokenizer and seq_len"
            )


def _meaning(spec: CacheSpec) -> dict[str, Any]:
    """What ids and rows mean; rows themselves are compared as they are read."""
    hash_ = str(spec.tokenizer.get("hash"))[:12]
    sets = (spec.data.get("transcoded") or {}).get("sets")
    size = sets["vocab_size"] if sets else spec.tokenizer.get("vocab_size")
    return {"tokenizer": hash_, "vocabulary": size, "rows": spec.rows, "seq_len": spec.seq_len}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sets:
    """The sets of several caches in one table: reader r's start at `first[r]` of it (see `set_table`).

    Teachers of different tokenizers leave different sets open.
    """

    table: SetTable | None
    counts: list[int]
    first: list[int]

    def ids(self, reader: int, ids: np.ndarray) -> np.ndarray:
        """The ids of a cache as they are in the joint table."""
        if self.table is None or not self.counts[reader]:
            return ids
        condition, index = np.divmod(ids.astype(np.int64) - self.table.vocab_size, self.counts[reader])
        number = self.table.vocab_size + condition * len(self.table) + self.first[reader] + index
        return np.where(ids < self.table.vocab_size, ids, number).astype(np.uint32)


def _sets(readers: Sequence[CacheReader]) -> _Sets:
    described = [(reader.spec.data.get("transcoded") or {}).get("sets") for reader in readers]
    found: dict[str, SetTable] = {}
    for reader, each in zip(readers, described, strict=True):
        if each and each["sha256"] not in found:
            found[each["sha256"]] = read_table(reader.path, each)
    starts = dict(zip(found, np.cumsum([0, *map(len, found.values())]).tolist(), strict=False))
    return _Sets(
        table=joined(list(found.values())) if found else None,
        counts=[each["count"] if each else 0 for each in described],
        first=[starts[each["sha256"]] if each else 0 for each in described],
    )


def _spec(readers: Sequence[CacheReader], shares: list[float], sets: _Sets, codec: str | None) -> CacheSpec:
    """The first cache's identity, with the samplers and teachers of all."""
    specs = [reader.spec for reader in readers]
    width = max(spec.logit_width for spec in specs) if sets.table is None else sets.table.width()
    made = next((t for spec in specs if (t := spec.data.get("transcoded"))), None)
    if made is not None and sets.table is not None:
        made = made | {"sets": sets.table.described()}
    unbiased = all(spec.sampler.get("unbiased") for spec in specs)
    weights = "+".join(str(spec.teacher.get("weights"))[:12] for spec in specs)
    parts = [{"weight": s, "teacher": x.teacher, "sampler": x.sampler} for s, x in zip(shares, specs, strict=True)]
    return replace(
        specs[0],
        logit_width=width,
        codec=codec_spec(weights_codec(codec, width, specs), logit_width=width, rounds=None),
        sampler={"name": "pool", "unbiased": unbiased, "parts": parts},
        teacher=specs[0].teacher | {"id": "+".join(str(x.teacher.get("id")) for x in specs), "weights": weights},
        data=specs[0].data | ({"transcoded": made} if made else {}),
    )


def _pooled(readers: Sequence[CacheReader], shares: list[float], sets: _Sets, row: int, lay: Lay) -> RowRecord:
    """The row of the first cache that says something of it; caches that say nothing may hold any text."""
    records = [reader.record(row) for reader in readers]
    speaks = [bool(record.supervised[1:].any()) for record in records]
    first = speaks.index(True) if any(speaks) else 0
    moved = []
    for r, record in enumerate(records):
        if not speaks[r]:
            record = replace(record, supervised=np.zeros_like(record.supervised))
        elif not np.array_equal(record.input_ids, records[first].input_ids):
            record = lay(record, records[first], row, (readers[r], readers[first]))
        moved.append(replace(record, targets=replace(record.targets, ids=sets.ids(r, record.targets.ids))))
    return replace(records[first], targets=mean_targets(moved, shares), supervised=_union(moved))


def _laying(reader: CacheReader) -> Lay:
    """What lays a row's targets over another row of the same text, cut differently; the tokenizer is opened once."""

    @cache
    def vocabulary() -> VocabBytes:
        return vocabulary_bytes(load_tokenizer(Path(reader.path) / "tokenizer"))

    def lay(record: RowRecord, onto: RowRecord, row: int, of: tuple[CacheReader, CacheReader]) -> RowRecord:
        found = laid_over(record, onto, vocabulary())
        if found is None:
            raise MismatchError(
                f"row {row} of {of[1].path} and of {of[0].path} are different text; capture both teachers from rows "
                "that hold the same text, row by row: `sparsekd repack` writes them"
            )
        return found

    return lay


def _union(records: Sequence[RowRecord]) -> np.ndarray:
    found: np.ndarray = np.logical_or.reduce([record.supervised for record in records])
    return found


def mean_targets(records: Sequence[RowRecord], shares: Sequence[float]) -> FlatTargets:
    """Σ α_c t_c / Σ α_c at each position, over the caches c that have targets there."""
    union = _union(records)[1:]
    number, count = np.cumsum(union) - 1, int(union.sum())
    total = np.zeros(count)
    keys, values = [], []
    for record, share in zip(records, shares, strict=True):
        where = number[record.supervised[1:]]
        total[where] += share
        keys.append(where[record.targets.positions].astype(np.int64) << 32 | record.targets.ids.astype(np.int64))
        values.append(share * record.targets.weights.astype(np.float64))
    unique, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    sums = np.bincount(inverse, np.concatenate(values), len(unique))
    positions = unique >> 32
    return FlatTargets(
        ids=(unique & 0xFFFFFFFF).astype(np.uint32),
        values=(sums / total[positions]).astype(np.float32),
        sizes=np.bincount(positions, minlength=count).astype(np.int64),
    )
