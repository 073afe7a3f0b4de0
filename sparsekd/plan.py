"""Plan: the teacher reads a few thousand tokens, and a table says what each sampler would keep, cost and err.

Squared errors, ids and angles are expectations in closed form (variance.py); bytes are those of targets drawn and coded
as shards of the whole cache would hold them, input ids and index included. Nothing is trained.

A recipe for the choice is written beside the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsekd import models, plots
from sparsekd.checks import check_at_least, check_seed, make_folder
from sparsekd.drawing import default_shard_rows
from sparsekd.errors import RecipeError
from sparsekd.files import write_json
from sparsekd.packed import RowsReader
from sparsekd.plan_measures import Reading, Tally, bytes_by_codec, expected_angle, position_angles, read_batch, unbiased

# The paper's setting: 50 draws with replacement, 24 bits an id.
PAPER = {"name": "random_sampling", "rounds": 50}
ROUNDS = (8, 12, 16, 20, 25, 30, 40, 50, 64, 100)
TOP_KS = (12, 50, 300)
# The nearer a student is to its teacher, the smaller is the full gradient and the larger every angle.
_STAND_IN = "a student that knows only the frequencies of tokens (a trained one's angles are larger: student=MODEL)"
_ROWS_AT_ONCE = 4


def plan(
    *,
    rows: str | Path,
    teacher: str,
    out: str | Path,
    tokens: float | None = None,
    fidelity: str | None = None,
    angle: float | None = None,
    budget_gb: float | None = None,
    sample_tokens: int = 4096,
    batch_tokens: int | None = None,
    student: str | None = None,
    split: str = "train",
    rounds: list[int] | None = None,
    top_k: list[int] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    plot: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """What each sampler would cost and err on these rows under this teacher, and the cheapest that will do.

    Args:
        rows: a folder of packed rows.
        teacher: a local path or hub id of a causal language model.
        out: the folder that takes plan.json, capture.yaml (the recipe of the choice) and plan.png.
        tokens: of the whole cache, for the column GB; default: those of the rows' split.
        fidelity: paper: unbiased, with a squared error E‖t̂ - p‖² no larger than 50 draws with replacement (default).
        angle: instead: at most so many degrees between the expected and the full gradient (see batch_tokens).
        budget_gb: instead: the smallest angle that fits so many gigabytes.
        sample_tokens: how many tokens the teacher reads. Bytes of split are right to 2 % from a quarter of the
            vocabulary's size on (32768 for 128k ids), a few percent too high below.
        batch_tokens: the batch that the angle is of; default: the tokens that the teacher reads. The noise of draws
            falls with the square root of the batch, a biased sampler's error does not.
        student: a model whose head's gradient the angle is of; default: a stand-in that knows only the frequencies of
            tokens, on the teacher's last hidden states. With one the plan also says what keeping half of the positions
            (`capture positions=0.5`) would make of the choice's angle.
        split: of the rows.
        rounds: of random_sampling and systematic to compare; default 8 to 100.
        top_k: of top_k to compare; default 12, 50, 300.
        seed: of the rows that are read and of the draws.
        dtype: of the models; default float32 on a CPU, bfloat16 on an accelerator.
        device: "cpu", "cuda" or "cuda:N"; default: the accelerator where there is one.
        plot: draw fidelity against bytes (needs matplotlib).
        progress: called with (rows done, rows).

    Returns:
        What plan.json holds: the teacher's mean entropy, one entry per sampler, and which of them was chosen.

    Raises:
        RecipeError: more than one goal, or a goal that nothing on the list meets.
        MismatchError: a teacher or student that does not read these rows.
    """
    wanted = _goal(fidelity, angle, budget_gb)
    if plot and not plots.available():
        raise RecipeError("plot=true needs matplotlib: pip install 'sparsekd[report]', or leave plot out")
    check_at_least(1, sample_tokens=sample_tokens, batch_tokens=batch_tokens)
    check_seed(seed)
    device = models.check_device(device)
    reader = RowsReader(rows, split)
    chosen = _some_rows(reader, sample_tokens, seed)
    read = Reading(reader, teacher, student, dtype or ("float32" if device == "cpu" else "bfloat16"), device)
    tallies = [Tally(sampler=each) for each in candidates(rounds or ROUNDS, top_k or TOP_KS)]
    for tally in tallies:
        read.measure_gradient_of(tally)
    for start in range(0, len(chosen), _ROWS_AT_ONCE):
        read_batch(read, chosen[start : start + _ROWS_AT_ONCE], tallies, seed)
        if progress:
            progress(min(start + _ROWS_AT_ONCE, len(chosen)), len(chosen))
    total = int(tokens or len(reader) * reader.seq_len)
    batch = batch_tokens or len(chosen) * reader.seq_len
    sampled = len(chosen) * reader.seq_len
    paper = next(tally.error for tally in tallies if tally.sampler == PAPER)
    options = [_entry(tally, read, paper, tokens=total, sampled=sampled, batch=batch) for tally in tallies]
    best = choose(options, wanted)
    result = {
        "teacher": teacher,
        "rows": str(rows),
        "vocabulary": read.width,
        "entropy": float(torch.cat(read.entropies).mean()),
        "sampled_tokens": sampled,
        "teacher_seconds": read.seconds,
        "batch_tokens": batch,
        "tokens": total,
        "goal": wanted,
        "student": student,
        "options": options,
        "chosen": best,
        "half_the_positions": position_angles(tallies[best], read, batch / sampled),
        "recipe": str(Path(out) / "capture.yaml"),
    }
    _write(Path(out), result, split, plot)
    return result


def candidates(rounds: Sequence[int], top_ks: Sequence[int]) -> list[dict[str, Any]]:
    """The samplers to compare; the paper's always among them."""
    drawn = [{"name": "random_sampling", "rounds": n} for n in sorted({*rounds, PAPER["rounds"]})]  # type: ignore[type-var]
    even = [{"name": "systematic", "rounds": n} for n in sorted(set(rounds))]
    return [*drawn, *even, *({"name": "top_k", "k": k} for k in sorted(set(top_ks)))]


def choose(options: Sequence[Mapping[str, Any]], goal: Mapping[str, Any]) -> int:
    """The number of the cheapest option that meets the goal, or of the best that a budget buys."""
    (kind, value), *_ = goal.items()
    meets: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "fidelity": lambda o: o["unbiased"] and o["error_over_paper"] <= 1,
        "angle": lambda o: o["angle"] is not None and o["angle"] <= value,
        "budget_gb": lambda o: o["gigabytes"] <= value,
    }
    fits = [number for number, option in enumerate(options) if meets[kind](option)]
    if not fits:
        raise RecipeError(f"no sampler on the list meets {kind}={value:g}; {_nearest(options, kind)}")
    order = ("angle", "squared_error", "bytes") if kind == "budget_gb" else ("bytes", "squared_error", "angle")
    return min(fits, key=lambda i: tuple(options[i][name] or 0 for name in order))


def _nearest(options: Sequence[Mapping[str, Any]], kind: str) -> str:
    if kind == "budget_gb":
        least = min(options, key=lambda o: o["gigabytes"])
        return f"{label(least['sampler'])} takes {least['gigabytes']:.3g} GB; plan fewer tokens or fewer rounds=[...]"
    angles = [o for o in options if o["angle"] is not None]
    if not angles:
        return "this teacher's head is unknown, so there are no angles; take fidelity=paper"
    least = min(angles, key=lambda o: o["angle"])
    return f"{label(least['sampler'])} comes to {least['angle']:.2f} degrees; try more rounds=[...]"


def label(sampler: Mapping[str, Any]) -> str:
    """`systematic 25`, `top_k 12`."""
    return " ".join(str(value) for value in sampler.values())


# The table's columns: codecs of one width stand in one, counts and probabilities never in the same line.
_COLUMNS = {
    "24 bits": ("raw24", "paper24", "prob24"),
    "40 bits": ("raw40", "prob40"),
    "split": ("split", "split_prob"),
}


def plan_text(result: Mapping[str, Any]) -> str:
    """The table that the verb prints; the choice is marked."""
    head = ["", "ids", *_COLUMNS, "GB", "sq. error", "angle", "cost"]
    lines = [
        f"entropy {result['entropy']:.2f} nats, V = {result['vocabulary']:,}, {result['sampled_tokens']:,} tokens read",
        "codecs in bytes per token, input ids included: " + ", ".join("/".join(codecs) for codecs in _COLUMNS.values()),
        f"GB: of {result['tokens']:,} tokens, by the smallest codec; sq. error: over that of the paper's 50 draws",
        f"angle: degrees from the full gradient in the head, in a batch of {result['batch_tokens']:,} tokens, of",
        f"  {result['student'] or _STAND_IN};",
        "  below the head, angles of systematic draws are up to a seventh less, by the order of its rows",
        f"cost: drawing, over the teacher's own pass, which one process like this one does in {_duration(result)}",
        "",
    ]
    table = [head]
    for number, option in enumerate(result["options"]):
        found = option["bytes_by_codec"]
        sizes = [next((found[name] for name in codecs if name in found), None) for codecs in _COLUMNS.values()]
        mark = "→ " if number == result["chosen"] else "  "
        table.append(
            [
                mark + label(option["sampler"]),
                f"{option['ids']:.1f}",
                *("–" if size is None else f"{size:.1f}" for size in sizes),
                f"{option['gigabytes']:.3g}",
                f"{option['error_over_paper']:.3f}" + ("" if option["unbiased"] else " biased"),
                "–" if option["angle"] is None else f"{option['angle']:.2f}",
                f"{option['cost']:.1%}",
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    if result.get("half_the_positions"):
        angles = ", ".join(f"{angle:.2f} by {by}" for by, angle in result["half_the_positions"].items())
        lines += ["", f"the choice at half the positions, so half the bytes (positions=0.5): {angles} degrees"]
    return "\n".join(lines)


def _duration(result: Mapping[str, Any]) -> str:
    """`12.0 hours (23,148 tokens/s)`: the teacher's pass over all tokens, at the pace of those that it read here."""
    pace = result["sampled_tokens"] / result["teacher_seconds"]
    seconds = result["tokens"] / pace
    size, unit = (3600, "hours") if seconds >= 3600 else (60, "minutes")
    return f"{seconds / size:,.1f} {unit} ({pace:,.0f} tokens/s)"


def _entry(tally: Tally, read: Reading, paper: float, *, tokens: int, sampled: int, batch: int) -> dict[str, Any]:
    """One line of the plan."""
    length = read.reader.seq_len
    sizes = bytes_by_codec(tally, read, default_shard_rows(-(-tokens // length), length))
    codec = min(sizes, key=lambda name: sizes[name])
    return {
        "sampler": tally.sampler,
        "unbiased": unbiased(tally.sampler),
        "ids": tally.ids / read.positions,
        "bytes_by_codec": sizes,
        "codec": codec,
        "bytes": sizes[codec],
        "gigabytes": sizes[codec] * tokens / 1e9,
        "squared_error": tally.error / read.positions,
        "squared_bias": tally.bias / read.positions,
        "error_over_paper": tally.error / paper if paper else 0.0,
        "angle": expected_angle(tally, read, batch / sampled),
        "cost": tally.seconds / read.seconds,
    }


def _goal(fidelity: str | None, angle: float | None, budget_gb: float | None) -> dict[str, Any]:
    """The one goal that was given; the paper's fidelity when none was."""
    given = {"fidelity": fidelity, "angle": angle, "budget_gb": budget_gb}
    goal = {name: value for name, value in given.items() if value is not None} or {"fidelity": "paper"}
    if len(goal) > 1:
        raise RecipeError(f"{' and '.join(goal)} are two goals; give one")
    (name, value), *_ = goal.items()
    if name == "fidelity" and value != "paper":
        raise RecipeError(f"fidelity={value!r} is unknown; there is fidelity=paper, or give angle=2 or budget_gb=500")
    if not isinstance(value, str) and not value > 0:
        raise RecipeError(f"{name}={value!r} must be above 0")
    return goal


def _some_rows(reader: RowsReader, tokens: int, seed: int) -> list[int]:
    """Rows of about so many tokens, drawn evenly from the whole split."""
    count = min(len(reader), max(1, -(-tokens // reader.seq_len)))
    return sorted(int(row) for row in np.random.default_rng(seed).choice(len(reader), count, replace=False))


# --- writing --------------------------------------------------------------------------------------------


def _write(out: Path, result: dict[str, Any], split: str, plot: bool) -> None:
    import yaml

    make_folder(out)
    best = result["options"][result["chosen"]]
    recipe = {
        "rows": result["rows"],
        "split": split,
        "teacher": result["teacher"],
        "sampler": best["sampler"],
        "codec": best["codec"],
        "out": "cache",
    }
    note = (
        f"# {best['bytes']:.1f} bytes per token, squared error {best['error_over_paper']:.2f} of the paper's setting\n"
    )
    (out / "capture.yaml").write_text(note + yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    if plot:
        plan_figure(result).savefig(out / "plan.png", dpi=144)
    write_json(out / "plan.json", result)


def plan_figure(result: Mapping[str, Any]) -> Any:
    """Angle against bytes per token, a line for each sampler."""
    paint = {"random_sampling": "rs", "systematic": "extra-1", "top_k": "topk"}
    value = "angle" if result["options"][0]["angle"] is not None else "squared_error"
    with plots.canvas(760, 360, left=64, right=24, bottom=46, top=32) as (figure, axes):
        for name, colour in paint.items():
            own = sorted((o["bytes"], o[value]) for o in result["options"] if o["sampler"]["name"] == name)
            axes.plot(*zip(*own, strict=True), "o-", color=plots.PALETTE[colour], label=name.replace("_", " "))
        best = result["options"][result["chosen"]]
        ring = {"markersize": 13, "markerfacecolor": "none", "color": plots.PALETTE["ink"], "linestyle": "none"}
        axes.plot(best["bytes"], best[value], "o", label=f"chosen: {label(best['sampler'])}", **ring)
        plots.log_axes(axes)
        axes.legend(frameon=False)
        words = "degrees from the full gradient"
        plots.axis_names(axes, "bytes per token", words if value == "angle" else "squared error")
        return figure
