"""A folder of packed rows, read: memory-mapped arrays with a fingerprint.

    reader = RowsReader("rows/", split="train")
    reader[17].input_ids                                   # uint32 [L]

Shapes: R rows, L = seq_len, B rows of a batch. In the folder, per split: `SPLIT_ids.npy` (uint16 or uint32
[R, L]), `SPLIT_starts.npy` and `SPLIT_supervised.npy` (uint8 [R, ceil(L/8)], bits in little order), beside
`manifest.json` and `tokenizer/`. `rows.pack` writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import vocab
from .errors import SourceError, VersionError

FORMAT = "sparsekd-rows"
FORMAT_VERSION = 1
PACKING = "concat-v1"
_AGAIN = "delete the folder and pack again"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One row: input_ids uint32 [L]; starts (a document begins here) and supervised (is a target), bool [L]."""

    index: int
    input_ids: np.ndarray
    starts: np.ndarray
    supervised: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Several rows: indices int64 [B]; input_ids uint32, starts and supervised bool, each [B, L]."""

    indices: np.ndarray
    input_ids: np.ndarray
    starts: np.ndarray
    supervised: np.ndarray


class RowsReader:
    """The rows of one split, memory-mapped; a sequence of `PackedRow`. A context manager, or just drop it.

    Attributes:
        manifest: what `pack` returned.
        seq_len, fingerprint, tokenizer_hash: what a later stage compares.

    Raises:
        SourceError: no such folder or split, or one that is damaged.
        VersionError: rows of a newer sparsekd.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        self.manifest = read_manifest(self.path)
        try:
            splits = self.manifest["splits"]
            if split not in splits:
                raise SourceError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
            self.seq_len = int(self.manifest["seq_len"])
            self.tokenizer_hash = str(self.manifest["tokenizer"]["hash"])
            self.fingerprint = str(splits[split]["fingerprint"])
            self._rows = int(splits[split]["rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(f"{path}/manifest.json is damaged ({error!r}); {_AGAIN}") from error
        bits = -(-self.seq_len // 8)
        self._ids = self._map("ids", self.seq_len, ("<u2", "<u4"))
        self._starts = self._map("starts", bits, ("|u1",))
        self._supervised = self._map("supervised", bits, ("|u1",))

    def _map(self, kind: str, width: int, dtypes: tuple[str, ...]) -> np.ndarray:
        path = self.path / f"{self.split}_{kind}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise SourceError(f"{path} is missing or damaged ({error}); {_AGAIN}") from error
        shape, expected = getattr(array, "shape", None), (self._rows, width)
        if shape != expected or array.dtype.str not in dtypes:
            raise SourceError(
                f"{path} is {array.dtype.str} {shape}, the manifest says {dtypes[0]} {expected}; {_AGAIN}"
            )
        return array

    def __len__(self) -> int:
        return self._rows

    def __repr__(self) -> str:
        return f"RowsReader('{self.path}', {self.split!r}: {self._rows:,} rows of {self.seq_len:,} tokens)"

    def __getitem__(self, index: int) -> PackedRow:
        if not -self._rows <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows} rows")
        row = self.batch([index % self._rows])
        return PackedRow(
            index=int(row.indices[0]),
            input_ids=row.input_ids[0],
            starts=row.starts[0],
            supervised=row.supervised[0],
        )

    def __iter__(self) -> Iterator[PackedRow]:
        return (self[index] for index in range(self._rows))

    def batch(self, indices: Sequence[int] | np.ndarray) -> PackedBatch:
        """The rows `indices` (each in [0, R)), as copies that outlive the reader."""
        chosen = np.asarray(indices, np.int64)
        return PackedBatch(
            indices=chosen,
            input_ids=self._ids[chosen].astype(np.uint32),
            starts=self._bits(self._starts, chosen),
            supervised=self._bits(self._supervised, chosen),
        )

    def _bits(self, packed: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.unpackbits(packed[chosen], axis=1, count=self.seq_len, bitorder="little").astype(bool)

    def tokenizer(self) -> Any:
        """The tokenizer the rows were made with.

        Raises:
            SourceError: the copy in the folder is missing or is another tokenizer.
        """
        opened = vocab.load_tokenizer(self.path / "tokenizer")
        if (found := vocab.fingerprint(opened)) != self.tokenizer_hash:
            raise SourceError(
                f"{self.path}/tokenizer has hash {found[:12]}, the rows were made with "
                f"{self.tokenizer_hash[:12]}; {_AGAIN}"
            )
        return opened

    def verify(self) -> None:
        """Read everything once and compare with the fingerprint.

        Raises:
            SourceError: a byte of the arrays differs from what was packed.
        """
        found = fingerprint_of(self.path, self.split, self.seq_len, self.tokenizer_hash)
        if found != self.fingerprint:
            raise SourceError(
                f"{self.path}: the {self.split} rows have fingerprint {found[:12]}, the manifest says "
                f"{self.fingerprint[:12]}; a file changed after packing, {_AGAIN}"
            )

    def close(self) -> None:
        """Let the mapped files go; the reader cannot be used afterwards."""
        del self._ids, self._starts, self._supervised

    def __enter__(self) -> RowsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowsReader, (self.path, self.split)  # a worker process maps the files itself


def size_without_padding(input_ids: np.ndarray, supervised: np.ndarray, eos: int | None) -> int:
    """Tokens of a row up to the last that is learnt or is no EOS: what comes behind it fills the row."""
    padding = (input_ids == (-1 if eos is None else eos)) & ~supervised
    return int(np.flatnonzero(~padding).max(initial=-1)) + 1


def describe_rows(reader: RowsReader) -> dict[str, Any]:
    """What a cache records of the rows that it was made from."""
    manifest = reader.manifest
    like = {"like": manifest["splits"][reader.split]["like"]} if "like" in manifest else {}
    return like | {
        "fingerprint": reader.fingerprint,
        "split": reader.split,
        "source": manifest["source"],
        "packing": manifest["packing"],
        "seed": manifest["seed"],
        "document_mask": manifest["document_mask"],
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder of rows.

    Raises:
        SourceError: there is none, it is damaged, or it belongs to something else.
        VersionError: rows of a newer sparsekd.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "holds no packed rows (no manifest.json)" if path.is_dir() else "does not exist"
        raise SourceError(f"{path} {what}; make packed rows with `sparsekd pack`") from None
    except NotADirectoryError:
        raise SourceError(f"{path} is a file; give a folder that `sparsekd pack` wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}/manifest.json cannot be read ({error}); {_AGAIN}") from error
    kind = manifest.get("format") if isinstance(manifest, dict) else None
    if kind != FORMAT:
        raise SourceError(f"{path} holds {kind!r}, not {FORMAT!r}; give a folder that `sparsekd pack` wrote")
    version = manifest.get("format_version")
    if not isinstance(version, int):
        raise SourceError(f"{path}/manifest.json has format_version {version!r}, a number is needed; {_AGAIN}")
    if version > FORMAT_VERSION:
        raise VersionError(
            f"{path} was written by a newer sparsekd (format {version}, this one reads {FORMAT_VERSION}); "
            "upgrade sparsekd"
        )
    return manifest


def fingerprint_of(folder: Path, name: str, seq_len: int, tokenizer_hash: str) -> str:
    """sha256 (hex) over what the rows mean (tokenizer, packing, length) and their three arrays' files."""
    meaning = [FORMAT, FORMAT_VERSION, PACKING, "none", seq_len, tokenizer_hash]
    digest = hashlib.sha256(json.dumps(meaning).encode())
    for kind in ("ids", "starts", "supervised"):
        with open(folder / f"{name}_{kind}.npy", "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
