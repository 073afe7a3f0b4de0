"""Compiled twins of the loops that read a row, by numba (the extra `fast`); reached through `compiled.kernels()` only.

What a kernel does not take, it says no more of than `False` or -1: the numpy code beside its caller then runs on the
same bytes and refuses by name. So errors are the same by construction; the tests say that both take the same bytes.
Nothing checks bounds here: an index is checked before it is used, or counts up to a length that was.

All release the GIL, so that one thread reads ahead while another computes. They write into memory that is given where a
caller can use it again: fresh pages cost more than the work on them.

Shapes: T values of a list, P supervised positions, M entries of all of them, L tokens of a row, K entries of the
longest position.
"""

# mypy: no-check-untyped-defs
# What a variable is here, numba infers; mypy would see numpy's scalars.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, register_jitable

_BYTES, _NUMBERS, _SIZES, _FLAGS, _WEIGHTS = (
    types.Array(of, 1, "C", readonly=True)
    for of in (types.uint8, types.uint32, types.int64, types.boolean, types.float32)
)
_LONG, _OUT8, _OUT32 = types.int64, types.uint8[::1], types.uint32[::1]
_LONGS, _LONGS_2D = (types.Array(types.int64, axes, "C", readonly=True) for axes in (1, 2))
_FLAGS_2D = types.Array(types.boolean, 2, "C", readonly=True)


def compiled_for(*arguments: Any) -> Callable[[Any], Any]:
    """Compiles for these arguments when this module is imported, and keeps the code on disk: in __pycache__ or, if that
    is read-only, in the user's cache folder (numba's NUMBA_CACHE_DIR). Where neither works, each process
    compiles."""

    def compile_it(function: Any) -> Any:
        try:
            return numba.njit(arguments, nogil=True, cache=True)(function)
        except Exception:  # no folder to write to, a full disk, a damaged file: that can raise anything
            return numba.njit(arguments, nogil=True)(function)

    return compile_it


@compiled_for(_BYTES, _BYTES, _LONG, _NUMBERS, _OUT32)
def ints(classes, data, end, first, values):
    """`codec_ints.decode_ints` below the zstd frame: fills values [T] and returns where the raw bytes end, or -1.

    Args:
        classes: [T].
        end: where the raw bytes begin in `data`, above 0.
        first: [256] the least value of each class.
    """
    lows, seconds = 0, 0
    for each in classes:
        lows += each >= 128
        seconds += each >= 240
    if end < 1 or end + lows + seconds > len(data) or len(values) < len(classes) or len(first) < 256:
        return -1
    low, second = np.uint64(end), np.uint64(end + lows)
    for i in range(len(classes)):
        one, two = np.uint64(classes[i] >= 128), np.uint64(classes[i] >= 240)
        # No branch: about half of all ids take a raw byte, and none can tell which. The others read byte 0, times 0.
        rest = np.uint64(data[low * one]) * one + (np.uint64(data[second * two]) * two << np.uint64(8))
        values[i] = np.uint64(first[classes[i]]) + rest
        low += one
        second += two
    return np.int64(second)


@register_jitable
def _value(classes, data, first, at, low, second):
    """The integer of classes[at], and where the next raw bytes are."""
    # No branch: about half of all ids take a raw byte, and none can tell which. The others read one that is not theirs.
    each, last = np.uint64(classes[at]), np.uint64(len(data)) - np.uint64(1)
    one, two = each >> np.uint64(7), np.uint64(each >= np.uint64(240))
    rest = np.uint64(data[min(low, last)]) & (np.uint64(0) - one)
    rest += (np.uint64(data[min(second, last)]) & (np.uint64(0) - two)) << np.uint64(8)
    return np.uint64(first[each]) + rest, low + one, second + two


@intrinsic
def _pointer(context, address):
    """The address of a uint32."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint32)(types.int64), generate


@register_jitable
def _table(address, width):
    """[width] uint32 at an address, nothing at 0. Rows of a batch are of many shards, each with a table of its own, and
    a kernel takes no list of arrays."""
    return numba.carray(_pointer(address), (width if address else 0,), np.uint32)


@register_jitable
def _split_row(row, positions, rounds, width, supervised, table, scratches, seen, mark, tokens, ids, counts, sizes):
    """One row of `split` or `split_rows`, into the beginnings of ids, counts and sizes: how many entries, or -1.

    Args:
        row: classes, data, where its raw bytes begin, and the least value of each class.
        scratches: starts and heads.
    """
    (classes, data, end, first), (starts, heads) = row, scratches
    lows, seconds = 0, 0
    for each in classes:
        lows += each >= 128
        seconds += each >= 240
    if (
        end < 1
        or end + lows + seconds != len(data)
        or len(first) < 256
        or not 0 <= positions <= len(sizes)
        or len(seen) < width
    ):
        return -1
    slots, ranked = positions if len(supervised) else 0, len(table) > 0
    if len(classes) < positions + slots or len(starts) <= len(classes) or len(heads) < len(classes):
        return -1
    if len(tokens) != len(supervised) or (ranked and len(table) < width):
        return -1
    low, second, total, filled = np.uint64(end), np.uint64(end + lows), 0, 0
    for p in range(positions):
        heads[p], low, second = _value(classes, data, first, p, low, second)
        total += np.int64(heads[p])
        filled += heads[p] > 0
    head = positions + total + slots
    if head > len(classes) or min(len(ids), len(counts)) < len(classes) - head:
        return -1
    for i in range(positions, head):
        heads[i], low, second = _value(classes, data, first, i, low, second)
    most = len(classes) - head
    counts[:most] = 1
    starts[: most + 1] = 0
    top, rest, entries = positions, positions + filled, 0
    for p in range(positions):
        many, left, count = np.int64(heads[p]), np.int64(rounds), np.int64(2)
        if entries + many > most:
            return -1
        if many:
            for j in range(many - 1, 0, -1):  # the smallest count is 2 + its step
                step = np.int64(heads[rest + j - 1])
                starts[entries + j + 1] = step > 0
                count += step
                left -= count
                if left < 0:
                    return -1
                counts[entries + j] = count
            step = np.int64(heads[top])
            starts[entries + 1] = step > 0
            count += step
            left -= count
            counts[entries] = count
            starts[entries + many] = 1
            top += 1
            rest += many - 1
        if left < 0:
            return -1
        starts[entries] = 3  # of a run, and of a position
        sizes[p] = many + left
        entries += many + left
        if entries > most:
            return -1
    # All ids in one loop: a loop for each position, or run, ends with a branch mispredicted.
    token, here, one = np.uint64(0), np.uint64(mark) - np.uint64(1), np.uint64(1)
    for i in range(entries):
        step, low, second = _value(classes, data, first, np.uint64(head) + np.uint64(i), low, second)
        start = np.uint64(starts[i])
        here += start >> one
        follows = (start & one) - one  # all bits, or none where a run begins
        token = step + ((token + one) & follows)
        if token >= np.uint64(width) or np.uint64(seen[token]) == here:
            return -1
        seen[token] = here
        ids[i] = table[token] if ranked else token
    # The input ids: an entry of the position before them, or spelled out.
    at, p, before = head + entries, 0, 0
    for t in range(len(tokens)):
        slot = 0
        if t > 0 and supervised[t]:
            if p == positions:
                return -1
            slot = np.int64(heads[positions + total + p])
            if slot > sizes[p]:
                return -1
            before += sizes[p]
            p += 1
        if slot:
            tokens[t] = ids[before - sizes[p - 1] + slot - 1]
        else:
            if at == len(classes):
                return -1
            token, low, second = _value(classes, data, first, at, low, second)
            if token >= np.uint64(width):
                return -1
            tokens[t] = table[token] if ranked else token
            at += 1
    if at != len(classes) or (len(tokens) > 0 and p != positions):
        return -1
    return entries


@compiled_for(
    _BYTES, _BYTES, _LONG, _NUMBERS, _LONG, _LONG, _LONG, _FLAGS, _NUMBERS, _OUT8, _OUT32, _OUT32, _LONG, _OUT32
)
def split(classes, data, end, first, positions, rounds, width, supervised, table, starts, heads, seen, mark, tokens):
    """`codec_split.decode_split_row` below its zstd frame: whether it is sound, ids [M], counts [M], sizes [P].

    Args:
        classes: [T].
        end: where the raw bytes begin in `data`.
        first: [256] the least value of each class.
        supervised: [L] bool, `positions` of them from the second on; nothing for targets alone.
        table: [V] the id of each number in the list; nothing where that is the number.
        starts: scratch, at least T + 1.
        heads: scratch, at least T.
        seen: scratch, at least `width`, nothing above mark; what is in it afterwards is at most mark + positions.
        mark: above 0, and mark + positions is below 2^32.
        tokens: [L], is filled.
    """
    ids, counts = np.empty(len(classes), np.uint32), np.empty(len(classes), np.uint32)
    sizes = np.empty(max(positions, 0), np.int64)
    entries = _split_row(
        *((classes, data, end, first), positions, rounds, width, supervised, table, (starts, heads), seen, mark),
        *(tokens, ids, counts, sizes),
    )
    return entries >= 0, ids[: max(entries, 0)], counts[: max(entries, 0)], sizes


@compiled_for(
    *(_LONGS_2D, _BYTES, _BYTES, _NUMBERS, _LONG, _LONG, _FLAGS_2D, _LONGS),
    *(_OUT8, _OUT32, _OUT32, _LONG, types.uint32[:, ::1], _OUT32, _OUT32, types.int64[::1]),
)
def split_rows(
    spans,
    classes,
    data,
    first,
    rounds,
    width,
    supervised,
    tables,
    starts,
    heads,
    seen,
    mark,
    tokens,
    ids,
    counts,
    sizes,
):
    """`split` of B rows at once: how many entries they have together, or -1 where one is not sound. Fills ids [M],
    counts [M] and sizes [P], a row after another.

    Args:
        spans: [B, 4] of each row: its classes, its bytes, where in those its raw bytes begin, its positions.
        classes, data: those of all rows, one after another.
        supervised: [B, L].
        tables: [B] addresses of what `split` calls table, uint32 [V] without holes; 0 where a number is the id.
        starts, heads: as for the longest row.
        mark: mark + B + P is below 2^32.
        tokens: [B, L].
    """
    class_at, byte_at, size_at, at = 0, 0, 0, 0
    if not len(spans) == len(supervised) == len(tables) == len(tokens) or spans.shape[1] != 4:
        return -1
    for b in range(len(spans)):
        length, size, end, positions = spans[b, 0], spans[b, 1], spans[b, 2], spans[b, 3]
        if min(length, size, positions) < 0 or length > len(classes) - class_at or size > len(data) - byte_at:
            return -1
        row = (classes[class_at : class_at + length], data[byte_at : byte_at + size], end, first)
        found = _split_row(
            *(row, positions, rounds, width, supervised[b], _table(tables[b], width), (starts, heads), seen, mark),
            *(tokens[b], ids[at:], counts[at:], sizes[size_at:]),
        )
        if found < 0:
            return -1
        class_at, byte_at, size_at, at = class_at + length, byte_at + size, size_at + positions, at + found
        mark += positions + 1
    return at


_KEYS, _WANTED = types.uint32[::1], types.uint64[::1]
_NONE = np.uint64(2**63)


@compiled_for(
    *(_NUMBERS, _NUMBERS, _SIZES, _NUMBERS, _FLAGS, _NUMBERS),
    *(_LONG, _LONG, _LONG, _LONG, _OUT32, _LONG, _KEYS, _WANTED, _OUT32),
)
def sort_keys(
    ids, counts, sizes, tokens, supervised, table, rounds, width, id_bits, group, seen, mark, keys, wanted, spelled
):
    """What `codec_split._sorted` and `input_streams` make of a row, before the sort. Returns how many input ids are
    spelled out, how many positions have a count above 1, how many entries have; or -1 where something is not sound.

    A key is: the position modulo `group` (a power of 2, at least 2), rounds - count, then `id_bits` of id. All keys of
    a group of positions, sorted, are its entries in the order of the format.

    Args:
        tokens, supervised: [L] input ids; nothing for targets alone.
        table: [V] the number of each id in the list; nothing where that is the id.
        seen, mark: as in `split`.
        keys: [M], is filled.
        wanted: [P], is filled with the key of the next token, or `_NONE`.
        spelled: [L], is filled with the input ids that no key tells.
    """
    at, filled, multiple, t, telling, ranked = 0, 0, 0, 0, 0, len(table) > 0
    if len(counts) != len(ids) or len(keys) != len(ids) or len(seen) < width or (ranked and len(table) < width):
        return -1, 0, 0
    if len(tokens) != len(supervised) or len(spelled) != len(tokens) or len(wanted) != len(sizes):
        return -1, 0, 0
    count_bits = 0
    while rounds > 1 << count_bits:
        count_bits += 1
    for p in range(len(sizes)):
        if not 0 <= sizes[p] <= len(ids) - at:
            return -1, 0, 0
        following = np.uint64(_NONE)
        if len(tokens):
            while t < len(tokens) and (t == 0 or not supervised[t]):
                if tokens[t] >= width:
                    return -1, 0, 0
                spelled[telling] = table[tokens[t]] if ranked else tokens[t]
                telling += 1
                t += 1
            if t == len(tokens) or tokens[t] >= width:
                return -1, 0, 0
            following = np.uint64(tokens[t])
        left, many, here, told = np.int64(rounds), 0, np.uint32(mark + p), np.uint64(_NONE)
        for i in range(at, at + sizes[p]):
            token, count = np.uint64(ids[i]), np.int64(counts[i])
            if token >= np.uint64(width) or not 1 <= count <= left:
                return -1, 0, 0
            number = np.uint64(table[token] if ranked else token)
            if number >= np.uint64(width) or seen[number] == here:  # by rank: frequent ids are close together
                return -1, 0, 0
            seen[number] = here
            left -= count
            many += count > 1
            key = ((p & group - 1) << count_bits) + rounds - count
            keys[i] = (np.uint64(key) << np.uint64(id_bits)) + number
            if token == following:
                told = np.uint64(keys[i])
        if left:
            return -1, 0, 0
        wanted[p] = told
        if len(tokens):
            if told == np.uint64(_NONE):
                spelled[telling] = table[tokens[t]] if ranked else tokens[t]
                telling += 1
            t += 1
        at += sizes[p]
        filled += many > 0
        multiple += many
    while t < len(tokens):
        if (t > 0 and supervised[t]) or tokens[t] >= width:
            return -1, 0, 0
        spelled[telling] = table[tokens[t]] if ranked else tokens[t]
        telling += 1
        t += 1
    return (telling if at == len(ids) else -1), filled, multiple


@compiled_for(
    *(_KEYS, _SIZES, _WANTED, _NUMBERS, _LONG, _LONG, _LONG, _LONG, _LONG),
    *(_OUT32, _OUT8, _OUT8, _OUT8),
)
def streams(keys, sizes, wanted, spelled, filled, multiple, rounds, id_bits, row, values, classes, lows, seconds):
    """`codec_split._encode` above its zstd frame: how many raw bytes there are of each kind, or -1; fills the classes
    [T] and the raw bytes.

    Args:
        keys, wanted, spelled, filled, multiple: of `sort_keys`; the keys sorted within their groups.
        row: 1, or 0 for targets alone.
        values: scratch [T].
        lows, seconds: at least T + 1.
    """
    positions, one, id_mask = len(sizes), np.uint32(1), np.uint32((1 << id_bits) - 1)
    top, rest, slots = positions, positions + filled, positions + multiple
    head, at, id_bits = slots + row * positions, 0, np.uint32(id_bits)
    if len(values) != head + len(keys) + len(spelled) or len(classes) != len(values) or len(wanted) != positions:
        return -1, -1
    if len(lows) <= len(values) or len(seconds) <= len(values) or not len(keys):
        return -1, -1
    count_mask = 1
    while count_mask < rounds:
        count_mask *= 2
    count_mask -= 1
    for p in range(positions):
        if sizes[p] < 1 or sizes[p] > len(keys) - at:
            return -1, -1
        if row:
            slot, told = 0, wanted[p]
            for j in range(at, at + sizes[p]):
                slot += np.uint64(keys[j]) <= told
            values[slots + p] = slot if told != np.uint64(_NONE) else 0
        many, count = 0, rounds - (np.int64(keys[at] >> id_bits) & count_mask)
        while count > 1:
            many += 1
            below = 1
            if many < sizes[p]:
                below = rounds - (np.int64(keys[at + many] >> id_bits) & count_mask)
            if many == 1:
                values[top] = count - max(below, 2)
                top += 1
            else:
                values[rest] = count - max(below, 2)
                rest += 1
            count = below
        values[p] = many
        at += sizes[p]
    values[head] = keys[0] & id_mask
    for i in range(1, len(keys)):
        follows = np.uint32(keys[i] >> id_bits == keys[i - 1] >> id_bits)
        values[head + i] = (keys[i] & id_mask) - ((keys[i - 1] & id_mask) + one) * follows
    for i in range(len(spelled)):
        values[head + len(keys) + i] = spelled[i]
    # Two loops: the first becomes SIMD code, three times as fast in all.
    for i in range(len(values)):
        large, larger = np.uint32(values[i] >= np.uint32(128)), np.uint32(values[i] >= np.uint32(28800))
        over = values[i] - (large << np.uint32(7)) - np.uint32(28672) * larger
        classes[i] = (over >> (large + larger << np.uint32(3))) + (large << np.uint32(7)) + np.uint32(112) * larger
    low, second = np.uint64(0), np.uint64(0)
    for i in range(len(values)):
        lows[low] = (values[i] - np.uint32(128)) & np.uint32(255)  # that of values - 28800 too
        low += np.uint64(classes[i]) >> np.uint64(7)
        if classes[i] >= 240:
            seconds[second] = (values[i] - np.uint32(28800)) >> np.uint32(8) & np.uint32(255)
            second += np.uint64(1)
    return np.int64(low), np.int64(second)


@compiled_for(_NUMBERS, _NUMBERS, _SIZES, _FLAGS, _OUT32)
def inputs(values, ids, sizes, supervised, tokens):
    """`codec_split.decode_inputs` below its list: whether it is sound; fills tokens [L].

    Args:
        values: [P] which entry of its position each next token is, then what is spelled out.
        ids, sizes: [M], [P].
        supervised: [L] bool.
    """
    positions = len(sizes)
    if len(values) < positions or len(tokens) != len(supervised):
        return False
    spelled, p, first = positions, 0, 0
    for i in range(len(tokens)):
        entry = 0
        if i > 0 and supervised[i]:
            if p == positions:
                return False
            entry = np.int64(values[p])
            if entry > sizes[p] or first + sizes[p] > len(ids):
                return False
            first += sizes[p]
            p += 1
        if entry:
            tokens[i] = ids[first - sizes[p - 1] + entry - 1]
        else:
            if spelled == len(values):
                return False
            tokens[i] = values[spelled]
            spelled += 1
    return p == positions and spelled == len(values)


@compiled_for(_NUMBERS, types.int64[::1])
def tally(ids, uses):
    """`uses[each] += 1` for each id that is below len(uses)."""
    for each in ids:
        if each < len(uses):
            uses[each] += 1


@compiled_for(_NUMBERS, _OUT32)
def renumber(table, ids):
    """`ids[:] = table[ids]`, or False, and ids as they were, where one is none of the table's."""
    most = np.uint32(0)
    for each in ids:
        most = max(most, each)
    if len(ids) and most >= len(table):
        return False
    for i in range(len(ids)):
        ids[i] = table[ids[i]]
    return True


@compiled_for(_NUMBERS, _WEIGHTS, _SIZES, _FLAGS, types.int64[:, ::1], types.float32[:, ::1])
def pad(ids, weights, sizes, supervised, ids_PK, weights_PK):
    """One row of `padded.pad_rows`, into zeros: whether all of it fitted."""
    at, row = 0, 0
    if len(weights) != len(ids) or len(ids_PK) != len(supervised) or ids_PK.shape != weights_PK.shape:
        return False
    for p in range(len(supervised)):
        if not supervised[p]:
            continue
        if row == len(sizes) or not 0 <= sizes[row] <= min(ids_PK.shape[1], len(ids) - at):
            return False
        for j in range(sizes[row]):
            ids_PK[p, j] = ids[at + j]
            weights_PK[p, j] = weights[at + j]
        at += sizes[row]
        row += 1
    return row == len(sizes) and at == len(ids)


@compiled_for(
    *(_NUMBERS, _NUMBERS, _SIZES, _LONG, types.Array(types.boolean, 2, "C", readonly=True)),
    *(types.int64[:, :, ::1], types.float32[:, :, ::1]),
)
def pad_counts(ids, counts, sizes, rounds, supervised, ids_BPK, weights_BPK):
    """`padded.pad_joined` of counts, padding written too: whether all of it fitted."""
    at, row = 0, 0
    if len(counts) != len(ids) or ids_BPK.shape != weights_BPK.shape or ids_BPK.shape[:2] != supervised.shape:
        return False
    for b in range(supervised.shape[0]):
        for p in range(supervised.shape[1]):
            size = 0
            if supervised[b, p]:
                if row == len(sizes) or not 0 <= sizes[row] <= min(ids_BPK.shape[2], len(ids) - at):
                    return False
                size = sizes[row]
                row += 1
            for j in range(size):
                ids_BPK[b, p, j] = ids[at + j]
            for j in range(size):
                weights_BPK[b, p, j] = np.float32(np.float64(counts[at + j]) / np.float64(rounds))
            ids_BPK[b, p, size:] = 0
            weights_BPK[b, p, size:] = 0
            at += size
    return row == len(sizes) and at == len(ids)
