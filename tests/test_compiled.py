"""Compiled loops do what numpy does: the same bytes, arrays and refusals, in bounds; and may be missing."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hostile_integers import spoilt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec_split import N, a_row, draws, spec_of

from sparsekd import compiled
from sparsekd.codec import FlatTargets, decode, decode_row, encode, encode_row
from sparsekd.codec_ints import FIRST, MOST_VALUE, decode_ints, encode_ints
from sparsekd.codec_split_fast import encode_quickly
from sparsekd.errors import FormatError, MismatchError
from sparsekd.id_ranks import id_ranks
from sparsekd.padded import pad_rows

if compiled.load() is None:
    pytest.skip("needs the extra fast", allow_module_level=True)
from sparsekd import array_kernels, encode_kernels


def both_ways(function, *arguments):
    """What a call gives in numpy and compiled: (arrays or an error's text) twice."""
    found = []
    for values_read in (-(2**60), 2**60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "_read", values_read)
            assert (compiled.kernels() is None) == (values_read < 0)
            try:
                found.append(plain(function(*arguments)))
            except (FormatError, MismatchError) as error:
                found.append(str(error))
    return found


def plain(result):
    """Arrays and targets as lists, with their dtypes."""
    if isinstance(result, FlatTargets):
        return [plain(each) for each in (result.ids, result.values, result.sizes)]
    if isinstance(result, tuple):
        return [plain(each) for each in result]
    return (str(result.dtype), result.tolist()) if isinstance(result, np.ndarray) else result


# --- the same arrays and the same refusals ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, MOST_VALUE - 1) | st.sampled_from([0, 127, 128, 28799, 28800]), max_size=60))
def test_integers(values):
    """Every class, and what follows the list is left alone."""
    numpy, fast = both_ways(decode_ints, encode_ints([values]) + b"rest", 100)
    assert numpy == fast
    assert fast[0][1] == values


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    rounds=st.sampled_from([1, 2, 50, 3000]),
    ranked=st.booleans(),
)
def test_rows(seed, length, share, rounds, ranked):
    """Targets and input ids, under their own numbers or as ranks."""
    rng = np.random.default_rng(seed)
    supervised = rng.random(length) < share
    flat, spec = draws(rng, int(supervised[1:].sum()), 300, rounds), spec_of(300, rounds)
    ranks = id_ranks([flat] * 40, 300) if ranked else None
    input_ids = rng.integers(300, size=length).astype(np.uint32)
    block = encode_row(input_ids, flat, supervised, spec, ranks.ranks if ranks else None)
    numpy, fast = both_ways(decode_row, block, length, supervised, spec, ranks.ids if ranks else None)
    assert numpy == fast
    assert fast[0][1] == input_ids.tolist()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    rounds=st.sampled_from([1, 2, 50, 64, 3000]),
    width=st.sampled_from([3, 300, 2**16, 2**20]),
    ranked=st.booleans(),
)
def test_encoded_rows(seed, length, share, rounds, width, ranked):
    """The same bytes, whole rows and targets alone: entries in any order, as ranks, counts of one bit and of twelve."""
    rng = np.random.default_rng(seed)
    supervised = rng.random(length) < share
    flat, spec = draws(rng, int(supervised[1:].sum()), width, rounds), spec_of(width, rounds)
    flat = shuffled(flat, rng)
    ranks = rng.permutation(width).astype(np.uint32) if ranked else None
    drawn = flat.ids if len(flat.ids) else np.zeros(1, np.uint32)
    input_ids = np.where(rng.random(length) < 0.5, rng.choice(drawn, length), rng.integers(width, size=length))
    dtype = rng.choice([np.uint32, np.int64])
    numpy, fast = both_ways(encode_row, input_ids.astype(dtype), flat, supervised, spec, ranks)
    assert numpy == fast
    numpy, fast = both_ways(encode, flat, spec)
    assert numpy == fast


def shuffled(flat, rng):
    """The same targets, each position's entries in another order."""
    order = np.lexsort((rng.random(len(flat.ids)), flat.positions))
    return replace(flat, ids=flat.ids[order], values=flat.values[order])


def test_long_rows_are_sorted_in_groups():
    """1,000 positions are four groups of 256, or many more where ids and counts leave few bits."""
    flat = draws(np.random.default_rng(5), 1000, 500)
    for width, rounds in ((500, N), (2**20, N), (2**20, 2**11)):
        counts = flat.values.copy()
        counts[np.cumsum(flat.sizes) - 1] += rounds - N
        more = replace(flat, values=counts, rounds=rounds)
        numpy, fast = both_ways(encode, more, spec_of(width, rounds))
        assert numpy == fast
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "_read", 2**60)
            assert encode_quickly(flat.ids[:0], more, np.zeros(0, bool), spec_of(width, rounds), None) == fast


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), width=st.sampled_from([3, 40, 3000]))
def test_ranks(seed, width):
    """Ids counted one by one are those counted together, ids beyond the vocabulary left out."""
    flats = [draws(np.random.default_rng((seed, i)), 30, width + 2) for i in range(4)]
    numpy, fast = both_ways(lambda: id_ranks(flats, width, least=2).table)
    assert numpy == fast
    uses = np.bincount(np.concatenate([flat.ids for flat in flats]), minlength=width)[:width]
    kept = sorted((token for token in range(width) if uses[token] >= 2), key=lambda token: (-uses[token], token))
    assert decode_ints(fast, width)[0].tolist() == kept


def damaged_targets():
    """(targets of two positions, 5 rounds, V = 10; input ids; supervised) with one thing wrong each, but the first."""
    fine = {"ids": [3, 9, 7], "values": [4, 1, 5], "sizes": [2, 1], "input_ids": [5, 9, 7], "supervised": [0, 1, 1]}
    for change in (
        *({}, {"ids": [3, 3, 7]}, {"ids": [3, 10, 7]}, {"ids": [2**32 - 1, 3, 7]}),
        *({"values": [4, 2, 5]}, {"values": [5, 0, 5]}, {"values": [2**32 - 1, 6, 5]}, {"sizes": [1, 2]}),
        *(
            {"input_ids": [10, 9, 7]},
            {"input_ids": [5, 9, 10]},
            {"input_ids": [5, -1, 7]},
            {"input_ids": [5, 2**32, 7]},
        ),
        *({"supervised": [0, 1, 0]}, {"supervised": [1, 0, 0]}, {"sizes": [2, 1, 0]}, {"rounds": 4}),
    ):
        row = fine | change
        arrays = [np.array(row["ids"], np.uint32), np.array(row["values"], np.uint32), np.array(row["sizes"])]
        flat = FlatTargets(ids=arrays[0], values=arrays[1], sizes=arrays[2], rounds=row.get("rounds", 5))
        yield flat, np.array(row["input_ids"]), np.array(row["supervised"], bool)


def test_targets_that_do_not_fit_are_refused_in_the_same_words():
    """Repeated ids, ids and input ids beyond the vocabulary, counts of other sums, other positions, other rounds."""
    refused = []
    for flat, input_ids, supervised in damaged_targets():
        numpy, fast = both_ways(encode_row, input_ids, flat, supervised, spec_of(10, 5))
        assert numpy == fast
        refused.append(isinstance(fast, str))
    assert refused == [False] + [True] * (len(refused) - 1)


def test_targets_of_other_kinds_and_types_go_to_numpy():
    """Weights have another refusal; strided sizes are no error."""
    flat = draws(np.random.default_rng(0), 3)
    numpy, fast = both_ways(encode, replace(flat, values=flat.weights, rounds=None), spec_of())
    assert numpy == fast
    assert "rounds=None" in fast
    strided = replace(flat, sizes=np.repeat(flat.sizes, 2)[::2])
    assert both_ways(encode, strided, spec_of()) == [encode(flat, spec_of())] * 2


def test_the_widest_vocabulary_and_the_most_rounds():
    """Ids of 20 bits, all counts of 1, one count of all rounds."""
    ids = np.append(np.arange(2**20), 2**20 - 1).astype(np.uint32)
    counts = np.append(np.ones(2**20), 2**20).astype(np.uint32)
    flat = FlatTargets(ids=ids, values=counts, sizes=np.array([2**20, 1]), rounds=2**20)
    spec = spec_of(2**20, 2**20)
    numpy, fast = both_ways(decode, encode(flat, spec), 2, spec)
    assert numpy == fast
    assert fast[0][1] == ids.tolist()


def hostile_lists(count):
    """Lists of a sound row with some integers changed, moved, dropped or repeated."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        positions = int(rng.integers(1, 6))
        flat, spec = draws(rng, positions, 30, 7), spec_of(30, 7)
        values = decode_ints(encode(flat, spec), 10**4)[0].astype(np.int64)
        yield spoilt(values, rng, int(rng.integers(3))), positions


def test_hostile_lists_are_refused_in_the_same_words():
    """What numpy takes the kernel takes; what it refuses is refused with its sentence."""
    spec, taken = spec_of(30, 7), 0
    for values, positions in hostile_lists(1500):
        numpy, fast = both_ways(decode, encode_ints([values]), positions, spec)
        assert numpy == fast
        taken += not isinstance(fast, str)
    assert 400 < taken < 1100, "both kinds are there"


def test_flipped_bits_and_truncations_end_alike():
    """Bytes of a whole row, input ids included."""
    block, supervised = a_row()
    flips = [bytearray(block) for _ in range(0, 8 * len(block), 5)]
    for bit, damaged in zip(range(0, 8 * len(block), 5), flips, strict=True):
        damaged[bit // 8] ^= 1 << bit % 8
    for damaged in [*map(bytes, flips), *(block[:end] for end in range(0, len(block), 7)), block + b"\0"]:
        numpy, fast = both_ways(decode_row, damaged, len(supervised), supervised, spec_of())
        assert numpy == fast


def test_counts_whose_sum_has_59_bits_are_refused():
    """A million steps of a million each."""
    many = 10**6
    hostile = encode_ints([[many, *[0] * 7], [MOST_VALUE - 1] * many])
    for said in both_ways(decode, hostile, 8, spec_of(2**20, 2**20)):
        assert said == "supervised position 0 has counts that sum to more than 1048576; the file is damaged"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_padding(seed, share):
    """Two rows of other lengths, positions left out, weights and counts."""
    rng = np.random.default_rng(seed)
    supervised = rng.random((2, 9)) < share
    rows = [draws(rng, int(mask.sum()), 50, 9) for mask in supervised]
    numpy, fast = both_ways(pad_rows, rows, supervised)
    assert numpy == fast


def test_arrays_of_other_types_are_padded_by_numpy():
    """Targets that no decoder made: int64 ids and strided sizes are no error."""
    flat = FlatTargets(ids=np.array([3, 5, 4]), values=np.ones(3, np.float32), sizes=np.array([1, 0, 2])[::2])
    numpy, fast = both_ways(pad_rows, [flat], np.ones((1, 2), bool))
    assert numpy == fast


# --- no index out of bounds -------------------------------------------------------------------------------


class Guarded(np.ndarray):
    """An array whose numbers are read and written within its bounds, not below 0 either."""

    def __getitem__(self, at):
        self._check(at)
        return super().__getitem__(at)

    def __setitem__(self, at, value):
        self._check(at)
        super().__setitem__(at, value)

    def __iter__(self):
        return iter(np.asarray(self))

    def _check(self, at):
        for index, size in zip(at if isinstance(at, tuple) else (at,), self.shape, strict=False):
            assert isinstance(index, slice) or 0 <= int(index) < size, f"{at} of {self.shape}"


def guarded(values, dtype):
    return np.array(values, dtype).view(Guarded)


def test_the_guard_guards():
    """Compiled code would not notice these."""
    for at in (-1, 3):
        with pytest.raises(AssertionError):
            guarded([1, 2, 3], np.uint8)[at]


def test_no_hostile_list_leads_out_of_bounds():
    """The kernels' own source, run by Python on guarded arrays: a row's list, integers, slots, table, padding."""
    fast, rng = compiled.load(), np.random.default_rng(1)
    with np.errstate(over="ignore"):  # masks of all bits are made by wrapping around
        for values, positions in hostile_lists(400):
            size = len(values)
            small = values < 128 if rng.random() < 0.8 else rng.random(size) < 0.9
            classes = guarded(np.where(small, values % 128, rng.integers(128, 256, size)), np.uint8)
            lengths = (classes >= 128).sum() + (classes >= 240).sum() + int(rng.random() < 0.1)
            data, first = guarded(rng.integers(0, 256, 4 + lengths), np.uint8), guarded(FIRST, np.uint32)
            supervised = guarded(np.arange(positions + 1 if rng.random() < 0.7 else 0) > 0, bool)
            table = guarded(range(30 if rng.random() < 0.5 else 0), np.uint32)
            starts, heads = guarded(np.zeros(size + 1), np.uint8), guarded(np.zeros(size), np.uint32)
            seen, tokens = guarded(np.zeros(30), np.uint32), guarded(np.zeros(len(supervised)), np.uint32)
            settings = (first, positions, 7, 30, supervised, table)
            fast.split.py_func(classes, data, 4, *settings, starts, heads, seen, 1, tokens)
            end = int(rng.integers(-1, size + 2))
            fast.ints.py_func(classes, data, end, first, guarded(values, np.uint32))
    for _ in range(400):
        supervised = rng.random(rng.integers(1, 9)) < 0.7
        sizes = rng.integers(1, 4, max(0, int(supervised.sum()) + int(rng.integers(-1, 2))))
        ids = guarded(rng.integers(0, 30, max(0, int(sizes.sum()) + int(rng.integers(-1, 2)))), np.uint32)
        array_kernels.renumber.py_func(guarded(range(29), np.uint32), ids)
        array_kernels.tally.py_func(ids, guarded(np.zeros(29), np.int64))
        room = [guarded(np.zeros((len(supervised), 2)), dtype) for dtype in (np.int64, np.float32)]
        masks = guarded(supervised, bool)
        array_kernels.pad.py_func(ids, guarded(ids, np.float32), guarded(sizes, np.int64), masks, *room)


def test_no_targets_lead_the_encoder_out_of_bounds():
    """The encoder's loops likewise: rows that fit, and rows with one thing wrong."""
    rng, sound = np.random.default_rng(4), 0
    for _ in range(300):
        length = int(rng.integers(0, 9))
        supervised = rng.random(length) < 0.7
        positions = max(0, int(supervised[1:].sum()) + int(rng.choice([-1, 0, 0, 0, 1]))) if length else 4
        flat = draws(rng, positions, 30, 7)
        ids, counts, sizes = (np.array(each) for each in (flat.ids, flat.values, flat.sizes))
        for each, top in ((ids, 31), (counts, 8), (sizes, 9)):
            if len(each) and rng.random() < 0.1:
                each[rng.integers(len(each))] = rng.integers(top)
        entries, table = len(ids), guarded(range(30 if rng.random() < 0.5 else 0), np.uint32)
        sizes, supervised = guarded(sizes, np.int64), guarded(supervised, bool)
        row = (guarded(ids, np.uint32), guarded(counts, np.uint32), sizes)
        tokens = guarded(rng.integers(0, 31 if rng.random() < 0.1 else 30, length), np.uint32)
        keys, wanted = guarded(np.zeros(entries), np.uint32), guarded(np.zeros(positions), np.uint64)
        spelled, seen = guarded(np.zeros(length), np.uint32), guarded(np.zeros(30), np.uint32)
        found = encode_kernels.sort_keys.py_func(
            *(*row, tokens, supervised, table, 7, 30, 5, 2, seen, 1, keys, wanted, spelled)
        )
        if found[0] < 0:
            continue
        telling, filled, multiple = found
        for begin in range(0, positions, 2):
            first, last = int(sizes[:begin].sum()), int(sizes[: begin + 2].sum())
            keys[first:last].sort()
        head = positions * (1 + (length > 0)) + multiple
        total = head + entries + telling
        room = [guarded(np.zeros(total + more), np.uint8) for more in (0, 1, 1)]
        values, sound = guarded(np.zeros(total), np.uint32), sound + 1
        with np.errstate(over="ignore"):
            low, second = encode_kernels.streams.py_func(
                *(keys, sizes, wanted, spelled[:telling], filled, multiple, 7, 5, int(length > 0), values, *room)
            )
        assert (low, second) == ((0, 0) if entries else (-1, -1))
    assert 100 < sound < 250, "both kinds are there"


# --- memory used again, threads, and numba's absence --------------------------------------------------------


def test_threads_do_not_share_their_memory():
    """Many rows decoded by four threads at once, each as it is alone."""
    rng, spec = np.random.default_rng(0), spec_of()
    flats = [draws(rng, int(rng.integers(1, 300))) for _ in range(24)]
    blocks = [encode(flat, spec) for flat in flats]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr(compiled, "_read", 2**60)
        found = list(threads.map(lambda i: decode(blocks[i % 24], len(flats[i % 24].sizes), spec), range(240)))
    for i, each in enumerate(found):
        assert sorted(each.ids.tolist()) == sorted(flats[i % 24].ids.tolist())


def test_marks_that_reach_32_bits_begin_anew(monkeypatch):
    """A number that was in a set long ago is not in this one."""
    monkeypatch.setattr(compiled, "_read", 2**60)
    seen, _ = compiled.stamps(10**4, 1)
    seen[:] = np.arange(1, 10**4 + 1)
    compiled._local.mark = 2**32 - 5
    flat = draws(np.random.default_rng(0), 40)
    assert plain(decode(encode(flat, spec_of()), 40, spec_of()))[0][1]
    assert compiled._local.mark == 1 + 40 + 41


def test_memory_of_a_huge_row_is_not_kept():
    """Small requests get the same memory again, large ones their own."""
    assert np.shares_memory(compiled.scratch("a")(10, np.uint8), compiled.scratch("a")(9, np.uint8))
    assert not np.shares_memory(compiled.scratch("b")(2**24, np.uint8), compiled.scratch("b")(2**24, np.uint8))


def test_a_process_that_reads_little_does_not_wait_for_numba(monkeypatch):
    """Numpy reads the first 2^24 values."""
    monkeypatch.setattr(compiled, "_read", 0)
    assert compiled.kernels(2**24 - 1) is None
    assert compiled.kernels(1) is compiled.load()


def test_without_numba_numpy_does_it(monkeypatch):
    """Not installed, not fit for this numpy, or switched off."""
    load = compiled.load.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr("numba.config.DISABLE_JIT", 1)
        assert load() is None
    monkeypatch.setitem(sys.modules, "numba", None)
    assert load() is None


def test_without_a_place_for_its_code_each_process_compiles(monkeypatch):
    """A read-only installation of a user without a home."""
    from numba.core import caching, types

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert array_kernels.compiled_for(types.int64)(lambda x: x + 1)(41) == 42
