"""What the weights of kept positions are multiplied with, before the targets of any codec: see `position_budget`.

Shapes: P supervised positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec_ints import decode_ints, encode_ints
from .errors import MismatchError
from .flat import SCALE_OCTAVE, FlatTargets
from .words import refuse

Array = NDArray[Any]
Spec = Mapping[str, Any]

_MOST = 255  # levels: a position kept with probability 2^-31


def encode_scale(flat: FlatTargets, spec: Spec) -> bytes:
    """A list of P levels l of scale = share · 2^(l/8); nothing where the spec has no share, or there is no position.

    Raises:
        MismatchError: a scale between two levels, for it would not be the inverse of a probability any more.
    """
    if "share" not in spec or not len(flat.sizes):
        return b""
    assert flat.scale is not None
    exact = np.log2(flat.scale / spec["share"]) * SCALE_OCTAVE
    levels = np.rint(exact).clip(0, _MOST)
    wrong = np.flatnonzero(~(np.abs(exact - levels) < 1e-3))
    if len(wrong):
        raise MismatchError(
            f"supervised position {wrong[0]} has scale {flat.scale[wrong[0]]}; with share={spec['share']} it is "
            "share * 2^(l/8), l a whole number from 0 to 255"
        )
    return encode_ints([levels])


def decode_scale(data: bytes, positions: int, spec: Spec) -> tuple[Array | None, int]:
    """[P] float64 and the number of bytes they took; None and 0 where the spec has no share."""
    if "share" not in spec:
        return None, 0
    if not positions:
        return np.zeros(0), 0
    levels, used = decode_ints(data, positions)
    if len(levels) != positions:
        refuse(len(levels), "no scale")
    if int(levels.max()) > _MOST:
        refuse(int(np.argmax(levels)), f"level {levels.max()} of its scale, at most {_MOST} fit")
    return spec["share"] * np.exp2(levels / SCALE_OCTAVE), used
