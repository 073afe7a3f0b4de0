"""Merge: caches of the same rows, drawn with different seeds, add up to one of all their rounds, without loss.

A cache turns out too noisy: capture the same rows again with another seed and merge, instead of starting over. Counts
add, so t̂ = Σ counts / Σ rounds; unbiased parts make an unbiased whole, and independent draws average: the squared
error of random_sampling(25) + random_sampling(25) is that of random_sampling(50). Systematic parts halve theirs; one
systematic capture of all rounds errs less still, for it spaces all its points evenly. Draws from q ∝ p^t add up too,
where the temperatures are one: plain weights are then the parts' mean, to how finely the codec keeps a probability.

Shapes: L tokens of a row, M entries of a row's targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import sparsekd
from sparsekd.adding import add_draws
from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord
from sparsekd.codec import CODECS, codec_spec, default_codec
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.making import copy_tokenizer
from sparsekd.manifest import first_difference, short

# What must be one: whose distribution was drawn from, where, and how. Batches may differ: they move last bits only.
_SAME = ("rows", "seq_len", "logit_width", "data", "tokenizer", "teacher")
# What tells the parts' draws apart, so that the rest of the sampler must agree.
_OF_A_PART = {"rounds", "seed", "parts"}


def merge(
    *,
    caches: list[str],
    out: str | Path,
    codec: str | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Add caches of the same rows up to one. Their order changes nothing; run it again to go on after a stop.

    Args:
        caches: two or more folders or URLs, captured with different seeds; a merged cache may be one of them.
        out: the folder that takes the new cache.
        codec: a codec of counts; default: that of the caches where it holds all rounds, else the smallest that does.
        progress: called with (shards done, shards) after each.

    Returns:
        The manifest; its sampler names the seeds and the rounds of each part.

    Raises:
        MismatchError: another teacher, other rows or another sampler; a seed that two of them share.
        RecipeError: fewer than two caches, caches without counts, or a codec that does not hold all of it.
    """
    if len(caches) < 2:
        raise RecipeError(f"merge needs two caches or more, got {len(caches)}: sparsekd merge A B out=C")
    with ExitStack() as stack:
        readers = [stack.enter_context(CacheReader(path)) for path in caches]
        readers.sort(key=lambda reader: list(zip(*_draws(reader), strict=True)))
        spec = merged_spec(readers, codec)
        writer = CacheWriter(out, spec, engine=_engine(readers))
        copy_tokenizer(Path(readers[0].path), Path(out))
        for shard in writer.missing():
            writer.write(shard, [_merged(readers, row) for row in spec.shard_range(shard)])
            if progress:
                progress(shard + 1, spec.shards)
        return writer.finalize()


def merged_spec(readers: Sequence[CacheReader], codec: str | None = None) -> CacheSpec:
    """The identity of the whole: the first part's, with the seeds and rounds of all. Refuses what does not add up."""
    first = readers[0]
    for reader in readers:
        if reader.spec.codec.get("rounds") is None:
            raise RecipeError(
                f"{reader.path} holds {reader.spec.codec['name']}, not counts of draws; merge adds counts: capture "
                "with random_sampling or systematic, and a codec that keeps them (leave codec out)"
            )
        if "share" in reader.spec.codec:
            raise RecipeError(
                f"{reader.path} has positions chosen by the teacher's entropy, others for each seed, so counts do not "
                "add up; capture with positions_by=evenly and positions=1"
            )
        _check_same(first, reader)
    draws = [_draws(reader) for reader in readers]
    seeds, parts = [s for each in draws for s in each[0]], [n for each in draws for n in each[1]]
    _check_seeds(readers, seeds)
    sampler = first.spec.sampler | {"rounds": sum(parts), "seed": seeds, "parts": parts}
    return replace(first.spec, sampler=sampler, codec=_codec(first.spec, sum(parts), codec))


def _draws(reader: CacheReader) -> tuple[list[int], list[int]]:
    """The seeds and rounds of a cache's parts; a cache as captured has one."""
    sampler = reader.spec.sampler
    if "parts" in sampler:
        return list(sampler["seed"]), list(sampler["parts"])
    return [sampler["seed"]], [reader.spec.codec.get("rounds") or 0]


def _merged(readers: Sequence[CacheReader], row: int) -> RowRecord:
    records = [reader.record(row) for reader in readers]
    for reader, record in zip(readers, records, strict=True):
        for name in ("input_ids", "starts", "supervised"):
            if not np.array_equal(getattr(record, name), getattr(records[0], name)):
                raise MismatchError(f"row {row} of {readers[0].path} and of {reader.path} differ in {name}")
    return replace(records[0], targets=add_draws([record.targets for record in records]))


def _codec(spec: CacheSpec, rounds: int, codec: str | None) -> dict[str, Any]:
    weighing = {key: spec.codec[key] for key in ("temperature", "normalize") if key in spec.codec}
    if codec is None:
        with suppress(RecipeError):
            return codec_spec(spec.codec["name"], logit_width=spec.logit_width, rounds=rounds, **weighing)
        return default_codec(rounds, spec.logit_width, **weighing)
    chosen = codec_spec(codec, logit_width=spec.logit_width, rounds=rounds, **weighing)
    if CODECS[codec].holds != CODECS[spec.codec["name"]].holds:
        raise RecipeError(f"codec={codec} does not hold {CODECS[spec.codec['name']].holds}; leave codec out")
    return chosen


def _check_same(first: CacheReader, other: CacheReader) -> None:
    here, there = first.spec.as_dict(), other.spec.as_dict()
    for spec in (here, there):
        spec["sampler"] = {key: value for key, value in spec["sampler"].items() if key not in _OF_A_PART}
    for name in (*_SAME, "sampler"):
        if difference := first_difference(here[name], there[name], name):
            key, was, found = difference
            raise MismatchError(
                f"{first.path} has {key}={short(was)}, {other.path} has {key}={short(found)}; merge adds draws of one "
                "teacher on the same rows by the same sampler"
            )


def _check_seeds(readers: Sequence[CacheReader], seeds: list[int]) -> None:
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        names = ", ".join(reader.path for reader in readers)
        raise MismatchError(
            f"seed {twice[0]} was drawn with twice among {names}: the same draws again tell nothing new; capture "
            f"one of them with another seed, such as seed={max(seeds) + 1}"
        )


def _engine(readers: Sequence[CacheReader]) -> dict[str, Any]:
    return {"sparsekd": sparsekd.__version__, "merged": [reader.manifest["engines"] for reader in readers]}
