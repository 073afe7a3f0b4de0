"""How good a student is: held-out loss, calibration, agreement with its teacher, gradient geometry.

Pure maths on logits. Losses are in nats per token, probabilities and rates in [0, 1], angles in degrees.
Shapes: N tokens, V vocabulary. Functions work in float32 (float64 when given it) whatever the logits' type,
sums run in float64. Tokens of one row share a context, so they are no independent evidence: `Tally` keeps
sums per row and takes its standard errors over rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekd.errors import MismatchError


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and the standard error of that mean (nan when one value cannot tell)."""

    mean: float
    standard_error: float


def mean_and_standard_error(values: Sequence[float] | Tensor) -> Estimate:
    """Σx / n and the sample standard deviation / √n, for independent values (rows, or seeds).

    One value has standard error nan: it says nothing about its own spread. No value is a ValueError.
    """
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    if not len(x):
        raise ValueError("the mean of no values is undefined")
    error = float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Estimate(mean=float(x.mean()), standard_error=error)


def ratio_of_sums(sums: Sequence[float] | Tensor, counts: Sequence[float] | Tensor) -> Estimate:
    """R = Σ sums / Σ counts over independent rows, with the linearised standard error of a ratio.

    The error is √(n/(n-1) · Σ(sumᵢ - R·countᵢ)²) / Σcounts: a long row weighs more, and a row whose own mean
    is R adds nothing. With equal counts it equals `mean_and_standard_error` of the row means.
    """
    s = torch.as_tensor(sums, dtype=torch.float64).flatten()
    c = torch.as_tensor(counts, dtype=torch.float64).flatten()
    if len(s) != len(c):
        raise ValueError(f"sums and counts differ in length: {len(s)} and {len(c)}")
    if not float(c.sum()) > 0:
        raise ValueError(f"a ratio needs a positive total count, not {float(c.sum())}")
    ratio, n = float(s.sum() / c.sum()), len(s)
    residual = float((s - ratio * c).square().sum())
    error = math.sqrt(n / (n - 1) * residual) / float(c.sum()) if n > 1 else math.nan
    return Estimate(mean=ratio, standard_error=error)


def token_losses(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """[N] nats: -log softmax(logits)[label]. Every label counts: choose the supervised positions first.

    A label outside [0, V), the -100 of ignored positions included, is an error and never a silent 0.
    """
    _check_labels(logits_NV, labels_N)
    logits = _wide(logits_NV)
    return logits.logsumexp(-1) - logits.gather(-1, labels_N.long()[:, None])[:, 0]


def top1(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """[N] the top token's probability and [N] bool whether it is the label: what calibration compares.

    Of tied logits the first is the top token.
    """
    _check_labels(logits_NV, labels_N)
    logits = _wide(logits_NV)
    best_N = logits.argmax(-1)
    confidence_N = (logits.gather(-1, best_N[:, None])[:, 0] - logits.logsumexp(-1)).exp().clamp(max=1.0)
    return confidence_N, best_N == labels_N


def top1_agreement(teacher_logits_NV: Tensor, student_logits_NV: Tensor) -> Tensor:
    """[N] bool: the student's most probable token is the teacher's (of ties, the first)."""
    _check_widths(teacher_logits_NV, student_logits_NV)
    return teacher_logits_NV.argmax(-1) == student_logits_NV.argmax(-1)


def speculative_acceptance(teacher_logits_NV: Tensor, student_logits_NV: Tensor) -> Tensor:
    """[N] in [0, 1]: Σᵢ min(pᵢ, qᵢ) of the teacher's p and the student's q.

    The probability that speculative sampling keeps a token the student drafts and the teacher checks, both at
    temperature 1; it equals 1 minus their total variation distance.
    """
    _check_widths(teacher_logits_NV, student_logits_NV)
    p_NV, q_NV = _wide(teacher_logits_NV).softmax(-1), _wide(student_logits_NV).softmax(-1)
    return torch.minimum(p_NV, q_NV).sum(-1).clamp(max=1.0)


def perplexity(loss: float) -> float:
    """exp(mean loss in nats per token); inf where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, *, tokens: float, text_bytes: float) -> float:
    """loss / ln 2 · tokens / bytes: mean nats per token as bits per UTF-8 byte of the text they encode.

    Comparable between tokenizers, which loss and perplexity are not.
    """
    if not text_bytes > 0:
        raise ValueError(f"bits per byte needs the text's size in bytes, not {text_bytes}")
    return loss / math.log(2) * tokens / text_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityBin:
    """One bar of a reliability diagram; an empty bin has no means."""

    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The expected calibration error in [0, 1] and the bins it was summed over, lowest confidence first."""

    ece: float
    reliability: tuple[ReliabilityBin, ...]


class CalibrationBins:
    """A reliability diagram filled a chunk at a time: counts and sums per bin, never the tokens.

    Bin m of M holds confidences in (m/M, (m+1)/M]; 0 falls into the first bin, 1 into the last.
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"bins must be at least 1, not {bins}")
        self.bins = bins
        self._sums = torch.zeros(3, bins, dtype=torch.float64)  # count, Σ confidence, Σ correct

    def add(self, confidence_N: Tensor, correct_N: Tensor) -> None:
        """Counts N predictions: the top token's probability, and whether it was right."""
        if confidence_N.shape != correct_N.shape:
            shapes = f"{tuple(confidence_N.shape)} and {tuple(correct_N.shape)}"
            raise ValueError(f"confidence and correct differ in shape: {shapes}")
        confidence = confidence_N.detach().cpu().double().flatten()
        outside = ~((confidence >= 0) & (confidence <= 1))
        if outside.any():
            raise ValueError(f"confidence must be in [0, 1], not {float(confidence[outside][0])}")
        index = torch.bucketize(confidence, self._inner_edges(confidence_N.dtype))
        correct = correct_N.detach().cpu().double().flatten()
        self._sums.index_add_(1, index, torch.stack([torch.ones_like(confidence), confidence, correct]))

    def merge(self, other: CalibrationBins) -> None:
        """Adds another's counts: the same as if this one had seen both streams."""
        if other.bins != self.bins:
            raise ValueError(f"cannot merge {other.bins} calibration bins into {self.bins}")
        self._sums += other._sums

    def result(self) -> Calibration:
        """Σ over bins of (share of tokens) · |accuracy - mean confidence|, and the bins. Guo et al. 2017."""
        count, confidence, correct = self._sums
        if not count.sum():
            raise ValueError("calibration of no predictions is undefined: add() some first")
        ece = float((correct - confidence).abs().sum() / count.sum())
        bins = (
            ReliabilityBin(count=int(n), confidence=c / n if n else None, accuracy=a / n if n else None)
            for n, c, a in self._sums.T.tolist()
        )
        return Calibration(ece=ece, reliability=tuple(bins))

    def _inner_edges(self, dtype: torch.dtype) -> Tensor:
        # Rounded to the confidences' own type, so a float32 1/3 lies on the edge 5/15 and not above it.
        edges = torch.arange(1, self.bins, dtype=torch.float64) / self.bins
        return edges.to(dtype if dtype.is_floating_point else torch.float64).double()


def expected_calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = 15) -> Calibration:
    """The ECE in [0, 1] of N predictions over equal-width bins, and those bins (Guo et al. 2017)."""
    calibration = CalibrationBins(bins)
    calibration.add(confidence_N, correct_N)
    return calibration.result()


class Tally:
    """Sums of per-token quantities kept per row, for means with standard errors over rows.

    tally = Tally()
    tally.add(rows_N, loss=token_losses(logits_NV, labels_N), agreement=top1_agreement(teacher_NV, logits_NV))
    tally.estimate("loss")        # Σ loss / Σ tokens ± the error over rows

    A row may come in several chunks, in any order, and from several processes (`merge`).
    """

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self._sums: dict[str, dict[int, float]] = {}

    def add(self, rows_N: Tensor, **values_N: Tensor) -> None:
        """Adds N tokens: the row each belongs to, and their quantities; every call gives the same names."""
        self._check(rows_N, values_N)
        rows, inverse, counts = rows_N.detach().cpu().flatten().unique(return_inverse=True, return_counts=True)
        self._absorb(
            dict(zip(rows.tolist(), counts.tolist(), strict=True)),
            {name: _sum_by(rows, inverse, values) for name, values in values_N.items()},
        )

    def merge(self, other: Tally) -> None:
        """Adds another's sums: the same as if this one had seen both streams."""
        if self._sums and other._sums and self._sums.keys() != other._sums.keys():
            raise ValueError(f"cannot merge tallies of {sorted(other._sums)} into {sorted(self._sums)}")
        self._absorb(other._tokens, other._sums)

    @property
    def rows(self) -> int:
        """Rows seen."""
        return len(self._tokens)

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return sum(self._tokens.values())

    def total(self, name: str) -> float:
        """The sum of a quantity over all tokens."""
        return math.fsum(self._sums[name].values())

    def estimate(self, name: str) -> Estimate:
        """The mean of a quantity per token, with its standard error over rows (see `ratio_of_sums`)."""
        rows = sorted(self._tokens)
        return ratio_of_sums([self._sums[name][row] for row in rows], [self._tokens[row] for row in rows])

    def estimates(self) -> dict[str, Estimate]:
        """`estimate` of every quantity, in the order of their first `add`."""
        return {name: self.estimate(name) for name in self._sums}

    def _absorb(self, tokens: dict[int, int], sums: dict[str, dict[int, float]]) -> None:
        for row, count in tokens.items():
            self._tokens[row] = self._tokens.get(row, 0) + count
        for name, by_row in sums.items():
            mine = self._sums.setdefault(name, {})
            for row, value in by_row.items():
                mine[row] = mine.get(row, 0.0) + value

    def _check(self, rows_N: Tensor, values_N: dict[str, Tensor]) -> None:
        if self._sums and self._sums.keys() != values_N.keys():
            raise ValueError(f"this tally counts {sorted(self._sums)}, not {sorted(values_N)}")
        for name, values in values_N.items():
            if values.numel() != rows_N.numel():
                raise ValueError(f"{name} has {values.numel()} values for {rows_N.numel()} tokens")


def gradient_angle(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Degrees in [0, 180] between two gradients, each a list of tensors read as one long vector.

    Equals acos(a·b / |a||b|), computed as 2·atan2(|u - v|, |u + v|) of the unit vectors because acos keeps
    only half the digits near 0 and 180. A zero gradient has no direction: ValueError.
    """
    _check_same_shapes(a, b)
    norm_a, norm_b = _norm(a), _norm(b)
    if not (norm_a > 0 and norm_b > 0):
        raise ValueError(f"a zero or non-finite gradient has no direction: the norms are {norm_a}, {norm_b}")
    apart = _norm(x.double() / norm_a - y.double() / norm_b for x, y in zip(a, b, strict=True))
    along = _norm(x.double() / norm_a + y.double() / norm_b for x, y in zip(a, b, strict=True))
    return math.degrees(2 * math.atan2(apart, along))


def norm_ratio(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """|a| / |b| (2-norms over all tensors): 1 when sparse targets leave the gradient's size as it was."""
    _check_same_shapes(a, b)
    norm_b = _norm(b)
    if not norm_b > 0:
        raise ValueError(f"the ratio to a gradient of norm {norm_b} is undefined")
    return _norm(a) / norm_b


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _sum_by(rows: Tensor, inverse: Tensor, values_N: Tensor) -> dict[int, float]:
    sums = torch.zeros(len(rows), dtype=torch.float64)
    sums.index_add_(0, inverse.flatten(), values_N.detach().cpu().double().flatten())
    return dict(zip(rows.tolist(), sums.tolist(), strict=True))


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(float(x.double().square().sum()) for x in tensors))


def _check_labels(logits_NV: Tensor, labels_N: Tensor) -> None:
    if logits_NV.shape[:-1] != labels_N.shape or logits_NV.dim() != 2:
        shapes = f"{tuple(logits_NV.shape)} and {tuple(labels_N.shape)}"
        raise ValueError(f"logits [N, V] and labels [N] do not fit: {shapes}; flatten both first")
    outside = (labels_N < 0) | (labels_N >= logits_NV.shape[-1])
    if outside.any():
        found = int(labels_N[outside][0])
        raise ValueError(f"label {found} is outside the {logits_NV.shape[-1]} logits; drop ignored positions first")


def _check_widths(teacher_logits_NV: Tensor, student_logits_NV: Tensor) -> None:
    if teacher_logits_NV.shape != student_logits_NV.shape:
        raise MismatchError(
            f"logits differ in shape: the teacher's are {tuple(teacher_logits_NV.shape)}, the student's "
            f"{tuple(student_logits_NV.shape)}; cut both to the tokenizer's vocabulary and the same positions"
        )


def _check_same_shapes(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    shapes_a, shapes_b = [tuple(x.shape) for x in a], [tuple(x.shape) for x in b]
    if shapes_a != shapes_b:
        raise ValueError(f"two gradients of different parameters: shapes {shapes_a[:3]} and {shapes_b[:3]}")
