"""A tiny world, made once per test session: a corpus, its rows, a teacher that learnt something, a cache."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

# One thread: the machine's cores are the test runner's, and tiny models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, whoever does it

SEQ_LEN = 32


@dataclass(frozen=True)
class World:
    """Folders of the session's rows, teacher and cache."""

    rows: str
    teacher: str
    cache: str
    corpus: str


def write_corpus(path: Path, documents: int = 120, seed: int = 0) -> str:
    """Sentences with enough structure that a teacher of 40k parameters learns something in seconds."""
    import random

    rng = random.Random(seed)
    nouns, verbs = ["cat", "dog", "fox", "owl", "hen"], ["sees", "hears", "likes", "fears"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            sentences = [
                f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} and counts "
                f"{(k := rng.randrange(8))} {k + 1} {k + 2}."
                for _ in range(rng.randrange(3, 12))
            ]
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    import torch
    from transformers.utils import logging

    from sparsekd.capture import capture
    from sparsekd.rows import pack
    from sparsekd.train import train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("world")
    corpus = write_corpus(home / "corpus.jsonl")
    pack(
        source=corpus,
        tokenizer="train",
        vocab_size=300,
        seq_len=SEQ_LEN,
        heldout=0.1,
        out=home / "rows",
        progress=False,
    )
    train(
        out=home / "teacher",
        student={"family": "tiny", "hidden_size": 32, "intermediate_size": 64},
        rows=str(home / "rows"),
        method="ce",
        max_steps=120,
        batch_size=8,
        learning_rate=1e-2,
        device="cpu",
        progress=False,
    )
    capture(
        rows=home / "rows",
        teacher=str(home / "teacher"),
        out=home / "cache",
        shard_rows=40,
        batch_size=8,
        device="cpu",
        sampler={"name": "random_sampling", "rounds": 20},
    )
    return World(rows=str(home / "rows"), teacher=str(home / "teacher"), cache=str(home / "cache"), corpus=corpus)


def folder_bytes(folder: str | Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    root = Path(folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
