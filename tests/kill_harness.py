"""Kill captures at random moments and resume them: `python kill_harness.py ROWS TEACHER FOLDER TRIALS`.

One process imports everything and then forks workers, so that a trial takes a second, not ten. It never runs a
parallel torch operation itself: forking is safe. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

from sparsekd.capture import capture

torch.set_num_threads(1)
# Imported lazily by transformers: loaded here once, not in every fork.
WARM = (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast)


def fork_worker(rows: str, teacher: str, out: Path, rank: int, world: int) -> int:
    """Pid of a worker that captures its share and exits."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        sampler = {"name": "systematic", "rounds": 20}  # each worker finds the order of the head for itself
        capture(rows=rows, teacher=teacher, out=out, sampler=sampler, shard_rows=8, batch_size=8, device="cpu")
        status = 0
    finally:
        os._exit(status)


def run(rows: str, teacher: str, out: Path, world: int, kill_after: float | None = None) -> bool:
    """Run workers to their end (or kill them all after a while); whether every one ended by itself."""
    pids = [fork_worker(rows, teacher, out, rank, world) for rank in range(world)]
    if kill_after is not None:
        time.sleep(kill_after)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    if kill_after is None and any(codes):
        raise SystemExit(f"a worker failed: {codes}")
    return not any(codes)


def digest(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> None:
    rows, teacher, folder, trials = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    started = time.perf_counter()
    run(rows, teacher, folder / "reference", 1)
    full = time.perf_counter() - started
    want, rng = digest(folder / "reference"), random.Random(0)
    report = {"identical": 0, "killed_midway": 0, "seconds": full, "shards": len(want)}
    for trial in range(trials):
        out, world = folder / f"trial{trial}", 1 + trial % 3
        ended = run(rows, teacher, out, world, kill_after=rng.uniform(0.1, 1.0) * full)
        made = len(list(out.glob("shard-*"))) if out.exists() else 0
        report["killed_midway"] += int(not ended and made > 0)
        run(rows, teacher, out, 1 + (trial // 3) % 3)
        report["identical"] += int(digest(out) == want)
        shutil.rmtree(out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
