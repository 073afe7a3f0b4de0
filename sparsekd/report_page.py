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
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>{_css()}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# -- the top: the result first


def _header(summary: Summary) -> str:
    eyebrow = " · ".join(
        filter(None, ("sparsekd", summary.get("profile") and f"profile {summary['profile']}"))
    )
    title = escape(str(summary.get("title") or "Sparse distillation"))
    return (
        f'<header><p class="eyebrow">{escape(eyebrow)}: {title}</p>\n'
        f"<h1>{escape(summary['verdict'])}</h1>\n{_evidence(summary)}</header>"
    )


def _evidence(summary: Summary) -> str:
    told = [
        f"{signed(c['mean'])}{plus_minus(c['standard_error'], 3)} against {c['label']}"
        for c in summary["comparisons"]
    ]
    if not told:
        return ""
    seeds = len(summary["comparisons"][0]["values"])
    how = "mean ± standard error over seeds; a difference counts when its 95 % interval excludes 0"
    words = (
        f"Held-out loss, paired by seed ({plural(seeds, 'seed')}): {', '.join(told)} (nats per token, {how})."
    )
    return f'<p class="evidence">{escape(words)}</p>\n'


def _missing(summary: Summary) -> str:
    notes = list(summary["notes"])
    if not plots.available():
        notes.append(
            "Plots are left out because matplotlib is not installed: pip install 'sparsekd[report]'."
        )
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<aside class="notes" aria-label="What is missing"><h2>What is missing</h2><ul>{items}</ul></aside>'
    )


def _figures_strip(summary: Summary) -> str:
    """Four numbers of the leading method, large."""
    names = [c["method"] for c in summary["comparisons"]]
    lead = next((m for m in summary["methods"] if m["name"] in names), None)
    if lead is None:
        return ""
    dense = next((b["bytes_per_token"] for b in summary["storage"] if b["name"] == "dense"), None)
    size = lead["bytes_per_token"]
    smaller = (
        f"bytes per token, {dense / size:,.0f} times fewer than all logits"
        if dense and size
        else "bytes per token"
    )
    shown = (
        (percent(lead["gap_closed"], 0), "of the gap from cross-entropy to full distillation closed"),
        (plain(size, 0 if size and size >= 100 else 1), smaller),
        (times(lead["relative_speed"]), "training speed relative to cross-entropy"),
        (percent(lead["ece"], 1), "expected calibration error"),
    )
    cells = "".join(
        f"<div><dt>{words}</dt><dd>{value}</dd></div>" for value, words in shown if value != EMPTY
    )
    return f'<dl class="strip" aria-label="{escape(lead["label"])}">{cells}</dl>' if cells else ""


# -- the results table

Column = tuple[str, str, Callable[[Mapping[str, Any]], str]]


def _columns() -> Sequence[Column]:
    return (
        ("Held-out loss", "nats/token ↓", lambda m: estimate(m["loss"], 3)),
        ("Gap closed", "% ↑", lambda m: percent(m["gap_closed"], 0, unit="")),
        ("Perplexity", "↓", lambda m: mean(m["perplexity"], 2)),
        ("Bits per byte", "↓", lambda m: mean(m["bits_per_byte"], 3)),
        ("Calibration error", "% ↓", lambda m: percent(m["ece"], 1, unit="")),
        ("Acceptance", "% ↑", lambda m: percent(m["acceptance"], 1, unit="")),
        ("Agreement", "% ↑", lambda m: percent(m["agreement"], 1, unit="")),
        ("Stored", "bytes/token ↓", lambda m: plain(m.get("bytes_per_token"), 1)),
        ("Speed", "× CE ↑", lambda m: mean(m["relative_speed"], 2)),
    )


def _results(summary: Summary) -> str:
    if not summary["methods"]:
        return ""
    paint, lead = plots.colours(summary["methods"]), {c["method"] for c in summary["comparisons"]}
    head = "".join(f'<th scope="col">{name}<small>{unit}</small></th>' for name, unit, _ in _columns())
    rows = "".join(_result_row(m, paint[m["name"]], m["name"] in lead) for m in summary["methods"])
    return _section(
        "results",
        "Results",
        f'<div class="scroll" tabindex="0" role="region" aria-label="Results table"><table class="results">'
        f'<thead><tr><th scope="col">Method</th>{head}</tr></thead>'
        f"<tbody>{rows}{_teacher_row(summary)}</tbody></table></div>"
        '<p class="fine">Held-out loss is the mean over seeds ± its standard error. Gap closed: 0 is cross-entropy, 100 is full '
        "distillation from the running teacher. Acceptance: the share of the student’s drafted tokens that "
        "speculative decoding with the teacher would keep. Agreement: how often both name the same top token. "
        "Arrows point to better.</p>",
    )


def _result_row(m: Mapping[str, Any], paint: str, is_lead: bool) -> str:
    cells = "".join(f"<td>{value(m)}</td>" for _, _, value in _columns())
    kind = ' class="lead"' if is_lead else ""
    return f'<tr{kind}><th scope="row">{_key(paint)}{escape(m["label"])}</th>{cells}</tr>'


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
        "Calibration error": plain(_hundred(e["ece"]), 1),
    }
    cells = "".join(f"<td>{known.get(name, EMPTY)}</td>" for name, _, _ in _columns())
    return f'<tr class="teacher"><th scope="row">{_key("ink")}Teacher</th>{cells}</tr>'


# -- figures and their tables


def _differences(summary: Summary) -> str:
    compared = [m for m in summary["methods"] if m["against_ce"]]
    if not compared:
        return ""
    paint = plots.colours(summary["methods"])
    rows = "".join(
        f'<tr><th scope="row">{_key(paint[m["name"]])}{escape(m["label"])}</th>'
        f"<td>{signed(d['mean'])}{plus_minus(d['standard_error'], 3)}</td><td>{interval(d)}</td></tr>"
        for m in compared
        for d in [m["against_ce"]]
    )
    figure = _figure(
        _draw(plots.differences, summary, width=460),
        "Thick: ± one standard error. Thin: 95 % interval (Student t). Small dots: single seeds.",
    )
    return _section(
        "differences",
        "Against cross-entropy, seed by seed",
        f'<p class="lede">Students with the same seed start from the same weights and see the same rows in the same order, '
        f'so their difference leaves that luck out.</p><div class="pair">{figure}<div class="side"><div class="scroll"><table><thead><tr>'
        '<th scope="col">Method</th><th scope="col">Difference<small>nats/token</small></th>'
        f'<th scope="col">95 % interval</th></tr></thead><tbody>{rows}</tbody></table></div></div></div>',
    )


def _curves(summary: Summary) -> str:
    wide = _draw(plots.loss_curves, summary, width=920, height=400)
    if not wide:
        return ""
    narrow = _draw(plots.loss_curves, summary, width=370, height=380)
    caption = "Thick lines are means over seeds, thin lines single seeds. The steep first part of training is cut off."
    figure = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    return _section("curves", "Loss while training", _figure(figure, caption))


def _calibration(summary: Summary) -> str:
    paint = plots.colours(summary["methods"])
    teacher = summary["teacher"].get("evaluation") or {}
    shown = [("teacher", "Teacher", teacher.get("reliability") or [], teacher.get("ece"))]
    shown += [
        (m["name"], m["label"], m["reliability"], (m["ece"] or {}).get("mean")) for m in summary["methods"]
    ]
    panels = ""
    for name, label, bins, ece in shown:
        svg = _draw(plots.reliability, bins, name, label, ece, paint[name])
        if svg:
            words = f"{_key(paint[name])}{escape(label)}"
            panels += f"<figure>{svg}<figcaption>{words}</figcaption></figure>"
    if not panels:
        return ""
    return _section(
        "calibration",
        "Do they know what they know?",
        '<p class="lede">When a model gives its top token a probability of 70 %, it should be right 70 % of the time: on the '
        "diagonal. Below it, the model is overconfident. The shaded gap, weighted by how many tokens fall there "
        f'(grey columns), is the expected calibration error.</p><div class="panels">{panels}</div>',
    )


def _storage(summary: Summary) -> str:
    bars = _draw(plots.storage, summary["storage"], plots.colours(summary["methods"]), width=440)
    law = _draw(plots.unique_ids, summary["unique_ids"], width=440, height=300)
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
        _section("storage", "What it costs to keep", f'<div class="pair even">{figures}</div>')
        if figures
        else ""
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
    return _section("made", "How this was made", body) if body else ""


def _commands(summary: Summary) -> str:
    commands = summary.get("commands")
    pairs = commands.items() if isinstance(commands, dict) else enumerate(commands or [])
    lines = "\n".join(
        line for _, value in pairs for line in (value if isinstance(value, list) else [str(value)])
    )
    return f'<h3>Commands</h3><pre tabindex="0"><code>{escape(str(lines))}</code></pre>' if lines else ""


def _seconds(summary: Summary) -> str:
    seconds = summary.get("seconds")
    known = (
        {k: v for k, v in seconds.items() if isinstance(v, (int, float))} if isinstance(seconds, dict) else {}
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(str(k))}</th><td>{v:,.0f}</td></tr>' for k, v in known.items()
    )
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


def _section(name: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{body}</section>'


def _key(paint: str) -> str:
    return f'<i class="key" style="background:var(--{paint})" aria-hidden="true"></i>'


# -- numbers as text

EMPTY = '<span class="none" aria-label="not available">–</span>'


def plain(value: float | None, digits: int) -> str:
    """A number with thousands separators, or the dash of a missing one."""
    return EMPTY if value is None else f"{value:,.{digits}f}"


def mean(value: Mapping[str, Any] | None, digits: int) -> str:
    """The mean alone."""
    return plain(value["mean"] if value else None, digits)


def estimate(value: Mapping[str, Any] | None, digits: int) -> str:
    """mean ± standard error, the error small beside it."""
    return mean(value, digits) + _error(value["standard_error"] if value else None, digits)


def percent(value: Mapping[str, Any] | None, digits: int, unit: str = " %") -> str:
    """A share in percent, with its error where it has one."""
    if not value:
        return EMPTY
    return plain(100 * value["mean"], digits) + _error(_hundred(value["standard_error"]), digits) + unit


def times(value: Mapping[str, Any] | None) -> str:
    """1.02 -> '1.02×'."""
    return f"{value['mean']:.2f}×" if value else EMPTY


def signed(value: float) -> str:
    """With a true minus sign."""
    return f"{value:+.3f}".replace("-", "−")


def plus_minus(error: float | None, digits: int) -> str:
    """' ± error', or nothing where it is unknown."""
    return "" if error is None else f" ± {error:.{digits}f}"


def interval(difference: Mapping[str, Any]) -> str:
    """low … high, or the reason there is none."""
    if difference["low"] is None:
        return "one seed"
    return f"{signed(difference['low'])} … {signed(difference['high'])}"


def plural(count: int, word: str) -> str:
    """'1 seed', '3 seeds'."""
    return f"{count} {word}{'s' * (count != 1)}"


def _error(value: float | None, digits: int) -> str:
    return "" if value is None else f' <span class="error">± {value:.{digits}f}</span>'


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


# -- style

_DARK = {
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


def _css() -> str:
    light, dark = ("".join(f"--{k}:{v};" for k, v in theme.items()) for theme in (plots.PALETTE, _DARK))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_STYLE}"


_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:968px;margin:0 auto;padding:72px 24px 96px}
header{max-width:820px}
.eyebrow{margin:0 0 14px;color:var(--muted);font-size:15px}
h1{margin:0;font-size:clamp(24px,3.6vw,35px);line-height:1.24;font-weight:650;letter-spacing:-.017em;text-wrap:balance}
.evidence{margin:20px 0 0;color:var(--muted);max-width:720px}
section{margin-top:76px}
h2{margin:0 0 18px;font-size:22px;line-height:1.3;font-weight:650;letter-spacing:-.01em}
h3{margin:0 0 10px;font-size:16px;font-weight:650}
.lede{margin:0 0 26px;max-width:680px;color:var(--muted)}
.fine{margin:16px 0 0;max-width:760px;color:var(--muted);font-size:14px}
.strip{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:28px 32px;margin:48px 0 0;
 padding:26px 0 0;border-top:1px solid var(--line)}
.strip div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
.strip dd{margin:0;font-size:31px;line-height:1.2;font-weight:650;letter-spacing:-.02em;color:var(--rs);
 font-variant-numeric:tabular-nums}
.strip dd .error{font-size:16px;font-weight:400;letter-spacing:0}
.strip dt{margin:6px 0 0;color:var(--muted);font-size:14px;line-height:1.4;max-width:210px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
th,td{padding:11px 0 11px 14px;text-align:right;font-weight:400;border-bottom:1px solid var(--line);white-space:nowrap}
th[scope=row],thead th:first-child{text-align:left;padding-left:0;padding-right:8px}
thead th{color:var(--muted);font-size:13px;line-height:1.3;vertical-align:bottom;white-space:normal}
thead small{display:block;font-size:12px;white-space:nowrap}
th[scope=row]{background:var(--paper)}
.results th:first-child{position:sticky;left:0}
.lead th,.lead td{font-weight:650}
.lead .error{font-weight:400}
.teacher th,.teacher td{color:var(--muted)}
.error,.none{color:var(--muted)}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:9px}
figure{margin:0}
figcaption{margin-top:10px;color:var(--muted);font-size:14px;line-height:1.45}
svg{display:block;width:100%;height:auto;overflow:visible}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.narrow{display:none}
.pair{display:grid;grid-template-columns:minmax(0,460px) minmax(0,1fr);gap:40px 48px;align-items:start}
.pair.even{grid-template-columns:repeat(2,minmax(0,440px));justify-content:space-between}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(168px,1fr));gap:30px 12px}
.panels figure{max-width:220px}
.panels figcaption{margin:4px 0 0 31px;color:var(--ink)}
.notes{margin-top:40px;padding:18px 22px;border-left:3px solid var(--topk);background:color-mix(in srgb,var(--topk) 8%,transparent)}
.notes h2{font-size:16px;margin:0 0 6px}
.notes ul{margin:0;padding-left:18px;color:var(--ink);font-size:15px}
.facts{display:grid;gap:12px;margin:0 0 34px}
.facts div{display:grid;grid-template-columns:110px 1fr;gap:16px}
.facts dt{color:var(--muted)}
.facts dd{margin:0;overflow-wrap:anywhere}
.facts dd>span{display:inline-block;margin-right:16px;color:var(--muted)}
.facts b{font-weight:500;color:var(--ink)}
pre{margin:0 0 34px;padding:16px 18px;overflow-x:auto;border:1px solid var(--line);border-radius:6px;
 font:13.5px/1.65 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.slim{width:auto;min-width:260px}
.slim th,.slim td{padding-top:7px;padding-bottom:7px}
@media (max-width:760px){
 main{padding:40px 20px 64px}
 section{margin-top:56px}
 .pair,.pair.even{grid-template-columns:minmax(0,1fr)}
 .wide{display:none}.narrow{display:block}
 .strip{grid-template-columns:1fr 1fr;gap:24px 20px}
 .strip dd{font-size:26px}
 .panels{grid-template-columns:1fr 1fr;gap:24px 10px}
 .facts div{grid-template-columns:1fr;gap:2px}
 .results th:first-child{max-width:136px;white-space:normal;line-height:1.3}
}
@media print{main{padding:0}section{break-inside:avoid}}
"""
