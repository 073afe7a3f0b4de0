"""Compiled twins of a Unigram's and a BPE's own loops, by numba (the extra `fast`); reached through `cutting` only.

Nothing checks bounds here: `cutting` makes the arrays. Scores are added in the tokenizer's order, so that ties and
rounding fall as they do there; of merges of one rank the first comes first.

Shapes: M draws, B bytes of a text, N tokens of it, last first.
"""

# mypy: no-check-untyped-defs
# What a variable is here, numba infers; mypy would see numpy's scalars.

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import register_jitable

from .array_kernels import compiled_for

_BYTES, _LONGS, _REALS, _FLAGS = (
    types.Array(of, 1, "C", readonly=True) for of in (types.uint8, types.int64, types.float64, types.boolean)
)
_TRIE = types.Tuple((_LONGS, _LONGS, _BYTES, _LONGS, _LONGS))
_MERGES = types.Tuple((_LONGS, _LONGS, _LONGS))
_MODEL = types.Tuple((_TRIE, _FLAGS, _LONGS, types.boolean, _REALS, types.float64, _MERGES))
_TEXTS = types.Tuple((_BYTES, _LONGS))
_CONTEXTS = types.Tuple((_BYTES, _LONGS, _BYTES, _LONGS, _LONGS, _LONGS))
_OUT = types.int64[::1]
_FATES, _REJECTED, _SHORT, _OPEN, _DECIDED = 4, 0, 1, 2, 3  # as in `fates`
_UNKNOWN, _SPACE, _NEVER = -2, 32, 2**62


@register_jitable
def _child(trie, node, byte):
    """The node after a byte, -1 where no token goes on with it."""
    _, first, bytes_, children, _ = trie
    low, high = first[node], first[node + 1]
    while low < high:
        middle = (low + high) >> 1
        if bytes_[middle] < byte:
            low = middle + 1
        else:
            high = middle
    return children[low] if low < first[node + 1] and bytes_[low] == byte else -1


@register_jitable
def _is_spaces_sign(text, at, size):
    """Whether "▁" stands there: tokenizers read it as a space, so that it does not come back."""
    return text[at] == 0xE2 and at + 2 < size and text[at + 1] == 0x96 and text[at + 2] == 0x81


@register_jitable
def _size_of(byte):
    """Bytes of the character that a byte begins."""
    return 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4


@register_jitable
def _best_path(model, scratch, size):
    """Fills ids and ends [N] of the likeliest tokens of the text [B] in scratch, last first; N, -1 for none."""
    trie, lossy, fallback, spaces, scores, unknown, _ = model
    root, _, _, _, token_of = trie
    text, score, came_from, token_at, ids, ends = scratch
    came_from[: size + 1] = -1
    score[0] = 0.0
    at = 0
    while at < size:
        byte = text[at]
        char = _size_of(byte)
        if _is_spaces_sign(text, at, size):
            return -1
        here = 0.0 if spaces and byte == _SPACE else score[at]
        alone = False
        node, end = root[byte], at + 1
        while node >= 0:
            token = token_of[node]
            if token >= 0:
                found = scores[token] + here
                if came_from[end] < 0 or found > score[end]:
                    score[end], came_from[end], token_at[end] = found, at, token
                alone |= end - at == char
            if end >= size or (spaces and text[end] == _SPACE):
                break
            node = _child(trie, node, text[end])
            end += 1
        if not alone:
            end = at + char
            if came_from[end] < 0 or unknown + here > score[end]:
                score[end], came_from[end], token_at[end] = unknown + here, at, _UNKNOWN
        at += char
    count = 0
    while at > 0:
        token, start = token_at[at], came_from[at]
        if token == _UNKNOWN:
            for byte_at in range(at - 1, start - 1, -1):
                ids[count], ends[count] = fallback[text[byte_at]], byte_at + 1
                if ids[count] < 0:
                    return -1
                count += 1
        else:
            if lossy[token]:
                return -1
            ids[count], ends[count] = token, at
            count += 1
        at = start
    return count


@register_jitable
def _symbols(model, scratch, size):
    """Fills ids and ends with the characters' tokens, first first, or their bytes', marked by 1 where scores would be;
    how many, -1 for none."""
    trie, _, fallback, _, _, _, _ = model
    root, _, _, _, token_of = trie
    text, by_bytes, _, _, ids, ends = scratch
    count, at = 0, 0
    while at < size:
        char = _size_of(text[at])
        if _is_spaces_sign(text, at, size):
            return -1
        node = root[text[at]]
        for i in range(1, char):
            node = _child(trie, node, text[at + i]) if node >= 0 else -1
        if node >= 0 and token_of[node] >= 0:
            ids[count], ends[count], by_bytes[count] = token_of[node], at + char, 0
            count += 1
        else:
            for i in range(char):
                ids[count], ends[count], by_bytes[count] = fallback[text[at + i]], at + i + 1, 1
                if ids[count] < 0:
                    return -1
                count += 1
        at += char
    return count


@register_jitable
def _look_up(model, scratch, at):
    """Puts the merge of the symbols at, at + 1 and its rank into scratch, _NEVER where a word ends or there is none."""
    _, lossy, _, spaces, _, _, (keys, order, _) = model
    text, _, ranks, merges, ids, ends = scratch
    ranks[at] = _NEVER
    if spaces and text[ends[at]] == _SPACE:
        return
    key = ids[at] * len(lossy) + ids[at + 1]
    low = np.searchsorted(keys, key)
    if low < len(keys) and keys[low] == key:
        ranks[at], merges[at] = order[low], low


@register_jitable
def _merged(model, scratch, size):
    """Fills ids and ends [N] of the text [B] in scratch by merges, last first; N, -1 for none."""
    _, lossy, _, _, _, _, (_, _, into) = model
    _, by_bytes, ranks, merges, ids, ends = scratch
    count = _symbols(model, scratch, size)
    for at in range(count - 1):
        _look_up(model, scratch, at)
    while count > 1:
        best = 0
        for at in range(1, count - 1):
            if ranks[at] < ranks[best]:
                best = at
        if ranks[best] == _NEVER:
            break
        ids[best], ends[best], by_bytes[best] = into[merges[best]], ends[best + 1], 0
        count -= 1
        for at in range(best + 1, count):
            ids[at], ends[at], ranks[at], merges[at] = ids[at + 1], ends[at + 1], ranks[at + 1], merges[at + 1]
            by_bytes[at] = by_bytes[at + 1]
        for at in range(max(best - 1, 0), min(best + 1, count - 1)):
            _look_up(model, scratch, at)
    for at in range(count):
        if lossy[ids[at]] and not by_bytes[at]:
            return -1
    for at in range(count // 2):
        back = count - 1 - at
        ids[at], ids[back] = ids[back], ids[at]
        ends[at], ends[back] = ends[back], ends[at]
    return count


@register_jitable
def _read(model, scratch, size):
    """By merges, where the model has some."""
    return _merged(model, scratch, size) if len(model[6][0]) else _best_path(model, scratch, size)


@register_jitable
def _scratch(longest):
    """Text, scores, two lists of numbers, ids and ends: memory for one text."""
    size = longest + 1
    numbers = np.empty((4, size), np.int64)
    return np.empty(size, np.uint8), np.empty(size, np.float64), numbers[0], numbers[1], numbers[2], numbers[3]


@compiled_for(_MODEL, _TEXTS, types.int64, _OUT, _OUT)
def cut(model, texts, longest, ids, sizes):
    """Fills ids [all bytes] with the tokens of the texts and sizes with how many each has, -1 for a text that does not
    come back; how many there are in all."""
    blob, first = texts
    scratch = _scratch(longest)
    done = 0
    for n in range(len(sizes)):
        size = first[n + 1] - first[n]
        scratch[0][:size] = blob[first[n] : first[n + 1]]
        sizes[n] = _read(model, scratch, size)
        for back in range(sizes[n]):
            ids[done] = scratch[4][sizes[n] - 1 - back]
            done += 1
    return done


@compiled_for(_MODEL, _CONTEXTS, _TEXTS, types.int64, _LONGS, _LONGS, _OUT)
def draws(model, contexts, pieces, longest, which, drawn, values):
    """Fills values [M] with token 4 + fate of draws, each after one of the contexts: the tails', heads' and cuts' bytes
    (numbers), and where each one's begin."""
    tails, tail_first, heads, head_first, cuts, cut_first = contexts
    blob, first = pieces
    scratch = _scratch(longest)
    text, _, _, _, ids, ends = scratch
    for n in range(len(which)):
        context, piece = which[n], drawn[n]
        tail = tail_first[context + 1] - tail_first[context]
        size = tail + first[piece + 1] - first[piece]
        text[:tail] = tails[tail_first[context] : tail_first[context + 1]]
        text[tail:size] = blob[first[piece] : first[piece + 1]]
        head = heads[head_first[context] : head_first[context + 1]]
        values[n] = _REJECTED
        agrees = True
        for i in range(min(size, len(head))):
            agrees &= text[i] == head[i]
        if not agrees:
            continue
        if size <= len(head):
            values[n] = _SHORT
            continue
        count = _read(model, scratch, size)
        before = cut_first[context + 1] - cut_first[context]
        if count <= before:
            continue
        for i in range(before):
            agrees &= ends[count - 1 - i] == cuts[cut_first[context] + i]
        if agrees:
            at = count - 1 - before
            values[n] = ids[at] * _FATES + (_OPEN if at == 0 else _DECIDED)
