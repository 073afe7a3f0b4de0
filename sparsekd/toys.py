"""Figure 2a: what each method hands the student, without training (2b, 2c are in `toy_tasks`, app. A in `laws`).

Shapes: V ids of a vocabulary, R rounds of averaging, S seeds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsekd as skd
from sparsekd import plots
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, Settings, Table, over, shown
from sparsekd.targets import SparseTargets

# -- figure 2a: what each method hands the student, on a Zipf distribution; sizes as in app. K

VOCAB, TOP_K, DRAWS, ROUNDS, SHOWN = 100_000, 20, 22, 1000, 50
_TRUTH, _TOPK, _NAIVE = "Ground truth", f"Top-K {TOP_K}, renormalised", "Naive fix"
_RS, _SLIP = f"Random sampling, {DRAWS} draws", "Random sampling, repeats lost"
_PAINT_2A = {_TRUTH: "ink", _TOPK: "topk", _NAIVE: "extra-2", _RS: "rs", _SLIP: "extra-1"}


def zipf(vocab_size: int, exponent: float = 1.0) -> Tensor:
    """[V] float64: the i-th id (from 1) has a probability proportional to i^-exponent."""
    mass = torch.arange(1, vocab_size + 1, dtype=torch.float64) ** -exponent
    return mass / mass.sum()


def fig2a(folder: Path, settings: Settings) -> Result:
    """Mean target of each method over 1000 rounds, its distance to the truth, and its expectation in closed form."""
    truth_V = zipf(VOCAB)
    runs = [{name: _measured(t, truth_V) for name, t in _targets(truth_V, s).items()} for s in range(settings.seeds)]
    columns = (
        Column(name="Bias", unit="L1 of the expected target"),
        Column(name="Mean target", unit=f"L1, {ROUNDS:,} rounds"),
        Column(name=f"First {SHOWN} ids", unit=f"L1, {ROUNDS:,} rounds"),
        Column(name="One target", unit="L1"),
        Column(name="Id 1", unit="probability", form=".4f"),
        Column(name="Kept", unit="unique ids", form=",.1f"),
    )
    truth = (Cell(mean=0.0), None, None, None, Cell(mean=float(truth_V[0])), Cell(mean=VOCAB))
    keys, few = ("mean", "head", "one", "id 1", "kept"), {_TOPK: runs[:1]}  # Top-K is the same for every seed
    rows = {_TRUTH: truth} | {
        name: (Cell(mean=bias), *(over(run[name][key] for run in few.get(name, runs)) for key in keys))
        for name, bias in _biases(truth_V).items()
    }
    curves = {name: _mean_curve([run[name]["curve"] for run in runs]) for name in runs[0]}
    return Result(
        ours=Table(columns=columns, rows=rows),
        scale=f"The paper's own sizes (V = {VOCAB:,}, K = {TOP_K}, {DRAWS} draws, {ROUNDS:,} rounds). It draws one "
        f"seed and prints no numbers; we average {settings.seeds}.",
        findings=_findings_2a(truth_V, rows),
        data={"curves": {_TRUTH: truth_V[:SHOWN].tolist(), **curves}, "paint": _PAINT_2A},
    )


def _targets(truth_V: Tensor, seed: int) -> dict[str, SparseTargets]:
    """{method: its targets for ROUNDS positions}; Top-K's are all the same, one is enough."""
    logits_RV = truth_V.log().float().expand(ROUNDS, -1)
    top = skd.sample(truth_V.log()[None], "top_k", k=TOP_K)
    drawn = skd.sample(logits_RV, "random_sampling", rounds=DRAWS, seed=seed)
    # The true next tokens are drawn by another key than the targets.
    labels = skd.sample(logits_RV, "random_sampling", rounds=1, seed=seed, rows=torch.ones(ROUNDS, dtype=torch.int64))
    rest = (1 - top.mass()).expand(ROUNDS, 1)
    return {
        _TOPK: SparseTargets(ids=top.ids, weights=top.weights / top.mass()[:, None]),
        _NAIVE: SparseTargets(
            ids=torch.cat([top.ids.expand(ROUNDS, -1), labels.ids], -1),
            weights=torch.cat([top.weights.expand(ROUNDS, -1), rest], -1),
        ),
        _RS: drawn,
        _SLIP: SparseTargets(ids=drawn.ids, weights=(drawn.weights > 0) / DRAWS),
    }


def _measured(targets: SparseTargets, truth_V: Tensor) -> dict[str, Any]:
    """Distances of the mean target and of single targets to the truth, and the first ids' mean weights."""
    rounds, flat = len(targets), targets.ids.flatten()
    mean_V = torch.zeros_like(truth_V).scatter_add_(0, flat, targets.weights.double().flatten()) / rounds
    kept = len(torch.unique((torch.arange(rounds)[:, None] * VOCAB + targets.ids)[targets.weights > 0])) / rounds
    return {
        "mean": _l1(mean_V, truth_V),
        "head": _l1(mean_V[:SHOWN], truth_V[:SHOWN]),
        "one": float(torch.stack([_l1_sparse(targets[i], truth_V) for i in range(rounds)]).mean()),
        "id 1": float(mean_V[0]),
        "kept": kept,
        "curve": mean_V[:SHOWN].tolist(),
    }


def _l1(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum())


def _l1_sparse(target: SparseTargets, truth_V: Tensor) -> Tensor:
    """Σ |t^s - t| of one position without a dense target: outside its ids the distance is the truth's mass."""
    ids, where = target.ids[target.weights > 0].unique(return_inverse=True)
    weights = torch.zeros(len(ids), dtype=truth_V.dtype).scatter_add_(
        0, where, target.weights[target.weights > 0].double()
    )
    return (weights - truth_V[ids]).abs().sum() + 1 - truth_V[ids].sum()


def _biases(truth_V: Tensor) -> dict[str, float]:
    """{method: L1 between its expected target and the truth}, in closed form."""
    kept = torch.zeros_like(truth_V)
    kept[:TOP_K] = truth_V[:TOP_K]
    rest = 1 - kept.sum()
    expected = {
        _TOPK: kept / kept.sum(),
        _NAIVE: kept + rest * truth_V,  # the residue lands on id i with probability t_i
        _RS: truth_V,
        _SLIP: (1 - (1 - truth_V) ** DRAWS) / DRAWS,  # 1 / draws if the id is drawn at all
    }
    return {name: _l1(mean, truth_V) for name, mean in expected.items()}


def _mean_curve(curves: list[list[float]]) -> list[float]:
    return torch.tensor(curves, dtype=torch.float64).mean(0).tolist()


def _findings_2a(truth_V: Tensor, rows: dict[str, Any]) -> tuple[Finding, ...]:
    bias, mean, head, one, first, kept = range(6)
    truth, top, naive, rs, slip = rows.values()
    up, naive_up = (row[first].mean / truth[first].mean for row in (top, naive))
    hidden = 1 - float(truth_V[:TOP_K].sum())
    return (
        Finding(
            text=f"Renormalised Top-K scales its tokens up: {up:.2f} times the truth. Its target lies "
            f"{top[bias].mean:.3f} away, and {hidden:.0%} of the mass is never shown.",
            holds=up > 1.05,
        ),
        Finding(
            text=f"The naive fix comes closer but stays biased: {naive[bias].mean:.3f} away on average, its top token "
            f"at {naive_up:.2f} times the truth.",
            holds=0.01 < naive[bias].mean < top[bias].mean,
        ),
        Finding(
            text=f"Random sampling follows the truth: over the first {SHOWN} ids its mean target is "
            f"{shown(rs[head], '.4f')} away, Top-K's {top[head].mean:.3f}. Its bias is 0.",
            holds=rs[head].mean < 0.2 * min(top[head].mean, naive[head].mean),
        ),
        Finding(
            text=f"{DRAWS} draws keep {shown(rs[kept], '.1f')} unique ids: the fair match of K = {TOP_K}.",
            holds=abs(rs[kept].mean - TOP_K) < 0.5,
        ),
        Finding(
            text=f"For one token Top-K is the closer one (A.3, section 4.3): {top[one].mean:.3f} against "
            f"{shown(rs[one], '.3f')}. Low error per token and no bias are different things.",
            holds=top[one].mean < rs[one].mean,
        ),
        Finding(
            text=f"Over all {VOCAB:,} ids the mean of {ROUNDS:,} random targets is still {rs[mean].mean:.2f} away, for "
            f"{ROUNDS * DRAWS:,} draws cannot show every tail id. Such noise shrinks with the rounds; bias stays.",
        ),
        Finding(
            text="App. K's figure adds the naive fix's residue in proportion to the truth, which is its mean over true "
            f"next tokens. A single target puts all {hidden:.0%} on one id and lies {shown(naive[one], '.3f')} away.",
        ),
        Finding(
            text="App. K's training code writes draws with scatter_, which overwrites: a token drawn five times counts "
            f"once. Such targets are biased by {slip[bias].mean:.3f} and sum to {_slip_mass(truth_V):.2f}; section 3.4 "
            "counts every draw, as sparsekd does.",
        ),
    )


def _slip_mass(truth_V: Tensor) -> float:
    return float(((1 - (1 - truth_V) ** DRAWS) / DRAWS).sum())


def plot_2a(result: Result) -> Any:
    """Target probability of the first ids, one line per method, the truth as a wide band; the same with a log axis."""
    curves = result.data["curves"]
    with plots.canvas(920, 380, left=58, right=472, bottom=44) as (figure, linear):
        logarithmic = figure.add_axes((530 / 920, 44 / 380, 380 / 920, 324 / 380))
        for axes in (linear, logarithmic):
            _curves_2a(axes, curves)
        logarithmic.set(yscale="log", ylim=(2e-4, 0.4))
        logarithmic.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        linear.set(ylim=(0, 1.04 * max(max(c) for c in curves.values())))
        plots.legend(linear, [(name, _PAINT_2A[name]) for name in curves], right=0.99, top=0.97)
        plots.axis_names(linear, "token id, most probable first", "mean target probability")
        plots.axis_names(logarithmic, "the same, log scale: Top-K has no tail", "")
    return figure


def _curves_2a(axes: Any, curves: dict[str, list[float]]) -> None:
    ids = range(1, SHOWN + 1)
    axes.plot(ids, curves[_TRUTH], color=plots.PALETTE["ink"], linewidth=7, alpha=0.16, solid_capstyle="round")
    for name in (_TOPK, _NAIVE, _SLIP, _RS):
        heights = [h if h > 0 else math.nan for h in curves[name]] if name == _TOPK else curves[name]
        axes.plot(ids, heights, color=plots.PALETTE[_PAINT_2A[name]], linewidth=1.8, marker="o", markersize=2.6)
    axes.set(xlim=(0, SHOWN + 0.5))


FIG_2A = Reproduction(
    title="What each method hands the student, on a Zipf distribution",
    source="fig. 2a, app. B, app. K",
    claim="Keeping the top K scales the kept tokens up; giving the rest to the ground truth helps but stays "
    "biased; random sampling has the truth as its mean.",
    run=fig2a,
    plot=plot_2a,
)
