"""What is in a cache or in packed rows, in words and numbers, and any row as text."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.cache import CacheReader, Row
from sparsekd.errors import RecipeError
from sparsekd.files import is_url, join
from sparsekd.packed import FORMAT, PackedRow, RowsReader
from sparsekd.set_table import read_table

Show = Callable[[np.ndarray], str]
WIDTH = 100  # columns of the page
_BAR = 40


def cache_stats(reader: CacheReader, sample_rows: int = 512) -> dict[str, Any]:
    """Numbers of a cache: exact totals from its manifest, the distribution of ids per token from evenly spread rows.

    bytes_per_token counts whole shard files (input ids, targets, index), target_bytes_per_token the coded targets (of a
    codec that codes the input ids among them, both).
    """
    spec, totals = reader.spec, reader.stats
    rows = np.unique(np.linspace(0, len(reader) - 1, min(sample_rows, len(reader))).astype(int))
    sizes = np.concatenate([reader.flat(int(row)).sizes for row in rows])
    files = sum(shard["bytes"] for shard in reader.manifest["shards"])
    target_bytes = totals["payload_bytes"] - totals["tokens"] * _id_bytes(spec.codec)
    positions = max(totals["positions"], 1)
    return {
        "rows": spec.rows,
        "tokens": totals["tokens"],
        "positions": totals["positions"],
        "rounds": spec.codec.get("rounds"),
        "unique_ids": {"mean": totals["pairs"] / positions, "histogram": np.bincount(sizes).tolist()},
        "bytes": files,
        "bytes_per_token": files / max(totals["tokens"], 1),
        "target_bytes_per_token": target_bytes / positions,
        "next_token_hit_rate": totals["next_token_hits"] / positions,
        "next_token_weight": totals["next_token_weight"] / positions,
    }


def describe(path: str, row: int | None = None, positions: int | None = None) -> str:
    """The page that `sparsekd inspect` prints: of a cache, or of what `sparsekd pack` wrote.

    Raises:
        RecipeError: there is no such row.
    """
    return describe_rows(path, row, positions) if _holds_rows(path) else describe_cache(path, row, positions or 24)


def describe_cache(path: str, row: int | None = None, positions: int = 24) -> str:
    """The whole cache, or one row decoded as text beside its targets; RecipeError where there is no such row."""
    with CacheReader(path) as reader:
        if row is None:
            return _overview(path, reader)
        _check_row(row, len(reader), path)
        with _decoder(path) as show:
            return _row_as_text(reader[row], len(reader), _with_sets(show, reader), positions)


def describe_rows(path: str, row: int | None = None, positions: int | None = None) -> str:
    """Packed rows: all splits in numbers, or the first `positions` tokens of a training row as text, document by
    document; RecipeError where there is no such row."""
    with RowsReader(path) as reader:
        if row is None:
            return _rows_overview(path, reader)
        _check_row(row, len(reader), path)
        with _decoder(path) as show:
            return _packed_row_as_text(reader[row], len(reader), show, positions)


def _holds_rows(path: str) -> bool:
    if is_url(path):
        return False
    try:
        return bool(json.loads((Path(path) / "manifest.json").read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # whoever opens it as a cache says what it is


def _check_row(row: int, rows: int, path: str) -> None:
    if not -rows <= row < rows:
        raise RecipeError(f"row={row} is not in {path}; its rows are 0 to {rows - 1}")


def _with_sets(show: Show, reader: CacheReader) -> Show:
    """Ids that stand for sets of tokens (see `set_table`) as `'a'…`, conditions as `given 'a'…`."""
    described = (reader.spec.data.get("transcoded") or {}).get("sets")
    if described is None:
        return show
    size, count, table = described["vocab_size"], described["count"], read_table(reader.path, described)

    def named(ids: Any) -> str:
        if len(ids) != 1 or ids[0] < size:
            return show(ids)
        given, index = divmod(int(ids[0]) - size, count)
        shortest = min((show(each[None]) for each in table.members(index)), key=len)
        return f"{'given ' * given}{shortest}…"

    return named


# --- the whole cache ------------------------------------------------------------------------------------


def _overview(path: str, reader: CacheReader) -> str:
    stats = cache_stats(reader)
    facts = [_fact(name, text) for name, text in _provenance(path, reader)]
    return "\n".join([*facts, "", *_numbers(reader, stats), "", *_histogram(stats["unique_ids"]["histogram"])])


def _provenance(path: str, reader: CacheReader) -> list[tuple[str, str]]:
    spec = reader.spec
    teacher, tokenizer, data = spec.teacher, spec.tokenizer, spec.data
    return [
        ("cache", path),
        (
            "teacher",
            f"{teacher.get('id')} ({teacher.get('architecture')}, {teacher.get('parameters', 0):,} parameters, "
            f"{teacher.get('dtype')}, weights {str(teacher.get('weights'))[:12]})",
        ),
        (
            "tokenizer",
            f"{tokenizer.get('name')} ({tokenizer.get('vocab_size'):,} tokens, hash "
            f"{str(tokenizer.get('hash'))[:12]}); the teacher makes {spec.logit_width:,} logits",
        ),
        (
            "data",
            f"{_source(data.get('source'))}; split {data.get('split')}, packed with seed {data.get('seed')} to rows "
            f"of {spec.seq_len} tokens (fingerprint {str(data.get('fingerprint'))[:12]})",
        ),
        *_misaligned(data.get("misaligned")),
        ("sampler", _sampler(spec.sampler)),
        ("codec", spec.codec["name"]),
        *_positions(spec.capture),
    ]


def _positions(capture: dict[str, Any]) -> list[tuple[str, str]]:
    """Which of the positions were kept, where not all were."""
    if "positions" not in capture:
        return []
    by = capture.get("positions_by")
    how = f"by the teacher's {by}, weighing the inverse of their chance" if by else "evenly"
    return [("positions", f"{capture['positions']:.0%} kept, {how}")]


def _misaligned(made_for: dict[str, Any] | None) -> list[tuple[str, str]]:
    if made_for is None:
        return []
    packing = f"seed {made_for.get('seed')}, rows of {made_for.get('seq_len')} tokens"
    return [("MISALIGNED", f"the teacher saw another packing: {packing} ({str(made_for.get('fingerprint'))[:12]})")]


def _sampler(sampler: dict[str, Any]) -> str:
    """Name, parameters that matter, seed: what a method's section would say; of a pool, each teacher's."""
    if sampler["name"] == "pool":
        return " + ".join(
            f"{part['weight']:g} × {_sampler(part['sampler'])} of {part['teacher'].get('id')}"
            for part in sampler["parts"]
        )
    hidden = {"name", "rng", "unbiased", "seed", "order_sha256"}
    if sampler.get("temperature") == 1:
        hidden.add("normalize")  # at temperature 1 there is nothing to normalise
    parameters = ", ".join(f"{key}={value}" for key, value in sampler.items() if key not in hidden)
    return f"{sampler['name']}({parameters}), seed {sampler.get('seed')}, " + (
        "unbiased" if sampler.get("unbiased") else "biased"
    )


def _source(source: Any) -> str:
    """A manifest's description of where documents came from, in a few words."""
    if not isinstance(source, dict):
        return str(source)
    kind = source.get("kind")
    if kind == "list":
        return ", ".join(_source(part) for part in source.get("parts", []))
    if kind == "builtin":
        return f"the standard library of Python {source.get('python')}"
    if kind == "files":
        count = source.get("files", 0)
        files = "" if count == 1 else f"{count:,} files, "
        return f"{source.get('source')} ({files}{_size(source.get('bytes', 0))})"
    return f"{kind} {source.get('id') or source.get('path')}"


def _numbers(reader: CacheReader, stats: dict[str, Any]) -> list[str]:
    shards = len(reader.manifest["shards"])
    rows = [
        ("rows", f"{stats['rows']:,}", f"in {shards} shard{'s' * (shards != 1)}"),
        ("tokens", f"{stats['tokens']:,}", f"{stats['positions']:,} of them are learnt"),
        ("size", _size(stats["bytes"]), ""),
        (
            "bytes per token",
            f"{stats['bytes_per_token']:.1f}",
            f"{stats['target_bytes_per_token']:.1f} per learnt token are targets"
            + (", the rest input ids and index" if _id_bytes(reader.spec.codec) else " with their input ids"),
        ),
        ("ids per token", f"{stats['unique_ids']['mean']:.1f}", "kept by the sampler, on average"),
        ("next token kept", f"{stats['next_token_hit_rate']:.1%}", "of learnt tokens are among their own ids"),
        ("mass on next token", f"{stats['next_token_weight']:.1%}", "on average"),
    ]
    return [f"{name:<20}{value:>14}   {words}".rstrip() for name, value, words in rows]


def _fact(name: str, text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=f"{name:<11}", subsequent_indent=" " * 11, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _histogram(counts: list[int], most: int = 16) -> list[str]:
    """Text bars from the smallest size that occurs; neighbouring sizes are joined so that at most `most` remain."""
    found = [size for size, count in enumerate(counts) if count]
    if len(found) < 2:
        return [f"ids per token: always {found[0]}"] if found else []
    start = found[0]
    width = -(-(len(counts) - start) // most)
    joined = [sum(counts[first : first + width]) for first in range(start, len(counts), width)]
    total, largest = sum(joined), max(joined)
    lines = ["ids per token (share of tokens)"]
    for index, count in enumerate(joined):
        first = start + index * width
        last = min(first + width, len(counts)) - 1
        label = f"{first}" if first == last else f"{first}-{last}"
        lines.append(f"  {label:>9}  {'█' * round(_BAR * count / largest):<{_BAR}} {count / total:6.1%}")
    return lines


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _id_bytes(codec: dict[str, Any]) -> int:
    """Bytes of an input id that lies beside the targets; 0 for a codec that codes both together."""
    from sparsekd.codec import CODECS, id_bytes

    return 0 if CODECS[codec["name"]].encode_row else id_bytes(codec["logit_width"])


# --- one row --------------------------------------------------------------------------------------------


def _row_as_text(row: Row, rows: int, show: Show, positions: int) -> str:
    """Position by position: the token that was read, the one that follows, and what the teacher expected.

    Stretches that are not learnt (prompts, padding) take one line each.
    """
    shown, lines, last = 0, [], 0
    for p, learnt in enumerate(row.supervised[1:]):
        last = p + 1
        if learnt:
            lines.append(_position(row, p, show))
            shown += 1
        elif p == 0 or row.supervised[p]:
            end = _end_of_stretch(row.supervised, p)
            text = _cut(show(row.input_ids[p + 1 : end + 2]), WIDTH - 40)
            lines.append(f"{f'{p}-{end}' if end > p else p:>8}  not learnt: {text}")
        if shown == positions:
            break
    head = textwrap.wrap(f"row {row.index} of {rows}: {show(row.input_ids[: last + 1])}", WIDTH)
    return "\n".join([*head, "", f"{'position':>8}  {'token':<16} {'next':<16} targets (* = the next token)", *lines])


def _end_of_stretch(supervised: np.ndarray, p: int) -> int:
    """The last position, from p on, whose next token is not learnt either."""
    later = np.flatnonzero(supervised[p + 1 :])
    return p + int(later[0]) - 1 if len(later) else len(supervised) - 2


def _position(row: Row, p: int, show: Show) -> str:
    read, following = (_cut(show(row.input_ids[at : at + 1]), 16) for at in (p, p + 1))
    start = f"{p:>8}  {read:<16} {following:<16} "
    return (start + _targets(row, p, show, WIDTH - len(start))).rstrip()


def _targets(row: Row, p: int, show: Show, columns: int) -> str:
    """The heaviest targets that fit into the columns, and how many more there are."""
    ids, weights = row.targets.ids[p], row.targets.weights[p]
    kept = int((weights > 0).sum())
    text = ""
    for done, k in enumerate(np.argsort(-weights, kind="stable")[:kept]):
        star = "*" if ids[k] == row.input_ids[p + 1] else ""
        entry = f"{_cut(show(ids[k : k + 1]), 20)}{star} {weights[k]:.2f}"
        rest = f"  (+{kept - done - 1})" if done + 1 < kept else ""
        if text and len(text) + 2 + len(entry) + len(rest) > columns:
            return f"{text}  (+{kept - done})"
        text += f"  {entry}" if text else entry
    return text


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: columns - 2] + "…'"


# --- packed rows ----------------------------------------------------------------------------------------


def _rows_overview(path: str, reader: RowsReader) -> str:
    manifest = reader.manifest
    tokenizer, skipped = manifest["tokenizer"], manifest.get("skipped", {})
    facts = [
        ("rows", path),
        ("tokenizer", f"{tokenizer['name']} ({tokenizer['vocab_size']:,} tokens, hash {tokenizer['hash'][:12]})"),
        (
            "data",
            f"{_source(manifest['source'])}; packed with seed {manifest['seed']} to {reader.seq_len} tokens a row",
        ),
        ("left out", ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in skipped.items() if count)),
    ]
    names = ("rows", "documents", "tokens", "supervised", "padding", "bytes")
    lines = [f"{'':<10}" + "".join(f"{name.replace('supervised', 'learnt'):>14}" for name in names)]
    for name, split in manifest["splits"].items():
        lines.append(f"{name:<10}" + "".join(f"{split[key]:>14,}" if key in split else f"{'–':>14}" for key in names))
    return "\n".join([*(_fact(name, text) for name, text in facts if text), "", *lines])


def _packed_row_as_text(row: PackedRow, rows: int, show: Show, positions: int | None) -> str:
    """Stretch by stretch: where a document begins, and what is not learnt."""
    size = min(positions or len(row.input_ids), len(row.input_ids))
    learnt, starts = row.supervised[:size], row.starts[:size]
    begins = np.flatnonzero(starts | np.diff(learnt, prepend=~learnt[:1]))
    lines = [
        f"row {row.index} of {rows}: {len(row.input_ids)} tokens; documents that begin in it: {row.starts.sum()}",
        "",
    ]
    for first, end in zip(begins, [*begins[1:], size], strict=True):
        text = show(row.input_ids[first:end])
        words = "document: " * int(starts[first]) + (text if learnt[first] else f"not learnt: {_cut(text, WIDTH - 40)}")
        where = f"{f'{first}-{end - 1}' if end - first > 1 else first:>9}  "
        lines += textwrap.wrap(words, WIDTH, initial_indent=where, subsequent_indent=" " * len(where))
    return "\n".join(lines)


@contextmanager
def _decoder(path: str) -> Iterator[Show]:
    """ids -> text in quotes, or the bare ids when the cache carries no tokenizer."""
    with _local_tokenizer(path) as folder:
        if folder is None:
            yield lambda ids: " ".join(map(str, ids))
            return
        from sparsekd.vocab import load_tokenizer

        tokenizer = load_tokenizer(folder)

    def show(ids: np.ndarray) -> str:
        text = tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)
        if len(ids) == 1 and "\ufffd" in text:
            return f"<id {ids[0]}>"  # part of a character: its bytes are no text by themselves
        return repr(text)

    yield show


@contextmanager
def _local_tokenizer(path: str) -> Iterator[Path | None]:
    """The cache's tokenizer folder, or None where it has none; a remote one is copied for as long as it is read."""
    if not is_url(path):
        folder = Path(path) / "tokenizer"
        yield folder if folder.is_dir() else None
        return
    from fsspec.core import url_to_fs

    files, root = url_to_fs(join(path, "tokenizer"))
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "tokenizer"
        if files.exists(root):
            files.get(f"{root.rstrip('/')}/", str(copy), recursive=True)
        yield copy if copy.is_dir() else None
