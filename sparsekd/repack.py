"""Repack: the same rows, text for text, in another tokenizer's tokens.

rows + another tokenizer -> row i holds what row i held

Teachers of two tokenizers are captured on one text this way: both caches transcoded into the student's vocabulary are
equal rows, and `pool` takes them. A row starts wherever the other row does, also inside a document or a word. It is
filled with EOS that nobody learns, for its text takes as many tokens as it takes.

Shapes: S tokens of a row, L = seq_len.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd import spool, vocab
from sparsekd.checks import check_at_least
from sparsekd.errors import SourceError
from sparsekd.overlay import Overlaid, overlay
from sparsekd.packed import FORMAT, FORMAT_VERSION, PackedRow, RowsReader, fingerprint_of, size_without_padding
from sparsekd.packing import already_packed, complete_folder, write_rows
from sparsekd.pair import Pair, pair_of
from sparsekd.retokenise import no_counterpart, stretches
from sparsekd.vocab_bytes import UNLESS_SPACE, document_text

PACKING = "repacked-v1"
_ROUND = 8  # seq_len is a multiple of it
_ROWS = 1024  # written together


def repack(
    *,
    rows: str | Path,
    tokenizer: str,
    out: str | Path,
    seq_len: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Write `rows`, every split of them, in the tokens of `tokenizer`; returns the manifest of the folder `out`.

    Documents start where they did. A token is supervised where all of what it spells was, and text is cut where a
    prompt ends, as `pack` does. A row that cannot be written so, because its text does not come back from the tokens
    or it needs more than `seq_len` of them, is left empty: nothing of it is learnt, and `pool` takes the other
    teachers' word for it. The manifest counts them. The same settings on the same rows give the same bytes, and a
    folder made with the same settings is returned as it is.

    Args:
        rows: a folder of packed rows.
        tokenizer: of another teacher (or of the student, to evaluate it on the same held-out text), a folder or an id.
        out: the folder that takes the rows.
        seq_len: tokens of a new row, at most what the teacher reads; default: those of the longest row.
        progress: called with (rows done, rows in all).

    Raises:
        SourceError: rows or a tokenizer that cannot be opened, or of which no row could be written.
        MismatchError: a control token that the tokenizer does not have, or `out` holds other rows.
    """
    check_at_least(2, seq_len=seq_len)
    opened = vocab.load_tokenizer(tokenizer)
    with RowsReader(rows) as reader:
        manifest = reader.manifest
        pair = pair_of(reader.tokenizer(), opened)
    like = {name: split["fingerprint"] for name, split in manifest["splits"].items()}
    settings = {"like": like, "tokenizer": vocab.fingerprint(opened), "seq_len": seq_len}
    out = Path(out).expanduser()
    if (existing := already_packed(out, settings)) is not None:
        return existing
    readers = {name: RowsReader(rows, name) for name in like}
    with complete_folder(out) as folder:
        made = _write(folder, readers, pair, settings, opened, progress)
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spooled:
    """A split's rows on their way: their sizes ([R], -1 for text that does not come back), and bytes per split."""

    sizes: np.ndarray
    text_bytes: np.ndarray
    learnt_bytes: np.ndarray


def _write(
    folder: Path,
    readers: dict[str, RowsReader],
    pair: Pair,
    settings: dict[str, Any],
    tokenizer: Any,
    progress: Callable[[int, int], Any] | None,
) -> dict[str, Any]:
    total, done, spooled = sum(map(len, readers.values())), 0, {}
    for name, reader in readers.items():
        say = None if progress is None else lambda count, before=done: progress(before + count, total)
        spooled[name] = _spool(folder / f"{name}.tokens", reader, pair, say)
        done += len(reader)
    seq_len = settings["seq_len"] or _longest(spooled)
    bos, eos = vocab.document_ends(tokenizer)
    size = vocab.vocab_size(tokenizer)
    description = {"hash": settings["tokenizer"], "vocab_size": size, "name": vocab.name_of(tokenizer)}
    description |= {"eos_id": eos, "bos_id": bos}
    old = next(iter(readers.values())).manifest
    splits = {
        name: _write_split(folder, reader, spooled[name], seq_len, description) for name, reader in readers.items()
    }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "seq_len": seq_len,
        "seed": old["seed"],
        "packing": PACKING,
        "document_mask": old["document_mask"],
        "source": old["source"],
        "tokenizer": description,
        "like": {"tokenizer": old["tokenizer"], "seq_len": old["seq_len"], "packing": old["packing"]},
        "splits": splits,
        "settings": settings,
    }
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _longest(spooled: dict[str, _Spooled]) -> int:
    longest = max(int(each.sizes.max(initial=0)) for each in spooled.values())
    return max(_ROUND, -(-longest // _ROUND) * _ROUND)


# --- from row to row ------------------------------------------------------------------------------------


def _spool(path: Path, reader: RowsReader, pair: Pair, say: Callable[[int], Any] | None) -> _Spooled:
    """Every row's flagged tokens one after another in a file: how long the longest is shows at the end only."""
    sizes, text_bytes, learnt_bytes = [], [], []
    with open(path, "wb") as file:
        for row in reader:
            found, theirs = repacked(row, pair, reader.manifest["tokenizer"]["eos_id"])
            spelled = theirs.ends - theirs.starts
            text_bytes.append(int(spelled.sum()))
            learnt_bytes.append(int(spelled[theirs.supervised].sum()))
            sizes.append(-1 if found is None else len(found.ids))
            if found is not None:
                file.write(_flagged(found).astype("<u4").tobytes())
            if say and (row.index + 1) % 256 == 0:
                say(row.index + 1)
    if say:
        say(len(reader))
    return _Spooled(
        sizes=np.array(sizes, np.int64),
        text_bytes=np.array(text_bytes, np.int64),
        learnt_bytes=np.array(learnt_bytes, np.int64),
    )


def repacked(row: PackedRow, pair: Pair, eos: int | None) -> tuple[Overlaid | None, Overlaid]:
    """(the row in the other tokenizer's tokens, None where its text does not come back from them; as it was).

    Raises:
        MismatchError: a control token without counterpart.
    """
    size = size_without_padding(row.input_ids, row.supervised, eos)
    ids = row.input_ids[:size].astype(np.int64)
    _check_control(ids, pair)
    found, theirs = overlay(ids, row.starts[:size], row.supervised[:size], pair)
    comes_back = (found.ends - found.starts).sum() == (theirs.ends - theirs.starts).sum()
    if pair.student.prefix == UNLESS_SPACE:
        comes_back &= not _opens_with_a_space(ids, row.starts[:size], pair)
    return (found if comes_back else None), theirs


def _opens_with_a_space(ids: np.ndarray, starts: np.ndarray, pair: Pair) -> bool:
    """Whether a document begins with a space: one that adds a space where none is cannot tell it from its own."""
    return any(
        stretch.bare and document_text(ids[stretch.first : stretch.last], pair.teacher).startswith(b" ")
        for stretch in stretches(ids, starts, pair)
    )


def _check_control(ids: np.ndarray, pair: Pair) -> None:
    of_id = pair.teacher.of_id
    for token in np.unique(ids).tolist():
        if of_id[token] is None and pair.control[token] < 0 and token != pair.teacher.bos:
            raise no_counterpart(token, pair)


def _flagged(tokens: Overlaid) -> np.ndarray:
    flags = np.where(tokens.supervised, spool.SUPERVISED, np.uint32(0)) | np.where(
        tokens.opens, spool.STARTS, np.uint32(0)
    )
    flagged: np.ndarray = tokens.ids.astype(np.uint32) | flags
    return flagged


# --- a split --------------------------------------------------------------------------------------------


def _write_split(
    folder: Path, reader: RowsReader, spooled: _Spooled, seq_len: int, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    name, old = reader.split, reader.manifest["splits"][reader.split]
    kept = (spooled.sizes >= 0) & (spooled.sizes <= seq_len)
    if not kept.any():
        raise SourceError(
            f"no row of {reader.path} ({name}) can be written: {int((spooled.sizes < 0).sum())} do not come back from "
            f"the tokens of {tokenizer['name']}, {int((spooled.sizes > seq_len).sum())} need more than seq_len="
            f"{seq_len}; raise seq_len, or take another tokenizer"
        )
    path = folder / f"{name}.tokens"
    blocks = _blocks(path, spooled.sizes, seq_len, tokenizer["eos_id"])
    size = tokenizer["vocab_size"]
    supervised = write_rows(folder, name, blocks, rows=len(reader), seq_len=seq_len, vocab_size=size)
    path.unlink()
    tokens = int(spooled.sizes[kept].sum())
    return {
        "rows": len(reader),
        "documents": old["documents"],
        "tokens": tokens,
        "bytes": _share(old["bytes"], spooled.text_bytes, kept),
        "supervised_bytes": _share(old["supervised_bytes"], spooled.learnt_bytes, kept),
        "supervised": supervised,
        "padding": len(reader) * seq_len - tokens,
        "empty": {"lost": int((spooled.sizes < 0).sum()), "too_long": int((spooled.sizes > seq_len).sum())},
        "like": old.get("like", old["fingerprint"]),
        "fingerprint": fingerprint_of(folder, name, seq_len, tokenizer["hash"]),
    }


def _share(total: int, sizes: np.ndarray, kept: np.ndarray) -> int:
    """Of a split's bytes those of the rows that are kept: all of them where none is empty."""
    return total * int(sizes[kept].sum()) // max(1, int(sizes.sum()))


def _blocks(path: Path, sizes: np.ndarray, seq_len: int, eos: int) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        for first in range(0, len(sizes), _ROWS):
            part = sizes[first : first + _ROWS]
            block = np.full((len(part), seq_len), eos, np.uint32)
            for row, size in zip(block, part.tolist(), strict=True):
                tokens = np.frombuffer(file.read(4 * max(size, 0)), "<u4")
                if 0 <= size <= seq_len:
                    row[:size] = tokens
            yield block
