"""What reading a cache costs: shuffled batches to ready tensors, one random row, finding a row among 10^9, waiting.

    python benchmarks/reading.py [CACHE] [--vocab 128256] [--rounds 5]

Tokens per second of one core (CPU seconds, warm page cache) through CacheDataset and SparseKDCollator, in batches of 8
rows of 4,096 tokens with about 15 ids each, beside the same targets as Parquet lists and as a `datasets` table where
those packages are. The wait is what a training step finds left to do when it asks for its next batch: the demo's
student, 16 rows of 128 tokens, through a torch DataLoader. The last line is JSON.

Of a CACHE: its own epoch in batches of 16 rows, each batch at once and row by row, and through a DataLoader what a
batch costs this process and its workers, without any and with two. Nothing else.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from cache import draw_targets
from timing import alternating, machine, medians

import sparsekd as skd
from sparsekd import compiled, models
from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord
from sparsekd.codec import codec_spec
from sparsekd.order import permute

SEQ_LEN, BATCH, DRAWS = 4096, 8, 50


def make_records(rows: int, seq_len: int, vocab: int) -> list[RowRecord]:
    numbers, everywhere = np.random.default_rng(0), np.ones(seq_len, bool)
    return [
        RowRecord(
            input_ids=numbers.integers(vocab, size=seq_len),
            targets=draw_targets(numbers, seq_len - 1, vocab, DRAWS),
            starts=~everywhere,
            supervised=everywhere,
        )
        for _ in range(rows)
    ]


def write_cache(folder: Path, records: list[RowRecord], vocab: int, codec: str) -> CacheReader:
    spec = CacheSpec(
        rows=len(records),
        seq_len=len(records[0].input_ids),
        shard_rows=8,
        logit_width=vocab,
        codec=codec_spec(codec, logit_width=vocab, rounds=DRAWS),
        sampler={},
        teacher={},
        tokenizer={},
        data={},
    )
    writer = CacheWriter(folder, spec)
    for shard in range(spec.shards):
        writer.write(shard, [records[row] for row in spec.shard_range(shard)])
    writer.finalize()
    return CacheReader(folder)


def epoch(rows: CacheReader, batch: int = BATCH):
    """A shuffled epoch to ready tensors, without the thread that reads ahead: one core does it all."""
    collate = skd.SparseKDCollator()
    dataset = skd.CacheDataset(rows, seed=0)
    dataset.collator = collate  # as from the second batch on
    for start in range(0, len(rows), batch):
        collate(dataset._items(0, range(start, min(start + batch, len(rows)))))


def row_by_row(rows: CacheReader, batch: int):
    """`epoch`, as it is where a codec has no way for many rows."""
    with patch.object(CacheReader, "padded", lambda *_: None):
        epoch(rows, batch)


def report_cache(path: str, rounds: int) -> None:
    with CacheReader(path) as rows:
        runs = {"a batch at once": lambda: epoch(rows, 16), "row by row": lambda: row_by_row(rows, 16)}
        for name, spent in medians(alternating(runs, rounds)).items():
            print(f"{name:<18}{rows.stats['tokens'] / spent / 1e6:>6.2f} M tokens/s to ready tensors")
        for workers in (0, 2) * rounds:
            own, theirs = loader_microseconds(rows, 16, workers)
            print(
                f"DataLoader, {workers} worker processes: {own:6.0f} µs of CPU a batch here, {theirs:6.0f} µs in them"
            )


def loader_microseconds(rows: CacheReader, batch: int, workers: int) -> tuple[float, float]:
    """CPU time of a batch in this process and in worker processes, from their start to their end, over two epochs."""

    def spent() -> tuple[float, float]:
        theirs = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time(), theirs.ru_utime + theirs.ru_stime

    dataset = skd.CacheDataset(rows, seed=0)
    before, count = spent(), 0
    for _ in range(2):
        for _ in torch.utils.data.DataLoader(dataset, batch, collate_fn=skd.SparseKDCollator(), num_workers=workers):
            count += 1
    own, theirs = (1e6 * (now - then) / count for now, then in zip(spent(), before, strict=True))
    return own, theirs


def peers(folder: Path, records: list[RowRecord]) -> dict[str, object]:
    """The same epoch from list columns, read as their users do: a batch of rows, then padded tensors."""
    try:
        import datasets
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return {}
    ends = [np.concatenate([[0], np.cumsum(each.targets.sizes)]).astype(np.int32) for each in records]
    columns = {
        name: pa.array(
            [
                [v.tolist() for v in np.split(getattr(each.targets, name), end[1:-1])]
                for each, end in zip(records, ends, strict=True)
            ],
            pa.list_(pa.list_(pa.uint32())),
        )
        for name in ("ids", "values")
    }
    table = pa.table({"input_ids": pa.array([each.input_ids for each in records]), **columns})
    pq.write_table(table, folder / "rows.parquet", row_group_size=1)
    file, hub = pq.ParquetFile(folder / "rows.parquet"), datasets.Dataset(table)
    order = permute(np.arange(len(records)), len(records), seed=0)

    def pad(lists: pa.ListArray) -> torch.Tensor:
        inner = lists.values
        flat, sizes = inner.values.to_numpy(), np.diff(inner.offsets.to_numpy())
        kept = np.arange(sizes.max()) < sizes[:, None]
        padded = np.zeros(kept.shape, np.int64)
        padded[kept] = flat[inner.offsets.to_numpy()[0] :][: kept.sum()]
        return torch.from_numpy(padded)

    def parquet() -> None:
        for start in range(0, len(order), BATCH):
            rows = file.read_row_groups(order[start : start + BATCH].tolist()).combine_chunks()
            torch.from_numpy(rows["input_ids"].chunk(0).values.to_numpy().copy())
            for name in ("ids", "values"):
                pad(rows[name].chunk(0))

    arrow = hub.with_format("arrow")

    def hub_arrow() -> None:
        for start in range(0, len(order), BATCH):
            rows = arrow[order[start : start + BATCH].tolist()].combine_chunks()
            torch.from_numpy(rows["input_ids"].chunk(0).values.to_numpy().copy())
            for name in ("ids", "values"):
                pad(rows[name].chunk(0))

    return {"Parquet lists": parquet, "datasets, Arrow lists": hub_arrow}


def row_microseconds(rows: CacheReader) -> dict[str, float]:
    """Median wall time of one random row: bytes and checksum alone, and decoded."""
    order = permute(np.arange(400) % len(rows), len(rows), seed=1).tolist()
    shard_rows, spent = rows.spec.shard_rows, {"before decoding": [], "decoded": []}
    for row in order:
        shard = rows._shard(row // shard_rows)
        begin = time.perf_counter()
        shard.read_row(row % shard_rows)
        middle = time.perf_counter()
        rows.flat(row)
        spent["before decoding"].append(middle - begin)
        spent["decoded"].append(time.perf_counter() - middle)
    return {name: 1e6 * statistics.median(each[50:]) for name, each in spent.items()}


def order_microseconds(rounds: int) -> dict[str, float]:
    """To find the 64 rows of a batch anywhere in an epoch: all that resuming takes, by the number of rows."""
    sizes = {f"{size:.0e}": size for size in (10**3, 10**5, 10**7, 10**9)}

    def find(size: int):
        return lambda: permute(np.arange(size - 64, size), size, seed=1, epoch=7)

    found = alternating({name: find(size) for name, size in sizes.items()}, 20 * rounds, time.perf_counter)
    return {name: 1e6 * spent for name, spent in medians(found).items()}


def _as_it_is(batch):
    return batch


def batches(rows: CacheReader, batch: int, name: str):
    """An epoch of one of the ways that `waits` compares, through torch's DataLoader."""
    collate, dataset = skd.SparseKDCollator(), skd.CacheDataset(rows, seed=0)
    if name == "read in the step":
        dataset._read_ahead = lambda read, indices, **_: read(indices)  # type: ignore[assignment]
    if name == "ready in memory":
        ready = collate(dataset._items(0, range(batch)))
        dataset.__class__ = type("Ready", (skd.CacheDataset,), {"__getitems__": lambda *_: ready})
        collate = _as_it_is
    return iter(torch.utils.data.DataLoader(dataset, batch_size=batch, collate_fn=collate))


def waits(folder: Path, turns: int, steps: int = 10) -> dict[str, float]:
    """Share of the time that a step waits for its batch: read ahead, read in the step, and ready all along, some steps
    of each in turn. The last is torch's DataLoader alone, which no way of reading can be faster than.

    A step is forward, backward, clipping and AdamW, as Trainer's: after a backward pass alone, the DataLoader finds
    nothing of its own code in the caches and takes five times as long.
    """
    vocab, seq_len, batch = 1024, 128, 16
    rows = write_cache(folder, make_records(turns * (steps + 1) * batch, seq_len, vocab), vocab, "split")
    model = skd.attach_sparse_kd(models.new_student("tiny", vocab_size=vocab, seq_len=seq_len))
    optimizer = torch.optim.AdamW(model.parameters())
    ways = {name: batches(rows, batch, name) for name in ("read ahead", "read in the step", "ready in memory")}
    spent: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for name, loader in [each for _ in range(turns) for each in ways.items()]:
        for step in range(steps + 1):
            begin = (time.perf_counter(), time.thread_time())
            inputs = next(loader)
            middle = (time.perf_counter(), time.thread_time())
            model(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            end = (time.perf_counter(), time.thread_time())
            if step:  # before the first, other ways' steps have gone by
                spent[name].append(tuple(m - b for b, m in zip(begin * 2, middle + end, strict=True)))
    shares = {}
    for name, each in spent.items():
        # Medians: on a busy machine a thread that is not scheduled looks like one that waits.
        wall, work, all_wall, all_work = map(statistics.median, zip(*each, strict=True))
        shares |= {f"{name}, wall": wall / all_wall, f"{name}, CPU of the training thread": work / all_work}
        shares |= {f"{name}, µs a batch": 1e6 * work, f"{name}, ms a step": 1e3 * all_work}
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", nargs="?")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    # As in a process that has read a million tokens: before that numba is not waited for.
    steady = patch.object(compiled, "kernels", lambda values=0: compiled.load())
    if a.cache:
        with steady:
            report_cache(a.cache, a.rounds)
        return
    with tempfile.TemporaryDirectory() as name, steady:
        folder = Path(name)
        records = make_records(2 * BATCH, SEQ_LEN, a.vocab)
        caches = {codec: write_cache(folder / codec, records, a.vocab, codec) for codec in ("raw24", "split")}
        runs = {codec: (lambda rows=rows: epoch(rows)) for codec, rows in caches.items()} | peers(folder, records)
        seconds = medians(alternating(runs, a.rounds))
        result = {
            "machine": machine(),
            "tokens_per_second": {each: len(records) * SEQ_LEN / spent for each, spent in seconds.items()},
            "row_us": {codec: row_microseconds(rows) for codec, rows in caches.items()},
            "order_us": order_microseconds(a.rounds),
            "waits": waits(folder / "small", 4),
        }
    print("to ready tensors, M tokens a second and core")
    for each, rate in result["tokens_per_second"].items():
        print(f"  {each:<28}{rate / 1e6:>8.2f}")
    for codec, spent in result["row_us"].items():
        print(
            f"random row, {codec}: {spent['before decoding']:.0f} µs before decoding, {spent['decoded']:.0f} µs decoded"
        )
    print("64 rows of an epoch found, µs: " + ", ".join(f"{k} rows {v:.0f}" for k, v in result["order_us"].items()))
    print(
        "share of the time that a step waits: "
        + ", ".join(f"{k} {v:.2%}" for k, v in result["waits"].items() if "a step" not in k and "a batch" not in k)
    )
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
