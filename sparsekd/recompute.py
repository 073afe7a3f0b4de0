"""Recompute: draw some rows of a cache again and see whether the same targets come out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sparsekd import models
from sparsekd.adding import add_draws
from sparsekd.cache import CacheReader, CacheSpec
from sparsekd.checks import check_at_least
from sparsekd.codec import FlatTargets, decode, encode
from sparsekd.drawing import Teacher, cpu_threads, flat_rows, open_teacher, shard_batches
from sparsekd.errors import MismatchError
from sparsekd.making import processes
from sparsekd.tensor_parallel import open_teacher_model


def recompute(cache: CacheReader, teacher: str, rows: int, seed: int = 0, device: str | None = None) -> dict[str, Any]:
    """Draw the targets of some random rows again, in their own batches, and compare them with the cache's; under a
    torchrun of as many processes as made the cache with `tensor_parallel_size`, by a teacher in those parts.

    Returns:
        rows, positions, identical (rows equal bit for bit), differing (positions that differ) and drift (mean total
        variation between stored and recomputed targets): on other hardware, logits differ in their last bits and a
        few draws move to a neighbouring id.

    Raises:
        MismatchError: the teacher's weights are not those that made the cache.
    """
    check_at_least(1, rows=rows)
    spec, device = cache.spec, models.check_device(device)
    if "transcoded" in spec.data or spec.sampler.get("name") == "pool":
        raise MismatchError(
            f"{cache.path} was not drawn from a teacher but made of other caches; verify those with their teachers"
        )
    size = spec.capture.get("tensor_parallel_size", 1)
    model = open_teacher_model(teacher, size if size == processes() else 1, dtype=spec.teacher["dtype"], device=device)
    found = models.describe(model, teacher)["weights"]
    if found != spec.teacher["weights"]:
        raise MismatchError(
            f"teacher differs: the cache was captured from {spec.teacher['id']} with weights "
            f"{spec.teacher['weights'][:12]}, {teacher} has {found[:12]}; give the same teacher"
        )
    chosen = np.random.default_rng(seed).choice(spec.rows, size=min(rows, spec.rows), replace=False)
    result = {"rows": 0, "positions": 0, "identical": 0, "differing": 0, "drift": 0.0}
    with cpu_threads(spec.capture.get("threads", 1)):
        source = open_teacher(model, spec)
        for row in sorted(int(r) for r in chosen):
            again = _redraw(source, cache, row)
            _compare(cache.flat(row), again, spec, result)
    result["drift"] /= max(result["positions"], 1)
    return result


def _redraw(source: Teacher, cache: CacheReader, row: int) -> FlatTargets:
    """The targets of one row, drawn again within the batch that it was captured in."""
    spec = source.spec
    batch = next(b for b in shard_batches(spec, row // spec.shard_rows) if row in b)
    records = [cache[r] for r in batch]
    ids = np.stack([r.input_ids for r in records])
    supervised = np.stack([r.supervised for r in records])
    parts = []
    for part in _part_specs(spec):
        drawn = replace(source, spec=part).draw(ids, supervised, batch.start)
        parts.append(flat_rows(drawn, supervised, part.codec)[row - batch.start])
    return parts[0] if len(parts) == 1 else add_draws([_stored(part, spec.codec) for part in parts])


def _stored(flat: FlatTargets, codec: dict[str, Any]) -> FlatTargets:
    """A part as the cache that it was read from held it: rounding a probability may hang on the part's own draws."""
    return decode(encode(flat, codec | {"rounds": flat.rounds}), len(flat.sizes), codec | {"rounds": flat.rounds})


def _part_specs(spec: CacheSpec) -> list[CacheSpec]:
    """The captures that a merged cache was made of, or the one capture that the cache is."""
    sampler = {key: value for key, value in spec.sampler.items() if key != "parts"}
    if sampler == spec.sampler:
        return [spec]
    return [
        replace(spec, sampler=sampler | {"seed": seed, "rounds": rounds}, codec=spec.codec | {"rounds": rounds})
        for seed, rounds in zip(spec.sampler["seed"], spec.sampler["parts"], strict=True)
    ]


def _compare(stored: FlatTargets, again: FlatTargets, spec: CacheSpec, result: dict[str, Any]) -> None:
    """Add one row's comparison to `result`; both sides as the codec returns them."""
    again = decode(encode(again, spec.codec), len(again.sizes), spec.codec)
    width = spec.logit_width
    difference = _dense(stored, width) - _dense(again, width)
    if stored.curve is not None and again.curve is not None:
        difference = stored.curve - again.curve
    total_variation = np.abs(difference).sum(-1) / 2
    result["rows"] += 1
    result["positions"] += len(stored.sizes)
    result["identical"] += int(not total_variation.any())
    result["differing"] += int((total_variation > 0).sum())
    result["drift"] += float(total_variation.sum())


def _dense(flat: FlatTargets, width: int) -> np.ndarray:
    dense = np.zeros((len(flat.sizes), width), dtype=np.float32)
    np.add.at(dense, (np.repeat(np.arange(len(flat.sizes)), flat.sizes), flat.ids), flat.weights)
    return dense
