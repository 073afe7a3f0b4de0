"""Sparse targets of one row <-> bytes, exactly as docs/format.md describes.

A codec is two functions and its limits; `CODECS` lists them by the name that a cache's header records.
Counts are stored exactly. Weights and probabilities are stored as logarithms, with the relative error stated beside
each codec.

Shapes: L tokens of a row, P supervised positions, M entries of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .codec_counts import decode_counts, decode_importance, encode_counts, encode_importance
from .codec_curve import are_edges, decode_curve, encode_curve
from .codec_ints import zstd_version
from .codec_scale import decode_scale, encode_scale
from .codec_split import decode_split, decode_split_row, encode_split, encode_split_row
from .codec_split_fast import decode_quickly, decode_rows_quickly, encode_quickly
from .codec_split_ratio import decode_ratios, decode_ratios_row, encode_ratios, encode_ratios_row
from .codec_split_ratio import nearest as nearest_ratio
from .codec_split_ratio import unbiased as unbiased_ratio
from .codec_split_weights import (
    decode_weights,
    decode_weights_row,
    encode_weights,
    encode_weights_row,
    nearest,
    unbiased,
)
from .codec_weights import decode_prob24, decode_prob40, encode_prob24, encode_prob40
from .codec_weights_fast import decode_quickly as decode_weights_quickly
from .codec_weights_fast import decode_rows_quickly as decode_weight_rows
from .codec_weights_fast import encode_quickly as encode_weights_quickly
from .errors import FormatError, MismatchError, RecipeError
from .flat import FlatTargets, Importance
from .words import pack, refuse, unpack

__all__ = [
    "CODECS",
    "COUNTS",
    "CURVES",
    "IMPORTANCE",
    "WEIGHTS",
    "Codec",
    "FlatTargets",
    "Importance",
    "check_codec",
    "codec_spec",
    "decode",
    "decode_row",
    "decode_rows",
    "default_codec",
    "encode",
    "encode_row",
    "id_bytes",
]

Array = NDArray[Any]
Spec = Mapping[str, Any]

COUNTS, IMPORTANCE, WEIGHTS, CURVES = "counts", "importance draws", "weights", "sorted curves"
_NO_IDS, _NO_MASK = np.zeros(0, np.uint32), np.zeros(0, bool)
# What a spec says beside its name and logit_width.
_KEYS: dict[str, tuple[str, ...]] = {
    COUNTS: ("rounds",),
    IMPORTANCE: ("rounds", "temperature", "normalize"),
    WEIGHTS: (),
    CURVES: ("edges",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """Two functions, what they hold (a key of `_KEYS`), and the limits: ids below 2^id_bits, counts of max_rounds.

    A codec may code a whole row itself, to spell out only those input ids that its targets do not tell (`encode_row`
    and `decode_row`), and may want frequent ids to be small numbers (`ranked`; see id_ranks.py). `quick_encode` and
    `quick_decode` do all of it compiled, checks and ranks too, or give None: then the others do it, or say why not.
    `quick_rows` is `decode_rows`.
    """

    encode: Callable[[FlatTargets, Spec], bytes]
    decode: Callable[[bytes, int, Spec], FlatTargets]
    holds: str
    id_bits: int
    max_rounds: int | None = None
    encode_row: Callable[[Array, FlatTargets, Array, Spec], bytes] | None = None
    decode_row: Callable[[bytes, int, Array, Spec], tuple[Array, FlatTargets]] | None = None
    ranked: bool = False
    quick_encode: Callable[[Array, FlatTargets, Array, Spec, Array | None], bytes | None] | None = None
    quick_decode: Callable[[bytes, int, Array, Spec, Array | None], tuple[Array, FlatTargets] | None] | None = None
    quick_rows: Callable[..., tuple[Array, FlatTargets] | None] | None = None


def _counted(encode: Any, decode: Any, *, holds: str, width: int, id_bits: int, max_rounds: int) -> Codec:
    return Codec(
        encode=partial(encode, width=width, id_bits=id_bits),
        decode=partial(decode, width=width, id_bits=id_bits),
        holds=holds,
        id_bits=id_bits,
        max_rounds=max_rounds,
    )


_counts_codec = partial(_counted, encode_counts, decode_counts, holds=COUNTS)


def _rounded(encode: Callable[..., bytes], encode_row: Callable[..., bytes], rounding: Any, **limits: Any) -> Codec:
    """A codec like `split` whose probabilities stand on a grid, brought there by `rounding`."""
    whole, row = partial(encode, rounding=rounding), partial(encode_row, rounding=rounding)
    return Codec(encode=whole, encode_row=row, id_bits=20, ranked=True, **limits)


def _split_weights(rounding: Any, most: int = 1) -> Codec:
    whole, row = (partial(each, most=most) for each in (encode_weights, encode_weights_row))
    return _rounded(
        *(whole, row, rounding),
        decode=partial(decode_weights, most=most),
        decode_row=partial(decode_weights_row, most=most),
        holds=WEIGHTS,
        quick_encode=partial(encode_weights_quickly, rounding=rounding, most=most),
        quick_decode=partial(decode_weights_quickly, most=most),
        quick_rows=partial(decode_weight_rows, most=most),
    )


_split_ratio = partial(
    _rounded,
    encode_ratios,
    encode_ratios_row,
    decode=decode_ratios,
    decode_row=decode_ratios_row,
    holds=IMPORTANCE,
    max_rounds=2**20,
)
_importance_codec = partial(_counted, encode_importance, decode_importance, holds=IMPORTANCE)

CODECS: dict[str, Codec] = {
    "raw24": _counts_codec(width=3, id_bits=18, max_rounds=64),
    "paper24": _counts_codec(width=3, id_bits=17, max_rounds=128),
    "raw40": _counts_codec(width=5, id_bits=20, max_rounds=2**20),
    "split": Codec(
        encode=encode_split,
        decode=decode_split,
        holds=COUNTS,
        id_bits=20,
        max_rounds=2**20,
        encode_row=encode_split_row,
        decode_row=decode_split_row,
        ranked=True,
        quick_encode=encode_quickly,
        quick_decode=decode_quickly,
        quick_rows=decode_rows_quickly,
    ),
    "split_ratio": _split_ratio(nearest_ratio),
    "split_ratio_unbiased": _split_ratio(unbiased_ratio),
    "ratio32": _importance_codec(width=4, id_bits=18, max_rounds=64),
    "ratio48": _importance_codec(width=6, id_bits=20, max_rounds=2**20),
    "prob24": Codec(encode=encode_prob24, decode=decode_prob24, holds=WEIGHTS, id_bits=17),
    "prob40": Codec(encode=encode_prob40, decode=decode_prob40, holds=WEIGHTS, id_bits=24),
    "split_prob": _split_weights(nearest),
    "split_prob_unbiased": _split_weights(unbiased),
    "split_weight_unbiased": _split_weights(unbiased, most=2),
    "curve8": Codec(encode=encode_curve, decode=decode_curve, holds=CURVES, id_bits=24),
}


# --- choosing and checking ------------------------------------------------------------------------------


def default_codec(
    rounds: int | None,
    logit_width: int,
    temperature: float = 1.0,
    normalize: bool = True,
    edges: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The smallest codec that keeps counts exactly: `split`, or `split_ratio` where `temperature` is not 1, rounded
    without bias where weights are without (`normalize` false); for weights prob40, to 0.034 %; for sorted curves
    (`edges` set) curve8."""
    name = "prob40" if edges is None else "curve8"
    if rounds is not None:
        name = "split" if temperature == 1 else "split_ratio" if normalize else "split_ratio_unbiased"
    weighing = {"temperature": temperature, "normalize": normalize, "edges": edges}
    return codec_spec(name, logit_width=logit_width, rounds=rounds, **weighing)  # type: ignore[arg-type]


def codec_spec(
    name: str,
    *,
    logit_width: int,
    rounds: int | None,
    temperature: float = 1.0,
    normalize: bool = True,
    edges: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The spec of a codec, with those of the parameters that it takes; RecipeError when they do not fit it."""
    given = {
        "rounds": rounds,
        "temperature": float(temperature),
        "normalize": normalize,
        "edges": edges and list(edges),
    }
    keys = _KEYS[CODECS[name].holds] if name in CODECS else ()
    spec = {"name": name, "logit_width": logit_width} | {key: given[key] for key in keys}
    check_codec(spec)
    return spec


def check_codec(spec: Spec) -> Codec:
    """The codec a spec names, once its limits are known to hold; RecipeError with both values otherwise."""
    name, width, rounds = spec.get("name"), spec.get("logit_width"), spec.get("rounds")
    if not isinstance(name, str) or name not in CODECS:
        raise RecipeError(f"codec {name!r} is unknown; this sparsekd has {', '.join(CODECS)}")
    codec = CODECS[name]
    known = {"name", "logit_width", *_KEYS[codec.holds]}
    if set(spec) - {"share"} != known:
        raise RecipeError(f"codec {name} takes the keys {sorted(known)}, got {sorted(spec)}")
    if not _within(width, 2**codec.id_bits):
        raise RecipeError(
            f"codec {name} holds ids below {2**codec.id_bits}, but logit_width={width!r}; {_other(codec)}"
        )
    if codec.max_rounds and not _within(rounds, codec.max_rounds):
        raise RecipeError(f"codec {name} holds 1 to {codec.max_rounds} rounds, but rounds={rounds!r}; {_other(codec)}")
    if codec.holds == IMPORTANCE:
        _check_weighting(name, spec)
    if "share" in spec and not (type(spec["share"]) is float and 0 < spec["share"] < 1):
        raise RecipeError(f"codec {name} needs a share between 0 and 1, but share={spec['share']!r}")
    if codec.holds == CURVES and not are_edges(spec["edges"], width):
        raise RecipeError(
            f"codec {name} needs edges, ranks ascending from 0 to logit_width={width}, but edges={spec['edges']!r:.80}"
        )
    return codec


def _check_weighting(name: str, spec: Spec) -> None:
    temperature, normalize = spec["temperature"], spec["normalize"]
    if type(temperature) not in (int, float) or not 0 <= temperature <= 10 or temperature == 1:
        raise RecipeError(
            f"codec {name} holds draws with a temperature from 0 to 10 that is not 1, but temperature={temperature!r}; "
            "draws with temperature 1 need raw24 or raw40"
        )
    if not isinstance(normalize, bool):
        raise RecipeError(f"codec {name} needs normalize to be true or false, but normalize={normalize!r}")


def _other(codec: Codec) -> str:
    small, large = {COUNTS: ("raw24", "raw40"), IMPORTANCE: ("ratio32", "ratio48")}.get(codec.holds, ("", ""))
    if not small:
        return "prob40 holds ids below 16777216"
    return f"{small} holds ids below 262144 and 64 rounds, {large} ids below 1048576 and 1048576 rounds"


def _within(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def codec_engine(spec: Spec) -> dict[str, str]:
    """What a shard's header says of the library that compressed it: nothing for codecs that use none."""
    return {"zstd": zstd_version()} if CODECS[spec["name"]].ranked or "share" in spec else {}


def encode(flat: FlatTargets, spec: Spec) -> bytes:
    """The targets as bytes. MismatchError when they are not what the spec says (rounds, ids too wide)."""
    codec = check_codec(spec)
    scaled = (flat.scale is None) == ("share" not in spec)
    quickly = scaled and codec.quick_encode and codec.quick_encode(_NO_IDS, flat, _NO_MASK, spec, None)
    if quickly:
        return encode_scale(flat, spec) + quickly
    _check_targets(flat, codec, spec)
    return encode_scale(flat, spec) + codec.encode(flat, spec)


def _check_targets(flat: FlatTargets, codec: Codec, spec: Spec) -> None:
    _check_kind(flat, codec, spec)
    if len(flat.ids) and int(flat.ids.max()) >= spec["logit_width"]:
        at = int(np.argmax(flat.ids))
        raise MismatchError(
            f"supervised position {flat.positions[at]} has id {flat.ids[at]}, but "
            f"logit_width={spec['logit_width']}; the targets are of another vocabulary"
        )


def _check_kind(flat: FlatTargets, codec: Codec, spec: Spec) -> None:
    held = WEIGHTS if flat.rounds is None else COUNTS if flat.importance is None else IMPORTANCE
    held = held if flat.curve is None else CURVES
    way_out = (
        "counts need split, raw24, raw40 or paper24, importance draws split_ratio, weights split_prob, prob24 "
        "or prob40, sorted curves curve8 (the rounds are the cache's)"
    )
    if flat.rounds != spec.get("rounds"):
        raise MismatchError(
            f"targets have rounds={flat.rounds}, codec {spec['name']} was set up for rounds={spec.get('rounds')}; "
            f"{way_out}"
        )
    if (flat.scale is None) != ("share" not in spec):
        has, takes = ("no ", "them") if flat.scale is None else ("", "none")
        raise MismatchError(f"targets have {has}scales of positions, codec {spec['name']} was set up for {takes}")
    if held != codec.holds:
        raise MismatchError(f"targets are {held}, codec {spec['name']} holds {codec.holds}; {way_out}")


def decode(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    """The targets of `positions` positions. FormatError for bytes that no encoder writes."""
    codec = check_codec(spec)
    scale, used = decode_scale(data, positions, spec)
    quickly = codec.quick_decode and codec.quick_decode(data[used:], positions, _NO_MASK, spec, None)
    if quickly is not None:
        return quickly[1] if scale is None else replace(quickly[1], scale=scale)
    flat = codec.decode(data[used:], positions, spec)
    _check_ids(flat, spec)
    return flat if scale is None else replace(flat, scale=scale)


def _check_ids(flat: FlatTargets, spec: Spec) -> None:
    if len(flat.ids) and int(flat.ids.max()) >= spec["logit_width"]:
        at = int(np.argmax(flat.ids >= spec["logit_width"]))
        refuse(flat.positions[at], f"id {flat.ids[at]}, but logit_width={spec['logit_width']}")


# --- one row --------------------------------------------------------------------------------------------


def id_bytes(logit_width: int) -> int:
    """Bytes per input id: 2, 3 or 4."""
    return 2 if logit_width <= 2**16 else 3 if logit_width <= 2**24 else 4


def encode_row(input_ids: Array, flat: FlatTargets, supervised: Array, spec: Spec, ranks: Array | None = None) -> bytes:
    """A row's block: its [L] input ids, then the coded targets of its supervised positions (`split`: both mixed).

    Position p (0 .. L-2) is supervised iff `supervised[p + 1]`, for target p is the distribution of token
    p + 1; `flat` has one entry per supervised position, in order. `ranks` [V] gives every id another number in the
    block; the reader needs its inverse.
    """
    codec, supervised = check_codec(spec), supervised.astype(bool, copy=False)
    scaled = (flat.scale is None) == ("share" not in spec)
    quickly = scaled and codec.quick_encode and codec.quick_encode(input_ids, flat, supervised, spec, ranks)
    if quickly:
        return encode_scale(flat, spec) + quickly
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
    _check_targets(flat, codec, spec)
    if ranks is not None:
        input_ids, flat = ranks[input_ids], replace(flat, ids=ranks[flat.ids])
    scale = encode_scale(flat, spec)
    if codec.encode_row is not None:
        return scale + codec.encode_row(input_ids, flat, supervised, spec)
    return scale + pack(input_ids, id_bytes(width)) + codec.encode(flat, spec)


def decode_row(
    block: bytes, seq_len: int, supervised: Array, spec: Spec, ids: Array | None = None
) -> tuple[Array, FlatTargets]:
    """input_ids [L] uint32 and the targets of the supervised positions; FormatError for damaged bytes.

    `ids` [V] is the id of each number in the block, where they were given others.
    """
    codec, supervised = check_codec(spec), supervised.astype(bool, copy=False)
    positions = int(np.count_nonzero(supervised[1:]))
    scale, used = decode_scale(block, positions, spec)
    quickly = codec.quick_decode and codec.quick_decode(block[used:], positions, supervised, spec, ids)
    if quickly is not None:
        return quickly if scale is None else (quickly[0], replace(quickly[1], scale=scale))
    input_ids, flat = (codec.decode_row or _decode_plain_row)(block[used:], seq_len, supervised, spec)
    flat = flat if scale is None else replace(flat, scale=scale)
    width = spec["logit_width"]
    if seq_len and int(input_ids.max()) >= width:
        raise FormatError(f"input id {input_ids.max()}, but logit_width={width}; the file is damaged")
    _check_ids(flat, spec)
    return (input_ids, flat) if ids is None else (ids[input_ids], replace(flat, ids=_renumbered(flat.ids, ids)))


def decode_rows(
    blocks: Sequence[bytes],
    supervised_BL: Array,
    spec: Spec,
    ids: Sequence[Array | None],
    memory: Callable[[str], Callable[[int, Any], Array]] = compiled.fresh,
) -> tuple[Array, FlatTargets] | None:
    """Some rows at once, where that is quicker: with `found = [decode_row(...) for each block]`,
    `np.stack([tokens for tokens, _ in found])` [B, L] and `FlatTargets.join([flat for _, flat in found])`.

    None where the codec has no such way, numba is not at hand, or a row is not sound: `decode_row` says which, and why.

    Args:
        ids: [B] as for `decode_row`, of each row.
        memory: `compiled.scratch` where the targets are soon forgotten: the thread's next call writes over them.
    """
    check_codec(spec)
    quickly = quick_rows(spec)
    return quickly(blocks, np.ascontiguousarray(supervised_BL, bool), spec, ids, memory) if quickly else None


def quick_rows(spec: Spec) -> Callable[..., tuple[Array, FlatTargets] | None] | None:
    """What `decode_rows` calls, or None: it would give None always."""
    quickly = CODECS[spec["name"]].quick_rows
    return None if "share" in spec or compiled.kernels() is None else quickly


def _renumbered(numbers: Array, ids: Array) -> Array:
    """ids[numbers]; compiled, in the memory of the numbers, which are the decoder's own."""
    fast = compiled.array_kernels()
    return numbers if fast and fast.renumber(np.asarray(ids, np.uint32), numbers) else ids[numbers]


def _decode_plain_row(block: bytes, seq_len: int, supervised: Array, spec: Spec) -> tuple[Array, FlatTargets]:
    head = seq_len * id_bytes(spec["logit_width"])
    if len(block) < head:
        raise FormatError(f"the block has {len(block)} bytes, its {seq_len} input ids need {head}")
    input_ids = unpack(block[:head], id_bytes(spec["logit_width"]))
    return input_ids, CODECS[spec["name"]].decode(block[head:], int(np.count_nonzero(supervised[1:])), spec)
