"""What storage costs: bytes per token, encode and decode rate per codec, one random row.

    python benchmarks/cache.py [--vocab 128256] [--rounds 50] [--tokens 65536]

One process, one thread. Targets are draws from a Zipf law whose exponent varies by position, so that a position keeps
about a dozen ids, as the paper reports; they are not a language model's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord
from sparsekd.codec import CODECS, FlatTargets, Importance, codec_spec, decode_row, encode_row
from sparsekd.errors import RecipeError
from sparsekd.order import permute

SEQ_LEN = 4096


def draw_targets(rng: np.random.Generator, positions: int, vocab: int, rounds: int) -> FlatTargets:
    """Counts of `rounds` draws per position from 1 / rank^s, s in 1.2 .. 2.6, ranks shuffled over the ids."""
    exponents = rng.uniform(1.2, 2.6, size=(positions, 1))
    ranks = np.floor(rng.random((positions, rounds)) ** (-1 / (exponents - 1))).clip(1, vocab) - 1
    ids = permute(ranks.astype(np.int64), vocab, seed=0)
    keys, counts = np.unique(ids + np.arange(positions)[:, None] * vocab, return_counts=True)
    return FlatTargets(
        ids=(keys % vocab).astype(np.uint32),
        values=counts.astype(np.uint32),
        sizes=np.bincount(keys // vocab, minlength=positions).astype(np.int64),
        rounds=rounds,
    )


def best_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """The quickest of some runs: on a shared machine the others measure the neighbours."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def as_held(flat: FlatTargets, holds: str) -> FlatTargets:
    """The same targets as counts, as weights, or as draws whose p is their share."""
    if holds == "weights":
        return replace(flat, values=flat.weights, rounds=None)
    if holds == "counts":
        return flat
    entropy = np.full(len(flat.sizes), 3.0, np.float32)
    return replace(flat, importance=Importance(log2_p=np.log2(flat.weights), entropy=entropy, temperature=0.8))


def measure(name: str, records: list[RowRecord], vocab: int, rounds: int) -> str:
    """One row of the table."""
    spec: dict[str, object] = codec_spec(name, logit_width=vocab, rounds=rounds, temperature=0.8)
    flats = [as_held(each.targets, CODECS[name].holds) for each in records]
    records = [replace(each, targets=flat) for each, flat in zip(records, flats, strict=True)]
    args = [(each.input_ids, each.targets, each.supervised, spec) for each in records]
    blocks = [encode_row(*each) for each in args]
    tokens = len(records) * SEQ_LEN
    encoding = best_seconds(lambda: [encode_row(*each) for each in args])
    masks = [each.supervised for each in records]
    decoding = best_seconds(lambda: [decode_row(b, SEQ_LEN, m, spec) for b, m in zip(blocks, masks, strict=True)])
    size = sum(map(len, blocks)) / tokens
    cells = f"{tokens / encoding / 1e6:>14.1f} {tokens / decoding / 1e6:>14.1f}"
    return f"{name:<9} {size:>11.1f} {cells} {read_microseconds(records, spec, vocab):>16.0f}"


def read_microseconds(records: list[RowRecord], codec: dict[str, object], vocab: int) -> float:
    """Median time of one random row through CacheReader.flat: file, checksum and decoding (warm page cache)."""
    shape = {"rows": len(records), "seq_len": SEQ_LEN, "shard_rows": 8, "logit_width": vocab}
    spec = CacheSpec(**shape, codec=codec, sampler={}, teacher={}, tokenizer={}, data={})  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter(folder, spec)
        for shard in range(spec.shards):
            writer.write(shard, [records[row] for row in spec.shard_range(shard)])
        writer.finalize()
        with CacheReader(folder) as reader:
            order = permute(np.arange(200) % len(reader), len(reader), seed=1).tolist()
            times = [best_seconds(partial(reader.flat, row), 1) for row in order]
    return float(np.median(times[20:])) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=65_536)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    supervised = np.ones(SEQ_LEN, bool)
    records = [
        RowRecord(
            input_ids=rng.integers(options.vocab, size=SEQ_LEN),
            targets=draw_targets(rng, SEQ_LEN - 1, options.vocab, options.rounds),
            starts=np.arange(SEQ_LEN) == 0,
            supervised=supervised,
        )
        for _ in range(max(1, options.tokens // SEQ_LEN))
    ]
    pairs = np.mean([len(each.targets.ids) / (SEQ_LEN - 1) for each in records])
    print(
        f"{len(records)} rows of {SEQ_LEN} tokens, V={options.vocab}, N={options.rounds}, {pairs:.1f} ids per position"
    )
    print("codec     bytes/token encode Mtok/s  decode Mtok/s  random row (µs)")
    for name in CODECS:
        try:
            print(measure(name, records, options.vocab, options.rounds))
        except RecipeError as error:
            print(f"{name:<9} {error}")


if __name__ == "__main__":
    main()
