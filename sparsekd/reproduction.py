"""What a reproduction is: the paper's claim, our numbers beside the paper's, and what follows from them.

    Reproduction   one figure or table: its name, source, scale, and the functions that run and draw it
    Settings       what the user asked for
    Result         what came out; plain JSON on disk, so that pages and plots can be made again without running

A function of a Reproduction is a short script over the public API; nothing here needs torch or touches files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekd.comparison import over_seeds

DASH = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A number with its standard error over `n` seeds (None where it has none: exact, or one seed)."""

    mean: float
    standard_error: float | None = None
    n: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A table's column: name, unit, and the format of its numbers (".2f", ".1e")."""

    name: str
    unit: str = ""
    form: str = ".3f"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """{row name: cells}, one cell (a number, words, or None) for each column."""

    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[Cell | str | None, ...]]

    def __post_init__(self) -> None:
        for name, cells in self.rows.items():
            if len(cells) != len(self.columns):
                raise ValueError(f"row {name!r} has {len(cells)} cells for {len(self.columns)} columns")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A sentence computed from the numbers; `holds` says whether the paper's claim reproduces (None: a remark)."""

    text: str
    holds: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user asked for.

    Attributes:
        seeds: how many; the seeds are 0 .. seeds-1.
        profile: "quick" or "full".
        rows, teacher: packed rows and a model to use instead of the built-in corpus and its teacher.
        data: a folder of CIFAR-100 for fig2c.
        say: takes lines of progress.
    """

    seeds: int = 3
    profile: str = "quick"
    rows: str | None = None
    teacher: str | None = None
    data: str | None = None
    say: Callable[[str], None] = field(default=print, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one reproduction found.

    Attributes:
        ours, paper: the same table's numbers, ours and the paper's (None where the paper prints none). Rows and columns
            are matched by name.
        scale: one sentence on how our scale differs from the paper's.
        findings: what the numbers say, what does not reproduce included.
        data: whatever JSON the plot needs.
    """

    ours: Table
    paper: Table | None = None
    scale: str
    findings: tuple[Finding, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """One figure or table of the paper.

    Attributes:
        title: what it shows, a few words.
        source: where in the paper, as "fig. 2a, app. K".
        claim: what the paper says there, one sentence.
        run: (its own folder, settings) -> Result.
        plot: Result -> a matplotlib Figure made by `plots.canvas` or `plots.panels`, or None.
        uses: the settings that change its result; a finished result is kept while these are the same.
    """

    title: str
    source: str
    claim: str
    run: Callable[[Path, Settings], Result]
    plot: Callable[[Result], Any] | None = None
    uses: tuple[str, ...] = ("seeds", "profile")


def over(values: Iterable[float | None]) -> Cell | None:
    """The mean of one value per seed, with its standard error; None of no values."""
    found = over_seeds(values)
    return Cell(**found) if found else None


def exact(*values: float | str | None) -> tuple[Cell | str | None, ...]:
    """Cells without errors, for the paper's numbers and for what is computed exactly."""
    return tuple(Cell(mean=float(v)) if isinstance(v, int | float) else v for v in values)


def shown(cell: Cell | str | None, form: str) -> str:
    """A cell as text: "2.81 ± 0.01", words as they are, a dash for None. Minus signs are true ones."""
    if cell is None or isinstance(cell, str):
        return cell or DASH
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:{form}}"
    return f"{cell.mean:{form}}{error}".replace("-", "−")


def beside(result: Result) -> tuple[list[Column], list[tuple[str, list[tuple[Any, Any]]]]]:
    """Our table and the paper's as one: columns, and for each row its (ours, paper's) cells; ours come first."""
    tables = [result.ours, *([result.paper] if result.paper else [])]
    columns = list({c.name: c for table in reversed(tables) for c in table.columns}.values())
    columns.sort(key=lambda c: _place(c, result.ours.columns))
    names = dict.fromkeys(name for table in tables for name in table.rows)
    return columns, [
        (name, [(_cell(result.ours, name, c), _cell(result.paper, name, c)) for c in columns]) for name in names
    ]


def _place(column: Column, columns: Sequence[Column]) -> int:
    return next((i for i, c in enumerate(columns) if c.name == column.name), len(columns))


def _cell(table: Table | None, row: str, column: Column) -> Cell | str | None:
    if table is None or row not in table.rows:
        return None
    names = [c.name for c in table.columns]
    return table.rows[row][names.index(column.name)] if column.name in names else None


# -- JSON


def to_json(result: Result) -> dict[str, Any]:
    """The result as plain JSON values; inf and nan, which JSON lacks, become those words."""
    plain: dict[str, Any] = _finite(dataclasses.asdict(result))
    return plain


def from_json(value: Mapping[str, Any]) -> Result:
    """The result that `to_json` wrote; KeyError and TypeError on what is none."""
    return Result(
        ours=_table(value["ours"]),
        paper=_table(value["paper"]) if value["paper"] else None,
        scale=value["scale"],
        findings=tuple(Finding(**f) for f in value["findings"]),
        data=value["data"],
    )


def _table(value: Mapping[str, Any]) -> Table:
    rows = {
        name: tuple(_cell_from(cell) if isinstance(cell, dict) else cell for cell in cells)
        for name, cells in value["rows"].items()
    }
    return Table(columns=tuple(Column(**c) for c in value["columns"]), rows=rows)


def _cell_from(value: Mapping[str, Any]) -> Cell:
    error = value["standard_error"]
    return Cell(mean=float(value["mean"]), standard_error=None if error is None else float(error), n=value["n"])


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
