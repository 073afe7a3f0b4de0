"""Rows decoded and padded at once are the rows decoded and padded one by one, or none where one of them is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hostile_integers import spoilt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec_split import N, draws, record, spec_of, write
from test_compiled import guarded

import sparsekd as skd
from sparsekd import compiled
from sparsekd.cache import CacheReader, verify
from sparsekd.codec import codec_spec, decode_row, decode_rows, encode_row
from sparsekd.codec_ints import FIRST, decode_ints, encode_ints
from sparsekd.errors import FormatError
from sparsekd.flat import FlatTargets
from sparsekd.folder import shard_ranks
from sparsekd.padded import pad_joined, pad_rows
from sparsekd.shard import ShardReader, write_shard

if compiled.load() is None:
    pytest.skip("needs the extra fast", allow_module_level=True)
from sparsekd import array_kernels


@pytest.fixture(autouse=True)
def _compiled_at_once(monkeypatch):
    """As in a process that has read many values."""
    monkeypatch.setattr(compiled, "_read", 2**60)


def some_rows(rng, count, length, width=300, rounds=N):
    """(blocks, supervised [B, L], tables): every other row by ranks, under one of two tables."""
    tables = [rng.permutation(width).astype(np.uint32) for _ in range(2)]
    supervised, blocks, of = rng.random((count, length)) < rng.choice([0.0, 0.6, 1.0], (count, 1)), [], []
    for row in range(count):
        flat = draws(rng, int(supervised[row, 1:].sum()), width, rounds)
        ids = tables[rng.integers(2)] if row % 2 else None
        ranks = None if ids is None else np.argsort(ids).astype(np.uint32)
        blocks.append(
            encode_row(rng.integers(width, size=length), flat, supervised[row], spec_of(width, rounds), ranks)
        )
        of.append(ids)
    return blocks, supervised, of


def one_by_one(blocks, supervised, spec, tables):
    """What `decode_rows` equals, in its words; None where a row is refused."""
    try:
        found = [
            decode_row(*(block, len(mask), mask, spec, ids))
            for block, mask, ids in zip(blocks, supervised, tables, strict=True)
        ]
    except FormatError:
        return None
    return np.stack([tokens for tokens, _ in found]), FlatTargets.join([flat for _, flat in found])


def assert_same(found, expected):
    assert (found is None) == (expected is None)
    if found is None:
        return
    arrays = [(each[0], each[1].ids, each[1].values, each[1].sizes) for each in (found, expected)]
    for one, other in zip(*arrays, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert found[1].rounds == expected[1].rounds


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 6),
    length=st.integers(1, 30),
    rounds=st.sampled_from([1, 2, 50, 3000]),
    kept=st.booleans(),
)
def test_rows_at_once_are_rows_one_by_one(seed, count, length, rounds, kept):
    """Rows of other tables and none, without a supervised position too; in memory used again or the caller's own."""
    blocks, supervised, tables = some_rows(np.random.default_rng(seed), count, length, rounds=rounds)
    memory = compiled.fresh if kept else compiled.scratch
    found = decode_rows(blocks, supervised, spec_of(300, rounds), tables, memory)
    assert_same(found, one_by_one(blocks, supervised, spec_of(300, rounds), tables))
    assert found is not None


def test_what_is_kept_is_not_written_over():
    """Another batch leaves the arrays of this one as they were."""
    rng, spec = np.random.default_rng(0), spec_of(300)
    first, second = some_rows(rng, 3, 20), some_rows(rng, 3, 20)
    found = decode_rows(first[0], first[1], spec, first[2])
    decode_rows(second[0], second[1], spec, second[2])
    assert_same(found, one_by_one(first[0], first[1], spec, first[2]))


def hostile_rows(count):
    """(list of a row, supervised): a sound row's integers, some of them changed, moved, dropped or repeated."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        supervised = rng.random(int(rng.integers(2, 7))) < 0.8
        flat, spec = draws(rng, int(supervised[1:].sum()), 30, 7), spec_of(30, 7)
        tokens = rng.integers(30, size=len(supervised))
        values = decode_ints(encode_row(tokens, flat, supervised, spec), 10**4)[0].astype(np.int64)
        yield spoilt(values, rng, int(rng.integers(2))), supervised


def test_a_batch_is_refused_where_one_of_its_rows_is():
    """Every hostile list between two sound rows: taken with them, or all three are left to be read one by one."""
    spec, taken = spec_of(30, 7), 0
    for values, mask in hostile_rows(600):
        beside = some_rows(np.random.default_rng(1), 2, len(mask), 30, 7)
        blocks = [beside[0][0], encode_ints([values]), beside[0][1]]
        supervised, tables = np.stack([beside[1][0], mask, beside[1][1]]), [beside[2][0], None, beside[2][1]]
        found = decode_rows(blocks, supervised, spec, tables)
        assert_same(found, one_by_one(blocks, supervised, spec, tables))
        taken += found is not None
    assert 150 < taken < 450, "both kinds are there"


def test_flipped_bits_and_truncations_end_alike():
    """A damaged frame, raw bytes of the next row, a byte more."""
    blocks, supervised, tables = some_rows(np.random.default_rng(5), 3, 12)
    spec, middle = spec_of(300), blocks[1]
    damaged = [bytearray(middle) for _ in range(0, 8 * len(middle), 7)]
    for bit, each in zip(range(0, 8 * len(middle), 7), damaged, strict=True):
        each[bit // 8] ^= 1 << bit % 8
    for block in [*map(bytes, damaged), *(middle[:end] for end in range(0, len(middle), 5)), middle + b"\0"]:
        rows = [blocks[0], block, blocks[2]]
        found = decode_rows(rows, supervised, spec, tables)
        assert_same(found, one_by_one(rows, supervised, spec, tables))


def test_tables_that_a_kernel_cannot_read_are_left_to_numpy():
    """An address says nothing of type, strides and length."""
    blocks, supervised, tables = some_rows(np.random.default_rng(2), 2, 9)
    assert decode_rows(blocks, supervised, spec_of(300), tables) is not None
    for table in (tables[1].astype(np.int64), np.repeat(tables[1], 2)[::2], tables[1][:-1]):
        assert decode_rows(blocks, supervised, spec_of(300), [None, table]) is None


def test_codecs_without_a_way_for_many_rows(monkeypatch):
    """Other codecs, scales of positions, no rows, and a process without numba."""
    blocks, supervised, tables = some_rows(np.random.default_rng(2), 2, 9)
    assert decode_rows(blocks, supervised, codec_spec("raw24", logit_width=300, rounds=N), tables) is None
    assert decode_rows(blocks, supervised, spec_of(300) | {"share": 0.5}, tables) is None
    assert decode_rows([], supervised[:0], spec_of(300), []) is None
    monkeypatch.setattr(compiled, "_read", -(2**60))
    assert decode_rows(blocks, supervised, spec_of(300), tables) is None


def test_more_than_a_row_may_be_is_read_row_by_row(monkeypatch):
    """All rows together declare no more than one may: what a reader allocates stays below 2 GiB."""
    blocks, supervised, tables = some_rows(np.random.default_rng(3), 4, 30)
    lengths = [len(decode_ints(block, 10**6)[0]) for block in blocks]
    for most, taken in ((sum(lengths), True), (sum(lengths) - 1, False)):
        monkeypatch.setattr("sparsekd.codec_split_fast.MOST_VALUES", most)
        assert (decode_rows(blocks, supervised, spec_of(300), tables) is not None) == taken


@pytest.mark.parametrize("counted", [True, False])
def test_parts_are_what_was_joined(counted):
    """Rows without positions among them, first and last."""
    rng = np.random.default_rng(0)
    rows = [draws(rng, positions, 50, 7) for positions in (0, 3, 0, 1, 5, 0)]
    rows = rows if counted else [replace(row, values=row.weights, rounds=None) for row in rows]
    found = FlatTargets.join(rows).parts(np.array([len(row.sizes) for row in rows]))
    for one, other in zip(found, rows, strict=True):
        assert_same((one.sizes, one), (other.sizes, other))


# --- padding ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.5, 1.0]), rounds=st.sampled_from([1, 7, 50, 3000]))
def test_joined_counts_are_padded_as_rows_are(seed, share, rounds):
    """Weights are count / rounds rounded once, to the bit; padding is zero though the memory is not."""
    rng = np.random.default_rng(seed)
    supervised = rng.random((3, 9)) < share
    rows = [draws(rng, int(mask.sum()), 50, rounds) for mask in supervised]
    _ = np.full(40_000, 7.0)  # what is freed here comes back as memory for the arrays
    del _
    found, expected = pad_joined(FlatTargets.join(rows), supervised), pad_rows(rows, supervised)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def test_other_targets_are_left_to_pad_rows(monkeypatch):
    """Scales, arrays that do not fit together, strides, and more than 2 GiB."""
    flat, supervised = draws(np.random.default_rng(0), 4, 50, 7), np.ones((2, 2), bool)
    assert pad_joined(flat, supervised) is not None
    assert pad_joined(replace(flat, values=flat.weights.astype(np.float64), rounds=None), supervised) is None
    assert pad_joined(replace(flat, scale=np.ones(4)), supervised) is None
    assert pad_joined(flat, np.ones((2, 3), bool)) is None
    assert pad_joined(flat, np.ones((1, 3), bool)) is None
    assert pad_joined(replace(flat, sizes=np.repeat(flat.sizes, 2)[::2]), supervised) is None
    monkeypatch.setattr("sparsekd.padded._MOST_BYTES", 12 * 4 * int(flat.sizes.max()) - 1)
    assert pad_joined(flat, supervised) is None


# --- no index out of bounds -------------------------------------------------------------------------------


def test_no_hostile_batch_leads_out_of_bounds(monkeypatch):
    """The kernels' own source, run by Python on guarded arrays: spans, lists, tables, room and masks of any size."""
    fast, rng, taken = compiled.load(), np.random.default_rng(1), 0
    table = guarded(range(30), np.uint32)
    monkeypatch.setattr(fast, "_table", lambda address, width: table[: width if address else 0])
    rows = list(hostile_rows(400))
    with np.errstate(over="ignore"):
        for values, mask in rows:
            size, positions = len(values), int(mask[1:].sum())
            classes = np.where(values < 128, values, rng.integers(128, 256, size))
            lows = int((classes >= 128).sum() + (classes >= 240).sum())
            span = np.array([[size, 4 + lows, 4, positions]] * 2)
            if rng.random() < 0.3:
                span[rng.integers(2), rng.integers(4)] += rng.choice([-(2**62), -5, -1, 1, 5, 2**62])
            room = 2 * size if rng.random() < 0.8 else int(rng.integers(2 * size))
            numbers = [guarded(np.zeros(room), np.uint32) for _ in range(2)]
            sizes = guarded(np.zeros(2 * positions), np.int64)
            starts, heads = guarded(np.zeros(size + 1), np.uint8), guarded(np.zeros(size), np.uint32)
            masks, tokens = guarded([mask, mask], bool), guarded(np.zeros((2, len(mask))), np.uint32)
            addresses, data = guarded(rng.integers(0, 2, 2), np.int64), rng.integers(0, 256, 2 * (4 + lows))
            found = fast.split_rows.py_func(
                *(guarded(span, np.int64), guarded([*classes, *classes], np.uint8), guarded(data, np.uint8)),
                *(
                    guarded(FIRST, np.uint32),
                    7,
                    30,
                    masks,
                    addresses,
                    (starts, heads),
                    guarded(np.zeros(30), np.uint32),
                ),
                *(1, tokens, (*numbers, sizes)),
            )
            taken += found >= 0
            arrays = [guarded(np.zeros((2, len(mask), 3)), dtype) for dtype in (np.int64, np.float32)]
            array_kernels.pad_counts.py_func(*numbers, sizes, 7, masks, *arrays)
            few = guarded(rng.integers(-1, 5, positions), np.int64)
            array_kernels.pad_counts.py_func(
                *numbers, few, 7, guarded(masks[:1, 1:], bool), *(a[:1, 1:] for a in arrays)
            )
    assert 50 < taken < 350, "both kinds are there"


# --- a cache ----------------------------------------------------------------------------------------------


def stacked(reader, numbers):
    """What `CacheReader.padded` equals."""
    rows = [reader[number] for number in numbers]
    supervised = np.stack([row.supervised for row in rows])
    ids = np.stack([row.input_ids for row in rows])
    return ids, supervised, *pad_rows([row.flat for row in rows], supervised[:, 1:])


def test_a_batch_of_a_cache_is_its_rows(tmp_path):
    """Rows of two shards in any order, twice, from the end; other codecs have no such way."""
    with CacheReader(write(tmp_path / "split", [0, 1])) as reader:
        for numbers in ([0], [5, 0, 3, 3, -1], [4, 5]):
            found = reader.padded(numbers)
            arrays = (found.input_ids, found.supervised, found.ids, found.weights)
            for one, other in zip(arrays, stacked(reader, numbers), strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)
        assert reader.padded([]) is None
        with pytest.raises(IndexError, match="row 6"):
            reader.padded([0, 6])
    with CacheReader(write(tmp_path / "raw", [0, 1], "raw24")) as reader:
        assert reader.padded([0]) is None


@pytest.mark.parametrize("codec", ["split", "raw24"])
def test_a_batch_made_ahead_is_the_batch(tmp_path, codec):
    """The same tensors, whether rows are padded together or one by one."""
    collate = skd.SparseKDCollator()
    with CacheReader(write(tmp_path / "c", [0, 1], codec)) as reader:
        dataset = skd.CacheDataset(reader, seed=4)
        expected = collate([dataset[index] for index in (4, 1, 2)])
        first, second = (collate(dataset._items(0, [4, 1, 2])) for _ in range(2))
        for batch in (first, second):
            assert all(torch.equal(batch[key], expected[key]) for key in expected)
            assert list(batch) == list(expected)


def rewritten(path, row, counted=0, **changed):
    """A cache whose first shard has another block or hash for a row, or other statistics, under checksums that are
    right."""
    write(path, [0, 1])
    (file,) = path.glob("*00000*")
    with ShardReader(file) as shard, CacheReader(path) as reader:
        rows, header = [shard.read_row(i) for i in range(len(shard))], shard.header
        ranked = shard_ranks([record(i) for i in range(len(rows))], reader.spec)
    rows[row] = replace(rows[row], **{name: change(getattr(rows[row], name)) for name, change in changed.items()})
    header["stats"]["next_token_hits"] += counted
    write_shard(file, header, rows, ranked.table)
    return path


def flipped(path, row):
    """A cache with a bit of a row's block flipped."""
    write(path, [0, 1])
    (file,) = path.glob("*00000*")
    with ShardReader(file) as shard:
        block = shard.read_row(row).block
    data = file.read_bytes()
    at = data.index(block)
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    return path


def test_a_hostile_row_of_a_batch_is_named(tmp_path):
    """Its number and the row's own words, as when it is read alone."""
    path = rewritten(tmp_path / "c", 2, block=lambda block: block + b"\0")
    with CacheReader(path) as reader:
        assert reader.padded([0, 1, 3]) is not None
        assert reader.padded([0, 2, 3]) is None
        dataset = skd.CacheDataset(reader, shuffle=False)
        skd.SparseKDCollator()(dataset._items(0, [0, 1]))
        with pytest.raises(FormatError, match=r"row 2: its integers take \d+ bytes of \d+"):
            dataset._items(0, [0, 2, 3])


def test_a_row_with_a_wrong_checksum_is_named(tmp_path):
    """Found before anything is decoded."""
    with CacheReader(flipped(tmp_path / "c", 1)) as reader, pytest.raises(FormatError, match="row 1 has crc32c"):
        reader.padded([0, 1])


def test_verify_finds_the_same_together_and_one_by_one(tmp_path, monkeypatch):
    """A hostile block, a foreign hash, a flipped bit, other statistics, and nothing: the same sentences either way."""
    caches = {
        "its integers take": rewritten(tmp_path / "block", 2, block=lambda block: block + b"\0"),
        "recorded hash": rewritten(tmp_path / "hash", 1, input_hash=lambda number: number ^ 1),
        "row 1 has crc32c": flipped(tmp_path / "bit", 1),
        "the statistics in its header": rewritten(tmp_path / "stats", 0, counted=1),
        "": write(tmp_path / "sound", [0, 1]),
    }
    together = {said: verify(path).problems for said, path in caches.items()}
    monkeypatch.setattr("sparsekd.folder.quick_rows", lambda spec: None)
    assert together == {said: verify(path).problems for said, path in caches.items()}
    assert together.pop("") == []
    assert all(said in " ".join(problems) for said, problems in together.items())


def test_threads_share_a_reader_and_not_its_memory(tmp_path):
    """Batches read by four threads at once, each as it is alone."""
    with CacheReader(write(tmp_path / "c", [0, 1])) as reader, ThreadPoolExecutor(4) as threads:
        batches = [[i % 6, (i + 1) % 6, (5 * i) % 6] for i in range(6)]
        expected = [stacked(reader, batch) for batch in batches]
        found = list(threads.map(lambda i: reader.padded(batches[i % 6]), range(120)))
    for i, each in enumerate(found):
        np.testing.assert_array_equal(each.ids, expected[i % 6][2])
        np.testing.assert_array_equal(each.weights, expected[i % 6][3])
