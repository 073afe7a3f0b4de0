"""`split_prob`: precision, unbiasedness and reproducibility of its rounding; rows, sizes, hostile streams."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import splitmix_plain

from sparsekd.codec import FlatTargets, codec_spec, decode, decode_row, encode, encode_row
from sparsekd.codec_ints import encode_ints
from sparsekd.codec_split_weights import _uniform
from sparsekd.errors import FormatError, MismatchError

V = 3000


def top_k(rng, positions, k=12, width=V):
    """The k largest probabilities of softmax rows, peaked and flat ones."""
    logits = rng.normal(size=(positions, width)) * rng.uniform(0.5, 4, size=(positions, 1))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ids = np.argsort(-p, axis=-1)[:, :k]
    return FlatTargets.from_padded(ids, np.take_along_axis(p, ids, -1).astype(np.float32))


def spec_of(name, width=V):
    return codec_spec(name, logit_width=width, rounds=None)


def weight_of(flat):
    return dict(zip(zip(flat.positions.tolist(), flat.ids.tolist(), strict=True), flat.weights.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "most"), [("split_prob", 1 / 64), ("split_prob_unbiased", 1 / 32), ("split_weight_unbiased", 1 / 32)]
)
def test_weights_err_by_no_more_than_they_state(name, most):
    """Half a step of the grid to the nearest, a whole one without bias; ids and sizes exactly, weights descending."""
    flat = top_k(np.random.default_rng(0), 200)
    found = decode(encode(flat, spec_of(name)), 200, spec_of(name))
    np.testing.assert_array_equal(found.sizes, flat.sizes)
    one, other = weight_of(found), weight_of(flat)
    assert one.keys() == other.keys()
    errors = np.log2([one[key] / other[key] for key in other])
    assert np.abs(errors).max() <= most + 1e-6
    assert np.abs(errors).max() > most / 2, "a finer grid than stated would be a waste"
    assert (np.diff(found.values)[np.diff(found.positions) == 0] <= 0).all()


@pytest.mark.parametrize("name", ["split_prob_unbiased", "split_weight_unbiased"])
def test_unbiased_rounding_is_unbiased_for_every_weight(name):
    """One weight at 20,000 positions: the mean of what is read back is the weight within 4 standard errors."""
    positions = 20_000
    for weight in np.float32([0.9, 0.3, 0.0123, 1e-6, *[1.7] * (name == "split_weight_unbiased")]):
        flat = FlatTargets(
            ids=np.arange(positions, dtype=np.uint32) % V,
            values=np.full(positions, weight),
            sizes=np.ones(positions, np.int64),
        )
        found = decode(encode(flat, spec_of(name)), positions, spec_of(name)).weights
        error = found.std() / positions**0.5
        assert error > 0
        assert abs(found.mean(dtype=np.float64) - weight) < 4 * error
        if weight > 1:
            continue
        nearest = decode(encode(flat, spec_of("split_prob")), positions, spec_of("split_prob")).weights
        assert abs(nearest.mean(dtype=np.float64) - weight) > 4 * error, "the nearest is biased, so the test can fail"


def test_the_neighbour_hangs_on_splitmix64_for_good():
    """Of position, id and the bits of the weight, by a plain twin: another version makes the same bytes."""
    flat = top_k(np.random.default_rng(4), 20)
    for found, position, token, weight in zip(_uniform(flat), flat.positions, flat.ids, flat.values, strict=True):
        bits = int(np.float32(weight).view(np.uint32))
        state = splitmix_plain(splitmix_plain(int(position)) + int(token))
        assert found == (splitmix_plain(state + bits) >> 11) / 2**53


def test_equal_targets_have_equal_bytes_in_any_order():
    """The random neighbour hangs on position, id and weight, not on a generator or on the order of entries."""
    flat, spec = top_k(np.random.default_rng(2), 50), spec_of("split_prob_unbiased")
    order = np.lexsort((flat.ids, flat.positions))
    mixed = FlatTargets(ids=flat.ids[order], values=flat.values[order], sizes=flat.sizes)
    assert encode(mixed, spec) == encode(flat, spec)


def test_it_is_smaller_than_prob24_and_reaches_further():
    """Three bytes a label become less than two and a half, and a step of 30 octaves is one more integer."""
    flat = top_k(np.random.default_rng(3), 2000)
    assert len(encode(flat, spec_of("split_prob"))) < 0.8 * len(encode(flat, spec_of("prob24")))
    steep = FlatTargets(
        ids=np.array([1, 2], np.uint32), values=np.float32([0.999, 2.0**-30]), sizes=np.array([2], np.int64)
    )
    assert decode(encode(steep, spec_of("split_prob")), 1, spec_of("split_prob")).weights[1] == 2.0**-30


@pytest.mark.parametrize("name", ["split_prob", "split_prob_unbiased", "split_weight_unbiased"])
def test_rows_survive_with_their_input_ids(name):
    """Positions without entries among them, and next tokens that are kept or not."""
    rng = np.random.default_rng(4)
    flat = top_k(rng, 40, k=3, width=20)
    flat = FlatTargets.join(
        [flat.take(np.arange(20)), FlatTargets.from_padded(np.zeros((2, 1), int), np.zeros((2, 1)))]
    )
    supervised = np.append(np.zeros(6, bool), np.ones(22, bool))
    input_ids = rng.integers(20, size=28).astype(np.uint32)
    block = encode_row(input_ids, flat, supervised, spec_of(name, 20))
    found, targets = decode_row(block, 28, supervised, spec_of(name, 20))
    np.testing.assert_array_equal(found, input_ids)
    np.testing.assert_array_equal(targets.sizes, flat.sizes)
    assert weight_of(targets).keys() == weight_of(flat).keys()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1], "do not fill 1 values"),
        ([2, 0, 5, 1, 7], "2 entries of 2 positions do not fill 5 values"),
        ([2, 0, 5, 1, 7, 1000], "position 0 has id 1000, but logit_width=1000"),
        ([0, 2, 5, 1, 7, 7], "position 1 has an id twice"),
        ([0, 2, 4700, 69, 7, 8], r"position 1 has a weight below 2\^-149"),
    ],
)
def test_damaged_streams_are_named(values, words):
    """Sizes, ids and levels of two positions."""
    with pytest.raises(FormatError, match=words):
        decode(encode_ints([values]), 2, spec_of("split_prob", 1000))


def test_weights_that_do_not_fit_are_refused():
    """Weights above 1, or 2, and an id twice."""
    cases = [
        ("split_prob", [1, 2], [1.5, 0.1], "holds weights up to 1, got 1.5"),
        ("split_weight_unbiased", [1, 2], [2.5, 0.1], "holds weights up to 2, got 2.5"),
        ("split_prob", [2, 2], [0.5, 0.1], "has an id twice"),
    ]
    for name, ids, weights, words in cases:
        flat = FlatTargets(ids=np.array(ids, np.uint32), values=np.float32(weights), sizes=np.array([2], np.int64))
        with pytest.raises(MismatchError, match=words):
            encode(flat, spec_of(name))
