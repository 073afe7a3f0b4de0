"""Sparse targets of one row <-> bytes, exactly as docs/format.md describes.

A codec is two functions and its limits; `CODECS` lists them by the name that a cache's header records.
Counts are stored exactly. Weights are stored as logarithms, with the relative error stated beside each codec.

Shapes: L tokens of a row, P supervised positions, M entries of all of them, K entries of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, MismatchError, RecipeError

Array = NDArray[Any]
Spec = Mapping[str, Any]

_OCTAVE = 1024  # log-codes count 1/1024 octaves: half a unit is a relative error of 0.034 %
_MOST_PADDED = 2**31  # bytes; a file of some MB must not make us allocate more
_SMALLEST = 150 * _OCTAVE  # 2^-149 is the smallest positive float32


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatTargets:
    """Sparse targets of P positions as flat arrays: position i owns the next `sizes[i]` entries.

    Attributes:
        ids: [M] uint32.
        values: [M] uint32 counts when `rounds` is set, else [M] float32 weights.
        sizes: [P] int64.
        rounds: N of random sampling; the counts of every position sum to it.
    """

    ids: Array
    values: Array
    sizes: Array
    rounds: int | None = None

    def __post_init__(self) -> None:
        total = int(self.sizes.sum())
        if not len(self.ids) == len(self.values) == total:
            raise ValueError(f"{len(self.ids)} ids and {len(self.values)} values, but the sizes sum to {total}")

    @classmethod
    def from_padded(cls, ids: Array, values: Array, rounds: int | None = None) -> FlatTargets:
        """The targets of [P, K] arrays where a value of 0 is padding: counts with `rounds`, else weights."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
            raise ValueError(f"ids span {ids.min()}..{ids.max()}, the format holds 0..4294967295")
        kept = values != 0
        dtype = np.float32 if rounds is None else np.uint32
        return cls(
            ids=ids[kept].astype(np.uint32),
            values=values[kept].astype(dtype),
            sizes=kept.sum(-1, dtype=np.int64),
            rounds=rounds,
        )

    @property
    def weights(self) -> Array:
        """[M] float32: counts / rounds, or the stored weights."""
        if self.rounds is None:
            return self.values
        return (self.values / np.float64(self.rounds)).astype(np.float32)

    @property
    def positions(self) -> Array:
        """[M] int64: the position that owns each entry."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def matches(self, tokens: Array) -> Array:
        """[M] bool: whether an entry's id is the token given for its position; tokens [P]."""
        return np.repeat(tokens.astype(np.int64), self.sizes) == self.ids

    def padded(self) -> tuple[Array, Array]:
        """ids [P, K] int64 and weights [P, K] float32; id 0 with weight 0 is padding, and K is at least 1.

        Raises:
            FormatError: one hostile position would blow the arrays up beyond 2 GiB.
        """
        width = max(1, int(self.sizes.max(initial=0)))
        if len(self.sizes) * width * 12 > _MOST_PADDED:
            raise FormatError(
                f"padding {len(self.sizes)} positions to {width} entries needs "
                f"{len(self.sizes) * width * 12} bytes, over {_MOST_PADDED}; use the flat arrays"
            )
        kept = np.arange(width) < self.sizes[:, None]
        ids = np.zeros(kept.shape, np.int64)
        weights = np.zeros(kept.shape, np.float32)
        ids[kept] = self.ids
        weights[kept] = self.weights
        return ids, weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """Two functions and their limits: ids below 2^id_bits; counts of up to max_rounds rounds, or weights."""

    encode: Callable[[FlatTargets, Spec], bytes]
    decode: Callable[[bytes, int, Spec], FlatTargets]
    id_bits: int
    max_rounds: int | None


# --- choosing and checking ------------------------------------------------------------------------------


def default_codec(rounds: int | None, logit_width: int) -> dict[str, Any]:
    """The smallest codec that is exact for counts (`rounds` set), or accurate to 0.034 % for weights."""
    spec: dict[str, Any] = {"name": "prob40", "logit_width": logit_width}
    if rounds is not None:
        fits = rounds <= 64 and logit_width <= 2**18
        spec |= {"name": "raw24" if fits else "raw40", "rounds": rounds}
    check_codec(spec)
    return spec


def check_codec(spec: Spec) -> Codec:
    """The codec a spec names, once its limits are known to hold; RecipeError with both values otherwise."""
    name, width, rounds = spec.get("name"), spec.get("logit_width"), spec.get("rounds")
    if not isinstance(name, str) or name not in CODECS:
        raise RecipeError(f"codec {name!r} is unknown; this sparsekd has {', '.join(CODECS)}")
    codec = CODECS[name]
    known = {"name", "logit_width"} | ({"rounds"} if codec.max_rounds else set())
    if set(spec) != known:
        raise RecipeError(f"codec {name} takes the keys {sorted(known)}, got {sorted(spec)}")
    if not _within(width, 2**codec.id_bits):
        raise RecipeError(
            f"codec {name} holds ids below {2**codec.id_bits}, but logit_width={width!r}; {_other(codec)}"
        )
    if codec.max_rounds and not _within(rounds, codec.max_rounds):
        raise RecipeError(f"codec {name} holds 1 to {codec.max_rounds} rounds, but rounds={rounds!r}; {_other(codec)}")
    return codec


def _other(codec: Codec) -> str:
    if codec.max_rounds is None:
        return "prob40 holds ids below 16777216"
    return "raw24 holds ids below 262144 and 64 rounds, raw40 ids below 1048576 and 1048576 rounds"


def _within(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def encode(flat: FlatTargets, spec: Spec) -> bytes:
    """The targets as bytes. MismatchError when they are not what the spec says (rounds, ids too wide)."""
    codec = check_codec(spec)
    if flat.rounds != spec.get("rounds"):
        raise MismatchError(
            f"targets have rounds={flat.rounds}, codec {spec['name']} was set up for rounds="
            f"{spec.get('rounds')}; counts need raw24, raw40 or paper24, weights need prob24 or prob40"
        )
    if len(flat.ids) and int(flat.ids.max()) >= spec["logit_width"]:
        at = int(np.argmax(flat.ids))
        raise MismatchError(
            f"supervised position {flat.positions[at]} has id {flat.ids[at]}, but "
            f"logit_width={spec['logit_width']}; the targets are of another vocabulary"
        )
    return codec.encode(flat, spec)


def decode(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    """The targets of `positions` positions. FormatError for bytes that no encoder writes."""
    flat = check_codec(spec).decode(data, positions, spec)
    bad = np.flatnonzero(flat.ids >= spec["logit_width"])
    if len(bad):
        _refuse(flat.positions[bad[0]], f"id {flat.ids[bad[0]]}, but logit_width={spec['logit_width']}")
    return flat


def _refuse(position: int, what: str) -> None:
    raise FormatError(f"supervised position {position} has {what}; the file is damaged")


# --- words of 2, 3 or 5 bytes ---------------------------------------------------------------------------


def _pack(words: Array, width: int) -> bytes:
    """Unsigned integers [M] as `width` little-endian bytes each."""
    as_bytes = np.ascontiguousarray(words, "<u8").view(np.uint8).reshape(-1, 8)
    return as_bytes[:, :width].tobytes()


def _unpack(data: bytes, width: int) -> Array:
    """[M] unsigned integers of `width` little-endian bytes, read as overlapping wider words and masked."""
    if len(data) % width:
        raise FormatError(f"{len(data)} bytes are no whole number of {width}-byte words; the file is damaged")
    wide = np.dtype("<u4" if width <= 4 else "<u8")
    padded = bytes(data) + bytes(wide.itemsize - width)
    words: Array = np.ndarray((len(data) // width,), wide, padded, strides=(width,))
    return words & wide.type(2 ** (8 * width) - 1)


# --- counts ---------------------------------------------------------------------------------------------


def _encode_counts(flat: FlatTargets, spec: Spec, *, width: int, id_bits: int) -> bytes:
    ids, counts = _canonical(flat)
    _check_sums(counts, flat.sizes, spec["rounds"])
    words = ids.astype(np.uint64) | ((counts.astype(np.uint64) - np.uint64(1)) << np.uint64(id_bits))
    return _pack(words, width)


def _canonical(flat: FlatTargets) -> tuple[Array, Array]:
    """Entries sorted by id within each position; MismatchError when an id is there twice."""
    keys = (flat.positions.astype(np.uint64) << np.uint64(32)) | flat.ids.astype(np.uint64)
    if bool((keys[1:] > keys[:-1]).all()):
        return flat.ids, flat.values
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        position, token = divmod(int(keys[twice[0]]), 2**32)
        raise MismatchError(f"supervised position {position} has id {token} twice; add its counts up before encoding")
    return flat.ids[order], flat.values[order]


def _check_sums(counts: Array, sizes: Array, rounds: int) -> None:
    """MismatchError unless counts are at least 1 and sum to `rounds` in every position."""
    if len(counts) and int(counts.min()) < 1:
        raise MismatchError("a count is 0; leave such ids out")
    totals = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    ends = np.cumsum(sizes)
    sums = totals[ends] - totals[ends - sizes]
    bad = np.flatnonzero(sums != rounds)
    if len(bad):
        raise MismatchError(
            f"the counts of supervised position {bad[0]} sum to {sums[bad[0]]}, but rounds={rounds}; "
            "counts must be stored whole, not truncated"
        )


def _decode_counts(data: bytes, positions: int, spec: Spec, *, width: int, id_bits: int) -> FlatTargets:
    """k is implied: a position ends where the running sum of its counts reaches `rounds`."""
    words = _unpack(data, width)
    ids = (words & words.dtype.type(2**id_bits - 1)).astype(np.uint32, copy=False)
    counts = (words >> words.dtype.type(id_bits)).astype(np.uint32, copy=False) + np.uint32(1)
    ends = _ends(counts, positions, spec["rounds"])
    falls = ids[1:] <= ids[:-1]
    falls[ends[:-1]] = False
    if falls.any():
        at = int(np.argmax(falls))
        _refuse(int(np.searchsorted(ends, at + 1)), f"id {ids[at + 1]} after {ids[at]}, ids must ascend")
    return FlatTargets(ids=ids, values=counts, sizes=np.diff(ends, prepend=-1), rounds=spec["rounds"])


def _ends(counts: Array, positions: int, rounds: int) -> Array:
    """[P] the last entry of each position."""
    # int32 where it cannot overflow: decoding a row of 4096 tokens is 10 to 25 % faster.
    narrow = len(counts) * int(counts.max(initial=0)) < 2**31
    totals = np.cumsum(counts, dtype=np.int32 if narrow else np.int64)
    total = int(totals[-1]) if len(totals) else 0
    ends = np.flatnonzero(totals == totals // rounds * rounds)
    if total == positions * rounds and len(ends) == positions:
        return ends
    reached = totals[ends] // rounds
    wrong = np.flatnonzero(reached != np.arange(1, len(ends) + 1))
    position = min(int(wrong[0]) if len(wrong) else len(ends), positions)
    raise FormatError(
        f"counts do not fit from supervised position {position} on: {positions} positions of "
        f"{rounds} rounds need {positions * rounds}, the counts sum to {total}; the file is damaged"
    )


# --- weights --------------------------------------------------------------------------------------------


def _positive(flat: FlatTargets) -> FlatTargets:
    """The entries of positive weight; MismatchError for a weight that is negative or not finite."""
    fine = np.isfinite(flat.values) & (flat.values >= 0)
    if not fine.all():
        at = int(np.argmin(fine))
        raise MismatchError(
            f"supervised position {flat.positions[at]} has weight {flat.values[at]}; weights are finite and >= 0"
        )
    kept = flat.values > 0
    sizes = np.bincount(flat.positions[kept], minlength=len(flat.sizes)).astype(np.int64)
    if int(sizes.max(initial=0)) > 0xFFFF:
        raise MismatchError(f"a position has {sizes.max()} entries, the format holds 65535; keep fewer ids")
    return FlatTargets(ids=flat.ids[kept], values=flat.values[kept], sizes=sizes)


def _with_sizes(sizes: Array, words: Array, width: int) -> bytes:
    return _pack(sizes, 2) + _pack(words, width)


def _split_sizes(data: bytes, positions: int, width: int) -> tuple[Array, Array]:
    """sizes [P] int64 and words [M]; FormatError when they do not fill the bytes exactly."""
    head = 2 * positions
    if len(data) < head:
        raise FormatError(f"{len(data)} bytes cannot hold {positions} sizes; the file is damaged")
    sizes, words = _unpack(data[:head], 2).astype(np.int64), _unpack(data[head:], width)
    if int(sizes.sum()) != len(words):
        raise FormatError(f"the sizes sum to {sizes.sum()}, {len(words)} entries follow; the file is damaged")
    return sizes, words


@cache
def _power_table() -> Array:
    """[150 * 1024 + 1] float32: 2^(-i / 1024), computed in float64."""
    table: Array = np.exp2(-np.arange(_SMALLEST + 1) / _OCTAVE).astype(np.float32)
    return np.maximum(table, np.float32(2.0**-149))


def _encode_prob40(flat: FlatTargets, spec: Spec) -> bytes:
    flat = _positive(flat)
    codes = np.rint((16 - np.log2(flat.values.astype(np.float64))) * _OCTAVE).clip(0, 65535)
    words = flat.ids.astype(np.uint64) | (codes.astype(np.uint64) << np.uint64(24))
    return _with_sizes(flat.sizes, words, 5)


def _decode_prob40(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    sizes, words = _split_sizes(data, positions, 5)
    ids = (words & np.uint64(2**24 - 1)).astype(np.uint32)
    weights = _power_table()[words >> np.uint64(24)] * np.float32(2**16)
    return FlatTargets(ids=ids, values=weights, sizes=sizes)


def _encode_prob24(flat: FlatTargets, spec: Spec) -> bytes:
    flat = _positive(flat)
    if len(flat.values) and float(flat.values.max()) > 1.001:
        raise MismatchError(f"prob24 holds probabilities, got a weight of {flat.values.max()}; use prob40")
    order = np.lexsort((-flat.values, flat.positions))
    codes = _ratio_codes(flat.values[order], flat.sizes)
    return _with_sizes(flat.sizes, flat.ids[order].astype(np.uint64) | (codes << np.uint64(17)), 3)


def _ratio_codes(weights: Array, sizes: Array) -> Array:
    """[M] uint64 codes c: the i-th weight decodes to 2^(-(c_1^2 + ... + c_i^2) / 1024).

    Closed loop: each code corrects the rounding of those before it, so errors never add up. Squares put the
    fine steps where neighbours are alike: with o octaves between neighbours the error is 2.2 % * sqrt(o).
    """
    wanted = -np.log2(weights.astype(np.float64)) * _OCTAVE
    codes, level = np.zeros(len(weights), np.uint64), np.zeros(len(sizes))
    first = np.cumsum(sizes) - sizes
    for rank in range(int(sizes.max(initial=0))):
        longer = np.flatnonzero(sizes > rank)
        gap = wanted[first[longer] + rank] - level[longer]
        code = np.floor(np.sqrt((gap - 0.25).clip(0)) + 0.5).clip(0, 127)
        codes[first[longer] + rank] = code.astype(np.uint64)
        level[longer] += code**2
    return codes


def _decode_prob24(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    sizes, words = _split_sizes(data, positions, 3)
    running = np.concatenate([[0], np.cumsum((words >> np.uint32(17)).astype(np.int64) ** 2)])
    first = np.cumsum(sizes) - sizes
    levels = running[1:] - np.repeat(running[first], sizes)
    flat = FlatTargets(ids=words & np.uint32(2**17 - 1), values=levels, sizes=sizes)
    if int(levels.max(initial=0)) > _SMALLEST:
        _refuse(flat.positions[int(np.argmax(levels))], "a weight below 2^-150")
    return FlatTargets(ids=flat.ids, values=_power_table()[levels], sizes=sizes)


# --- the registry ---------------------------------------------------------------------------------------


def _counts_codec(*, width: int, id_bits: int, max_rounds: int) -> Codec:
    return Codec(
        encode=partial(_encode_counts, width=width, id_bits=id_bits),
        decode=partial(_decode_counts, width=width, id_bits=id_bits),
        id_bits=id_bits,
        max_rounds=max_rounds,
    )


CODECS: dict[str, Codec] = {
    "raw24": _counts_codec(width=3, id_bits=18, max_rounds=64),
    "paper24": _counts_codec(width=3, id_bits=17, max_rounds=128),
    "raw40": _counts_codec(width=5, id_bits=20, max_rounds=2**20),
    "prob24": Codec(encode=_encode_prob24, decode=_decode_prob24, id_bits=17, max_rounds=None),
    "prob40": Codec(encode=_encode_prob40, decode=_decode_prob40, id_bits=24, max_rounds=None),
}


# --- one row --------------------------------------------------------------------------------------------


def id_bytes(logit_width: int) -> int:
    """Bytes per input id: 2, 3 or 4."""
    return 2 if logit_width <= 2**16 else 3 if logit_width <= 2**24 else 4


def encode_row(input_ids: Array, flat: FlatTargets, supervised: Array, spec: Spec) -> bytes:
    """A row's block: its [L] input ids, then the coded targets of its supervised positions.

    Position p (0 .. L-2) is supervised iff `supervised[p + 1]`, for target p is the distribution of token
    p + 1; `flat` has one entry per supervised position, in order.
    """
    expected, width = int(np.count_nonzero(supervised[1:])), spec["logit_width"]
    if len(flat.sizes) != expected:
        raise MismatchError(
            f"targets for {len(flat.sizes)} positions, but {expected} are supervised; "
            "give one target per supervised position, in order"
        )
    if len(input_ids) and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < width:
        raise MismatchError(
            f"input ids span {input_ids.min()}..{input_ids.max()}, but logit_width={width}; "
            "the rows are of another vocabulary"
        )
    return _pack(input_ids, id_bytes(width)) + encode(flat, spec)


def decode_row(block: bytes, seq_len: int, supervised: Array, spec: Spec) -> tuple[Array, FlatTargets]:
    """input_ids [L] uint32 and the targets of the supervised positions; FormatError for damaged bytes."""
    head, width = seq_len * id_bytes(spec["logit_width"]), spec["logit_width"]
    if len(block) < head:
        raise FormatError(f"the block has {len(block)} bytes, its {seq_len} input ids need {head}")
    input_ids = _unpack(block[:head], id_bytes(width))
    if seq_len and int(input_ids.max()) >= width:
        raise FormatError(f"input id {input_ids.max()}, but logit_width={width}; the file is damaged")
    return input_ids, decode(block[head:], int(np.count_nonzero(supervised[1:])), spec)
