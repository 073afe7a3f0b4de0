"""Rows of `split_prob` and `split_weight` by compiled loops: the same bytes, arrays and refusals as
codec_split_weights.py, which is their slow twin; None where that is to do it, as in codec_split_fast.py.

Shapes: B rows, P supervised positions, M entries of all of them, L tokens of a row, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .codec_ints import FIRST, MOST_VALUES, join_ints, read_frame
from .codec_split import MOST_ENTRIES
from .codec_split_fast import NO_NUMBERS, addresses, sort_groups, whole_numbers
from .codec_split_weights import OCTAVE, POWERS, Rounding, unbiased
from .compiled import scratch, stamps
from .errors import FormatError
from .flat import FlatTargets

Array = NDArray[Any]
Spec = Mapping[str, Any]

_DEARER = 4  # times as long as to read an entry numpy takes to write one


# --- writing --------------------------------------------------------------------------------------------


def encode_quickly(
    input_ids: Array,
    flat: FlatTargets,
    supervised: Array,
    spec: Spec,
    table: Array | None,
    *,
    rounding: Rounding,
    most: int = 1,
) -> bytes | None:
    """`encode_weights_row` (no input ids: `encode_weights`) with ids by `table` [V]."""
    fast = compiled.encode_kernels(_DEARER * len(flat.ids))
    width, tokens = spec["logit_width"], whole_numbers(input_ids)
    if fast is None or tokens is None or flat.rounds is not None or flat.curve is not None or not len(flat.ids):
        return None
    positions, entries, length, id_bits = len(flat.sizes), len(flat.ids), len(tokens), (width - 1).bit_length()
    if max(positions, entries) > MOST_ENTRIES or flat.values.dtype != np.float32:
        return None
    keys, wanted = scratch("keys")(entries, np.uint32), scratch("wanted")(positions, np.uint64)
    levels, spelled = scratch("values")(entries, np.uint32), scratch("spelled")(length, np.uint32)
    weights = flat.values / np.float32(most)
    row = (flat.ids, weights, weights.view(np.uint32), flat.sizes, tokens, supervised)
    numbers = NO_NUMBERS if table is None else table
    try:
        telling, filled, level_bits, group_bits = fast.weight_keys(
            *(*row, numbers, width, id_bits, _how(rounding), *stamps(width, positions), keys, levels, wanted, spelled)
        )
    except TypeError:  # arrays of other types or strides than a decoder's
        return None
    if telling < 0:
        return None
    sort_groups(keys, flat.sizes, 2**group_bits)
    head = positions + 2 * entries  # from here on nobody reads the levels, whose memory `values` takes
    total = head + (positions if length else 0) + telling
    classes, values = scratch("classes")(total, np.uint8), scratch("values")(total, np.uint32)
    raw = scratch("lows")(total + 1, np.uint8), scratch("seconds")(total + 1, np.uint8)
    ends = fast.weight_streams(
        *(keys, flat.sizes, wanted, spelled[:telling], filled, id_bits, level_bits, int(length > 0)),
        *(values, classes, *raw),
    )
    return _joined(classes, (positions, filled, entries, length > 0), raw, ends) if ends[0] >= 0 else None


def _joined(classes: Array, counts: tuple[int, int, int, bool], raw: tuple[Array, Array], ends: Sequence[int]) -> bytes:
    """The list of targets, and that of input ids where there are any."""
    (positions, filled, entries, has_inputs), (lows, seconds), (low, second, more, most) = counts, raw, ends
    steps, ids, slots = positions + filled, positions + entries, positions + 2 * entries
    streams = [classes[:positions], classes[positions:steps], classes[steps:ids], classes[ids:slots]]
    targets = join_ints(streams, [lows[:low], seconds[:second]])
    if not has_inputs:
        return targets
    inputs = [classes[slots : slots + positions], classes[slots + positions :]]
    return targets + join_ints(inputs, [lows[low : low + more], seconds[second : second + most]])


@cache
def _how(rounding: Rounding) -> tuple[Array, Array, np.uint32]:
    """What `weight_keys` takes: where levels change within an octave, all weights, and whether coins decide."""
    coins = rounding is unbiased
    changes = np.floor((np.exp2((np.arange(OCTAVE) + (0 if coins else 0.5)) / OCTAVE) - 1) * 2**23).astype(np.uint32)
    edges = np.full((2, 256), 2**32 - 1, np.uint32)
    edges[0] = np.searchsorted(changes, np.arange(256) << 15)
    edges[1, changes >> 15] = changes
    return edges, POWERS, np.uint32(coins)


# --- reading --------------------------------------------------------------------------------------------


def decode_quickly(
    data: bytes, positions: int, supervised: Array, spec: Spec, table: Array | None, *, most: int = 1
) -> tuple[Array, FlatTargets] | None:
    """`decode_weights_row` (nothing supervised: `decode_weights`) with the id of each number by `table` [V]."""
    found = _decoded([data], [positions], supervised[None], spec, [table], compiled.fresh, most)
    return found and (found[0][0], found[1])


def decode_rows_quickly(
    blocks: Sequence[bytes],
    supervised_BL: Array,
    spec: Spec,
    tables: Sequence[Array | None],
    memory: Callable[[str], Callable[[int, Any], Array]],
    *,
    most: int = 1,
) -> tuple[Array, FlatTargets] | None:
    """`codec.decode_rows`."""
    positions = np.count_nonzero(supervised_BL[:, 1:], axis=1).tolist()
    return _decoded(blocks, positions, supervised_BL, spec, tables, memory, most)


def _decoded(
    blocks: Sequence[bytes],
    positions: Sequence[int],
    supervised_BL: Array,
    spec: Spec,
    tables: Sequence[Array | None],
    memory: Callable[[str], Callable[[int, Any], Array]],
    most: int,
) -> tuple[Array, FlatTargets] | None:
    fast, width = compiled.kernels(), spec["logit_width"]
    if fast is None:
        return None
    contents, spans = _contents(fast, blocks, positions, supervised_BL.shape[1], width)
    lists = addresses(tables, width) if spans else None
    if lists is None:
        return None
    longest, total = max(span[0] for span in spans), sum(positions)
    entries = sum(span[0] for span in spans) // 2
    scratches = scratch("starts")(longest, np.uint8), scratch("values")(longest, np.uint32)
    found = memory("batch_ids")(entries, np.uint32), memory("batch_weights")(entries, np.float32)
    sizes, tokens = memory("batch_sizes")(total, np.int64), np.empty(supervised_BL.shape, np.uint32)
    bytes_ = (np.frombuffer(b"".join(each), np.uint8) for each in (contents, blocks))
    taken = fast.weight_rows(
        *(np.array(spans, np.int64), *bytes_, FIRST, _powers(most), width, supervised_BL, lists, scratches),
        *(*stamps(width, total + len(blocks)), tokens, (*found, sizes)),
    )
    if taken < 0:
        return None
    return tokens, FlatTargets(ids=found[0][:taken], values=found[1][:taken], sizes=sizes)


def _contents(
    fast: Any, blocks: Sequence[bytes], positions: Sequence[int], length: int, width: int
) -> tuple[list[bytes], list[tuple[int, ...]]]:
    """Classes of both lists of all rows, and the spans that `weight_rows` takes; nothing where a frame is damaged, or
    all are more than a row may be."""
    contents: list[bytes] = []
    spans: list[tuple[int, ...]] = []
    left = MOST_VALUES
    for block, count in zip(blocks, positions, strict=True):
        try:
            targets, end = read_frame(block, min(left, count * (1 + 2 * width))) if count else (b"", 0)
            begin = end + fast.raw_bytes(np.frombuffer(targets, np.uint8))
            inputs, after = read_frame(block[begin:], min(left - len(targets), count + length)) if length else (b"", 0)
        except FormatError:
            return [], []
        contents += [targets, inputs]
        spans.append((len(targets), len(inputs), len(block), end, begin + after, count))
        left -= len(targets) + len(inputs)
    return contents, spans


@cache
def _powers(most: int) -> Array:
    """[levels] float32 weights."""
    found: Array = (most * POWERS).astype(np.float32)
    return found
