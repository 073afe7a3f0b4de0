"""Capture: packed rows pass the teacher once; sparse targets are drawn on its device, coded and written beside it.

The figure 1 of the paper in one file: rows -> body -> head in chunks -> sampler -> queue -> codec -> shards.
Shapes: B rows, L tokens, H hidden size, V logit width, C positions of a chunk, K kept ids.
"""

from __future__ import annotations

import inspect
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparsekd
from sparsekd import models, rng
from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord
from sparsekd.checks import check_at_least, check_seed
from sparsekd.codec import (
    CODECS,
    COUNTS,
    IMPORTANCE,
    WEIGHTS,
    FlatTargets,
    Importance,
    codec_spec,
    decode,
    default_codec,
    encode,
    encode_row,
)
from sparsekd.errors import MismatchError, ModelError, RecipeError, StorageError
from sparsekd.manifest import shard_name
from sparsekd.packed import RowsReader, describe_rows
from sparsekd.samplers import (
    SAMPLERS,
    ImportanceDraws,
    check_parameters,
    is_unbiased,
    sample,
    sample_importance,
)
from sparsekd.targets import SparseTargets

# A shard is the unit of resume: at most 4M tokens (minutes of one accelerator), and 16 of them in a small cache.
SHARD_TOKENS = 2**22
# The head's fp32 logits exist for this many bytes at a time; part of the manifest through head_chunk.
HEAD_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
QUEUE_BATCHES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What one batch of rows gave: targets of its supervised positions, in order, still on the teacher's device."""

    parts: list[SparseTargets | ImportanceDraws]


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A model with its head apart, and how rows pass it."""

    model: Any
    head: models.Head
    spec: CacheSpec

    @torch.no_grad()
    def draw(self, input_ids_BL: np.ndarray, supervised_BL: np.ndarray, first_row: int) -> Drawn:
        """Targets for every position whose next token is supervised; [B, L, V] logits never exist."""
        device = next(self.model.parameters()).device
        ids = torch.from_numpy(input_ids_BL.astype(np.int64)).to(device)
        wanted = torch.from_numpy(supervised_BL[:, 1:].astype(bool)).to(device)
        if self.head.weight_VH is None:
            hidden = self.model(input_ids=ids, use_cache=False).logits
        else:
            hidden = models.body_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        rows, positions = wanted.nonzero(as_tuple=True)
        hidden_NH = hidden[rows, positions]
        chunk, sampler = self.spec.capture["head_chunk"], dict(self.spec.sampler)
        name, seed = sampler["name"], sampler["seed"]
        parameters = {key: sampler[key] for key in _parameters(name)}
        draw = _draw_for(self.spec.codec)
        drawn = Drawn(parts=[])
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits_CV = self.head.logits(hidden_NH[part])
            keys = {"seed": seed, "rows": rows[part] + first_row, "positions": positions[part]}
            drawn.parts.append(draw(logits_CV, name, **keys, **parameters))
        return drawn


def _draw_for(codec: dict[str, Any]) -> Callable[..., SparseTargets | ImportanceDraws]:
    """What the codec holds: targets, or draws that are not weighed yet. Wide integers stay behind: K ids of every
    position of a batch wait on the device for the codec."""

    def targets(logits_CV: Tensor, name: str, **settings: Any) -> SparseTargets:
        found = sample(logits_CV, name, **settings)
        return SparseTargets(ids=found.ids.to(torch.int32), weights=found.weights)

    def unweighed(logits_CV: Tensor, name: str, *, normalize: bool, **settings: Any) -> ImportanceDraws:
        found = sample_importance(logits_CV, **settings)
        ids, counts = found.ids.to(torch.int32), found.counts.to(torch.int32)
        return replace(found, ids=ids, counts=counts, log2_p=found.log2_p.float())

    return unweighed if CODECS[codec["name"]].holds == IMPORTANCE else targets


def capture(
    *,
    rows: str | Path,
    teacher: str,
    out: str | Path,
    split: str = "train",
    sampler: str | dict[str, Any] = "random_sampling",
    codec: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    shard_rows: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    threads: int = 1,
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
        sampler: a name of `SAMPLERS`, or {"name": ..., parameters}; random_sampling takes 50 rounds by default. On
            the command line: sampler=top_k sampler.k=12.
        codec: a name of `codec.CODECS`; default: the smallest lossless one that fits.
        seed: of the draws.
        batch_size: rows that pass the teacher together; part of the cache's identity.
        shard_rows: rows of a shard, the unit of resume; default: at most 4M tokens, and 16 shards of a small cache.
        dtype: of the teacher; default float32 on a CPU, bfloat16 on an accelerator.
        device: "cpu", "cuda" or "cuda:N"; default: the accelerator where there is one.
        threads: CPU threads of this process, part of the cache's identity because the last bits of logits may depend
            on it. One by default, whatever OMP_NUM_THREADS says: give a CPU more processes (torchrun) instead.
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
    check_seed(seed)
    name, parameters = _sampler(sampler)
    _check_codec(codec, name, parameters)
    device = models.check_device(device)
    reader = RowsReader(rows, split)
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    model = models.open_model(teacher, dtype=dtype, device=device)
    _check_teacher(model, teacher, reader)
    draws = {"name": name, **parameters, "seed": seed}
    with cpu_threads(threads):
        spec = _make_spec(reader, model, teacher, draws, codec, batch_size, shard_rows, limit_rows)
        writer = CacheWriter(out, spec, engine=_engine(device))
        _copy_tokenizer(reader.path, Path(out))
        source = Teacher(model=model, head=_head(model), spec=spec)
        todo = _share(writer.missing(_parse_range(shard_range, spec.shards)))
        if todo:
            estimate = _preflight(source, reader, todo, Path(out), force)
            _make_shards(source, reader, writer, todo, estimate, progress)
    if all((Path(out) / shard_name(shard)).exists() for shard in range(spec.shards)):
        return writer.finalize()
    return None


def recompute(cache: CacheReader, teacher: str, rows: int, seed: int = 0, device: str | None = None) -> dict[str, Any]:
    """Draw the targets of some random rows again, in their own batches, and compare them with the cache's.

    Returns:
        rows, positions, identical (rows equal bit for bit), differing (positions that differ) and drift (mean total
        variation between stored and recomputed targets): on other hardware, logits differ in their last bits and a
        few draws move to a neighbouring id.

    Raises:
        MismatchError: the teacher's weights are not those that made the cache.
    """
    check_at_least(1, rows=rows)
    spec, device = cache.spec, models.check_device(device)
    model = models.open_model(teacher, dtype=spec.teacher["dtype"], device=device)
    found = models.describe(model, teacher)["weights"]
    if found != spec.teacher["weights"]:
        raise MismatchError(
            f"teacher differs: the cache was captured from {spec.teacher['id']} with weights "
            f"{spec.teacher['weights'][:12]}, {teacher} has {found[:12]}; give the same teacher"
        )
    source = Teacher(model=model, head=_head(model), spec=spec)
    chosen = np.random.default_rng(seed).choice(spec.rows, size=min(rows, spec.rows), replace=False)
    result = {"rows": 0, "positions": 0, "identical": 0, "differing": 0, "drift": 0.0}
    with cpu_threads(spec.capture.get("threads", 1)):
        for row in sorted(int(r) for r in chosen):
            again = _redraw(source, cache, row)
            _compare(cache.flat(row), again, spec, result)
    result["drift"] /= max(result["positions"], 1)
    return result


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads inside torch's operators; the number before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _redraw(source: Teacher, cache: CacheReader, row: int) -> FlatTargets:
    """The targets of one row, drawn again within the batch that it was captured in."""
    spec = source.spec
    batch = next(b for b in _batches(spec, row // spec.shard_rows) if row in b)
    records = [cache[r] for r in batch]
    ids = np.stack([r.input_ids for r in records])
    supervised = np.stack([r.supervised for r in records])
    drawn = source.draw(ids, supervised, batch.start)
    return _flat_rows(drawn, supervised, spec.codec)[row - batch.start]


def _compare(stored: FlatTargets, again: FlatTargets, spec: CacheSpec, result: dict[str, Any]) -> None:
    """Add one row's comparison to `result`; both sides as the codec returns them."""
    again = decode(encode(again, spec.codec), len(again.sizes), spec.codec)
    width = spec.logit_width
    difference = _dense(stored, width) - _dense(again, width)
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
) -> CacheSpec:
    """Everything that the cache's bytes depend on, and what later stages compare."""
    width, parameters = models.logit_width(model), {key: draws[key] for key in _parameters(draws["name"])}
    count = min(len(reader), limit_rows or len(reader))
    weighing = {key: parameters[key] for key in ("temperature", "normalize") if key in parameters}
    rounds, choose = parameters.get("rounds"), default_codec if codec is None else partial(codec_spec, codec)
    device = next(model.parameters()).device.type
    return CacheSpec(
        rows=count,
        seq_len=reader.seq_len,
        shard_rows=shard_rows or _default_shard_rows(count, reader.seq_len, batch_size),
        logit_width=width,
        codec=choose(rounds=rounds, logit_width=width, **weighing),
        sampler=draws | {"rng": rng.ALGORITHM, "unbiased": is_unbiased(draws["name"], parameters)},
        teacher=models.describe(model, teacher),
        tokenizer=reader.manifest["tokenizer"],
        data=describe_rows(reader),
        capture={
            "batch_size": batch_size,
            "head_chunk": max(1, HEAD_BYTES.get(device, HEAD_BYTES["cuda"]) // (4 * width)),
        }
        | ({"threads": torch.get_num_threads()} if device == "cpu" else {}),
    )


def _sampler(sampler: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A sampler's name and all of its parameters, checked."""
    settings = {"name": sampler} if isinstance(sampler, str) else dict(sampler)
    name = settings.pop("name", "random_sampling")
    defaults = _parameters(name) if isinstance(name, str) and name in SAMPLERS else {}
    for key in settings.keys() & defaults.keys():
        kind, value = type(defaults[key]), settings[key]
        if type(value) is not kind and not (kind is float and type(value) is int):
            words = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise RecipeError(f"sampler.{key}={value!r} is not {words}; its default is {defaults[key]}")
    check_parameters(name, settings)
    return name, defaults | settings


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
        return (WEIGHTS,)
    return (COUNTS,) if parameters["temperature"] == 1 else (IMPORTANCE, WEIGHTS)


def _parameters(sampler: str) -> dict[str, Any]:
    """A sampler's parameters with their defaults, so that the manifest states every one."""
    signature = inspect.signature(SAMPLERS[sampler]).parameters.values()
    return {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}


def _default_shard_rows(rows: int, seq_len: int, batch_size: int) -> int:
    wanted = max(1, min(SHARD_TOKENS // seq_len, -(-rows // 16)))
    return -(-wanted // batch_size) * batch_size


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


def _head(model: Any) -> models.Head:
    """The model's head when body + head give its own logits, else a stand-in that takes its logits whole."""
    with suppress(ModelError):
        if models.rebuilt_error(model) <= 0.05:
            return models.head_of(model)
    return models.Head(weight_VH=None)


# --- refusals -------------------------------------------------------------------------------------------


def _check_teacher(model: Any, teacher: str, reader: RowsReader) -> None:
    """The teacher must read these rows: its context, its width, and its tokenizer where it brings one."""
    models.check_context(model, reader.seq_len, "teacher")
    size = reader.manifest["tokenizer"]["vocab_size"]
    if models.logit_width(model) < size:
        raise MismatchError(
            f"vocabulary differs: the rows' tokenizer has {size} tokens, teacher {teacher} makes "
            f"{models.logit_width(model)} logits; pack the rows with the teacher's tokenizer"
        )
    models.check_own_tokenizer(teacher, reader.tokenizer_hash, "teacher", "pack the rows with the teacher's tokenizer")


def _preflight(source: Teacher, reader: RowsReader, todo: list[int], out: Path, force: bool) -> float:
    """Bytes per token of the first rows; refuse early when that, times all that is to come, does not fit the disk."""
    spec = source.spec
    batch = next(_batches(spec, todo[0]))
    records = _records(source, reader, batch)
    size = sum(len(encode_row(r.input_ids, r.targets, r.supervised, spec.codec)) for r in records)
    needed = int(size / len(batch) * sum(len(spec.shard_range(shard)) for shard in todo) * 1.02)
    free = shutil.disk_usage(out).free
    if needed > free and not force:
        raise StorageError(
            f"the shards to come need about {needed / 1e9:.2f} GB ({size / len(batch) / spec.seq_len:.1f} bytes per "
            f"token), {out} has {free / 1e9:.2f} GB free; free some, take fewer rounds, or add --force"
        )
    return size / len(batch) / spec.seq_len


# --- the work -------------------------------------------------------------------------------------------


def _make_shards(
    source: Teacher,
    reader: RowsReader,
    writer: CacheWriter,
    todo: list[int],
    estimate: float,
    progress: Callable[[int, dict[str, Any]], Any] | None,
) -> None:
    """Every shard's batches through the teacher; coding and writing follow on a thread of their own."""
    spec, done = source.spec, 0
    total = sum(len(spec.shard_range(shard)) for shard in todo) * spec.seq_len
    with ShardThread(writer, estimate) as background:
        for shard in todo:
            for batch in _batches(spec, shard):
                rows = reader.batch(batch)
                drawn = source.draw(rows.input_ids, rows.supervised, batch.start)
                background.put(shard, batch, rows, drawn)
                done += len(batch) * spec.seq_len
                if progress:
                    progress(done, {"total": total, "shard": shard, "bytes_per_token": background.bytes_per_token()})


def _records(source: Teacher, reader: RowsReader, batch: range) -> list[RowRecord]:
    rows = reader.batch(batch)
    drawn = source.draw(rows.input_ids, rows.supervised, batch.start)
    return _to_records(rows, drawn, source.spec.codec)


def _to_records(rows: Any, drawn: Drawn, codec: dict[str, Any]) -> list[RowRecord]:
    flats = _flat_rows(drawn, rows.supervised, codec)
    return [
        RowRecord(input_ids=ids, targets=flat, starts=starts, supervised=supervised)
        for ids, flat, starts, supervised in zip(rows.input_ids, flats, rows.starts, rows.supervised, strict=True)
    ]


def _flat_rows(drawn: Drawn, supervised_BL: np.ndarray, codec: dict[str, Any]) -> list[FlatTargets]:
    """One FlatTargets per row from the targets of a batch's supervised positions."""
    nothing = decode(b"", 0, codec)  # a batch may have no supervised position at all
    whole = FlatTargets.join([nothing, *(_flat(part, codec) for part in drawn.parts)])
    ends = supervised_BL[:, 1:].sum(-1).cumsum()
    return [whole.take(np.arange(first, last)) for first, last in zip([0, *ends[:-1]], ends, strict=True)]


def _flat(part: SparseTargets | ImportanceDraws, codec: dict[str, Any]) -> FlatTargets:
    ids, rounds = part.ids.cpu().numpy(), codec.get("rounds")
    if isinstance(part, SparseTargets):
        return FlatTargets.from_padded(ids, _values(part.weights, rounds), rounds)
    importance = Importance(
        log2_p=part.log2_p.cpu().numpy(),
        entropy=part.entropy.cpu().numpy().astype(np.float32),
        temperature=codec["temperature"],
        normalize=codec["normalize"],
    )
    return FlatTargets.from_padded(ids, part.counts.cpu().numpy(), rounds, importance)


def _values(weights: Tensor, rounds: int | None) -> np.ndarray:
    """Counts when the weights are counts / rounds (exact: both are small integers in float32), else the weights."""
    array = weights.cpu().numpy()
    return array if rounds is None else np.rint(array.astype(np.float64) * rounds).astype(np.uint32)


class ShardThread:
    """One thread that codes batches and writes finished shards; its failure fails the run at the next batch."""

    def __init__(self, writer: CacheWriter, estimate: float) -> None:
        self._writer, self._estimate = writer, estimate
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=QUEUE_BATCHES)
        self._failure: BaseException | None = None
        self._bytes = self._tokens = 0
        self._thread = threading.Thread(target=self._run, name="sparsekd-shards", daemon=True)

    def __enter__(self) -> ShardThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._put(None if kind is None else "stop")
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def put(self, shard: int, batch: range, rows: Any, drawn: Drawn) -> None:
        """Hand over a batch; waits while QUEUE_BATCHES are pending."""
        self._put((shard, batch, rows, drawn))

    def bytes_per_token(self) -> float:
        """Of the shards written so far, input ids and index included; the preflight's estimate before the first."""
        return self._bytes / self._tokens if self._tokens else self._estimate

    def _put(self, item: Any) -> None:
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return
        if self._failure is not None and item not in (None, "stop"):
            raise self._failure

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure = error

    def _work(self) -> None:
        spec, records = self._writer.spec, []
        while isinstance(item := self._queue.get(), tuple):
            shard, batch, rows, drawn = item
            records += _to_records(rows, drawn, spec.codec)
            if batch.stop == spec.shard_range(shard).stop:
                self._writer.write(shard, records)
                self._tokens += len(records) * spec.seq_len
                self._bytes += (self._writer.path / shard_name(shard)).stat().st_size
                records = []


def _batches(spec: CacheSpec, shard: int) -> Iterator[range]:
    """A shard's rows in the batches they always pass the teacher in: logits' last bits depend on the batch's shape."""
    rows, size = spec.shard_range(shard), spec.capture["batch_size"]
    for start in range(rows.start, rows.stop, size):
        yield range(start, min(start + size, rows.stop))


def _share(shards: list[int]) -> list[int]:
    """This process's part under torchrun: every world-size-th shard."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return [shard for shard in shards if shard % world == rank]


def _parse_range(text: str | None, shards: int) -> range:
    """ "a:b" as shards a .. b-1."""
    if text is None:
        return range(shards)
    first, separator, last = text.partition(":")
    with suppress(ValueError):
        start, stop = int(first or 0), int(last or shards)
        if separator and 0 <= start < stop <= shards:
            return range(start, stop)
    raise RecipeError(f"shard_range={text!r} is not a:b with 0 <= a < b <= {shards} (the cache has {shards} shards)")


def _copy_tokenizer(rows: Path, out: Path) -> None:
    """The tokenizer travels with the cache, so that it can be read as text and fit to a student."""
    if (out / "tokenizer").is_dir() or not (rows / "tokenizer").is_dir():
        return
    temporary = out / f".tokenizer-{os.getpid()}.tmp"
    shutil.copytree(rows / "tokenizer", temporary, dirs_exist_ok=True)
    try:
        temporary.rename(out / "tokenizer")
    except OSError:  # another worker was faster
        shutil.rmtree(temporary, ignore_errors=True)
