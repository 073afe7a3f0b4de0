"""What a plan is made of: each sampler's expected fidelity, ids, bytes and time on rows that the teacher reads.

Shapes: B rows, L tokens, N positions, V vocabulary, H hidden size, C positions of a chunk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekd import heads, models
from sparsekd.codec import CODECS, COUNTS, WEIGHTS, codec_spec
from sparsekd.drawing import read_head
from sparsekd.errors import RecipeError
from sparsekd.flat import FlatTargets
from sparsekd.folder import RowRecord, expected_row_bytes
from sparsekd.packed import RowsReader
from sparsekd.position_budget import LAWS, calibrate, inclusion
from sparsekd.samplers import count_rounds, is_unbiased, sample
from sparsekd.variance import fidelity, head_noise

# The float64 probabilities of a chunk; closed forms make a few arrays of that size.
CHUNK_BYTES = 32 * 2**20


@dataclass(kw_only=True)
class Tally:
    """Sums over positions for one sampler.

    Attributes:
        sampler: {"name": ..., parameters}.
        error, bias, ids: of E‖t̂ - p‖², ‖E[t̂] - p‖² and the expected number of ids.
        noise: E‖G - E[G]‖² of the gradient in the head's weight.
        seconds: spent drawing.
        flat: the targets drawn, row by row.
        variance: [N] of the positions' targets, a part for each chunk.
        gradient: E[G]; full distillation's own when the sampler is unbiased.
    """

    sampler: dict[str, Any]
    error: float = 0.0
    bias: float = 0.0
    ids: float = 0.0
    noise: float = 0.0
    seconds: float = 0.0
    flat: list[FlatTargets] = field(default_factory=list)
    variance: list[Tensor] = field(default_factory=list)
    gradient: Gradient | None = None


class Gradient:
    """Σₙ (mₙ qₙ - tₙ) hₙᵀ of mean targets t with mass m: what full distillation, or a biased sampler, tends to.

    Without a student's q, the stand-in knows only how often each token comes: q is the mean of the teacher's p.
    """

    def __init__(self, width: int, hidden: int, device: Any) -> None:
        self.sum_VH = torch.zeros(width, hidden, device=device)
        self.mass_H = torch.zeros(hidden, device=device)

    def add(self, targets_CV: Tensor, hidden_CH: Tensor, student_CV: Tensor | None) -> None:
        hidden_CH, mass_C = hidden_CH.float(), targets_CV.sum(-1, keepdim=True).float()
        self.sum_VH -= targets_CV.float().T @ hidden_CH
        if student_CV is None:
            self.mass_H += (mass_C * hidden_CH).sum(0)
        else:
            self.sum_VH += (mass_C * student_CV).T @ hidden_CH

    def value(self, unigram_V: Tensor) -> Tensor:
        return self.sum_VH + unigram_V[:, None].float() * self.mass_H


class Reading:
    """The models, and sums that all samplers share."""

    def __init__(self, reader: RowsReader, teacher: str, student: str | None, dtype: str, device: str) -> None:
        self.reader, self.model = reader, models.open_model(teacher, dtype=dtype, device=device)
        models.check_context(self.model, reader.seq_len, "teacher")
        size, way_out = reader.manifest["tokenizer"]["vocab_size"], "pack the rows with the teacher's tokenizer"
        models.check_width(self.model, size, f"teacher {teacher}", way_out)
        models.check_own_tokenizer(teacher, reader.tokenizer_hash, "teacher", way_out)
        self.student = None if student is None else models.open_model(student, dtype=dtype, device=device)
        if self.student is not None:
            models.check_width(self.student, size, f"student {student}", "an angle needs one vocabulary")
            models.cut_padding(self.model, self.student, size, "teacher and student")
        self.head, self.width = read_head(self.model), heads.logit_width(self.model)
        self.unigram_V = torch.zeros(self.width, dtype=torch.float64, device=self.model.device)
        self.seconds = 0.0
        self.positions = 0
        self.tokens: list[np.ndarray] = []
        # Of every position, a part for each chunk: entropy, ‖h‖², and ‖q - p‖² under a student.
        self.entropies: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.pulls: list[Tensor] = []
        self.full = self._gradient()

    def _gradient(self) -> Gradient | None:
        head = self.head if self.student is None else read_head(self.student)
        if head.weight_VH is None:
            return None
        return Gradient(self.width, head.weight_VH.shape[1], self.model.device)

    def measure_gradient_of(self, tally: Tally) -> None:
        """A biased sampler's mean gradient is its own; an unbiased one's is full distillation's."""
        tally.gradient = self.full if unbiased(tally.sampler) else self._gradient()

    @torch.no_grad()
    def pass_rows(self, tokens_BL: np.ndarray) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """(positions, teacher logits, features of the head, student probabilities or None), a chunk at a time."""
        ids = torch.from_numpy(tokens_BL.astype(np.int64)).to(self.model.device)
        started = time.perf_counter()
        hidden_NH = _features(self.model, self.head, ids)
        self.seconds += _since(started)
        theirs_NH = hidden_NH if self.student is None else _features(self.student, read_head(self.student), ids)
        step = max(1, CHUNK_BYTES // (8 * self.width))
        for start in range(0, len(hidden_NH), step):
            part = slice(start, start + step)
            started = time.perf_counter()
            logits_CV = self.head.logits(hidden_NH[part])
            self.seconds += _since(started)
            guess = (
                None if self.student is None else read_head(self.student).logits(theirs_NH[part]).float().softmax(-1)
            )
            yield part, logits_CV, theirs_NH[part], guess


def _features(model: Any, head: heads.Head, ids_BL: Tensor) -> Tensor:
    """[B (L - 1), H] what the head reads, of the positions that have a next token."""
    if head.weight_VH is None:
        return model(input_ids=ids_BL, use_cache=False).logits[:, :-1].flatten(0, 1)
    found = heads.body_of(model)(input_ids=ids_BL, use_cache=False).last_hidden_state
    return found[:, :-1].flatten(0, 1)


def _since(started: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def read_batch(read: Reading, numbers: Sequence[int], tallies: Sequence[Tally], seed: int) -> None:
    """A few rows through the teacher and through every sampler; supervision masks do not count here."""
    records = [read.reader.batch(range(number, number + 1)) for number in numbers]
    tokens_BL = np.concatenate([record.input_ids for record in records])
    length = tokens_BL.shape[1] - 1
    row_N = torch.tensor(numbers).repeat_interleave(length)
    position_N = torch.arange(length).repeat(len(numbers))
    parts: list[list[FlatTargets]] = [[] for _ in tallies]
    for part, logits_CV, hidden_CH, student_CV in read.pass_rows(tokens_BL):
        p_CV = logits_CV.double().softmax(-1)
        read.unigram_V += p_CV.sum(0)
        read.entropies.append(-torch.xlogy(p_CV, p_CV).sum(-1).cpu())
        if student_CV is not None:
            read.lengths.append(hidden_CH.double().square().sum(-1).cpu())
            read.pulls.append((student_CV.double() - p_CV).square().sum(-1).cpu())
        read.positions += len(p_CV)
        if read.full is not None:
            read.full.add(p_CV, hidden_CH, student_CV)
        keys = {"seed": seed, "rows": row_N[part], "positions": position_N[part]}
        for tally, drawn in zip(tallies, parts, strict=True):
            _add_exact(tally, read, p_CV, hidden_CH, student_CV)
            drawn.append(_draw(tally, logits_CV, keys))
    for tally, drawn in zip(tallies, parts, strict=True):
        whole = FlatTargets.join(drawn)
        tally.flat += [whole.take(np.arange(start, start + length)) for start in range(0, len(row_N), length)]
    read.tokens += list(tokens_BL)


def _add_exact(tally: Tally, read: Reading, p_CV: Tensor, hidden_CH: Tensor, student_CV: Tensor | None) -> None:
    name, parameters = _named(tally.sampler)
    found = fidelity(p_CV, name, **parameters)
    tally.error += float(found.squared_error.sum())
    tally.bias += float(found.bias.sum())
    tally.ids += float(found.ids.sum())
    tally.variance.append(found.variance.cpu())
    if tally.gradient is not None:
        tally.noise += float(head_noise(found.variance, hidden_CH))
        if tally.gradient is not read.full:
            tally.gradient.add(found.mean_NV, hidden_CH, student_CV)


def _draw(tally: Tally, logits_CV: Tensor, keys: dict[str, Any]) -> FlatTargets:
    name, parameters = _named(tally.sampler)
    started = time.perf_counter()
    targets = sample(logits_CV, name, **keys, **parameters)
    tally.seconds += _since(started)
    rounds, values = count_rounds(name, parameters), targets.weights.cpu().numpy()
    if rounds is not None:
        values = np.rint(values.astype(np.float64) * rounds).astype(np.uint32)
    return FlatTargets.from_padded(targets.ids.cpu().numpy(), values, rounds)


def bytes_by_codec(tally: Tally, read: Reading, shard_rows: int) -> dict[str, float]:
    """Bytes a token of a cache of such rows, by every codec that holds such targets."""
    everything = np.ones(len(read.tokens[0]), bool)
    starts = np.zeros_like(everything)
    records = [
        RowRecord(input_ids=tokens_L, targets=flat, starts=starts, supervised=everything)
        for tokens_L, flat in zip(read.tokens, tally.flat, strict=True)
    ]
    specs = _codecs(tally.flat[0].rounds, read.width)
    return {spec["name"]: expected_row_bytes(records, spec, shard_rows) / len(everything) for spec in specs}


def _codecs(rounds: int | None, width: int) -> list[dict[str, Any]]:
    """The specs of all codecs that hold such targets of such a vocabulary."""
    found = []
    for name, codec in CODECS.items():
        if codec.holds == (WEIGHTS if rounds is None else COUNTS):
            try:
                found.append(codec_spec(name, logit_width=width, rounds=rounds))
            except RecipeError:  # too many ids or rounds for it
                continue
    return found


def unbiased(sampler: Mapping[str, Any]) -> bool:
    """Whether its targets are the teacher's distribution on average."""
    return is_unbiased(*_named(sampler))


def expected_angle(tally: Tally, read: Reading, times: float) -> float | None:
    """Degrees between the expected gradient and full distillation's in the head's weight, for a batch `times` as large
    as what was read: atan of the root-mean-square noise (and the bias) across the full gradient, over the length along
    it. None where the head is unknown."""
    if read.full is None or tally.gradient is None:
        return None
    unigram_V = read.unigram_V / read.positions
    full, own = (gradient.value(unigram_V).double() for gradient in (read.full, tally.gradient))
    along = float((own * full).sum() / full.norm())
    across = 0.0 if tally.gradient is read.full else max(float(own.square().sum()) - along**2, 0.0)
    return math.degrees(math.atan2(math.sqrt(across + tally.noise / times), along))


def position_angles(tally: Tally, read: Reading, times: float, share: float = 0.5) -> dict[str, float] | None:
    """The expected angle if a share of the positions were kept, by `capture positions_by=`; None without a student.

    A position kept with probability π and weighing 1/π has the noise (v + g²)/π - g², v its targets' variance and g its
    whole gradient.
    """
    if not read.pulls or read.full is None or tally.gradient is not read.full:
        return None
    entropy, length, pull = (torch.cat(parts) for parts in (read.entropies, read.lengths, read.pulls))
    chances = {"evenly": torch.full_like(entropy, share)}
    chances |= {by: inclusion(calibrate(entropy, by, share).levels(entropy)) for by in LAWS}
    along = float(read.full.value(read.unigram_V / read.positions).double().norm())
    found = {}
    for by, pi in chances.items():
        noise = float((((torch.cat(tally.variance) + pull) / pi - pull) * length).sum())
        found[by] = math.degrees(math.atan2(math.sqrt(noise / times), along))
    return found


def _named(sampler: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return sampler["name"], {key: value for key, value in sampler.items() if key != "name"}
