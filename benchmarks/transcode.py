"""Student tokens per second and core of transcoding, chunk by chunk, beside the slow twin.

    OMP_NUM_THREADS=1 python benchmarks/transcode.py CACHE TOKENIZER [unresolved] [chain] [rows]

The first chunk meets every word for the first time; later ones remember. CPU seconds, so other work on the machine
counts little.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from slow_transcode import Slow, slow_sets, slow_transcode

from sparsekd.retokenise import cut_ids, teachers_cuts
from sparsekd.transcode import open_job, transcoded
from sparsekd.transcoding import draws_of

SLOW_ROWS = 4


def main(cache: str, tokenizer: str, unresolved: str = "set", chain: int = 0, rows: int = 1024) -> None:
    job = open_job(cache, tokenizer, unresolved, chain, None)
    drawn = job.reader.stats["pairs"] / job.reader.stats["positions"]
    print(f"{drawn:.1f} draws a token, unresolved={unresolved}, chain={chain}")
    slow = slow_rate(job)
    for first in range(0, min(rows, len(job.reader)), 256):
        began = time.process_time()
        tokens = sum(counts["student_tokens"] for _, counts in transcoded(job, range(first, first + 256)))
        rate = tokens / (time.process_time() - began)
        print(f"rows {first:>5}: {rate:>9,.0f} student tokens/s, {rate / slow:,.0f} times the slow twin's {slow:,.0f}")


def slow_rate(job) -> float:
    """The twin on the first rows, control tokens cut off."""
    pair, began, tokens = job.answers.pair, time.process_time(), 0
    teachers = dict(zip((piece or b"" for piece in pair.student.of_id), teachers_cuts(pair), strict=True))
    for row in range(SLOW_ROWS):
        record = job.reader.record(row)
        ids = record.input_ids.astype(int).tolist()
        size = next((n for n, token in enumerate(ids) if pair.teacher.of_id[token] is None), len(ids))
        draws = draws_of([record], [len(ids)])
        each = [
            dict(zip(draws.ids[a : a + n].tolist(), draws.weights[a : a + n].tolist(), strict=True))
            for a, n in zip(draws.first[:size], draws.sizes[:size], strict=True)
        ]
        encode = lambda data: cut_ids([data], pair)[0] or []  # noqa: E731
        control = dict(enumerate(np.asarray(pair.control).tolist()))
        words = (pair.teacher.of_id, pair.student.of_id, encode, teachers.__getitem__, control)
        twin = slow_sets if job.settings.unresolved == "set" else slow_transcode
        tokens += len(twin(Slow(ids[:size], each, *words), chain=job.settings.chain))
    return tokens / (time.process_time() - began)


if __name__ == "__main__":
    main(*sys.argv[1:4], *(int(word) for word in sys.argv[4:]))
