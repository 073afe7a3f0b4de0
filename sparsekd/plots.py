"""The report's figures: numbers -> inline SVG text, drawn by matplotlib, coloured by the page.

Every figure uses one fixed colour per method. Colours are written as CSS variables (`var(--rs)`), so a page
can restyle them for a dark theme; text stays text, in the page's font. Nothing here reads files or needs torch,
and matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# Light-theme values: told apart with any colour vision (blue, orange, green, grey) and at least 4.5:1 against
# the paper, because labels are written in them.
PALETTE = {
    "ink": "#1b1f24",
    "muted": "#5d6672",
    "line": "#dfe2e6",
    "paper": "#fefefe",
    "ce": "#6b7480",
    "topk": "#bf4e00",
    "rs": "#0069a8",
    "full-kd": "#00765a",
    "extra-1": "#96428f",
    "extra-2": "#7d6400",
    "extra-3": "#3d4fb0",
}
# The same names on a dark page.
DARK = {
    "ink": "#e9ebee",
    "muted": "#a3abb6",
    "line": "#333940",
    "paper": "#14171a",
    "ce": "#aab2bd",
    "topk": "#f5924e",
    "rs": "#5cb5f2",
    "full-kd": "#43c79d",
    "extra-1": "#de93d8",
    "extra-2": "#d9bb45",
    "extra-3": "#9aa9f5",
}


def colours(methods: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{method name: palette name}: a role's first method has the role's colour, later ones spare colours."""
    spare = iter(("extra-1", "extra-2", "extra-3"))
    chosen: dict[str, str] = {"teacher": "ink", "dense": "muted"}
    for m in methods:
        wanted = m["role"].replace("_", "-")
        taken = wanted not in PALETTE or wanted in chosen.values()
        chosen[m["name"]] = next(spare, "muted") if taken else wanted
    return chosen


def available() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


# -- figures


def loss_curves(summary: Mapping[str, Any], *, width: int, height: int) -> str | None:
    """Held-out loss against step: the mean over seeds, thin lines per seed, the teacher as a dashed line."""
    methods = [m for m in summary["methods"] if len(m["curve"]) > 1]
    if not methods:
        return None
    paint, top = colours(summary["methods"]), _interesting_top(methods)
    with canvas(width, height, left=46, right=250 if width > 600 else 124, bottom=42) as (
        figure,
        axes,
    ):
        teacher = ((summary["teacher"].get("evaluation") or {}).get("loss") or {}).get("mean")
        ends = [_draw_curve(axes, m, PALETTE[paint[m["name"]]]) for m in methods]
        last = max(x for x, *_ in ends)
        if teacher is not None:
            axes.axhline(teacher, color=PALETTE["ink"], linewidth=1.2, linestyle=(0, (5, 4)))
            ends.append((last, teacher, "Teacher", PALETTE["ink"]))
        lowest = min(y for _, y, *_ in ends)
        axes.set_ylim(lowest - 0.06 * (top - lowest), top)
        axes.set_xlim(0, last)
        _label_ends(axes, ends, height, short=width <= 600)
        axis_names(axes, "training step", "held-out loss, nats per token")
        return inline_svg(figure, f"curves-{width}", "Held-out loss against training step, one line per method.")


def is_cut(methods: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `loss_curves` leaves out the highest losses, at the start of training."""
    drawn = [m for m in methods if len(m["curve"]) > 1]
    return bool(drawn) and max(y for m in drawn for _, y in m["curve"]) > _interesting_top(drawn)


def differences(summary: Mapping[str, Any], *, width: int) -> str | None:
    """Loss minus cross-entropy's, paired by seed: mean, error, 95 % interval, and a dot per seed."""
    methods = [m for m in summary["methods"] if m["against_ce"]]
    if not methods:
        return None
    paint, height = colours(summary["methods"]), 58 * len(methods) + 62
    with canvas(width, height, left=8, right=8, bottom=42, top=26) as (figure, axes):
        for row, m in enumerate(reversed(methods)):
            _draw_difference(axes, row, m["against_ce"], PALETTE[paint[m["name"]]])
        axes.axvline(0, color=PALETTE["ink"], linewidth=1.2)
        axes.set_ylim(-0.6, len(methods) - 0.15)
        _include_zero(axes)
        for row, m in enumerate(reversed(methods)):
            _over_line(axes, row, m, PALETTE[paint[m["name"]]])
        axes.text(0, 1.02, "cross-entropy", transform=axes.get_xaxis_transform(), ha="center", color=PALETTE["ink"])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        axis_names(axes, "difference in held-out loss, nats per token (left is better)", "")
        return inline_svg(figure, "differences", "Difference from cross-entropy in held-out loss, one row per method.")


def reliability(bins: Sequence[Mapping[str, Any]], name: str, label: str, ece: float | None, paint: str) -> str | None:
    """Accuracy against confidence, the gap to the diagonal shaded; columns show where the tokens are."""
    used = [b for b in bins if b["count"] and b["confidence"] is not None and b["accuracy"] is not None]
    if not used:
        return None
    colour = PALETTE[paint]
    with canvas(200, 206, left=32, right=6, bottom=38, top=4) as (figure, axes):
        reliability_axes(axes, bins, colour)
        if ece is not None:
            axes.text(0.06, 0.9, f"ECE {100 * ece:.1f} %", color=colour, fontweight="bold", va="center")
        axis_names(axes, "confidence", "accuracy")
        return inline_svg(figure, f"reliability-{name}", f"Reliability diagram of {label}.")


def reliability_axes(axes: Any, bins: Sequence[Mapping[str, Any]], colour: str) -> None:
    """One reliability diagram on given axes: grey columns for where the examples are, the gap shaded."""
    used = [b for b in bins if b["count"]]
    x, y = [b["confidence"] for b in used], [b["accuracy"] for b in used]
    most = max(b["count"] for b in bins)
    centres = [(i + 0.5) / len(bins) for i in range(len(bins))]
    heights = [0.28 * b["count"] / most for b in bins]
    axes.bar(centres, heights, width=0.82 / len(bins), color=PALETTE["line"], linewidth=0)
    axes.plot([0, 1], [0, 1], color=PALETTE["muted"], linewidth=1)
    axes.fill_between(x, x, y, color=colour, alpha=0.22, linewidth=0)
    axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3.6)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.set_xticklabels(["0", "½", "1"])
    axes.set_yticklabels(["0", "½", "1"])


def storage(bars: Sequence[Mapping[str, Any]], paint: Mapping[str, str], *, width: int) -> str | None:
    """Bytes per token on a log scale, each bar labelled with its size and how many times smaller it is."""
    if not bars:
        return None
    largest = max(b["bytes_per_token"] for b in bars)
    with canvas(width, 62 * len(bars) + 46, left=8, right=14, bottom=42, top=4) as (figure, axes):
        for row, b in enumerate(reversed(bars)):
            colour, size = PALETTE[paint.get(b["name"], "muted")], b["bytes_per_token"]
            axes.barh(row - 0.14, size, left=0, height=0.34, color=colour, linewidth=0)
            times = f", {largest / size:,.0f} times smaller" if size < largest / 1.5 else ""
            axes.text(1.0, row + 0.2, f" {b['label']}", color=colour, fontweight="bold", va="center")
            axes.text(largest, row + 0.2, f"{_size(size)}{times}", color=PALETTE["muted"], va="center", ha="right")
        axes.set_xscale("log")
        axes.set(xlim=(1, largest), ylim=(-0.5, len(bars) - 0.5), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis_names(axes, "bytes per token (log scale)", "")
        return inline_svg(figure, "storage", "Bytes stored per token.")


def unique_ids(data: Mapping[str, Any] | None, *, width: int, height: int) -> str | None:
    """Mean unique ids per position against sampling rounds, log-log, with the fitted power law."""
    if not data:
        return None
    with canvas(width, height, left=46, right=20, bottom=42, top=8) as (figure, axes):
        unique_ids_axes(axes, data)
        return inline_svg(figure, "unique-ids", "Unique ids per token against sampling rounds, both on log scales.")


def unique_ids_axes(axes: Any, data: Mapping[str, Any]) -> None:
    """The curve of `unique_ids` on given axes."""
    rounds, unique, law = data["rounds"], data["unique"], data["power_law"]
    colour = PALETTE["rs"]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([min(rounds), max(rounds)], [min(rounds), max(rounds)], color=PALETTE["line"], linewidth=1.4)
    _along(axes, rounds[len(rounds) // 2 - 1], "one id per round", PALETTE["muted"])
    if law["exponent"] and law["prefactor"]:
        fit = [law["prefactor"] * r ** law["exponent"] for r in rounds]
        axes.plot(rounds, fit, color=colour, linewidth=1.6, linestyle=(0, (5, 3)))
        text = f"fit: {law['prefactor']:.2f} × rounds^{law['exponent']:.2f}"
        axes.text(0.97, 0.1, text, transform=axes.transAxes, ha="right", color=colour, fontweight="bold")
    axes.plot(rounds, unique, linestyle="none", marker="D", markersize=5.5, color=colour)
    axes.set_xlim(min(rounds) / 1.15, max(rounds) * 1.15)
    axes.set_ylim(min(unique) / 1.2, max(unique) * 2.2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(lambda value, _: "")
    axis_names(axes, "sampling rounds", "unique ids per token")


# -- pieces of figures


def _draw_curve(axes: Any, method: Mapping[str, Any], colour: str) -> tuple[float, float, str, str]:
    for student in method["students"]:
        if len(method["students"]) > 1 and student["curve"]:
            axes.plot(*zip(*student["curve"], strict=True), color=colour, linewidth=0.7, alpha=0.45)
    steps, losses = zip(*method["curve"], strict=True)
    axes.plot(steps, losses, color=colour, linewidth=2.4)
    return steps[-1], losses[-1], method["label"], colour


def _interesting_top(methods: Sequence[Mapping[str, Any]]) -> float:
    """The highest loss shown: the first fall is cut off, or it would hide all differences."""
    late = [[y for x, y in m["curve"] if x >= 0.2 * m["curve"][-1][0]] for m in methods]
    highest, ends = max(max(c) for c in late), [c[-1] for c in late]
    return highest + 0.05 * (highest - min(ends)) + 1e-6


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]], height: int, *, short: bool) -> None:
    """Names at the lines' right ends, moved apart where they would overlap, with their last value."""
    low, high = axes.get_ylim()
    step = 17 / (height - 60) * (high - low)
    where = spread([y for _, y, *_ in ends], step)
    last = max(x for x, *_ in ends)
    for (_, y, label, colour), at in zip(ends, where, strict=True):
        text = _short(label, 15) if short else f"{y:.3f}  {label}"
        extra = {"xytext": (12, 0), "textcoords": "offset points", "annotation_clip": False, "va": "center"}
        axes.plot([last, last * 1.012], [y, at], color=colour, linewidth=0.8, clip_on=False)
        axes.annotate(text, (last, at), color=colour, fontweight="bold", fontsize=11 if short else 12.5, **extra)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved apart to at least `gap`, keeping their order and staying close to where they were."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups = [[values[i], 1] for i in order]  # [sum of wished centres, members]; a group is spaced evenly
    blocks: list[tuple[float, int]] = []
    for centre, count in groups:
        block = (centre, int(count))
        while blocks and block[0] - blocks[-1][0] < gap * (block[1] + blocks[-1][1]) / 2:
            other, members = blocks.pop()
            n = members + block[1]
            block = ((other * members + block[0] * block[1]) / n, n)
        blocks.append(block)
    places = [c + gap * (i - (n - 1) / 2) for c, n in blocks for i in range(n)]
    moved = dict(zip(order, places, strict=True))
    return [moved[i] for i in range(len(values))]


def _draw_difference(axes: Any, row: int, difference: Mapping[str, Any], colour: str) -> None:
    mean, error = difference["mean"], difference["standard_error"]
    if difference["low"] is not None:
        axes.plot([difference["low"], difference["high"]], [row, row], color=colour, linewidth=1.6)
        axes.plot([mean - error, mean + error], [row, row], color=colour, linewidth=5, solid_capstyle="butt")
    axes.plot([mean], [row], marker="o", markersize=9, color=colour, linestyle="none")
    values = list(difference["values"].values())
    axes.plot(
        values,
        [row - 0.24] * len(values),
        marker="o",
        markersize=3.5,
        color=colour,
        linestyle="none",
        alpha=0.6,
    )


def _over_line(axes: Any, row: int, method: Mapping[str, Any], colour: str) -> None:
    """The method's name above its mean, pushed inwards where it would leave the figure."""
    left, right = axes.get_xlim()
    mean = method["against_ce"]["mean"]
    share = (mean - left) / (right - left)
    side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
    at = left if side == "left" else right if side == "right" else mean
    axes.text(at, row + 0.3, method["label"], ha=side, va="center", color=colour, fontweight="bold")


def _include_zero(axes: Any) -> None:
    left, right = axes.get_xlim()
    left, right = min(left, 0.0), max(right, 0.0)
    pad = 0.14 * (right - left)
    axes.set_xlim(left - pad, right + pad)


def _along(axes: Any, value: float, text: str, colour: str) -> None:
    axes.annotate(text, (value, value), (-8, 4), textcoords="offset points", color=colour, ha="right")


def axis_names(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=PALETTE["muted"], labelpad=7)
    axes.set_ylabel(y, color=PALETTE["muted"], labelpad=5)


def log_axes(axes: Any) -> None:
    """Logarithmic axes with plain numbers at 1, 2 and 5 times the powers of ten."""
    for axis, limits in ((axes.xaxis, axes.get_xlim), (axes.yaxis, axes.get_ylim)):
        getattr(axes, f"set_{axis.axis_name}scale")("log")
        low, high = limits()
        steps = [digit * 10.0**power for power in range(-9, 12) for digit in (1, 2, 5)]
        inside = [step for step in steps if low <= step <= high]
        axis.set_ticks(inside, [f"{step:g}" for step in inside])
        axis.set_ticks([], minor=True)


def legend(axes: Any, entries: Sequence[tuple[str, str]], *, right: float, top: float) -> None:
    """Names in their palette colours, one below the other, ending at a place given in shares of the axes."""
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    for line, (name, paint) in enumerate(entries):
        at, colour = (right, top - 19 * line / height), PALETTE[paint]
        axes.text(*at, name, transform=axes.transAxes, ha="right", va="top", color=colour, fontweight="bold")


def _short(text: str, width: int) -> str:
    """As many leading words, without a bracketed remark, as fit; at least one."""
    words = text.split(" (")[0].split()
    fitting = [" ".join(words[:n]) for n in range(1, len(words) + 1) if len(" ".join(words[:n])) <= width]
    return fitting[-1] if fitting else text[: width - 1] + "…"


def _size(size: float) -> str:
    return f"{size:,.0f} B" if size >= 100 else f"{size:.1f} B"


# -- the canvas and its SVG


@contextmanager
def style() -> Iterator[None]:
    """The few lines a plot needs, its colours and its font, for figures made and saved inside."""
    import matplotlib

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "sparsekd",
        "text.parse_math": False,
        "font.size": 12.5,
        "font.family": ["DejaVu Sans"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": PALETTE["line"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": PALETTE["line"],
        "grid.linewidth": 0.6,
        "xtick.color": PALETTE["line"],
        "ytick.color": PALETTE["line"],
        "xtick.labelcolor": PALETTE["muted"],
        "ytick.labelcolor": PALETTE["muted"],
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
    }
    with matplotlib.rc_context(settings):
        yield


@contextmanager
def canvas(
    width: float, height: float, *, left: float, right: float, bottom: float, top: float = 12
) -> Iterator[tuple[Any, Any]]:
    """A figure whose units are CSS pixels, margins included, with the few lines a plot needs."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(width / 72, height / 72))
        box = (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - bottom - top) / height,
        )
        yield figure, figure.add_axes(box)


def inline_svg(figure: Any, name: str, title: str) -> str:
    """The figure as an <svg> element for HTML: own ids, CSS colours and fonts, no prologue, no metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return restyle(buffer.getvalue(), re.sub(r"[^A-Za-z0-9-]", "-", name), title)


def restyle(svg: str, name: str, title: str) -> str:
    """Matplotlib's SVG file as an inline element for HTML; ids get the figure's name, since a page holds many."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    for variable, value in PALETTE.items():
        svg = svg.replace(value, f"var(--{variable})")
    box = re.search(r'viewBox="([^"]+)"', svg)
    head = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(title)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1).strip()


def nice_number(value: float) -> str:
    """1234567 -> '1.23 M': a count for people."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if limit == 1e4 else limit):.3g}{unit}"
    return f"{value:,.0f}" if math.isfinite(value) else "-"
