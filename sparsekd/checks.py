"""Checks of settings that several programs share: sizes, seeds and the folder that a program writes."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RecipeError, StorageError


def check_at_least(least: float, **settings: float | None) -> None:
    """RecipeError for the first setting below `least`; None means "not set" and passes."""
    for name, value in settings.items():
        if value is not None and not value >= least:  # so written, a NaN fails too
            raise RecipeError(f"{name}={value} is too small; give at least {least}")


def check_seed(seed: int) -> None:
    """RecipeError for a seed that 64 bits cannot hold: another seed would give the same draws."""
    if not 0 <= seed < 2**64:
        raise RecipeError(f"seed={seed} is outside [0, 2^64); choose one inside it")


def make_folder(path: str | Path) -> Path:
    """The folder, made with its parents where it is missing.

    Raises:
        StorageError: a file has its name or a parent's, or it may not be written.
    """
    folder = Path(path).expanduser()
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise StorageError(f"{place} is a file, not a folder; give another out=FOLDER")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}; give another out=FOLDER") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write in {folder}: permission denied; give another out=FOLDER")
    return folder
