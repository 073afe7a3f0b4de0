"""Rows of `split` by compiled loops: the same bytes, arrays and refusals as codec_split.py, which is their slow twin.

Each function gives None where numba is not at hand (compiled.py), or where a loop refuses: then the twin runs on the
same row and says why. A row is short, so what counts is the number of calls: two loops and numpy's sort encode one, a
loop decodes one, ids by rank and input ids included.

Shapes: P supervised positions, M entries of all of them, C entries with a count above 1, L tokens of a row, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .codec_ints import FIRST, MOST_VALUES, join_ints, read_classes, read_frame
from .codec_split import decode_split, decode_split_row, encode_split, encode_split_row, most_values
from .compiled import scratch, stamps
from .errors import FormatError
from .flat import FlatTargets

Array = NDArray[Any]
Spec = Mapping[str, Any]

_KEY_BITS = 32  # numpy sorts these twice as fast as 64
_GROUP_BITS = 8  # positions sorted at once: longer lists sort more slowly
NO_NUMBERS, _NO_MASK = np.zeros(0, np.uint32), np.zeros(0, bool)


def encode_quickly(
    input_ids: Array, flat: FlatTargets, supervised: Array, spec: Spec, table: Array | None
) -> bytes | None:
    """`encode_split_row` (no input ids: `encode_split`) with ids by `table` [V]."""
    fast, rounds, width = compiled.encode_kernels(len(flat.ids)), spec["rounds"], spec["logit_width"]
    id_bits = (width - 1).bit_length()
    group_bits = min(_GROUP_BITS, _KEY_BITS - id_bits - (rounds - 1).bit_length())
    if fast is None or flat.rounds != rounds or not len(flat.sizes) or group_bits < 1:
        return None
    if flat.importance is not None or flat.curve is not None:
        return None
    tokens = whole_numbers(input_ids)
    if tokens is None:
        return None
    positions, entries, length = len(flat.sizes), len(flat.ids), len(tokens)
    if 4 * entries + length > MOST_VALUES:
        return None
    keys, wanted = scratch("keys")(entries, np.uint32), scratch("wanted")(positions, np.uint64)
    spelled, seen = scratch("spelled")(length, np.uint32), stamps(width, positions)
    row = (flat.ids, flat.values, flat.sizes, tokens, supervised, NO_NUMBERS if table is None else table)
    try:
        telling, filled, multiple = fast.sort_keys(
            *row, rounds, width, id_bits, 2**group_bits, *seen, keys, wanted, spelled
        )
    except TypeError:  # arrays of other types or strides than a sampler's
        return None
    if telling < 0:
        return None
    sort_groups(keys, flat.sizes, 2**group_bits)
    head = positions * (2 if length else 1) + multiple
    total = head + entries + telling
    classes, values = scratch("classes")(total, np.uint8), scratch("values")(total, np.uint32)
    lows, seconds = scratch("lows")(total + 1, np.uint8), scratch("seconds")(total + 1, np.uint8)
    low, second = fast.streams(
        *(keys, flat.sizes, wanted, spelled[:telling], filled, multiple, rounds, id_bits, int(length > 0)),
        *(values, classes, lows, seconds),
    )
    return join_ints([classes[:head], classes[head:]], [lows[:low], seconds[:second]]) if low >= 0 else None


def whole_numbers(input_ids: Array) -> Array | None:
    """[L] uint32, or None where that changes a number."""
    tokens = np.asarray(input_ids).astype(np.uint32, copy=False)
    return None if tokens is not input_ids and bool((tokens != input_ids).any()) else tokens


def sort_groups(keys: Array, sizes: Array, group: int) -> None:
    """Sorts the keys of each `group` positions."""
    if len(sizes) <= group:
        return keys.sort()
    ends = np.cumsum(sizes)[group - 1 : -1 : group].tolist()
    for begin, end in pairwise([0, *ends, len(keys)]):
        keys[begin:end].sort()


def decode_quickly(
    data: bytes, positions: int, supervised: Array, spec: Spec, table: Array | None
) -> tuple[Array, FlatTargets] | None:
    """`decode_split_row` (nothing supervised: `decode_split`) with the id of each number by `table` [V]."""
    fast, rounds, width = compiled.kernels(), spec["rounds"], spec["logit_width"]
    if fast is None or not len(data):
        return None
    classes, end = read_classes(data, most_values(positions, len(supervised), spec))
    starts, heads = scratch("starts")(len(classes) + 1, np.uint8), scratch("values")(len(classes), np.uint32)
    tokens, seen = np.empty(len(supervised), np.uint32), stamps(width, positions + 1)
    sound, ids, counts, sizes = fast.split(
        *(classes, np.frombuffer(data, np.uint8), end, FIRST, positions, rounds, width, supervised),
        *(NO_NUMBERS if table is None else table, starts, heads, *seen, tokens),
    )
    return (tokens, FlatTargets(ids=ids, values=counts, sizes=sizes, rounds=rounds)) if sound else None


def decode_rows_quickly(
    blocks: Sequence[bytes],
    supervised_BL: Array,
    spec: Spec,
    tables: Sequence[Array | None],
    memory: Callable[[str], Callable[[int, Any], Array]],
) -> tuple[Array, FlatTargets] | None:
    """`codec.decode_rows`: one loop over all rows, for a call costs a row of 128 tokens a fifth of its own loop."""
    fast, rounds, width = compiled.kernels(), spec["rounds"], spec["logit_width"]
    if fast is None:
        return None
    positions = np.count_nonzero(supervised_BL[:, 1:], axis=1).tolist()
    contents, spans = _contents(blocks, positions, supervised_BL.shape[1], spec)
    values, longest, total = sum(map(len, contents)), max(map(len, contents), default=0), sum(positions)
    lists = addresses(tables, width) if values else None
    if lists is None:
        return None
    starts, heads = scratch("starts")(longest + 1, np.uint8), scratch("values")(longest, np.uint32)
    ids, counts = memory("batch_ids")(values, np.uint32), memory("batch_counts")(values, np.uint32)
    sizes, tokens = memory("batch_sizes")(total, np.int64), np.empty(supervised_BL.shape, np.uint32)
    found = fast.split_rows(
        *(
            np.array(spans, np.int64),
            np.frombuffer(b"".join(contents), np.uint8),
            np.frombuffer(b"".join(blocks), np.uint8),
        ),
        *(FIRST, rounds, width, supervised_BL, lists, (starts, heads), *stamps(width, total + len(blocks))),
        *(tokens, (ids, counts, sizes)),
    )
    if found < 0:
        return None
    return tokens, FlatTargets(ids=ids[:found], values=counts[:found], sizes=sizes, rounds=rounds)


def _contents(
    blocks: Sequence[bytes], positions: Sequence[int], length: int, spec: Spec
) -> tuple[list[bytes], list[tuple[int, int, int, int]]]:
    """Classes of all rows, and the spans that `split_rows` takes; nothing where a frame is damaged, or all are more
    than a row may be."""
    contents, spans, left = [], [], MOST_VALUES
    for block, count in zip(blocks, positions, strict=True):
        try:
            content, end = read_frame(block, min(left, most_values(count, length, spec)))
        except FormatError:
            return [], []
        contents.append(content)
        spans.append((len(content), len(block), end, count))
        left -= len(content)
    return contents, spans


def addresses(tables: Sequence[Array | None], width: int) -> Array | None:
    """[B] int64 where each table lies, 0 for none; None where one is not as the kernel reads it."""
    found: dict[int, int] = {id(None): 0}
    for table in tables:
        if table is None or id(table) in found:
            continue
        if table.dtype != np.uint32 or not table.flags.c_contiguous or table.shape != (width,):
            return None
        found[id(table)] = table.__array_interface__["data"][0]
    return np.array([found[id(table)] for table in tables], np.int64)


# --- compiled or not, for codecs that hold counts beside something else ---------------------------------------


def encode_counts(flat: FlatTargets, spec: Spec) -> bytes:
    """`encode_split`."""
    return encode_quickly(NO_NUMBERS, flat, _NO_MASK, spec, None) or encode_split(flat, spec)


def encode_counts_row(input_ids: Array, flat: FlatTargets, supervised: Array, spec: Spec) -> bytes:
    """`encode_split_row`."""
    quickly = encode_quickly(input_ids, flat, supervised, spec, None)
    return quickly or encode_split_row(input_ids, flat, supervised, spec)


def decode_counts(data: bytes, positions: int, spec: Spec) -> FlatTargets:
    """`decode_split`."""
    quickly = decode_quickly(data, positions, _NO_MASK, spec, None)
    return quickly[1] if quickly else decode_split(data, positions, spec)


def decode_counts_row(block: bytes, seq_len: int, supervised: Array, spec: Spec) -> tuple[Array, FlatTargets]:
    """`decode_split_row`."""
    quickly = decode_quickly(block, int(np.count_nonzero(supervised[1:])), supervised, spec, None)
    return quickly or decode_split_row(block, seq_len, supervised, spec)
