"""What a cache costs in each codec, counts beside the entropy of their data: bytes per token and rates, in one run.

    python benchmarks/codec.py [CACHE] [--rows 0] [--seq-len 0] [--rounds 50]

Without a cache, a small language model is trained on the standard library's source text (V = 8,192, a few minutes) and
its draws are taken (--rounds of them). Bytes and the first two rates are those of the targets; "row" has whole rows,
input ids and ids by rank included. Decoding is to the flat arrays of a row, each let go before the next; "16 dec"
decodes 16 rows by one call into memory used again, "16 padded" goes on to padded arrays; a codec without such a call
takes them one by one. Where the extra `fast` is installed, what it compiles has lines of its own.

Of a cache of weights (a transcoded or pooled one) there is no floor, and rounding is part of the cost: "rounding" is
the squared error that a codec adds, over Σ w².

The floor is that of a model which knows, as empirical frequencies of this very data: how often each partition of N into
counts occurs, and how often each id does; ids of one count of a position are a set. A position with groups of g_1, g_2,
... ids costs -log2 P(partition) + Σ -log2 P(id) - Σ log2 g_i! bits. A code that knows more (the token before, say) can
be smaller; these codecs do not.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from math import lgamma, log
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsekd import compiled
from sparsekd.cache import CacheReader, RowRecord
from sparsekd.codec import (
    CODECS,
    COUNTS,
    WEIGHTS,
    FlatTargets,
    codec_spec,
    decode,
    decode_row,
    decode_rows,
    encode,
    encode_row,
)
from sparsekd.codec_ints import zstd_version
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.id_ranks import id_ranks
from sparsekd.padded import pad_joined, pad_rows

REPEATS, BATCH = 5, 16


def best_seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """CPU time of the quickest of some runs: on a shared machine wall time measures the neighbours."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return min(seconds)


# --- the floor ------------------------------------------------------------------------------------------


def floor_bytes(flat: FlatTargets) -> tuple[float, float]:
    """Bytes per position of the partitions, and of the ids as sets, under the model above."""
    assert flat.rounds is not None
    order = np.lexsort((flat.ids, -flat.values.astype(np.int64), flat.positions))
    ids, counts = flat.ids[order], flat.values[order]
    ends = np.cumsum(flat.sizes)
    partitions: dict[bytes, int] = {}
    for begin, end in zip(ends - flat.sizes, ends, strict=True):
        key = counts[begin:end].tobytes()
        partitions[key] = partitions.get(key, 0) + 1
    uses = np.array(list(partitions.values()))
    of_ids = np.bincount(ids)[ids]
    _, groups = np.unique(flat.positions * (flat.rounds + 1) + counts, return_counts=True)
    sets = sum(lgamma(g + 1) * n for g, n in zip(*np.unique(groups, return_counts=True), strict=True)) / log(2)
    bits = -(uses * np.log2(uses / uses.sum())).sum(), -np.log2(of_ids / len(ids)).sum() - sets
    return bits[0] / 8 / len(flat.sizes), bits[1] / 8 / len(flat.sizes)


# --- codecs ---------------------------------------------------------------------------------------------


def measure_codec(name: str, records: list[RowRecord], width: int) -> list[float]:
    """Bytes per position, Mtokens/s of encoding and decoding targets, of the same for rows, of rows by the batch, as
    they are and padded, and bytes per token with input ids."""
    spec = codec_spec(name, logit_width=width, rounds=records[0].targets.rounds)
    ranked = id_ranks([r.targets for r in records], width) if CODECS[name].ranked else None
    ranks, ids, table = (ranked.ranks, ranked.ids, len(ranked.table)) if ranked else (None, None, 0)
    flats = [r.targets for r in records] if ranks is None else [_renamed(r.targets, ranks) for r in records]
    blocks = [encode(flat, spec) for flat in flats]
    sizes = [len(flat.sizes) for flat in flats]
    tokens = sum(sizes)
    encoding = best_seconds(lambda: [encode(flat, spec) for flat in flats])
    decoding = best_seconds(lambda: [len(decode(b, n, spec).ids) for b, n in zip(blocks, sizes, strict=True)])
    rows = [encode_row(r.input_ids, r.targets, r.supervised, spec, ranks) for r in records]
    row_encoding = best_seconds(
        lambda: [encode_row(r.input_ids, r.targets, r.supervised, spec, ranks) for r in records]
    )
    row_decoding = best_seconds(lambda: all(_row(row, r, spec, ids) for row, r in zip(rows, records, strict=True)))
    for row, record in zip(rows, records, strict=True):
        _check(decode_row(row, len(record.input_ids), record.supervised, spec, ids), record)
    batches = [
        (rows[begin : begin + BATCH], np.stack([r.supervised for r in records[begin : begin + BATCH]]))
        for begin in range(0, len(rows), BATCH)
    ]
    together = best_seconds(lambda: all(_decode_batch(*each, spec, ids)[0] is not None for each in batches))
    padding = best_seconds(lambda: all(len(_pad_batch(*each, spec, ids)) == 2 for each in batches))
    whole = (sum(map(len, rows)) + table) / sum(len(r.input_ids) for r in records)
    rates = [tokens / seconds / 1e6 for seconds in (encoding, decoding, row_encoding, row_decoding, together, padding)]
    return [(sum(map(len, blocks)) + table) / tokens, *rates, whole]


def _row(row: bytes, record: RowRecord, spec: dict, ids: np.ndarray | None) -> bool:
    return len(decode_row(row, len(record.input_ids), record.supervised, spec, ids)[0]) > 0


def _decode_batch(rows: list[bytes], supervised: np.ndarray, spec: dict, ids: np.ndarray | None) -> tuple:
    """Input ids and targets of all rows, or a list of those of each."""
    found = decode_rows(rows, supervised, spec, [ids] * len(rows), compiled.scratch)
    return found or list(
        zip(*(decode_row(row, len(m), m, spec, ids) for row, m in zip(rows, supervised, strict=True)), strict=True)
    )


def _pad_batch(rows: list[bytes], supervised: np.ndarray, spec: dict, ids: np.ndarray | None) -> tuple:
    flats, places = _decode_batch(rows, supervised, spec, ids)[1], np.ascontiguousarray(supervised[:, 1:])
    return pad_joined(flats, places) if isinstance(flats, FlatTargets) else pad_rows(flats, places)


def _renamed(flat: FlatTargets, ranks: np.ndarray) -> FlatTargets:
    return replace(flat, ids=ranks[flat.ids])


def _check(found: tuple[np.ndarray, FlatTargets], record: RowRecord) -> None:
    """A figure of a codec that loses a count or an id would be none; weights may err by 9 %, as `prob24` says."""
    assert (found[0] == record.input_ids).all()
    pairs = [(f.values[o], (f.positions[o] << 20) + f.ids[o]) for f in (found[1], record.targets) for o in [_by_id(f)]]
    assert (pairs[0][1] == pairs[1][1]).all()
    np.testing.assert_allclose(pairs[0][0], pairs[1][0], rtol=0 if record.targets.rounds else 0.09)


def _by_id(flat: FlatTargets) -> np.ndarray:
    return np.lexsort((flat.ids, flat.positions))


def rounding(name: str, records: list[RowRecord], width: int) -> float:
    """Squared error of a codec of weights over the sum of their squares."""
    flat = FlatTargets.join([record.targets for record in records])
    spec = codec_spec(name, logit_width=width, rounds=None)
    found = decode(encode(flat, spec), len(flat.sizes), spec)
    off = found.values[_by_id(found)].astype(np.float64) - flat.values[_by_id(flat)]
    return float((off**2).sum() / (flat.values.astype(np.float64) ** 2).sum())


def measure_parquet(records: list[RowRecord], row_groups: bool) -> tuple[float, float, float]:
    """Two list columns (ids, counts or weights), zstd-3: bytes per position, Mtokens/s both ways, to flat arrays and
    offsets."""
    flat = FlatTargets.join([record.targets for record in records])
    small = flat.rounds is not None and int(flat.values.max()) < 256
    counts = flat.values.astype(np.uint8) if small else flat.values
    offsets = np.concatenate([[0], np.cumsum(flat.sizes)]).astype(np.int32)

    def write() -> bytes:
        lists = {n: pa.ListArray.from_arrays(offsets, a) for n, a in (("ids", flat.ids), ("counts", counts))}
        buffer = io.BytesIO()
        size = len(records[0].targets.sizes) if row_groups else None
        pq.write_table(pa.table(lists), buffer, compression="zstd", compression_level=3, row_group_size=size)
        return buffer.getvalue()

    def read() -> list[np.ndarray]:
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        columns = [table[name].combine_chunks() for name in ("ids", "counts")]
        return [columns[0].flatten().to_numpy(), columns[1].flatten().to_numpy(), columns[0].offsets.to_numpy()]

    data = write()
    tokens = len(flat.sizes)
    return len(data) / tokens, tokens / best_seconds(write) / 1e6, tokens / best_seconds(read) / 1e6


# --- data -----------------------------------------------------------------------------------------------


def trained_cache(folder: str, rounds: int) -> str:
    """A cache of draws from a language model that was just trained."""
    from sparsekd.lab import Arm, Lab, LabSettings
    from sparsekd.vocab import quiet_transformers

    quiet_transformers()
    teacher = {"family": "mini", "hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 256}
    settings = LabSettings(
        vocab_size=8192,
        seq_len=256,
        limit_tokens=1_500_000,
        teacher=teacher,
        teacher_steps=300,
        batch_size=8,
        student_rows=256,
    )
    draws = {"name": "random_sampling", "rounds": rounds}
    return Lab(folder, settings).cache(Arm(label="Random sampling", sampler=draws, codec="raw40", train={}))


def cut(records: list[RowRecord], seq_len: int) -> list[RowRecord]:
    """Rows of `seq_len` tokens, cut or joined; a position whose next token is in the next row is left out."""
    found, times = [], seq_len // len(records[0].input_ids)
    if times > 1:
        joined = range(0, len(records) - times + 1, times)
        return [_joined(records[begin : begin + times]) for begin in joined]
    for record in records:
        owners = np.cumsum(record.supervised[1:]) - 1
        for begin in range(0, len(record.input_ids) - seq_len + 1, seq_len):
            inside = slice(begin, begin + seq_len)
            kept = owners[begin : begin + seq_len - 1][record.supervised[begin + 1 : begin + seq_len]]
            found.append(
                RowRecord(
                    input_ids=record.input_ids[inside],
                    targets=record.targets.take(kept),
                    starts=record.starts[inside],
                    supervised=record.supervised[inside],
                )
            )
    return found


def _joined(records: list[RowRecord]) -> RowRecord:
    """One row of some; the first token of each is not learnt."""
    length = len(records[0].input_ids)
    supervised = np.concatenate([record.supervised for record in records])
    supervised[::length] = False
    return RowRecord(
        input_ids=np.concatenate([record.input_ids for record in records]),
        targets=FlatTargets.join([record.targets for record in records]),
        starts=np.concatenate([record.starts for record in records]),
        supervised=supervised,
    )


def report(path: str, most_rows: int, seq_len: int) -> None:
    with CacheReader(path) as reader:
        width = reader.spec.logit_width
        records = [reader.record(row) for row in range(min(len(reader), most_rows or len(reader)))]
    records = cut(records, seq_len) if seq_len else records
    flat = FlatTargets.join([record.targets for record in records])
    if flat.curve is not None or flat.importance is not None:
        raise RecipeError(f"{path} holds neither counts nor weights; give a cache of either")
    counted = flat.rounds is not None
    partition, sets = floor_bytes(flat) if counted else (float("nan"), 0.0)
    floor, paper = partition + sets, 3 * len(flat.ids) / len(flat.sizes)
    print(
        f"{path}: {len(records)} rows of {len(records[0].input_ids)}, {len(flat.sizes):,} positions, "
        f"V={width}, N={flat.rounds}, {len(flat.ids) / len(flat.sizes):.1f} ids per position; "
        f"zstd {zstd_version()}, one thread"
    )
    print(
        f"{'':<31}{'bytes/token':>12}{'/ floor' if counted else 'rounding':>9}{'/ paper':>9}{'enc Mtok/s':>12}"
        f"{'dec Mtok/s':>12}{'row enc':>12}{'row dec':>12}{'16 dec':>12}{'16 padded':>12}{'with input':>12}"
    )

    def line(name: str, size: float, *rates: float, lost: float | None = None) -> None:
        cells = "".join(f"{rate:>12.1f}" for rate in rates)
        second = f"{size / floor:>9.3f}" if lost is None else f"{lost:>9.1e}"
        print(f"{name:<31}{size:>12.2f}{second if counted or lost else '':>9}{size / paper:>9.3f}{cells}")

    if counted:
        line("floor: partition + sets", floor)
    line("the paper's 24-bit pairs", paper)
    for name in [name for name, codec in CODECS.items() if codec.holds == (COUNTS if counted else WEIGHTS)]:
        try:
            lost = None if counted else rounding(name, records, width)
            with patch.object(compiled, "kernels", lambda values=0: None):
                line(name, *measure_codec(name, records, width), lost=lost)
            if compiled.load():
                with patch.object(compiled, "kernels", lambda values=0: compiled.load()):
                    line(f"{name}, compiled", *measure_codec(name, records, width), lost=lost)
        except (RecipeError, MismatchError) as error:
            print(f"{name:<31}{str(error).partition(';')[0]}")
    line("Parquet lists + zstd-3", *measure_parquet(records, row_groups=False))
    line("the same, a group a row", *measure_parquet(records, row_groups=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", nargs="?")
    parser.add_argument("--rows", type=int, default=0, help="at most so many rows (0: all)")
    parser.add_argument("--seq-len", type=int, default=0, help="cut or join rows to this length (0: as they are)")
    parser.add_argument("--rounds", type=int, default=50, help="draws of the model that is trained here")
    options = parser.parse_args()
    if options.cache:
        report(options.cache, options.rows, options.seq_len)
        return
    with tempfile.TemporaryDirectory() as folder:
        report(trained_cache(folder, options.rounds), options.rows, options.seq_len)


if __name__ == "__main__":
    main()
