"""Student tokens per second and core of transcoding, chunk by chunk, beside the slow twin.

    OMP_NUM_THREADS=1 python benchmarks/transcode.py CACHE TOKENIZER [unresolved] [chain] [rows]

TOKENIZER is a folder, or one to be trained on the cache's text: bpe4096 (byte-level), unigram2000, or sentencepiece2000
(BPE that takes the whole text for one word, as Llama 2's).
The first chunk meets every word for the first time; later ones remember. CPU seconds, so other work on the machine
counts little.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from slow_transcode import Slow, slow_sets, slow_transcode
from test_align import _byte_pieces, fast

from sparsekd.cache import CacheReader
from sparsekd.pair import cut_ids, teachers_cuts
from sparsekd.transcode import open_job, transcoded
from sparsekd.transcoding import draws_of
from sparsekd.vocab import load_tokenizer, train_tokenizer
from sparsekd.vocab_bytes import text_of, vocabulary_bytes

SLOW_ROWS = 4


def main(cache: str, tokenizer: str, unresolved: str = "set", chain: int = 0, rows: int = 1024) -> None:
    named = re.fullmatch(r"(bpe|unigram|sentencepiece)(\d+)", tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        if named:
            STUDENTS[named[1]](texts_of(cache), int(named[2])).save_pretrained(folder)
        job = open_job(cache, folder if named else tokenizer, unresolved, chain, None)
    drawn = job.reader.stats["pairs"] / job.reader.stats["positions"]
    print(f"{drawn:.1f} draws a token, unresolved={unresolved}, chain={chain}")
    slow = slow_rate(job)
    for first in range(0, min(rows, len(job.reader)), 256):
        began = time.process_time()
        tokens = sum(counts["student_tokens"] for _, counts in transcoded(job, range(first, first + 256)))
        rate = tokens / (time.process_time() - began)
        print(f"rows {first:>5}: {rate:>9,.0f} student tokens/s, {rate / slow:,.0f} times the slow twin's {slow:,.0f}")


def texts_of(cache: str) -> list[str]:
    vocabulary = vocabulary_bytes(load_tokenizer(Path(cache) / "tokenizer"))
    with CacheReader(cache) as reader:
        return [
            text_of(reader.record(row).input_ids, vocabulary).decode(errors="replace") for row in range(len(reader))
        ]


def sentencepiece(texts, size, *, unigram=False):
    """As transformers keeps T5's (Unigram, spaces begin words) or Llama 2's (BPE, one word), with fallback to bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = ["<unk>", "</s>"]
    backend = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if unigram else "never")
    words = {"vocab_size": size, "special_tokens": [*special, *_byte_pieces()], "show_progress": False}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **words) if unigram else trainers.BpeTrainer(**words)
    backend.train_from_iterator(texts, trainer)
    description = json.loads(backend.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in special]
    description["model"]["byte_fallback"] = True
    if not unigram:
        spaces = [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
        description |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": spaces}}
    return fast(Tokenizer.from_str(json.dumps(description)), unk_token="<unk>", eos_token="</s>")


STUDENTS = {
    "bpe": train_tokenizer,
    "sentencepiece": sentencepiece,
    "unigram": lambda texts, size: sentencepiece(texts, size, unigram=True),
}


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
