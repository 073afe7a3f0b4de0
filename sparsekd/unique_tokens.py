"""Figure 5: how many unique ids so many rounds of random sampling give, for a real teacher and for a Zipf law.

Shapes: N positions, V ids of a vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sparsekd as skd
from sparsekd import plots
from sparsekd.evaluate import unique_ids
from sparsekd.lab import Lab
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, Settings, Table, exact, over
from sparsekd.tables import USES, lab_of
from sparsekd.toys import zipf

ROUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
# A Zipf law with this exponent has the entropy of a 3B model's next token on web text: its loss is 2.75 nats in the
# paper's tables, and a calibrated model's entropy equals its loss. A small teacher's is higher.
LM_ENTROPY, LM_VOCAB = 2.75, 128_256
PAPER = (50, 12)  # rounds, unique ids: appendix D.1 and section 4.2
_POSITIONS = 200  # of the Zipf law, for each seed


def fig5(folder: Path, settings: Settings) -> Result:
    """Mean unique ids for 1 .. 500 rounds of the lab's teacher, the power law through them, and a Zipf law beside."""
    lab = lab_of(folder, settings)
    measured, of_zipf = _of_teacher(lab), _of_zipf(settings.seeds)
    unique = [cell.mean for cell in measured]
    exponent, prefactor, r2 = power_law(ROUNDS, unique)
    columns = (
        Column(name="unique ids", form=".2f"),
        Column(name="power law", unit="at these rounds", form=".2f"),
        Column(name="Zipf law", unit=f"of {LM_ENTROPY} nats", form=".2f"),
    )
    rows = {
        _rounds(r): (ours, Cell(mean=prefactor * r**exponent), theirs)
        for r, ours, theirs in zip(ROUNDS, measured, of_zipf, strict=True)
    }
    return Result(
        ours=Table(columns=columns, rows=rows),
        paper=Table(columns=columns[:1], rows={_rounds(PAPER[0]): exact(PAPER[1])}),
        scale=_scale(lab, settings.teacher or f"a teacher of {lab.settings.teacher_steps} steps"),
        findings=(
            Finding(
                text=f"On log-log axes the points lie close to the line {prefactor:.2f} rounds^{exponent:.2f} "
                f"(R² = {r2:.4f}).",
                holds=r2 > 0.98,
            ),
            _bend(unique),
            Finding(
                text=f"{PAPER[1]} unique ids, the paper's budget, need {_enough(unique)} rounds with this teacher and "
                f"{_enough([cell.mean for cell in of_zipf])} with the Zipf law; the paper takes {PAPER[0]}. The "
                "sharper a teacher, the more rounds."
            ),
        ),
        data={
            "rounds": list(ROUNDS),
            "unique": unique,
            "power_law": {"exponent": exponent, "prefactor": prefactor},
            "zipf": [cell.mean for cell in of_zipf],
        },
    )


def _scale(lab: Lab, teacher: str) -> str:
    return (
        f"The paper plots its teacher on its pre-training data and prints one point. Here: {teacher} on "
        f"held-out rows of {lab.text()}, other rows for each of {len(lab.settings.seeds)} seeds. A Zipf law of "
        f"{LM_VOCAB:,} ids with the entropy of a 3B model's next token stands beside it."
    )


def _of_teacher(lab: Lab) -> list[Cell]:
    runs = [
        unique_ids(teacher=lab.teacher(), rows=lab.rows(), rounds=ROUNDS, seed=seed, device=lab.settings.device)
        for seed in lab.settings.seeds
    ]
    return _cells([run["unique"] for run in runs])


def _of_zipf(seeds: int) -> list[Cell]:
    logits_NV = zipf(LM_VOCAB, exponent_of(LM_ENTROPY, LM_VOCAB)).log().float().expand(_POSITIONS, -1)
    return _cells([[_mean_unique(logits_NV, rounds, seed) for rounds in ROUNDS] for seed in range(seeds)])


def _mean_unique(logits_NV: torch.Tensor, rounds: int, seed: int) -> float:
    return float((skd.sample(logits_NV, "random_sampling", rounds=rounds, seed=seed).weights > 0).sum()) / _POSITIONS


def _cells(runs: Sequence[Sequence[float]]) -> list[Cell]:
    """One cell for each number of rounds, over the seeds."""
    return [cell for values in zip(*runs, strict=True) if (cell := over(values))]


def _bend(unique: Sequence[float]) -> Finding:
    slopes = [power_law(ROUNDS[i : i + 3], unique[i : i + 3])[0] for i in (0, len(ROUNDS) - 3)]
    return Finding(
        text=f"Almost a power law, not quite: the slope is {slopes[0]:.2f} over the first three points and "
        f"{slopes[1]:.2f} over the last three."
    )


def _enough(unique: Sequence[float]) -> str:
    """The rounds that give the paper's unique ids."""
    found = (r for r in range(1, max(ROUNDS) + 1) if _between(r, ROUNDS, unique) >= PAPER[1])
    return str(next(found, f"more than {max(ROUNDS)}"))


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count != 1)}"


def power_law(rounds: Sequence[float], unique: Sequence[float]) -> tuple[float, float, float]:
    """(exponent, prefactor, R²) of the least-squares line through the logarithms."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (rounds, unique))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    offset = y.mean() - slope * x.mean()
    rest = (y - offset - slope * x).square().sum() / (y - y.mean()).square().sum()
    return float(slope), float(offset.exp()), float(1 - rest)


def _between(at: float, rounds: Sequence[float], unique: Sequence[float]) -> float:
    """Unique ids at a number of rounds, interpolated on the log-log axes."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (rounds, unique))
    right = int(torch.searchsorted(x, math.log(at)).clamp(1, len(x) - 1))
    share = (math.log(at) - x[right - 1]) / (x[right] - x[right - 1])
    return float((y[right - 1] + share * (y[right] - y[right - 1])).exp())


def exponent_of(entropy: float, vocab_size: int) -> float:
    """The Zipf exponent with that entropy in nats, by bisection: entropy falls as the exponent grows."""
    low, high = 1.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        p = zipf(vocab_size, middle)
        low, high = (middle, high) if float(-(p * p.log()).sum()) > entropy else (low, middle)
    return (low + high) / 2


def plot(result: Result) -> Any:
    """Unique ids against rounds on log axes: the teacher with its fitted line, the Zipf law, the paper's point."""
    with plots.canvas(640, 380, left=54, right=20, bottom=46) as (figure, axes):
        plots.unique_ids_axes(axes, result.data)
        axes.plot(result.data["rounds"], result.data["zipf"], color=plots.PALETTE["extra-1"], linewidth=1.6)
        plots.legend(axes, [("teacher", "rs"), (f"Zipf law of {LM_ENTROPY} nats", "extra-1")], right=0.97, top=0.36)
        axes.plot(*PAPER, marker="o", markersize=9, color="none", markeredgecolor=plots.PALETTE["ink"])
        words = f"paper: {PAPER[1]} ids at {PAPER[0]} rounds"
        axes.annotate(words, PAPER, (10, -14), textcoords="offset points", color=plots.PALETTE["ink"])
    return figure


FIG_5 = Reproduction(
    title="Unique ids against rounds of sampling",
    source="fig. 5, app. C",
    claim="The number of unique tokens follows the number of sampling rounds in an approximate power law.",
    run=fig5,
    plot=plot,
    uses=USES,
)
