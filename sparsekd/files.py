"""Files: one JSON text per value, all-or-nothing writing, random access to local or remote bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from .errors import FormatError, StorageError

# --- JSON -------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII; ValueError for NaN and infinities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode()


def strict_json(data: bytes, where: str) -> Any:
    """The value of a JSON text; FormatError for duplicate keys, NaN, deep nesting and anything malformed."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))
        raise FormatError(f"{where}: its JSON cannot be read: {reason}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"a key is there twice among {sorted(key for key, _ in pairs)[:8]}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# --- writing ---------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, data: bytes) -> None:
    """Puts `data` at `path` so that every reader, and every crash, sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.parent / _temporary_name(path.name)
    try:
        _write_and_sync(temporary, data)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(_storage_message(path, len(data), error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """`value` as strict JSON, written atomically: where a file's presence means "complete", half of one must not be."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def _write_and_sync(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """A rename is only safe from a power cut once its folder is synced; Windows cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_message(path: Path, size: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left for {path} ({size} bytes); every file finished before is kept: "
            "free some space and run the same command again to continue"
        )
    return f"cannot write {path} ({size} bytes): {error.strerror or error}; files finished before are kept"


# --- temporary files ----------------------------------------------------------------------------------------


def _temporary_name(name: str) -> str:
    return f".{name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def remove_stale_files(folder: str | Path) -> None:
    """Removes temporary files whose writer is dead, or that nobody has touched for an hour; others stay."""
    for path in Path(folder).glob(".*.tmp"):
        match = re.fullmatch(r"\..+\.([A-Za-z0-9-]*)\.(\d{1,9})\.[0-9a-f]{8}\.tmp", path.name)
        with suppress(OSError):
            if match and (_is_dead(match[1], int(match[2])) or time.time() - path.stat().st_mtime > 3600):
                path.unlink()


def _is_dead(host: str, process: int) -> bool:
    if host != _host() or os.name == "nt":  # on Windows os.kill(pid, 0) would end the process
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


# --- where the bytes come from ----------------------------------------------------------------------------


class Source(Protocol):
    """Random access to the bytes of one file; `remote`: each read is a request over a network."""

    size: int
    remote: bool

    def read(self, start: int, end: int) -> bytes: ...
    def close(self) -> None: ...


class _Mapped:
    """A local file, memory-mapped; slices are copies, so closing never pulls memory from under an array."""

    remote = False

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map = _mapped(file.fileno()) if self.size else None

    def read(self, start: int, end: int) -> bytes:
        return self._map[start:end] if self._map else b""

    def close(self) -> None:
        if self._map:
            self._map.close()


# Whether a file that is only mapped takes one of a process's descriptors (macOS gives 256, Linux 1,024).
MAPS_HOLD_DESCRIPTORS = sys.version_info < (3, 13) or sys.platform == "win32"


def _mapped(descriptor: int) -> mmap.mmap:
    if sys.version_info < (3, 13) or sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ, trackfd=False)


class _Ranges:
    """A file behind an fsspec URL, read by byte ranges: one request per row."""

    remote = True

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self._files, self._path = url_to_fs(url)
        self.size = int(self._files.info(self._path)["size"] or 0)
        self._fetched: dict[tuple[int, int], bytes] = {}

    def read(self, start: int, end: int) -> bytes:
        if (held := self._fetched.pop((start, end), None)) is not None:
            return held
        return bytes(self._files.cat_file(self._path, start=start, end=end)) if end > start else b""

    @staticmethod
    def fetch(wanted: Sequence[tuple[_Ranges, int, int]]) -> None:
        """Asks for ranges together and holds them for the one `read` of each; what fails is asked for again there."""
        sources, starts, ends = zip(*wanted, strict=True)
        paths = [source._path for source in sources]
        blocks = sources[0]._files.cat_ranges(paths, starts, ends, on_error="return")
        for source, start, end, block in zip(sources, starts, ends, blocks, strict=True):
            if isinstance(block, bytes):
                source._fetched[start, end] = block

    def close(self) -> None:
        pass


def is_url(path: str | Path) -> bool:
    """Whether fsspec reads it; everything else is a local path."""
    return "://" in str(path)


def open_source(path: str | Path) -> Source:
    """The bytes of a local path or an fsspec URL.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it is there and cannot be opened.
    """
    try:
        return _Ranges(str(path)) if is_url(path) else _Mapped(path)
    except FileNotFoundError:
        raise
    except (OSError, ImportError, ValueError) as error:  # fsspec: an unknown scheme, a missing driver
        raise StorageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def fetch(wanted: Sequence[tuple[Source, int, int]]) -> None:
    """Asks for the bytes [start, end) of sources of one place together, where each is a request over a network: reading
    them once then waits for nothing. Local ones are left to `read`."""
    remote = [(source, start, end) for source, start, end in wanted if isinstance(source, _Ranges) and end > start]
    if remote:
        _Ranges.fetch(remote)


def join(folder: str | Path, name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def list_folder(folder: str | Path) -> list[str]:
    """The names in a local folder or behind an fsspec URL, sorted; none when there is no such folder."""
    try:
        if not is_url(folder):
            return sorted(os.listdir(folder))
        from fsspec.core import url_to_fs

        files, path = url_to_fs(str(folder))
        return sorted(str(each).rstrip("/").rsplit("/", 1)[-1] for each in files.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_file(path: str | Path) -> bytes:
    """All bytes of a local path or an fsspec URL; raises what `open_source` raises."""
    source = open_source(path)
    try:
        return source.read(0, source.size)
    finally:
        source.close()


def file_size(path: str | Path) -> int:
    """Bytes of a local path or an fsspec URL."""
    source = open_source(path)
    try:
        return source.size
    finally:
        source.close()


def sha256_file(path: str | Path) -> str:
    """The sha256 of a local file or fsspec URL, as hex."""
    digest = hashlib.sha256()
    source = open_source(path)
    try:
        for start in range(0, source.size, 2**22):
            digest.update(source.read(start, min(start + 2**22, source.size)))
    finally:
        source.close()
    return digest.hexdigest()
