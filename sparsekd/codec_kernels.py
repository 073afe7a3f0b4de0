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

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, register_jitable

from .array_kernels import BYTES, FLAGS, FLAGS_2D, LONG, NUMBERS, OUT8, OUT32, WEIGHTS, compiled_for

_LONGS, _LONGS_2D = (types.Array(types.int64, axes, "C", readonly=True) for axes in (1, 2))
_SCRATCHES = types.Tuple((OUT8, OUT32))


@register_jitable
def _value(classes, data, first, at, low, second):
    """The integer of classes[at], and where the next raw bytes are; the first ones are not at 0."""
    # No branch: about half of all ids take a raw byte, and none can tell which. The others read the one before theirs.
    each = np.uint64(classes[at])
    one, two = each >> np.uint64(7), np.uint64(each >= np.uint64(240))
    low, second = low + one, second + two
    rest = np.uint64(data[low - np.uint64(1)]) & (np.uint64(0) - one)
    rest += (np.uint64(data[second - np.uint64(1)]) & (np.uint64(0) - two)) << np.uint64(8)
    return np.uint64(first[each]) + rest, low, second


@register_jitable
def _raw_bytes(classes):
    """How many raw bytes integers of these classes take: the lows, and the seconds."""
    lows, seconds = 0, 0
    for each in classes:
        lows += each >= 128
        seconds += each >= 240
    return lows, seconds


@compiled_for(BYTES)
def raw_bytes(classes):
    """How many raw bytes integers of these classes take in all."""
    return sum(_raw_bytes(classes))


@compiled_for(BYTES, BYTES, LONG, NUMBERS, OUT32)
def ints(classes, data, end, first, values):
    """`codec_ints.decode_ints` below the zstd frame: fills values [T] and returns where the raw bytes end, or -1.

    Args:
        classes: [T].
        end: where the raw bytes begin in `data`, above 0.
        first: [256] the least value of each class.
    """
    lows, seconds = _raw_bytes(classes)
    if end < 1 or end + lows + seconds > len(data) or len(values) < len(classes) or len(first) < 256:
        return -1
    low, second = np.uint64(end), np.uint64(end + lows)
    for i in range(len(classes)):
        values[i], low, second = _value(classes, data, first, i, low, second)
    return np.int64(second)


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
def _fits(row, raw, positions, width, supervised, table, seen, tokens, sizes):
    """Whether a row's raw bytes end where its data does, and all that is given is as long as it must be."""
    _, data, end, first = row
    if end < 1 or end + raw != len(data) or len(first) < 256:
        return False
    if not 0 <= positions <= len(sizes) or len(seen) < width or len(tokens) != len(supervised):
        return False
    return len(table) == 0 or len(table) >= width


@register_jitable
def _read_ids(row, head, entries, cursor, width, table, seen, mark, starts, ids):
    """Fills ids[:entries] from the steps that begin at classes[head]: whether they are sound, and the raw bytes after.

    Args:
        cursor: the next raw bytes.
        starts: bit 0 where a run of ids begins, bit 1 where a position does, of whose ids none may come twice.
    """
    # All ids in one loop: a loop for each position, or run, ends with a branch mispredicted.
    (classes, data, _, first), (low, second), ranked = row, cursor, len(table) > 0
    token, here, one = np.uint64(0), np.uint64(mark) - np.uint64(1), np.uint64(1)
    for i in range(entries):
        step, low, second = _value(classes, data, first, np.uint64(head) + np.uint64(i), low, second)
        start = np.uint64(starts[i])
        here += start >> one
        follows = (start & one) - one  # all bits, or none where a run begins
        token = step + ((token + one) & follows)
        if token >= np.uint64(width) or np.uint64(seen[token]) == here:
            return False, low, second
        seen[token] = here
        ids[i] = table[token] if ranked else token
    return True, low, second


@register_jitable
def _read_tokens(row, at, cursor, slots, positions, width, supervised, table, ids, sizes, tokens):
    """Fills the input ids [L], each an entry of the position before it (`slots`, from 1 on), or spelled out from
    classes[at] on: whether they use up slots and classes."""
    (classes, data, _, first), (low, second), ranked = row, cursor, len(table) > 0
    p, before = 0, 0
    for t in range(len(tokens)):
        slot = 0
        if t > 0 and supervised[t]:
            if p == positions:
                return False
            slot = np.int64(slots[p])
            if slot > sizes[p]:
                return False
            before += sizes[p]
            p += 1
        if slot:
            tokens[t] = ids[before - sizes[p - 1] + slot - 1]
        else:
            if at == len(classes):
                return False
            token, low, second = _value(classes, data, first, at, low, second)
            if token >= np.uint64(width):
                return False
            tokens[t] = table[token] if ranked else token
            at += 1
    return at == len(classes) and (len(tokens) == 0 or p == positions)


# --- split ------------------------------------------------------------------------------------------------


@register_jitable
def _read_counts(heads, positions, filled, rounds, most, starts, counts, sizes):
    """Fills counts [M], starts (as in `_read_ids`) and sizes [P] from how many are above 1 and the steps between those:
    M, or -1 beyond `most`."""
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
        starts[entries] = 3
        sizes[p] = many + left
        entries += many + left
        if entries > most:
            return -1
    return entries


@register_jitable
def _split_row(row, positions, rounds, width, supervised, table, scratches, seen, mark, tokens, found):
    """One row of `split` or `split_rows`, into the beginnings of ids, counts and sizes: how many entries, or -1.

    Args:
        row: classes, data, where its raw bytes begin, and the least value of each class.
        scratches, found: starts and heads; ids, counts and sizes.
    """
    (classes, data, end, first), (starts, heads), (ids, counts, sizes) = row, scratches, found
    lows, seconds = _raw_bytes(classes)
    if not _fits(row, lows + seconds, positions, width, supervised, table, seen, tokens, sizes):
        return -1
    slots = positions if len(supervised) else 0
    if len(classes) < positions + slots or len(starts) <= len(classes) or len(heads) < len(classes):
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
    entries = _read_counts(heads, positions, filled, rounds, len(classes) - head, starts, counts, sizes)
    if entries < 0:
        return -1
    sound, low, second = _read_ids(row, head, entries, (low, second), width, table, seen, mark, starts, ids)
    told = (row, head + entries, (low, second), heads[positions + total : head], positions, width, supervised, table)
    return entries if sound and _read_tokens(*told, ids, sizes, tokens) else -1


@compiled_for(BYTES, BYTES, LONG, NUMBERS, LONG, LONG, LONG, FLAGS, NUMBERS, OUT8, OUT32, OUT32, LONG, OUT32)
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
        *(tokens, (ids, counts, sizes)),
    )
    return entries >= 0, ids[: max(entries, 0)], counts[: max(entries, 0)], sizes


@compiled_for(
    *(_LONGS_2D, BYTES, BYTES, NUMBERS, LONG, LONG, FLAGS_2D, _LONGS),
    *(_SCRATCHES, OUT32, LONG, types.uint32[:, ::1], types.Tuple((OUT32, OUT32, types.int64[::1]))),
)
def split_rows(spans, classes, data, first, rounds, width, supervised, tables, scratches, seen, mark, tokens, found):
    """`split` of B rows at once: how many entries they have together, or -1 where one is not sound. Fills ids [M],
    counts [M] and sizes [P], a row after another.

    Args:
        spans: [B, 4] of each row: its classes, its bytes, where in those its raw bytes begin, its positions.
        classes, data: those of all rows, one after another.
        supervised: [B, L].
        tables: [B] addresses of what `split` calls table, uint32 [V] without holes; 0 where a number is the id.
        scratches: starts and heads, as for the longest row.
        mark: mark + B + P is below 2^32.
        tokens: [B, L].
        found: ids, counts and sizes.
    """
    (ids, counts, sizes), class_at, byte_at, size_at, at = found, 0, 0, 0, 0
    if not len(spans) == len(supervised) == len(tables) == len(tokens) or spans.shape[1] != 4:
        return -1
    for b in range(len(spans)):
        length, size, end, positions = spans[b, 0], spans[b, 1], spans[b, 2], spans[b, 3]
        if min(length, size, positions) < 0 or length > len(classes) - class_at or size > len(data) - byte_at:
            return -1
        row = (classes[class_at : class_at + length], data[byte_at : byte_at + size], end, first)
        entries = _split_row(
            *(row, positions, rounds, width, supervised[b], _table(tables[b], width), scratches, seen, mark),
            *(tokens[b], (ids[at:], counts[at:], sizes[size_at:])),
        )
        if entries < 0:
            return -1
        class_at, byte_at, size_at, at = class_at + length, byte_at + size, size_at + positions, at + entries
        mark += positions + 1
    return at


# --- split_prob, split_weight -----------------------------------------------------------------------------


@register_jitable
def _read_levels(row, positions, filled, cursor, powers, scratches, weights, sizes):
    """Fills weights [M] and starts (as in `_read_ids`) from the first level of each position and the steps between the
    others: whether no level is too deep, and the raw bytes after."""
    (classes, data, _, first), (low, second), (starts, heads) = row, cursor, scratches
    for i in range(filled):
        heads[i], low, second = _value(classes, data, first, positions + i, low, second)
    at, top, entry, deepest = np.uint64(positions + filled), 0, np.uint64(0), np.uint64(len(powers))
    for p in range(positions):
        if not sizes[p]:
            continue
        level = np.uint64(heads[top])
        top += 1
        if level >= deepest:
            return False, low, second
        starts[entry] = 3
        weights[entry] = powers[level]
        entry += np.uint64(1)
        for _ in range(1, sizes[p]):
            step = np.uint64(classes[at])
            if step >= np.uint64(128):  # four octaves at once: so rare that a branch is cheaper
                step, low, second = _value(classes, data, first, at, low, second)
            level += step
            if level >= deepest:
                return False, low, second
            starts[entry] = step > np.uint64(0)
            weights[entry] = powers[level]
            at += np.uint64(1)
            entry += np.uint64(1)
    return True, low, second


@register_jitable
def _weight_row(row, told, positions, powers, width, supervised, table, scratches, seen, mark, tokens, found):
    """One row of `weight_rows`, into the beginnings of ids, weights and sizes: how many entries, or -1.

    Args:
        row: classes of the targets, data, where their raw bytes begin, and the least value of each class.
        told: classes of the input ids, and where their raw bytes begin.
        scratches, found: starts and heads; ids, weights and sizes.
    """
    (classes, data, end, first), (starts, heads), (ids, weights, sizes) = row, scratches, found
    inputs, (lows, seconds), (more, most) = (told[0], data, told[1], first), _raw_bytes(classes), _raw_bytes(told[0])
    if not _fits(inputs, more + most, positions, width, supervised, table, seen, tokens, sizes):
        return -1
    slots = positions if len(supervised) else 0
    if end < min(1, len(classes)) or end + lows + seconds > told[1] or len(told[0]) < slots:
        return -1
    if min(len(classes), len(heads)) < positions:
        return -1
    low, second, total, filled = np.uint64(end), np.uint64(end + lows), 0, 0
    for p in range(positions):
        size, low, second = _value(classes, data, first, p, low, second)
        sizes[p] = size
        total += np.int64(size)
        filled += size > 0
    if len(classes) != positions + 2 * total or min(len(ids), len(weights), len(starts)) < total:
        return -1
    sound, low, second = _read_levels(row, positions, filled, (low, second), powers, scratches, weights, sizes)
    if not sound:
        return -1
    steps = positions + total
    sound, low, second = _read_ids(row, steps, total, (low, second), width, table, seen, mark, starts, ids)
    low, second = np.uint64(told[1]), np.uint64(told[1] + more)
    for p in range(slots):
        heads[p], low, second = _value(told[0], data, first, p, low, second)
    spelled = (inputs, slots, (low, second), heads, positions, width, supervised, table, ids, sizes, tokens)
    return total if sound and _read_tokens(*spelled) else -1


@compiled_for(
    *(_LONGS_2D, BYTES, BYTES, NUMBERS, WEIGHTS, LONG, FLAGS_2D, _LONGS),
    *(_SCRATCHES, OUT32, LONG, types.uint32[:, ::1], types.Tuple((OUT32, types.float32[::1], types.int64[::1]))),
)
def weight_rows(spans, classes, data, first, powers, width, supervised, tables, scratches, seen, mark, tokens, found):
    """`codec_split_weights.decode_weights_row` of B rows below their zstd frames: how many entries they have together,
    or -1 where one is not sound. Fills ids [M], weights [M] and sizes [P], a row after another.

    Args:
        spans: [B, 6] of each row: its classes of the targets and of the input ids, its bytes, where in those the raw
            bytes of the targets and of the input ids begin, its positions. Targets alone have no classes of the
            second kind, whose raw bytes then begin where the first's end.
        powers: the weight of each level.
        others: as in `split_rows`.
    """
    (ids, weights, sizes), class_at, byte_at, size_at, at = found, 0, 0, 0, 0
    if not len(spans) == len(supervised) == len(tables) == len(tokens) or spans.shape[1] != 6:
        return -1
    for b in range(len(spans)):
        length, told, size = spans[b, 0], spans[b, 1], spans[b, 2]
        end, after, positions = spans[b, 3], spans[b, 4], spans[b, 5]
        if min(length, told, size, positions) < 0 or size > len(data) - byte_at:
            return -1
        if length > len(classes) - class_at or told > len(classes) - class_at - length:
            return -1
        middle, last = class_at + length, class_at + length + told
        row = (classes[class_at:middle], data[byte_at : byte_at + size], end, first)
        entries = _weight_row(
            *(row, (classes[middle:last], after), positions, powers, width, supervised[b]),
            *(_table(tables[b], width), scratches, seen, mark, tokens[b], (ids[at:], weights[at:], sizes[size_at:])),
        )
        if entries < 0:
            return -1
        class_at, byte_at, size_at, at = last, byte_at + size, size_at + positions, at + entries
        mark += positions + 1
    return at
