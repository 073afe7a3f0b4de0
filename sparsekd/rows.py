"""Documents -> packed rows: a folder of memory-mapped arrays in a fixed order, with a fingerprint.

    pack(source="corpus/*.jsonl", tokenizer="path/or/id", seq_len=1024, out="rows/")
    reader = RowsReader("rows/", split="train")            # `packed` says what is in the folder

The folder appears under its name only when it is complete. Memory does not grow with the corpus: one batch of
documents is tokenised at a time, and the shuffle reads them back from the disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import spool, vocab
from .checks import check_seed
from .corpus import Document, describe, documents, total_bytes
from .errors import RecipeError, SourceError
from .packed import FORMAT, FORMAT_VERSION, PACKING, PackedBatch, PackedRow, RowsReader, fingerprint_of
from .packing import already_packed, complete_folder, write_rows

__all__ = ["PackedBatch", "PackedRow", "RowsReader", "pack"]

_BATCH_CHARACTERS = 1 << 18  # a tokenizer's own records take some 300 bytes per token while a batch lasts
_BATCH_DOCUMENTS = 1024
_CHUNK_TOKENS = 1 << 20
_TRAINING_CHARACTERS = 10**8  # more text hardly changes a BPE vocabulary, and its words are counted in memory


# -- packing


def pack(
    *,
    source: Any,
    tokenizer: Any,
    seq_len: int,
    out: str | Path,
    seed: int = 0,
    heldout: float = 0.02,
    field: str | None = None,
    text_by: str = "document",
    prompt_field: str | None = None,
    response_field: str | None = None,
    data_split: str = "train",
    revision: str | None = None,
    vocab_size: int = 2048,
    limit_tokens: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise, split by document, shuffle, join and cut; returns the manifest of the folder `out`.

    Documents follow each other as [BOS] text EOS in a seeded order and are cut into rows of `seq_len` tokens;
    no token is lost, the last row is filled with unsupervised EOS. The same settings on the same documents
    give the same bytes. A folder packed with the same settings is returned as it is; of files, names, sizes
    and contents are compared, of a large one 1 MB in stretches.

    Args:
        source: a file, a folder, a glob, a `datasets` id ("id" or "id:config"), a list of those, or "builtin": the
            standard library of this Python. Text, JSON lines and Parquet are told apart by their names.
        tokenizer: a folder, a model id, an open tokenizer, or "train": a byte-level BPE with `vocab_size`
            entries learnt from the first 10^8 characters of all documents, held-out ones included.
        seq_len: tokens per row, at least 2.
        out: the folder that takes the rows.
        seed: of the documents' order and of the choice of held-out ones.
        heldout: share of the documents, in [0, 1), that goes to the split "heldout".
        field: the field of a record that is its text, or its list of chat messages; default: "text", or what the
            record plainly is.
        text_by: what one document is in a text file: "document" (the file), "paragraph" or "line".
        prompt_field, response_field: the two sides of a record; only the response is learnt.
        data_split: which split of a `datasets` source to read.
        revision: which commit, tag or branch of a `datasets` id.
        vocab_size: entries of the tokenizer when it is trained.
        limit_tokens: stop reading after the document that reaches it.

    Raises:
        SourceError: documents or a tokenizer that cannot be used.
        RecipeError: a setting outside its range.
        MismatchError: `out` holds rows packed with other settings.
        StorageError: the disk is full; nothing is left behind.
    """
    _check_settings(seq_len=seq_len, seed=seed, heldout=heldout, limit_tokens=limit_tokens)
    reading = {
        "field": field,
        "text_by": text_by,
        "prompt_field": prompt_field,
        "response_field": response_field,
        "split": data_split,
        "revision": revision,
    }
    trained = isinstance(tokenizer, str) and tokenizer == "train"
    opened = None if trained else _open_tokenizer(tokenizer)
    settings = {
        "source": describe(source, **reading),
        "tokenizer": "train" if opened is None else vocab.fingerprint(opened),
        "vocab_size": vocab_size if opened is None else None,
        "seq_len": seq_len,
        "seed": seed,
        "heldout": heldout,
        "limit_tokens": limit_tokens,
        **{"data_split" if key == "split" else key: value for key, value in reading.items()},
    }
    out = Path(out).expanduser()
    if (existing := already_packed(out, settings)) is not None:
        return existing

    def stream() -> Iterator[Document]:
        return documents(source, **reading)

    total = total_bytes(source) if limit_tokens is None else None
    with complete_folder(out) as folder, _progress("pack", total if progress else None, progress) as advance:
        if opened is None:
            opened = vocab.train_tokenizer(_training_texts(stream(), limit_tokens), vocab_size)
        manifest = _pack_into(folder, stream(), opened, settings, advance)
    return manifest


def _check_settings(*, seq_len: int, seed: int, heldout: float, limit_tokens: int | None) -> None:
    if seq_len < 2:
        raise RecipeError(f"seq_len={seq_len} leaves no next token to predict; it is at least 2")
    check_seed(seed)
    if not 0 <= heldout < 1:
        raise RecipeError(f"heldout={heldout} is outside [0, 1); it is a share of the documents, such as 0.02")
    if limit_tokens is not None and limit_tokens < 1:
        raise RecipeError(f"limit_tokens={limit_tokens} keeps nothing; leave it out to pack all documents")


def _open_tokenizer(tokenizer: Any) -> Any:
    return vocab.load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer


def _training_texts(stream: Iterable[Document], limit_tokens: int | None) -> Iterator[str]:
    """The texts a vocabulary is learnt from: not much more of them than will be packed."""
    left = _TRAINING_CHARACTERS if limit_tokens is None else min(_TRAINING_CHARACTERS, 8 * limit_tokens)
    for document in stream:
        yield document.text
        left -= len(document.text)
        if left <= 0:
            return


def _pack_into(
    folder: Path,
    stream: Iterable[Document],
    tokenizer: Any,
    settings: dict[str, Any],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    scratch = folder / "spool"
    scratch.mkdir()
    skipped = {"blank": 0, "no_response": 0}
    encoded = _encoded(stream, tokenizer, settings, skipped, advance)
    if not spool.write(scratch, encoded):
        raise SourceError(
            f"no document of source={settings['source'].get('source', settings['source'])} has tokens to train on: "
            f"{skipped['blank']} are blank, {skipped['no_response']} have no response; give others"
        )
    description = _describe_tokenizer(tokenizer, settings)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "seq_len": settings["seq_len"],
        "seed": settings["seed"],
        "packing": PACKING,
        "document_mask": "none",
        "source": settings["source"],
        "tokenizer": description,
        "skipped": skipped,
        "splits": {
            name: _write_split(folder, name, settings, description)
            for name in spool.split(scratch, settings["heldout"])
        },
        "settings": settings,
    }
    shutil.rmtree(scratch)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _describe_tokenizer(tokenizer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    bos, eos = vocab.document_ends(tokenizer)
    size = vocab.vocab_size(tokenizer)
    name = f"trained-{size}" if settings["tokenizer"] == "train" else vocab.name_of(tokenizer)
    return {
        "hash": vocab.fingerprint(tokenizer),
        "vocab_size": size,
        "name": name,
        "eos_id": eos,
        "bos_id": bos,
    }


def _encoded(
    stream: Iterable[Document],
    tokenizer: Any,
    settings: dict[str, Any],
    skipped: dict[str, int],
    advance: Callable[[int], None],
) -> Iterator[spool.SpooledDocument]:
    """Documents as tokens until the limit; those that would teach nothing are counted and left out."""
    tokens, limit = 0, settings["limit_tokens"] or float("inf")
    for batch in _batches(stream):
        kept = [document for document in batch if document.text.strip()]
        skipped["blank"] += len(batch) - len(kept)
        for document, encoded in zip(kept, vocab.encode(tokenizer, kept), strict=True):
            if not encoded.supervised.any():
                skipped["no_response"] += 1
                continue
            if tokens >= limit:
                return
            tokens += len(encoded.ids)
            advance(encoded.bytes)
            yield spool.SpooledDocument(
                ids=encoded.ids,
                supervised=encoded.supervised,
                bytes=encoded.bytes,
                supervised_bytes=encoded.supervised_bytes,
                hash=spool.content_hash(document.canonical_bytes(), settings["seed"]),
            )


def _batches(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in stream:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# -- one split's arrays


def _write_split(folder: Path, name: str, settings: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str, Any]:
    seq_len, scratch = settings["seq_len"], folder / "spool"
    totals = spool.totals(scratch, name)
    rows = -(-totals["tokens"] // seq_len)
    blocks = _cut(spool.read(scratch, name, settings["seed"]), seq_len, tokenizer["eos_id"])
    supervised = write_rows(folder, name, blocks, rows=rows, seq_len=seq_len, vocab_size=tokenizer["vocab_size"])
    return {
        "rows": rows,
        **totals,
        "supervised": supervised,
        "padding": rows * seq_len - totals["tokens"],
        "fingerprint": fingerprint_of(folder, name, seq_len, tokenizer["hash"]),
    }


def _cut(flagged: Iterable[np.ndarray], seq_len: int, eos_id: int) -> Iterator[np.ndarray]:
    """The documents' tokens joined and cut into [B, L]; the last row is filled with EOS without flags."""
    held: list[np.ndarray] = []
    size = 0
    for tokens in flagged:
        held.append(tokens)
        size += len(tokens)
        if size >= max(_CHUNK_TOKENS, seq_len):
            joined = np.concatenate(held)
            whole = size - size % seq_len
            yield joined[:whole].reshape(-1, seq_len)
            held, size = [joined[whole:]], size - whole
    if size:
        padding = np.full(-size % seq_len, eos_id, np.uint32)
        yield np.concatenate([*held, padding]).reshape(-1, seq_len)


@contextmanager
def _progress(title: str, total: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    with tqdm(
        desc=title, total=total, unit="B", unit_scale=True, disable=None if shown else True
    ) as bar:  # None: silent unless a person watches

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
