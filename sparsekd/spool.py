"""Tokenised documents on disk between reading and packing, so that memory does not grow with the corpus.

Three files in a scratch folder, deleted when the rows are written:

    tokens   <u4 per token: the id, bit 31 = supervised, bit 30 = a document begins here
    index    one ENTRY per document
    SPLIT    <u8 per document of that split: its number in the index
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import SourceError
from .order import permute

SUPERVISED = np.uint32(1 << 31)
STARTS = np.uint32(1 << 30)
ID_MASK = np.uint32((1 << 30) - 1)
ENTRY = np.dtype([("offset", "<u8"), ("tokens", "<u8"), ("bytes", "<u8"), ("supervised_bytes", "<u8"), ("hash", "<u8")])
_CHUNK = 1 << 16  # documents looked at together


@dataclass(frozen=True, kw_only=True, slots=True)
class SpooledDocument:
    """A document that enters the spool: ids [T] uint32, supervised [T] bool (T >= 1), and what splits need."""

    ids: np.ndarray
    supervised: np.ndarray
    bytes: int
    supervised_bytes: int
    hash: int


def content_hash(content: bytes, seed: int) -> int:
    """64 bits of a keyed hash: equal documents get equal bits, so a split by it never parts duplicates."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def write(folder: Path, documents: Iterable[SpooledDocument]) -> int:
    """Append all documents; returns their number."""
    offset = count = 0
    with open(folder / "tokens", "wb") as tokens, open(folder / "index", "wb") as index:
        for document in documents:
            flagged = document.ids | np.where(document.supervised, SUPERVISED, np.uint32(0))
            flagged[0] |= STARTS
            tokens.write(flagged.astype("<u4").tobytes())
            size = len(flagged)
            entry = (offset, size, document.bytes, document.supervised_bytes, document.hash)
            index.write(np.array(entry, ENTRY).tobytes())
            offset, count = offset + size, count + 1
    return count


def split(folder: Path, heldout: float) -> dict[str, int]:
    """Write the document numbers of each split; returns the documents per split that is not empty.

    A document is held out iff its hash falls into the lowest `heldout` share of all hashes; when none does,
    the document with the smallest hash is taken. Equal documents share a hash and so a split.

    Raises:
        SourceError: a split would be empty.
    """
    hashes = np.memmap(folder / "index", ENTRY, "r")["hash"]
    limit = int(heldout * 2**64)  # below 2^64, for heldout < 1
    if heldout > 0:
        limit = max(limit, int(hashes.min()) + 1)
    counts = {"train": 0, "heldout": 0}
    with open(folder / "train", "wb") as train, open(folder / "heldout", "wb") as held:
        for first in range(0, len(hashes), _CHUNK):
            is_held = hashes[first : first + _CHUNK] < limit
            for file, name, chosen in ((train, "train", ~is_held), (held, "heldout", is_held)):
                numbers = first + np.flatnonzero(chosen)
                file.write(numbers.astype("<u8").tobytes())
                counts[name] += len(numbers)
    if not counts["train"]:
        raise SourceError(_no_training(len(hashes), heldout))
    return {name: count for name, count in counts.items() if count}


def _no_training(documents: int, heldout: float) -> str:
    return (
        f"heldout={heldout} leaves no document to train on: the source holds {documents}, and equal "
        "documents stay in one split; set heldout=0, give more documents, or cut files with text_by=paragraph"
    )


def totals(folder: Path, name: str) -> dict[str, int]:
    """Documents, tokens, bytes and supervised_bytes of a split."""
    index = np.memmap(folder / "index", ENTRY, "r")
    numbers = np.memmap(folder / name, "<u8", "r")
    sums: dict[str, int] = dict.fromkeys(("tokens", "bytes", "supervised_bytes"), 0)
    for first in range(0, len(numbers), _CHUNK):
        entries = index[numbers[first : first + _CHUNK]]
        for key in sums:
            sums[key] += int(entries[key].sum())
    return {"documents": len(numbers), **sums}


def read(folder: Path, name: str, seed: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint32]]]:
    """The flagged tokens of each document of a split, in the order that (seed, number of documents) gives.

    Read by seeking, not by mapping: mapped pages would count as this process's memory.
    """
    index = np.memmap(folder / "index", ENTRY, "r")
    numbers = np.memmap(folder / name, "<u8", "r")
    with open(folder / "tokens", "rb") as tokens:
        for first in range(0, len(numbers), _CHUNK):
            wanted = np.arange(first, min(first + _CHUNK, len(numbers)))
            for entry in index[numbers[permute(wanted, len(numbers), seed)]]:
                tokens.seek(4 * int(entry["offset"]))
                yield np.frombuffer(tokens.read(4 * int(entry["tokens"])), "<u4")
