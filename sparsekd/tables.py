"""The paper's language-model tables, each a list of arms over one lab: tables 1, 2, 5, 9, 12.

A table names its arms (ways to train a student), the paper's numbers, and the claims to be judged; training and
keeping are the lab's. Every cell is a mean over seeds with its standard error; students of one seed are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsekd.lab import SETTINGS, Arm, Lab, Outcome
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, Settings, Table, exact, over
from sparsekd.zero_shot import ZERO_SHOT, ZERO_SHOT_SCALE, available, zero_shot_scores

CE = Arm(label="CE", train={"method": "ce"})
FULL = Arm(label="FullKD", train={"method": "full_kd"})
COLUMNS = (
    Column(name="ids per token", form=".1f"),
    Column(name="LM loss", unit="nats/token", form=".3f"),
    Column(name="CE to FullKD", unit="%", form=".0f"),
    Column(name="ECE", unit="%", form=".1f"),
    Column(name="acceptance", unit="%", form=".1f"),
)
Outcomes = Mapping[str, Outcome]
# What a claim may be about: unit, and evaluation.json -> value.
METRICS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "loss": ("nats", lambda e: float(e["loss"]["mean"])),
    "ece": ("points of ECE", lambda e: 100 * float(e["ece"])),
    "bits": ("bits per byte", lambda e: float(e["bits_per_byte"])),
}


def top(k: int, label: str | None = None, **train: Any) -> Arm:
    """Top-K with the paper's 17 + 7 bit code."""
    return Arm(label=label or f"Top-K {k}", sampler={"name": "top_k", "k": k}, codec="prob24", train=train)


def drawn(rounds: int, label: str | None = None, **train: Any) -> Arm:
    """Random sampling with so many rounds."""
    sampler = {"name": "random_sampling", "rounds": rounds}
    return Arm(label=label or f"Random sampling {rounds}", sampler=sampler, train=train)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """ "`better` ends below `worse` in held-out loss", or with `metric`, in another of `METRICS`."""

    better: str
    worse: str
    metric: str = "loss"


def lab_of(folder: Path, settings: Settings) -> Lab:
    """The one lab of a reproduction folder, shared by all its tables."""
    sizes = replace(SETTINGS[settings.profile], seeds=tuple(range(settings.seeds)))
    return Lab(folder.parent / "lab", sizes, rows=settings.rows, teacher=settings.teacher, say=settings.say)


def scale_of(lab: Lab, paper: str) -> str:
    """One sentence on the difference in scale."""
    s = lab.settings
    tokens = s.student_steps * s.batch_size * lab.seq_len()
    return (
        f"The paper: {paper}. Here: a student of {_words(s.student)} under a teacher of {_words(s.teacher)}, "
        f"{tokens / 1e6:.1f}M tokens of {lab.text()}, {len(s.seeds)} seed{'s' * (len(s.seeds) != 1)}."
    )


def _words(shape: Any) -> str:
    return f"{shape if isinstance(shape, str) else shape.get('family', 'tiny')} size"


def run_arms(lab: Lab, arms: Sequence[Arm]) -> dict[str, Outcome]:
    """Outcomes by label, CE and FullKD always among them."""
    wanted = {arm.label: arm for arm in (CE, *arms, FULL)}
    return {outcome.arm.label: outcome for outcome in lab.run(wanted.values())}


def table(outcomes: Outcomes, labels: Sequence[str]) -> Table:
    """One row for each label."""
    return Table(columns=COLUMNS, rows={label: cells(outcomes, label) for label in labels})


def cells(outcomes: Outcomes, label: str) -> tuple[Cell | str | None, ...]:
    """ids per token, loss, % of the gap, ECE, acceptance of one arm."""
    outcome = outcomes[label]
    if outcome.diverged():
        return (*exact(outcome.ids_per_token()), "diverged", None, None, None)
    ids = outcome.ids_per_token()
    return (
        None if ids is None else Cell(mean=ids),
        over(outcome.losses()),
        gap(outcomes, label),
        over([100 * e["ece"] for e in outcome.evaluations]),
        over([100 * e["acceptance"]["mean"] for e in outcome.evaluations]),
    )


def gap(outcomes: Outcomes, label: str) -> Cell | None:
    """% of the way from CE to FullKD, by seed and relative to the mean gap."""
    ce, full, own = (outcomes[name].losses() for name in ("CE", "FullKD", label))
    reach = sum(c - f for c, f in zip(ce, full, strict=True)) / len(ce)
    return over([100 * (c - x) / reach for c, x in zip(ce, own, strict=True)]) if reach > 0 else None


def judge(outcomes: Outcomes, claim: Claim) -> Finding:
    """Whether a claim holds beyond the 95 % interval of the paired differences over seeds; else says so."""
    a, b = outcomes[claim.better], outcomes[claim.worse]
    if a.diverged() or b.diverged():
        holds = b.diverged() and not a.diverged()
        return Finding(text=f"{claim.worse if b.diverged() else claim.better} diverged.", holds=holds)
    gains = [y - x for x, y in zip(_values(a, claim.metric), _values(b, claim.metric), strict=True)]
    return paired_finding(claim.better, claim.worse, gains, METRICS[claim.metric][0])


def paired_finding(
    better: str,
    worse: str,
    gains: Sequence[float],
    unit: str,
    words: tuple[str, str] = ("lower", "higher"),
    form: str = ".3f",
) -> Finding:
    """What may be said of one gain a seed; `words` are of a positive and of a negative one."""
    from sparsekd.comparison import t975

    found = over(gains)
    assert found is not None
    half = math.inf if found.standard_error is None else found.standard_error * t975(len(gains) - 1)
    sure = "beyond" if abs(found.mean) > half else "within"
    text = f"{better} against {worse}: {abs(found.mean):{form}} {unit} {words[found.mean <= 0]}, " + (
        f"{sure} the 95 % interval over seeds (±\u00a0{half:{form}})."
        if len(gains) > 1
        else "from one seed, which decides nothing."
    )
    return Finding(text=text, holds=None if sure == "within" else found.mean > 0)


def _values(outcome: Outcome, metric: str) -> list[float]:
    return [METRICS[metric][1](evaluation) for evaluation in outcome.evaluations]


def language_table(
    arms: Sequence[Arm],
    paper: Mapping[str, Sequence[float | None]],
    claims: Sequence[Claim],
    scale: str,
    zero_shot: Mapping[str, float] | None = None,
) -> Callable[[Path, Settings], Result]:
    """A reproduction's `run`: train the arms, lay them beside the paper's rows, judge the claims.

    `zero_shot`, the paper's scores by row, adds the column of our own zero-shot task where lm-eval is installed.
    """

    def run(folder: Path, settings: Settings) -> Result:
        lab = lab_of(folder, settings)
        outcomes = run_arms(lab, arms)
        labels = ["CE", *(arm.label for arm in arms if arm.label not in ("CE", "FullKD")), "FullKD"]
        ours = table(outcomes, labels)
        theirs = Table(columns=COLUMNS, rows={name: exact(*values) for name, values in paper.items()})
        asks = zero_shot is not None and available()
        if zero_shot and asks:
            ours = with_column(ours, ZERO_SHOT, zero_shot_scores(lab, [outcomes[label] for label in labels]))
            theirs = with_column(theirs, ZERO_SHOT, {k: Cell(mean=v) for k, v in zero_shot.items()})
        return Result(
            ours=ours,
            paper=theirs,
            scale=scale_of(lab, scale) + ZERO_SHOT_SCALE * asks,
            findings=tuple(judge(outcomes, claim) for claim in claims),
            data={
                "loss": {name: o.losses() for name, o in outcomes.items() if name in labels and not o.diverged()},
            },
        )

    return run


def with_column(base: Table, column: Column, cells: Mapping[str, Cell | None]) -> Table:
    """The table with one more column; rows without a cell have None there."""
    return Table(columns=(*base.columns, column), rows={k: (*row, cells.get(k)) for k, row in base.rows.items()})


SCALE_10B = "300M students, a 3B teacher, 10B tokens of web text, vocabulary 100k"

TOP_KS = (3, 5, 12, 25, 50, 100, 300)
TABLE1_ARMS = [
    *(top(k) for k in TOP_KS),
    Arm(label="Top-p 0.98, K=100", sampler={"name": "top_p", "p": 0.98, "k": 100}, codec="prob24"),
]
TABLE1_PAPER = {
    "CE": (None, 2.81, 0, 1.2, None),
    "Top-K 3": (3, 3.04, -395, 10.6, None),
    "Top-K 5": (5, 2.96, -253, 7.7, None),
    "Top-K 12": (12, 2.87, -99, 4.7, None),
    "Top-K 25": (25, 2.82, -21, 3.2, None),
    "Top-K 50": (50, 2.80, 5, 2.2, None),
    "Top-p 0.98, K=100": (50, 2.78, 47, 1.7, None),
    "Top-K 100": (100, 2.77, 55, 1.1, None),
    "Top-K 300": (300, 2.76, 77, 1.5, None),
    "FullKD": (None, 2.75, 100, 0.7, None),
}

FIXED_KS = (1, 5, 10, 20, 50, 100)
TABLE2_ARMS = [
    top(50),
    top(50, "Smoothing, Top-K 50", residual="smooth"),
    top(50, "Ghost token, Top-K 50", residual="ghost"),
    *(top(k, f"Naive fix, Top-K {k}", residual="label") for k in FIXED_KS),
]
TABLE2_PAPER = {
    "CE": (None, 2.81, 0, 1.2, None),
    "Top-K 50": (50, 2.80, None, None, None),
    "Smoothing, Top-K 50": (50, 2.85, -73, 0.4, None),
    "Ghost token, Top-K 50": (50, 2.77, 59, 0.4, None),
    "Naive fix, Top-K 1": (1, 2.81, -5, 7.1, None),
    "Naive fix, Top-K 5": (5, 2.78, 44, 4.4, None),
    "Naive fix, Top-K 10": (10, 2.77, 61, 3.3, None),
    "Naive fix, Top-K 20": (20, 2.76, 73, 2.3, None),
    "Naive fix, Top-K 50": (50, 2.76, 83, 1.3, None),
    "Naive fix, Top-K 100": (100, 2.75, 97, 1.2, None),
    "FullKD": (None, 2.74, 100, 0.7, None),
}

TABLE2_ZERO_SHOT = {"CE": 40.4, "Smoothing, Top-K 50": 41.2, "Ghost token, Top-K 50": 42.9, "FullKD": 42.1} | {
    f"Naive fix, Top-K {k}": value for k, value in zip(FIXED_KS, (41.3, 42.4, 42.4, 42.9, 42.8, 43.0), strict=True)
}

# Rounds that give about the paper's unique ids with a good teacher; ours spread more, and the column says how much.
TABLE5_ARMS = [drawn(n) for n in (3, 7, 50, 150, 500)]
TABLE5_PAPER = {
    "CE": (None, 2.81, None, 0.4, 59.95),
    "Random sampling 3": (2.4, 2.77, None, 1.0, 61.47),
    "Random sampling 7": (5.0, 2.75, None, 1.1, 61.83),
    "Random sampling 50": (12.1, 2.75, None, 0.8, 61.85),
    "Random sampling 150": (24.5, 2.75, None, 1.1, 61.93),
    "Random sampling 500": (57.0, 2.74, None, 0.9, 61.97),
    "FullKD": (None, 2.75, None, 0.7, 62.02),
}

TABLE5_ZERO_SHOT = {"CE": 40.4, "FullKD": 42.1} | {
    f"Random sampling {n}": value for n, value in zip((3, 7, 50, 150, 500), (42.1, 42.6, 43.0, 43.1, 42.9), strict=True)
}

GRID = [(alpha, ratio) for ratio in (1.0, 1.5, 2.0) for alpha in (0.3, 0.2, 0.1, 0.0)]
TABLE9_PAPER_GAPS = (101, 111, 95, 98, 124, 121, 120, 111, 116, 124, 125, 112)


def _grid_label(alpha: float, ratio: float) -> str:
    return f"α = {alpha}, LR ratio {ratio}"


def _grid_arm(alpha: float, ratio: float) -> Arm:
    train = {k: v for k, v in (("ce_weight", alpha), ("hard_ratio", ratio)) if v not in (0.0, 1.0)}
    return drawn(50, _grid_label(alpha, ratio), **train)


TABLE9_ARMS = [_grid_arm(*cell) for cell in GRID]
TABLE9_PAPER = {
    _grid_label(*cell): (12, None, value, None, None) for cell, value in zip(GRID, TABLE9_PAPER_GAPS, strict=True)
}


def _proposal(t: float) -> Arm:
    sampler = {"name": "random_sampling", "rounds": 50, "temperature": t}
    return Arm(label=f"t = {t}", sampler=sampler if t != 1 else {"name": "random_sampling", "rounds": 50})


TABLE10_ARMS = [_proposal(t) for t in (0.0, 0.8, 1.0, 1.2)]
TABLE10_PAPER = {
    "t = 0.0": (57, None, None, None, None),
    "t = 0.8": (57, 2.74, None, 0.7, 61.9),
    "t = 1.0": (54, 2.75, None, 0.8, 61.8),
    "t = 1.2": (57, 2.74, None, 0.8, 61.9),
}

_DIVERGENCES = {"l1": "L1", "mse": "MSE", "reverse_kl": "Reverse KL", "forward_reverse_kl": "Forward + reverse KL"}
TABLE12_ARMS = [
    Arm(label=label, train={"method": "full_kd", "divergence": name}) for name, label in _DIVERGENCES.items()
]
TABLE12_PAPER = {
    "CE": (None, 2.81, None, None, None),
    "L1": (None, None, None, None, None),
    "MSE": (None, 5.38, None, None, None),
    "Reverse KL": (None, 3.37, None, None, None),
    "Forward + reverse KL": (None, 2.78, None, None, None),
    "FullKD": (None, 2.75, None, None, None),
}

USES = ("seeds", "profile", "rows", "teacher")


def plot_losses(result: Result) -> Any:
    """Held-out loss by arm."""
    return plot_arms(result, "loss", paint, "held-out loss, nats per token")


def plot_arms(
    result: Result, measure: str, colour_of: Callable[[str], str], words: str, ceiling: str | None = None
) -> Any:
    """A measure by arm: the mean over seeds (diamond) and each seed (dots), in the table's order; a line at one arm."""
    from sparsekd import plots

    found = {name: values for name in result.ours.rows if (values := result.data[measure].get(name))}
    with plots.canvas(860, 64 + 27 * len(found), left=240, right=24, bottom=46) as (figure, axes):
        for row, (name, values) in enumerate(found.items()):
            colour = plots.PALETTE[colour_of(name)]
            axes.plot(values, [row] * len(values), "o", markersize=4, color=colour, alpha=0.4)
            axes.plot([sum(values) / len(values)], [row], "D", markersize=7, color=colour)
        if ceiling in found:
            at = sum(found[ceiling]) / len(found[ceiling])
            axes.axvline(at, color=plots.PALETTE["muted"], linewidth=1, linestyle="--")
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.4, -0.6)
        plots.axis_names(axes, f"{words} (diamond: mean over seeds)", "")
        return figure


def paint(name: str) -> str:
    """The palette's name for a method: each kind has one colour on all figures."""
    fixed = {"CE": "ce", "FullKD": "full-kd"}
    return fixed.get(name) or ("topk" if name.startswith(("Top", "Naive", "Ghost", "Smooth")) else "rs")


TABLES: dict[str, Reproduction] = {
    "table1": Reproduction(
        title="Vanilla top-k distillation",
        source="table 1, section 2.1",
        claim="Top-K lags behind FullKD, below 25 ids it is worse than no distillation, and its calibration suffers.",
        run=language_table(
            TABLE1_ARMS,
            TABLE1_PAPER,
            [
                Claim(better="CE", worse="Top-K 12"),
                Claim(better="Top-K 12", worse="Top-K 3"),
                Claim(better="Top-K 300", worse="Top-K 50"),
                Claim(better="FullKD", worse="CE"),
                Claim(better="CE", worse="Top-K 12", metric="ece"),
            ],
            SCALE_10B,
        ),
        plot=plot_losses,
        uses=USES,
    ),
    "table2": Reproduction(
        title="Fixes for the missing mass",
        source="table 2, sections 3.1 to 3.3",
        claim="Smoothing mends calibration, not the loss; ghost token and naive fix help both; none equals FullKD.",
        run=language_table(
            TABLE2_ARMS,
            TABLE2_PAPER,
            [
                Claim(better="Ghost token, Top-K 50", worse="Top-K 50"),
                Claim(better="Naive fix, Top-K 50", worse="Top-K 50"),
                Claim(better="Top-K 50", worse="Smoothing, Top-K 50"),
                Claim(better="FullKD", worse="Ghost token, Top-K 50"),
                Claim(better="Ghost token, Top-K 50", worse="Top-K 50", metric="ece"),
            ],
            SCALE_10B,
            TABLE2_ZERO_SHOT,
        ),
        plot=plot_losses,
        uses=USES,
    ),
    "table5": Reproduction(
        title="Random sampling against its number of ids",
        source="table 5, section 5.1",
        claim="A dozen ids a token are enough: loss, calibration and acceptance of FullKD.",
        run=language_table(
            TABLE5_ARMS,
            TABLE5_PAPER,
            [
                Claim(better="Random sampling 50", worse="CE"),
                Claim(better="Random sampling 50", worse="Random sampling 3"),
                Claim(better="FullKD", worse="Random sampling 50"),
            ],
            SCALE_10B,
            TABLE5_ZERO_SHOT,
        ),
        plot=plot_losses,
        uses=USES,
    ),
    "table9": Reproduction(
        title="Cross-entropy weight and easy / hard tokens",
        source="table 9, section 5.3",
        claim="A little cross-entropy and a higher rate for hard tokens take random sampling past FullKD.",
        run=language_table(
            TABLE9_ARMS,
            TABLE9_PAPER,
            [
                Claim(better=_grid_label(0.1, 1.0), worse=_grid_label(0.0, 1.0)),
                Claim(better=_grid_label(0.0, 2.0), worse=_grid_label(0.0, 1.0)),
                Claim(better=_grid_label(0.1, 2.0), worse="FullKD"),
            ],
            "300M students, an 8B teacher, 10B tokens",
        ),
        plot=plot_losses,
        uses=USES,
    ),
    "table12": Reproduction(
        title="Divergences",
        source="table 12, section 6.3",
        claim="Forward KL is the best objective; L1 diverges, MSE and reverse KL fail.",
        run=language_table(
            TABLE12_ARMS,
            TABLE12_PAPER,
            [Claim(better="FullKD", worse=label) for label in _DIVERGENCES.values()],
            "300M students, an 8B teacher, 10B tokens",
        ),
        plot=plot_losses,
        uses=USES,
    ),
}
