"""Figure 3: reliability of students (3a), and their calibration error by the number of ids they learn from (3b).

All students are those of tables 1, 2 and 5; one lab trains each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsekd.lab import Outcome
from sparsekd.reproduction import Cell, Finding, Reproduction, Result, Settings, Table, exact
from sparsekd.tables import (
    COLUMNS,
    SCALE_10B,
    TABLE5_ARMS,
    TOP_KS,
    USES,
    Claim,
    Outcomes,
    drawn,
    judge,
    lab_of,
    paint,
    run_arms,
    scale_of,
    table,
    top,
)

GHOST = "Ghost, Top-K 50"
FIG3A_ARMS = [top(12), top(50), top(50, GHOST, residual="ghost"), drawn(50)]
FIG3B_ARMS = {"Top-K": [top(k) for k in TOP_KS], "Random sampling": TABLE5_ARMS}
# From tables 1, 2 and 5; figure 3b is printed without numbers.
FIG3_PAPER = {
    "CE": (None, 2.81, None, 1.2, None),
    "Top-K 3": (3, 3.04, None, 10.6, None),
    "Top-K 5": (5, 2.96, None, 7.7, None),
    "Top-K 12": (12, 2.87, None, 4.7, None),
    "Top-K 25": (25, 2.82, None, 3.2, None),
    "Top-K 50": (50, 2.80, None, 2.2, None),
    "Top-K 100": (100, 2.77, None, 1.1, None),
    "Top-K 300": (300, 2.76, None, 1.5, None),
    GHOST: (50, 2.77, None, 0.4, None),
    "Random sampling 3": (2.4, 2.77, None, 1.0, None),
    "Random sampling 7": (5.0, 2.75, None, 1.1, None),
    "Random sampling 50": (12.1, 2.75, None, 0.8, None),
    "Random sampling 150": (24.5, 2.75, None, 1.1, None),
    "Random sampling 500": (57.0, 2.74, None, 0.9, None),
    "FullKD": (None, 2.75, None, 0.7, None),
}
CLAIMS = (
    Claim(better="Random sampling 50", worse="Top-K 12", metric="ece"),
    Claim(better="Random sampling 50", worse="Top-K 50", metric="ece"),
    Claim(better="Top-K 50", worse="Top-K 12", metric="ece"),
)


def fig3(folder: Path, settings: Settings) -> Result:
    """Reliability bins of a few students, and ECE against ids per token of all top-k and random-sampling ones."""
    lab = lab_of(folder, settings)
    outcomes = run_arms(lab, [*FIG3A_ARMS, *(arm for arms in FIG3B_ARMS.values() for arm in arms)])
    lines = {kind: [_point(outcomes[arm.label]) for arm in arms] for kind, arms in FIG3B_ARMS.items()}
    return Result(
        ours=table(outcomes, list(FIG3_PAPER)),
        paper=Table(columns=COLUMNS, rows={name: exact(*values) for name, values in FIG3_PAPER.items()}),
        scale=scale_of(lab, SCALE_10B),
        findings=(*(judge(outcomes, claim) for claim in CLAIMS), _steadiness(lines)),
        data={
            "reliability": _reliability(outcomes, ["CE", *(arm.label for arm in FIG3A_ARMS), "FullKD"]),
            "lines": lines,
            "levels": {name: _eces(outcomes[name]) for name in ("CE", "FullKD")},
        },
    )


def _point(outcome: Outcome) -> dict[str, Any]:
    return {"ids": outcome.ids_per_token(), "ece": _eces(outcome)}


def _eces(outcome: Outcome) -> list[float]:
    """Calibration error in % by seed."""
    return [100 * e["ece"] for e in outcome.evaluations]


def _steadiness(lines: dict[str, list[dict[str, Any]]]) -> Finding:
    """Figure 3b's claim: fewer ids hurt top-k's calibration and not random sampling's."""
    ranges = {}
    for kind, points in lines.items():
        means = [_mean(point["ece"]) for point in points]
        ranges[kind] = max(means) - min(means)
    ids = [point["ids"] for point in lines["Random sampling"]]
    return Finding(
        text=f"From {max(ids):.0f} ids a token down to {min(ids):.1f}, random sampling's ECE moves within "
        f"{ranges['Random sampling']:.1f} points; top-k's moves by {ranges['Top-K']:.1f} over its budgets.",
        holds=ranges["Random sampling"] < ranges["Top-K"] / 3,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _reliability(outcomes: Outcomes, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    return {name: pooled_bins(outcomes[name].evaluations) for name in names if not outcomes[name].diverged()}


def pooled_bins(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reliability bins of several evaluations as one: counts add up, means are weighted by them."""
    pooled = []
    for bins in zip(*(e["reliability"] for e in evaluations), strict=True):
        count = sum(b["count"] for b in bins)
        sums = {k: sum(b["count"] * b[k] for b in bins if b["count"]) for k in ("confidence", "accuracy")}
        pooled.append({"count": count, **{k: v / count if count else None for k, v in sums.items()}})
    return pooled


# -- the figure, in pixels

_SIDE, _SPACE, _LEFT, _TOP, _BOTTOM, _LOWER = 128, 22, 50, 34, 46, 250


def plot(result: Result) -> Any:
    """Above: reliability diagrams, bins pooled over seeds. Below: ECE against ids per token, each seed a dot."""
    from sparsekd import plots

    names = [name for name in result.ours.rows if name in result.data["reliability"]]
    width = _LEFT + len(names) * (_SIDE + _SPACE)
    height = _TOP + _SIDE + 2 * _BOTTOM + 28 + _LOWER
    with plots.canvas(width, height, left=_LEFT, right=_SPACE, bottom=_BOTTOM, top=height - _LOWER - _BOTTOM) as (
        figure,
        axes,
    ):
        _ece_axes(axes, result)
        base = height - _TOP - _SIDE
        for index, name in enumerate(names):
            place = (_LEFT + index * (_SIDE + _SPACE)) / width, base / height, _SIDE / width, _SIDE / height
            _diagram(figure.add_axes(place), name, result, first=index == 0)
        return figure


def _diagram(axes: Any, name: str, result: Result, *, first: bool) -> None:
    from sparsekd import plots

    colour = plots.PALETTE[paint(name)]
    plots.reliability_axes(axes, result.data["reliability"][name], colour)
    axes.text(0, 1.07, name, transform=axes.transAxes, color=colour, fontweight="bold", fontsize=10)
    ece = result.ours.rows[name][3]
    if isinstance(ece, Cell):
        axes.text(0.06, 0.88, f"ECE {ece.mean:.1f} %", color=plots.PALETTE["ink"], fontsize=10)
    plots.axis_names(axes, "confidence", "accuracy" if first else "")


def _ece_axes(axes: Any, result: Result) -> None:
    from sparsekd import plots

    axes.set_xscale("log")
    for kind, points in result.data["lines"].items():
        colour = plots.PALETTE[paint(kind)]
        ids, means = [p["ids"] for p in points], [_mean(p["ece"]) for p in points]
        axes.plot(ids, means, color=colour, linewidth=2, marker="D", markersize=6)
        for point in points:
            axes.plot([point["ids"]] * len(point["ece"]), point["ece"], "o", markersize=3.5, color=colour, alpha=0.4)
    for name, values in result.data["levels"].items():
        axes.axhline(_mean(values), color=plots.PALETTE[paint(name)], linewidth=1.4, linestyle=(0, (5, 4)))
    plots.legend(axes, [(name, paint(name)) for name in ("Top-K", "Random sampling", "CE", "FullKD")], right=1, top=1)
    axes.set_xticks([3, 10, 30, 100, 300])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    plots.axis_names(axes, "ids per token (log scale)", "calibration error, %")


FIG_3 = Reproduction(
    title="Calibration of language models",
    source="figs. 3a and 3b, section 4.1",
    claim="Top-K students are over-confident, more so with fewer ids; random sampling is calibrated like FullKD, "
    "whatever its number of ids.",
    run=fig3,
    plot=plot,
    uses=USES,
)
