"""Compiled loops take what numpy takes: the same arrays and refusals, no index out of bounds; and may be missing."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec_split import a_row, draws, spec_of

from sparsekd import compiled
from sparsekd.codec import FlatTargets, decode, decode_row, encode, encode_row
from sparsekd.codec_ints import _FIRST, MOST_VALUE, decode_ints, encode_ints
from sparsekd.codec_split import decode_inputs
from sparsekd.errors import FormatError
from sparsekd.id_ranks import id_ranks
from sparsekd.padded import pad_rows

if compiled.load() is None:
    pytest.skip("needs the extra fast", allow_module_level=True)


def both_ways(function, *arguments):
    """What a call gives in numpy and compiled: (arrays or an error's text) twice."""
    found = []
    for values_read in (-(2**60), 2**60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "_read", values_read)
            assert (compiled.kernels() is None) == (values_read < 0)
            try:
                found.append(plain(function(*arguments)))
            except FormatError as error:
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
        for _ in range(int(rng.integers(3))):
            at = int(rng.integers(len(values)))
            change = int(rng.integers(6))
            if change < 3:
                values[at] = max(0, values[at] + [-1, 1, rng.choice([2, 40, MOST_VALUE - 9])][change])
            elif change == 3:
                values = np.delete(values, at) if len(values) > 1 else values
            else:
                values = np.insert(values, at, values[int(rng.integers(len(values)))])
        yield np.minimum(values, MOST_VALUE - 1), positions


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


def hostile_slots(count):
    """(slots and spelled ids, sizes, supervised): more or fewer than fit, entries that are there and that are not."""
    rng = np.random.default_rng(2)
    for _ in range(count):
        supervised = rng.random(rng.integers(1, 9)) < 0.7
        sizes = rng.integers(1, 4, int(supervised[1:].sum()))
        length = len(supervised) + int(rng.integers(-1, 2))
        slots = rng.integers(0, sizes + 1 + (rng.random(len(sizes)) < 0.1))
        spelled = rng.integers(30, size=max(0, length - int((slots > 0).sum())))
        yield np.concatenate([slots, spelled])[: max(length, len(slots))], sizes, supervised


def test_hostile_slots_are_refused_in_the_same_words():
    """A row whose input ids are too many, too few, or entries that are not there."""
    taken = 0
    for values, sizes, supervised in hostile_slots(600):
        ids = np.arange(sizes.sum(), dtype=np.uint32)
        flat = FlatTargets(ids=ids, values=ids, sizes=sizes, rounds=1)
        numpy, fast = both_ways(decode_inputs, encode_ints([values]), flat, len(supervised), supervised)
        assert numpy == fast
        taken += not isinstance(fast, str)
    assert 100 < taken < 500, "both kinds are there"


def test_counts_whose_sum_would_wrap_around_are_refused():
    """2^22 steps of a million each: the sum of such counts has 64 bits."""
    many = 2**22
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
    """The kernels' own source, run by Python on guarded arrays: streams, slots, table, padding."""
    fast, rng = compiled.load(), np.random.default_rng(1)
    with np.errstate(over="ignore"):  # masks of all bits are made by wrapping around
        for values, positions in hostile_lists(400):
            list_T, size = guarded(values, np.uint32), len(values)
            starts, seen = guarded(np.zeros(size + 1), np.uint8), guarded(np.zeros(30), np.uint32)
            fast.split.py_func(list_T, positions, 7, 30, starts, seen, 1)
            classes, data = guarded(values % 256, np.uint8), guarded(rng.integers(0, 256, size), np.uint8)
            end = int(rng.integers(-1, size + 2))
            fast.ints.py_func(classes, data, end, guarded(_FIRST, np.uint32), guarded(values, np.uint32))
        for values, sizes, supervised in hostile_slots(400):
            ids = guarded(rng.integers(0, 30, max(0, int(sizes.sum()) + int(rng.integers(-1, 2)))), np.uint32)
            supervised, tokens = guarded(supervised, bool), guarded(np.zeros(len(supervised)), np.uint32)
            fast.inputs.py_func(guarded(values, np.uint32), ids, guarded(sizes, np.int64), supervised, tokens)
            fast.renumber.py_func(guarded(range(29), np.uint32), ids)
            room = [guarded(np.zeros((len(supervised), 2)), dtype) for dtype in (np.int64, np.float32)]
            fast.pad.py_func(ids, guarded(ids, np.float32), guarded(sizes, np.int64), supervised, *room)


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
    assert compiled._local.mark == 42


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
    assert compiled.load()._compiled(types.int64)(lambda x: x + 1)(41) == 42
