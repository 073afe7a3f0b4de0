"""The folder that rows are written into: one split's arrays, and a name that appears only when all of it is there."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import spool
from .checks import make_folder
from .errors import MismatchError, StorageError
from .packed import RowsReader, read_manifest


def write_rows(
    folder: Path, name: str, blocks: Iterable[np.ndarray], *, rows: int, seq_len: int, vocab_size: int
) -> int:
    """A split's three arrays from blocks [B, L] of flagged tokens (see `spool`); returns its supervised tokens."""
    id_type = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    supervised = 0
    with ExitStack() as stack:
        ids = stack.enter_context(_array_file(folder / f"{name}_ids.npy", id_type, (rows, seq_len)))
        bits = [
            stack.enter_context(_array_file(folder / f"{name}_{kind}.npy", np.dtype("u1"), (rows, -(-seq_len // 8))))
            for kind in ("starts", "supervised")
        ]
        for flagged_BL in blocks:
            ids.write((flagged_BL & spool.ID_MASK).astype(id_type).tobytes())
            for file, flag in zip(bits, (spool.STARTS, spool.SUPERVISED), strict=True):
                file.write(np.packbits(flagged_BL & flag != 0, axis=1, bitorder="little").tobytes())
            supervised += int(np.count_nonzero(flagged_BL & spool.SUPERVISED))
    return supervised


@contextmanager
def _array_file(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """An .npy file whose rows are appended: a full disk raises here, and would crash a memory map."""
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
        file.flush()
        os.fsync(file.fileno())


# What a source's description says of its contents.
_OF_CONTENTS = {f"source.{name}" for name in ("files", "bytes", "sampled_sha256", "sha256", "python")}


def already_packed(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of rows packed before with the same settings, or None if `out` is free."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise StorageError(f"{out} is a file, not a folder; give another out=FOLDER")
    if not (out / "manifest.json").exists():
        raise MismatchError(f"{out} is not empty and holds no packed rows; give another out=FOLDER")
    manifest = read_manifest(out)
    was, now = _flat(manifest.get("settings", {})), _flat(settings)
    for key in [*now, *was]:
        if was.get(key) != now.get(key):
            others = f"pack with {key}={was.get(key)}"
            raise MismatchError(
                f"{out} was packed with {key}={was.get(key)}, these settings have {now.get(key)}; choose another out=, "
                f"or {'bring the documents back as they were' if key in _OF_CONTENTS else others}"
            )
    for split in manifest.get("splits") or ["train"]:
        RowsReader(out, split).close()  # complete, or a SourceError that says what is damaged
    return manifest


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its name at the end; after any error it is gone."""
    make_folder(out.parent)
    prefix = f".{out.name}.packing-{socket.gethostname()}-"
    _remove_abandoned(out.parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        os.rename(folder, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"the disk of {out} is full ({error}); nothing was kept: free some space and pack again "
            "(8 bytes per token while packing, 2 to 4 afterwards)"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    """For mkdtemp makes private folders, and rows are as public as other files. Reading the mask sets it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Delete what a killed pack of this machine left; its process id is in the name."""
    for folder in parent.glob(f"{prefix}*"):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
