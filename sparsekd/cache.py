"""A cache: a folder of shards and `manifest.json`. The cache is the training set.

    writer = CacheWriter("cache/", spec)
    for shard in writer.missing():
        writer.write(shard, records)         # RowRecords of exactly that shard's rows
    writer.finalize()
    reader = CacheReader("cache/")            # or an fsspec URL
    row = reader[17]                          # row.input_ids [L], row.targets (L - 1 positions)

A shard that exists is complete; resuming means making the shards that are missing or fail their checks, in any
process and any order, and always ends in the same bytes.

Shapes: L tokens of a row, K entries of its longest position.
"""

from __future__ import annotations

import json
import operator
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .canary import alignment, check_alignment
from .checks import make_folder
from .codec import CODECS, FlatTargets, codec_engine, decode_rows, quick_rows
from .compiled import scratch
from .errors import IncompleteError, MismatchError, RecipeError
from .files import (
    MAPS_HOLD_DESCRIPTORS,
    fetch,
    is_url,
    join,
    list_folder,
    read_file,
    remove_stale_files,
    write_atomically,
)
from .folder import (
    RowRecord,
    any_spec,
    check_shard,
    checked_header,
    decode_record,
    encode_records,
    found_specs,
    rebuild_manifest,
    shard_ranks,
)
from .manifest import (
    MANIFEST,
    CacheSpec,
    check_entry,
    check_same_spec,
    make_header,
    manifest_bytes,
    missing_message,
    parse_manifest,
    plain_json,
    shard_name,
    shard_numbers,
    sum_stats,
)
from .padded import PaddedRows, pad_joined, pad_rows
from .shard import FORMAT, ShardReader, masks, row_index_bytes, write_shard
from .verify import VerifyReport, verify

Array = NDArray[Any]
Json = dict[str, Any]
# Opening a shard costs as much as reading ten short rows, and a shuffled epoch comes to another one with every row.
_OPEN_SHARDS = 128 if MAPS_HOLD_DESCRIPTORS else 2**14  # of 256 files on macOS; of 65,530 maps on Linux
_OPEN_BYTES = 2**28  # of their indexes and tables of ids
_AT_ONCE = 16  # shards that are opened together over a network

__all__ = [
    "CacheReader",
    "CacheSpec",
    "CacheWriter",
    "Row",
    "RowRecord",
    "RowTargets",
    "VerifyReport",
    "alignment",
    "check_alignment",
    "verify",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTargets:
    """ids [L - 1, K] int64 and weights [L - 1, K] float32; weight 0 is padding, or an unsupervised position.

    Of a cache of sorted curves, `curve` is [L - 1, C] float32 (zeros where unsupervised), and ids and weights are the
    token that came and its probability: no targets of a sparse loss.
    """

    ids: Array
    weights: Array
    curve: Array | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it is read: input_ids [L] uint32, starts and supervised [L] bool, `flat` targets of its supervised
    positions, and `targets` of all L - 1, made from those each time they are asked for."""

    index: int
    input_ids: Array
    starts: Array
    supervised: Array
    flat: FlatTargets

    @property
    def targets(self) -> RowTargets:
        return _spread(self.flat, self.supervised[1:])


# --- writing --------------------------------------------------------------------------------------------


class CacheWriter:
    """Makes the shards of one cache, in a local folder, alone or beside other processes.

    Raises:
        MismatchError: the folder holds a cache of another spec, or something else than a cache.
        RecipeError: the path is a URL.
        StorageError: the path cannot be a folder, or may not be written.
    """

    def __init__(self, path: str | Path, spec: CacheSpec, engine: Json | None = None) -> None:
        if is_url(path):
            raise RecipeError(f"a cache is written to a local folder, not to {path}; copy it there afterwards")
        self.path, self.spec, self.engine = Path(path), spec, plain_json("engine", engine or {})
        make_folder(self.path)
        _check_own(self.path)
        remove_stale_files(self.path)
        for where, found in found_specs(self.path):
            check_same_spec(found, spec, where)

    def missing(self, shard_range: range | None = None) -> list[int]:
        """The shards (of `shard_range`, or all) that are absent or fail their checks, every row included."""
        shards = range(self.spec.shards) if shard_range is None else shard_range
        return [shard for shard in shards if check_shard(self.path, self.spec, shard)[1]]

    def write(self, shard: int, records: Iterable[RowRecord]) -> None:
        """Writes one shard from the records of exactly its rows (`spec.shard_range(shard)`), or nothing.

        Raises:
            MismatchError: another number of rows, another seq_len, targets that do not fit the codec.
            StorageError: the disk is full.
        """
        if not 0 <= shard < self.spec.shards:
            raise IndexError(f"shard {shard} of {self.spec.shards}")
        wanted = self.spec.shard_range(shard)
        given = list(records)
        if len(given) != len(wanted):
            raise MismatchError(
                f"shard {shard} holds the {len(wanted)} rows {wanted.start}..{wanted.stop - 1}, "
                f"got {len(given)} records; give exactly its rows"
            )
        ranked = shard_ranks(given, self.spec)
        encoded = encode_records(given, self.spec, wanted, ranked)
        stats = sum_stats([each for _, each in encoded])
        header = make_header(self.spec, shard, stats, self.engine | codec_engine(self.spec.codec))
        write_shard(
            self.path / shard_name(shard), header, [row for row, _ in encoded], ranked.table if ranked else None
        )

    def finalize(self) -> Json:
        """Aggregates the headers into manifest.json and returns it. Safe to call from several processes.

        Raises:
            IncompleteError: shards are missing.
        """
        manifest = rebuild_manifest(self.path, self.spec, checksums=True)
        write_atomically(self.path / MANIFEST, manifest_bytes(manifest))
        return manifest


# What else may lie in a cache's folder before its first shard.
_COMPANIONS = ("tokenizer", "sets.safetensors")


def _check_own(path: Path) -> None:
    """MismatchError for a folder with files of others: its manifest.json would be written over."""
    names = [name for name in list_folder(path) if not name.startswith(".") and name not in _COMPANIONS]
    if not names or shard_numbers(names):
        return
    with suppress(ValueError, OSError, RecursionError, AttributeError):
        if json.loads((path / MANIFEST).read_bytes()).get("format") == FORMAT:
            return
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    raise MismatchError(f"{path} is not empty and holds no cache but {shown}; give another out=FOLDER")


# --- reading --------------------------------------------------------------------------------------------


class CacheReader:
    """A cache opened for reading: `len(reader)`, `reader[i]`, `.manifest`, `.spec`, `.stats`.

    Takes a local folder or an fsspec URL. A few shards stay open; handles are dropped when pickled, so a
    reader can go to data loader workers. Threads may share one reader.

    Args:
        normalize: for a cache of importance draws (codec ratio32 or ratio48): read self-normalised weights (True) or
            plain unbiased ones (False), see `flat.Importance`; default: as captured.

    Raises:
        RecipeError: `normalize` for a cache whose weights are settled.
        IncompleteError: there is no cache, or shards are missing.
        FormatError: damaged or hostile files, at open or when a row is read.
        VersionError: a cache from a newer sparsekd.
        MismatchError: manifest.json and a shard belong to different captures.
    """

    def __init__(self, path: str | Path, *, normalize: bool | None = None) -> None:
        self.path = str(path)
        self.manifest, self.spec = _open_manifest(self.path)
        self._read_as = self.spec if normalize is None else _weighed(self.spec, normalize)
        self._shards: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def stats(self) -> Json:
        """Totals over the rows: tokens, positions, pairs, payload_bytes, id_max, next_token_hits, ..."""
        stats: Json = self.manifest["stats"]
        return stats

    def __len__(self) -> int:
        return self.spec.rows

    def __repr__(self) -> str:
        spec = self.spec
        made = f"sampler={spec.sampler['name']}, codec={spec.codec['name']}"
        return f"CacheReader({self.path!r}: {spec.rows:,} rows of {spec.seq_len:,} tokens, {made})"

    def __getitem__(self, index: int) -> Row:
        """Row `index`, like a list: negative indices count from the end, IndexError outside."""
        index = self._index(index)
        record = self.record(index)
        return Row(
            index=index,
            input_ids=record.input_ids,
            starts=record.starts,
            supervised=record.supervised,
            flat=record.targets,
        )

    def flat(self, index: int) -> FlatTargets:
        """The targets of row `index`, for its supervised positions only, as flat arrays."""
        return self.record(index).targets

    def record(self, index: int) -> RowRecord:
        """Row `index` as it was given to the writer."""
        index = self._index(index)
        shard, row = divmod(index, self.spec.shard_rows)
        reader = self._shard(shard)
        return decode_record(reader.read_row(row), self._read_as, f"{reader.path}: row {index}")

    def fetch(self, indices: Sequence[int]) -> None:
        """Asks for some rows together where the cache lies behind a URL; reading them then waits for no network."""
        if not is_url(self.path):
            return
        found = [divmod(self._index(index), self.spec.shard_rows) for index in indices]
        shards = sorted({shard for shard, _ in found})
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            opened = dict(zip(shards, threads.map(self._shard, shards), strict=True))
        fetch([opened[shard].place(row) for shard, row in found])

    def padded(self, indices: Sequence[int]) -> PaddedRows | None:
        """Some rows as one batch, where that is quicker than row by row: `rows = [reader[i] for i in indices]` stacked,
        their targets by `pad_rows`. None where the codec or the machine has no such way, or a row is not sound: reading
        it alone says why.

        Raises:
            FormatError: a row's checksum is wrong.
        """
        found = [divmod(self._index(index), self.spec.shard_rows) for index in indices]
        if not found or quick_rows(self._read_as.codec) is None:
            return None
        shards = {shard: self._shard(shard) for shard, _ in found}
        blocks, _, bits = zip(*(shards[shard].read_bits(row) for shard, row in found), strict=True)
        supervised = masks(bits, self.spec.seq_len)
        tables = [shards[shard].ids for shard, _ in found]
        decoded = decode_rows(blocks, supervised, self._read_as.codec, tables, scratch)
        padded = None if decoded is None else pad_joined(decoded[1], np.ascontiguousarray(supervised[:, 1:]))
        if decoded is None or padded is None:
            return None
        return PaddedRows(input_ids=decoded[0], supervised=supervised, ids=padded[0], weights=padded[1])

    def _index(self, index: int) -> int:
        found = operator.index(index)
        if not -len(self) <= found < len(self):
            raise IndexError(f"row {found} of a cache of {len(self)} rows")
        return found % len(self)

    def _shard(self, shard: int) -> ShardReader:
        """The open shard. One pushed out is left to whoever still reads it and closes when they let go."""
        with self._lock:
            if shard in self._shards:
                self._shards.move_to_end(shard)
                return self._shards[shard]
        reader = self._open_shard(shard)  # with the lock free: over a network this takes a while
        with self._lock:
            self._shards.setdefault(shard, reader)
            if len(self._shards) > _most_open(self.spec, is_url(self.path)):
                self._shards.popitem(last=False)
            self._shards.move_to_end(shard)
            return self._shards[shard]

    def _open_shard(self, shard: int) -> ShardReader:
        file = join(self.path, shard_name(shard))
        try:
            reader = ShardReader(file)
        except FileNotFoundError:
            raise IncompleteError(
                f"{file}: is missing, {MANIFEST} lists it; run the same capture again to make it"
            ) from None
        check_entry(self.manifest["shards"][shard], checked_header(reader, self.spec, shard), file)
        return reader

    def close(self) -> None:
        """Closes the open shards; reading again opens them again."""
        with self._lock:
            while self._shards:
                self._shards.popitem()[1].close()

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> Json:
        return {"path": self.path, "manifest": self.manifest, "spec": self.spec, "_read_as": self._read_as}

    def __setstate__(self, state: Json) -> None:
        self.__dict__.update(state, _shards=OrderedDict(), _lock=threading.Lock())


def _most_open(spec: CacheSpec, remote: bool) -> int:
    """How many shards a reader keeps open."""
    table = 4 * spec.logit_width if CODECS[spec.codec["name"]].ranked else 0
    index = row_index_bytes(spec.seq_len if remote else 0)  # masks stay in the map
    return max(1, min(_OPEN_SHARDS, _OPEN_BYTES // (table + spec.shard_rows * index)))


def _weighed(spec: CacheSpec, normalize: bool) -> CacheSpec:
    """How to read draws that are stored unweighed; shards are still compared with what was captured."""
    if "normalize" not in spec.codec:
        raise RecipeError(
            f"normalize={str(normalize).lower()} chooses between the weightings of importance draws, this cache "
            f"(codec {spec.codec['name']}) has one only; leave normalize out, or capture with a sampler.temperature "
            "other than 1"
        )
    return replace(spec, codec=spec.codec | {"normalize": normalize})


def _open_manifest(path: str) -> tuple[Json, CacheSpec]:
    file = join(path, MANIFEST)
    try:
        manifest, spec = parse_manifest(read_file(file), file)
    except FileNotFoundError:
        spec = any_spec(path)
        return rebuild_manifest(path, spec, checksums=False), spec
    if not is_url(path):  # remotely, a listing can cost more than the epoch: a missing shard shows when read
        present = shard_numbers(list_folder(path))
        if not present >= set(range(spec.shards)):
            raise IncompleteError(missing_message(path, present, spec.shards))
    return manifest, spec


def _spread(flat: FlatTargets, supervised: Array) -> RowTargets:
    """Targets of supervised positions -> padded targets of all positions; supervised [L - 1]."""
    (ids,), (weights,) = pad_rows([flat], supervised[None])
    curve = None if flat.curve is None else np.zeros((len(supervised), flat.curve.shape[1]), np.float32)
    if curve is not None:
        curve[supervised] = flat.curve
    return RowTargets(ids=ids, weights=weights, curve=curve)
