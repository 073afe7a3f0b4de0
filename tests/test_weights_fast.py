"""Compiled rows of `split_prob` and `split_weight`: numpy's bytes, arrays and refusals, one by one and by the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hostile_integers import spoilt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compiled import both_ways, guarded, shuffled
from test_many_rows import assert_same, one_by_one

from sparsekd import compiled, encode_kernels
from sparsekd.codec import FlatTargets, codec_spec, decode, decode_row, decode_rows, encode, encode_row
from sparsekd.codec_ints import FIRST, decode_ints, encode_ints
from sparsekd.codec_split_weights import OCTAVE, POWERS, nearest, unbiased
from sparsekd.codec_weights_fast import _how, encode_quickly
from sparsekd.padded import pad_joined, pad_rows

NAMES = ["split_prob", "split_prob_unbiased", "split_weight_unbiased"]


def spec_of(name, width=300):
    return codec_spec(name, logit_width=width, rounds=None)


def weighted(rng, positions, width, deepest=20.0):
    """Weights over many octaves, 1 and a little more among them, and positions without an entry."""
    sizes = rng.integers(0, min(9, width + 1), positions)
    ids = [rng.permutation(min(width, 40))[:size] + width - min(width, 40) for size in sizes]
    weights = np.exp2(-rng.uniform(0, deepest, int(sizes.sum()))).astype(np.float32)
    weights[rng.random(len(weights)) < 0.1] = 1
    weights[rng.random(len(weights)) < 0.05] = 1.0005
    return FlatTargets(
        ids=np.concatenate([np.zeros(0), *ids]).astype(np.uint32), values=weights, sizes=sizes.astype(np.int64)
    )


def a_row(rng, length, width, share, deepest=20.0):
    """(input ids, targets, supervised): about half of the next tokens are among the targets."""
    supervised = rng.random(length) < share
    flat = shuffled(weighted(rng, int(supervised[1:].sum()), width, deepest), rng)
    drawn = flat.ids if len(flat.ids) else np.zeros(1, np.uint32)
    return (
        np.where(rng.random(length) < 0.5, rng.choice(drawn, length), rng.integers(width, size=length)),
        flat,
        supervised,
    )


# --- the same bytes, arrays and refusals ------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    name=st.sampled_from(NAMES),
    length=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    width=st.sampled_from([3, 300, 2**16, 2**20]),
    deepest=st.sampled_from([0.1, 5.0, 20.0, 149.0]),
    ranked=st.booleans(),
)
def test_rows(seed, name, length, share, width, deepest, ranked):
    """Whole rows and targets alone, in any order, as ranks; weights that leave a key too few bits too."""
    rng, spec = np.random.default_rng(seed), spec_of(name, width)
    input_ids, flat, supervised = a_row(rng, length, width, share, deepest)
    ids = rng.permutation(width).astype(np.uint32) if ranked and width < 2**20 else None
    ranks = None if ids is None else np.argsort(ids).astype(np.uint32)
    numpy, fast = both_ways(encode_row, input_ids, flat, supervised, spec, ranks)
    assert numpy == fast
    numpy, again = both_ways(decode_row, fast, length, supervised, spec, ids)
    assert numpy == again
    assert again[0][1] == input_ids.tolist()
    numpy, fast = both_ways(encode, flat, spec)
    assert numpy == fast
    numpy, fast = both_ways(decode, fast, len(flat.sizes), spec)
    assert numpy == fast


@pytest.mark.parametrize(("name", "rounding"), [("split_prob", nearest), ("split_prob_unbiased", unbiased)])
def test_levels_change_where_the_logarithm_does(name, rounding):
    """Both neighbours of each edge of the grid, of all octaves: elsewhere rounding is constant."""
    half = 0.5 if rounding is nearest else 0.0
    edges = np.exp2(-(np.arange(1, 126 * OCTAVE) + half) / OCTAVE).astype(np.float32)
    near = [np.nextafter(edges, np.float32(end)) for end in (0, 1)] + [edges, np.float32([1, 1.001 - 1e-7])]
    for values in np.array_split(np.concatenate(near), 60):
        flat = FlatTargets(ids=np.zeros(len(values), np.uint32), values=values, sizes=np.ones(len(values), np.int64))
        numpy, fast = both_ways(encode, flat, spec_of(name))
        assert numpy == fast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_read", 2**60)
        quickly = encode_quickly(flat.ids[:0], flat, np.zeros(0, bool), spec_of(name), None, rounding=rounding)
        assert quickly == fast, "else numpy would have been compared with itself"


def damaged():
    """(targets, input ids, supervised) of two positions, V = 10, with one thing wrong each, but the first."""
    fine = {
        "ids": [3, 9, 7],
        "values": [0.5, 0.25, 1],
        "sizes": [2, 1],
        "input_ids": [5, 9, 7],
        "supervised": [0, 1, 1],
    }
    for change in (
        *({}, {"ids": [3, 3, 7]}, {"ids": [3, 10, 7]}, {"ids": [2**32 - 1, 3, 7]}),
        *({"values": [0.5, v, 1]} for v in (-0.25, np.nan, np.inf, 2.01, 1.0011)),
        *({"input_ids": [10, 9, 7]}, {"input_ids": [5, 9, 10]}, {"input_ids": [5, -1, 7]}),
        *({"supervised": [0, 1, 0]}, {"supervised": [1, 0, 0]}, {"sizes": [2, 1, 0]}),
    ):
        row = fine | change
        arrays = np.array(row["ids"], np.uint32), np.array(row["values"], np.float32), np.array(row["sizes"])
        flat = FlatTargets(ids=arrays[0], values=arrays[1], sizes=arrays[2])
        yield flat, np.array(row["input_ids"]), np.array(row["supervised"], bool)


@pytest.mark.parametrize("name", NAMES)
def test_targets_that_do_not_fit_are_refused_in_the_same_words(name):
    """Ids twice or beyond the vocabulary, weights of no kind, other positions; a weight of 1.0011 fits one codec."""
    refused = []
    for flat, input_ids, supervised in damaged():
        numpy, fast = both_ways(encode_row, input_ids, flat, supervised, spec_of(name, 10))
        assert numpy == fast
        refused.append(isinstance(fast, str))
    assert [i for i, each in enumerate(refused) if not each] == ([0, 8] if name == "split_weight_unbiased" else [0])


def test_other_arrays_go_to_numpy():
    """Zeros are left out, weights of 2^-140 kept; float64, strides, counts and a position of 65,536 entries."""
    flat = weighted(np.random.default_rng(0), 6, 300)
    rare = replace(flat, values=np.where(np.arange(len(flat.ids)) % 2, np.float32(0), np.float32(2.0**-140)))
    many = FlatTargets(
        ids=np.arange(65536, dtype=np.uint32), values=np.full(65536, 1e-5, np.float32), sizes=np.array([65536])
    )
    others = replace(flat, values=flat.values.astype(np.float64)), replace(flat, sizes=np.repeat(flat.sizes, 2)[::2])
    counts = replace(flat, values=np.ones(len(flat.ids), np.uint32), rounds=5)
    for each in (rare, many, counts, *others):
        numpy, fast = both_ways(encode, each, spec_of("split_prob_unbiased", 2**17))
        assert numpy == fast
    assert "65535" in both_ways(encode, many, spec_of("split_prob", 2**17))[1]


def hostile_blocks(count):
    """(block, supervised): a sound row's two lists, one of them with some integers changed."""
    rng, spec = np.random.default_rng(0), spec_of("split_weight_unbiased", 30)
    for _ in range(count):
        input_ids, flat, supervised = a_row(rng, int(rng.integers(2, 7)), 30, 0.8, rng.choice([2.5, 2.5, 30]))
        block = encode_row(input_ids, flat, supervised, spec)
        values, used = decode_ints(block, 10**4) if len(flat.sizes) else (np.zeros(0, np.uint32), 0)
        lists = [values.astype(np.int64), decode_ints(block[used:], 10**4)[0].astype(np.int64)]
        which = int(rng.integers(2)) if len(values) else 1
        lists[which] = spoilt(lists[which], rng, int(rng.integers(2)))
        yield b"".join(encode_ints([each]) for each in lists[used == 0 :]), supervised


def test_hostile_lists_are_refused_in_the_same_words():
    """Row by row, and between two sound rows; sizes, levels, ids, slots and spelled ids."""
    spec, taken = spec_of("split_weight_unbiased", 30), 0
    rng = np.random.default_rng(1)
    for block, supervised in hostile_blocks(700):
        numpy, fast = both_ways(decode_row, block, len(supervised), supervised, spec)
        assert numpy == fast
        taken += not isinstance(fast, str)
        input_ids, flat, mask = a_row(rng, len(supervised), 30, 0.8)
        beside = encode_row(input_ids, flat, mask, spec)
        rows = (
            [beside, block, beside],
            np.stack([mask, supervised, mask]),
            [None, rng.permutation(30).astype(np.uint32), None],
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "_read", 2**60)
            assert_same(decode_rows(rows[0], rows[1], spec, rows[2]), one_by_one(rows[0], rows[1], spec, rows[2]))
    assert 200 < taken < 600, "both kinds are there"


def test_flipped_bits_and_truncations_end_alike():
    """Bytes of a whole row, input ids included."""
    input_ids, flat, supervised = a_row(np.random.default_rng(3), 30, 300, 1.0)
    spec = spec_of("split_weight_unbiased")
    block = encode_row(input_ids, flat, supervised, spec)
    flips = [bytearray(block) for _ in range(0, 8 * len(block), 5)]
    for bit, each in zip(range(0, 8 * len(block), 5), flips, strict=True):
        each[bit // 8] ^= 1 << bit % 8
    for each in [*map(bytes, flips), *(block[:end] for end in range(0, len(block), 7)), block + b"\0"]:
        numpy, fast = both_ways(decode_row, each, 30, supervised, spec)
        assert numpy == fast


# --- many rows --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), length=st.integers(1, 30), name=st.sampled_from(NAMES))
def test_rows_at_once_are_rows_one_by_one(seed, count, length, name):
    """Rows of other tables and none, without a supervised position too, decoded and padded."""
    rng, spec = np.random.default_rng(seed), spec_of(name)
    tables = [rng.permutation(300).astype(np.uint32) if rng.random() < 0.7 else None for _ in range(count)]
    given_rows = [a_row(rng, length, 300, rng.choice([0.0, 0.6, 1.0])) for _ in range(count)]
    ranks = [None if table is None else np.argsort(table).astype(np.uint32) for table in tables]
    blocks = [encode_row(*row, spec, rank) for row, rank in zip(given_rows, ranks, strict=True)]
    supervised = np.stack([mask for _, _, mask in given_rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_read", 2**60)
        found, expected = decode_rows(blocks, supervised, spec, tables), one_by_one(blocks, supervised, spec, tables)
        assert found is not None
        assert_same(found, expected)
        places = np.ascontiguousarray(supervised[:, 1:])
        joined = pad_joined(found[1], places)
        parts = [decode_row(b, length, m, spec, t)[1] for b, m, t in zip(blocks, supervised, tables, strict=True)]
    for one, other in zip(joined, pad_rows(parts, places), strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


# --- no index out of bounds -------------------------------------------------------------------------------


def test_no_hostile_batch_leads_out_of_bounds(monkeypatch):
    """The reading kernel's own source, run by Python on guarded arrays, all of any size."""
    fast, rng, taken = compiled.load(), np.random.default_rng(1), 0
    table, powers = guarded(range(30), np.uint32), guarded(2 * POWERS, np.float32)
    monkeypatch.setattr(fast, "_table", lambda address, width: table[: width if address else 0])
    with np.errstate(over="ignore"):
        for block, mask in hostile_blocks(400):
            positions, lists, at = int(mask[1:].sum()), [], 0
            while at < len(block):
                values, used = decode_ints(block[at:], 10**4)
                lists, at = [*lists, np.where(values < 128, values, rng.integers(128, 256, len(values)))], at + used
            lists = lists if positions else [np.zeros(0, int), *lists[-1:]]
            raws = [int((each >= 128).sum() + (each >= 240).sum()) for each in lists]
            end, after = 4 if positions else 0, 8 + raws[0]
            span = np.array([[len(lists[0]), len(lists[1]), after + raws[1], end, after, positions]] * 2)
            if rng.random() < 0.3:
                span[rng.integers(2), rng.integers(6)] += rng.choice([-(2**62), -5, -1, 1, 5, 2**62])
            room = len(lists[0]) if rng.random() < 0.8 else int(rng.integers(len(lists[0]) + 1))
            found = (
                guarded(np.zeros(room), np.uint32),
                guarded(np.zeros(room), np.float32),
                guarded(np.zeros(2 * positions), np.int64),
            )
            scratches = guarded(np.zeros(room), np.uint8), guarded(np.zeros(len(lists[0])), np.uint32)
            classes, data = np.concatenate(lists + lists), rng.integers(0, 256, 2 * (after + raws[1]))
            arguments = (
                guarded(span, np.int64),
                guarded(classes, np.uint8),
                guarded(data, np.uint8),
                guarded(FIRST, np.uint32),
            )
            masks, addresses = guarded([mask, mask], bool), guarded(rng.integers(0, 2, 2), np.int64)
            rest = guarded(np.zeros(30), np.uint32), 1, guarded(np.zeros((2, len(mask))), np.uint32), found
            taken += fast.weight_rows.py_func(*arguments, powers, 30, masks, addresses, scratches, *rest) >= 0
    assert 50 < taken < 350, "both kinds are there"


def test_no_targets_lead_the_encoder_out_of_bounds():
    """The encoder's loops likewise: rows that fit, and rows with one thing wrong."""
    rng, sound = np.random.default_rng(4), 0
    edges, powers, coins = _how(unbiased)
    rounding = guarded(edges, np.uint32), guarded(powers, np.float64), coins
    for _ in range(300):
        length = int(rng.integers(0, 9))
        supervised = rng.random(length) < 0.7
        positions = max(0, int(supervised[1:].sum()) + int(rng.choice([-1, 0, 0, 0, 1]))) if length else 4
        flat = weighted(rng, positions, 30)
        ids, bits, sizes = flat.ids.copy(), flat.values.view(np.uint32).copy(), flat.sizes.copy()
        for each, top in ((ids, 31), (bits, 2**32), (sizes, 9)):
            if len(each) and rng.random() < 0.1:
                each[rng.integers(len(each))] = rng.integers(top)
        entries, table = len(ids), guarded(range(30 if rng.random() < 0.5 else 0), np.uint32)
        sizes, masks = guarded(sizes, np.int64), guarded(supervised, bool)
        tokens = guarded(rng.integers(0, 31 if rng.random() < 0.1 else 30, length), np.uint32)
        keys, levels, spelled = (guarded(np.zeros(n), np.uint32) for n in (entries, entries, length))
        wanted, seen = guarded(np.zeros(positions), np.uint64), guarded(np.zeros(30), np.uint32)
        row = guarded(ids, np.uint32), guarded(bits.view(np.float32), np.float32), guarded(bits, np.uint32), sizes
        with np.errstate(over="ignore", invalid="ignore"):
            telling, filled, level_bits, group_bits = encode_kernels.weight_keys.py_func(
                *(*row, tokens, masks, table, 30, 5, rounding, seen, 1, keys, levels, wanted, spelled)
            )
        if telling < 0:
            continue
        for begin in range(0, positions, 2**group_bits):
            first, last = int(sizes[:begin].sum()), int(sizes[: begin + 2**group_bits].sum())
            keys[first:last].sort()
        total = positions * (1 + (length > 0)) + 2 * entries + telling
        values, sound = guarded(np.zeros(total), np.uint32), sound + 1
        room = [guarded(np.zeros(total + more), np.uint8) for more in (0, 1, 1)]
        filled += int(rng.choice([0, 0, 0, 1, -1]))
        with np.errstate(over="ignore"):
            encode_kernels.weight_streams.py_func(
                *(keys, sizes, wanted, spelled[:telling], filled, 5, level_bits, int(length > 0), values, *room)
            )
    assert 100 < sound < 250, "both kinds are there"
