"""Sets of a vocabulary's tokens that a cache's ids may stand for, kept beside its shards as `sets.safetensors`.

With V tokens and S sets, an id below V is a token, V + s the set s, and V + S + s the set s as a condition: its weight
counts as negative (see `prefix_sets`). Set s is `order[first[s] : last[s]]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, MismatchError, SourceError
from .files import join, read_file, write_atomically

Array = NDArray[Any]

FILE = "sets.safetensors"
_NAMES = ("order", "first", "last")


@dataclass(frozen=True, kw_only=True, slots=True)
class SetTable:
    """S sets of a vocabulary.

    Attributes:
        vocab_size: V.
        order: [M] int64 tokens; sets that lie inside one another share them.
        first, last: [S] int64.
    """

    vocab_size: int
    order: Array
    first: Array
    last: Array

    def __len__(self) -> int:
        return len(self.first)

    def data(self) -> bytes:
        """The file: three int32 arrays, equal for equal tables."""
        from safetensors.numpy import save

        found: bytes = save({name: getattr(self, name).astype(np.int32) for name in _NAMES})
        return found

    def described(self) -> dict[str, Any]:
        """What a cache's `data.transcoded.sets` says of its table."""
        sha256 = hashlib.sha256(self.data()).hexdigest()
        return {"vocab_size": self.vocab_size, "count": len(self), "sha256": sha256}

    def width(self) -> int:
        """Ids in all: tokens, sets, and sets as conditions."""
        return self.vocab_size + 2 * len(self)

    def members(self, index: int) -> Array:
        """The tokens of a set."""
        found: Array = self.order[self.first[index] : self.last[index]]
        return found


def write_table(table: SetTable, folder: str | Path) -> None:
    """Put the table into a cache's folder; every worker writes the same bytes."""
    write_atomically(Path(folder) / FILE, table.data())


def read_table(folder: str | Path, described: Mapping[str, Any]) -> SetTable:
    """The table of a cache, which is the one that its header describes.

    Raises:
        SourceError: there is none.
        MismatchError: another one.
        FormatError: arrays that are no table.
    """
    path = join(folder, FILE)
    try:
        data = read_file(path)
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing: the sets that the cache's ids stand for; transcode again") from error
    if (found := hashlib.sha256(data).hexdigest()) != described.get("sha256"):
        raise MismatchError(
            f"{path} has sha256 {found[:12]}, the cache was made with {str(described.get('sha256'))[:12]}; put that "
            "one there, or transcode again"
        )
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except SafetensorError as error:
        raise FormatError(f"{path} is no table of sets ({error}); transcode again") from None
    size, count = described.get("vocab_size"), described.get("count")
    if set(arrays) != set(_NAMES) or not isinstance(size, int) or not isinstance(count, int):
        raise FormatError(f"{path} is no table of sets; transcode again")
    table = SetTable(vocab_size=size, **{name: arrays[name].astype(np.int64) for name in _NAMES})
    _check(table, count, path)
    return table


def _check(table: SetTable, count: int, path: str) -> None:
    shapes = table.first.shape == table.last.shape == (count,) and table.order.ndim == 1
    tokens = shapes and bool(((table.order >= 0) & (table.order < table.vocab_size)).all())
    if not (tokens and ((table.first >= 0) & (table.first < table.last) & (table.last <= len(table.order))).all()):
        raise FormatError(f"{path} has sets beyond its {len(table.order)} places, or tokens beyond its vocabulary")


def joined(tables: list[SetTable]) -> SetTable:
    """One table of several of the same vocabulary: set s of the i-th is set s + (the sets before it)."""
    places = np.cumsum([0, *(len(table.order) for table in tables)])
    return SetTable(
        vocab_size=tables[0].vocab_size,
        order=np.concatenate([table.order for table in tables]),
        first=np.concatenate([table.first + at for table, at in zip(tables, places, strict=False)]),
        last=np.concatenate([table.last + at for table, at in zip(tables, places, strict=False)]),
    )
