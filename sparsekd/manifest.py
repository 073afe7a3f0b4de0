"""What a cache says about itself: its identity, its statistics, the headers of its shards, its manifest.

Plain values and functions over dicts; cache.py reads and writes them. Every shard's header repeats the whole
identity, so `manifest.json` only aggregates and can always be rebuilt.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec import CODECS, FlatTargets, check_codec
from .errors import FormatError, MismatchError, RecipeError
from .files import canonical_json, strict_json
from .shard import FORMAT, FORMAT_VERSION, check_version

Array = NDArray[Any]
Json = dict[str, Any]

MANIFEST = "manifest.json"
POSITION_CONVENTION = "target p is the teacher's distribution of token p+1"
_ABSENT = "(absent)"
_SET_BY_USERS = ("seq_len", "data", "tokenizer", "teacher", "sampler")


# --- identity -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """What every shard's header repeats: two shards belong together iff their specs are equal.

    Attributes:
        rows, seq_len: rows of the cache and tokens of each.
        shard_rows: rows of each shard but the last.
        logit_width: V, the number of the teacher's logits; every id is below it.
        codec: {"name", "logit_width", "rounds" for counts}, see codec.py.
        sampler, teacher, tokenizer, data, capture: JSON-able provenance; part of the identity.
    """

    rows: int
    seq_len: int
    shard_rows: int
    logit_width: int
    codec: Json
    sampler: Json
    teacher: Json
    tokenizer: Json
    data: Json
    capture: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("seq_len", 2), ("shard_rows", 1), ("logit_width", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**48:
                raise RecipeError(f"{name}={value!r}, expected a whole number of at least {least}")
        for name in ("codec", "sampler", "teacher", "tokenizer", "data", "capture"):
            # A tuple written as JSON comes back a list: normalise, or a spec would not equal itself.
            object.__setattr__(self, name, plain_json(name, getattr(self, name)))
        check_codec(self.codec)
        if self.codec["logit_width"] != self.logit_width:
            raise RecipeError(
                f"codec.logit_width={self.codec['logit_width']}, but logit_width={self.logit_width}; "
                "give both the same value"
            )

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """The rows of one shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def as_dict(self) -> Json:
        """A plain JSON-able dict; `CacheSpec.from_dict` of it equals this spec."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_dict(cls, value: Any, where: str = "spec") -> CacheSpec:
        """The spec a file holds; FormatError for missing, unknown or impossible entries."""
        names = {each.name for each in fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            keys = ascii(sorted(value))[:200] if isinstance(value, dict) else type(value).__name__
            raise FormatError(f"{where}: its spec has {keys}, expected {sorted(names)}")
        try:
            return cls(**value)
        except RecipeError as error:
            raise FormatError(f"{where}: its spec is impossible: {error}") from None


def plain_json(name: str, value: Any) -> Json:
    """A dict as it will come back from a file; RecipeError when it cannot be written as JSON."""
    try:
        plain = json.loads(canonical_json(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{name} cannot be written as JSON: {error}") from None
    if not isinstance(plain, dict):
        raise RecipeError(f"{name} is a {type(value).__name__}, expected a dict")
    return plain


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(dotted key, old value, new value) of the first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            below = f"{key}.{name}" if key else name
            found = first_difference(old.get(name, _ABSENT), new.get(name, _ABSENT), below)
            if found:
                return found
        return None
    return None if old == new and type(old) is type(new) else (key, old, new)


def check_same_spec(old: CacheSpec, new: CacheSpec, where: str) -> None:
    """MismatchError naming the first setting in which a cache on disk and a new capture differ."""
    a, b = old.as_dict(), new.as_dict()
    # What a user sets comes first: a codec follows from the sampler, the number of rows from the data.
    names = [*_SET_BY_USERS, *(name for name in a if name not in _SET_BY_USERS)]
    found = (first_difference(a[name], b[name], name) for name in names)
    if difference := next(filter(None, found), None):
        key, was, wanted = difference
        raise MismatchError(
            f"{where} was captured with {key}={short(was)}, this capture has {key}={short(wanted)}; "
            f"use another out= folder, or {key}={short(was)}"
        )


def short(value: Any) -> str:
    """A value as ASCII text of at most 80 characters, for messages."""
    text = value if value == _ABSENT else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- caches made of caches ------------------------------------------------------------------------------


def weights_codec(name: str | None, logit_width: int, sources: Sequence[CacheSpec]) -> str:
    """The codec of the weights that `transcode` and `pool` make of some caches: as named, or split_weight_unbiased
    where that is known to hold them (ids below 2^20, weights up to 2), else prob40.

    Raises:
        RecipeError: another codec.
    """
    small, any_weights = "split_weight_unbiased", "prob40"
    if name not in (None, small, any_weights):
        raise RecipeError(f"codec={name!r} does not hold these weights; take one of {small}, {any_weights}")
    fits = logit_width <= 2 ** CODECS[small].id_bits and all(map(_up_to_one, sources))
    return name or (small if fits else any_weights)


def _up_to_one(spec: CacheSpec) -> bool:
    """Whether no weight is above 1: no positions kept unevenly, no importance draws but self-normalised ones."""
    return "positions_by" not in spec.capture and _is_plain(spec.sampler)


def _is_plain(sampler: Any) -> bool:
    if not isinstance(sampler, dict):
        return False
    if isinstance(sampler.get("parts"), list):  # of a pooled cache
        return all(isinstance(part, dict) and _is_plain(part.get("sampler")) for part in sampler["parts"])
    return sampler.get("temperature", 1) == 1 or sampler.get("normalize") is True


# --- statistics -----------------------------------------------------------------------------------------


def row_stats(input_ids: Array, targets: FlatTargets, supervised: Array, payload_bytes: int) -> Json:
    """The numbers that a header sums over its rows. next_token_hits is the alignment canary: the positions
    whose true next token is among their ids. With [B, L] ids and masks, the sums of B rows whose targets are joined."""
    hits = np.flatnonzero(targets.matches(input_ids[..., 1:][supervised[..., 1:]]))
    owners = np.searchsorted(np.cumsum(targets.sizes), hits, side="right")
    return {
        "tokens": input_ids.size,
        "positions": len(targets.sizes),
        "pairs": len(targets.ids),
        "payload_bytes": payload_bytes,
        "id_max": int(targets.ids.max(initial=0)),
        "next_token_hits": int(np.count_nonzero(np.diff(owners))) + min(len(owners), 1),
        "next_token_weight": math.fsum(targets.weights[hits].tolist()),
    }


def sum_stats(stats: Sequence[Mapping[str, Any]]) -> Json:
    """Sums, but id_max is the maximum. Float sums are exactly rounded, so they do not depend on the machine."""
    names = [each for each in stats[0] if each not in ("id_max", "next_token_weight")]
    total: Json = {name: sum(each[name] for each in stats) for name in names}
    total["id_max"] = max(each["id_max"] for each in stats)
    total["next_token_weight"] = math.fsum(each["next_token_weight"] for each in stats)
    return total


_INTEGER_STATS = ("tokens", "positions", "pairs", "payload_bytes", "id_max", "next_token_hits")


def _are_stats(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {*_INTEGER_STATS, "next_token_weight"}:
        return False
    integers = all(type(value[name]) is int and 0 <= value[name] < 2**62 for name in _INTEGER_STATS)
    return integers and type(value["next_token_weight"]) in (int, float)


def same_stats(recorded: Mapping[str, Any], counted: Mapping[str, Any]) -> bool:
    """Whether recounted statistics agree: integers exactly, the weight to float32 accuracy."""
    return all(recorded[name] == counted[name] for name in _INTEGER_STATS) and math.isclose(
        recorded["next_token_weight"], counted["next_token_weight"], rel_tol=1e-5, abs_tol=1e-9
    )


# --- headers --------------------------------------------------------------------------------------------


def shard_name(shard: int) -> str:
    """The file name of a shard."""
    return f"shard-{shard:05d}.safetensors"


def shard_numbers(names: Iterable[str]) -> set[int]:
    """The shards among the names of a folder."""
    matches = (re.fullmatch(r"shard-(\d{5,15})\.safetensors", name) for name in names)
    numbers = {int(match[1]): match[0] for match in matches if match}
    return {number for number, name in numbers.items() if name == shard_name(number)}


def make_header(spec: CacheSpec, shard: int, stats: Json, engine: Json) -> Json:
    """A shard's header. `engine` says what computed this shard; it is not part of the identity."""
    rows = spec.shard_range(shard)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "position_convention": POSITION_CONVENTION,
        "spec": spec.as_dict(),
        "shard": shard,
        "first_row": rows.start,
        "rows": len(rows),
        "engine": engine,
        "stats": stats,
    }


def header_spec(header: Json, where: str) -> CacheSpec:
    """The spec in a shard's header, once the header is complete and agrees with it; FormatError otherwise."""
    spec, shard = CacheSpec.from_dict(header.get("spec"), where), header.get("shard")
    if type(shard) is not int or not 0 <= shard < spec.shards:
        raise FormatError(f"{where}: header shard is {ascii(shard)[:40]}, the spec has {spec.shards} shards")
    if not isinstance(header.get("engine"), dict) or not _are_stats(header.get("stats")):
        raise FormatError(f"{where}: header engine or stats are missing or malformed")
    wanted = make_header(spec, shard, header["stats"], header["engine"])
    difference = first_difference(wanted, header)
    if difference:
        key, expected, found = difference
        raise FormatError(f"{where}: header {key} is {short(found)}, expected {short(expected)}")
    return spec


# --- the manifest ---------------------------------------------------------------------------------------


def make_manifest(headers: Sequence[Json], files: Sequence[tuple[int, str] | None]) -> Json:
    """The manifest of a complete cache: headers in shard order, and (bytes, sha256) of each file if known."""
    engines = {canonical_json(header["engine"]): header["engine"] for header in headers}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "position_convention": POSITION_CONVENTION,
        "spec": headers[0]["spec"],
        "shards": [_entry(header, file) for header, file in zip(headers, files, strict=True)],
        "stats": sum_stats([header["stats"] for header in headers]),
        "engines": [engines[key] for key in sorted(engines)],
    }


def _entry(header: Json, file: tuple[int, str] | None) -> Json:
    stats = header["stats"]
    return {
        "file": shard_name(header["shard"]),
        "first_row": header["first_row"],
        "rows": header["rows"],
        "tokens": stats["tokens"],
        "positions": stats["positions"],
        "pairs": stats["pairs"],
        "bytes": file[0] if file else None,
        "sha256": file[1] if file else None,
    }


def manifest_bytes(manifest: Json) -> bytes:
    """manifest.json: sorted keys, indented for people, no time and no machine, so that it is reproducible."""
    text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode() + b"\n"


def parse_manifest(data: bytes, where: str) -> tuple[Json, CacheSpec]:
    """A manifest and its spec; FormatError for anything that `make_manifest` does not write."""
    manifest = strict_json(data, where)
    if not isinstance(manifest, dict):
        raise FormatError(f"{where}: no JSON object")
    check_version(manifest, where)
    spec = CacheSpec.from_dict(manifest.get("spec"), where)
    keys = {"format", "format_version", "position_convention", "spec", "shards", "stats", "engines"}
    if set(manifest) != keys or manifest["position_convention"] != POSITION_CONVENTION:
        raise FormatError(f"{where}: has the keys {ascii(sorted(manifest))[:200]}, expected {sorted(keys)}")
    if not _are_stats(manifest["stats"]) or not isinstance(manifest["engines"], list):
        raise FormatError(f"{where}: its stats or engines are malformed")
    _check_entries(manifest["shards"], spec, where)
    return manifest, spec


def _check_entries(entries: Any, spec: CacheSpec, where: str) -> None:
    if not isinstance(entries, list) or len(entries) != spec.shards:
        found = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise FormatError(f"{where}: lists {found} shards, {spec.rows} rows need {spec.shards}")
    for shard, entry in enumerate(entries):
        rows = spec.shard_range(shard)
        # The name is never followed anywhere: it must be the one that the number gives.
        fixed = {"file": shard_name(shard), "first_row": rows.start, "rows": len(rows)}
        keys = {*fixed, "tokens", "positions", "pairs", "bytes", "sha256"}
        if not isinstance(entry, dict) or set(entry) != keys:
            raise FormatError(f"{where}: the entry of shard {shard} is {ascii(entry)[:120]}")
        difference = first_difference(fixed, {name: entry[name] for name in fixed})
        if difference:
            key, wanted, found = difference
            raise FormatError(f"{where}: shard {shard} has {key}={short(found)}, expected {wanted}")


def check_entry(entry: Json, header: Json, where: str) -> None:
    """MismatchError where a manifest's entry and the header of its shard disagree."""
    wanted = _entry(header, None) | {"bytes": entry["bytes"], "sha256": entry["sha256"]}
    difference = first_difference(wanted, entry)
    if difference:
        key, found, said = difference
        raise MismatchError(
            f"{where} has {key}={short(found)}, {MANIFEST} says {short(said)}; "
            f"the folder mixes two captures: delete {MANIFEST} and run `sparsekd verify`"
        )


def missing_message(where: str, present: set[int], shards: int) -> str:
    """`12 of 40 shards are missing (first: 3); ...`, in time that a hostile number of shards cannot stretch."""
    first = next(shard for shard in range(shards) if shard not in present)
    absent = shards - sum(shard < shards for shard in present)
    return f"{where}: {absent} of {shards} shards are missing (first: {first}); run the same capture again to make them"
