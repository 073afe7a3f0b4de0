"""Verify: every byte of a cache against what it says of itself.

    report = verify("cache/")
    report.problems             # one sentence each, none where all is sound

Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FormatError
from .files import join, list_folder, read_file, sha256_file
from .folder import any_spec, check_shard, rebuild_manifest
from .manifest import (
    MANIFEST,
    CacheSpec,
    first_difference,
    manifest_bytes,
    missing_message,
    parse_manifest,
    shard_name,
    shard_numbers,
)

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What `verify` found: rows and shards it checked, and one sentence per problem."""

    rows: int
    shards: int
    problems: list[str]


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Reads every byte of a cache: manifest, sha256, headers, every row's crc32c, codes, hash and statistics.

    `progress(done, total)` is called after each shard. Any flipped bit in any shard is reported.

    Raises:
        IncompleteError: there is no cache at all.
        VersionError: it is from a newer sparsekd.
    """
    problems: list[str] = []
    manifest = _manifest_if_sound(path, problems)
    spec = CacheSpec.from_dict(manifest["spec"]) if manifest else any_spec(path)
    present = shard_numbers(list_folder(path))
    numbers = sorted(shard for shard in present if shard < spec.shards)
    if len(numbers) < spec.shards:
        problems.append(missing_message(str(path), present, spec.shards))
    rows = 0
    for done, shard in enumerate(numbers, 1):
        rows += _verify_shard(path, spec, shard, manifest, problems)
        if progress:
            progress(done, len(numbers))
    if manifest and not problems:
        problems += _manifest_problems(path, manifest, spec)
    return VerifyReport(rows=rows, shards=len(numbers), problems=problems)


def _manifest_if_sound(path: str | Path, problems: list[str]) -> Json | None:
    file = join(path, MANIFEST)
    try:
        return parse_manifest(read_file(file), file)[0]
    except FileNotFoundError:
        return None
    except FormatError as error:
        problems.append(str(error))
        return None


def _verify_shard(path: str | Path, spec: CacheSpec, shard: int, manifest: Json | None, problems: list[str]) -> int:
    """Appends a shard's problems; returns the number of rows that were checked."""
    header, found = check_shard(path, spec, shard)
    problems += found
    file = join(path, shard_name(shard))
    recorded = manifest["shards"][shard]["sha256"] if manifest else None
    if recorded is not None:
        digest = sha256_file(file)
        if digest != recorded:
            problems.append(f"{file}: sha256 is {digest}, {MANIFEST} says {ascii(recorded)[:80]}")
    return header["rows"] if header else 0


def _manifest_problems(path: str | Path, manifest: Json, spec: CacheSpec) -> list[str]:
    rebuilt = rebuild_manifest(path, spec, checksums=True)
    if manifest_bytes(rebuilt) == read_file(join(path, MANIFEST)):
        return []
    difference = first_difference(rebuilt, manifest) or ("its form", "canonical", "not canonical")
    key, real, said = difference
    return [f"{join(path, MANIFEST)}: {key} is {ascii(said)[:80]}, the shards say {ascii(real)[:80]}"]
