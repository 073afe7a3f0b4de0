"""A folder of shards: round trips, resuming, refusing, verifying, the alignment canary."""

from __future__ import annotations

import numpy as np
import pytest

from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord, verify
from sparsekd.codec import FlatTargets, default_codec

VOCAB, SEQ_LEN, ROUNDS = 97, 16, 10


def make_spec(**changes):
    values = {
        "rows": 5,
        "seq_len": SEQ_LEN,
        "shard_rows": 2,
        "logit_width": VOCAB,
        "codec": default_codec(ROUNDS, VOCAB),
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
