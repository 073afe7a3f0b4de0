"""How to code a probability in about 7 bits: a grid of levels against closed-loop ratios, at equal bytes.

    python benchmarks/probabilities.py DEMO [--kept 12] [--tokens 8192]

DEMO is the folder of `sparsekd demo`. The k largest probabilities of its teacher go through each code and then through
the very streams of `split_prob` (first codes, other codes, ids as sets where codes are equal; ids by rank), so bytes
are real ones of rows. The loss is `quantize.divergence` (KL, for targets of any sum) and the squared error.

A closed loop whose steps are even in the logarithm is the grid itself: codes are differences of whole levels and add up
exactly. So what can differ is uneven steps: squares (`prob24`'s, finer where neighbours are alike) and the paper's
ratios in steps of 1/127. The last column is the divergence over that of the grid at the same bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sparsekd import heads, models
from sparsekd.codec_ints import encode_ints
from sparsekd.codec_split import id_steps, run_starts
from sparsekd.codec_weights import ratio_codes, ratio_levels
from sparsekd.flat import FlatTargets
from sparsekd.id_ranks import id_ranks
from sparsekd.packed import RowsReader
from sparsekd.quantize import divergence

Array = np.ndarray
Code = Callable[[Array], tuple[Array, Array]]


def grid(octave: int, rng: np.random.Generator | None = None) -> Code:
    """(codes, decoded) [N, K]: levels of 1/octave, to the nearest, or with a generator without bias."""

    def code(p_NK: Array) -> tuple[Array, Array]:
        exact = -np.log2(p_NK) * octave
        levels = np.rint(exact)
        if rng is not None:
            low, step = np.floor(exact), 2 ** (-1 / octave)
            share = (np.exp2(-(exact - low) / octave) - step) / (1 - step)
            levels = low + (rng.random(p_NK.shape) >= share)
        return np.diff(np.sort(levels, -1), prepend=0, axis=-1), np.exp2(-levels / octave)

    return code


def squares(octave: int) -> Code:
    """The closed loop of `prob24`, with steps of c² / octave; 7 bits."""

    def code(p_NK: Array) -> tuple[Array, Array]:
        count, kept = p_NK.shape
        sizes, start = np.full(count, kept), np.zeros(count, np.int64)
        codes = ratio_codes((-np.log2(p_NK) * octave).ravel(), sizes, start=start, most=127)
        levels = ratio_levels(codes, sizes, start=start)
        return codes.reshape(p_NK.shape), np.exp2(-levels.reshape(p_NK.shape) / octave)

    return code


def ratios(p_NK: Array) -> tuple[Array, Array]:
    """The paper's: each a ratio to the one before as it was decoded, in steps of 1/127."""
    found, codes = [np.ones(len(p_NK))], []
    for column in p_NK.T:
        codes.append(np.rint(column / found[-1] * 127).clip(1, 127))
        found.append(found[-1] * codes[-1] / 127)
    return 127 - np.stack(codes, -1), np.stack(found[1:], -1)


CODES: dict[str, Code] = {
    **{f"grid, 1/{n} octave": grid(n) for n in (4, 8, 16, 32, 64, 128)},
    "grid, 1/32 octave, without bias": grid(32, np.random.default_rng(0)),
    **{f"closed loop, squares / {n}": squares(n) for n in (64, 128, 256, 512, 1024)},
    "closed loop, ratios / 127": ratios,
}


def coded_bytes(codes_NK: Array, decoded_NK: Array, ids_NK: Array, positions_of_row: int) -> float:
    """Of a position, ids and probabilities: rows of streams as `split_prob` has them."""
    total, kept = 0, ids_NK.shape[1]
    for start in range(0, len(ids_NK), positions_of_row):
        part = slice(start, start + positions_of_row)
        positions = np.repeat(np.arange(len(ids_NK[part])), kept)
        order = np.lexsort((ids_NK[part].ravel(), -decoded_NK[part].ravel(), positions))
        first = np.arange(len(ids_NK[part])) * kept
        steps = id_steps(ids_NK[part].ravel()[order], run_starts(decoded_NK[part].ravel()[order], first))
        codes = codes_NK[part]
        total += len(encode_ints([np.full(len(codes), kept), codes[:, 0], codes[:, 1:].ravel(), steps]))
    return total / len(ids_NK)


def at_bytes(wanted: float, known: list[tuple[float, float]]) -> float:
    """The grid's divergence at so many bytes: a straight line, both axes logarithmic."""
    x, y = (np.log([each[i] for each in sorted(known)]) for i in (0, 1))
    return math.exp(np.interp(math.log(wanted), x, y)) if x[0] <= math.log(wanted) <= x[-1] else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--kept", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8192)
    a = parser.parse_args()
    teacher, reader = models.open_model(str(a.demo / "teacher"), device="cpu"), RowsReader(a.demo / "rows", "train")
    found = []
    for row in range(a.tokens // reader.seq_len):
        tokens = torch.from_numpy(reader.batch(range(row, row + 1)).input_ids.astype(np.int64))
        with torch.no_grad():
            found.append(teacher(input_ids=tokens).logits[0, :-1].double().softmax(-1).topk(a.kept))
    p_NK, ids_NK = (torch.cat([getattr(each, name) for each in found]).numpy() for name in ("values", "indices"))
    width = heads.logit_width(teacher)
    ranks = id_ranks([FlatTargets.from_padded(ids_NK, p_NK)], width, least=8).ranks
    print(f"top-k {a.kept}, {len(p_NK):,} positions, V = {width}")
    print(f"{'':<34}{'bytes':>8}{'nats':>10}{'sq. error':>12}{'worst':>8}{'nats / grid':>13}")
    known: list[tuple[float, float]] = []
    for name, code in CODES.items():
        codes, decoded = code(p_NK)
        size, nats = coded_bytes(codes, decoded, ranks[ids_NK], reader.seq_len - 1), divergence(p_NK, decoded).mean()
        if name.startswith("grid") and "bias" not in name:
            known.append((size, nats))
        error, worst = np.square(p_NK - decoded).sum(-1).mean(), np.abs(decoded / p_NK - 1).max()
        ratio = nats / at_bytes(size, known)
        print(f"{name:<34}{size:>8.2f}{nats:>10.1e}{error:>12.1e}{worst:>8.1%}{ratio:>13.2f}")


if __name__ == "__main__":
    main()
