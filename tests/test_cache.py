"""A folder of shards: round trips, resuming, refusing, verifying, the alignment canary."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest

from sparsekd import folder
from sparsekd.cache import (
    CacheReader,
    CacheSpec,
    CacheWriter,
    RowRecord,
    alignment,
    check_alignment,
    verify,
)
from sparsekd.codec import FlatTargets, codec_spec
from sparsekd.errors import FormatError, IncompleteError, MismatchError, RecipeError, StorageError
from sparsekd.manifest import MANIFEST, same_stats, shard_name
from sparsekd.shard import row_index_bytes

VOCAB, SEQ_LEN, ROUNDS = 97, 16, 10


def make_spec(**changes):
    values = {
        "rows": 5,
        "seq_len": SEQ_LEN,
        "shard_rows": 2,
        "logit_width": VOCAB,
        "codec": codec_spec("raw24", rounds=ROUNDS, logit_width=VOCAB),
        "sampler": {"name": "random_sampling", "rounds": ROUNDS, "temperature": 1.0, "seed": 0},
        "teacher": {"id": "tiny"},
        "tokenizer": {"hash": "abc"},
        "data": {"fingerprint": "def"},
    }
    return CacheSpec(**(values | changes))


def make_record(row, *, shift=0, rounds=ROUNDS):
    """A row whose sets hold the token `shift` places after the next one most of the time."""
    rng = np.random.default_rng(row)
    input_ids = rng.integers(VOCAB, size=SEQ_LEN).astype(np.uint32)
    supervised = np.ones(SEQ_LEN, bool)
    supervised[1:3] = row % 2 == 0
    positions = np.flatnonzero(supervised[1:])
    counts = rng.multinomial(rounds - 3, np.full(VOCAB, 1 / VOCAB), size=len(positions))
    true = input_ids[np.clip(positions + 1 + shift, 0, SEQ_LEN - 1)]
    counts[np.arange(len(positions)), true] += 3
    ids = np.broadcast_to(np.arange(VOCAB), counts.shape)
    starts = np.zeros(SEQ_LEN, bool)
    starts[[0, 5]] = True
    targets = FlatTargets.from_padded(ids, counts, rounds)
    return RowRecord(input_ids=input_ids, targets=targets, starts=starts, supervised=supervised)


def capture(path, spec, **record):
    writer = CacheWriter(path, spec, engine={"torch": "1"})
    for shard in writer.missing():
        writer.write(shard, [make_record(row, **record) for row in spec.shard_range(shard)])
    writer.finalize()
    return path


@pytest.fixture
def cache(tmp_path):
    return capture(tmp_path / "cache", make_spec())


def test_a_row_reads_back_as_it_was_written(cache):
    """Ids, masks, counts and their places come back exactly, whatever the order of reading."""
    with CacheReader(cache) as reader:
        assert len(reader) == 5
        for index in (4, 0, 3, 1, 2):
            row, record = reader[index], make_record(index)
            assert row.index == index
            np.testing.assert_array_equal(row.input_ids, record.input_ids)
            np.testing.assert_array_equal(row.starts, record.starts)
            np.testing.assert_array_equal(row.supervised, record.supervised)
            dense = np.zeros((SEQ_LEN - 1, VOCAB))
            np.add.at(dense, (np.arange(SEQ_LEN - 1)[:, None], row.targets.ids), row.targets.weights)
            wanted = np.zeros((SEQ_LEN - 1, VOCAB))
            owner = np.flatnonzero(record.supervised[1:])[record.targets.positions]
            wanted[owner, record.targets.ids] = record.targets.values / ROUNDS
            np.testing.assert_allclose(dense, wanted, atol=1e-7)
    assert verify(cache).problems == []


def test_a_reader_says_what_it_reads(cache):
    """And a writer takes its own shards only."""
    made = "5 rows of 16 tokens, sampler=random_sampling, codec=raw24"
    assert repr(CacheReader(cache)) == f"CacheReader({str(cache)!r}: {made})"
    for shard in (-1, 3):
        with pytest.raises(IndexError, match=f"shard {shard} of 3"):
            CacheWriter(cache, make_spec()).write(shard, [])


# --- reading --------------------------------------------------------------------------------------------


def assert_same_rows(reader, other):
    assert len(reader) == len(other)
    for one, two in zip(reader, other, strict=True):
        for name in ("input_ids", "starts", "supervised"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        np.testing.assert_array_equal(one.targets.ids, two.targets.ids)
        np.testing.assert_array_equal(one.targets.weights, two.targets.weights)


def test_indices_behave_like_a_lists(cache):
    """Negative ones count from the end, numpy integers are welcome, outside is an IndexError."""
    with CacheReader(cache) as reader:
        assert reader[-1].index == reader[np.int64(4)].index == 4
        for index in (5, -6):
            with pytest.raises(IndexError, match=f"row {index} of a cache of 5 rows"):
                reader[index]
        assert [row.index for row in reader] == [0, 1, 2, 3, 4]


def test_shapes_and_types_are_what_a_trainer_needs(cache):
    """L input ids, L - 1 targets of one width, zero weight where a position is not supervised."""
    with CacheReader(cache) as reader:
        row = reader[0]
        flat = reader.flat(0)
    assert row.input_ids.dtype == np.uint32
    assert row.targets.ids.dtype == np.int64
    assert row.targets.weights.dtype == np.float32
    assert row.targets.ids.shape == row.targets.weights.shape == (SEQ_LEN - 1, flat.sizes.max())
    sums = row.targets.weights.sum(-1)
    np.testing.assert_allclose(sums, row.supervised[1:], atol=1e-6)
    assert len(flat.sizes) == row.supervised[1:].sum()


def test_statistics_are_sums_over_the_rows(cache):
    """The manifest's totals, counted anew from the records."""
    records = [make_record(row) for row in range(5)]
    stats = CacheReader(cache).stats
    assert stats["tokens"] == 5 * SEQ_LEN
    assert stats["positions"] == sum(record.supervised[1:].sum() for record in records)
    assert stats["pairs"] == sum(len(record.targets.ids) for record in records)
    assert stats["id_max"] == max(record.targets.ids.max() for record in records)
    assert stats["next_token_hits"] == stats["positions"]
    assert stats["next_token_weight"] >= 0.3 * stats["positions"]
    assert stats["payload_bytes"] == 3 * stats["pairs"] + 2 * stats["tokens"]


def test_a_reader_travels_to_workers(cache):
    """Pickling drops open files; the copy and the original both go on reading."""
    reader = CacheReader(cache)
    reader[0]
    copy = pickle.loads(pickle.dumps(reader))
    assert_same_rows(copy, reader)
    copy.close()
    assert_same_rows(copy, reader)


@pytest.mark.parametrize("limit", ["_OPEN_SHARDS", "_OPEN_BYTES"])
def test_many_shards_do_not_stay_open(tmp_path, monkeypatch, limit):
    """Handles beyond the limit, or its bytes, are let go, and rows of their shards read again."""
    spec = make_spec(rows=8)
    each = {"_OPEN_SHARDS": 1, "_OPEN_BYTES": spec.shard_rows * row_index_bytes(0)}
    monkeypatch.setattr(f"sparsekd.cache.{limit}", 2 * each[limit])
    with CacheReader(capture(tmp_path / "cache", spec)) as reader:
        for index in (0, 7, 3, 5, 0, 2):
            np.testing.assert_array_equal(reader[index].input_ids, make_record(index).input_ids)
        assert len(reader._shards) == 2


def test_the_shard_that_was_read_longest_ago_is_let_go(tmp_path, monkeypatch):
    """Of three shards two stay open: one that is read over and over is opened once."""
    monkeypatch.setattr("sparsekd.cache._OPEN_SHARDS", 2)
    with CacheReader(capture(tmp_path / "cache", make_spec(rows=6))) as reader:
        opened, plain = [], reader._open_shard
        monkeypatch.setattr(reader, "_open_shard", lambda shard: (opened.append(shard), plain(shard))[1])
        for index in (0, 2, 1, 4, 0, 3, 1):
            reader[index]
    assert opened == [0, 1, 2, 1]


def test_threads_share_a_reader(tmp_path, monkeypatch):
    """Eight threads in random order over two open handles: every row is the right one."""
    monkeypatch.setattr("sparsekd.cache._OPEN_SHARDS", 2)
    reader = CacheReader(capture(tmp_path / "cache", make_spec(rows=8)))
    wanted = [make_record(row).input_ids.tobytes() for row in range(8)]
    order = np.random.default_rng(0).integers(8, size=400).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: reader[index].input_ids.tobytes(), order))
    assert found == [wanted[index] for index in order]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_cache_reads_over_fsspec(cache, scheme, manifest):
    """The same rows from a URL, also where only the shards were copied."""
    url = f"file://{cache}"
    if not manifest:
        (cache / MANIFEST).unlink()
    if scheme == "memory":
        memory, url = fsspec.filesystem("memory"), f"memory://cache-{manifest}"
        for file in cache.iterdir():
            memory.pipe_file(f"/cache-{manifest}/{file.name}", file.read_bytes())
    with CacheReader(url) as reader, CacheReader(cache) as local:
        assert_same_rows(reader, local)
    assert verify(url).problems == []


def test_a_remote_cache_opens_without_listing(cache, monkeypatch):
    """With a manifest there is no `ls`: on object stores it can take longer than the epoch."""
    monkeypatch.setattr("sparsekd.cache.list_folder", lambda path: pytest.fail("listed"))
    assert len(CacheReader(f"file://{cache}")) == 5


# --- resuming -------------------------------------------------------------------------------------------


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped", "emptied", "replaced"])
def test_resuming_restores_the_same_bytes(cache, damage):
    """Whatever happened to a shard, the same capture makes it again, and only it."""
    before, victim = content(cache), cache / shard_name(1)
    raw = victim.read_bytes()
    changes = {
        "deleted": victim.unlink,
        "truncated": lambda: victim.write_bytes(raw[:-5]),
        "flipped": lambda: victim.write_bytes(raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:]),
        "emptied": lambda: victim.write_bytes(b""),
        "replaced": lambda: victim.write_bytes((cache / shard_name(0)).read_bytes()),
    }
    changes[damage]()
    assert verify(cache).problems
    assert CacheWriter(cache, make_spec()).missing() == [1]
    assert CacheWriter(cache, make_spec()).missing(range(2, 3)) == []
    capture(cache, make_spec())
    assert content(cache) == before


def test_order_and_number_of_workers_do_not_show(tmp_path, cache):
    """Three writers, shards in reverse order, finalize by all: the folder is byte for byte the same."""
    spec, other = make_spec(), tmp_path / "other"
    writers = [CacheWriter(other, spec, engine={"torch": "1"}) for _ in range(3)]
    for shard in (2, 1, 0):
        writers[shard].write(shard, [make_record(row) for row in spec.shard_range(shard)])
    for writer in writers:
        writer.finalize()
    assert content(other) == content(cache)


def test_engines_are_listed_but_are_no_identity(tmp_path):
    """Shards of two machines belong together; the manifest names both."""
    for shard, engine in enumerate(({"gpu": "a"}, {"gpu": "b"}, {"gpu": "a"})):
        writer = CacheWriter(tmp_path, make_spec(), engine)
        writer.write(shard, [make_record(row) for row in make_spec().shard_range(shard)])
    assert writer.finalize()["engines"] == [{"gpu": "a"}, {"gpu": "b"}]
    assert verify(tmp_path).problems == []


def test_unfinished_captures_say_how_much_is_missing(cache):
    """finalize, a reader and verify count the missing shards and name the first."""
    (cache / shard_name(1)).unlink()
    words = r"1 of 3 shards are missing \(first: 1\); run the same capture again"
    with pytest.raises(IncompleteError, match=words):
        CacheReader(cache)
    with pytest.raises(IncompleteError, match=words):
        CacheWriter(cache, make_spec()).finalize()
    assert re.search(words, verify(cache).problems[0])
    (cache / MANIFEST).unlink()
    with pytest.raises(IncompleteError, match=words):
        CacheReader(cache)
    remote = capture(cache.parent / "remote", make_spec())
    (remote / shard_name(2)).unlink()
    with pytest.raises(IncompleteError, match=r"is missing, manifest\.json lists it"):
        CacheReader(f"file://{remote}")[4]


def test_a_full_disk_keeps_the_shards_before(tmp_path, monkeypatch):
    """The failed shard is simply missing afterwards, and resuming completes the cache."""
    spec = make_spec()
    writer = CacheWriter(tmp_path, spec, engine={"torch": "1"})
    writer.write(0, [make_record(row) for row in spec.shard_range(0)])

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    records = [make_record(row) for row in spec.shard_range(1)]
    with monkeypatch.context() as patch:
        patch.setattr("sparsekd.files.os.write", full)
        with pytest.raises(StorageError, match=r"no space left.*kept"):
            writer.write(1, records)
    assert os.listdir(tmp_path) == [shard_name(0)]
    assert writer.missing() == [1, 2]
    capture(tmp_path, spec)
    assert verify(tmp_path).problems == []


def test_a_manifest_can_be_made_again(cache):
    """Without manifest.json the reader builds it from the headers; finalize writes the same bytes."""
    before = (cache / MANIFEST).read_bytes()
    manifest = CacheReader(cache).manifest
    (cache / MANIFEST).unlink()
    rebuilt = CacheReader(cache).manifest
    assert rebuilt["stats"] == manifest["stats"]
    assert rebuilt["spec"] == manifest["spec"]
    CacheWriter(cache, make_spec()).finalize()
    assert (cache / MANIFEST).read_bytes() == before


# --- refusing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [True, False])
def test_another_captures_folder_is_refused(cache, manifest):
    """The first setting that differs, both values, and the way out; with or without a manifest."""
    if not manifest:
        (cache / MANIFEST).unlink()
    other = make_spec(sampler={"name": "random_sampling", "rounds": 11, "temperature": 1.0, "seed": 0})
    words = r"sampler\.rounds=10, this capture has sampler\.rounds=11; use another out= folder, or sampler\."
    with pytest.raises(MismatchError, match=words):
        CacheWriter(cache, other)
    with pytest.raises(MismatchError, match=r"teacher\.revision=\(absent\), this capture has .*'x'"):
        CacheWriter(cache, make_spec(teacher={"id": "tiny", "revision": "x"}))


def test_a_shard_of_another_capture_is_not_read(tmp_path, cache):
    """A folder that mixes two captures is refused at the row, and by verify."""
    other = capture(tmp_path / "other", make_spec(teacher={"id": "large"}))
    shutil.copy(other / shard_name(1), cache / shard_name(1))
    with pytest.raises(MismatchError, match=r"teacher\.id='large', this cache has teacher\.id='tiny'"):
        CacheReader(cache)[2]
    assert verify(cache).problems


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([make_record(0)], r"shard 0 holds the 2 rows 0\.\.1, got 1 records"),
        ([make_record(0)] * 3, "got 3 records"),
        ([make_record(0), make_record(1, rounds=7)], "row 1: targets have rounds=7"),
    ],
)
def test_records_that_do_not_fit_are_not_written(tmp_path, records, words):
    """Too few, too many, other rounds: refused before a byte is written."""
    with pytest.raises(MismatchError, match=words):
        CacheWriter(tmp_path, make_spec()).write(0, records)
    assert os.listdir(tmp_path) == []


def test_another_packing_is_refused(tmp_path):
    """The message of the design, with both lengths and the way out."""
    writer = CacheWriter(tmp_path, make_spec(seq_len=32))
    with pytest.raises(MismatchError, match=r"packing differs.*seq_len=32.*\(16,\); re-pack with seq_len=32"):
        writer.write(0, [make_record(0), make_record(1)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "rows=0, expected a whole number of at least 1"),
        ({"seq_len": 1}, "seq_len=1, expected a whole number of at least 2"),
        ({"logit_width": 98}, r"codec\.logit_width=97, but logit_width=98"),
        ({"teacher": {"x": float("nan")}}, "teacher cannot be written as JSON"),
        ({"data": {"x": object()}}, "data cannot be written as JSON"),
        ({"data": [1]}, "data is a list, expected a dict"),
        ({"codec": {"name": "raw24", "logit_width": 97, "rounds": 65}}, "but rounds=65; raw24"),
    ],
)
def test_impossible_specs_are_refused(changes, words):
    """Before a teacher has run, not when a shard is written hours later."""
    with pytest.raises(RecipeError, match=words):
        make_spec(**changes)


def test_a_spec_survives_its_dict():
    """from_dict(as_dict) is the identity, tuples included, which JSON turns into lists."""
    spec = make_spec(capture={"shape": (1, 2)})
    assert CacheSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
    assert [len(spec.shard_range(shard)) for shard in range(spec.shards)] == [2, 2, 1]
    with pytest.raises(FormatError, match="expected"):
        CacheSpec.from_dict({**spec.as_dict(), "more": 1})


def test_a_cache_is_not_written_to_a_url():
    """The writer needs rename; a URL is told so."""
    with pytest.raises(RecipeError, match="local folder, not to memory://x"):
        CacheWriter("memory://x", make_spec())


# --- verifying ------------------------------------------------------------------------------------------


def test_verify_reports_progress_and_counts(cache):
    """One call per shard, and the rows it read."""
    seen = []
    report = verify(cache, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (report.rows, report.shards, report.problems) == (5, 3, [])


def test_verify_counts_the_statistics_again(tmp_path, monkeypatch):
    """A writer with a bug in its statistics is found out, though every checksum is right."""
    plain = folder.row_stats
    with monkeypatch.context() as patch:
        patch.setattr(folder, "row_stats", lambda *args: plain(*args) | {"next_token_hits": 1})
        capture(tmp_path, make_spec())
    assert "do not have the statistics in its header" in verify(tmp_path).problems[0]


def test_verify_compares_ids_with_their_hash(tmp_path, monkeypatch):
    """input_hash is what others align by, so a wrong one is a problem though nothing is damaged."""
    with monkeypatch.context() as patch:
        patch.setattr(folder, "hash_ids", lambda ids: 7)
        capture(tmp_path, make_spec())
    problems = verify(tmp_path).problems
    assert len(problems) == 5
    assert all("input ids do not have the recorded hash" in problem for problem in problems)


def test_several_processes_may_finish_at_once(cache):
    """Ten threads write the manifest while others read it: whole and the same, every time."""
    before = content(cache)
    writers = [CacheWriter(cache, make_spec(), engine={"torch": "1"}) for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        finished = [pool.submit(writer.finalize) for writer in writers]
        opened = [pool.submit(lambda: len(CacheReader(cache))) for _ in range(30)]
    assert [each.result()["stats"]["tokens"] for each in finished] == [5 * SEQ_LEN] * 10
    assert {each.result() for each in opened} == {5}
    assert content(cache) == before


@pytest.mark.parametrize("codec", ["prob24", "prob40"])
def test_weights_can_be_cached_too(tmp_path, codec):
    """Top-k probabilities through a lossy codec: statistics are those of what is read back."""
    spec = make_spec(codec={"name": codec, "logit_width": VOCAB})
    writer = CacheWriter(tmp_path, spec)
    for shard in range(spec.shards):
        records = [make_record(row) for row in spec.shard_range(shard)]
        flats = [replace(each.targets, values=each.targets.weights, rounds=None) for each in records]
        writer.write(shard, [replace(one, targets=flat) for one, flat in zip(records, flats, strict=True)])
    writer.finalize()
    assert verify(tmp_path).problems == []
    with CacheReader(tmp_path) as reader:
        np.testing.assert_allclose(reader[3].targets.weights.sum(-1), reader[3].supervised[1:], rtol=0.05)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"pairs": 21}, False),
        ({"next_token_weight": 5 * (1 + 5e-6)}, True),
        ({"next_token_weight": 5 + 1e-3}, False),
    ],
)
def test_statistics_agree_to_float32(change, same):
    """Counts exactly; weights as far as another machine's float32 can tell."""
    recorded = dict.fromkeys(("tokens", "positions", "pairs", "payload_bytes", "id_max", "next_token_hits"), 20)
    recorded |= {"next_token_weight": 5.0}
    assert same_stats(recorded, recorded | change) == same


# --- the alignment canary -------------------------------------------------------------------------------


def test_an_aligned_cache_passes_and_says_so(tmp_path):
    """The next token is in every set here, its neighbours only by chance."""
    with CacheReader(capture(tmp_path, make_spec(rows=40))) as reader:
        shares = check_alignment(reader)
        assert shares == alignment(reader, range(40))
    assert shares["positions"] == reader.stats["positions"]
    assert shares["aligned"] == 1
    assert shares["shift_plus_1"] < 0.2
    assert shares["shift_minus_1"] < 0.2


def test_alignment_by_hand():
    """Row 5 6 7 8 whose token 7 is not learnt: {6: 1/2, 7: 1/4, 5: 1/4} before 6 and {7: 1} before 8, whose successor
    is beyond the row. 6 is found (1/2 of two positions); 7 where there is one; 5 and 7 before them."""
    flat = FlatTargets(
        ids=np.uint32([6, 7, 5, 7]), values=np.float32([0.5, 0.25, 0.25, 1]), sizes=np.array([3, 1], np.int64)
    )
    supervised = np.array([True, True, False, True])
    row = RowRecord(input_ids=np.uint32([5, 6, 7, 8]), targets=flat, starts=supervised, supervised=supervised)

    class One:
        def record(self, index):
            return row

    assert alignment(One(), [0]) == {
        "positions": 2,
        "aligned": 1 / 2,
        "shift_plus_1": 1,
        "shift_minus_1": 1,
        "aligned_weight": 1 / 4,
        "shift_plus_1_weight": 1 / 4,
        "shift_minus_1_weight": 5 / 8,
    }
    assert alignment(One(), [0, 0]) == alignment(One(), [0]) | {"positions": 4}


@pytest.mark.parametrize(("shift", "where"), [(1, "after"), (-1, "before")])
def test_targets_shifted_by_one_are_refused(tmp_path, shift, where):
    """An off-by-one at capture, faithfully recorded in the manifest, still shows."""
    reader = CacheReader(capture(tmp_path, make_spec(rows=40), shift=shift))
    with pytest.raises(MismatchError, match=f"look shifted by one: the token {where} the next one is in"):
        check_alignment(reader)


@pytest.mark.parametrize(
    ("aligned", "before", "weight", "shifted"),
    [
        (4, 20, 0.5, True),
        (4, 13, 0.5, False),  # not 0.1 more
        (30, 65, 0.5, True),
        (30, 55, 0.5, False),  # not twice as many
        (4, 20, 0.1, False),  # a mean weight of 0.016 more
    ],
)
def test_shifted_is_what_fits_a_neighbour_clearly_better(aligned, before, weight, shifted):
    """Of 100 positions some have the next token in their set, some the token read, each with a weight: twice as many,
    0.1 more of them, and 0.02 more in weight are an alarm; less is what honest caches show."""
    sets = [({p + 1: weight} if p < aligned else {}) | ({p: weight} if p >= 100 - before else {}) for p in range(100)]
    sets = [each | {500: 1 - sum(each.values())} for each in sets]
    flat = FlatTargets(
        ids=np.uint32([i for each in sets for i in each]),
        values=np.float32([w for each in sets for w in each.values()]),
        sizes=np.array([len(each) for each in sets], np.int64),
    )
    ids = np.arange(101)

    class Stub:
        stats: ClassVar = {"next_token_hits": aligned, "positions": 100}

        def __len__(self):
            return 64

        def record(self, index):
            return RowRecord(input_ids=ids, targets=flat, starts=ids < 1, supervised=ids >= 0)

    if not shifted:
        assert check_alignment(Stub())["shift_minus_1"] == before / 100
        return
    with pytest.raises(
        MismatchError, match=rf"token before the next one is in 0\.{before}0 of the sets, .* 0\.{aligned:02}0"
    ):
        check_alignment(Stub())


def test_an_untrained_teacher_is_no_alarm(tmp_path):
    """Tied embeddings favour the token just read: in 4 of 10 sets here, but with one draw of fifty."""
    spec = make_spec(rows=40, codec=codec_spec("raw24", rounds=50, logit_width=VOCAB))

    def record(row):
        plain = make_record(row)
        rng = np.random.default_rng(row)
        read = plain.input_ids[:-1][plain.supervised[1:]].astype(int)
        sets = [{(t + 7) % VOCAB: 49, (t if rng.random() < 0.4 else (t + 9) % VOCAB): 1} for t in read]
        dense = np.array([[each.get(i, 0) for i in range(VOCAB)] for each in sets])
        ids = np.broadcast_to(np.arange(VOCAB), dense.shape)
        return replace(plain, targets=FlatTargets.from_padded(ids, dense, 50))

    writer = CacheWriter(tmp_path, spec)
    for shard in range(spec.shards):
        writer.write(shard, [record(row) for row in spec.shard_range(shard)])
    writer.finalize()
    shares = check_alignment(CacheReader(tmp_path))
    assert shares["shift_minus_1"] > shares["aligned"] + 0.3
    assert shares["shift_minus_1_weight"] < 0.02


def test_targets_of_other_rows_are_refused(tmp_path):
    """Rows that a reader mixes up do not reach the share that was recorded."""
    reader = CacheReader(capture(tmp_path, make_spec(rows=40, seq_len=SEQ_LEN)))
    plain = reader.record

    def mixed(index):
        return replace(plain(index), targets=plain((index + 2) % 40).targets)

    reader.record = mixed
    with pytest.raises(MismatchError, match=r"do not fit their rows.*1\.000 when captured"):
        check_alignment(reader)


def mixed_rows(shares, recorded):
    """Of 1,000 rows every second has the next token in the first of these shares of its 100 sets, the others in the
    second; recorded was another share."""

    class Mixed:
        stats: ClassVar = {"next_token_hits": recorded * 1000 * 100, "positions": 1000 * 100}

        def __len__(self):
            return 1000

        def record(self, index):
            found = (np.arange(100) < shares[index % 2] * 100).astype(np.uint32)
            flat = FlatTargets(ids=found, values=np.ones(100, np.float32), sizes=np.ones(100, np.int64))
            ids = np.ones(101)
            return RowRecord(input_ids=ids, targets=flat, starts=ids > 9, supervised=ids > 0)

    return Mixed()


def test_rows_that_differ_among_themselves_are_no_alarm():
    """Half the rows hit always, half never: a sample of 20 may be off by far more than binomial errors."""
    shares = check_alignment(mixed_rows((1, 0), recorded=0.5), sample=21)
    assert abs(shares["aligned"] - 0.5) > 0.02


@pytest.mark.parametrize("recorded", [0.2, 0.8])
def test_rows_that_differ_hide_no_share_that_is_another(recorded):
    """Rows of 0.4 and 0.6 about a share of 0.2 or 0.8: 64 rows may be off by 6 standard errors of 0.04, not by 0.3."""
    with pytest.raises(MismatchError, match=rf"{recorded}00 when captured \(allowed difference 0.2[45]"):
        check_alignment(mixed_rows((0.4, 0.6), recorded))


def test_nothing_supervised_is_nothing_to_check(tmp_path):
    """Shares of zero, no division by it."""
    nothing = FlatTargets(
        ids=np.zeros(0, np.uint32), values=np.zeros(0, np.uint32), sizes=np.zeros(0, np.int64), rounds=ROUNDS
    )
    writer = CacheWriter(tmp_path, make_spec(rows=1))
    writer.write(0, [replace(make_record(0), targets=nothing, supervised=np.zeros(SEQ_LEN, bool))])
    writer.finalize()
    with CacheReader(tmp_path) as reader:
        assert check_alignment(reader)["positions"] == 0
        assert reader[0].targets.weights.sum() == 0


# --- imports --------------------------------------------------------------------------------------------


def test_storage_knows_no_torch():
    """A cache can be read and verified where torch and transformers are not even imported."""
    code = "import sys, sparsekd.cache; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- over a network -------------------------------------------------------------------------------------


@pytest.fixture
def far(monkeypatch):
    """A file system whose requests take 20 ms each, however many are under way."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from far import Far

    monkeypatch.setattr(Far, "wait", 0.02)
    monkeypatch.setattr(Far, "most", 0)
    return Far


def test_a_batch_over_a_network_is_one_wait(cache, far):
    """All of its rows are asked for at once, and come as from a local folder."""
    with CacheReader(f"far://{cache}") as reader, CacheReader(cache) as local:
        reader.fetch(range(5))
        far.most = 0
        reader.fetch(range(5))
        assert far.most == 5
        far.most = 0
        assert_same_rows(reader, local)
        assert far.most == 0
        local.fetch(range(5))


def test_a_request_that_fails_is_made_again(cache, far, monkeypatch):
    """What `fetch` could not get is read when it is wanted; a failure is told there."""
    with CacheReader(f"far://{cache}") as reader, CacheReader(cache) as local:
        reader.fetch(range(5))
        with monkeypatch.context() as patched:
            patched.setattr(far, "_after", lambda *_: (_ for _ in ()).throw(OSError("no network")))
            reader.fetch(range(5))
        assert_same_rows(reader, local)
