"""Where documents come from: paths, globs, folders, `datasets` ids, and Python's own library as "builtin"."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import RecipeError, SourceError

JSON_LINES = (".jsonl", ".ndjson", ".json")
Origin = tuple[str, str]  # kind ("builtin", "file", "saved", "id") and place (a path or an id)

# Left out of "builtin": tests, whole programs, and tables that a script or a build wrote (codec maps, help
# topics).
_NOT_PROSE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
_NOT_STDLIB = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
_BUILD_MADE = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


# -- which files, which datasets


def as_list(source: Any) -> list[Any]:
    """A list of the names in `source`, which is one name or several."""
    if isinstance(source, (str, Path)):
        return [source]
    if isinstance(source, (list, tuple)) and source:  # no generators: packing reads the source more than once
        return list(source)
    raise RecipeError(f"source={source!r} names nothing; give a path, a glob, a `datasets` id or a list of those")


def resolve(source: str) -> list[Origin]:
    """What one name stands for: files in a fixed order, a saved dataset, a dataset's id, or the builtin corpus.

    Raises:
        SourceError: a path, glob or folder without files; the message shows what the nearest folder holds.
        RecipeError: an empty name.
    """
    if source == "builtin":
        return [("builtin", source)]
    if not source:
        raise RecipeError("source is empty; give a path, a glob, a `datasets` id, or builtin")
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return [("file", str(path))]
    if any(sign in source for sign in "*?["):
        return _glob(source)
    if _looks_like_path(source):
        raise SourceError(missing(path))
    return [("id", source)]


def _folder(path: Path) -> list[Origin]:
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return [("saved", str(path))]
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    if not files:
        raise SourceError(f"the folder {path} holds no file; give one with documents in it")
    return [("file", str(file)) for file in files]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _glob(pattern: str) -> list[Origin]:
    matches = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [match for match in matches if Path(match).is_file()]
    if not files:
        raise SourceError(f"the glob {pattern!r} matches no file; {_nearby(Path(pattern))}")
    return [("file", file) for file in files]


def _looks_like_path(source: str) -> bool:
    known = (".txt", ".md", ".py", ".parquet", ".gz", *JSON_LINES)
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.lower().endswith(known)


def missing(path: Path) -> str:
    """The sentence for a path that is not there."""
    return f"{path} does not exist; {_nearby(path)}"


def _nearby(path: Path) -> str:
    """What the nearest folder that exists holds: most missing files are misspelt or one folder away."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"the nearest folder {folder} holds {', '.join(names[:8]) or 'nothing'}{more}"


# Of a file's contents, how many stretches of how many bytes are compared: all of a file of up to 1 MB.
_STRETCHES, _STRETCH = 16, 2**16


def sampled_sha256(files: Iterable[str]) -> str:
    """sha256 over files' names, sizes and contents, of a large one 1 MB in evenly spread stretches: an edit that keeps
    every size is noticed in seconds, but for one inside a large file. Pipes, which have no size, stay unread."""
    digest = hashlib.sha256()
    for path in files:
        size = os.stat(path).st_size
        digest.update(f"{Path(path).name}\0{size}\0".encode(errors="surrogateescape"))
        for part in _stretches(path, size) if size else ():
            digest.update(part)
    return digest.hexdigest()


def _stretches(path: str, size: int) -> Iterator[bytes]:
    step = max(_STRETCH, -(-(size - _STRETCH) // (_STRETCHES - 1)))
    try:
        with open(path, "rb") as file:
            for first in range(0, size, step):
                file.seek(first)
                yield file.read(_STRETCH)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> SourceError:
    """What is raised of a file that is there and cannot be read."""
    return SourceError(f"{path} cannot be read: {error}; repair it or leave it out of source")


# -- the builtin corpus


def builtin_files() -> list[Path]:
    """The standard library's own Python sources in the order of their relative paths; tests are left out.

    Raises:
        SourceError: this Python carries no sources (a frozen or zipped standard library).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_prose(name)]  # site-packages may hold 10^5 files
        files += [Path(folder, name) for name in names if name.endswith(".py") and _is_prose(name)]
    files.sort(key=Path.as_posix)
    if not files:
        raise SourceError(f"this Python has no sources in {root}; give source=FILES instead of source=builtin")
    return files


def _is_prose(name: str) -> bool:
    return name not in _NOT_PROSE | _NOT_STDLIB and not name.startswith(_BUILD_MADE)


def builtin_sha256() -> str:
    """sha256 over the builtin corpus's relative paths and contents; it changes with the Python version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256()
    for path in builtin_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
