"""Compiled twins of the loops that write a row, by numba; reached behind `compiled.kernels()` only.

A row is written in two loops and numpy's sort between them. What a loop does not take it refuses by -1, as in
codec_kernels.py: the numpy code then writes the row, or says by name what is wrong.

Shapes: T values of a list, P supervised positions, M entries of all of them, L tokens of a row.
"""

# mypy: no-check-untyped-defs
# What a variable is here, numba infers; mypy would see numpy's scalars.

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import register_jitable

from .array_kernels import FLAGS, LONG, NUMBERS, OUT8, OUT32, SIZES, WEIGHTS, compiled_for

_KEYS, _WANTED = types.uint32[::1], types.uint64[::1]
_NONE = np.uint64(2**63)
_ROUNDING = types.Tuple((types.uint32[:, ::1], types.float64[::1], types.uint32))
# Bits of float32: the least normal one, the least above 1.001.
_LEAST, _BEYOND = np.uint32(1 << 23), np.float32(1.001).view(np.uint32)


@register_jitable
def _pack(values, classes, lows, seconds):
    """`codec_ints._classes`: fills classes [T] and the raw bytes, T + 1 of each at most; returns how many there are."""
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


@register_jitable
def _next_tokens(tokens, supervised, wanted):
    """Fills wanted [P] with the token that comes next, or `_NONE` for targets alone: whether there are P of them."""
    wanted[:] = _NONE
    p = 0
    for t in range(1, len(tokens)):
        if supervised[t]:
            if p == len(wanted):
                return False
            wanted[p] = tokens[t]
            p += 1
    return p == len(wanted) or len(tokens) == 0


@register_jitable
def _spell(tokens, supervised, table, width, wanted, spelled):
    """Fills `spelled` with the numbers of the input ids that no key tells: how many, or -1 where one is too large."""
    telling, p, ranked = 0, 0, len(table) > 0
    for t in range(len(tokens)):
        if tokens[t] >= width:
            return -1
        told = False
        if t > 0 and supervised[t]:
            told = wanted[p] != np.uint64(_NONE)
            p += 1
        if not told:
            spelled[telling] = table[tokens[t]] if ranked else tokens[t]
            telling += 1
    return telling


# --- split ------------------------------------------------------------------------------------------------


@compiled_for(
    *(NUMBERS, NUMBERS, SIZES, NUMBERS, FLAGS, NUMBERS),
    *(LONG, LONG, LONG, LONG, OUT32, LONG, _KEYS, _WANTED, OUT32),
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
    at, filled, multiple, ranked = 0, 0, 0, len(table) > 0
    if len(counts) != len(ids) or len(keys) != len(ids) or len(seen) < width or (ranked and len(table) < width):
        return -1, 0, 0
    if len(tokens) != len(supervised) or len(spelled) != len(tokens) or len(wanted) != len(sizes):
        return -1, 0, 0
    if not _next_tokens(tokens, supervised, wanted):
        return -1, 0, 0
    count_bits = 0
    while rounds > 1 << count_bits:
        count_bits += 1
    for p in range(len(sizes)):
        if not 0 <= sizes[p] <= len(ids) - at:
            return -1, 0, 0
        left, many, here = np.int64(rounds), 0, np.uint32(mark + p)
        following, told = wanted[p], np.uint64(_NONE)
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
        at += sizes[p]
        filled += many > 0
        multiple += many
    telling = _spell(tokens, supervised, table, width, wanted, spelled)
    return (telling if at == len(ids) else -1), filled, multiple


@compiled_for(
    *(_KEYS, SIZES, _WANTED, NUMBERS, LONG, LONG, LONG, LONG, LONG),
    *(OUT32, OUT8, OUT8, OUT8),
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
    values[head + len(keys) :] = spelled
    return _pack(values, classes, lows, seconds)


# --- split_prob, split_weight -----------------------------------------------------------------------------


@register_jitable
def _mix(x):
    """`order.splitmix` of one number."""
    x = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@register_jitable
def _level(weight, bits, rounding, state):
    """The level of a normal float32 up to 1.001, given with its bits and the coin's hash."""
    edges, powers, coins = rounding
    mantissa = min(bits, np.uint32(127 << 23)) & np.uint32(2**23 - 1)
    eighth, octaves = mantissa >> np.uint32(15), np.uint32(127) - min(bits >> np.uint32(23), np.uint32(127))
    level = (octaves << np.uint32(5)) - edges[0, eighth] - np.uint32(mantissa > edges[1, eighth])
    above, below = powers[np.uint64(level)], powers[np.uint64(level) + np.uint64(1)]
    coin = np.float64(np.int64(state >> np.uint64(11))) * 2.0**-53
    # No branch: nothing can tell how a coin falls.
    return level + np.uint32(coin >= (np.float64(weight) - below) / (above - below)) * coins


@compiled_for(
    *(NUMBERS, WEIGHTS, NUMBERS, SIZES, NUMBERS, FLAGS, NUMBERS, LONG, LONG, _ROUNDING),
    *(OUT32, LONG, _KEYS, OUT32, _WANTED, OUT32),
)
def weight_keys(
    ids,
    weights,
    bits,
    sizes,
    tokens,
    supervised,
    table,
    width,
    id_bits,
    rounding,
    seen,
    mark,
    keys,
    levels,
    wanted,
    spelled,
):
    """What `codec_split_weights._on_grid` and `input_streams` make of a row, before the sort. Returns how many input
    ids are spelled out, how many positions have entries, the bits of a level and of a position in a key; or -1 where
    something is not sound, or a key would need more than 32 bits.

    A key is: the position modulo a power of 2, from 2 to 256, its level, then `id_bits` of id.

    Args:
        weights, bits: [M] over that of level 0, and the same as uint32.
        rounding: edges [2, 256] for each value of a mantissa's upper 8 bits: how many steps of the grid lie below all
            such, and the mantissa above which there is one more; powers, the weight of each level over that of level 0;
            coins, 1 where an entry takes one of two levels by its coin, 0 for the nearest.
        levels: scratch [M].
        others: as in `sort_keys`.
    """
    at, filled, deepest, ranked = 0, 0, np.uint32(0), len(table) > 0
    if not len(ids) == len(weights) == len(bits) == len(keys) == len(levels) or len(wanted) != len(sizes):
        return -1, 0, 0, 0
    if len(tokens) != len(supervised) or len(spelled) != len(tokens) or len(seen) < width:
        return -1, 0, 0, 0
    if (ranked and len(table) < width) or rounding[0].shape != (2, 256) or len(rounding[1]) < 4096:
        return -1, 0, 0, 0
    if not _next_tokens(tokens, supervised, wanted):
        return -1, 0, 0, 0
    for p in range(len(sizes)):
        if not 0 <= sizes[p] <= min(len(ids) - at, 65535):
            return -1, 0, 0, 0
        here, following, told, state = np.uint32(mark + p), wanted[p], np.uint64(_NONE), _mix(np.uint64(p))
        for i in range(np.uint64(at), np.uint64(at + sizes[p])):
            token = np.uint64(ids[i])
            if token >= np.uint64(width) or not _LEAST <= bits[i] < _BEYOND:
                return -1, 0, 0, 0
            number = np.uint64(table[token] if ranked else token)
            if number >= np.uint64(width) or seen[number] == here:
                return -1, 0, 0, 0
            seen[number] = here
            level = _level(weights[i], bits[i], rounding, _mix(_mix(state + number) + np.uint64(bits[i])))
            levels[i], keys[i] = level, number
            deepest = max(deepest, level)
            if token == following:
                told = i
        wanted[p] = told
        at += sizes[p]
        filled += sizes[p] > 0
    telling, level_bits = _spell(tokens, supervised, table, width, wanted, spelled), 0
    while deepest >> np.uint32(level_bits):
        level_bits += 1
    group_bits = min(8, 32 - id_bits - level_bits)
    if at != len(ids) or group_bits < 1:
        return -1, 0, 0, 0
    at = 0
    for p in range(len(sizes)):
        group = np.uint32(p & (1 << group_bits) - 1) << np.uint32(level_bits)
        for i in range(np.uint64(at), np.uint64(at + sizes[p])):
            keys[i] |= (group | levels[i]) << np.uint32(id_bits)
        if wanted[p] != np.uint64(_NONE):
            wanted[p] = keys[wanted[p]]
        at += sizes[p]
    return telling, filled, level_bits, group_bits


@compiled_for(*(_KEYS, SIZES, _WANTED, NUMBERS, LONG, LONG, LONG, LONG), *(OUT32, OUT8, OUT8, OUT8))
def weight_streams(keys, sizes, wanted, spelled, filled, id_bits, level_bits, row, values, classes, lows, seconds):
    """`codec_split_weights._encode` and `input_streams` above their zstd frames: how many raw bytes there are of each
    kind in the first list, then in the second, or -1; fills the classes [T] and the raw bytes of both.

    Args:
        keys, wanted, spelled, filled, level_bits: of `weight_keys`; the keys sorted within their groups.
        row: 1, or 0 for targets alone.
        values: scratch [T], of both lists.
        lows, seconds: at least T + 1.
    """
    positions, entries, one = len(sizes), len(keys), np.uint32(1)
    id_mask, level_mask, id_bits = np.uint32((1 << id_bits) - 1), np.uint32((1 << level_bits) - 1), np.uint32(id_bits)
    top, rest, ids, slots, at = positions, positions + filled, positions + entries, positions + 2 * entries, 0
    if len(values) != slots + row * positions + len(spelled) or len(classes) != len(values) or len(wanted) != positions:
        return -1, -1, -1, -1
    if len(lows) <= len(values) or len(seconds) <= len(values) or filled > entries:
        return -1, -1, -1, -1
    for p in range(positions):
        if sizes[p] < 0 or sizes[p] > entries - at or (sizes[p] and top == positions + filled):
            return -1, -1, -1, -1
        values[p] = sizes[p]
        before, number, slot, told = np.uint32(0), np.uint32(0), 0, wanted[p]
        for i in range(at, at + sizes[p]):
            level, follows = keys[i] >> id_bits & level_mask, np.uint32(0)
            if i == at:
                values[top] = level
                top += 1
            else:
                values[rest] = level - before
                rest += 1
                follows = np.uint32(level == before)
            values[ids + i] = (keys[i] & id_mask) - (number + one) * follows
            before, number = level, keys[i] & id_mask
            slot += np.uint64(keys[i]) <= told
        if row:
            values[slots + p] = slot if told != np.uint64(_NONE) else 0
        at += sizes[p]
    if at != entries or top != positions + filled:
        return -1, -1, -1, -1
    values[slots + row * positions :] = spelled
    low, second = _pack(values[:slots], classes[:slots], lows, seconds)
    return (low, second, *_pack(values[slots:], classes[slots:], lows[low:], seconds[second:]))
