"""A cache's folder, checked: which shards are there, what their headers say, whether each row is sound.

Shapes: L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec import CODECS, FlatTargets, decode_row, decode_rows, encode_row, quick_rows
from .compiled import scratch
from .errors import FormatError, IncompleteError, MismatchError, SparseKDError
from .files import file_size, join, list_folder, read_file, sha256_file
from .id_ranks import IdRanks, id_ranks
from .manifest import (
    MANIFEST,
    CacheSpec,
    first_difference,
    header_spec,
    make_manifest,
    missing_message,
    parse_manifest,
    row_stats,
    same_stats,
    shard_name,
    shard_numbers,
    short,
    sum_stats,
)
from .shard import ShardReader, ShardRow, hash_ids, row_index_bytes

Array = NDArray[Any]
Json = dict[str, Any]
_TOGETHER = 16  # rows checked at once: more gain nothing


# --- rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRecord:
    """One row as it is written: ids [L], targets of its supervised positions, [L] bool masks.

    starts: where documents start. supervised: token p + 1 is learnt from target p iff supervised[p + 1].
    """

    input_ids: Array
    targets: FlatTargets
    starts: Array
    supervised: Array


def shard_ranks(records: Sequence[RowRecord], spec: CacheSpec) -> IdRanks | None:
    """The ranks of a shard's ids, when the codec wants frequent ids to be small numbers."""
    if not CODECS[spec.codec["name"]].ranked:
        return None
    return id_ranks((record.targets for record in records), spec.logit_width)


def coded_bytes(records: Sequence[RowRecord], spec: CacheSpec, codec: Json) -> int:
    """What the blocks (and id_rank) of these rows would take as one shard with another codec (`codec.codec_spec`)."""
    ranked = shard_ranks(records, replace(spec, codec=codec))
    ranks = ranked.ranks if ranked else None
    blocks = (encode_row(r.input_ids, r.targets, r.supervised.astype(bool), codec, ranks) for r in records)
    return sum(map(len, blocks)) + (len(ranked.table) if ranked else 0)


# Ranks of a few rows among themselves, with the ids of 8 entries and more in the table, give blocks of the size that a
# whole shard's ranks give, to 1 % from half as many tokens as ids on; with a shard's bound, 32, 1 to 8 % larger ones.
_LEAST_IN_SAMPLE = 8


def expected_row_bytes(sample: Sequence[RowRecord], codec: Json, shard_rows: int) -> float:
    """What a row takes in a shard of `shard_rows` rows like these: its block, its part of id_rank, its index.

    The shard's JSON header, some 3 kB, is left out.
    """
    ranked = None
    if CODECS[codec["name"]].ranked:
        ranked = id_ranks((record.targets for record in sample), codec["logit_width"], least=_LEAST_IN_SAMPLE)
    ranks = ranked.ranks if ranked else None
    blocks = (encode_row(r.input_ids, r.targets, r.supervised.astype(bool), codec, ranks) for r in sample)
    index = row_index_bytes(len(sample[0].input_ids))
    return sum(map(len, blocks)) / len(sample) + (len(ranked.table) / shard_rows if ranked else 0) + index


def encode_records(
    records: Sequence[RowRecord], spec: CacheSpec, rows: Sequence[int], ranked: IdRanks | None = None
) -> list[tuple[ShardRow, Json]]:
    """Each row as bytes and its statistics, counted on what a reader will get back.

    Raises:
        MismatchError: another seq_len, or targets that do not fit the codec; the row is named.
    """
    found, ids = [], ranked.ids if ranked else None
    for first in range(0, len(records), _TOGETHER):
        part = records[first : first + _TOGETHER]
        blocks = [_encoded(r, spec, row, ranked) for r, row in zip(part, rows[first:], strict=False)]
        supervised = np.stack([record.supervised.astype(bool) for record in part])
        decoded = _decoded(blocks, supervised, spec, ids)
        for record, block, mask, (input_ids, targets) in zip(part, blocks, supervised, decoded, strict=True):
            starts = record.starts.astype(bool)
            hash_ = hash_ids(input_ids)
            stored = ShardRow(block=block, input_hash=hash_, starts=starts, supervised=mask, ids=ids)
            found.append((stored, row_stats(input_ids, targets, mask, len(block))))
    return found


def _encoded(record: RowRecord, spec: CacheSpec, row: int, ranked: IdRanks | None) -> bytes:
    for name in ("input_ids", "starts", "supervised"):
        shape = getattr(record, name).shape
        if shape != (spec.seq_len,):
            raise MismatchError(
                f"packing differs: the cache has seq_len={spec.seq_len}, {name} of row {row} has shape "
                f"{shape}; re-pack with seq_len={spec.seq_len}"
            )
    supervised = record.supervised.astype(bool)
    try:
        return encode_row(record.input_ids, record.targets, supervised, spec.codec, ranked.ranks if ranked else None)
    except MismatchError as error:
        raise MismatchError(f"row {row}: {error}") from None


def _decoded(
    blocks: Sequence[bytes], supervised_BL: Array, spec: CacheSpec, ids: Array | None
) -> Iterator[tuple[Array, FlatTargets]]:
    """`decode_row` of each, in memory that the next call writes over where the codec decodes rows together."""
    together = decode_rows(blocks, supervised_BL, spec.codec, [ids] * len(blocks), scratch)
    if together is not None:
        return zip(together[0], together[1].parts(np.count_nonzero(supervised_BL[:, 1:], axis=1)), strict=True)
    rows = zip(blocks, supervised_BL, strict=True)
    return (decode_row(block, spec.seq_len, supervised, spec.codec, ids) for block, supervised in rows)


def decode_record(row: ShardRow, spec: CacheSpec, where: str) -> RowRecord:
    """The inverse of `encode_record`; FormatError, beginning with `where`, for bytes no encoder writes."""
    try:
        input_ids, targets = decode_row(row.block, spec.seq_len, row.supervised, spec.codec, row.ids)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    return RowRecord(input_ids=input_ids, targets=targets, starts=row.starts, supervised=row.supervised)


# --- shards -------------------------------------------------------------------------------------------


def rebuild_manifest(path: str | Path, spec: CacheSpec, *, checksums: bool) -> Json:
    """The manifest from the shards' headers; sizes and sha256 only with `checksums`, which reads every byte."""
    present = shard_numbers(list_folder(path))
    if not present >= set(range(min(spec.shards, len(present) + 1))):
        raise IncompleteError(missing_message(str(path), present, spec.shards))
    headers, files = [], []
    for shard in range(spec.shards):
        file = join(path, shard_name(shard))
        with ShardReader(file) as reader:
            headers.append(checked_header(reader, spec, shard))
        files.append((file_size(file), sha256_file(file)) if checksums else None)
    return make_manifest(headers, files)


def checked_header(reader: ShardReader, spec: CacheSpec, shard: int) -> Json:
    """A shard's header, once it belongs to this cache: MismatchError for another cache's shard."""
    found = header_spec(reader.header, reader.path)
    difference = first_difference(found.as_dict(), spec.as_dict())
    if difference:
        key, has, others = difference
        raise MismatchError(
            f"{reader.path} has {key}={short(has)}, this cache has {key}={short(others)}; "
            "the folder mixes two captures: delete the shard and run the same capture again"
        )
    if reader.header["shard"] != shard:
        raise FormatError(f"{reader.path}: holds shard {reader.header['shard']}, expected {shard}; renamed?")
    if reader.ranked != CODECS[spec.codec["name"]].ranked:
        has = "an" if reader.ranked else "no"
        raise FormatError(f"{reader.path}: has {has} id_rank, which codec {spec.codec['name']} does not allow")
    return reader.header


def found_specs(path: str | Path) -> Iterator[tuple[str, CacheSpec]]:
    """(where, spec) of the manifest and of each shard that can be read; damaged files are passed over."""
    with suppress(FormatError, FileNotFoundError):
        yield join(path, MANIFEST), parse_manifest(read_file(join(path, MANIFEST)), join(path, MANIFEST))[1]
    for shard in sorted(shard_numbers(list_folder(path))):
        with suppress(FormatError, FileNotFoundError), ShardReader(join(path, shard_name(shard))) as reader:
            yield reader.path, header_spec(reader.header, reader.path)


def any_spec(path: str | Path) -> CacheSpec:
    """The first of `found_specs`; IncompleteError where there is none."""
    for _, spec in found_specs(path):
        return spec
    raise IncompleteError(
        f"{path}: no cache here, neither its {MANIFEST} nor a shard that can be read; check the path, or capture it"
    )


def check_shard(path: str | Path, spec: CacheSpec, shard: int) -> tuple[Json | None, list[str]]:
    """A shard's header if it can be read, and everything that is wrong with the shard."""
    file = join(path, shard_name(shard))
    try:
        with ShardReader(file) as reader:
            header = checked_header(reader, spec, shard)
            return header, list(_row_problems(reader, spec))
    except FileNotFoundError:
        return None, [f"{file}: is missing; run the same capture again to make it"]
    except SparseKDError as error:
        return None, [str(error)]


def _row_problems(reader: ShardReader, spec: CacheSpec) -> Iterator[str]:
    stats: list[Json] = []
    for first in range(0, len(reader), _TOGETHER):
        rows = range(first, min(first + _TOGETHER, len(reader)))
        together = _stats_together(reader, spec, rows)
        stats += [together] if together else (yield from _stats_one_by_one(reader, spec, rows))
    if sum(each["tokens"] for each in stats) != len(reader) * spec.seq_len:
        return  # of rows that are damaged, nothing was counted
    if not same_stats(reader.header["stats"], sum_stats(stats)):
        yield f"{reader.path}: its rows do not have the statistics in its header"


def _stats_one_by_one(reader: ShardReader, spec: CacheSpec, rows: Sequence[int]) -> Generator[str, None, list[Json]]:
    """Yields what is wrong with some rows; returns the statistics of those that can be read."""
    stats = []
    for row in rows:
        where = f"{reader.path}: row {reader.header['first_row'] + row}"
        try:
            stored = reader.read_row(row)
            record = decode_record(stored, spec, where)
        except FormatError as error:
            yield str(error)
            continue
        if hash_ids(record.input_ids) != stored.input_hash:
            yield f"{where}: its input ids do not have the recorded hash"
        stats.append(row_stats(record.input_ids, record.targets, record.supervised, len(stored.block)))
    return stats


def _stats_together(reader: ShardReader, spec: CacheSpec, rows: Sequence[int]) -> Json | None:
    """`sum_stats(_stats_one_by_one(...))` of sound rows, where decoding them at once is quicker; else None."""
    if quick_rows(spec.codec) is None:
        return None
    try:
        stored = [reader.read_row(row) for row in rows]
    except FormatError:
        return None
    supervised, blocks = np.stack([row.supervised for row in stored]), [row.block for row in stored]
    decoded = decode_rows(blocks, supervised, spec.codec, [row.ids for row in stored], scratch)
    if decoded is None:
        return None
    if any(hash_ids(ids) != row.input_hash for ids, row in zip(decoded[0], stored, strict=True)):
        return None
    return row_stats(*decoded, supervised, sum(map(len, blocks)))
