"""Results -> one HTML page with the paper's numbers beside ours, and the same as text for the terminal.

Style, palette and document are the report's. No scripts, no requests; words from outside pass `html.escape`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from html import escape
from typing import Any

from sparsekd.report_page import css, key_of, page, plural, tie
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, beside, shown

Section = tuple[Reproduction, Result, Mapping[str, Any], str]
_MARKS = {True: ("✓", "holds"), False: ("✗", "fails"), None: ("·", "remark")}
_WIDTH = 100
_WORDS = ' class="words"'


def render_page(sections: Mapping[str, Section]) -> str:
    """The page of these {name: (reproduction, result, record, svg)}. Equal results give equal text."""
    body = "\n".join([_header(sections), *(_section(name, *parts) for name, parts in sections.items())])
    return page("The paper, run again", css("reproduce.css"), body)


def _header(sections: Mapping[str, Section]) -> str:
    findings = [f for _, result, *_ in sections.values() for f in result.findings if f.holds is not None]
    held = sum(bool(f.holds) for f in findings)
    title = f"{held} of {plural(len(findings), 'claim')} reproduced" if findings else "Nothing has been run yet"
    items = "".join(_summary_line(name, *parts) for name, parts in sections.items())
    return (
        '<header><p class="eyebrow">sparsekd reproduce: Sparse Logit Sampling, run again on this machine</p>\n'
        f"<h1>{title}</h1>\n"
        '<p class="evidence">Each claim is judged from the numbers below it. Cells are means over seeds ± standard '
        "error, with the paper’s number beside; the scales differ, so directions and orders are compared, not digits."
        f'</p></header>\n<nav class="contents"><ol>{items}</ol></nav>'
    )


def _summary_line(name: str, reproduction: Reproduction, result: Result, *_: Any) -> str:
    judged = [f for f in result.findings if f.holds is not None]
    marks = "".join(_mark(f) for f in judged)
    return (
        f'<li><a href="#{escape(name)}"><code>{escape(name)}</code></a><span>{escape(reproduction.title)}</span>'
        f'<span class="marks">{marks}</span></li>'
    )


def _section(name: str, reproduction: Reproduction, result: Result, record: Mapping[str, Any], svg: str) -> str:
    figure = f'<figure class="wide-figure" style="max-width:{_width(svg)}px">{svg}</figure>' if svg else ""
    return (
        f'<section aria-labelledby="{escape(name)}"><p class="source"><code>{escape(name)}</code> '
        f'{escape(reproduction.source)}</p><h2 id="{escape(name)}">{escape(reproduction.title)}</h2>\n'
        f'<p class="lede">{escape(tie(reproduction.claim))}</p>\n{_findings(result)}{figure}{_table(result)}'
        f'<p class="fine"><b>Scale.</b> {escape(tie(result.scale))}</p>'
        f'<p class="fine made">{_made(name, record)}</p></section>'
    )


def _width(svg: str) -> int:
    """The width an SVG was drawn for: text in it has the page's size at that width."""
    box = re.search(r'viewBox="\S+ \S+ ([\d.]+)', svg)
    return round(float(box[1])) if box else 920


def _findings(result: Result) -> str:
    items = "".join(f"<li>{_mark(f)}{escape(tie(f.text))}</li>" for f in result.findings)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _mark(finding: Finding) -> str:
    sign, word = _MARKS[finding.holds]
    said = {"holds": "reproduces", "fails": "does not reproduce", "remark": "remark"}[word]
    return f'<i class="mark {word}" role="img" aria-label="{said}" title="{escape(finding.text)}">{sign}</i>'


def _table(result: Result) -> str:
    columns, rows = beside(result)
    paint = result.data.get("paint") or {}
    words = [any(isinstance(cells[i][0], str) for _, cells in rows) for i in range(len(columns))]
    head = "".join(
        f'<th scope="col"{_WORDS * is_words}>{escape(c.name)}<small>{escape(c.unit)}</small></th>'
        for c, is_words in zip(columns, words, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{key_of(paint[name]) if name in paint else ""}{escape(name)}</th>'
        + "".join(_pair(ours, paper, c) for (ours, paper), c in zip(cells, columns, strict=True))
        + "</tr>"
        for name, cells in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table class="beside">'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _pair(ours: Any, paper: Any, column: Column) -> str:
    theirs = f'<small class="paper">paper {escape(shown(paper, column.form))}</small>' if paper is not None else ""
    return f"<td{_WORDS * isinstance(ours, str)}>{_ours(ours, column.form)}{theirs}</td>"


def _ours(cell: Cell | str | None, form: str) -> str:
    text = shown(cell, form)
    number, sign, error = text.partition(" ± ")
    return escape(number) + (f' <span class="error">±\u00a0{escape(error)}</span>' if sign else "")


def _made(name: str, record: Mapping[str, Any]) -> str:
    settings = [f"{k}={v}" for k, v in record["settings"].items() if v is not None]
    command = escape(" ".join(["sparsekd reproduce", name, *settings]))
    return f"<code>{command}</code> took {record['seconds']:,.0f} s"


# -- the terminal


def terminal_text(name: str, reproduction: Reproduction, result: Result) -> str:
    """The table, the paper's numbers in brackets, then the findings; long words of a cell are cut."""
    columns, rows = beside(result)
    cells = [[row, *(_both(o, p, c) for (o, p), c in zip(pairs, columns, strict=True))] for row, pairs in rows]
    heads = [0, *(max(9, *map(len, f"{c.name} {c.unit}".split())) for c in columns)]
    widths = [max(len(line[i]) for line in [*cells, [" " * w for w in heads]]) for i in range(len(columns) + 1)]
    words = {0, *(i for _, pairs in rows for i, (ours, _) in enumerate(pairs, 1) if isinstance(ours, str))}
    lines = [*_head(columns, widths), *cells]
    text = ["  ".join(_fit(w, widths[i], left=i in words) for i, w in enumerate(line)).rstrip() for line in lines]
    rule, below = "-" * max(map(len, text)), len(lines) - len(cells)
    said = [part for f in result.findings for part in _wrapped(f)]
    title = f"{name}: {reproduction.title} ({reproduction.source}); [the paper's numbers]"
    scale = textwrap.wrap(f"Scale: {result.scale}", _WIDTH)
    return "\n".join(["", title, rule, *text[:below], rule, *text[below:], "", *said, *scale, ""])


def _head(columns: list[Column], widths: list[int]) -> list[list[str]]:
    """The columns' names over their units, wrapped to the widths, as lines of the table aligned at the bottom."""
    stacks = [
        textwrap.wrap(c.name, width) + textwrap.wrap(c.unit, width)
        for c, width in zip(columns, widths[1:], strict=True)
    ]
    height = max(map(len, stacks), default=0)
    return [["", *(stack[i - height] if height - i <= len(stack) else "" for stack in stacks)] for i in range(height)]


def _both(ours: Any, paper: Any, column: Column) -> str:
    return textwrap.shorten(shown(ours, column.form), 48, placeholder=" …") + (
        f" [{shown(paper, column.form)}]" if paper is not None else ""
    )


def _fit(text: str, width: int, *, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _wrapped(finding: Finding) -> list[str]:
    return textwrap.wrap(f"{_MARKS[finding.holds][0]} {finding.text}", _WIDTH, subsequent_indent="  ")
