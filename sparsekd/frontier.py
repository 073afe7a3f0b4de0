"""What a byte buys: students against the size of their cache, for each way to sample (beyond the paper).

Top-k and random sampling are stored as the paper does, 24 bits a label; systematic sampling by codec `split`. The
paper's draws are priced with `split` too, so that what the estimator and what the codec brings can be told apart.

A seed is one student's weights and order, and the draws of its caches: an error over seeds holds all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsekd.cache import CacheReader, RowRecord
from sparsekd.codec import codec_spec
from sparsekd.folder import coded_bytes
from sparsekd.lab import SETTINGS, Arm, Lab
from sparsekd.measures import gradients_by_seed
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, Settings, Table, over
from sparsekd.tables import CE, FULL, USES, Claim, Outcomes, cells, drawn, judge, lab_of, run_arms, scale_of, top

LEAST_SEEDS = 5
# Longer training than the other tables': the gap from CE to FullKD must stand well above the noise between seeds.
SIZES = {"quick": (2400, 300), "full": (9600, 1200)}  # rows, steps
COLUMNS = (
    Column(name="bytes per token", form=".1f"),
    Column(name="by codec split", form=".1f"),
    Column(name="ids per token", form=".1f"),
    Column(name="LM loss", unit="nats/token", form=".3f"),
    Column(name="CE to FullKD", unit="%", form=".0f"),
    Column(name="ECE", unit="%", form=".1f"),
    Column(name="acceptance", unit="%", form=".1f"),
    Column(name="gradient angle", unit="degrees", form=".1f"),
)
# A method's arms, in the order of their size: one line of the plot each.
LINES: dict[str, tuple[Arm, ...]] = {
    "Top-K": tuple(top(k) for k in (12, 50, 300)),
    "Random sampling": tuple(replace(drawn(n), redrawn=True) for n in (6, 12, 50)),
    "Systematic": tuple(
        Arm(label=f"Systematic {n}", sampler={"name": "systematic", "rounds": n}, codec="split", redrawn=True)
        for n in (6, 12, 30, 50)
    ),
}
ARMS = tuple(arm for arms in LINES.values() for arm in arms)
CLAIMS = (
    *(Claim(better=f"Systematic {n}", worse=f"Random sampling {n}") for n in (6, 12, 50)),
    Claim(better="Systematic 30", worse="Random sampling 50"),
    Claim(better="Systematic 6", worse="Top-K 50"),
)
_CELL = Mapping[str, Cell | None]


def frontier(folder: Path, settings: Settings) -> Result:
    """Train every arm at five seeds or more, weigh its cache and measure its gradient."""
    lab = _lab(folder, settings)
    outcomes = run_arms(lab, ARMS)
    angles = _angles(lab)
    sizes = {arm.label: _bytes_per_token(lab, arm, _stored(arm)) for arm in ARMS}
    split = {arm.label: _bytes_per_token(lab, arm, "split") for arm in ARMS if "rounds" in (arm.sampler or {})}
    labels = [CE.label, *sizes, FULL.label]
    rows = {name: (_size(sizes, name), _size(split, name), *cells(outcomes, name), angles.get(name)) for name in labels}
    return Result(
        ours=Table(columns=COLUMNS, rows=rows),
        scale=scale_of(lab, "top-k and random sampling only, of 300M students")
        + " A seed is the student's weights, the order of its rows and the draws of its caches.",
        findings=(_noise(outcomes), *(judge(outcomes, claim) for claim in CLAIMS), _fewest(sizes, angles)),
        data={
            "bytes": sizes,
            "split": split,
            "gap": {name: _mean(row[4]) for name, row in rows.items()},
            "gap_error": {name: _error(row[4]) for name, row in rows.items()},
            "angle": {name: _mean(cell) for name, cell in angles.items()},
            "loss": {name: outcome.losses() for name, outcome in outcomes.items()},
        },
    )


def _lab(folder: Path, settings: Settings) -> Lab:
    """A lab of its own for longer training, over the rows and the teacher of the other tables."""
    shared = lab_of(folder, settings)
    seeds = tuple(range(max(settings.seeds, LEAST_SEEDS)))
    rows, steps = SIZES[settings.profile]
    sizes = replace(SETTINGS[settings.profile], seeds=seeds, student_rows=rows, student_steps=steps)
    return Lab(folder.parent / "frontier-lab", sizes, rows=shared.rows(), teacher=shared.teacher(), say=settings.say)


def _angles(lab: Lab) -> dict[str, Cell | None]:
    """Degrees between each arm's gradient and FullKD's, of the FullKD student of each seed."""
    methods = {}
    for arm in ARMS:
        parameters = dict(arm.sampler or {})
        methods[arm.label] = (parameters.pop("name"), parameters)
    found = gradients_by_seed(lab, methods)
    return {name: over([one[name]["angle"] for one in found]) for name in methods}


def _stored(arm: Arm) -> str:
    return arm.codec or "raw24"


def _bytes_per_token(lab: Lab, arm: Arm, codec: str) -> float:
    """Of a shard's rows, input ids and targets, when the arm's targets are stored by that codec."""
    with CacheReader(lab.cache(arm)) as reader:
        rounds = reader.spec.codec.get("rounds")
        records = [_record(reader, row) for row in range(min(len(reader), 512))]
        spec = codec_spec(codec, logit_width=reader.spec.logit_width, rounds=rounds)
        return coded_bytes(records, reader.spec, spec) / (len(records) * reader.spec.seq_len)


def _record(reader: CacheReader, row: int) -> RowRecord:
    found = reader[row]
    return RowRecord(
        input_ids=found.input_ids, targets=reader.flat(row), starts=found.starts, supervised=found.supervised
    )


def _size(sizes: Mapping[str, float], name: str) -> Cell | None:
    return Cell(mean=sizes[name]) if name in sizes else None


def _mean(cell: Cell | str | None) -> float | None:
    return cell.mean if isinstance(cell, Cell) else None


def _error(cell: Cell | str | None) -> float | None:
    return cell.standard_error if isinstance(cell, Cell) else None


def _noise(outcomes: Outcomes) -> Finding:
    """Whether a paired difference between two good caches is known to a tenth of the gap."""
    ce, full = outcomes[CE.label].losses(), outcomes[FULL.label].losses()
    reach = sum(c - f for c, f in zip(ce, full, strict=True)) / len(ce)
    pairs = zip(outcomes["Systematic 50"].losses(), outcomes["Random sampling 50"].losses(), strict=True)
    error = _error(over([a - b for a, b in pairs])) or 0.0
    return Finding(
        text=f"The gap from CE to FullKD is {reach:.3f} nats; a paired difference between two caches has a standard "
        f"error of {error:.3f}, {error / reach:.0%} of it. Differences of less than twice that are not told apart.",
        holds=error < reach / 10,
    )


def _fewest(sizes: Mapping[str, float], angles: _CELL) -> Finding:
    """The smallest systematic cache whose gradient is at least as near as the paper's 50 draws."""
    paper, wanted = sizes["Random sampling 50"], _mean(angles["Random sampling 50"]) or 0.0
    enough = [arm.label for arm in LINES["Systematic"] if (_mean(angles[arm.label]) or 90.0) <= wanted]
    if not enough:
        return Finding(text="No systematic cache reaches the gradient of 50 random draws.", holds=False)
    best = min(enough, key=lambda name: sizes[name])
    return Finding(
        text=f"{best} by split is at {_mean(angles[best]):.2f} degrees, the paper's 50 draws at {wanted:.2f}, "
        f"with {sizes[best]:.1f} bytes a token against {paper:.1f}: {sizes[best] / paper:.2f}×.",
        holds=sizes[best] < paper,
    )


def plot_frontier(result: Result) -> Any:
    """Share of the gap closed (above) and the gradient's angle (below) against bytes per token."""
    from sparsekd import plots

    data, paint = result.data, {"Top-K": "topk", "Random sampling": "rs", "Systematic": "extra-1"}
    with plots.canvas(820, 640, left=76, right=24, bottom=356, top=20) as (figure, upper):
        lower = figure.add_axes((76 / 820, 56 / 640, 720 / 820, 260 / 640))
        for line, arms in LINES.items():
            names = [arm.label for arm in arms if data["gap"].get(arm.label) is not None]
            x, colour = [data["bytes"][name] for name in names], plots.PALETTE[paint[line]]
            gaps, errors = [data["gap"][name] for name in names], [data["gap_error"][name] or 0 for name in names]
            upper.errorbar(x, gaps, yerr=errors, fmt="o-", color=colour, markersize=6, capsize=3)
            lower.plot(x, [data["angle"][name] for name in names], "o-", color=colour, markersize=6, label=line)
            for name, at, angle in zip(names, x, (data["angle"][name] for name in names), strict=True):
                size = name.rsplit(" ", 1)[1]
                aside = (-16, -12) if line == "Systematic" else (4, 6)
                lower.annotate(size, (at, angle), aside, textcoords="offset points", color=colour, fontsize=10.5)
        upper.axhline(100, color=plots.PALETTE["muted"], linewidth=1, linestyle="--")
        upper.set_ylim(bottom=max(-150, min(v for v in data["gap"].values() if v is not None)) - 10)
        names = [arm.label for arm in LINES["Random sampling"] if arm.label in data["split"]]
        x, dashed = [data["split"][name] for name in names], {"color": plots.PALETTE["rs"], "linestyle": "--"}
        upper.plot(x, [data["gap"][name] for name in names], linewidth=1, **dashed)
        lower.plot(x, [data["angle"][name] for name in names], linewidth=1, label="Random sampling by split", **dashed)
        plots.log_axes(lower)
        upper.set_xscale("log")
        upper.set_xlim(lower.get_xlim())
        upper.set_xticks(lower.get_xticks(), [])
        upper.set_xticks([], minor=True)
        lower.legend(frameon=False, loc="center right")
        plots.axis_names(upper, "", "gap from CE to FullKD closed, %")
        plots.axis_names(lower, "bytes per token, input ids included", "gradient angle, degrees")
        return figure


FRONTIER = Reproduction(
    title="What a byte buys",
    source="beyond the paper: without replacement, entropy coded",
    claim="The poster asks for better sampling: the same gradient from a fraction of the bytes.",
    run=frontier,
    plot=plot_frontier,
    uses=USES,
)
