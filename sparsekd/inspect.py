"""What is in a cache, in words and numbers, and any row as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.cache import CacheReader

_BAR = 40


def cache_stats(reader: CacheReader, sample_rows: int = 512) -> dict[str, Any]:
    """Numbers of a cache: exact totals from its manifest, the distribution of ids per token from evenly spread rows.

    bytes_per_token counts whole shard files (input ids, targets, index), target_bytes_per_token the coded targets.
    """
    spec, totals = reader.spec, reader.stats
    rows = np.unique(np.linspace(0, len(reader) - 1, min(sample_rows, len(reader))).astype(int))
    sizes = np.concatenate([reader.flat(int(row)).sizes for row in rows])
    files = sum(shard["bytes"] for shard in reader.manifest["shards"])
    id_bytes = totals["payload_bytes"] - totals["tokens"] * _id_bytes(spec.logit_width)
    positions = max(totals["positions"], 1)
    return {
        "rows": spec.rows,
        "tokens": totals["tokens"],
        "positions": totals["positions"],
        "rounds": spec.codec.get("rounds"),
        "unique_ids": {"mean": totals["pairs"] / positions, "histogram": np.bincount(sizes).tolist()},
        "bytes": files,
        "bytes_per_token": files / max(totals["tokens"], 1),
        "target_bytes_per_token": id_bytes / positions,
        "next_token_hit_rate": totals["next_token_hits"] / positions,
        "next_token_weight": totals["next_token_weight"] / positions,
    }


def describe_cache(path: str, row: int | None = None, positions: int = 24) -> str:
    """The page that `sparsekd inspect` prints: the whole cache, or one row decoded as text beside its targets."""
    with CacheReader(path) as reader:
        return _overview(path, reader) if row is None else _row_as_text(path, reader, row, positions)


def _overview(path: str, reader: CacheReader) -> str:
    spec, stats = reader.spec, cache_stats(reader)
    sampler = {k: v for k, v in spec.sampler.items() if k not in ("name", "rng", "unbiased", "seed")}
    settings = ", ".join(f"{k}={v}" for k, v in sampler.items())
    lines = [
        f"cache      {path}",
        f"teacher    {spec.teacher.get('id')} ({spec.teacher.get('architecture')}, "
        f"{spec.teacher.get('parameters', 0):,} parameters, {spec.teacher.get('dtype')}, "
        f"weights {str(spec.teacher.get('weights'))[:12]})",
        f"tokenizer  {spec.tokenizer.get('name')} ({spec.tokenizer.get('vocab_size'):,} tokens, "
        f"hash {str(spec.tokenizer.get('hash'))[:12]}); the teacher makes {spec.logit_width:,} logits",
        f"data       {_source(spec.data.get('source'))}, split {spec.data.get('split')}, packed with seed "
        f"{spec.data.get('seed')} to rows of {spec.seq_len} ({str(spec.data.get('fingerprint'))[:12]})",
        f"sampler    {spec.sampler['name']}({settings}), seed {spec.sampler.get('seed')}, "
        f"{'unbiased' if spec.sampler.get('unbiased') else 'biased'}",
        f"codec      {spec.codec['name']}",
        "",
        f"rows                    {stats['rows']:>14,}   in {len(reader.manifest['shards'])} shards",
        f"tokens                  {stats['tokens']:>14,}   {stats['positions']:,} of them supervised targets",
        f"size                    {_size(stats['bytes']):>14}",
        f"bytes per token         {stats['bytes_per_token']:>14.1f}   "
        f"{stats['target_bytes_per_token']:.1f} of targets, the rest input ids and index",
        f"ids per token           {stats['unique_ids']['mean']:>14.1f}",
        f"next token in the set   {stats['next_token_hit_rate']:>14.1%}   of positions",
        f"mass on the next token  {stats['next_token_weight']:>14.1%}   on average",
        "",
        "ids per token",
        *_histogram(stats["unique_ids"]["histogram"]),
    ]
    return "\n".join(lines)


def _source(source: Any) -> str:
    """A manifest's description of where documents came from, in a few words."""
    if not isinstance(source, dict):
        return str(source)
    parts = [str(value) for key, value in source.items() if key in ("kind", "id", "path", "paths", "python", "name")]
    return " ".join(parts) or "unknown source"


def _histogram(counts: list[int], most: int = 16) -> list[str]:
    """Text bars; neighbouring sizes are joined so that there are at most `most` of them."""
    width = max(1, -(-len(counts) // most))
    joined = [sum(counts[start : start + width]) for start in range(0, len(counts), width)]
    total, largest = max(sum(joined), 1), max([*joined, 1])
    lines = []
    for index, count in enumerate(joined):
        first, last = index * width, min((index + 1) * width, len(counts)) - 1
        label = f"{first}" if first == last else f"{first}-{last}"
        lines.append(f"  {label:>9}  {'█' * round(_BAR * count / largest):<{_BAR}} {count / total:6.1%}")
    return lines


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _id_bytes(logit_width: int) -> int:
    from sparsekd.codec import id_bytes

    return id_bytes(logit_width)


def _row_as_text(path: str, reader: CacheReader, row: int, positions: int) -> str:
    """Position by position: the token that was read, the one that follows, and what the teacher expected."""
    record = reader[row]
    show = _decoder(path)
    lines = [
        f"row {record.index} of {len(reader)}: {show(record.input_ids[: positions + 1])}",
        "",
        f"{'position':>8}  {'token':<16} {'next':<16} teacher's targets (* = the next token)",
    ]
    for p in range(min(positions, len(record.input_ids) - 1)):
        if not record.supervised[p + 1]:
            lines.append(f"{p:>8}  {show(record.input_ids[p : p + 1]):<16} (not supervised)")
            continue
        ids, weights = record.targets.ids[p], record.targets.weights[p]
        order = np.argsort(-weights, kind="stable")[:6]
        shown = [
            f"{show(ids[k : k + 1])}{'*' if ids[k] == record.input_ids[p + 1] else ''} {weights[k]:.2f}"
            for k in order
            if weights[k] > 0
        ]
        more = int((weights > 0).sum()) - len(shown)
        lines.append(
            f"{p:>8}  {show(record.input_ids[p : p + 1]):<16} {show(record.input_ids[p + 1 : p + 2]):<16} "
            f"{'  '.join(shown)}{f'  (+{more})' if more else ''}"
        )
    return "\n".join(lines)


def _decoder(path: str) -> Any:
    """ids -> text in quotes, or the bare ids when the cache carries no tokenizer."""
    folder = Path(path) / "tokenizer"
    if not folder.is_dir():
        return lambda ids: " ".join(map(str, ids))
    from sparsekd.vocab import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda ids: repr(tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False))
