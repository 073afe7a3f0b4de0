"""An append-only record of JSON lines that survives interruption: what a paid-for answer goes into at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from .errors import FormatError, RecipeError, StorageError
from .files import canonical_json, strict_json


class Journal:
    """Lines of one file, each on the disk before `append` returns; threads may share it, processes may not.

    A last line that a crash tore is cut off at opening, and whatever it was is done again.

    Attributes:
        lines: the records, those of earlier runs first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._writing = threading.Lock()
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}; give another out=FOLDER") from error
        try:
            self._lock_out_others()
            self.lines: list[dict[str, Any]] = self._read()
        except BaseException:
            self.close()
            raise

    def append(self, line: dict[str, Any]) -> None:
        """Adds a record; it is on the disk when this returns."""
        data = memoryview(canonical_json(line) + b"\n")
        with self._writing:
            try:
                while data:
                    data = data[os.write(self._file, data) :]
                os.fsync(self._file)
            except OSError as error:
                raise StorageError(
                    f"cannot write {self.path}: {error.strerror}; what is in it is kept, run the same command again"
                ) from error
            self.lines.append(line)

    def close(self) -> None:
        """Closes the file; others may open it then."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock_out_others(self) -> None:
        """Two runs into one record would ask everything twice. Windows has no such lock: there it is on trust."""
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"another run is writing {self.path}; wait for it, or give another out=FOLDER") from None
        except OSError:  # a file system without locks
            pass

    def _read(self) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        raw, lines = whole.split(b"\n")[:-1], []
        for number, text in enumerate(raw, 1):
            try:
                line = strict_json(text, f"{self.path}:{number}")
                if not isinstance(line, dict):
                    raise FormatError(f"{self.path}:{number} is no record")
            except FormatError as error:
                if number == len(raw):  # a power cut may keep a line's end and lose its middle
                    whole = whole[: -len(text) - 1]
                    break
                raise FormatError(f"{error}; give another out=FOLDER, or delete that line") from None
            lines.append(line)
        if len(whole) < len(data):
            os.ftruncate(self._file, len(whole))
        return lines
