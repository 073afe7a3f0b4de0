"""Which unbiased estimator errs least for its bytes: closed forms by entropy, then coded bytes and parameter gradients.

    python benchmarks/estimators.py DEMO [--student full_kd-s0] [--rows 64] [--seeds 4]

DEMO is the folder of `sparsekd demo` (its rows, teacher and students). The first table is exact (no drawing): squared
error at equal expected ids, over that of 50 draws with replacement, for positions grouped by the teacher's entropy.
The second draws and codes: for each candidate its bytes a position (`split` with ranks, targets only; what is not a
count is coded beside, see `Estimate`), squared error, and the angle between a student's gradient under it and under
the whole teacher, all parameters, one batch (± the standard error over seeds). The last two columns are the judgement:
squared error and tangent of the angle over those of `systematic` at the same bytes, between the rounds of its ladder.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsekd import inversion, metrics, models, samplers
from sparsekd.codec import codec_spec, encode
from sparsekd.codec_ints import encode_ints
from sparsekd.codec_split import id_steps
from sparsekd.flat import FlatTargets
from sparsekd.id_ranks import id_ranks
from sparsekd.inversion import side_by_side
from sparsekd.packed import RowsReader
from sparsekd.position_budget import LAWS, calibrate, inclusion
from sparsekd.rng import Keys
from sparsekd.targets import SparseTargets
from sparsekd.variance import fidelity
from sparsekd.vocabulary_order import vocabulary_order

EDGES = (0, 1, 2, 3.3, 5, 99)

# --- candidates that the package does not hold ----------------------------------------------------------


def at_points(logits_NV: Tensor, points_NR: Tensor) -> SparseTargets:
    mass = inversion.in_blocks(inversion.shifted_logits(logits_NV).exp_())
    ids, counts = inversion.merge_draws(inversion.invert(mass, points_NR))
    return SparseTargets(ids=ids, weights=(counts / points_NR.shape[1]).float())


def stratified(logits_NV: Tensor, keys: Keys, rounds: int) -> SparseTargets:
    """(u_j + j) / R: a uniform for every stratum."""
    return at_points(logits_NV, (keys.uniforms(rounds) + torch.arange(rounds)) / rounds)


def in_order(logits_NV: Tensor, keys: Keys, rounds: int, order_NV: Tensor) -> SparseTargets:
    """Systematic over the ids in another order."""
    drawn = samplers.systematic(logits_NV.gather(-1, order_NV), keys, rounds=rounds)
    return SparseTargets(ids=order_NV.gather(-1, drawn.ids), weights=drawn.weights)


def random_order(logits_NV: Tensor, keys: Keys, rounds: int) -> SparseTargets:
    generator = torch.Generator().manual_seed(keys.seed * 1000 + int(keys.rows[0]))
    return in_order(logits_NV, keys, rounds, torch.rand(logits_NV.shape, generator=generator).argsort(-1))


def likeliest_first(logits_NV: Tensor, keys: Keys, rounds: int) -> SparseTargets:
    return in_order(logits_NV, keys, rounds, logits_NV.argsort(-1, descending=True))


def spread_positions(logits_NV: Tensor, keys: Keys, rounds: int) -> SparseTargets:
    """u low-discrepancy over the positions of a row: u_row + position times the golden ratio."""
    first = Keys(seed=keys.seed, rows=keys.rows, positions=torch.zeros_like(keys.positions))
    u = (first.uniforms(1) + keys.positions[:, None] * ((5**0.5 - 1) / 2)).frac()
    return at_points(logits_NV, (u + torch.arange(rounds)) / rounds)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a candidate makes of N positions: the dense targets, and what of them would be stored.

    counted: counts / rounds, by `split`. valued: weights by `split_prob`, which dense_NV has as they come back. extra:
    integers of each position, a stream each.
    """

    dense_NV: Tensor
    counted: SparseTargets
    rounds: int
    valued: SparseTargets | None = None
    extra: tuple[Tensor, ...] = ()


def plain(draw: Callable[[Tensor, Keys], SparseTargets], rounds: int) -> Candidate:
    """A sampler whose counts are all there is."""

    def estimate(logits_NV: Tensor, keys: Keys) -> Estimate:
        targets = draw(logits_NV, keys)
        return Estimate(dense_NV=targets.densify(logits_NV.shape[1]), counted=targets, rounds=rounds)

    return estimate


def levels(values: Tensor, octave: int = 32) -> Tensor:
    """Positive values on a grid of so many levels an octave."""
    return torch.exp2((values.log2() * octave).round() / octave)


def head_exact(logits_NV: Tensor, keys: Keys, rounds: int) -> Estimate:
    """VarOpt's threshold: ids with p >= 1/R with their value, the others as systematic draws, R p being the chance."""
    p_NV = logits_NV.softmax(-1)
    drawn = samplers.systematic(logits_NV, keys, rounds=rounds)
    own = p_NV.gather(-1, drawn.ids) * (drawn.weights > 0)
    head = own >= 1 / rounds
    values = levels(own.where(head, own.new_ones(()))) * head
    tail = drawn.weights * ~head  # one draw each
    dense = SparseTargets(ids=drawn.ids, weights=values + tail).densify(p_NV.shape[1])
    ids = drawn.ids
    return Estimate(
        dense_NV=dense,
        counted=SparseTargets(ids=ids, weights=tail),
        rounds=rounds,
        valued=SparseTargets(ids=ids, weights=values),
    )


FACTORS = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.4, 0.7])


def less_unigram(logits_NV: Tensor, keys: Keys, rounds: int) -> Estimate:
    """A control variate: systematic draws of |p - a u|, u the mean of p, each worth its sign; a the best of six."""
    p_NV, u_V = logits_NV.softmax(-1), BASE["unigram"]
    rests = torch.stack([(p_NV - a * u_V).abs().sum(-1) for a in FACTORS])
    best = rests.argmin(0)
    rest_NV = p_NV - FACTORS[best][:, None] * u_V
    mass = levels(rest_NV.abs().sum(-1), 256)
    drawn = samplers.systematic(rest_NV.abs().log(), keys, rounds=rounds)
    signs = rest_NV.gather(-1, drawn.ids).sign()
    signed = SparseTargets(ids=drawn.ids, weights=drawn.weights * signs * mass[:, None])
    dense = signed.densify(p_NV.shape[1]) + FACTORS[best][:, None] * u_V
    negative = (signs < 0) & (drawn.weights > 0)
    octaves = (-mass.log2() * 256).round().clamp(min=0)
    return Estimate(dense_NV=dense, counted=drawn, rounds=rounds, extra=(best, octaves, negative[drawn.weights > 0]))


Candidate = Callable[[Tensor, Keys], Estimate]
BASE: dict[str, Tensor] = {}  # "similar": the teacher's ids by `vocabulary_order`; "unigram": the mean of p
LADDER = (8, 12, 16, 20, 25, 30, 35, 40, 50)
CANDIDATES: dict[str, Candidate] = {
    **{f"systematic {n}": plain(partial(samplers.systematic, rounds=n), n) for n in LADDER},
    "random sampling 25": plain(partial(samplers.random_sampling, rounds=25), 25),
    "random sampling 50": plain(partial(samplers.random_sampling, rounds=50), 50),
    "stratified 25": plain(partial(stratified, rounds=25), 25),
    "systematic 25, u spread over positions": plain(partial(spread_positions, rounds=25), 25),
    "systematic 25, ids shuffled": plain(partial(random_order, rounds=25), 25),
    "systematic 25, likeliest first": plain(partial(likeliest_first, rounds=25), 25),
    "systematic 25, similar ids together": plain(lambda x, k: in_order(x, k, 25, BASE["similar"].expand_as(x)), 25),
    "head exact + systematic tail 16": partial(head_exact, rounds=16),
    "head exact + systematic tail 25": partial(head_exact, rounds=25),
    "systematic 16 less a unigram": partial(less_unigram, rounds=16),
    "systematic 25 less a unigram": partial(less_unigram, rounds=25),
}

# --- bytes ----------------------------------------------------------------------------------------------


def coded_bytes(made: Estimate, positions_of_row: int) -> int:
    """Of all rows, each a block of its own; ids are ranked among themselves as a shard's are."""
    counts = (made.counted.weights.double() * made.rounds).round().long().numpy()
    width, ids = made.dense_NV.shape[1], made.counted.ids.numpy()
    total = _row_bytes(FlatTargets.from_padded(ids, counts, made.rounds), width, positions_of_row, made.valued is None)
    if made.valued is not None:
        weights = FlatTargets.from_padded(made.valued.ids.numpy(), made.valued.weights.numpy())
        total += _row_bytes(weights, width, positions_of_row, True)
    for stream in made.extra:  # whole streams, or nearly nothing would be left of a sign but a frame's head
        total += len(encode_ints([stream.long().numpy()]))
    return total


def _row_bytes(flat: FlatTargets, width: int, positions_of_row: int, whole: bool) -> int:
    """By split or split_prob; a part of the draws, which do not sum to the rounds, as sizes and sets of ids."""
    ranks = id_ranks([flat], width, least=8).ranks
    flat, total = replace(flat, ids=ranks[flat.ids]), 0
    name = "split_prob" if flat.rounds is None else "split"
    spec = codec_spec(name, logit_width=width, rounds=flat.rounds)
    for start in range(0, len(flat.sizes), positions_of_row):
        row = flat.take(np.arange(start, start + positions_of_row))
        if whole:
            total += len(encode(row, spec))
            continue
        order = np.lexsort((row.ids, row.positions))
        firsts = (np.cumsum(row.sizes) - row.sizes)[row.sizes > 0]
        total += len(encode_ints([row.sizes, id_steps(row.ids[order], firsts)]))
    return total


# --- closed forms ---------------------------------------------------------------------------------------


def threshold_for(size_NV: Tensor, ids: Tensor) -> Tensor:
    """tau with Σ min(size / tau, 1) = ids, by bisection."""
    low, high = torch.full_like(ids, 1e-12), size_NV.sum(-1)
    for _ in range(60):
        middle = (low * high).sqrt()
        more = (size_NV / middle[:, None]).clamp(max=1).sum(-1) > ids
        low, high = middle.where(more, low), high.where(more, middle)
    return high


def threshold_error(size_NV: Tensor, ids: Tensor) -> Tensor:
    """The least error of any unbiased estimator with so many expected ids: sizes below tau come with weight tau."""
    tau = threshold_for(size_NV, ids)[:, None]
    return (size_NV * (tau - size_NV)).clamp(min=0).sum(-1)


def residual_error(p_NV: Tensor, base_V: Tensor, ids: Tensor) -> Tensor:
    """As above, of p - a · base with the best a of a grid for each position: a control variate of unigrams."""
    found = [threshold_error((p_NV - a * base_V).abs(), ids) for a in (0.0, 0.05, 0.1, 0.2, 0.4, 0.7)]
    return torch.stack(found).amin(0)


def closed_forms(p_NV: Tensor) -> None:
    """Squared errors over that of 50 draws with replacement, at that many expected ids, in bands of entropy."""
    entropy = -torch.xlogy(p_NV, p_NV).sum(-1)
    drawn = fidelity(p_NV, "random_sampling", rounds=50)
    even = {n: fidelity(p_NV, "systematic", rounds=n) for n in (12, 16, 20, 25, 30, 35, 40, 45, 50)}
    columns = {f"systematic {n}": f.squared_error for n, f in even.items() if n in (25, 50)}
    level = min(even, key=lambda n: abs(float(even[n].ids.mean() - drawn.ids.mean())))
    columns[f"systematic {level} (as many ids)"] = even[level].squared_error
    columns["  head exact, as many ids"] = threshold_error(p_NV, drawn.ids)
    columns["  and less a · unigram"] = residual_error(p_NV, p_NV.mean(0), drawn.ids)
    columns["vanilla top-k, as many ids"] = _top_as_many(p_NV, drawn.ids)
    bands = [(entropy >= low) & (entropy < high) for low, high in pairwise(EDGES)]
    bands.append(entropy >= 0)
    names = [f"{low:g}-{high:g} nats" for low, high in pairwise(EDGES)] + ["all"]
    print(f"{'squared error / random sampling 50':<36}" + "".join(f"{n:>13}" for n in names))
    print(f"{'positions':<36}" + "".join(f"{int(b.sum()):>13,}" for b in bands))
    print(f"{'ids of random sampling 50':<36}" + "".join(f"{float(drawn.ids[b].mean()):>13.1f}" for b in bands))
    print(f"{'ids of systematic 25':<36}" + "".join(f"{float(even[25].ids[b].mean()):>13.1f}" for b in bands))
    for name, error in columns.items():
        ratios = [float(error[b].mean() / drawn.squared_error[b].mean()) for b in bands]
        print(f"{name:<36}" + "".join(f"{r:>13.3f}" for r in ratios))


def _top_as_many(p_NV: Tensor, ids: Tensor) -> Tensor:
    ranked = p_NV.sort(-1, descending=True).values
    rest = ranked.square().flip(-1).cumsum(-1).flip(-1)
    return rest.gather(-1, ids.round().long().clamp(max=p_NV.shape[1] - 1)[:, None])[:, 0]


def position_budget(p_NV: Tensor, q_NV: Tensor) -> None:
    """What it costs to store targets at a share of the positions only, at equal expected ids over all positions.

    A position is kept with probability π and weighs 1/π. With v the squared error of its targets and g = q - p its full
    gradient, its noise is (v + g²)/π - g²: what is dropped is not a target's noise but the whole gradient. `best` knows
    both.
    """
    entropy = -torch.xlogy(p_NV, p_NV).sum(-1)
    pull = (q_NV - p_NV).square().sum(-1)
    even = {n: fidelity(p_NV, "systematic", rounds=n) for n in (*range(25, 60), 70, 80, 90, 100, 120, 140)}
    ids, base = float(even[25].ids.mean()), float(even[25].squared_error.mean())
    print(f"\nposition budget: systematic 25 errs by {base:.4f}, the full gradient q - p is {float(pull.mean()):.4f}")
    print(f"{'noise over that of all positions with 25':<42}" + "".join(f"{n:>12}" for n in ("evenly", *LAWS, "best")))
    for share in (0.9, 0.75, 0.5, 0.25):
        chances = {"evenly": torch.full_like(entropy, share)}
        chances |= {by: inclusion(calibrate(entropy, by, share).levels(entropy)) for by in LAWS}
        chances["best"] = _best(even[25].squared_error + pull, share)
        noises = []
        for pi in chances.values():
            rounds = max((n for n in even if float((pi * even[n].ids).mean()) <= ids), default=25)
            noises.append(float(((even[rounds].squared_error + pull) / pi - pull).mean()) / base)
        print(f"  {share:.0%} of the positions".ljust(42) + "".join(f"{noise:>12.2f}" for noise in noises))


def _best(noise_N: Tensor, share: float) -> Tensor:
    """min(c · root of the noise, 1), at least 0.1 %, with c such that their mean is the share."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        small = float((middle * noise_N.sqrt()).clamp(max=1).mean()) < share
        low, high = (middle, high) if small else (low, middle)
    return (high * noise_N.sqrt()).clamp(max=1).clamp(min=1e-3)


# --- gradients ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Found:
    """Sums of one candidate over rows and seeds: ids and squared error; gradients by seed; estimates of seed 0."""

    ids: float = 0.0
    error: float = 0.0
    gradients: dict[int, list[Tensor]]
    made: list[Estimate]


def gradients(student, teacher, reader: RowsReader, rows: int, seeds: int) -> None:
    """Bytes, squared error and angle of the parameter gradient, by candidate."""
    parameters = list(student.parameters())
    zeros = lambda: [torch.zeros_like(p) for p in parameters]  # noqa: E731
    full, positions = zeros(), 0
    found = {n: Found(gradients={seed: zeros() for seed in range(seeds)}, made=[]) for n in CANDIDATES}
    BASE["similar"] = vocabulary_order(teacher.get_output_embeddings().weight.detach())
    for start in range(0, rows, 8):
        tokens = torch.from_numpy(reader.batch(range(start, start + 8)).input_ids.astype(np.int64))
        with torch.no_grad():
            wanted_NV = teacher(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        p_NV = wanted_NV.softmax(-1)
        logits_NV = student(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        length, where = tokens.shape[1] - 1, torch.arange(len(wanted_NV))
        q_NV = logits_NV.softmax(-1).detach()
        add(full, torch.autograd.grad(logits_NV, parameters, q_NV - p_NV, retain_graph=True))
        for name, sums in found.items():
            for seed, total in sums.gradients.items():
                keys = Keys(seed=seed, rows=start + where // length, positions=where % length)
                made = CANDIDATES[name](wanted_NV, keys)
                push_NV = made.dense_NV.sum(-1, keepdim=True) * q_NV - made.dense_NV  # the loss's, paper eq. 4
                add(total, torch.autograd.grad(logits_NV, parameters, push_NV, retain_graph=True))
                sums.ids += float(stored_ids(made)) / seeds
                sums.error += float((made.dense_NV - p_NV).square().sum()) / seeds
                if seed == 0:
                    sums.made.append(replace(made, dense_NV=made.dense_NV[:1].clone()))  # its width
        positions += len(wanted_NV)
    show(found, full, positions, length)


def stored_ids(made: Estimate) -> Tensor:
    kept = made.counted.weights > 0
    return (kept if made.valued is None else kept | (made.valued.weights > 0)).sum()


def joined(parts: Sequence[Estimate]) -> Estimate:
    """The positions of all batches as one; ids padded to the same number."""

    def together(found: list[SparseTargets]) -> SparseTargets:
        return SparseTargets(ids=side_by_side([t.ids for t in found]), weights=side_by_side([t.weights for t in found]))

    return replace(
        parts[0],
        counted=together([each.counted for each in parts]),
        valued=None if parts[0].valued is None else together([each.valued for each in parts if each.valued]),
        extra=tuple(torch.cat(streams) for streams in zip(*(each.extra for each in parts), strict=True)),
    )


def show(found: dict[str, Found], full: list[Tensor], positions: int, length: int) -> None:
    size = {name: coded_bytes(joined(sums.made), length) / positions for name, sums in found.items()}
    error = {name: sums.error / positions for name, sums in found.items()}
    angles = {n: [metrics.gradient_angle(g, full) for g in sums.gradients.values()] for n, sums in found.items()}
    angle = {name: statistics.mean(values) for name, values in angles.items()}
    tangent = {name: math.tan(math.radians(value)) for name, value in angle.items()}
    ladder = [f"systematic {n}" for n in LADDER]
    print(
        f"\n{'':<40}{'ids':>6}{'bytes':>7}{'error':>9}{'angle, degrees':>16}{'at equal bytes: error':>23}{'angle':>8}"
    )
    for name, sums in found.items():
        spread = statistics.stdev(angles[name]) / math.sqrt(len(angles[name])) if len(angles[name]) > 1 else math.nan
        ratios = [values[name] / at_bytes(size[name], size, values, ladder) for values in (error, tangent)]
        print(
            f"{name:<40}{sums.ids / positions:>6.1f}{size[name]:>7.1f}{error[name]:>9.4f}"
            f"{angle[name]:>9.2f} ± {spread:.2f}{ratios[0]:>23.2f}{ratios[1]:>8.2f}"
        )


def at_bytes(wanted: float, size: Mapping[str, float], values: Mapping[str, float], ladder: Sequence[str]) -> float:
    """A value of systematic at so many bytes: a straight line between rounds, both axes logarithmic."""
    x, y = ([math.log(found[name]) for name in ladder] for found in (size, values))
    return math.exp(np.interp(math.log(wanted), x, y)) if x[0] <= math.log(wanted) <= x[-1] else math.nan


def add(total: list[Tensor], parts: tuple[Tensor, ...]) -> None:
    for sum_, part in zip(total, parts, strict=True):
        sum_ += part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--student", default="full_kd-s0")
    parser.add_argument("--only", help="candidates whose names hold this text")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    a = parser.parse_args()
    ladder = {f"systematic {n}" for n in LADDER}
    for name in [name for name in CANDIDATES if a.only and a.only not in name and name not in ladder]:
        del CANDIDATES[name]
    teacher = models.open_model(str(a.demo / "teacher"), device="cpu")
    reader = RowsReader(a.demo / "rows", "train")
    tokens = torch.from_numpy(reader.batch(range(32)).input_ids.astype(np.int64))
    with torch.no_grad():
        p_NV = teacher(input_ids=tokens).logits[:, :-1].flatten(0, 1).double().softmax(-1)
    print(f"V = {p_NV.shape[1]}, teacher's entropy {float(-torch.xlogy(p_NV, p_NV).sum(-1).mean()):.2f} nats\n")
    closed_forms(p_NV)
    BASE["unigram"] = p_NV.mean(0).float()
    student = models.open_model(str(a.demo / "students" / a.student), device="cpu")
    with torch.no_grad():
        position_budget(p_NV, student(input_ids=tokens).logits[:, :-1].flatten(0, 1).double().softmax(-1))
    print(f"\n{a.rows} rows of {reader.seq_len} tokens, student {a.student}, {a.seeds} seeds")
    gradients(student, teacher, reader, a.rows, a.seeds)


if __name__ == "__main__":
    main()
