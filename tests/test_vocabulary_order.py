"""The order of a vocabulary by its head: a permutation, exact on every machine, likes together, less noise."""

from __future__ import annotations

import oracles
import pytest
import torch

import sparsekd as skd
from sparsekd import vocabulary_order as module
from sparsekd.errors import ModelError
from sparsekd.vocabulary_order import order_hash, vocabulary_order


def head(vocab_size: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab_size, width, generator=torch.Generator().manual_seed(seed))


def clustered(clusters: int, each: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A head of shuffled rows that lie near a few centres, and the [V] cluster of each id."""
    shuffled = torch.randperm(clusters * each, generator=torch.Generator().manual_seed(1))
    cluster_V = (torch.arange(clusters * each) // each)[shuffled]
    return head(clusters, width, 2)[cluster_V] + 0.02 * head(clusters * each, width, 3), cluster_V


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 7, 256, 1000, 2500])
@pytest.mark.parametrize("width", [1, 24, 700])
def test_every_id_stands_once(vocab_size, width):
    """Any vocabulary, whole runs or not; any width, with columns in groups or not."""
    order = vocabulary_order(head(vocab_size, width))
    assert torch.equal(order.sort().values, torch.arange(vocab_size))


@pytest.mark.parametrize(("vocab_size", "width"), [(37, 5), (64, 16), (300, 24), (1100, 600)])
def test_the_twin_in_whole_numbers_gives_the_same_order(vocab_size, width):
    """Every product and sum is exact: int64 in numpy, added in an order of its own, ends in the same ids."""
    rows = head(vocab_size, width).bfloat16()
    plain = oracles.vocabulary_order_plain(rows, module.COLUMNS, module.ROWS, module.STEPS)
    assert vocabulary_order(rows).tolist() == plain


def test_the_largest_numbers_stay_exact():
    """Rows of plus and minus the largest entry, the widest groups: still the order of int64, whose sums do not wrap."""
    rows = head(512, 256 * 64, 4).sign()
    rows[100:] = rows[0] * head(412, 1, 5).sign()  # all but 100 rows along one line: sums do not cancel
    plain = oracles.vocabulary_order_plain(rows, module.COLUMNS, module.ROWS, module.STEPS)
    assert vocabulary_order(rows).tolist() == plain


def test_threads_dtypes_and_layouts_change_nothing():
    """Two threads, a float32 copy of bf16 rows, a transposed one: the same hash."""
    rows = head(3000, 96).bfloat16()
    want = order_hash(vocabulary_order(rows))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert order_hash(vocabulary_order(rows)) == want
    finally:
        torch.set_num_threads(before)
    assert order_hash(vocabulary_order(rows.float())) == want
    assert order_hash(vocabulary_order(rows.T.contiguous().T)) == want


def test_a_known_order():
    """The order of a head by formula: whatever machine runs this, caches made elsewhere go on here."""
    i, j = torch.arange(600)[:, None], torch.arange(300)
    rows = ((i * 7919 + j * 104729 + i * j * 31) % 997 - 498).float() / 64
    assert order_hash(vocabulary_order(rows)) == "be4f08eddb99039692394f3756929048759a02353a4e21ea431b383b29492f6e"


def test_rows_that_are_alike_stand_together():
    """32 clusters of 16 ids: every cluster is a run. Shuffled ids have 500 changes of cluster, runs have 31."""
    rows, cluster_V = clustered(32, 16, 64)
    changes = (cluster_V[vocabulary_order(rows)].diff() != 0).sum()
    assert (cluster_V.diff() != 0).sum() > 450
    assert changes <= 36


def test_equal_rows_keep_the_order_of_ids():
    """Rows of a padded vocabulary are all the same: nothing to tell them apart, so ids ascend."""
    assert vocabulary_order(torch.zeros(100, 8)).tolist() == list(range(100))


def test_less_noise_behind_the_head_and_the_same_before_it():
    """E‖W^T (t̂ - p)‖² falls below 0.6 of that in the order of ids, at the same E‖t̂ - p‖²; shuffled it does not fall."""
    rows, _ = clustered(32, 16, 64)
    logits = head(1, 32, 7)[:, torch.randint(32, (512,), generator=torch.Generator().manual_seed(8))] + head(
        400, 512, 9
    )
    p = logits.double().softmax(-1)

    def noise(order: torch.Tensor | None) -> tuple[float, float]:
        gap = skd.sample(logits, "systematic", rounds=20, order=order).densify(512).double() - p
        return float((gap @ rows.double()).square().sum()), float(gap.square().sum())

    hidden, logit = noise(None)
    ordered = noise(vocabulary_order(rows))
    shuffled = noise(torch.randperm(512, generator=torch.Generator().manual_seed(10)))
    assert ordered[0] < 0.6 * hidden
    assert shuffled[0] > 0.9 * hidden
    assert ordered[1] == pytest.approx(logit, rel=0.05)


def test_a_head_that_is_broken_is_refused():
    """NaN or inf anywhere: no order, said so."""
    rows = head(40, 8)
    rows[3, 2] = torch.nan
    with pytest.raises(ModelError, match=r"head holds NaN or inf.* sampler\.order=ids"):
        vocabulary_order(rows)
