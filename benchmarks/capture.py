"""What capturing costs beside the teacher: end to end against its bare forward, and what one core codes and writes.

    python benchmarks/capture.py [--teachers 10m,30m,10m:128256] [--vocab 32768] [--rounds 3] [--device cuda]

The bare forward is `model(input_ids).logits` of the same rows in the same batches; capture is all that `sparsekd
capture` does with them: body, head in chunks, 50 draws, coding, checking, writing. CPU seconds of the process, its
writer's included, one thread; on a GPU wall seconds, of a bf16 teacher. Random weights, the head scaled so that a
position keeps a dozen ids or two, as a trained teacher's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from cache import draw_targets
from timing import alternating, clock_for, machine, ratios

from sparsekd import compiled, models, rng
from sparsekd.cache import CacheSpec, CacheWriter, RowRecord
from sparsekd.codec import codec_spec
from sparsekd.drawing import Teacher, head_chunk, read_head, sampler_parameters, shard_batches
from sparsekd.shard_thread import ShardThread

BATCH, DRAWS = 4, 50
SEQ_LEN = {"cpu": 256, "cuda": 4096}
# A GPU works beside its writer, who comes to the last batch when the GPU has nothing left to do: one of many.
BATCHES = {"cpu": 3, "cuda": 24}


def cache_spec(vocab: int, rows: int, seq_len: int, codec: str = "raw24", device: str = "cpu") -> CacheSpec:
    return CacheSpec(
        rows=rows,
        seq_len=seq_len,
        shard_rows=rows,
        logit_width=vocab,
        codec=codec_spec(codec, logit_width=vocab, rounds=DRAWS),
        sampler=sampler_parameters("random_sampling") | {"name": "random_sampling", "seed": 0, "rng": rng.ALGORITHM},
        teacher={},
        tokenizer={},
        data={},
        capture={"batch_size": BATCH, "head_chunk": head_chunk(vocab, device)},
    )


def make_teacher(name: str, vocab: int, spec: CacheSpec, device: str) -> Teacher:
    torch.manual_seed(0)
    with torch.device(device):
        model = models.new_student({"family": name}, vocab_size=vocab, seq_len=spec.seq_len).eval()
    model = model.to(torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.no_grad():
        ids = torch.randint(vocab, (1, 64), device=device)
        model.get_output_embeddings().weight *= 5 / model(input_ids=ids).logits.std()
    return Teacher(model=model, head=read_head(model), spec=spec)


def capture_share(name: str, vocab: int, rounds: int, device: str, seq_len: int) -> dict[str, object]:
    """Tokens per second over those of the bare forward, by `clock_for(device)` and the wall, and the wait."""
    spec = cache_spec(vocab, BATCH * BATCHES[device], seq_len, device=device)
    source = make_teacher(name, vocab, spec, device)
    ids = np.random.default_rng(0).integers(vocab, size=(spec.rows, seq_len)).astype(np.uint32)
    waited: list[float] = []

    def bare() -> None:
        with torch.no_grad():
            for batch in shard_batches(spec, 0):
                source.model(input_ids=torch.from_numpy(ids[batch].astype(np.int64)).to(device), use_cache=False)

    def capture() -> None:
        ones = np.ones((BATCH, seq_len), bool)
        with tempfile.TemporaryDirectory() as folder, ShardThread(CacheWriter(folder, spec), 0.0) as background:
            begin = time.perf_counter()
            for batch in shard_batches(spec, 0):
                rows = SimpleNamespace(input_ids=ids[batch], supervised=ones, starts=np.zeros_like(ones))
                background.put(0, batch, rows, source.draw(rows.input_ids, ones, batch.start))
            waited.append(background.waited / (time.perf_counter() - begin))

    runs = {"bare": bare, "capture": capture}
    seconds = alternating(runs, rounds, clock_for(device))
    wall = alternating(runs, max(1, rounds // 2), time.perf_counter) if device == "cpu" else seconds
    return {
        "teacher": name,
        "parameters": sum(p.numel() for p in source.model.parameters()),
        "vocab": vocab,
        "tokens_per_second_over_bare": 1 / ratios(seconds, "bare")["capture"],
        "tokens_per_second_over_bare_wall": 1 / ratios(wall, "bare")["capture"],
        "bare_us_per_token": 1e6 * float(np.median(seconds["bare"])) / ids.size,
        "teacher_waited": float(np.median(waited)),
    }


def writer_rate(vocab: int, codec: str, rounds: int) -> float:
    """Tokens that one core codes, checks and writes in a second, at about 15 ids a position, in shards of 131,072.

    As in a process that has written a million: before that numba is not waited for.
    """
    seq_len, rows = 4096, 32
    spec = cache_spec(vocab, rows, seq_len, codec)
    numbers = np.random.default_rng(0)
    everywhere = np.ones(seq_len, bool)
    records = [
        RowRecord(
            input_ids=numbers.integers(vocab, size=seq_len),
            targets=draw_targets(numbers, seq_len - 1, vocab, DRAWS),
            starts=~everywhere,
            supervised=everywhere,
        )
        for _ in range(rows)
    ]

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            CacheWriter(folder, spec).write(0, records)

    with patch.object(compiled, "kernels", lambda values=0: compiled.load()):
        return rows * seq_len / float(np.median(alternating({"write": write}, rounds)["write"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", default="10m,30m,10m:128256", help="families, each with :V where not --vocab's")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--device", default="cpu", choices=SEQ_LEN)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(1)
    teachers = [each.partition(":") for each in a.teachers.split(",")]
    shares = [
        capture_share(name, int(vocab or a.vocab), a.rounds, a.device, SEQ_LEN[a.device]) for name, _, vocab in teachers
    ]
    rates = {codec: writer_rate(128_256, codec, a.rounds + 2) for codec in ("raw24", "split")}
    print("teacher     parameters         V       capture / bare      wall   teacher waited")
    for each in shares:
        cpu, wall = each["tokens_per_second_over_bare"], each["tokens_per_second_over_bare_wall"]
        size = f"{each['parameters'] / 1e6:.0f}M"
        print(
            f"{each['teacher']:<12}{size:>10}{each['vocab']:>10}{cpu:>21.2f}{wall:>10.2f}{each['teacher_waited']:>16.2%}"
        )
    for codec, rate in rates.items():
        print(f"{codec} coded, checked and written: {rate / 1e6:.2f}M tokens a second and core")
    print("\n" + json.dumps({"machine": machine(a.device), "capture": shares, "writer": rates}))


if __name__ == "__main__":
    main()
