"""Misalign on purpose: targets that a teacher made for the same tokens in another context (paper, D.3 and table 13).

Rows packed with another seed or length put other documents before each token. Whoever captures one packing and trains
on another gives the student targets for a context that it does not see. sparsekd refuses that; this program makes it
happen, token by token, so that its cost can be measured.

Shapes: S tokens of a row of the cache, L tokens of a new row. Offsets count tokens over all rows of a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord
from sparsekd.codec import FlatTargets, decode
from sparsekd.errors import MismatchError
from sparsekd.making import copy_tokenizer
from sparsekd.packed import PackedRow, RowsReader, describe_rows

_RECORDS = 256  # source rows kept decoded: the documents of one new row come from about as many as it has
_MISSING = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Where each document of a split lies: first offset and length in tokens, and what its tokens are (a digest)."""

    first: np.ndarray
    length: np.ndarray
    digests: list[bytes]


def misalign(
    *,
    cache: str | Path,
    rows: str | Path,
    out: str | Path,
    split: str = "train",
    i_know_this_is_misaligned: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Carry a cache's targets to other rows of the same documents; `train` takes them with allow_misaligned=true only.

    A token's target is the one that the teacher made for that token of that document in the cache's packing.
    Documents are matched by all their tokens, tokens by their offset in the document. A token without a target there
    (the first of a row of the cache, a document that the cache does not have) is unsupervised in `out`.

    Args:
        cache: captured from the first packing.
        rows: the second packing: another seed, another seq_len, the same tokenizer.
        out: the folder that takes the misaligned cache.
        split: of `rows`.
        i_know_this_is_misaligned: say so, or be refused.
        progress: called with (shards done, shards) after each.

    Returns:
        carried, dropped_first_of_row, dropped_no_document, dropped_unsupervised: supervised positions of `rows` by what
        became of them; and the manifest.

    Raises:
        MismatchError: without the flag; another tokenizer; rows that are the cache's own; no document in common.
    """
    source, target = CacheReader(cache), RowsReader(rows, split)
    _check(source, target, i_know_this_is_misaligned)
    with source:
        carrier = _Carrier(source, target)
        if not (carrier.origins >= 0).any():
            raise MismatchError(
                f"{cache} and {rows} have no token of a document in common ({len(carrier.origins)} documents looked "
                "for); pack both from one corpus with one tokenizer"
            )
        spec = _misaligned_spec(source.spec, target)
        writer = CacheWriter(out, spec)
        copy_tokenizer(target.path, Path(out))
        counts: dict[str, int] = dict.fromkeys(_FATES, 0)
        for shard in range(spec.shards):
            writer.write(shard, [carrier.record(row, counts) for row in spec.shard_range(shard)])
            if progress:
                progress(shard + 1, spec.shards)
    return {**counts, "manifest": writer.finalize()}


def keep_common(caches: Mapping[str | Path, str | Path]) -> int:
    """Copy caches of the same rows, {cache: copy}, with only the positions that all of them have targets for.

    What is left out is unsupervised in each copy, so that students of different copies differ in their targets alone.

    Returns:
        the number of positions kept.

    Raises:
        MismatchError: the caches' rows differ, or they have no position in common.
    """
    readers = {path: CacheReader(path) for path in caches}
    first = next(iter(readers.values()))
    for path, reader in readers.items():
        if reader.spec.data["fingerprint"] != first.spec.data["fingerprint"] or len(reader) != len(first):
            raise MismatchError(
                f"rows differ: {first.path} holds {len(first)} rows of {first.spec.data['fingerprint'][:12]}, {path} "
                f"{len(reader)} of {reader.spec.data['fingerprint'][:12]}; give caches of the same rows"
            )
    masks = [np.logical_and.reduce([r.record(row).supervised for r in readers.values()]) for row in range(len(first))]
    kept = sum(int(mask[1:].sum()) for mask in masks)
    if not kept:
        raise MismatchError(f"{', '.join(map(str, caches))} have no position with targets in common")
    for path, out in caches.items():
        _copy_masked(readers[path], Path(out), masks)
        readers[path].close()
    return kept


def _copy_masked(reader: CacheReader, out: Path, masks: list[np.ndarray]) -> None:
    spec = replace(reader.spec, data=reader.spec.data | {"supervised": "where several caches have targets"})
    writer = CacheWriter(out, spec)
    copy_tokenizer(Path(reader.path), out)
    for shard in range(spec.shards):
        writer.write(shard, [_masked(reader.record(row), masks[row]) for row in spec.shard_range(shard)])
    writer.finalize()


def _masked(record: RowRecord, mask: np.ndarray) -> RowRecord:
    kept = np.flatnonzero(mask[1:][record.supervised[1:]])
    return replace(record, supervised=mask, targets=record.targets.take(kept))


def _check(source: CacheReader, target: RowsReader, confirmed: bool) -> None:
    if "misaligned" in source.spec.data:
        raise MismatchError(f"{source.path} is misaligned itself; start from the cache that was captured")
    here, there = str(source.spec.data.get("fingerprint")), target.fingerprint
    if here == there:
        raise MismatchError(
            f"nothing would be misaligned: the cache was captured from these very rows ({here[:12]}); "
            "train on the cache itself"
        )
    if source.spec.tokenizer.get("hash") != target.tokenizer_hash:
        raise MismatchError(
            f"tokenizer differs: the cache was made with {str(source.spec.tokenizer.get('hash'))[:12]}, {target.path} "
            f"with {target.tokenizer_hash[:12]}; pack both with one tokenizer"
        )
    if not confirmed:
        raise MismatchError(
            f"rows differ: the cache was captured from rows {here[:12]} (seed={source.spec.data.get('seed')}, "
            f"seq_len={source.spec.seq_len}), {target.path} holds {there[:12]} (seed={target.manifest['seed']}, "
            f"seq_len={target.seq_len}); capture these rows, or, to measure what misaligned targets cost (paper, table "
            "13), set i_know_this_is_misaligned=true"
        )


def _misaligned_spec(spec: CacheSpec, target: RowsReader) -> CacheSpec:
    """The cache's identity with the new rows, and where its targets really come from."""
    made_for = {key: spec.data.get(key) for key in ("fingerprint", "split", "seed")} | {"seq_len": spec.seq_len}
    return replace(
        spec,
        rows=len(target),
        seq_len=target.seq_len,
        shard_rows=max(1, spec.shard_rows * spec.seq_len // target.seq_len),
        data=describe_rows(target) | {"misaligned": made_for},
    )


# --- documents ------------------------------------------------------------------------------------------


def documents_of(rows: Iterable[Any], count: int) -> Documents:
    """Every document of `count` rows (values with input_ids, starts and supervised), in order."""
    first: list[int] = []
    length: list[int] = []
    digests: list[bytes] = []
    digest = hashlib.blake2b(digest_size=16)
    for offset, opens, ids in _pieces(rows, count):
        if opens or not first:
            if first:
                digests.append(digest.digest())
            first.append(offset)
            length.append(0)
            digest = hashlib.blake2b(digest_size=16)
        length[-1] += len(ids)
        digest.update(ids.tobytes())
    digests += [digest.digest()] if first else []
    return Documents(first=np.array(first, np.int64), length=np.array(length, np.int64), digests=digests)


def _pieces(rows: Iterable[Any], count: int) -> Iterator[tuple[int, bool, np.ndarray]]:
    """(offset, whether a document starts here, ids) of every stretch of one document in one row.

    The padding that ends the last row belongs to no document; it shows by being unsupervised.
    """
    offset = 0
    for index, row in enumerate(rows):
        last = index + 1 == count
        size = int(np.flatnonzero(row.supervised).max(initial=-1)) + 1 if last else len(row.input_ids)
        edges = np.unique([0, *np.flatnonzero(row.starts[:size]), size]).tolist()
        for begin, end in pairwise(edges):
            yield offset + begin, bool(row.starts[begin]), np.ascontiguousarray(row.input_ids[begin:end], "<u4")
        offset += len(row.input_ids)


def match(new: Documents, old: Documents) -> np.ndarray:
    """[D] the first offset in `old` of each document of `new`, or -1; twins are matched in their order."""
    where: dict[bytes, list[int]] = {}
    for digest, first in zip(old.digests, old.first.tolist(), strict=True):
        where.setdefault(digest, []).append(first)
    seen: dict[bytes, int] = {}
    found = []
    for digest in new.digests:
        twins, number = where.get(digest, [_MISSING]), seen.get(digest, 0)
        found.append(twins[number % len(twins)])
        seen[digest] = number + 1
    return np.array(found, np.int64)


# --- targets --------------------------------------------------------------------------------------------

_FATES = ("carried", "dropped_first_of_row", "dropped_no_document", "dropped_unsupervised")


class _Carrier:
    """Both packings side by side, and the source's rows read last."""

    def __init__(self, source: CacheReader, target: RowsReader) -> None:
        self.source, self.target = source, target
        records = (source.record(row) for row in range(len(source)))
        self.documents = documents_of(target, len(target))
        self.origins = match(self.documents, documents_of(records, len(source)))
        self.read = lru_cache(_RECORDS)(source.record)

    def record(self, row: int, counts: dict[str, int]) -> RowRecord:
        """One new row with the targets made elsewhere; adds its positions' fates to `counts`."""
        packed = self.target[row]
        tokens = np.flatnonzero(packed.supervised[1:]) + 1
        origins = self._origins(row * self.target.seq_len + tokens)
        first_of_row = (origins >= 0) & (origins % self.source.spec.seq_len == 0)
        usable = (origins >= 0) & ~first_of_row
        targets, kept = self._targets(origins[usable])
        fates = (kept.sum(), first_of_row.sum(), (origins < 0).sum(), (~kept).sum())
        for fate, number in zip(_FATES, fates, strict=True):
            counts[fate] += int(number)
        return _record(packed, targets, tokens[usable][kept])

    def _origins(self, offsets: np.ndarray) -> np.ndarray:
        """The offset in the source of each offset in the target, or -1."""
        first, length = self.documents.first, self.documents.length
        if not len(first):
            return np.full(len(offsets), _MISSING)
        which = np.searchsorted(first, offsets, side="right") - 1
        inside = (which >= 0) & (offsets < first[which] + length[which]) & (self.origins[which] >= 0)
        return np.where(inside, self.origins[which] + offsets - first[which], _MISSING)

    def _targets(self, origins: np.ndarray) -> tuple[FlatTargets, np.ndarray]:
        """The targets of source tokens, and which of them the source has: token j is the target of position j - 1."""
        rows, tokens = np.divmod(origins, self.source.spec.seq_len)
        parts, kept = [decode(b"", 0, self.source.spec.codec)], np.zeros(len(origins), bool)
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows)) + 1):
            if not len(run):
                continue
            record = self.read(int(rows[run[0]]))
            kept[run] = record.supervised[tokens[run]]
            number = np.cumsum(record.supervised[1:]) - 1
            parts.append(record.targets.take(number[tokens[run][kept[run]] - 1]))
        return FlatTargets.join(parts), kept


def _record(packed: PackedRow, targets: FlatTargets, tokens: np.ndarray) -> RowRecord:
    supervised = np.zeros(len(packed.supervised), bool)
    supervised[tokens] = True
    return RowRecord(input_ids=packed.input_ids, targets=targets, starts=packed.starts, supervised=supervised)
