"""Reading a cache in training: padding a batch, reading ahead, and what it costs to find a row."""

from __future__ import annotations

import pickle
import threading
import weakref

import numpy as np
import pytest
import torch

import sparsekd as skd
from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord
from sparsekd.codec import codec_spec
from sparsekd.errors import FormatError
from sparsekd.flat import FlatTargets
from sparsekd.order import permute, permute_near
from sparsekd.padded import pad_rows
from sparsekd.read_ahead import ReadAhead

L, V, ROUNDS = 20, 90, 6


def record(row: int) -> RowRecord:
    rng = np.random.default_rng(row)
    supervised = rng.random(L) < 0.8
    counts = rng.multinomial(ROUNDS, rng.dirichlet(np.full(V, 0.05), size=int(supervised[1:].sum())))
    ids = np.broadcast_to(np.arange(V), counts.shape)
    flat = FlatTargets.from_padded(ids, counts, ROUNDS)
    return RowRecord(input_ids=rng.integers(V, size=L), targets=flat, starts=np.arange(L) == 0, supervised=supervised)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    spec = CacheSpec(
        rows=23,
        seq_len=L,
        shard_rows=4,
        logit_width=V,
        codec=codec_spec("raw24", logit_width=V, rounds=ROUNDS),
        sampler={},
        teacher={},
        tokenizer={},
        data={},
    )
    writer = CacheWriter(path, spec)
    for shard in range(spec.shards):
        writer.write(shard, [record(row) for row in spec.shard_range(shard)])
    writer.finalize()
    return CacheReader(path)


def test_padding_is_each_rows_own_laid_at_its_positions():
    """pad_rows equals FlatTargets.padded, row by row, at the supervised positions and nowhere else."""
    records = [record(row) for row in range(5)]
    supervised = np.stack([each.supervised[1:] for each in records])
    ids, weights = pad_rows([each.targets for each in records], supervised)
    assert (ids.dtype, weights.dtype) == (np.int64, np.float32)
    assert ids.shape == weights.shape == (5, L - 1, max(each.targets.sizes.max() for each in records))
    for b, each in enumerate(records):
        own_ids, own_weights = each.targets.padded()
        kept = slice(0, own_ids.shape[1])
        np.testing.assert_array_equal(ids[b, supervised[b], kept], own_ids)
        np.testing.assert_array_equal(weights[b, supervised[b], kept], own_weights)
        assert not weights[b, ~supervised[b]].any()
        assert not weights[b, :, own_ids.shape[1] :].any()


def test_rows_without_a_supervised_position_have_width_one():
    """Nothing to pad is [B, P, 1] of zeros."""
    nothing = FlatTargets(ids=np.zeros(0, np.uint32), values=np.zeros(0, np.float32), sizes=np.zeros(0, np.int64))
    ids, weights = pad_rows([nothing, nothing], np.zeros((2, 7), bool))
    assert ids.shape == weights.shape == (2, 7, 1)
    assert not weights.any()


def test_one_hostile_position_does_not_blow_up_a_batch():
    """A position of 2^21 entries among 999 of one: refused before 25 GB are asked for."""
    sizes = np.ones(1000, np.int64)
    sizes[3] = 2**21
    flat = FlatTargets(ids=np.zeros(sizes.sum(), np.uint32), values=np.ones(sizes.sum(), np.float32), sizes=sizes)
    with pytest.raises(FormatError, match="use the flat arrays"):
        pad_rows([flat], np.ones((1, 1000), bool))


def loaded(dataset, batches) -> list[dict[str, torch.Tensor]]:
    collate = skd.SparseKDCollator()
    return [collate(dataset.__getitems__(list(batch))) for batch in batches]


def test_a_collated_batch_is_the_rows_targets(cache):
    """kd_ids and kd_weights densify to each row's own targets; labels are its supervised ids after the first."""
    dataset = skd.CacheDataset(cache, seed=3)
    (batch,) = loaded(dataset, [range(2, 7)])
    for b, index in enumerate(range(2, 7)):
        row = dataset[index]
        ours = skd.SparseTargets(ids=batch["kd_ids"][b], weights=batch["kd_weights"][b]).densify(V)
        assert torch.equal(ours, skd.SparseTargets.of(row.targets).densify(V))
        labels = np.where(row.supervised & (np.arange(L) > 0), row.input_ids.astype(np.int64), -100)
        assert batch["labels"][b].tolist() == labels.tolist()


def of_rows_alone(dataset, batch):
    """The batch of a list of rows, each read by itself."""
    return skd.SparseKDCollator()([dataset[index] for index in batch])


WORKERS = pytest.mark.filterwarnings("ignore:a cache on a local disk is read by worker processes")


def test_worker_processes_are_warned_of_on_a_local_disk_only(cache):
    """Once, with what to do instead; rows that are no cache may take longer than a batch to cross."""
    dataset = skd.CacheDataset(cache)
    with pytest.raises(UserWarning, match=r"several times as much .* with num_workers=0 \(Trainer: dataloader_num"):
        list(torch.utils.data.DataLoader(dataset, batch_size=6, collate_fn=list, num_workers=1))
    dataset.rows = [cache[index] for index in range(len(cache))]
    assert len(list(torch.utils.data.DataLoader(dataset, batch_size=6, collate_fn=list, num_workers=1))) > 1


@WORKERS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_made_ahead_is_the_batch(cache, workers):
    """From the second batch on, tensors come made: those of the rows one by one, over two epochs, in workers too."""
    collate, dataset = skd.SparseKDCollator(), skd.CacheDataset(cache, seed=4)
    loader = torch.utils.data.DataLoader(dataset, batch_size=6, collate_fn=collate, num_workers=workers)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        for at, batch in enumerate(loader):
            expected = of_rows_alone(dataset, range(6 * at, min(6 * at + 6, len(dataset))))
            assert list(batch) == list(expected)
            assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_a_batch_is_made_for_the_collator_that_asked_last(cache):
    """One collator finds its tensors made; any other gets a batch of its own, and whoever looks at rows finds them."""
    dataset, collate, plain = (
        skd.CacheDataset(cache, seed=4),
        skd.SparseKDCollator(),
        skd.SparseKDCollator(with_targets=False),
    )
    expected = of_rows_alone(dataset, range(3))
    for _ in range(2):
        batch = dataset._items(0, range(3))
        assert list(plain(batch)) == ["input_ids", "labels"]
        assert all(torch.equal(collate(batch)[key], expected[key]) for key in expected)
    made = dataset._items(0, range(3))
    assert collate(made) is collate(made) is skd.SparseKDCollator()(made)
    other = type("Other", (skd.SparseKDCollator,), {"of_rows": lambda self, rows: {"rows": len(rows)}})
    assert (other()(made), other()(made)) == ({"rows": 3}, {"rows": 3})
    assert list(collate(dataset._items(0, range(3)))) == list(expected)
    assert collate(made) is not collate(dataset._items(0, range(3)))
    numbers = [dataset.row_number(index) for index in range(3)]
    assert [row.index for row in made] == [row.index for row in pickle.loads(pickle.dumps(made))] == numbers
    assert [row.index for row in made[1:]] == numbers[1:]


@pytest.mark.parametrize(
    "batches",
    [
        [range(0, 4), range(4, 8), range(8, 12), range(12, 15)],  # one process, the last batch shorter
        [range(0, 4), range(8, 12), range(16, 20)],  # the first of two
        [range(6, 9), range(9, 12)],  # resumed
        [range(8, 12), range(0, 4), [5, 1, 22], [5, 1, 22], [20], [22]],  # no order at all
    ],
)
def test_reading_ahead_changes_no_row(cache, batches):
    """Whatever the batches are, they hold the rows that were asked for, over two epochs."""
    ahead, plain = skd.CacheDataset(cache, seed=1), skd.CacheDataset(cache, seed=1)
    for epoch in (0, 1):
        ahead.set_epoch(epoch)
        plain.set_epoch(epoch)
        for batch in batches:
            numbers = [row.index for row in ahead.__getitems__(list(batch))]
            assert numbers == [plain[index].index for index in batch]


def test_the_next_batch_is_read_while_the_step_runs():
    """Only the first batch is read in the foreground, and the second where batches are dealt to three processes."""
    for stride, foreground in ((4, 1), (12, 2)):
        read_by, ahead = [], ReadAhead()

        def read(indices, read_by=read_by):
            read_by.append((threading.current_thread().name.split("_")[0], indices))
            return list(indices)

        batches = [list(range(start, start + 4)) for start in range(0, 48, stride)]
        for batch in batches:
            assert ahead(read, batch, size=48, epoch=0) == batch
        found = [batch for name, batch in read_by if name != "sparsekd-read-ahead"]
        assert found == batches[:foreground]


def test_nothing_beyond_the_last_row_is_read():
    """The last batch is shorter, behind it there is none; an empty one is empty."""
    asked, ahead = [], ReadAhead()

    def read(indices):
        asked.append(list(indices))
        return list(indices)

    for batch in ([], [0, 1, 2], [3, 4, 5], [6, 7], [0, 1, 2], []):
        assert ahead(read, batch, size=8, epoch=0) == batch
    del ahead  # its thread ends, with what it was asked for
    assert max(max(each, default=0) for each in asked) == 7
    assert [6, 7] in asked


def test_the_thread_ends_with_what_it_read_for():
    """A dataset that is let go lets its thread go; the thread holds nothing while it waits."""
    before = set(threading.enumerate())
    ahead, rows = ReadAhead(), type("Rows", (), {"read": lambda self, indices: list(indices)})()
    assert ahead(rows.read, [0, 1], size=4, epoch=0) == [0, 1]
    assert ahead(rows.read, [2, 3], size=4, epoch=0) == [2, 3]
    (thread,) = set(threading.enumerate()) - before
    held = weakref.ref(rows)
    del rows, ahead
    thread.join(timeout=10)
    assert held() is None
    assert not thread.is_alive()


def test_an_error_ahead_comes_with_its_own_batch():
    """A damaged row stops the step that needs it, not the one before."""
    ahead = ReadAhead()

    def read(indices):
        if 5 in indices:
            raise FormatError("row 5 is damaged")
        return list(indices)

    assert ahead(read, [0, 1], size=10, epoch=0) == [0, 1]
    assert ahead(read, [2, 3], size=10, epoch=0) == [2, 3]
    with pytest.raises(FormatError, match="row 5"):
        ahead(read, [4, 5], size=10, epoch=0)
    assert ahead(read, [6, 7], size=10, epoch=0) == [6, 7]


@WORKERS
def test_a_dataset_goes_to_worker_processes(cache):
    """Pickled after reading ahead, and read by two workers: the same rows."""
    dataset = skd.CacheDataset(cache, seed=2)
    first = [row.index for row in dataset.__getitems__([0, 1, 2])]
    again = pickle.loads(pickle.dumps(dataset))
    assert [row.index for row in again.__getitems__([0, 1, 2])] == first
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=5, num_workers=2, collate_fn=lambda rows: [row.index for row in rows]
    )
    assert [number for batch in loader for number in batch] == [
        dataset.row_number(index) for index in range(len(dataset))
    ]


@WORKERS
def test_workers_that_stay_hear_of_the_next_epoch(cache):
    """With persistent workers, each epoch comes in its own order, also from an unpickled copy."""
    dataset = pickle.loads(pickle.dumps(skd.CacheDataset(cache, seed=2)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=1, persistent_workers=True, collate_fn=list)
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        wanted = [dataset.row_number(index) for index in range(len(dataset))]
        assert [row.index for batch in loader for row in batch] == wanted


@pytest.mark.parametrize("size", [1, 700, 1024, 2500])
def test_neighbours_stand_where_they_stand_alone(size):
    """permute_near is permute: inside a block, across two, out of order, far apart, and outside."""
    for first in range(0, size, 97):
        for indices in (range(first, min(first + 60, size)), [first, first, size - 1, 0], [], [first]):
            expected = [int(permute(index, size, 3, 2)) for index in indices]
            assert permute_near(list(indices), size, 3, 2) == expected
    for outside in ([-1, 0], [size]):
        with pytest.raises(IndexError, match="the order has"):
            permute_near(outside, size, 3)


def test_the_order_costs_the_same_at_any_size():
    """Rows of a batch anywhere in 10^9 rows: the same number of passes as among 1,000, so resuming costs nothing."""
    calls = []

    def passes(size, at):
        from sparsekd import order

        real = order._feistel
        order._feistel = lambda *args: (calls.append(len(args[0])), real(*args))[1]
        calls.clear()
        try:
            permute(np.arange(at, at + 64), size, seed=0)
        finally:
            order._feistel = real
        return sum(calls)

    assert passes(10**9, 987_654_321) <= 4 * 64 + 64  # cycle walking: at most four times as many words as rows
    assert passes(1000, 0) <= 4 * 64 + 64
