"""Run the paper's figures and tables again: `reproduce("fig2a")`, or all of them, and one page to read.

Each name writes `out/NAME/result.json` (numbers) and `NAME.png` and `.svg` (its plot); `out/index.html` shows every
result that the folder holds, with the paper's numbers beside ours. What is complete is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekd import __version__, plots
from sparsekd.calibration import FIG_3
from sparsekd.crosstok import CROSSTOK
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.files import write_atomically
from sparsekd.frontier import FRONTIER
from sparsekd.laws import LAWS_OF_APPENDIX_A
from sparsekd.measures import MEASURES
from sparsekd.qa import QA
from sparsekd.reproduce_page import render_page, terminal_text
from sparsekd.reproduction import Reproduction, Result, Settings, from_json, to_json
from sparsekd.tables import TABLES
from sparsekd.teacher_tables import TEACHER_TABLES
from sparsekd.toy_images import FIG_2C
from sparsekd.toy_tasks import FIG_2B
from sparsekd.toys import FIG_2A
from sparsekd.unique_tokens import FIG_5

# In the order of the paper, which is that of the page.
REPRODUCTIONS: dict[str, Reproduction] = {
    "fig2a": FIG_2A,
    "fig2b": FIG_2B,
    "fig2c": FIG_2C,
    "fig3": FIG_3,
    "table1": TABLES["table1"],
    "table2": TABLES["table2"],
    "table3": MEASURES["table3"],
    "table4": MEASURES["table4"],
    "table5": TABLES["table5"],
    "fig5": FIG_5,
    "table9": TABLES["table9"],
    "table10": MEASURES["table10"],
    "table11": TEACHER_TABLES["table11"],
    "table12": TABLES["table12"],
    "table13": TEACHER_TABLES["table13"],
    "frontier": FRONTIER,
    "crosstok": CROSSTOK,
    "qa": QA,
    "laws": LAWS_OF_APPENDIX_A,
    "quantisation": MEASURES["quantisation"],
}
PROFILES = ("quick", "full")


def reproduce(
    *,
    name: str = "all",
    out: str | Path = "reproduce",
    rows: str | None = None,
    teacher: str | None = None,
    data: str | None = None,
    seeds: int = 3,
    profile: str = "quick",
    progress: bool = True,
) -> dict[str, Result]:
    """Run one figure or table of the paper, or all, and write numbers, plots and `index.html`.

    Args:
        name: fig2a, fig2b, ... (see REPRODUCTIONS), several joined by commas, or all.
        out: the folder; results that are complete in it are kept, so an interrupted run can be started again.
        rows: packed rows to use instead of the built-in corpus.
        teacher: a model to use instead of the one trained on the built-in corpus; needs rows packed with its tokenizer.
        data: a folder of CIFAR-100 (its python files, or one folder of images for each class) for fig2c.
        seeds: repetitions with the seeds 0 .. seeds-1; every cell is a mean over them with its standard error.
        profile: quick (minutes on one CPU core) or full (nearer to the paper's sizes).

    Returns:
        {name: Result} of what was asked for.

    Raises:
        RecipeError: an unknown name or profile, fewer than one seed.
        MismatchError: the folder holds a result made with other settings.
    """
    chosen = names_of(name)
    settings = _settings(rows, teacher, data, seeds, profile, progress)
    folder, results = Path(out), {}
    for each in chosen:
        results[each] = run_one(each, folder, settings)
        settings.say(terminal_text(each, REPRODUCTIONS[each], results[each]))
        page = write_page(folder)  # after each, so that an interrupted run has one too
    settings.say(f"{page} shows all results in {folder}")
    return results


def names_of(name: str) -> list[str]:
    """The names that a user's word stands for, in the page's order."""
    wanted = list(REPRODUCTIONS) if name == "all" else [part.strip() for part in name.split(",")]
    unknown = [part for part in wanted if part not in REPRODUCTIONS]
    if unknown:
        raise RecipeError(f"name={unknown[0]!r} is not one of {', '.join(REPRODUCTIONS)}, all")
    return [each for each in REPRODUCTIONS if each in wanted]


def run_one(name: str, out: Path, settings: Settings) -> Result:
    """The result of one reproduction: from its folder where it is complete there, else run, written and drawn."""
    reproduction, folder = REPRODUCTIONS[name], out / name
    asked = {key: getattr(settings, key) for key in reproduction.uses}
    kept = read_result(folder)
    if kept:
        _check_same(name, out, kept["settings"], asked)
        result = from_json(kept["result"])
        if not (folder / f"{name}.svg").exists():
            draw(name, result, folder)
        return result
    settings.say(f"{name}: {reproduction.title} ({reproduction.source})")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result = reproduction.run(folder, settings)
    seconds = round(time.perf_counter() - started, 1)
    record: dict[str, Any] = {
        "name": name,
        "title": reproduction.title,
        "source": reproduction.source,
        "settings": asked,
    }
    record |= {"seconds": seconds, "sparsekd": __version__, "result": to_json(result)}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "result.json", f"{text}\n".encode())
    draw(name, result, folder)  # from the numbers alone, so a plot that fails loses no work
    return result


def read_result(folder: Path) -> dict[str, Any] | None:
    """The record in a reproduction's folder, or None where it is missing or no result."""
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        from_json(record["result"])
        return record if isinstance(record["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def draw(name: str, result: Result, folder: Path) -> None:
    """NAME.png (for people) and NAME.svg (for the page, coloured by it); nothing without matplotlib or a plot."""
    plot = REPRODUCTIONS[name].plot
    if plot is None or not plots.available():
        return
    with plots.style():
        figure = plot(result)
        figure.savefig(folder / f"{name}.png", dpi=144, facecolor=plots.PALETTE["paper"], metadata={"Software": None})
        svg = plots.inline_svg(figure, name, REPRODUCTIONS[name].title)
    write_atomically(folder / f"{name}.svg", svg.encode())


def write_page(out: Path) -> Path:
    """`index.html` of every complete result in the folder, those of earlier runs included."""
    found = {name: record for name in REPRODUCTIONS if (record := read_result(out / name))}
    sections = {
        name: (REPRODUCTIONS[name], from_json(r["result"]), r, _svg(out / name, name)) for name, r in found.items()
    }
    path = out / "index.html"
    write_atomically(path, render_page(sections).encode())
    return path


def _svg(folder: Path, name: str) -> str:
    path = folder / f"{name}.svg"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _settings(
    rows: str | None, teacher: str | None, data: str | None, seeds: int, profile: str, progress: bool
) -> Settings:
    if profile not in PROFILES:
        raise RecipeError(f"profile={profile!r} is not one of {', '.join(PROFILES)}")
    if seeds < 1:
        raise RecipeError(f"seeds={seeds}: there must be at least 1, and 3 for an error to mean something")
    if teacher and not rows:
        raise RecipeError("a teacher needs rows packed with its tokenizer: add rows=FOLDER")
    return Settings(
        rows=rows, teacher=teacher, data=data, seeds=seeds, profile=profile, say=print if progress else _quiet
    )


def _quiet(line: str) -> None:
    """Says nothing."""


def _check_same(name: str, out: Path, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for key, value in asked.items():
        if made.get(key) != value:
            raise MismatchError(
                f"{out / name} was made with {key}={made.get(key)}, now {key}={value} is asked for; "
                f"choose another out, or delete {out / name} to run it again"
            )
