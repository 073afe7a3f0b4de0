"""What the paper measures beside training runs: gradients against FullKD (table 3), throughput (table 4), the exact
variance of proposals (table 10, section 6.1).

Shapes: B rows, L tokens, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparsekd as skd
from sparsekd import models, quantize
from sparsekd.gradients import gradient_geometry
from sparsekd.lab import Lab
from sparsekd.packed import RowsReader
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, Settings, Table, exact, over
from sparsekd.tables import COLUMNS, FULL, TABLE10_ARMS, TABLE10_PAPER, USES, drawn, lab_of, run_arms, scale_of, table

# --- table 3: gradients ---------------------------------------------------------------------------------

GRADIENT_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "Top-K 12": ("top_k", {"k": 12}),
    "Top-K 50": ("top_k", {"k": 50}),
    "Top-K 300": ("top_k", {"k": 300}),
    "Random sampling, 16 rounds": ("random_sampling", {"rounds": 16}),
    "Random sampling, 50 rounds": ("random_sampling", {"rounds": 50}),
}


def table3(folder: Path, settings: Settings) -> Result:
    """Angle and norm ratio of a student's parameter gradients against FullKD's, for one large batch (section 4.2)."""
    lab = lab_of(folder, settings)
    lab.run([FULL])
    found = gradients_by_seed(lab, GRADIENT_METHODS)
    rows = {
        name: (
            over([one[name]["ids"] for one in found]),
            over([one[name]["angle"] for one in found]),
            over([one[name]["ratio"] for one in found]),
        )
        for name in GRADIENT_METHODS
    }
    columns = (
        Column(name="ids per token", form=".1f"),
        Column(name="angle", unit="degrees", form=".1f"),
        Column(name="norm ratio", form=".2f"),
    )
    paper = {"Top-K 12": (12, 58, 2.4), "Top-K 50": (50, 48, 1.8), "Top-K 300": (300, 30, 1.3)}
    paper["Random sampling, 50 rounds"] = (12, 4, 1.0)
    best, vanilla = rows["Random sampling, 50 rounds"], rows["Top-K 300"]
    assert isinstance(best[1], Cell)
    assert isinstance(vanilla[1], Cell)
    return Result(
        ours=Table(columns=columns, rows=rows),
        paper=Table(columns=columns, rows={name: exact(*values) for name, values in paper.items()}),
        scale=scale_of(lab, "a 300M model, one global batch") + f" One batch of {_BATCH_ROWS} rows.",
        findings=(
            Finding(
                text=f"50 rounds are {best[1].mean:.1f} degrees from FullKD's gradient, "
                f"the 300 largest {vanilla[1].mean:.1f}.",
                holds=best[1].mean < vanilla[1].mean,
            ),
        ),
        data={name: [one[name]["angle"] for one in found] for name in GRADIENT_METHODS},
    )


_BATCH_ROWS = 192


def gradients_by_seed(lab: Lab, methods: Mapping[str, tuple[str, dict[str, Any]]]) -> list[dict[str, dict[str, float]]]:
    """`gradient_geometry` of each seed's FullKD student, which the lab has trained."""
    return [
        gradient_geometry(
            student=str(lab.student_folder(FULL, seed)),
            teacher=lab.teacher(),
            rows=lab.rows(),
            methods=methods,
            seed=seed,
            batch_rows=_BATCH_ROWS,
            device=lab.settings.device,
        )
        for seed in lab.settings.seeds
    ]


def plot3(result: Result) -> Any:
    """Angles by method, one dot a seed."""
    from sparsekd import plots

    with plots.canvas(760, 220, left=230, right=24, bottom=46) as (figure, axes):
        for row, (name, angles) in enumerate(result.data.items()):
            colour = plots.PALETTE["topk" if name.startswith("Top") else "rs"]
            axes.plot(angles, [row] * len(angles), "o", markersize=7, color=colour)
        axes.set_yticks(range(len(result.data)), list(result.data))
        axes.set_ylim(len(result.data) - 0.4, -0.6)
        axes.set_xlim(left=0)
        plots.axis_names(axes, "angle to FullKD's gradient, degrees", "")
        return figure


# --- table 4: throughput --------------------------------------------------------------------------------


def table4(folder: Path, settings: Settings) -> Result:
    """Training tokens per second of CE, random sampling from a cache, and FullKD online (section 4.4)."""
    lab = lab_of(folder, settings)
    steps = 12 if settings.profile == "quick" else 30
    speeds = [_throughput(lab, steps, seed) for seed in lab.settings.seeds]
    relative = {name: [one[name] / one["FullKD"] for one in speeds] for name in speeds[0]}
    columns = (Column(name="tokens/s", unit="× FullKD", form=".2f"),)
    paper = {"CE": (2.9,), "Random sampling": (2.6,), "FullKD": (1.0,)}
    ratio = statistics.fmean(one["Random sampling"] / one["CE"] for one in speeds)
    gain = statistics.fmean(relative["Random sampling"])
    return Result(
        ours=Table(columns=columns, rows={name: (over(values),) for name, values in relative.items()}),
        paper=Table(columns=columns, rows={name: exact(*values) for name, values in paper.items()}),
        scale=scale_of(lab, "300M students of a 3B teacher on 8 H100s")
        + " Steps of the three methods in turn on one device, by their medians; a seed is other rows and weights.",
        findings=(
            Finding(
                text=f"Training from the cache runs at {ratio:.2f}× the speed of cross-entropy and "
                f"{gain:.2f}× that of FullKD.",
                holds=ratio > 0.9 and gain > 1,
            ),
        ),
        data={"relative": relative},
    )


def _throughput(lab: Lab, steps: int, seed: int) -> dict[str, float]:
    """Tokens per second by the median step; the methods take turns, so a busy machine slows all alike."""
    s, device = lab.settings, lab.settings.device or "cpu"
    with skd.CacheReader(lab.cache(drawn(50))) as reader:
        first = seed * s.batch_size
        rows = [reader[i % len(reader)] for i in range(first, first + s.batch_size)]
        width, seq_len = reader.spec.logit_width, reader.spec.seq_len
    torch.manual_seed(seed)
    plain = models.new_student(s.student, vocab_size=width, seq_len=seq_len).to(device)
    teacher = models.open_model(lab.teacher(), device=device)
    students = {
        "CE": plain,
        "Random sampling": skd.attach_sparse_kd(copy.deepcopy(plain)),
        "FullKD": skd.attach_full_kd(copy.deepcopy(plain), teacher),
    }
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in students.items()}
    spent: dict[str, list[float]] = {name: [] for name in students}
    for _ in range(steps + 2):
        for name, model in students.items():
            batch = skd.SparseKDCollator(with_targets=name == "Random sampling")(rows)
            spent[name].append(_step(model.train(), optimizers[name], {k: v.to(device) for k, v in batch.items()}))
    tokens = s.batch_size * seq_len
    return {name: tokens / statistics.median(seconds[2:]) for name, seconds in spent.items()}


def _step(model: Any, optimizer: Any, batch: dict[str, Tensor]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


# --- table 10: proposals --------------------------------------------------------------------------------


def table10(folder: Path, settings: Settings) -> Result:
    """Students by the temperature of the proposal q ∝ p^t, beside the exact variance of the estimate (section 6.1)."""
    lab = lab_of(folder, settings)
    outcomes = run_arms(lab, TABLE10_ARMS)
    curve = _variance_curve(lab)
    lowest = min(curve, key=lambda point: point[1])
    columns = (*COLUMNS, Column(name="squared error", unit="× t = 1", form=".2f"))
    base = table(outcomes, [arm.label for arm in TABLE10_ARMS]).rows
    at = {f"t = {t}": value for t, value in curve}
    rows = {name: (*cells, Cell(mean=at[name]) if name in at else None) for name, cells in base.items()}
    return Result(
        ours=Table(columns=columns, rows=rows),
        paper=Table(columns=COLUMNS, rows={name: exact(*values) for name, values in TABLE10_PAPER.items()}),
        scale=scale_of(lab, "300M students, a 3B teacher, 10B tokens"),
        findings=(
            Finding(
                text=f"The squared error of the plain unbiased weights is lowest at t = {lowest[0]} "
                f"({lowest[1]:.2f} of t = 1) and at t = 0 it is {at['t = 0.0']:.0f} times that of t = 1.",
                holds=0.8 <= lowest[0] <= 1.2,
            ),
        ),
        data={"curve": curve},
    )


def _variance_curve(lab: Lab, rows: int = 16) -> list[tuple[float, float]]:
    """(t, E‖t̂ - p‖² over that at t = 1): exactly Σ p²/q - Σ p², over N, for draws from q ∝ p^t weighted by p/q."""
    log_p = _heldout_log_probabilities(lab, rows)
    values = {}
    for t in [round(0.1 * i, 1) for i in range(21)]:
        log_q = (t * log_p).log_softmax(-1)
        values[t] = float(((2 * log_p - log_q).exp().sum(-1) - (2 * log_p).exp().sum(-1)).mean())
    return [(t, value / values[1.0]) for t, value in values.items()]


@torch.no_grad()
def _heldout_log_probabilities(lab: Lab, rows: int = 16) -> Tensor:
    """[positions, V] float64 log-probabilities of the lab's teacher on held-out rows."""
    teacher = models.open_model(lab.teacher(), device=lab.settings.device or "cpu")
    reader = RowsReader(lab.rows(), "heldout")
    tokens = torch.from_numpy(reader.batch(range(min(rows, len(reader)))).input_ids.astype(np.int64))
    return teacher(input_ids=tokens.to(teacher.device)).logits.flatten(0, 1).double().log_softmax(-1)


def plot10(result: Result) -> Any:
    """The exact variance against the proposal's temperature."""
    from sparsekd import plots

    t, error = zip(*result.data["curve"], strict=True)
    with plots.canvas(760, 320, left=64, right=24, bottom=46) as (figure, axes):
        axes.plot(t, error, color=plots.PALETTE["rs"], linewidth=2)
        axes.axvspan(0.8, 1.2, color=plots.PALETTE["rs"], alpha=0.12, linewidth=0)
        axes.set_yscale("log")
        plots.axis_names(
            axes, "temperature t of the proposal q ∝ p^t (band: the paper's 0.8 to 1.2)", "squared error / t = 1"
        )
        return figure


# --- appendix D.1: quantisation -------------------------------------------------------------------------


def quantisation(folder: Path, settings: Settings) -> Result:
    """What each code loses on a real teacher's probabilities (appendix D.1): linear, ratio, log-ratio, exact counts."""
    lab = lab_of(folder, settings)
    probabilities = _heldout_log_probabilities(lab).exp().cpu().numpy()
    losses = quantize.quantisation_table(probabilities)
    columns = (
        Column(name="bits", form=".0f"),
        Column(name="mean error", form=".1e"),
        Column(name="largest error", form=".1e"),
        Column(name="KL", unit="nats", form=".1e"),
    )
    rows = {
        f"{each.targets}, {each.code}": exact(each.bits, each.mean_error, each.max_error, each.divergence)
        for each in losses
    }
    kl = {(each.targets, each.code): each.divergence for each in losses}
    counts = [value for (targets, _), value in kl.items() if not targets.startswith("top")]
    return Result(
        ours=Table(columns=columns, rows=rows),
        scale="The paper says in words that 7 linear bits were slightly worse than fp16, the ratio code not; "
        f"it prints no numbers. Here: {len(probabilities):,} held-out positions of {lab.text()}.",
        findings=(
            Finding(
                text=f"The ratio code loses {kl['top-12', 'linear'] / kl['top-12', 'ratio']:.0f} times less than the "
                "linear one on the 12 largest probabilities.",
                holds=kl["top-12", "ratio"] < kl["top-12", "linear"],
            ),
            Finding(text="Counts are stored exactly, for 50 and for 200 rounds.", holds=not any(counts)),
        ),
    )


MEASURES: dict[str, Reproduction] = {
    "table3": Reproduction(
        title="Gradients against FullKD",
        source="table 3, section 4.2",
        claim="Random sampling's gradient has FullKD's direction and norm; top-k's is far off and too long.",
        run=table3,
        plot=plot3,
        uses=USES,
    ),
    "table4": Reproduction(
        title="Training throughput",
        source="table 4, section 4.4",
        claim="Training from the cache costs about 10 % more than cross-entropy and is 1.7 to 2.6 times FullKD.",
        run=table4,
        uses=USES,
    ),
    "quantisation": Reproduction(
        title="Seven bits for a probability",
        source="app. D.1",
        claim="Seven linear bits are slightly worse than fp16, a ratio code over sorted probabilities is not.",
        run=quantisation,
        uses=("profile", "rows", "teacher"),
    ),
    "table10": Reproduction(
        title="The proposal's temperature",
        source="table 10, section 6.1",
        claim="Between t = 0.8 and 1.2 nothing changes; uniform sampling (t = 0) diverges.",
        run=table10,
        plot=plot10,
        uses=USES,
    ),
}
