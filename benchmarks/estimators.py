"""Which unbiased estimator errs least for its bytes: closed forms by entropy, then measured parameter gradients.

    python benchmarks/estimators.py DEMO [--student full_kd-s0] [--rows 64] [--seeds 4]

DEMO is the folder of `sparsekd demo` (its rows, teacher and students). The first table is exact (no drawing): squared
error at equal expected ids, over that of 50 draws with replacement, for positions grouped by the teacher's entropy.
The second draws: for each candidate, the angle between a student's gradient under it and under the whole teacher, all
parameters, one batch; ± is the standard error over seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsekd import inversion, metrics, models, samplers
from sparsekd.packed import RowsReader
from sparsekd.rng import Keys
from sparsekd.targets import SparseTargets
from sparsekd.variance import fidelity

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


def by_similarity(head_VH: Tensor) -> Tensor:
    """[V] ids in an order where neighbours have similar head weights: halves along the first principal direction."""

    def halve(ids: Tensor) -> list[Tensor]:
        if len(ids) <= 2:
            return [ids]
        centred = head_VH[ids] - head_VH[ids].mean(0)
        ranked = ids[(centred @ torch.pca_lowrank(centred, 1, center=False)[2][:, 0]).argsort()]
        return halve(ranked[: len(ids) // 2]) + halve(ranked[len(ids) // 2 :])

    torch.manual_seed(0)
    return torch.cat(halve(torch.arange(len(head_VH))))


def spread_positions(logits_NV: Tensor, keys: Keys, rounds: int) -> SparseTargets:
    """u low-discrepancy over the positions of a row: u_row + position times the golden ratio."""
    first = Keys(seed=keys.seed, rows=keys.rows, positions=torch.zeros_like(keys.positions))
    u = (first.uniforms(1) + keys.positions[:, None] * ((5**0.5 - 1) / 2)).frac()
    return at_points(logits_NV, (u + torch.arange(rounds)) / rounds)


def threshold(logits_NV: Tensor, keys: Keys, rounds: int) -> SparseTargets:
    """Ids with p >= 1/R as they are, the others as systematic draws: count 1 with probability R p."""
    p = logits_NV.softmax(-1)
    drawn = samplers.systematic(logits_NV, keys, rounds=rounds)
    own = p.gather(-1, drawn.ids)
    exact = own.where(own >= 1 / rounds, drawn.weights) * (drawn.weights > 0)
    return SparseTargets(ids=drawn.ids, weights=exact)


Candidate = Callable[[Tensor, Keys], SparseTargets]
ORDER: dict[str, Tensor] = {}  # "similar": the teacher's ids by `by_similarity`
CANDIDATES: dict[str, Candidate] = {
    "top-k 50": lambda x, k: samplers.top_k(x, k, k=50),
    "random sampling 25": lambda x, k: samplers.random_sampling(x, k, rounds=25),
    "random sampling 50": lambda x, k: samplers.random_sampling(x, k, rounds=50),
    "systematic 25": lambda x, k: samplers.systematic(x, k, rounds=25),
    "systematic 25, ids shuffled": lambda x, k: random_order(x, k, 25),
    "systematic 25, likeliest first": lambda x, k: likeliest_first(x, k, 25),
    "systematic 25, similar ids together": lambda x, k: in_order(x, k, 25, ORDER["similar"].expand_as(x)),
    "systematic 25, u spread over positions": lambda x, k: spread_positions(x, k, 25),
    "stratified 25": lambda x, k: stratified(x, k, 25),
    "head exact + systematic tail 25": lambda x, k: threshold(x, k, 25),
    "systematic 34": lambda x, k: samplers.systematic(x, k, rounds=34),
    "systematic 50": lambda x, k: samplers.systematic(x, k, rounds=50),
}

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

    A position is kept with probability π, in proportion to the teacher's entropy, and weighs 1/π. With v the squared
    error of its targets and g = q - p its full gradient, its noise is (v + g²)/π - g²: what is dropped is not a
    target's noise but the whole gradient.
    """
    entropy = -torch.xlogy(p_NV, p_NV).sum(-1)
    pull = (q_NV - p_NV).square().sum(-1)
    even = {n: fidelity(p_NV, "systematic", rounds=n) for n in (*range(25, 60), 70, 80, 90, 100, 120, 140)}
    ids, base = float(even[25].ids.mean()), float(even[25].squared_error.mean())
    print(f"\nposition budget: systematic 25 errs by {base:.4f}, the full gradient q - p is {float(pull.mean()):.4f}")
    for share in (0.9, 0.75, 0.5, 0.25):
        for rule, pi in (("evenly", torch.full_like(entropy, share)), ("by entropy", _kept(entropy, share))):
            rounds = max((n for n in even if float((pi * even[n].ids).mean()) <= ids), default=25)
            noise = float(((even[rounds].squared_error + pull) / pi - pull).mean()) / base
            print(f"  {share:.0%} of the positions, {rule}, with {rounds} rounds: {noise:.2f} of all with 25")


def _kept(size_N: Tensor, share: float) -> Tensor:
    """min(c · size, 1), at least 0.1 %, with c such that their mean is the share."""
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        small = float((middle * size_N).clamp(max=1).mean()) < share
        low, high = (middle, high) if small else (low, middle)
    return (high * size_N).clamp(max=1).clamp(min=1e-3)


# --- gradients ------------------------------------------------------------------------------------------


def gradients(student, teacher, reader: RowsReader, rows: int, seeds: int) -> None:
    """Angle and relative error of the parameter gradient, by candidate."""
    parameters = list(student.parameters())
    zeros = lambda: [torch.zeros_like(p) for p in parameters]  # noqa: E731
    full, sums = zeros(), {(name, seed): zeros() for name in CANDIDATES for seed in range(seeds)}
    ids, errors, positions = dict.fromkeys(CANDIDATES, 0.0), dict.fromkeys(CANDIDATES, 0.0), 0
    ORDER["similar"] = by_similarity(teacher.get_output_embeddings().weight.detach())
    for start in range(0, rows, 8):
        tokens = torch.from_numpy(reader.batch(range(start, start + 8)).input_ids.astype(np.int64))
        with torch.no_grad():
            wanted_NV = teacher(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        p_NV = wanted_NV.softmax(-1)
        logits_NV = student(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        length = tokens.shape[1] - 1
        where = torch.arange(len(wanted_NV))
        add(full, torch.autograd.grad(logits_NV, parameters, logits_NV.softmax(-1).detach() - p_NV, retain_graph=True))
        q_NV = logits_NV.softmax(-1).detach()
        for (name, seed), total in sums.items():
            keys = Keys(seed=seed, rows=start + where // length, positions=where % length)
            targets = CANDIDATES[name](wanted_NV, keys)
            dense_NV = targets.densify(p_NV.shape[1])
            push_NV = dense_NV.sum(-1, keepdim=True) * q_NV - dense_NV  # the loss's gradient, paper eq. 4
            add(total, torch.autograd.grad(logits_NV, parameters, push_NV, retain_graph=True))
            ids[name] += float((targets.weights > 0).sum()) / seeds
            errors[name] += float((dense_NV - p_NV).square().sum()) / seeds
        positions += len(wanted_NV)
    print(f"\n{'':<40}{'ids':>7}{'error':>9}{'angle, degrees':>20}{'|g - full| / |full|':>22}{'one seed only':>16}")
    for name in CANDIDATES:
        angles = [metrics.gradient_angle(sums[name, seed], full) for seed in range(seeds)]
        norm = math.sqrt(sum(float(f.double().square().sum()) for f in full))
        apart = [distance(sums[name, seed], full) / norm for seed in range(seeds)]
        spread = statistics.stdev(angles) / math.sqrt(seeds)
        print(
            f"{name:<40}{ids[name] / positions:>7.1f}{errors[name] / positions:>9.4f}"
            f"{statistics.mean(angles):>12.2f} ± {spread:.2f}{statistics.mean(apart):>20.4f}{angles[0]:>16.2f}"
        )


def add(total: list[Tensor], parts: tuple[Tensor, ...]) -> None:
    for sum_, part in zip(total, parts, strict=True):
        sum_ += part


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return math.sqrt(sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--student", default="full_kd-s0")
    parser.add_argument("--only", help="candidates whose names hold this text")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    a = parser.parse_args()
    for name in [name for name in CANDIDATES if a.only and a.only not in name]:
        del CANDIDATES[name]
    teacher = models.open_model(str(a.demo / "teacher"), device="cpu")
    reader = RowsReader(a.demo / "rows", "train")
    tokens = torch.from_numpy(reader.batch(range(32)).input_ids.astype(np.int64))
    with torch.no_grad():
        p_NV = teacher(input_ids=tokens).logits[:, :-1].flatten(0, 1).double().softmax(-1)
    print(f"V = {p_NV.shape[1]}, teacher's entropy {float(-torch.xlogy(p_NV, p_NV).sum(-1).mean()):.2f} nats\n")
    closed_forms(p_NV)
    student = models.open_model(str(a.demo / "students" / a.student), device="cpu")
    with torch.no_grad():
        position_budget(p_NV, student(input_ids=tokens).logits[:, :-1].flatten(0, 1).double().softmax(-1))
    print(f"\n{a.rows} rows of {reader.seq_len} tokens, student {a.student}, {a.seeds} seeds")
    gradients(student, teacher, reader, a.rows, a.seeds)


if __name__ == "__main__":
    main()
