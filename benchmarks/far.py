"""Training from a cache behind a network: tokens per second to ready tensors where each request takes a while.

    python benchmarks/far.py CACHE [--milliseconds 30] [--batch 32] [--steps 10]

An fsspec file system of the kind that s3:// and hf:// are, over local files, answers each request after that time,
however many are under way. Wall seconds, without the thread that reads ahead. Rows are asked for a batch at once, and
one by one as a loop over the reader does. The first batch opens its shards; it is counted apart.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

import sparsekd as skd
from sparsekd.cache import CacheReader


class Far(AsyncFileSystem):
    """far:///folder/file is a local file, after `wait` seconds; `most` is how many requests were under way at once."""

    protocol, cachable = "far", False
    wait, under_way, most = 0.03, 0, 0

    async def _after(self, work: Any) -> Any:
        Far.under_way += 1
        Far.most = max(Far.most, Far.under_way)
        await asyncio.sleep(Far.wait)
        Far.under_way -= 1
        return work()

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": await self._after(Path(path).stat) and Path(path).stat().st_size}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return await self._after(lambda: Path(path).read_bytes()[start:end])

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        names = await self._after(lambda: [str(each) for each in Path(path).iterdir()])
        return [{"name": name, "type": "file"} for name in names] if detail else names


fsspec.register_implementation("far", Far, clobber=True)


def seconds(reader: CacheReader, batch: int, steps: int, together: bool) -> tuple[float, float]:
    """Of the first batch, and of the others."""
    data, collate = skd.CacheDataset(reader, seed=0), skd.SparseKDCollator()
    data.collator = collate if together else None
    spent = []
    for step in range(steps):
        begin, numbers = time.perf_counter(), range(step * batch, (step + 1) * batch)
        collate(data._items(0, numbers) if together else [data[number] for number in numbers])
        spent.append(time.perf_counter() - begin)
    return spent[0], sum(spent[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache")
    for name, value in (("milliseconds", 30.0), ("batch", 32), ("steps", 10)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    a = parser.parse_args()
    Far.wait = a.milliseconds / 1000
    for together in (True, False):
        with CacheReader(f"far://{Path(a.cache).resolve()}") as reader:
            first, others = seconds(reader, a.batch, a.steps, together)
            tokens = a.batch * (a.steps - 1) * reader.spec.seq_len
        name = "a batch at once" if together else "row by row"
        print(f"{name:<18}{tokens / others / 1e3:>10.1f} k tokens/s; the first batch took {first:.1f} s")


if __name__ == "__main__":
    main()
