"""The folder of a training run: whose it is, whether it is finished, where it goes on, and what its log says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsekd.checks import make_folder
from sparsekd.errors import MismatchError, StorageError
from sparsekd.files import write_json
from sparsekd.making import processes

# Settings that may change between the parts of one run.
_FREE = {
    "out",
    "log_steps",
    "save_steps",
    "keep_checkpoints",
    "report_to",
    "run_name",
    "dataloader_workers",
    "eval_limit",
    "data",
    "beside",
}
# What the system, safetensors, and torch.save (which loses the system's word) say of a disk or quota that is full.
_FULL = ("No space left on device", "quota exceeded", "inline_container.cc", "PytorchStreamWriter", "iostream error")
_PATHS = ("cache", "rows", "eval_rows", "teacher", "tokenizer", "student")


def last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that was written whole (its trainer state comes last)."""
    found = [p for p in out.glob("checkpoint-*") if _is_whole(p)]
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):  # a kill while it was written leaves half a file
        return False
    return len(list(checkpoint.glob("rng_state*"))) >= processes()


def finished(out: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of a run that is complete; MismatchError for a folder that belongs to another recipe."""
    if not (out / "recipe.json").exists():
        if out.exists() and not out.is_dir():
            make_folder(out)  # refuses
        if out.exists() and any(out.iterdir()):
            raise MismatchError(f"{out} is not empty and holds no training run; give another out=FOLDER")
        return None
    old, beside = json.loads((out / "recipe.json").read_text()), _beside(out, recipe)
    for key in sorted((old.keys() | recipe.keys()) - _FREE):
        moved = key in beside and beside[key] == old.get("beside", {}).get(key)
        if old.get(key) != recipe.get(key) and not moved:
            raise MismatchError(
                f"{out} holds a run with {key}={old.get(key)!r}, this one has {recipe.get(key)!r}; give another "
                "out=FOLDER, or the same settings to resume"
            )
    done = out / "metrics.json"
    return json.loads(done.read_text()) if done.exists() else None


def _beside(out: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """Where the run's inputs lie, seen from its folder: what stays as it is when all of them are moved together."""
    given = {key: recipe.get(key) for key in _PATHS}
    local = {k: os.path.expanduser(v) for k, v in given.items() if isinstance(v, str)}
    return {k: os.path.relpath(v, out) for k, v in local.items() if os.path.exists(v)}


def start(out: Path, recipe: dict[str, Any], identity: dict[str, Any]) -> None:
    """Say in `out/recipe.json` whose folder this is."""
    write_json(out / "recipe.json", recipe | {"data": identity, "beside": _beside(out, recipe)})


def check_unchanged(out: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on with a run whose training set has been made anew, otherwise, under the same path."""
    path = out / "recipe.json"
    old = json.loads(path.read_text())["data"] if path.exists() else identity
    for key, value in identity.items():
        if old.get(key) != value:
            raise MismatchError(
                f"the training set's {key} differ: {out} was started with {old.get(key)}, they are {value} now; give "
                "another out=FOLDER to start anew"
            )


@contextmanager
def full_disk_said(out: Path) -> Iterator[None]:
    """StorageError in place of the half dozen errors of a disk that fills up while checkpoints are written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in _FULL):
            raise
        raise StorageError(
            f"the disk of {out} is full; free some space, or give keep_checkpoints=1, and run the same command again: "
            "it goes on from the last whole checkpoint"
        ) from error


def readable_log(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses and evaluations by step; a number that JSON does not know (a gradient's inf) becomes None."""
    kept = (entry for entry in history if "loss" in entry or "eval_loss" in entry)
    return [{k: v if math.isfinite(v) else None for k, v in entry.items()} for entry in kept]


def mean_logged(log: list[dict[str, Any]]) -> float:
    """The mean loss of all steps: each entry is the mean of the steps since the entry before it."""
    total, last = 0.0, 0
    for entry in log:
        if "loss" in entry:
            total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    return total / max(last, 1)
