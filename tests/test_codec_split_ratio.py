"""`split_ratio`: precision of its weights, unbiasedness, order and rows, sizes, hostile streams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracles import splitmix_plain

from sparsekd.codec import FlatTargets, Importance, codec_spec, decode, decode_row, encode, encode_row
from sparsekd.codec_ints import encode_ints
from sparsekd.codec_split import encode_split
from sparsekd.codec_split_ratio import _coins
from sparsekd.errors import FormatError, MismatchError
from sparsekd.id_ranks import id_ranks

V = 3000
BOTH = [("split_ratio", 1 / 64), ("split_ratio_unbiased", 1 / 32)]  # octaves that a weight may be off by


def drawn(t, positions=200, rounds=50, width=V, seed=0):
    """Draws from q ∝ p^t of peaked and flat rows, and [positions, width] p."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(positions, width)) * rng.uniform(0.5, 4, size=(positions, 1))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    q = p**t
    mass = q.sum(-1)
    counts = rng.multinomial(rounds, q / mass[:, None])
    ids = np.argsort(-counts, axis=-1)[:, : int((counts > 0).sum(-1).max())]
    given = Importance(
        log2_p=np.log2(np.take_along_axis(p, ids, -1)),
        entropy=(np.log2(mass) / (1 - t)).astype(np.float32),
        temperature=t,
        normalize=False,
    )
    return FlatTargets.from_padded(ids, np.take_along_axis(counts, ids, -1), rounds, given), p


def spec_of(name, t, rounds=50, normalize=False, width=V):
    return codec_spec(name, logit_width=width, rounds=rounds, temperature=t, normalize=normalize)


def by_key(flat, values):
    return dict(zip(zip(flat.positions.tolist(), flat.ids.tolist(), strict=True), values.tolist(), strict=True))


@pytest.mark.parametrize("t", [0.0, 0.5, 0.8, 1.2, 3.0])
@pytest.mark.parametrize(("name", "most"), BOTH)
def test_weights_err_by_no_more_than_they_state(name, most, t):
    """Counts exactly; plain weights to half a step (a whole one without bias) and an eighth of it for the entropy."""
    flat, _ = drawn(t)
    data = encode(flat, spec_of(name, t))
    found = decode(data, 200, spec_of(name, t))
    assert by_key(found, found.values) == by_key(flat, flat.values)
    one, other = by_key(found, found.weights), by_key(flat, flat.weights)
    errors = np.abs(np.log2([one[key] / other[key] for key in other]))
    assert errors.max() <= most * 9 / 8 + 1e-5
    assert errors.max() > most / 2, "a finer grid than stated would be a waste"
    again = decode(data, 200, spec_of(name, t, normalize=True))
    one = by_key(again, again.weights)
    other = by_key(flat, replace(flat, importance=replace(flat.importance, normalize=True)).weights)
    assert np.abs(np.log2([one[key] / other[key] for key in other])).max() <= 2 * most + 1e-5


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_unbiased_rounding_is_unbiased_for_every_weight(t):
    """One draw of one probability at 20,000 positions, other ids and entropies beside it: the mean weight is the weight
    within 4 standard errors; to the nearest it is not, so the test can fail."""
    rng, positions = np.random.default_rng(1), 20_000
    for p in (0.9, 0.31, 0.0123):
        log2_p = np.stack([np.full(positions, np.log2(p)), np.log2(rng.uniform(0.001, 0.05, positions))], 1)
        given = Importance(log2_p=log2_p, entropy=np.full(positions, 3.07, np.float32), temperature=t, normalize=False)
        ids = np.tile([5, 9], (positions, 1))
        flat = FlatTargets.from_padded(ids, np.ones((positions, 2), int), 2, given)
        means = {}
        for name, _ in BOTH:
            spec = spec_of(name, t, rounds=2)
            found = decode(encode(flat, spec), positions, spec)
            weights = found.weights[found.ids == 5].astype(np.float64)
            means[name] = weights.mean() / float(flat.weights[0]) - 1
            error = weights.std() / positions**0.5 / float(flat.weights[0])
        assert error > 0
        assert abs(means["split_ratio_unbiased"]) < 4 * error
        assert abs(means["split_ratio"]) > 4 * error


def test_coins_are_words_of_splitmix64_for_good():
    """Of a position's number, its probabilities' bits and its counts, by a plain twin: another version makes the same
    bytes."""
    flat, _ = drawn(0.8, 20)
    entries, positions = _coins(flat, flat.importance.log2_p)
    bits = flat.importance.log2_p.astype(np.float32).view(np.uint32)
    own = [splitmix_plain(int(p) << 32 | int(c)) for p, c in zip(bits, flat.values, strict=True)]
    for n in range(20):
        here = np.flatnonzero(flat.positions == n)
        whole = splitmix_plain(sum(own[at] for at in here) % 2**64 + n)
        assert [entries[at] for at in here] == [(splitmix_plain(own[at] ^ whole) >> 11) / 2**53 for at in here]
        assert positions[n] == (splitmix_plain(whole) >> 11) / 2**53


def test_coins_are_tossed_anew_for_other_draws():
    """The same id, position and probability: the rest of the draw decides, so a mean over seeds is unbiased too."""
    spec, weights = spec_of("split_ratio_unbiased", 0.5, rounds=2), []
    for other in np.linspace(0.01, 0.3, 400):
        given = Importance(log2_p=np.log2([[0.31, other]]), entropy=np.float32([3]), temperature=0.5, normalize=False)
        flat = FlatTargets.from_padded(np.array([[5, 9]]), np.ones((1, 2), int), 2, given)
        weights.append(decode(encode(flat, spec), 1, spec).weights[0] / flat.weights[0])
    assert len(set(weights)) == 2
    assert abs(np.mean(weights) - 1) < 4 * np.std(weights) / 20


@pytest.mark.parametrize(("name", "_"), BOTH)
def test_bytes_hang_on_the_draws_alone(name, _):
    """Not on the order of entries; levels not on how ids are numbered either, so that a redrawn row can be compared."""
    (flat, _), spec = drawn(0.8, 50), spec_of(name, 0.8)
    order = np.lexsort((-flat.ids.astype(int), flat.positions))
    given = replace(flat.importance, log2_p=flat.importance.log2_p[order])
    assert encode(replace(flat, ids=flat.ids[order], values=flat.values[order], importance=given), spec) == encode(
        flat, spec
    )
    other = replace(flat, ids=(V - 1 - flat.ids).astype(np.uint32))
    one, two = (decode(encode(each, spec), 50, spec) for each in (flat, other))
    levels = by_key(replace(two, ids=V - 1 - two.ids), two.importance.log2_p)
    assert levels == by_key(one, one.importance.log2_p)


def test_it_is_smaller_than_words():
    """Four bytes a label become less than two and a half; the counts' part is split's, byte for byte."""
    flat, _ = drawn(0.8, 1000)
    spec, words = spec_of("split_ratio", 0.8), spec_of("ratio32", 0.8)
    data, counts = encode(flat, spec), encode_split(replace(flat, importance=None), spec)
    assert data.endswith(counts)
    assert len(data) < 0.6 * len(encode(flat, words))


@pytest.mark.parametrize(("name", "_"), BOTH)
@pytest.mark.parametrize("rounds", [1, 50, 1000])
def test_rows_survive_with_their_input_ids(name, _, rounds):
    """Ranked ids, unsupervised tokens, next tokens that are drawn or not; a row without any target too."""
    flat, _ = drawn(0.8, 20, rounds, width=60)
    ranks = id_ranks([flat], 60, least=1)
    rng, spec = np.random.default_rng(4), spec_of(name, 0.8, rounds, width=60)
    supervised, input_ids = np.append(np.zeros(6, bool), np.ones(20, bool)), rng.integers(60, size=26).astype(np.uint32)
    block = encode_row(input_ids, flat, supervised, spec, ranks.ranks)
    found, targets = decode_row(block, 26, supervised, spec, ranks.ids)
    np.testing.assert_array_equal(found, input_ids)
    assert by_key(targets, targets.values) == by_key(flat, flat.values)
    nothing = np.zeros(26, bool)
    found, targets = decode_row(encode_row(input_ids, flat.take([]), nothing, spec), 26, nothing, spec)
    np.testing.assert_array_equal(found, input_ids)
    assert targets.importance.temperature == 0.8


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([0, 7], "2 levels do not fit 2 entries of 1 positions"),
        ([0, 7, 7, 7], "4 values, at most 3|4 levels do not fit"),
        ([0, 16 * 149 + 1, 0], r"position 0 has a probability below 2\^-149"),
        ([16 * 8 * 32 + 1, 0, 0], "position 0 has an entropy above 32 bits"),
    ],
)
def test_damaged_levels_are_named(levels, words):
    """Too few, too many and out of range, at t = 0.5 (16 levels an octave) with ids 3 (twice) and 9."""
    counts = FlatTargets(ids=np.uint32([3, 9]), values=np.uint32([2, 1]), sizes=np.array([2], np.int64), rounds=3)
    spec = spec_of("split_ratio", 0.5, rounds=3)
    good = encode_ints([[0, 16, 32]]) + encode_split(counts, spec)
    assert decode(good, 1, spec).importance.log2_p.tolist() == [-1, -2]
    with pytest.raises(FormatError, match=words):
        decode(encode_ints([levels]) + encode_split(counts, spec), 1, spec)
    for end in range(len(good)):
        with pytest.raises(FormatError):
            decode(good[:end], 1, spec)


def test_draws_that_do_not_fit_are_refused():
    """Another temperature, a log-probability above 0, counts of another sum, an id twice."""
    flat, _ = drawn(0.5, 2, rounds=5)
    spec = spec_of("split_ratio", 0.5, rounds=5)
    given = flat.importance
    for wrong, words in (
        (replace(flat, importance=replace(given, temperature=0.6)), r"temperature=0\.6, codec split_ratio was set up"),
        (replace(flat, importance=replace(given, log2_p=given.log2_p + 99)), "it is finite and at most 0"),
        (replace(flat, values=flat.values + np.uint32(1)), "sum to"),
        (replace(flat, ids=np.full_like(flat.ids, 3)), "has an id twice"),
    ):
        with pytest.raises(MismatchError, match=words):
            encode(wrong, spec)
