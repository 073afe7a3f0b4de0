"""The report's summary -> one HTML page: inline CSS and SVG, no scripts, no requests, light and dark.

All words from outside pass `html.escape`. Without matplotlib the tables stay and a note says what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from sparsekd import plots
from sparsekd.plots import nice_number

Summary = Mapping[str, Any]


def render_html(summary: Summary) -> str:
    """The whole page. Deterministic: equal summaries give equal text."""
    sections = (
        _header,
        _missing,
        _figures_strip,
        _results,
        _differences,
        _curves,
        _calibration,
        _storage,
        _made,
    )
    body = "\n".join(filter(None, (section(summary) for section in sections)))
    title = escape(str(summary.get("title") or "Sparse distillation"))
    return page(title, css(), body)


def page(title: str, style: str, body: str) -> str:
    """The HTML document around a body; `title` is escaped already. No scripts, no requests, light and dark."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# -- the top: the result first


def _header(summary: Summary) -> str:
    eyebrow = " · ".join(filter(None, ("sparsekd", summary.get("profile") and f"profile {summary['profile']}")))
    title = escape(str(summary.get("title") or "Sparse distillation"))
    return (
        f'<header><p class="eyebrow">{escape(eyebrow)}: {title}</p>\n'
        f"<h1>{escape(tie(summary['verdict']))}</h1>\n{_evidence(summary)}</header>"
    )


def _evidence(summary: Summary) -> str:
    told = [
        f"{signed(c['mean'])}{plus_minus(c['standard_error'], 3)} against {c['label']}" for c in summary["comparisons"]
    ]
    if not told or all(c["outcome"] == "unknown" for c in summary["comparisons"]):
        return ""  # one seed: the headline has said it all
    seeds = len(summary["comparisons"][0]["values"])
    how = "mean ± standard error over seeds; a difference counts when its 95 % interval excludes 0"
    words = f"Held-out loss, paired by seed ({plural(seeds, 'seed')}): {', '.join(told)} (nats per token, {how})."
    return f'<p class="evidence">{escape(tie(words))}</p>\n'


def tie(words: str) -> str:
    """No line break between a number and its error or percent sign."""
    return words.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def _missing(summary: Summary) -> str:
    notes = list(summary["notes"])
    if not plots.available():
        notes.append("Plots are left out because matplotlib is not installed: pip install 'sparsekd[report]'.")
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<aside class="notes" aria-label="Notes"><h2>Notes</h2><ul>{items}</ul></aside>'


def _figures_strip(summary: Summary) -> str:
    """Four numbers of the leading method, large."""
    names = [c["method"] for c in summary["comparisons"]]
    lead = next((m for m in summary["methods"] if m["name"] in names), None)
    if lead is None:
        return ""
    dense = next((b["bytes_per_token"] for b in summary["storage"] if b["name"] == "dense"), None)
    size = lead["bytes_per_token"]
    smaller = (
        f"bytes per token, {dense / size:,.0f} times fewer than all logits" if dense and size else "bytes per token"
    )
    shown = (
        (share(lead["gap_closed"]), "of the gap from cross-entropy to full distillation closed"),
        (plain(size, 0 if size and size >= 100 else 1), smaller),
        (times(lead["relative_speed"]), "training speed relative to cross-entropy"),
        (share(lead["ece"]), "expected calibration error"),
    )
    cells = "".join(f"<div><dt>{words}</dt><dd>{value}</dd></div>" for value, words in shown if value != EMPTY)
    colour = plots.colours(summary["methods"])[lead["name"]]
    return f'<dl class="strip" style="--lead:var(--{colour})">{cells}</dl>' if cells else ""


# -- the results table

Column = tuple[str, str, Callable[[Mapping[str, Any]], str]]


def _columns() -> Sequence[Column]:
    return (
        ("Held-out loss", "nats/token ↓", lambda m: estimate(m["loss"], 3)),
        ("Gap closed", "% ↑", lambda m: percent(m["gap_closed"], 1)),
        ("Perplexity", "↓", lambda m: mean(m["perplexity"], 2)),
        ("Bits per byte", "↓", lambda m: mean(m["bits_per_byte"], 3)),
        ("Calibration error", "% ↓", lambda m: percent(m["ece"], 2)),
        ("Acceptance", "% ↑", lambda m: percent(m["acceptance"], 1)),
        ("Agreement", "% ↑", lambda m: percent(m["agreement"], 1)),
        ("Stored", "bytes/token ↓", lambda m: plain(m.get("bytes_per_token"), 1)),
        ("Speed", "× CE ↑", lambda m: mean(m["relative_speed"], 2)),
    )


def _results(summary: Summary) -> str:
    if not summary["methods"]:
        return ""
    paint, lead = plots.colours(summary["methods"]), {c["method"] for c in summary["comparisons"]}
    head = "".join(f'<th scope="col">{name}<small>{unit}</small></th>' for name, unit, _ in _columns())
    rows = "".join(_result_row(m, paint[m["name"]], m["name"] in lead) for m in summary["methods"])
    return named_section(
        "results",
        "Results",
        f'<div class="scroll" tabindex="0" role="region" aria-label="Results table"><table class="results">'
        f'<thead><tr><th scope="col">Method</th>{head}</tr></thead>'
        f"<tbody>{rows}{_teacher_row(summary)}</tbody></table></div>"
        '<p class="fine">Held-out loss is the mean over seeds ± its standard error. Gap closed: 0 is '
        "cross-entropy, 100 is full distillation from the running teacher. Acceptance: the share of the student’s "
        "drafted tokens that speculative decoding with the teacher would keep. Agreement: how often both name "
        "the same top token. Arrows point to better.</p>",
    )


def _result_row(m: Mapping[str, Any], paint: str, is_lead: bool) -> str:
    cells = "".join(f"<td>{value(m)}</td>" for _, _, value in _columns())
    kind = ' class="lead"' if is_lead else ""
    return f'<tr{kind}><th scope="row">{key_of(paint)}{escape(m["label"])}</th>{cells}</tr>'


def _teacher_row(summary: Summary) -> str:
    e = summary["teacher"].get("evaluation")
    if not e:
        return ""
    known = {
        "Held-out loss": plain((e["loss"] or {}).get("mean"), 3),
        "Perplexity": plain(e["perplexity"], 2),
    }
    known |= {
        "Bits per byte": plain(e["bits_per_byte"], 3),
        "Calibration error": plain(_hundred(e["ece"]), 2),
    }
    cells = "".join(f"<td>{known.get(name, EMPTY)}</td>" for name, _, _ in _columns())
    return f'<tr class="teacher"><th scope="row">{key_of("ink")}Teacher</th>{cells}</tr>'


# -- figures and their tables


def _differences(summary: Summary) -> str:
    compared = [m for m in summary["methods"] if m["against_ce"]]
    if not compared:
        return ""
    paint = plots.colours(summary["methods"])
    rows = "".join(
        f'<tr><th scope="row">{key_of(paint[m["name"]])}{escape(m["label"])}</th>'
        f"<td>{signed(d['mean'])}{_error(d['standard_error'], 3)}<small>{interval(d)}</small></td></tr>"
        for m in compared
        for d in [m["against_ce"]]
    )
    figure = _figure(
        _draw(plots.differences, summary, width=400),
        "Thick: ± one standard error. Thin: 95 % interval (Student t). Small dots: single seeds.",
    )
    return named_section(
        "differences",
        "Against cross-entropy, seed by seed",
        '<p class="lede">Students with the same seed start from the same weights and see the same rows in the '
        f'same order, so their difference leaves that luck out.</p><div class="pair">{figure}'
        '<div class="scroll"><table class="differences"><thead><tr><th scope="col">Method</th>'
        f'<th scope="col">Difference<small>nats/token</small></th></tr></thead><tbody>{rows}</tbody></table>'
        "</div></div>",
    )


def _curves(summary: Summary) -> str:
    wide = _draw(plots.loss_curves, summary, width=920, height=400)
    if not wide:
        return ""
    narrow = _draw(plots.loss_curves, summary, width=370, height=380)
    caption = "Thick lines are means over seeds, thin lines single seeds."
    if plots.is_cut(summary["methods"]):
        caption += " The steep first part of training is cut off."
    figure = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    return named_section("curves", "Loss while training", _figure(figure, caption))


def _calibration(summary: Summary) -> str:
    paint = plots.colours(summary["methods"])
    teacher = summary["teacher"].get("evaluation") or {}
    shown = [("teacher", "Teacher", teacher.get("reliability") or [], teacher.get("ece"))]
    shown += [(m["name"], m["label"], m["reliability"], (m["ece"] or {}).get("mean")) for m in summary["methods"]]
    panels = ""
    for name, label, bins, ece in shown:
        svg = _draw(plots.reliability, bins, name, label, ece, paint[name])
        if svg:
            words = f"{key_of(paint[name])}{escape(label)}"
            panels += f"<figure>{svg}<figcaption>{words}</figcaption></figure>"
    if not panels:
        return ""
    return named_section(
        "calibration",
        "Do they know what they know?",
        '<p class="lede">When a model gives its top token a probability of 70 %, it should be right '
        "70 % of the time: on the diagonal. Below it, the model is overconfident. The shaded gap, weighted "
        f"by how many tokens fall there (grey columns), is the expected calibration error.</p>"
        f'<div class="panels">{panels}</div>',
    )


def _storage(summary: Summary) -> str:
    bars = _draw(plots.storage, summary["storage"], plots.colours(summary["methods"]), width=400)
    law = _draw(plots.unique_ids, summary["unique_ids"], width=400, height=270)
    figures = "".join(
        f"<div><h3>{title}</h3>{_figure(svg, caption)}</div>"
        for svg, title, caption in (
            (
                bars,
                "Bytes on disk per token",
                "Measured on the finished caches, input ids included where the cache holds them.",
            ),
            (
                law,
                "Unique ids per token",
                "More rounds draw ever fewer new ids: the cache grows slower than the rounds.",
            ),
        )
        if svg
    )
    return (
        named_section("storage", "What it costs to keep", f'<div class="pair even">{figures}</div>') if figures else ""
    )


def _draw(figure: Callable[..., str | None], *arguments: Any, **sizes: Any) -> str:
    return (figure(*arguments, **sizes) or "") if plots.available() else ""


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" if svg else ""


# -- how it was made


def _made(summary: Summary) -> str:
    teacher = {k: v for k, v in summary["teacher"].items() if k != "evaluation"}
    parts = [
        ("Machine", summary.get("machine")),
        ("Seeds", summary.get("seeds")),
        ("Corpus", summary.get("corpus")),
    ]
    parts += [
        ("Teacher", teacher),
        ("Student", summary.get("student")),
        ("Versions", summary.get("versions")),
    ]
    facts = "".join(f"<div><dt>{name}</dt><dd>{_words(value)}</dd></div>" for name, value in parts if value)
    body = (f'<dl class="facts">{facts}</dl>' if facts else "") + _commands(summary) + _seconds(summary)
    return named_section("made", "How this was made", body) if body else ""


def _commands(summary: Summary) -> str:
    commands = summary.get("commands")
    pairs = commands.items() if isinstance(commands, dict) else enumerate(commands or [])
    lines = "\n".join(line for _, value in pairs for line in (value if isinstance(value, list) else [str(value)]))
    return f'<h3>Commands</h3><pre tabindex="0"><code>{escape(str(lines))}</code></pre>' if lines else ""


def _seconds(summary: Summary) -> str:
    seconds = summary.get("seconds")
    known = {k: v for k, v in seconds.items() if isinstance(v, (int, float))} if isinstance(seconds, dict) else {}
    rows = "".join(f'<tr><th scope="row">{escape(str(k))}</th><td>{v:,.0f}</td></tr>' for k, v in known.items())
    head = '<thead><tr><th scope="col">Stage</th><th scope="col">Seconds</th></tr></thead>'
    return f'<h3>Time</h3><table class="slim">{head}<tbody>{rows}</tbody></table>' if rows else ""


def _words(value: Any) -> str:
    """A free value from run.json for people: a dict as `key value` phrases, counts shortened."""
    if isinstance(value, dict):
        phrases = (
            f"<span>{escape(str(k).replace('_', ' '))} <b>{_words(v)}</b></span>"
            for k, v in value.items()
            if v is not None
        )
        return " ".join(phrases)
    if isinstance(value, list):
        return ", ".join(_words(v) for v in value)
    if isinstance(value, float) and abs(value) < 1e4:
        return f"{value:.4g}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return nice_number(value)
    return escape(value if isinstance(value, str) else json.dumps(value))


def named_section(name: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{body}</section>'


def key_of(paint: str) -> str:
    return f'<i class="key" style="background:var(--{paint})" aria-hidden="true"></i>'


# -- numbers as text

EMPTY = '<span class="none" aria-label="not available">–</span>'


def plain(value: float | None, digits: int) -> str:
    """A number with thousands separators, or the dash of a missing one."""
    return EMPTY if value is None else f"{value:,.{digits}f}".replace("-", "−")


def mean(value: Mapping[str, Any] | None, digits: int) -> str:
    """The mean alone."""
    return plain(value["mean"] if value else None, digits)


def estimate(value: Mapping[str, Any] | None, digits: int) -> str:
    """mean ± standard error, the error small beside it."""
    return mean(value, digits) + _error(value["standard_error"] if value else None, digits)


def share(value: Mapping[str, Any] | None) -> str:
    """0.975 -> '97.5 %'."""
    return plain(100 * value["mean"], 1) + "\u00a0%" if value else EMPTY


def percent(value: Mapping[str, Any] | None, digits: int) -> str:
    """A share times 100, with its error where it has one."""
    if not value:
        return EMPTY
    return plain(100 * value["mean"], digits) + _error(_hundred(value["standard_error"]), digits)


def times(value: Mapping[str, Any] | None) -> str:
    """1.02 -> '1.02×'."""
    return f"{value['mean']:.2f}×" if value else EMPTY


def signed(value: float) -> str:
    """With a true minus sign."""
    return f"{value:+.3f}".replace("-", "−")


def plus_minus(error: float | None, digits: int) -> str:
    """' ± error', or nothing where it is unknown."""
    return "" if error is None else f"\u00a0±\u00a0{error:.{digits}f}"


def interval(difference: Mapping[str, Any]) -> str:
    """low … high, or the reason there is none."""
    if difference["low"] is None:
        return "one seed"
    return f"95 %: {signed(difference['low'])} … {signed(difference['high'])}"


def plural(count: int, word: str) -> str:
    """'1 seed', '3 seeds'."""
    return f"{count} {word}{'s' * (count != 1)}"


def _error(value: float | None, digits: int) -> str:
    return "" if value is None else f' <span class="error">±\u00a0{value:.{digits}f}</span>'


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


# -- style


def css(*more: str) -> str:
    """The report's style, and these files of the package after it."""
    from importlib.resources import files

    light, dark = ("".join(f"--{k}:{v};" for k, v in theme.items()) for theme in (plots.PALETTE, plots.DARK))
    themes = f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    return themes + "".join(
        files("sparsekd").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", *more)
    )
