"""Drawing: one batch of rows passes the teacher, and its sparse targets become a cache's records.

Shapes: B rows, L tokens, H hidden size, V logit width, C positions of a chunk, K kept ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsekd import heads
from sparsekd.cache import CacheSpec, RowRecord
from sparsekd.codec import CODECS, CURVES, IMPORTANCE, FlatTargets, Importance, decode
from sparsekd.errors import MismatchError, ModelError
from sparsekd.fused_chunks import workspace
from sparsekd.fused_parallel import VocabularyShard
from sparsekd.inversion import refuse
from sparsekd.packed import PackedBatch, RowsReader
from sparsekd.position_budget import entropies, inclusion, law_of
from sparsekd.rng import Keys
from sparsekd.samplers import ORDERED, SAMPLERS, ImportanceDraws, draw, draw_importance, in_vocabulary, settled
from sparsekd.sampling_parallel import entropies_split, whole_logits
from sparsekd.sketch import TeacherSketch, teacher_sketch
from sparsekd.targets import SparseTargets
from sparsekd.tensor_parallel import own_rows
from sparsekd.vocabulary_order import order_hash, vocabulary_order

# The head's fp32 logits exist for this many bytes at a time, on a CPU for this many positions at least: each product
# packs the whole head, and with 65 positions (V = 128,256) a capture took 1.4 times as long as with 512, with 256 (V =
# 32,768) 1.08 times as long as with 1,024. On a GPU drawing from a chunk is some 200 launches, most of them tiny: by
# arithmetic 5 % of a 3B teacher's time at 523 positions, 1.3 % at 2,092 (V = 128,256).
HEAD_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
HEAD_ROWS = {"cpu": 512, "cuda": 1}
# A shard is the unit of resume: at most 4M tokens (minutes of one accelerator), and 16 of them in a small cache.
SHARD_TOKENS = 2**22
# What capture takes beside the samplers: a teacher without ids, for students of other vocabularies.
SKETCHES: dict[str, Callable[..., TeacherSketch]] = {"sorted_curve": teacher_sketch}


# Columns of draws that stay on the device with their padding: batches of them wait there, 8 bytes an entry.
WIDE = 512

Part = SparseTargets | ImportanceDraws | TeacherSketch
Drawings = TypeVar("Drawings", bound=SparseTargets | ImportanceDraws)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What one batch of rows gave: targets of its supervised positions, in order, still on the teacher's device.

    Under a position law also each position's level, and whether it is kept.
    """

    parts: list[Part]
    levels: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A model with its head apart, and how rows pass it.

    With `order_V`, the head's logits come in this order of the ids (`Head.in_order`), and draws are made over them so.
    With `shard`, the head has only the rows of that share of them, and other processes draw along (tensor_parallel.py).
    """

    model: Any
    head: heads.Head
    spec: CacheSpec
    order_V: Tensor | None = None
    shard: VocabularyShard | None = None

    @torch.no_grad()
    def draw(self, input_ids_BL: np.ndarray, supervised_BL: np.ndarray, first_row: int) -> Drawn:
        """Targets for every position whose next token is supervised; [B, L, V] logits never exist."""
        rows, positions, hidden_NH, tokens_N = self._read(input_ids_BL, supervised_BL)
        law = law_of(self.spec.capture)
        chunk, sampler = self.spec.capture["head_chunk"], dict(self.spec.sampler)
        name, seed = sampler["name"], sampler["seed"]
        parameters = {key: sampler[key] for key in sampler_parameters(name)}
        draw = _draw_for(self.spec.codec, self.order_V, self.shard)
        drawn = Drawn(parts=[])
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits_CV = self._logits(hidden_NH[part])
            keys = {"seed": seed, "rows": rows[part] + first_row, "positions": positions[part]}
            drawn.parts.append(draw(logits_CV, tokens_N[part], name, **keys, **parameters))
            if law is not None:
                drawn.levels.append(law.levels(self._entropies(logits_CV)))
                drawn.kept.append(law.kept(drawn.levels[-1], Keys(**keys)))
        return drawn

    @torch.no_grad()
    def repeats(self, input_ids_BL: np.ndarray, supervised_BL: np.ndarray) -> bool:
        """Whether a batch gives the same hidden states a second time, to the bit. Kernels that add in whatever order
        threads finish (of some mixtures of experts, on a GPU) do not."""
        first, second = (self._read(input_ids_BL, supervised_BL)[2] for _ in range(2))
        return torch.equal(first, second)

    @torch.no_grad()
    def entropies(self, input_ids_BL: np.ndarray, supervised_BL: np.ndarray) -> Tensor:
        """[N] nats at every position whose next token is supervised."""
        hidden_NH, chunk = self._read(input_ids_BL, supervised_BL)[2], self.spec.capture["head_chunk"]
        return torch.cat([self._entropies(self._logits(hidden_CH)) for hidden_CH in hidden_NH.split(chunk)])

    def _entropies(self, logits_CV: Tensor) -> Tensor:
        return entropies(logits_CV) if self.shard is None else entropies_split(logits_CV, self.shard)

    def _logits(self, hidden_CH: Tensor) -> Tensor:
        """[C, V] logits of a chunk, written over those of the chunk before: fresh pages cost as much as the draws."""
        weight_VH = self.head.weight_VH
        if weight_VH is None or weight_VH.device.type != "cpu":
            return self.head.logits(hidden_CH)
        return self.head.write_logits(hidden_CH, workspace(len(hidden_CH), weight_VH))

    def _read(self, input_ids_BL: np.ndarray, supervised_BL: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the supervised positions: row, position, what the head reads, and the token that came next."""
        device = next(self.model.parameters()).device
        ids = _sent(input_ids_BL.astype(np.int64), device)
        # Found on the host: on a device, this batch's forward would begin when all that was asked for before has ended.
        rows, positions = (_sent(each, device) for each in supervised_BL[:, 1:].nonzero())
        if self.head.weight_VH is None:
            hidden = self.model(input_ids=ids, use_cache=False).logits
        else:
            hidden = heads.body_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        return rows, positions, hidden[rows, positions], ids[rows, positions + 1]


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device, by a copy that nothing waits for (pinned memory is kept until it is through)."""
    here = torch.from_numpy(array)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


def _draw_for(codec: dict[str, Any], order_V: Tensor | None, shard: VocabularyShard | None) -> Callable[..., Part]:
    """What the codec holds: targets, draws that are not weighed yet, or sketches. Wide integers stay behind: K ids of
    every position of a batch wait on the device for the codec."""

    def targets(logits_CV: Tensor, tokens_C: Tensor, name: str, **settings: Any) -> SparseTargets:
        found = _unless_wide(draw(logits_CV, name, shard=shard, **settings))
        found = found if order_V is None else in_vocabulary(found, order_V)
        return SparseTargets(ids=found.ids.to(torch.int32), weights=found.weights.contiguous())

    def unweighed(
        logits_CV: Tensor, tokens_C: Tensor, name: str, *, normalize: bool, **settings: Any
    ) -> ImportanceDraws:
        found = _unless_wide(draw_importance(logits_CV, name, shard=shard, **settings))
        found = found if order_V is None else in_vocabulary(found, order_V)
        ids, counts = found.ids.to(torch.int32), found.counts.to(torch.int32)
        return replace(found, ids=ids, counts=counts, log2_p=found.log2_p.float())

    def sketch(logits_CV: Tensor, tokens_C: Tensor, name: str, *, top: int, **_: Any) -> TeacherSketch:
        whole_CV = logits_CV if shard is None else whole_logits(logits_CV, shard)
        return teacher_sketch(whole_CV, tokens_C, top=top)

    others: dict[str, Callable[..., Part]] = {IMPORTANCE: unweighed, CURVES: sketch}
    return others.get(CODECS[codec["name"]].holds, targets)


def _unless_wide(drawn: Drawings) -> Drawings:
    """Draws of many rounds without the padding that most of them are, for which an accelerator is waited for."""
    return drawn if drawn.ids.shape[1] <= WIDE else settled(drawn)


def read_head(model: Any) -> heads.Head:
    """The model's head when body + head give its own logits, else a stand-in that takes its logits whole."""
    with suppress(ModelError):
        if heads.rebuilt_error(model) <= 0.05:
            return heads.head_of(model).whole()
    return heads.Head(weight_VH=None)


def head_order(head: heads.Head) -> Tensor | None:
    """The ids by the likeness of the head's rows, where the head is; None for a head that is not known."""
    return None if head.weight_VH is None else vocabulary_order(head.weight_VH)


def order_settings(sampler: str, order_V: Tensor | None) -> dict[str, str]:
    """What a cache's sampler says of the order that draws were made in."""
    if sampler not in ORDERED:
        return {}
    return {"order": "ids"} if order_V is None else {"order": "head", "order_sha256": order_hash(order_V)}


def open_teacher(model: Any, spec: CacheSpec, order_V: Tensor | None = None) -> Teacher:
    """A model, whole or in parts, as the cache's spec wants it; `order_V` is found again where the spec names an order
    and none is given.

    Raises:
        MismatchError: another order than the spec's.
    """
    head, wanted = read_head(model), spec.sampler.get("order_sha256")
    order_V = head_order(head) if wanted and order_V is None else order_V
    found = None if order_V is None else order_hash(order_V)
    if found != wanted:
        raise MismatchError(
            f"the order of the teacher's head differs: the cache was drawn in sampler.order_sha256={str(wanted)[:12]}, "
            f"here it is {str(found)[:12]}; go on with the same sparsekd, and the same dtype of the teacher"
        )
    head, shard = own_rows(head, order_V, getattr(model, "tp_size", None) or 1)
    return Teacher(model=model, head=head, spec=spec, order_V=order_V, shard=shard)


def head_chunk(width: int, device: str) -> int:
    """Positions whose logits are made together; part of the manifest, for it may move their last bits."""
    kind = "cpu" if device == "cpu" else "cuda"
    return max(HEAD_ROWS[kind], HEAD_BYTES[kind] // (4 * width))


def sampler_parameters(sampler: str) -> dict[str, Any]:
    """A sampler's parameters with their defaults, so that the manifest states every one."""
    signature = inspect.signature((SAMPLERS | SKETCHES)[sampler]).parameters.values()
    return {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}


def default_shard_rows(rows: int, seq_len: int, batch_size: int = 1) -> int:
    """Rows of a shard where none are asked for, whole batches."""
    wanted = max(1, min(SHARD_TOKENS // seq_len, -(-rows // 16)))
    return -(-wanted // batch_size) * batch_size


def shard_batches(spec: CacheSpec, shard: int) -> Iterator[range]:
    """A shard's rows in the batches they always pass the teacher in: logits' last bits depend on the batch's shape."""
    rows, size = spec.shard_range(shard), spec.capture["batch_size"]
    for start in range(rows.start, rows.stop, size):
        yield range(start, min(start + size, rows.stop))


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads inside torch's operators; the number before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_rows(reader: RowsReader, batch: range, spec: CacheSpec) -> PackedBatch:
    """The rows of a batch; where the capture keeps a share of the positions, the others are not supervised.

    A position is kept if a coin that hangs on (seed, row, position) falls below the share, so the mean loss of the kept
    ones is that of all on average, and its noise is that of fewer tokens. Where a law goes by the teacher's entropy,
    all pass the teacher, and `to_records` leaves out what was not kept.
    """
    rows, share = reader.batch(batch), spec.capture.get("positions", 1.0)
    if share == 1 or law_of(spec.capture):
        return rows
    at = torch.from_numpy(np.ascontiguousarray(rows.supervised[:, 1:])).nonzero(as_tuple=True)
    coins = Keys(seed=spec.sampler["seed"], rows=at[0] + batch.start, positions=at[1]).coins()
    kept = rows.supervised.copy()
    kept[:, 1:][at[0].numpy(), at[1].numpy()] = (coins < share).numpy()
    return replace(rows, supervised=kept)


def draw_records(source: Teacher, reader: RowsReader, batch: range) -> list[RowRecord]:
    rows = read_rows(reader, batch, source.spec)
    drawn = source.draw(rows.input_ids, rows.supervised, batch.start)
    return to_records(rows, drawn, source.spec.codec)


def to_records(rows: Any, drawn: Drawn, codec: dict[str, Any]) -> list[RowRecord]:
    flats = flat_rows(drawn, rows.supervised, codec)
    records = [
        RowRecord(input_ids=ids, targets=flat, starts=starts, supervised=supervised)
        for ids, flat, starts, supervised in zip(rows.input_ids, flats, rows.starts, rows.supervised, strict=True)
    ]
    if not drawn.kept:
        return records
    ends = np.cumsum([len(flat.sizes) for flat in flats])[:-1]
    kept = np.split(torch.cat(drawn.kept).cpu().numpy(), ends)
    return [_without_dropped(record, kept_P) for record, kept_P in zip(records, kept, strict=True)]


def _without_dropped(record: RowRecord, kept_P: np.ndarray) -> RowRecord:
    """The record with those of its supervised positions alone that are kept."""
    supervised = record.supervised.astype(bool)
    supervised[1:][supervised[1:]] = kept_P
    return replace(record, supervised=supervised, targets=record.targets.take(np.flatnonzero(kept_P)))


def flat_rows(drawn: Drawn, supervised_BL: np.ndarray, codec: dict[str, Any]) -> list[FlatTargets]:
    """One FlatTargets per row from the targets of a batch's supervised positions."""
    nothing = replace(decode(b"", 0, codec), scale=None)  # a batch may have no supervised position at all
    whole = FlatTargets.join([nothing, *(_flat(part, codec) for part in drawn.parts)])
    if "share" in codec:
        levels = [level.cpu() for level in drawn.levels]
        scale = codec["share"] / inclusion(torch.cat(levels)).numpy() if levels else np.zeros(0)
        whole = replace(whole, scale=scale)
    ends = supervised_BL[:, 1:].sum(-1).cumsum()
    return [whole.take(np.arange(first, last)) for first, last in zip([0, *ends[:-1]], ends, strict=True)]


def _flat(part: Part, codec: dict[str, Any]) -> FlatTargets:
    """On the host, where what `draw` left unread is looked at: logits that were not finite are refused here."""
    if isinstance(part, TeacherSketch):
        if bool((bad_N := part.log_p.isnan()).any()):
            refuse(bad_N)
        return FlatTargets(
            ids=part.tokens.cpu().numpy().astype(np.uint32),
            values=part.log_p.exp().float().cpu().numpy(),
            sizes=np.ones(len(part.tokens), np.int64),
            curve=part.curve.masses.float().cpu().numpy(),
        )
    part = settled(part)
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
