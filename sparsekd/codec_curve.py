"""`curve8`: a teacher's sorted curve and the probability of the token that came, one byte a run (docs/format.md).

Shapes: P supervised positions, C runs of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec_weights import ratio_codes, ratio_levels
from .errors import FormatError, MismatchError
from .flat import FlatTargets
from .words import pack, refuse, unpack

Array = NDArray[Any]
Spec = Mapping[str, Any]

_TOKEN_UNIT = 1024  # log2 p of the token counts 1/1024: a u16 reaches 2^-64
# Means of runs count 1/4096 octaves, and a step is a square: o octaves are off by sqrt(o) / 64 octaves, 1.1 % sqrt(o).
# That is below 1/32 nat up to 8 octaves; one step reaches 15.9.
_MEAN_UNIT, _MOST, _LEAST = 4096, 255, 149


def encode_curve(flat: FlatTargets, spec: Spec) -> bytes:
    """Tokens, their probabilities, then the runs' codes; MismatchError for what is no curve of the spec's runs."""
    curve = _checked(flat, spec)
    lengths = np.diff(spec["edges"])
    with np.errstate(divide="ignore"):
        tokens = -np.log2(flat.values.astype(np.float64)) * _TOKEN_UNIT
        levels = -np.log2(curve / lengths) * _MEAN_UNIT
    # Means fall from run to run, so each is a ratio to the one before; sums of float32 may rise by a rounding.
    levels = np.maximum.accumulate(levels.clip(0, _LEAST * _MEAN_UNIT), axis=-1)
    sizes = np.full(len(curve), len(lengths))
    codes = ratio_codes(levels.ravel(), sizes, start=np.zeros(len(curve)), most=_MOST)
    head = pack(flat.ids, _id_bytes(spec)) + pack(np.rint(tokens).clip(0, 65535), 2)
    return head + codes.astype(np.uint8).tobytes()


def decode_curve(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    """The inverse, to the precision that docs/format.md states; FormatError for bytes that no encoder writes."""
    lengths, width = np.diff(spec["edges"]), _id_bytes(spec)
    if len(data) != positions * (width + 2 + len(lengths)):
        raise FormatError(
            f"{len(data)} bytes cannot be {positions} positions of {width + 2 + len(lengths)}; the file is damaged"
        )
    ids, rest = unpack(data[: positions * width], width), data[positions * width :]
    tokens, codes = unpack(rest[: 2 * positions], 2), np.frombuffer(rest[2 * positions :], np.uint8)
    sizes = np.full(positions, len(lengths))
    levels = ratio_levels(codes, sizes, start=np.zeros(positions, np.int64)).reshape(positions, len(lengths))
    if int(levels.max(initial=0)) > (_LEAST + 1) * _MEAN_UNIT:
        refuse(int(np.argmax(levels.max(-1))), "a run of ranks whose mean is below 2^-150")
    return FlatTargets(
        ids=ids.astype(np.uint32),
        values=np.exp2(tokens / -_TOKEN_UNIT).astype(np.float32),
        sizes=np.ones(positions, np.int64),
        curve=(np.exp2(levels / -_MEAN_UNIT) * lengths).astype(np.float32),
    )


def are_edges(value: Any, width: Any) -> bool:
    """Whether a spec's edges are ranks that ascend from 0 to the number of logits, at most 4096 of them."""
    if not isinstance(value, list | tuple) or not 2 <= len(value) <= 4097:
        return False
    whole = all(type(edge) is int for edge in value)
    return whole and value[0] == 0 and value[-1] == width and all(a < b for a, b in pairwise(value))


def _checked(flat: FlatTargets, spec: Spec) -> Array:
    """[P, C] float64."""
    curve, runs = flat.curve, len(spec["edges"]) - 1
    assert curve is not None
    if curve.shape[1] != runs:
        raise MismatchError(f"curves have {curve.shape[1]} runs, the codec was set up for {runs}; keep the same top=")
    for what, values in (("a run of mass", curve), ("a token of probability", flat.values[:, None])):
        wrong = ~(np.isfinite(values) & (values >= 0) & (values <= 1.001)).all(-1)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise MismatchError(f"supervised position {at} has {what} {values[at].max()}; both are from 0 to 1")
    return curve.astype(np.float64)


def _id_bytes(spec: Spec) -> int:
    """As input ids are stored: 2, 3 or 4."""
    return 2 if spec["logit_width"] <= 2**16 else 3 if spec["logit_width"] <= 2**24 else 4
