"""The shuffled order: a bijection, a different one for each seed and epoch, computed in place."""

from __future__ import annotations

import numpy as np
import pytest

from sparsekd.errors import RecipeError
from sparsekd.order import MAX_SIZE, permute


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1023, 4097, 65537])
def test_every_row_comes_up_exactly_once(size):
    """permute is a bijection of range(size), powers of two and their neighbours included."""
    order = permute(np.arange(size), size, seed=size * 31, epoch=2)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_one_index_and_many_agree():
    """A scalar gives the int that the array form has at that place, in any shape."""
    order = permute(np.arange(12).reshape(3, 4), 12, seed=5)
    assert order.shape == (3, 4)
    singles = [permute(index, 12, seed=5) for index in range(12)]
    assert all(type(single) is int for single in singles)
    assert order.ravel().tolist() == singles


def test_the_order_is_fixed_for_good():
    """The first places of one order, written down: a change here breaks every resumed training run."""
    assert permute(np.arange(10), 10, seed=0).tolist() == [0, 4, 5, 8, 6, 7, 3, 2, 9, 1]
    assert permute(np.arange(10), 10, seed=0, epoch=1).tolist() == [1, 2, 6, 3, 5, 7, 9, 4, 0, 8]


def test_seeds_and_epochs_give_unlike_orders():
    """Two orders of 1000 rows agree in about one place, as random ones do; the identity is no exception."""
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1, 0), (0, 2**64 - 1)]
    orders = [np.arange(1000)] + [permute(np.arange(1000), 1000, seed, epoch) for seed, epoch in pairs]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.count_nonzero(one == other) < 12


def test_neighbours_are_torn_apart():
    """Consecutive places hold rows a third of the range apart on average, as in a uniform shuffle."""
    order = permute(np.arange(20_000), 20_000, seed=3)
    assert np.abs(np.diff(order)).mean() == pytest.approx(20_000 / 3, rel=0.03)


def test_small_orders_are_all_reached():
    """All 24 orders of 4 rows appear among 600 epochs, none far more often than the rest."""
    orders = [tuple(permute(np.arange(4), 4, seed=9, epoch=epoch).tolist()) for epoch in range(600)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.max() < 60


def test_the_largest_cache_is_shuffled_in_constant_memory():
    """Places of 2^48 - 1 rows are in range and distinct, though no such array could exist."""
    order = permute(np.arange(1000), MAX_SIZE - 1, seed=1)
    assert len(np.unique(order)) == 1000
    assert 0 <= order.min() < order.max() < MAX_SIZE - 1
    assert order.max() > MAX_SIZE // 2


@pytest.mark.parametrize(("index", "size"), [(5, 5), (-1, 5), (1, 1)])
def test_indices_outside_are_refused(index, size):
    """An index outside [0, size) is an IndexError that says both numbers."""
    with pytest.raises(IndexError, match=rf"{index}.*{size}"):
        permute(index, size, seed=0)


@pytest.mark.parametrize("bad", [{"size": 0}, {"size": 2**48 + 1}, {"seed": -1}, {"seed": 2**64}, {"epoch": -1}])
def test_settings_outside_are_refused(bad):
    """A size, seed or epoch outside its range is named, with its value."""
    ((name, value),) = bad.items()
    with pytest.raises(RecipeError, match=f"{name}={value} is outside"):
        permute(0, **({"size": 5, "seed": 0} | bad))
