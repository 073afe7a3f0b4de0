"""What makers of caches do beside writing shards: how many there are, which shards are asked for, and the tokenizer
that goes along."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from .errors import RecipeError


def processes() -> int:
    """How many work together: as many as torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def parse_shard_range(text: str | None, shards: int) -> range:
    """ "a:b" as the shards a .. b-1, None as all of them; RecipeError for a range beyond the cache's."""
    if text is None:
        return range(shards)
    first, separator, last = text.partition(":")
    with suppress(ValueError):
        start, stop = int(first or 0), int(last or shards)
        if separator and 0 <= start < stop <= shards:
            return range(start, stop)
    raise RecipeError(f"shard_range={text!r} is not a:b with 0 <= a < b <= {shards} (the cache has {shards} shards)")


def copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer travels with the cache, so that it can be read as text and fit to a student: all of it or none."""
    if (out / "tokenizer").is_dir() or not (source / "tokenizer").is_dir():
        return
    temporary = out / f".tokenizer-{os.getpid()}.tmp"
    shutil.copytree(source / "tokenizer", temporary, dirs_exist_ok=True)
    try:
        temporary.rename(out / "tokenizer")
    except OSError:  # another worker was faster
        shutil.rmtree(temporary, ignore_errors=True)
