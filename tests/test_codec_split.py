"""`split`: a slow twin of its streams, rows, ranks, hostile frames, and shards that do not hang on who writes them."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord, verify
from sparsekd.codec import FlatTargets, codec_spec, decode, decode_row, encode, encode_row
from sparsekd.codec_ints import MOST_VALUE, decode_ints, encode_ints, zstd_version
from sparsekd.errors import FormatError, MismatchError
from sparsekd.folder import coded_bytes
from sparsekd.id_ranks import id_ranks, ids_of_ranks
from sparsekd.inspect import cache_stats
from sparsekd.shard import ShardReader, write_shard

V, N = 5000, 50


def draws(rng, positions, width=V, rounds=N):
    """Multinomial counts under Zipf laws of different steepness, as random sampling makes them."""
    ranks = np.floor(rng.random((positions, rounds)) ** (-1 / rng.uniform(0.2, 1.5, (positions, 1)))).clip(1, width)
    keys, counts = np.unique(np.arange(positions)[:, None] * width + width - ranks.astype(int), return_counts=True)
    return FlatTargets(
        ids=(keys % width).astype(np.uint32),
        values=counts.astype(np.uint32),
        sizes=np.bincount(keys // width, minlength=positions).astype(np.int64),
        rounds=rounds,
    )


def as_sets(flat):
    """[{id: count}, ...]."""
    pairs = np.split(np.stack([flat.ids, flat.values], 1).astype(int), np.cumsum(flat.sizes)[:-1])
    return [dict(each.tolist()) for each in pairs] if len(flat.sizes) else []


def spec_of(width=V, rounds=N):
    return codec_spec("split", logit_width=width, rounds=rounds)


def slow_streams(positions):
    """The four streams of docs/format.md, position by position in plain Python."""
    multiples, tops, others, ids = [], [], [], []
    for each in positions:
        entries = sorted(each.items(), key=lambda item: (-item[1], item[0]))
        counts = [count for _, count in entries if count > 1]
        multiples.append(len(counts))
        steps = [a - b for a, b in zip(counts, [*counts, 2][1:], strict=True)]
        tops += steps[:1]
        others += steps[1:]
        before = (None, None)
        for token, count in entries:
            ids.append(token - before[0] - 1 if count == before[1] else token)
            before = (token, count)
    return [multiples, tops, others, ids]


# --- integers -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, MOST_VALUE - 1) | st.sampled_from([0, 127, 128, 28799, 28800]), max_size=30)))
def test_integers_survive(streams):
    """Every value below the limit, edges of the classes included, in any number of streams."""
    data = encode_ints([np.array(each, np.int64) for each in streams])
    values, used = decode_ints(data + b"rest", most=10**4)
    assert used == len(data)
    assert values.tolist() == [value for each in streams for value in each]


def test_integers_by_hand():
    """127 is its class; 128 and 28799 take one raw byte, 28800 and the largest value two: lows first, then seconds."""
    frame = bytes.fromhex("28b52ffd 2005 290000 7f 80 ef f0 ff")
    raw = bytes.fromhex("00 ff 00 ff  00 ff")
    data = struct.pack("<I", len(frame)) + frame + raw
    assert encode_ints([[127, 128, 28799, 28800, MOST_VALUE - 1]]) == data
    assert decode_ints(data, 5)[0].tolist() == [127, 128, 28799, 28800, MOST_VALUE - 1]


# --- targets --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), positions=st.integers(1, 40), rounds=st.sampled_from([1, 2, 7, 50, 300]))
def test_streams_are_those_of_the_slow_twin(seed, positions, rounds):
    """What the fast encoder stores, integer by integer, and that it decodes to the same sets."""
    flat = draws(np.random.default_rng(seed), positions, rounds=rounds)
    data, spec = encode(flat, spec_of(rounds=rounds)), spec_of(rounds=rounds)
    assert decode_ints(data, 10**6)[0].tolist() == [value for stream in slow_streams(as_sets(flat)) for value in stream]
    found = decode(data, positions, spec)
    assert as_sets(found) == as_sets(flat)
    rises = np.diff(found.values.astype(int)) <= 0
    assert rises[np.diff(found.positions) == 0].all(), "entries go by falling count"


@pytest.mark.parametrize(("width", "rounds", "positions"), [(262_144, 50, 64), (262_144, 4096, 8), (2**20, 2**20, 2)])
def test_large_vocabularies_and_many_rounds(width, rounds, positions):
    """The last id, one count of all rounds, and all counts of 1, where 32 bits no longer hold a running sum."""
    few = draws(np.random.default_rng(0), positions, width, min(rounds, 5000))
    few = replace(few, values=few.values.copy(), rounds=rounds)
    few.values[np.cumsum(few.sizes) - 1] += rounds - min(rounds, 5000)
    ones = np.arange(width - rounds, width, dtype=np.uint32)
    every = FlatTargets(
        ids=np.concatenate([few.ids, ones, [width - 1]]).astype(np.uint32),
        values=np.concatenate([few.values, np.ones(rounds), [rounds]]).astype(np.uint32),
        sizes=np.append(few.sizes, [rounds, 1]),
        rounds=rounds,
    )
    spec = spec_of(width, rounds)
    found = decode(encode(every, spec), positions + 2, spec)
    order = np.lexsort((every.ids, -every.values.astype(np.int64), every.positions))
    np.testing.assert_array_equal(found.ids, every.ids[order])
    np.testing.assert_array_equal(found.values, every.values[order])
    np.testing.assert_array_equal(found.sizes, every.sizes)


def test_it_is_far_smaller_than_three_bytes_a_label():
    """On draws from Zipf laws, without ranks; the benchmark has the figures of language models."""
    flat = draws(np.random.default_rng(1), 4000)
    assert len(encode(flat, spec_of())) < 0.6 * len(encode(flat, codec_spec("raw24", logit_width=V, rounds=N)))


# --- rows -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), length=st.integers(1, 30), share=st.sampled_from([0.0, 0.5, 1.0]), ranked=st.booleans()
)
def test_rows_survive_with_their_input_ids(seed, length, share, ranked):
    """Next tokens that were drawn, that were not, and unsupervised ones; ids under their own numbers or as ranks."""
    rng = np.random.default_rng(seed)
    supervised = rng.random(length) < share
    flat = draws(rng, int(supervised[1:].sum()), width=40)
    input_ids = rng.integers(40, size=length).astype(np.uint32)
    given_ranks = id_ranks([flat] * 40, 40) if ranked else None
    block = encode_row(input_ids, flat, supervised, spec_of(40), given_ranks.ranks if given_ranks else None)
    found, targets = decode_row(block, length, supervised, spec_of(40), given_ranks.ids if given_ranks else None)
    np.testing.assert_array_equal(found, input_ids)
    assert as_sets(targets) == as_sets(flat)


def test_a_row_by_hand():
    """Input ids 5, 999, 7: both next tokens are among the targets (its second entry, its first), 5 is spelled out."""
    flat = FlatTargets(
        ids=np.array([3, 999, 7], np.uint32),
        values=np.array([4, 1, 5], np.uint32),
        sizes=np.array([2, 1]),
        rounds=5,
    )
    block = encode_row(np.array([5, 999, 7], np.uint32), flat, np.array([False, True, True]), spec_of(1000, 5))
    small, ids = "300000 010102030201", "210000 03830705"  # 1 1 (multiples) 2 3 (steps) 2 1 (entries); 3 999 7, 5
    assert block == bytes.fromhex(f"16000000 28b52ffd200a {small} {ids} 67")


# --- hostile bytes --------------------------------------------------------------------------------------


def a_row(length=40):
    rng = np.random.default_rng(3)
    flat, supervised = draws(rng, length - 1), np.ones(length, bool)
    input_ids = np.append(0, flat.ids[np.cumsum(flat.sizes) - 1]).astype(np.uint32)
    return encode_row(input_ids, flat, supervised, spec_of()), supervised


def test_every_truncation_is_refused():
    """No prefix of a row is a row, and neither is a row with a byte more."""
    block, supervised = a_row()
    for damaged in [*(block[:end] for end in range(len(block))), block + b"\0"]:
        with pytest.raises(FormatError):
            decode_row(damaged, len(supervised), supervised, spec_of())


def test_flipped_bits_are_refused_or_decode_to_sound_targets():
    """Whatever a damaged block decodes to keeps the promises of a sound one; the shard's crc32c catches the rest."""
    block, supervised = a_row()
    for bit in range(0, 8 * len(block), 3):
        damaged = bytearray(block)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            input_ids, flat = decode_row(bytes(damaged), len(supervised), supervised, spec_of())
        except FormatError:
            continue
        encode_row(input_ids, flat, supervised, spec_of())  # sums, ids and repeats are checked there


def framed(content, size=None):
    """A frame that claims to hold `size` bytes, as a list of integers."""
    frame = bytearray(zstandard.ZstdCompressor(level=1).compress(content))
    if size is not None:  # a frame header with an 8-byte content size, no content
        frame = bytearray(bytes.fromhex("28b52ffd e0") + struct.pack("<Q", size) + bytes.fromhex("010000"))
    return struct.pack("<I", len(frame)) + bytes(frame)


@pytest.mark.parametrize("size", [10**4, 2**30, 2**40, 2**63])
def test_a_frame_that_declares_too_much_is_refused_before_anything_is_allocated(size):
    """Two positions of five rounds are at most 22 values."""
    with pytest.raises(FormatError, match="at most 22 fit here"):
        decode(framed(b"", size), 2, spec_of(1000, 5))


def test_a_bomb_within_its_declaration_is_refused_by_its_sums():
    """A million zeros in fifty bytes: 4096 positions of 4096 rounds could be that many, these are not."""
    bomb = framed(bytes(2**20))
    assert len(bomb) < 100
    with pytest.raises(FormatError, match="sizes sum to 16777216"):
        decode(bomb, 4096, spec_of(1000, 4096))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1], "1 values cannot hold 2 sizes"),
        ([9, 9, 1], "18 counts and 0 slots do not fit in 1 values"),
        ([1, 1, 2, 9, 3, 999, 7], "position 1 has counts that sum to more than 5"),
        ([1, 1, 2, 3, 3, 7], "the sizes sum to 3, 2 ids follow"),
        ([1, 1, 2, 3, 3, 1000, 7], "position 0 has id 1000, but logit_width=1000"),
        ([1, 1, 2, 3, 3, 3, 7], "position 0 has an id twice"),
        ([0, 1, 3, 0, 1, 2, 3, 996, 7], "position 0 has id 1006, but logit_width=1000"),
    ],
)
def test_damaged_streams_are_named(values, words):
    """One wrong integer each, next to the example of the format page."""
    with pytest.raises(FormatError, match=words):
        decode(encode_ints([values]), 2, spec_of(1000, 5))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", "0 bytes cannot hold the length"),
        ("ff000000 28b52ffd", "a zstd frame ends at byte 259 of 8"),
        ("08000000 0102030405060708", "cannot be read"),
        ("09000000 28b52ffd 2007 100000", "cannot be read"),
        ("0b000000 28b52ffd 2001 090000 01 ff", "cannot be read"),
        ("0a000000 28b52ffd 2001 090000 ff", "2 raw bytes are needed, 0 follow"),
    ],
)
def test_damaged_frames_are_named(data, words):
    """Lengths, magic, blocks and what follows the frame."""
    with pytest.raises(FormatError, match=words):
        decode(bytes.fromhex(data), 2, spec_of(1000, 5))


@pytest.mark.parametrize(
    ("slots", "spelled", "words"),
    [
        ([3, 1], [5], "entry 3 of 2 as its next token"),
        ([2, 1], [], "2 slots and 0 ids do not make 3"),
        ([2, 1], [5, 5], "2 slots and 2 ids do not make 3"),
        ([2, 1], [1000], "input id 1000, but logit_width=1000"),
    ],
)
def test_damaged_input_ids_are_named(slots, spelled, words):
    """A next token beyond its position's entries, input ids too few, too many and beyond the vocabulary."""
    block = encode_ints([[1, 1, 2, 3, *slots, 3, 999, 7, *spelled]])
    with pytest.raises(FormatError, match=words):
        decode_row(block, 3, np.array([False, True, True]), spec_of(1000, 5))


def test_a_row_without_targets_is_its_input_ids():
    """Nothing supervised: one list, whose first block is empty."""
    row, nothing = np.array([5, 7], np.uint32), np.zeros(2, bool)
    none = FlatTargets(ids=row[:0], values=row[:0], sizes=np.zeros(0, np.int64), rounds=5)
    block = encode_row(row, none, nothing, spec_of(1000, 5))
    assert decode_ints(block, 2)[0].tolist() == [5, 7]
    assert decode_row(block, 2, nothing, spec_of(1000, 5))[0].tolist() == [5, 7]


def test_targets_that_are_no_draws_are_not_written():
    """An id twice, a count of 0 and another sum."""
    for ids, counts, words in [
        ([7, 7], [2, 3], "position 0 has an id twice"),
        ([7, 8], [0, 5], "a count is 0"),
        ([7, 8], [2, 2], "sum to 4, but rounds=5"),
    ]:
        flat = FlatTargets(
            ids=np.array(ids, np.uint32), values=np.array(counts, np.uint32), sizes=np.array([2]), rounds=5
        )
        with pytest.raises(MismatchError, match=words):
            encode(flat, spec_of(1000, 5))


# --- ranks and shards -----------------------------------------------------------------------------------


def test_ranks_are_by_use_then_by_id():
    """Ids with at least 32 entries, the most used first; the others follow, ascending."""
    uses = {4: 40, 2: 32, 5: 31, 1: 40}
    flat = FlatTargets(
        ids=np.array([token for token, use in uses.items() for _ in range(use)], np.uint32),
        values=np.ones(143, np.uint32),
        sizes=np.ones(143, np.int64),
        rounds=1,
    )
    found = id_ranks([flat], 6)
    assert found.table == encode_ints([[1, 4, 2]])
    assert found.ids.tolist() == [1, 4, 2, 0, 3, 5]
    assert found.ranks[found.ids].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("table", "more", "words"),
    [
        ([3, 3], b"", "names 2 ids, 1 of them different"),
        ([6], b"", "names id 6"),
        ([5], b"\0", r"id_rank takes \d+ bytes of \d+"),
        ([0, 1, 2, 3, 4, 5, 0], b"", "declares 7 values, at most 6 fit"),
    ],
)
def test_a_table_that_is_no_permutation_is_refused(table, more, words):
    """Repeated ids, ids beyond the vocabulary, more bytes or more ids than there can be."""
    with pytest.raises(FormatError, match=words):
        ids_of_ranks(encode_ints([table]) + more, 6)


def test_a_row_that_no_reader_would_allocate_is_not_written(monkeypatch):
    """A row whose list would be longer than what is read of hostile ones: an entry is up to 4 values of it."""
    flat, supervised = draws(np.random.default_rng(0), 9), np.arange(10) > 0
    values = 4 * len(flat.ids) + 10
    for most, fits in ((values, True), (values - 1, False)):
        monkeypatch.setattr("sparsekd.codec_split.MOST_VALUES", most)
        monkeypatch.setattr("sparsekd.codec_split_fast.MOST_VALUES", most)
        if fits:
            assert encode_row(np.zeros(10, np.uint32), flat, supervised, spec_of(V))
            continue
        words = f"{len(flat.ids)} entries and 10 input ids, split holds {most} together, .* make rows shorter"
        with pytest.raises(MismatchError, match=words):
            encode_row(np.zeros(10, np.uint32), flat, supervised, spec_of(V))


ROWS, LENGTH = 6, 64


def cache_spec(codec="split"):
    spec = codec_spec(codec, logit_width=V, rounds=N)
    shape = {"rows": ROWS, "seq_len": LENGTH, "shard_rows": 4, "logit_width": V}
    return CacheSpec(**shape, codec=spec, sampler={}, teacher={}, tokenizer={}, data={})


def record(row):
    rng = np.random.default_rng(row)
    supervised = rng.random(LENGTH) < 0.9
    flat = draws(rng, int(supervised[1:].sum()))
    input_ids = rng.integers(V, size=LENGTH).astype(np.uint32)
    return RowRecord(input_ids=input_ids, targets=flat, starts=np.arange(LENGTH) == 0, supervised=supervised)


def write(path, shards, codec="split"):
    writer = CacheWriter(path, cache_spec(codec))
    for shard in shards:
        writer.write(shard, [record(row) for row in writer.spec.shard_range(shard)])
    writer.finalize()
    return path


def test_a_cache_survives_and_verifies(tmp_path):
    """Rows come back through CacheReader, in less than half of raw24's bytes; verify finds nothing."""
    write(tmp_path / "split", [0, 1])
    write(tmp_path / "raw", [0, 1], "raw24")
    with CacheReader(tmp_path / "split") as reader, CacheReader(tmp_path / "raw") as raw:
        for row in range(ROWS):
            found, expected = reader.record(row), record(row)
            np.testing.assert_array_equal(found.input_ids, expected.input_ids)
            assert as_sets(found.targets) == as_sets(expected.targets)
        assert reader.stats["payload_bytes"] < 0.6 * raw.stats["payload_bytes"]
        assert {**reader.stats, "payload_bytes": 0} == {**raw.stats, "payload_bytes": 0}
        assert reader.manifest["engines"] == [{"zstd": zstd_version()}]
    assert verify(tmp_path / "split").problems == []


def test_shards_do_not_hang_on_who_writes_them_or_in_what_order(tmp_path):
    """The id_rank of a shard comes from its own rows: any order of shards, the same files."""
    one, other = write(tmp_path / "a", [0, 1]), write(tmp_path / "b", [1, 0])
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (other / file.name).read_bytes()
    with ShardReader(one / "shard-00000.safetensors") as reader:
        assert reader.ranked


def test_every_flipped_bit_of_the_id_rank_is_noticed(tmp_path):
    """It is part of the index's crc32c, so a shard with a wrong table does not open."""
    path = write(tmp_path / "a", [0, 1]) / "shard-00000.safetensors"
    whole = path.read_bytes()
    table = id_ranks([record(row).targets for row in range(4)], V).table
    at = whole.index(table)
    for bit in range(0, 8 * len(table), 5):
        damaged = bytearray(whole)
        damaged[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            ShardReader(path)


@pytest.mark.parametrize(("codec", "has"), [("split", "no"), ("raw24", "an")])
def test_a_table_goes_with_the_codec(tmp_path, codec, has):
    """A shard of split without its id_rank would read ranks as ids; one of raw24 has no use for it."""
    write(tmp_path, [0, 1], codec)
    path = tmp_path / "shard-00000.safetensors"
    with ShardReader(path) as reader:
        rows, header = [reader.read_row(row) for row in range(len(reader))], reader.header
    table = id_ranks([record(row).targets for row in range(4)], V).table
    write_shard(path, header, rows, None if codec == "split" else table)
    words = f"shard-00000.safetensors: has {has} id_rank, which codec {codec} does not allow"
    with CacheReader(tmp_path) as reader, pytest.raises(FormatError, match=words):
        reader[0]
    assert words in verify(tmp_path).problems[0]


@pytest.mark.parametrize("codec", ["split", "raw24"])
def test_coded_bytes_is_what_a_cache_would_take(tmp_path, codec):
    """A cache of one codec says what another would cost, before it is written."""
    other = cache_spec("paper24")
    with CacheReader(write(tmp_path / "cache", [0, 1], codec)) as reader:
        shards = [[record(row) for row in other.shard_range(shard)] for shard in (0, 1)]
        found = sum(coded_bytes(each, other, cache_spec(codec).codec) for each in shards)
        tables = [] if codec == "raw24" else [len(id_ranks([r.targets for r in each], V).table) for each in shards]
        assert found == reader.stats["payload_bytes"] + sum(tables)


def test_inspect_counts_input_ids_where_they_are(tmp_path):
    """raw24's ids lie beside the targets (2 bytes each here); split's cannot be told apart."""
    for codec, beside in (("raw24", 2 * ROWS * LENGTH), ("split", 0)):
        with CacheReader(write(tmp_path / codec, [0, 1], codec)) as reader:
            found = cache_stats(reader)["target_bytes_per_token"] * reader.stats["positions"]
            assert found == pytest.approx(reader.stats["payload_bytes"] - beside)
