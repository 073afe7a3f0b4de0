"""One shard: a safetensors file that holds a fixed range of rows, complete and intact if it exists at all.

    header   canonical JSON, see cache.py           offsets     i64 [R + 1]  where each block starts
    payload  u8   the blocks, one after another     crc32c      u32 [R]      over everything a row depends on
    starts, supervised  u8 [R, ceil(L / 8)] bits    input_hash  u64 [R]      of the row's input ids
    id_rank  u8   some codecs: the shard's frequent ids, see id_ranks.py

Reading trusts nothing. The container is parsed here, not by the safetensors library, so that a row is one
range request over fsspec too.

Shapes: R rows of the shard, L tokens of a row.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from .errors import FormatError, VersionError
from .files import Source, canonical_json, fetch, open_source, strict_json, write_atomically
from .id_ranks import ids_of_ranks

Array = NDArray[Any]

FORMAT = "sparsekd-cache"
FORMAT_VERSION = 1
MAX_HEADER = 16 * 2**20  # a hostile length field must not make us read more than this
_MOST_RANKED = 2**24  # logits of a shard with an id_rank: a reader allocates that many ids
_KEY = "sparsekd"
_DTYPES = {
    "payload": "U8",
    "offsets": "I64",
    "crc32c": "U32",
    "input_hash": "U64",
    "starts": "U8",
    "supervised": "U8",
}
_OPTIONAL = {"id_rank": "U8"}
_INDEX = ("offsets", "crc32c", "input_hash")
# Under each row's own checksum, and most of an index: 1 MB of 4M tokens' stays in a file that is near.
_MASKS = ("starts", "supervised")
_ITEM_BYTES = {"U8": 1, "U32": 4, "I64": 8, "U64": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRow:
    """One row as a shard keeps it: `block` bytes, `input_hash` of its ids, and [L] bool masks.

    `ids` [V] is the id of each number in the block, in a shard with an id_rank; all its rows share it.
    """

    block: bytes
    input_hash: int
    starts: Array
    supervised: Array
    ids: Array | None = None


# --- bytes that are the same everywhere -------------------------------------------------------------------


def hash_ids(input_ids: Array) -> int:
    """The first 8 bytes (little-endian) of blake2b over the ids as little-endian uint32."""
    data = np.ascontiguousarray(input_ids, "<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(data).digest()[:8], "little")


def row_index_bytes(seq_len: int) -> int:
    """What a row takes beside its block: offset, checksum, hash and two masks of bits."""
    return 8 + 4 + 8 + 2 * -(-seq_len // 8)


def _row_crc(index: int, starts: bytes, supervised: bytes, block: bytes) -> int:
    """crc32c over the row's number in the cache (u64), its two masks and its block."""
    crc: int = crc32c(block, crc32c(supervised, crc32c(starts, crc32c(struct.pack("<Q", index)))))
    return crc


def _index_crc(header: dict[str, Any], *index: bytes) -> int:
    """crc32c over the header, offsets, crc32c, input_hash and, where there is one, id_rank."""
    crc: int = crc32c(canonical_json(header))
    for part in index:
        crc = crc32c(part, crc)
    return crc


# --- writing ----------------------------------------------------------------------------------------------


def write_shard(
    path: str | Path, header: dict[str, Any], rows: Iterable[ShardRow], id_rank: bytes | None = None
) -> None:
    """Writes the whole shard or nothing. The same header, rows and id_rank always give the same bytes.

    Raises:
        StorageError: the disk is full or cannot be written; no half file is left.
    """
    from safetensors.numpy import save

    tensors = _tensors(header["first_row"], list(rows))
    if len(tensors["crc32c"]) != header["rows"]:
        raise ValueError(f"the header says {header['rows']} rows, got {len(tensors['crc32c'])}")
    if id_rank is not None:
        tensors["id_rank"] = np.frombuffer(id_rank, np.uint8)
    index = [tensors[name].tobytes() for name in (*_INDEX, *_OPTIONAL) if name in tensors]
    # One metadata key only: the library writes several in random order.
    metadata = canonical_json({"header": header, "crc32c": _index_crc(header, *index)}).decode()
    write_atomically(path, save(tensors, {_KEY: metadata}))


def _tensors(first_row: int, rows: list[ShardRow]) -> dict[str, Array]:
    starts = np.stack([np.packbits(row.starts, bitorder="little") for row in rows])
    supervised = np.stack([np.packbits(row.supervised, bitorder="little") for row in rows])
    crcs = [
        _row_crc(first_row + i, starts[i].tobytes(), supervised[i].tobytes(), row.block) for i, row in enumerate(rows)
    ]
    return {
        "payload": np.frombuffer(b"".join(row.block for row in rows), np.uint8),
        "offsets": np.cumsum([0, *(len(row.block) for row in rows)], dtype="<i8"),
        "crc32c": np.array(crcs, "<u4"),
        "input_hash": np.array([row.input_hash for row in rows], "<u8"),
        "starts": starts,
        "supervised": supervised,
    }


# --- reading ----------------------------------------------------------------------------------------------


class ShardReader:
    """An open shard: `header`, `len()`, `read_row(i)`. The index is checked at open, a row when it is read.

    Raises:
        FileNotFoundError: no such file.
        FormatError: a damaged, truncated, foreign or hostile file.
        VersionError: a file from a newer sparsekd.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._source = open_source(path)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        declared, data_start = _container(self._source, self.path)
        self.header, crc = _sparsekd_header(declared, self.path)
        rows, bits = self.header["rows"], (self.header["spec"]["seq_len"] + 7) // 8
        shapes = {
            "payload": None,
            "offsets": [rows + 1],
            "crc32c": [rows],
            "input_hash": [rows],
            "starts": [rows, bits],
            "supervised": [rows, bits],
        }
        shapes |= {name: None for name in _OPTIONAL if name in declared}
        spans = _spans(declared, shapes, self._source.size - data_start, self.path)
        kept = [name for name in spans if name != "payload" and (name not in _MASKS or self._source.remote)]
        index = [(data_start + spans[name][0], data_start + spans[name][1]) for name in kept]
        fetch([(self._source, *span) for span in index])
        raw = dict(zip(kept, (self._source.read(*span) for span in index), strict=True))
        found = _index_crc(self.header, *(raw[name] for name in (*_INDEX, *_OPTIONAL) if name in raw))
        if found != crc:
            raise FormatError(f"{self.path}: the index has crc32c {found:#010x}, recorded is {crc!r:.20}")
        self._offsets = np.frombuffer(raw["offsets"], "<i8")
        self._crcs = np.frombuffer(raw["crc32c"], "<u4")
        self._hashes = np.frombuffer(raw["input_hash"], "<u8")
        self.ids = self._ids_of_ranks(raw["id_rank"]) if "id_rank" in raw else None
        self._width, self._raw_masks = bits, {name: raw[name] for name in _MASKS if name in raw}
        self._masks = {name: data_start + spans[name][0] for name in _MASKS}
        begin, end = spans["payload"]
        self._payload = data_start + begin
        _check_offsets(self._offsets, end - begin, self.path)

    def _ids_of_ranks(self, table: bytes) -> Array:
        width = self.header["spec"].get("logit_width")
        if type(width) is not int or not 1 <= width <= _MOST_RANKED:
            raise FormatError(f"{self.path}: has an id_rank, but logit_width={ascii(width)[:40]}")
        try:
            return ids_of_ranks(table, width)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from None

    def __len__(self) -> int:
        return len(self._crcs)

    @property
    def ranked(self) -> bool:
        """Whether the shard has an id_rank."""
        return self.ids is not None

    def read_row(self, row: int) -> ShardRow:
        """Row `row` of this shard (0 .. len - 1), in one range; FormatError when its crc32c is wrong."""
        block, starts, supervised = self.read_bits(row)
        return ShardRow(
            block=block,
            input_hash=int(self._hashes[row]),
            starts=self._mask(starts),
            supervised=self._mask(supervised),
            ids=self.ids,
        )

    def place(self, row: int) -> tuple[Source, int, int]:
        """Where the row's block is, for `files.fetch`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a shard of {len(self)} rows")
        return self._source, self._payload + int(self._offsets[row]), self._payload + int(self._offsets[row + 1])

    def read_bits(self, row: int) -> tuple[bytes, bytes, bytes]:
        """`read_row`'s block, starts and supervised, the masks as bits; FormatError likewise."""
        source, begin, end = self.place(row)
        block = source.read(begin, end)
        starts, supervised = self._row_bits("starts", row), self._row_bits("supervised", row)
        index = self.header["first_row"] + row
        crc, recorded = _row_crc(index, starts, supervised, block), int(self._crcs[row])
        if crc != recorded:
            raise FormatError(
                f"{self.path}: row {index} has crc32c {crc:#010x}, recorded is {recorded:#010x}; "
                "the file is damaged: delete it and run the same capture again"
            )
        return block, starts, supervised

    def _row_bits(self, name: str, row: int) -> bytes:
        first, last = row * self._width, (row + 1) * self._width
        if name in self._raw_masks:
            return self._raw_masks[name][first:last]
        return self._source.read(self._masks[name] + first, self._masks[name] + last)

    def _mask(self, bits: bytes) -> Array:
        mask: Array = masks([bits], self.header["spec"]["seq_len"])[0]
        return mask

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def masks(rows: Sequence[bytes], seq_len: int) -> Array:
    """[B, L] bool of B rows' bits, as `ShardReader.read_bits` gives them."""
    packed = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    return np.unpackbits(packed, axis=1, count=seq_len, bitorder="little").view(bool)


def _container(source: Source, path: str) -> tuple[dict[str, Any], int]:
    """The safetensors header as a dict, and where the data begins."""
    if source.size < 8:
        raise FormatError(f"{path}: {source.size} bytes are too few for a shard; the file is truncated")
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > min(MAX_HEADER, source.size - 8):
        raise FormatError(
            f"{path}: claims a header of {length} bytes, the file has {source.size} (at most {MAX_HEADER} "
            "are read); it is truncated or no shard"
        )
    declared = strict_json(source.read(8, 8 + length), path)
    if not isinstance(declared, dict):
        raise FormatError(f"{path}: its header is no JSON object")
    return declared, 8 + length


def _sparsekd_header(declared: dict[str, Any], path: str) -> tuple[dict[str, Any], Any]:
    """Our own header and the recorded crc32c of header and index."""
    metadata = declared.get("__metadata__")
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not isinstance(metadata, dict) or set(metadata) != {_KEY}:
        raise FormatError(f"{path}: no sparsekd header; this is not a shard of a sparsekd cache")
    outer = strict_json(text.encode(errors="surrogatepass"), path)
    header = outer.get("header") if isinstance(outer, dict) else None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: its sparsekd entry holds no header")
    check_version(header, path)
    if set(outer) != {"header", "crc32c"} or not _is_canonical(outer, text):
        raise FormatError(f"{path}: its sparsekd entry is not in canonical form; the file is damaged")
    _check_counts(header, path)
    return header, outer["crc32c"]


def _is_canonical(value: Any, text: str) -> bool:
    try:
        return canonical_json(value).decode() == text
    except (ValueError, RecursionError):  # 1e999 parses as infinity
        return False


def check_version(header: dict[str, Any], path: str) -> None:
    """FormatError for a foreign header, VersionError for one from the future."""
    if header.get("format") != FORMAT:
        found = ascii(header.get("format"))[:60]
        raise FormatError(
            f"{path}: format is {found}, expected {FORMAT!r}; give a cache, as `sparsekd capture` writes it"
        )
    version = header.get("format_version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: format_version is {ascii(version)[:60]}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise VersionError(
            f"{path}: written by a newer sparsekd (format {version}, this one reads {FORMAT_VERSION}); upgrade sparsekd"
        )


def _check_counts(header: dict[str, Any], path: str) -> None:
    spec = header.get("spec")
    numbers = {
        "rows": (header.get("rows"), 1),
        "first_row": (header.get("first_row"), 0),
        "spec.seq_len": (spec.get("seq_len") if isinstance(spec, dict) else None, 1),
    }
    for name, (value, least) in numbers.items():
        if type(value) is not int or not least <= value < 2**48:
            raise FormatError(f"{path}: header {name} is {ascii(value)[:60]}, expected a whole number")


def _spans(
    declared: dict[str, Any], shapes: dict[str, list[int] | None], data_size: int, path: str
) -> dict[str, tuple[int, int]]:
    """[begin, end) of each tensor in the data: exactly the expected ones, side by side, filling the file."""
    if set(declared) - set(_OPTIONAL) != {*_DTYPES, "__metadata__"}:
        raise FormatError(f"{path}: holds the tensors {ascii(sorted(declared))[:200]}, not a shard's")
    spans = {name: _span(name, declared[name], shape, path) for name, shape in shapes.items()}
    reached = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            raise FormatError(f"{path}: {name} begins at {begin}, expected {reached}: a hole or an overlap")
        reached = end
    if reached != data_size:
        raise FormatError(f"{path}: its tensors end at {reached}, the file's data at {data_size}; truncated?")
    return spans


def _span(name: str, declared: Any, shape: list[int] | None, path: str) -> tuple[int, int]:
    """[begin, end) of one tensor, once dtype, shape and offsets agree; shape None is any one length."""
    if not isinstance(declared, dict) or set(declared) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{path}: {name} is declared as {ascii(declared)[:80]}")
    dtype, found, offsets = declared["dtype"], declared["shape"], declared["data_offsets"]
    expected = (_DTYPES | _OPTIONAL)[name]
    if dtype != expected:
        raise FormatError(f"{path}: {name} has dtype {ascii(dtype)[:40]}, expected {expected}")
    if not _are_sizes(found) or not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{path}: {name} has shape {ascii(found)[:60]} at {ascii(offsets)[:60]}")
    if found != (shape or found[:1]) or not found:
        raise FormatError(f"{path}: {name} has shape {ascii(found)[:60]}, expected {shape or '[n]'}")
    size = _ITEM_BYTES[dtype]
    for length in found:
        size *= length
    if offsets[1] - offsets[0] != size:
        raise FormatError(f"{path}: {name} needs {size} bytes, its offsets are {ascii(offsets)[:60]}")
    return offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def _check_offsets(offsets: Array, payload: int, path: str) -> None:
    # Compared, not subtracted: differences of hostile int64 would wrap around.
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falls):
        row = int(falls[0])
        raise FormatError(f"{path}: row {row} ends at {offsets[row + 1]}, but begins at {offsets[row]}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != payload:
        raise FormatError(f"{path}: blocks span {offsets[0]}..{offsets[-1]}, the payload has {payload} bytes")
