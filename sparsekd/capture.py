"""Capture: packed rows pass the teacher once; sparse targets are drawn on its device, coded and written beside it.

The figure 1 of the paper: rows -> body -> head in chunks -> sampler (`drawing`) -> codec -> shards (`shard_thread`).
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparsekd
from sparsekd import heads, models, rng
from sparsekd.cache import CacheSpec, CacheWriter
from sparsekd.checks import check_at_least, check_seed
from sparsekd.codec import (
    CODECS,
    COUNTS,
    CURVES,
    IMPORTANCE,
    WEIGHTS,
    codec_spec,
    default_codec,
)
from sparsekd.drawing import (
    SKETCHES,
    Teacher,
    cpu_threads,
    default_shard_rows,
    draw_records,
    head_chunk,
    head_order,
    open_teacher,
    order_settings,
    read_head,
    read_rows,
    sampler_parameters,
    shard_batches,
)
from sparsekd.errors import ModelError, RecipeError, StorageError
from sparsekd.folder import expected_row_bytes, found_specs
from sparsekd.making import copy_tokenizer, parse_shard_range, processes
from sparsekd.manifest import shard_name
from sparsekd.packed import PackedBatch, RowsReader, describe_rows
from sparsekd.position_budget import LAWS, calibrate, law_settings
from sparsekd.samplers import (
    ORDERED,
    SAMPLERS,
    check_parameters,
    is_unbiased,
)
from sparsekd.shard_thread import ShardThread
from sparsekd.sketch import curve_edges
from sparsekd.tensor_parallel import check_parts, is_first, of_first, open_teacher_model

# What a position law is calibrated on.
CALIBRATION_TOKENS = 2**14


def capture(
    *,
    rows: str | Path,
    teacher: str,
    out: str | Path,
    split: str = "train",
    sampler: str | dict[str, Any] = "systematic",
    codec: str | None = None,
    seed: int = 0,
    positions: float = 1.0,
    positions_by: str = "evenly",
    batch_size: int = 8,
    shard_rows: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    threads: int = 1,
    tensor_parallel_size: int = 1,
    limit_rows: int | None = None,
    shard_range: str | None = None,
    force: bool = False,
    progress: Callable[[int, dict[str, Any]], Any] | None = None,
) -> dict[str, Any] | None:
    """Make (or go on making) the cache of `rows` under `teacher` in the folder `out`.

    Run it again to resume; run it in several processes at once (torchrun shares the shards out by rank, independent
    jobs by `shard_range="a:b"`): the folder comes out byte-identical on the same hardware and software.

    Args:
        rows: a folder of packed rows.
        split: one of its splits.
        teacher: a local path or hub id of a causal language model.
        out: the folder that takes the cache.
        sampler: systematic, random_sampling (the paper's), top_k, top_p, full, or for students of other vocabularies
            sorted_curve (ULD, ALM); or {"name": ..., parameters}. The first two take 50 rounds by default. On the
            command line: sampler=top_k sampler.k=12.
            systematic has an order besides: sampler.order=head draws over ids whose rows of the teacher's head are
            alike side by side (13 to 26 % less noise at the same bytes; the default where the head can be read, for
            which it keeps a copy of it), sampler.order=ids over the ids as they are.
        codec: of counts split, raw24 (the paper's), paper24 or raw40, of the others see docs/format.md; default: the
            smallest lossless one that fits.
        seed: of the draws.
        positions: share of the supervised positions that are kept, chosen at random; the others are not learnt. At the
            same number of labels fewer rounds everywhere are better (noise 1.04, 1.13, 1.40, 2.50 times as large for
            0.9, 0.75, 0.5, 0.25; docs/LOG.md): this is for a cache below what the fewest useful rounds take.
        positions_by: evenly, or what a position's chance is in proportion to: entropy (the teacher's), or certainty,
            1 / (1 + entropy). Targets weigh the inverse, so nothing is biased; a byte a position more is stored. Price
            at as many labels in all, half of the positions: 1.86 times the noise of keeping all by evenly, 4.19 by
            entropy, 1.43 by certainty (docs/LOG.md; `plan student=MODEL` tells your own).
        batch_size: rows that pass the teacher together; part of the cache's identity.
        shard_rows: rows of a shard, the unit of resume; default: at most 4M tokens, and 16 shards of a small cache.
        dtype: of the teacher; default float32 on a CPU, bfloat16 on an accelerator.
        device: "cpu", "cuda" or "cuda:N"; default: the accelerator where there is one.
        threads: CPU threads of this process, part of the cache's identity because the last bits of logits may depend
            on it. One by default, whatever OMP_NUM_THREADS says: give a CPU more processes (torchrun) instead.
        tensor_parallel_size: parts that the teacher is held in, one a process of torchrun, which draw together and the
            first of which writes; for a teacher too large for one accelerator. Part of the cache's identity: sums in
            another order move a draw in a few thousand to a neighbouring id. Not for sampler=full.
        limit_rows: only the first rows of the split.
        shard_range: "a:b" makes only the shards a .. b-1.
        force: write although the disk looks too small.
        progress: called with (tokens done, facts) after each batch.

    Returns:
        The manifest, or None when shards of other workers are still missing.

    Raises:
        RecipeError: an unknown name, or a setting outside its range.
        MismatchError: rows, teacher and the folder's earlier contents that do not belong together.
        SourceError, ModelError: rows or a teacher that cannot be opened.
        StorageError: the disk is, or would become, full.
    """
    check_at_least(1, batch_size=batch_size, shard_rows=shard_rows, threads=threads, limit_rows=limit_rows)
    check_at_least(1, tensor_parallel_size=tensor_parallel_size)
    check_seed(seed)
    if not 0 < positions <= 1:
        raise RecipeError(f"positions={positions} is a share of the positions, above 0 and at most 1")
    name, parameters = _sampler(sampler)
    _check_positions_by(positions_by, positions, name)
    _check_codec(codec, name, parameters)
    check_parts(tensor_parallel_size, name)
    device = models.check_device(device)
    reader = RowsReader(rows, split)
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    model = open_teacher_model(teacher, tensor_parallel_size, dtype=dtype, device=device)
    _check_teacher(model, teacher, reader)
    wanted = parameters.pop("order", None)
    with cpu_threads(threads):
        order_V = _order(model, name, wanted)
        draws = {"name": name, **parameters, "seed": seed} | order_settings(name, order_V)
        spec = _make_spec(reader, model, teacher, draws, codec, batch_size, shard_rows, limit_rows, positions)
        if tensor_parallel_size > 1:
            spec = replace(spec, capture=spec.capture | {"tensor_parallel_size": tensor_parallel_size})
        if positions_by != "evenly":
            spec = with_position_law(open_teacher(model, spec, order_V), reader, positions_by, positions)
        spec = _named_as_begun(spec, Path(out))
        writer = CacheWriter(out, spec, engine=_engine(device))
        copy_tokenizer(reader.path, Path(out))
        source = open_teacher(model, spec, order_V)
        missing = writer.missing(parse_shard_range(shard_range, spec.shards))
        todo = _share(missing) if tensor_parallel_size == 1 else of_first(missing, tensor_parallel_size)
        if todo:
            estimate = _preflight(source, reader, todo, Path(out), force)
            writes = is_first(tensor_parallel_size)
            _make_shards(source, reader, writer if writes else None, todo, estimate, progress)
    manifest = None
    if is_first(tensor_parallel_size) and all((Path(out) / shard_name(shard)).exists() for shard in range(spec.shards)):
        manifest = writer.finalize()
    return of_first(manifest, tensor_parallel_size)


# --- the spec -------------------------------------------------------------------------------------------


def _make_spec(
    reader: RowsReader,
    model: Any,
    teacher: str,
    draws: dict[str, Any],
    codec: str | None,
    batch_size: int,
    shard_rows: int | None,
    limit_rows: int | None,
    positions: float = 1.0,
) -> CacheSpec:
    """Everything that the cache's bytes depend on, and what later stages compare."""
    width, parameters = heads.logit_width(model), {key: draws[key] for key in sampler_parameters(draws["name"])}
    count = min(len(reader), limit_rows or len(reader))
    weighing: dict[str, Any] = {key: parameters[key] for key in ("temperature", "normalize") if key in parameters}
    if "top" in parameters:
        weighing["edges"] = curve_edges(width, parameters["top"])
    rounds, choose = parameters.get("rounds"), default_codec if codec is None else partial(codec_spec, codec)
    device = next(model.parameters()).device.type
    return CacheSpec(
        rows=count,
        seq_len=reader.seq_len,
        shard_rows=shard_rows or default_shard_rows(count, reader.seq_len, batch_size),
        logit_width=width,
        codec=choose(rounds=rounds, logit_width=width, **weighing),
        sampler=draws | {"rng": rng.ALGORITHM, "unbiased": _is_unbiased(draws["name"], parameters)},
        teacher=models.describe(model, teacher),
        tokenizer=reader.manifest["tokenizer"],
        data=describe_rows(reader),
        capture={
            "batch_size": batch_size,
            "head_chunk": head_chunk(width, device),
        }
        | ({"threads": torch.get_num_threads()} if device == "cpu" else {})
        | ({"positions": float(positions)} if positions < 1 else {}),
    )


def _named_as_begun(spec: CacheSpec, out: Path) -> CacheSpec:
    """The spec with the teacher's name as the folder has it already: the same weights may have moved since, or lie
    elsewhere on this worker's machine."""
    _, begun = next(found_specs(out), (None, spec)) if out.is_dir() else (None, spec)
    if begun.teacher.get("weights") != spec.teacher["weights"]:
        return spec  # the writer says what differs
    return replace(spec, teacher=spec.teacher | {key: begun.teacher.get(key) for key in ("id", "revision")})


def with_position_law(source: Teacher, reader: RowsReader, by: str, share: float) -> CacheSpec:
    """The spec with a law of positions, calibrated on rows of the whole cache, 16k tokens of them."""
    spec, size = source.spec, source.spec.capture["batch_size"]
    numbers = np.unique(np.linspace(0, spec.rows - 1, max(1, CALIBRATION_TOKENS // spec.seq_len)).astype(int))
    found = []
    for start in range(0, len(numbers), size):
        rows = [reader.batch(range(number, number + 1)) for number in numbers[start : start + size]]
        read = (np.concatenate([getattr(row, name) for row in rows]) for name in ("input_ids", "supervised"))
        found.append(source.entropies(*read).cpu())
    law = calibrate(torch.cat(found), by, share)
    return replace(spec, capture=spec.capture | law_settings(law), codec=spec.codec | {"share": law.share})


def _is_unbiased(name: str, parameters: dict[str, Any]) -> bool:
    return name not in SKETCHES and is_unbiased(name, parameters)


def _sampler(sampler: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A sampler's name and all of its parameters, checked."""
    settings = {"name": sampler} if isinstance(sampler, str) else dict(sampler)
    name = settings.pop("name", "systematic")
    order = {"order": settings.pop("order")} if "order" in settings and name in ORDERED else {}
    defaults = sampler_parameters(name) if isinstance(name, str) and name in SAMPLERS | SKETCHES else {}
    for key in settings.keys() & defaults.keys():
        kind, value = type(defaults[key]), settings[key]
        if type(value) is not kind and not (kind is float and type(value) is int):
            words = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise RecipeError(f"sampler.{key}={value!r} is not {words}; its default is {defaults[key]}")
        settings[key] = kind(value)  # 1 and 1.0 are one setting, and one header
    if name in SKETCHES:
        _check_sketch(name, settings, defaults)
    else:
        check_parameters(name, settings)
    return name, defaults | settings | order


def _order(model: Any, sampler: str, wanted: str | None) -> Tensor | None:
    """The order of the ids that draws are made in, None for that of the ids themselves."""
    if wanted not in (None, "head", "ids"):
        raise RecipeError(f"sampler.order={wanted!r} is unknown; there are head and ids")
    if sampler not in ORDERED or wanted == "ids":
        return None
    order_V = head_order(read_head(model))
    if wanted == "head" and order_V is None:
        raise ModelError("sampler.order=head needs a head that can be read, this teacher's cannot; leave order out")
    return order_V


def _check_sketch(name: str, settings: dict[str, Any], known: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key not in known:
            raise RecipeError(f"sampler {name} has no parameter {key!r}; it has: {', '.join(known)}")
        if not 1 <= value <= 2**11:
            raise RecipeError(f"sampler.{key}={value!r} is out of range: 1 to {2**11}")


def _check_positions_by(by: str, share: float, sampler: str) -> None:
    if by not in ("evenly", *LAWS):
        raise RecipeError(f"positions_by={by!r} is unknown; there are evenly, {', '.join(LAWS)}")
    if by != "evenly" and share == 1:
        raise RecipeError(f"positions_by={by} chooses among positions, and all are kept; give positions=0.5, say")
    if by != "evenly" and sampler in SKETCHES:
        raise RecipeError(f"positions_by={by} weighs sparse targets, sampler {sampler} gives none; leave it out")


def _check_codec(codec: str | None, sampler: str, parameters: dict[str, Any]) -> None:
    """Refuse a codec that does not hold what the sampler gives: counts, importance draws or weights."""
    if codec is None:
        return
    if codec not in CODECS:
        raise RecipeError(f"codec={codec!r} is unknown; there are {', '.join(CODECS)}")
    gives = _gives(sampler, parameters)
    if CODECS[codec].holds not in gives:
        fits = [name for name, code in CODECS.items() if code.holds in gives]
        raise RecipeError(
            f"codec={codec} holds {CODECS[codec].holds}, sampler {sampler} with these parameters gives {gives[0]}; "
            f"take {' or '.join(fits)}, or leave codec out"
        )


def _gives(sampler: str, parameters: dict[str, Any]) -> tuple[str, ...]:
    """What of the sampler can be stored, the best first: importance draws can be weighed before."""
    if "rounds" not in parameters:
        return (CURVES,) if sampler in SKETCHES else (WEIGHTS,)
    return (COUNTS,) if parameters["temperature"] == 1 else (IMPORTANCE, WEIGHTS)


def _engine(device: str) -> dict[str, Any]:
    """On what the shards were made: recorded, not part of the identity."""
    import transformers

    engine: dict[str, Any] = {
        "sparsekd": sparsekd.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
    }
    return engine


# --- refusals -------------------------------------------------------------------------------------------


def _check_teacher(model: Any, teacher: str, reader: RowsReader) -> None:
    """The teacher must read these rows: its context, its width, and its tokenizer where it brings one."""
    models.check_context(model, reader.seq_len, "teacher")
    way_out = "pack the rows with the teacher's tokenizer"
    models.check_width(model, reader.manifest["tokenizer"]["vocab_size"], f"teacher {teacher}", way_out)
    models.check_own_tokenizer(teacher, reader.tokenizer_hash, "teacher", way_out)


def _preflight(source: Teacher, reader: RowsReader, todo: list[int], out: Path, force: bool) -> float:
    """Bytes per token of the first rows; refuse early when that, times all that is to come, does not fit the disk."""
    spec = source.spec
    batch = next(shard_batches(spec, todo[0]))
    records = draw_records(source, reader, batch)
    _check_repeats(source, read_rows(reader, batch, spec))
    each = expected_row_bytes(records, spec.codec, spec.shard_rows)
    needed = int(each * sum(len(spec.shard_range(shard)) for shard in todo) * 1.02)
    free = shutil.disk_usage(out).free
    if needed > free and not force:
        raise StorageError(
            f"the shards to come need about {needed / 1e9:.2f} GB ({each / spec.seq_len:.1f} bytes per "
            f"token), {out} has {free / 1e9:.2f} GB free; free some, take fewer rounds, or add --force"
        )
    return each / spec.seq_len


def _check_repeats(source: Teacher, rows: PackedBatch) -> None:
    """Say so where a GPU gives other bits for the same batch: nobody sees it in a cache, until it is made again."""
    if source.model.device.type != "cpu" and not source.repeats(rows.input_ids, rows.supervised):
        warnings.warn(
            "the teacher gives other bits for the same rows a second time (kernels that add in any order, or tune "
            "themselves): this cache is as unbiased as any, but a shard made again may differ in a draw in some 10,000",
            stacklevel=2,
        )


# --- the work -------------------------------------------------------------------------------------------


def _make_shards(
    source: Teacher,
    reader: RowsReader,
    writer: CacheWriter | None,
    todo: list[int],
    estimate: float,
    progress: Callable[[int, dict[str, Any]], Any] | None,
) -> None:
    """Every shard's batches through the teacher; coding and writing follow on a thread of their own, in the process
    that has a writer."""
    spec, done = source.spec, 0
    total = sum(len(spec.shard_range(shard)) for shard in todo) * spec.seq_len
    with ShardThread(writer, estimate) if writer else nullcontext() as background:
        for shard in todo:
            for batch in shard_batches(spec, shard):
                rows = read_rows(reader, batch, spec)
                drawn = source.draw(rows.input_ids, rows.supervised, batch.start)
                if background is None:
                    continue
                background.put(shard, batch, rows, drawn)
                done += len(batch) * spec.seq_len
                if progress:
                    progress(done, {"total": total, "shard": shard, "bytes_per_token": background.bytes_per_token()})


def _share(shards: list[int]) -> list[int]:
    """This process's part under torchrun: every world-size-th shard."""
    rank = int(os.environ.get("RANK", 0))
    return [shard for shard in shards if shard % processes() == rank]
