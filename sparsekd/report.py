"""A finished run's folder -> `report.json` (numbers) and one self-contained `report.html` to look at.

Reads only the JSON that the other stages wrote: no model, no torch. What is missing or damaged becomes a
visible note, never a crash and never a guess. Losses are in nats per token; rates are shares in [0, 1].
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekd import __version__
from sparsekd.comparison import compare, comparisons, over_seeds, verdict
from sparsekd.errors import SourceError
from sparsekd.report_page import render_html

__all__ = ["aggregate", "render_html", "report", "terminal_table"]

Summary = dict[str, Any]

_PER_SEED = ("perplexity", "bits_per_byte", "ece")
_STUDENT = re.compile(r"(?P<method>.+)-s(?P<seed>\d+)")
_RESULTS = ("evaluation.json", "metrics.json")
_BASELINES = ("ce", "full_kd")


def report(folder: str | Path, out: str | Path | None = None) -> Summary:
    """Writes `report.html` and `report.json` into `out` (default: the run's folder); returns the summary.

    Raises SourceError where the folder holds no results at all.
    """
    summary = aggregate(folder)
    target = Path(folder if out is None else out)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / "report.html", render_html(summary))
    _write(target / "report.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return summary


def aggregate(folder: str | Path) -> Summary:
    """Every number the report shows, as plain JSON: None where it could not be computed, `notes` says why."""
    root = Path(folder)
    notes: list[str] = []
    run = _read(root / "run.json", root, notes) or {}
    methods = [_method(root, spec, run, notes) for spec in _methods(root, run)]
    if not any(m["students"] for m in methods) and not run:
        raise SourceError(
            f"no results in {root}: neither run.json nor a folder with evaluation.json, in it or in its students/, is "
            f"there; make them first, with `sparsekd evaluate model={root}/STUDENT` or `sparsekd demo out={root}`"
        )
    compare(methods, notes)
    _name_strangers(root, methods, notes)
    summary: Summary = {key: run.get(key) for key in ("title", "profile", "machine", "seeds", "corpus", "student")}
    summary |= {key: run.get(key) or {} for key in ("commands", "seconds", "versions", "teacher")}
    summary["versions"] = {"sparsekd": __version__} | _dict(summary["versions"])
    summary["teacher"] = _dict(summary["teacher"]) | {"evaluation": _evaluation(root / "teacher", root, notes)}
    summary["methods"] = methods
    summary["storage"] = _storage(root, methods, summary["teacher"], notes)
    summary["unique_ids"] = _unique_ids(root, notes)
    summary["comparisons"] = comparisons(methods)
    summary["verdict"] = verdict(methods, summary["comparisons"])
    summary["notes"] = notes
    return summary


# -- one method: its students, seed by seed


def _methods(root: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The methods run.json lists, or without it those the students' folders are named after."""
    listed = [m for m in _list(run.get("methods")) if isinstance(m, dict) and m.get("name")]
    if listed:
        return listed
    first = {name: folder for name, _, folder in reversed(_found(root))}
    return [_as_trained(name, folder) for name, folder in sorted(first.items(), key=lambda each: each[1])]


def _found(root: Path) -> list[tuple[str, int, Path]]:
    """(method, seed, folder) of the students in `students/`, else in the folder itself: NAME-sSEED, or any other name
    whose seed its recipe knows."""
    home = root / "students" if (root / "students").is_dir() else root
    found = []
    for folder in sorted(home.glob("*")):
        named, holds = _STUDENT.fullmatch(folder.name), any((folder / file).exists() for file in _RESULTS)
        if named and (holds or home != root):
            found.append((named["method"], int(named["seed"]), folder))
        elif holds and folder.name != "teacher":
            seed = _dict(_read(folder / "recipe.json", root, [])).get("seed")
            found.append((folder.name, seed if isinstance(seed, int) else 0, folder))
    return found


def _as_trained(name: str, folder: Path) -> dict[str, Any]:
    """A method that run.json does not list, as the recipe of a student of it says: its part, and its cache's place."""
    recipe = _dict(_read(folder / "recipe.json", folder, []))
    trained, named = recipe.get("method"), role(name)
    if trained in _BASELINES:  # which may have read its rows from a cache
        return {"name": name, "role": trained}
    cache = _dict(recipe.get("beside")).get("cache")
    part = "other" if trained and named in _BASELINES else named
    return {"name": name, "role": part, "cache": os.path.abspath(folder / cache) if isinstance(cache, str) else None}


def _method(root: Path, spec: Mapping[str, Any], run: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    name = str(spec["name"])
    seeds = [s for s in _list(run.get("seeds")) if isinstance(s, int)]
    there = [(seed, folder) for method, seed, folder in _found(root) if method == name]
    wanted = [(seed, root / "students" / f"{name}-s{seed}") for seed in seeds] or sorted(there)
    students = [s for s in (_student(root, folder, seed, notes) for seed, folder in wanted) if s]
    part = spec.get("role") or role(name)
    method: dict[str, Any] = {"name": name, "label": str(spec.get("label") or name), "role": part}
    method |= {"cache": spec.get("cache"), "students": students}
    for key in ("loss", "acceptance", "agreement"):
        method[key] = over_seeds(s[key] and s[key]["mean"] for s in students)
    for key in _PER_SEED:
        method[key] = over_seeds(s[key] for s in students)
    method["reliability"] = _pool([s["reliability"] for s in students])
    method["curve"] = _mean_curve([s["curve"] for s in students])
    return method


_ROLES = {
    "ce": "ce",
    "full": "full_kd",
    "systematic": "systematic",
    "rs": "rs",
    "random": "rs",
    "topk": "topk",
    "top_k": "topk",
}


def role(name: str) -> str:
    """What a method is, by its name's beginning: ce, full_kd, systematic, rs (random sampling), topk or other."""
    return next((kind for prefix, kind in _ROLES.items() if name.startswith(prefix)), "other")


def _student(root: Path, folder: Path, seed: int, notes: list[str]) -> dict[str, Any] | None:
    if not folder.is_dir():
        notes.append(f"students/{folder.name} is missing.")
        return None
    evaluation = _evaluation(folder, root, notes)
    training = _read(folder / "metrics.json", root, notes)
    if evaluation is None and training is None:
        return None
    log = [e for e in _list(_dict(training).get("log")) if isinstance(e, dict)]
    points = [[_number(e.get("step")), _number(e.get("eval_loss"))] for e in log]
    return (evaluation or _evaluation_of({})) | {
        "seed": seed,
        "tokens_per_second": _number(_dict(training).get("tokens_per_second")),
        "seconds": _number(_dict(training).get("seconds")),
        "curve": [p for p in points if None not in p],
    }


def _evaluation(folder: Path, root: Path, notes: list[str]) -> dict[str, Any] | None:
    raw = _read(folder / "evaluation.json", root, notes)
    return None if raw is None else _evaluation_of(raw)


def _evaluation_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: _number(raw.get(key)) for key in (*_PER_SEED, "tokens", "rows")}
    means = {key: _estimate_of(raw.get(key)) for key in ("loss", "acceptance", "agreement")}
    return {**means, **numbers, "reliability": _bins(raw.get("reliability"))}


def _estimate_of(raw: Any) -> dict[str, float | None] | None:
    mean = _number(raw.get("mean") if isinstance(raw, dict) else raw)
    return None if mean is None else {"mean": mean, "standard_error": _number(_dict(raw).get("standard_error"))}


def _bins(raw: Any) -> list[dict[str, Any]]:
    keys = ("count", "confidence", "accuracy")
    return [{key: _number(b.get(key)) for key in keys} for b in _list(raw) if isinstance(b, dict)]


def _pool(diagrams: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Bin by bin, the seeds' counts added and their means weighted by count."""
    filled = [d for d in diagrams if d]
    if not filled or len({len(d) for d in filled}) > 1:
        return []
    return [_pool_bin(same) for same in zip(*filled, strict=True)]


def _pool_bin(bins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    used = [b for b in bins if b["count"] and b["confidence"] is not None and b["accuracy"] is not None]
    n = sum(b["count"] for b in used)
    means = {key: sum(b["count"] * b[key] for b in used) / n if n else None for key in ("confidence", "accuracy")}
    return {"count": n, **means}


def _mean_curve(curves: Iterable[list[list[float]]]) -> list[list[float]]:
    """[step, mean loss] at the steps that every seed evaluated."""
    tables: list[dict[float, float]] = [{p[0]: p[1] for p in curve} for curve in curves if curve]
    shared = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    return [[step, statistics.fmean(t[step] for t in tables)] for step in shared]


# -- caches, unique ids, files


def _storage(
    root: Path, methods: Sequence[dict[str, Any]], teacher: Mapping[str, Any], notes: list[str]
) -> list[dict[str, Any]]:
    """Bytes per token of each cache, and of dense float16 logits (2 bytes · logit width) beside them."""
    bars = []
    width = _number(teacher.get("vocab_size"))
    for m in methods:
        m["bytes_per_token"] = m["unique_ids"] = None
        if not m["cache"]:
            continue
        folder = root / "caches" / str(m["cache"])
        manifest = _dict(_read(folder / "manifest.json", root, notes))
        stats = _dict(_read(folder / "stats.json", root, [])) or _stats_of(manifest)
        width = _number(_dict(manifest.get("spec")).get("logit_width")) or width
        m["bytes_per_token"] = _number(stats.get("bytes_per_token"))
        m["unique_ids"] = _number(_dict(stats.get("unique_ids")).get("mean"))
        if m["bytes_per_token"]:
            bars.append({"name": m["name"], "label": m["label"], "bytes_per_token": m["bytes_per_token"]})
    dense = [{"name": "dense", "label": "All logits, 16 bit", "bytes_per_token": 2 * width}] if width else []
    return dense + bars


def _stats_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the demo's stats.json says of a cache, as `inspect.cache_stats` takes it from the manifest."""
    totals = {key: _number(value) for key, value in _dict(manifest.get("stats")).items()}
    size = sum(_number(_dict(shard).get("bytes")) or 0 for shard in _list(manifest.get("shards")))
    tokens, pairs, positions = (totals.get(key) for key in ("tokens", "pairs", "positions"))
    ids = pairs / positions if pairs and positions else None
    return {"bytes_per_token": size / tokens if size and tokens else None, "unique_ids": {"mean": ids}}


def _unique_ids(root: Path, notes: list[str]) -> dict[str, Any] | None:
    raw = _read(root / "unique_ids.json", root, notes)
    points = zip(_list(_dict(raw).get("rounds")), _list(_dict(raw).get("unique")), strict=False)
    pairs = [(_number(r), _number(u)) for r, u in points]
    good = [(r, u) for r, u in pairs if r and u and r > 0 and u > 0]
    if not good:
        return None
    law = _dict(_dict(raw).get("power_law"))
    fit = {key: _number(law.get(key)) for key in ("exponent", "prefactor")}
    return {"rounds": [r for r, _ in good], "unique": [u for _, u in good], "power_law": fit}


def _name_strangers(root: Path, methods: Sequence[Mapping[str, Any]], notes: list[str]) -> None:
    known = {f"{m['name']}-s{s['seed']}" for m in methods for s in m["students"]}
    folders = sorted(p.name for p in root.glob("students/*") if p.is_dir() and _STUDENT.fullmatch(p.name))
    notes.extend(f"students/{name} is not part of run.json and was left out." for name in folders if name not in known)


def _read(path: Path, root: Path, notes: list[str]) -> dict[str, Any] | None:
    """The JSON object in a file; None with a note where there is none."""
    name = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        notes.append(f"{name} is missing.")
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{name} could not be read and was left out: {type(error).__name__}.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{name} holds a {type(value).__name__} instead of an object and was left out.")
        return None
    return value


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# -- the terminal


def terminal_table(summary: Summary) -> str:
    """The results as at most 80 columns of text, method by method, the verdict below."""
    head = ("", "loss", "± se", "gap %", "ECE %", "accept %", "B/token", "speed")
    rows = [head, *(_terminal_row(m) for m in summary["methods"])]
    widths = [
        min(24, max(len(r[0]) for r in rows)),
        *(max(len(r[i]) for r in rows) for i in range(1, len(head))),
    ]
    lines = ["  ".join(_fit(c, w, left=i == 0) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *textwrap.wrap(summary["verdict"], 80)])


def _terminal_row(m: Mapping[str, Any]) -> tuple[str, ...]:
    def show(key: str, scale: float, digits: int, field: str = "mean") -> str:
        value = (m.get(key) or {}).get(field)
        return "-" if value is None else f"{value * scale:.{digits}f}"

    size = f"{m['bytes_per_token']:,.1f}" if m.get("bytes_per_token") else "-"
    loss = (show("loss", 1, 3), show("loss", 1, 3, "standard_error"))
    rates = (show("gap_closed", 100, 0), show("ece", 100, 1), show("acceptance", 100, 1))
    return (m["label"], *loss, *rates, size, show("relative_speed", 1, 2))


def _fit(text: str, width: int, *, left: bool) -> str:
    short = text if len(text) <= width else text[: width - 1] + "…"
    return short.ljust(width) if left else short.rjust(width)
