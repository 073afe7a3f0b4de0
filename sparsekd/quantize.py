"""What storing a probability in few bits costs (paper, appendix D.1): codes beside each other, as numbers.

    quantisation_table(probabilities_NV)     # rows of the table that `sparsekd reproduce` prints

A code here maps probabilities [N, K], descending along K, to what a reader would get back. Measured on a teacher of
0.7 M parameters trained on Python sources (V = 1024, top-50): linear loses 2.2e-2 nats a position, both ratio codes
4e-5, 16 bits 1e-8, counts nothing. The paper saw slightly worse students with linear, and none with ratios.

Shapes: N positions, V vocabulary, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec import FlatTargets, codec_spec, decode, encode

Array = NDArray[Any]


# --- codes ----------------------------------------------------------------------------------------------


def linear(p_NK: Array, bits: int = 7) -> Array:
    """Equal intervals of [0, 1], each read as its middle: an absolute error of at most 2^-(bits+1).

    The paper's first code for top-k. The middle, because a reader that takes an interval's lower end would give every
    p below 2^-bits the weight 0.
    """
    intervals = 2**bits
    middle: Array = ((np.floor(p_NK * intervals)).clip(0, intervals - 1) + 0.5) / intervals
    return middle


def ratio(p_NK: Array, bits: int = 7) -> Array:
    """Ratios of each probability to the one before, in equal steps of [0, 1]; the first is a ratio to 1.

    The paper's second code, which it does not spell out; here each ratio is taken to what was decoded before (so
    errors do not multiply), with steps of 1 / (2^bits - 1) from 0 to 1 and no step of 0, which would end the position.
    """
    steps = 2**bits - 1
    found = np.ones((len(p_NK), 1))
    for column in p_NK.T:
        code = np.rint(column / found[:, -1] * steps).clip(1, steps)
        found = np.column_stack([found, found[:, -1] * code / steps])
    return found[:, 1:]


def log_ratio(p_NK: Array) -> Array:
    """The cache's prob24: 7 bits for the logarithm of the ratio, finer where neighbours are alike."""
    return _through("prob24", p_NK)


def log_16(p_NK: Array) -> Array:
    """The cache's prob40: 16 bits for the logarithm of each probability by itself, to 0.034 %."""
    return _through("prob40", p_NK)


def _through(codec: str, p_NK: Array) -> Array:
    """Probabilities as they come back from a cache; their order along K is kept."""
    ids_NK = np.broadcast_to(np.arange(p_NK.shape[1]), p_NK.shape)
    spec = codec_spec(codec, logit_width=p_NK.shape[1], rounds=None)
    flat = FlatTargets.from_padded(ids_NK, p_NK.astype(np.float32))
    found = decode(encode(flat, spec), len(p_NK), spec)
    back = np.zeros(p_NK.shape)
    back[found.positions, found.ids] = found.weights
    return back


# name -> (code, bits of one probability)
CODES: dict[str, tuple[Callable[[Array], Array], int]] = {
    "linear": (linear, 7),
    "ratio": (ratio, 7),
    "log-ratio": (log_ratio, 7),
    "log": (log_16, 16),
}


# --- measures -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What one code loses on one kind of targets.

    Attributes:
        targets, code, bits: what was stored, how, and bits of one value.
        mean_error, max_error: |p - decoded| over all stored entries.
        divergence: mean over positions of Σ p ln(p / d) - p + d, in nats: KL(p || decoded) for targets that need not
            sum to 1; 0 only where every entry is exact.
        mass_error: mean over positions of |Σ p - Σ decoded|: the change in what pulls on the student's logits.
    """

    targets: str
    code: str
    bits: int
    mean_error: float
    max_error: float
    divergence: float
    mass_error: float


def divergence(p_NK: Array, decoded_NK: Array) -> Array:
    """[N] nats: Σ p ln(p/d) - p + d over the entries with p > 0; infinite where one of those decoded to 0."""
    p, d = p_NK.astype(np.float64), decoded_NK.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / d), 0)
    total: Array = (terms - p + d).sum(-1)
    return total


def measure(targets: str, code: str, bits: int, p_NK: Array, decoded_NK: Array) -> Loss:
    """The row of one code: entries with p = 0 are padding and are not judged."""
    p, d = p_NK.astype(np.float64), np.where(p_NK > 0, decoded_NK, 0).astype(np.float64)
    errors = np.abs(p - d)[p > 0]
    return Loss(
        targets=targets,
        code=code,
        bits=bits,
        mean_error=float(errors.mean()),
        max_error=float(errors.max()),
        divergence=float(divergence(p, d).mean()),
        mass_error=float(np.abs(p.sum(-1) - d.sum(-1)).mean()),
    )


def quantisation_table(
    probabilities_NV: Array, *, kept: Sequence[int] = (12, 50), rounds: Sequence[int] = (50, 200), seed: int = 0
) -> list[Loss]:
    """One row for each code on the K largest probabilities, then the counts of random sampling, which lose nothing.

    Args:
        probabilities_NV: a teacher's distributions, e.g. softmax of its logits at some thousand positions.
        kept: K of each top-k.
        rounds: N of each random sampling; beyond 128 the paper's 7 bits do not hold a count, raw40's 20 bits do.
        seed: of the draws.

    Raises:
        ValueError: no positions, or rows that are no distributions.
    """
    p_NV = np.asarray(probabilities_NV, np.float64)
    if p_NV.ndim != 2 or not len(p_NV) or (p_NV < 0).any() or not np.allclose(p_NV.sum(-1), 1, atol=1e-3):
        raise ValueError(f"probabilities have shape {p_NV.shape}; [N, V] with rows that sum to 1 are needed")
    descending = -np.sort(-p_NV, axis=-1)
    tables = [
        measure(f"top-{k}", name, bits, descending[:, :k], code(descending[:, :k]))
        for k in kept
        for name, (code, bits) in CODES.items()
    ]
    return tables + [_counts_row(p_NV, count, np.random.default_rng(seed)) for count in rounds]


def _counts_row(p_NV: Array, rounds: int, rng: np.random.Generator) -> Loss:
    """Draws through the cache's own codec, compared with themselves: the code's loss, not the sampling's."""
    counts_NV = rng.multinomial(rounds, p_NV / p_NV.sum(-1, keepdims=True))
    name = "raw24" if rounds <= 64 and p_NV.shape[1] <= 2**18 else "raw40"
    spec = codec_spec(name, logit_width=p_NV.shape[1], rounds=rounds)
    ids_NV = np.broadcast_to(np.arange(p_NV.shape[1]), p_NV.shape)
    flat = FlatTargets.from_padded(ids_NV, counts_NV, rounds)
    found = decode(encode(flat, spec), len(p_NV), spec)
    drawn, back = (np.zeros(p_NV.shape, np.float32) for _ in range(2))
    drawn[flat.positions, flat.ids], back[found.positions, found.ids] = flat.weights, found.weights
    return measure(f"random sampling {rounds}", "counts", 6 if name == "raw24" else 20, drawn, back)
