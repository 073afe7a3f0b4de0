"""Codecs: golden bytes (the same as in docs/format.md), round trips, limits, damaged bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.codec import (
    CODECS,
    FlatTargets,
    Importance,
    check_codec,
    codec_spec,
    decode,
    decode_row,
    default_codec,
    encode,
    encode_row,
    id_bytes,
)
from sparsekd.errors import FormatError, MismatchError, RecipeError, SparseKDError

COUNTS = [name for name, codec in CODECS.items() if codec.holds == "counts"]
WEIGHTS = [name for name, codec in CODECS.items() if codec.holds == "weights"]
DRAWS = [name for name, codec in CODECS.items() if codec.holds == "importance draws"]


def flat_counts(positions, rounds):
    """FlatTargets from [{id: count}, ...]."""
    return FlatTargets(
        ids=np.array([i for each in positions for i in each], np.uint32),
        values=np.array([c for each in positions for c in each.values()], np.uint32),
        sizes=np.array([len(each) for each in positions], np.int64),
        rounds=rounds,
    )


def flat_weights(positions):
    """FlatTargets from [[(id, weight), ...], ...]."""
    return FlatTargets(
        ids=np.array([i for each in positions for i, _ in each], np.uint32),
        values=np.array([w for each in positions for _, w in each], np.float32),
        sizes=np.array([len(each) for each in positions], np.int64),
    )


def by_id(flat):
    """The same targets, ids ascending in each position: what codecs that keep an order of their own compare as."""
    order = np.lexsort((flat.ids, flat.positions))
    return replace(flat, ids=flat.ids[order], values=flat.values[order])


def assert_same(one, other):
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.sizes, other.sizes)
    assert one.rounds == other.rounds


def spec_of(name, width, rounds=None, **weighing):
    return {"name": name, "logit_width": width, **weighing} | ({"rounds": rounds} if rounds else {})


# --- golden bytes ---------------------------------------------------------------------------------------

GOLDEN_COUNTS = {
    # id 3 four times and id 999 once; id 7 five times
    "raw24": "03000c e70300 070010",
    "paper24": "030006 e70300 070008",
    "raw40": "0300300000 e703000000 0700400000",
    # a zstd frame of raw blocks: multiples 1 1; steps of counts 2 3; ids 3, 999 (class 0x83, low byte 0x67), 7
    "split": "13000000 28b52ffd 2007 200000 01010203 190000 038307 67",
}
GOLDEN_WEIGHTS = {
    # id 999 with 1/2 and id 3 with 1/4; nothing; id 7 with 1
    "prob24": "0200 0000 0100 e70340 030040 070000",
    "prob40": "0200 0000 0100 e703000044 0300000048 0700000040",
    # sizes 2 0 1; first levels 32 (one octave) 0; a step of 32; ids 999 (class 0x83, low byte 0x67), 3, 7
    "split_prob": "1b000000 28b52ffd 2009 180000 020001 100000 2000 080000 20 190000 830307 67",
    "split_prob_unbiased": "1b000000 28b52ffd 2009 180000 020001 100000 2000 080000 20 190000 830307 67",
    # first levels 64 and 32: two octaves and one below 2
    "split_weight_unbiased": "1b000000 28b52ffd 2009 180000 020001 100000 4020 080000 20 190000 830307 67",
}
GOLDEN_DRAWS = {
    # H = 3 bits and 0 bits; largest p 1/2 and 1; id 999 (p 1/2) once and id 3 (p 1/4) four times; id 7 five times
    "ratio32": "0018 0000 0004 0000 e7030000 03000c20 07001000",
    "ratio48": "0018 0000 0004 0000 e70300000000 030030000020 070040000000",
}
# entropies 3 * 128 = 384 (class 0x81, low byte 0) and 0; log2 p of ids 3 and 7, drawn more than once, 2 * 16 and 0; of
# id 999 1 * 16; then the counts' bytes
GOLDEN_DRAWS |= dict.fromkeys(
    ("split_ratio", "split_ratio_unbiased"),
    "14000000 28b52ffd 2005 100000 8100 100000 2000 090000 10 00" + GOLDEN_COUNTS["split"],
)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_have_the_bytes_that_the_format_page_shows(name):
    """Two positions, written by hand from the specification, in both directions."""
    flat, spec = flat_counts([{3: 4, 999: 1}, {7: 5}], 5), spec_of(name, 1000, 5)
    assert encode(flat, spec) == bytes.fromhex(GOLDEN_COUNTS[name])
    assert_same(decode(bytes.fromhex(GOLDEN_COUNTS[name]), 2, spec), flat)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_have_the_bytes_that_the_format_page_shows(name):
    """Powers of two are exact in both weight codecs, so the bytes decode to the very same weights."""
    flat, spec = flat_weights([[(999, 0.5), (3, 0.25)], [], [(7, 1.0)]]), spec_of(name, 1000)
    assert encode(flat, spec) == bytes.fromhex(GOLDEN_WEIGHTS[name])
    assert_same(decode(bytes.fromhex(GOLDEN_WEIGHTS[name]), 3, spec), flat)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_the_bytes_that_the_format_page_shows(name):
    """Powers of two are exact: entropies, largest probabilities, then counts with ratios; both weightings by hand."""
    spec = spec_of(name, 1000, 5, temperature=0.5, normalize=False)
    found = decode(bytes.fromhex(GOLDEN_DRAWS[name]), 2, spec)
    by_p = [0, 1, 2] if name.startswith("ratio") else [1, 0, 2]
    assert found.ids[by_p].tolist() == [999, 3, 7]
    assert found.values[by_p].tolist() == [1, 4, 5]
    assert found.sizes.tolist() == [2, 1]
    assert found.importance.log2_p[by_p].tolist() == [-1, -2, 0]
    assert found.importance.entropy.tolist() == [3, 0]
    assert encode(found, spec) == bytes.fromhex(GOLDEN_DRAWS[name])
    plain = [1 / 5 * (8 / 2) ** 0.5, 4 / 5 * (8 / 4) ** 0.5, 1]
    np.testing.assert_allclose(found.weights[by_p], plain, rtol=1e-6)
    normalised = decode(bytes.fromhex(GOLDEN_DRAWS[name]), 2, spec | {"normalize": True}).weights
    np.testing.assert_allclose(normalised[by_p], [*np.divide(plain[:2], sum(plain[:2])), 1], rtol=1e-6)


def test_a_row_begins_with_its_input_ids():
    """Ids of two bytes below 65536 logits; tokens 1 and 2 are supervised, so two targets follow."""
    flat, spec = flat_counts([{3: 4, 999: 1}, {7: 5}], 5), spec_of("raw24", 1000, 5)
    ids, supervised = np.array([5, 999, 7], np.uint32), np.array([False, True, True])
    block = encode_row(ids, flat, supervised, spec)
    assert block == bytes.fromhex("0500 e703 0700 03000c e70300 070010")
    found, targets = decode_row(block, 3, supervised, spec)
    np.testing.assert_array_equal(found, ids)
    assert_same(targets, flat)


def test_every_codec_has_golden_bytes():
    """A codec without a written-down example could change its bytes unnoticed."""
    elsewhere = {"curve8"}  # test_sketch.py
    assert set(GOLDEN_COUNTS) | set(GOLDEN_WEIGHTS) | set(GOLDEN_DRAWS) | elsewhere == set(CODECS)


def test_the_format_page_shows_the_golden_bytes():
    """docs/format.md and this file cannot drift apart: the page has every example, codec by codec."""
    lines = (Path(__file__).parents[1] / "docs" / "format.md").read_text().splitlines()
    shown = {line.split()[0]: "".join(line.split()[1:]) for line in lines if line.split()[:1]}
    for name, data in (GOLDEN_COUNTS | GOLDEN_WEIGHTS | GOLDEN_DRAWS).items():
        assert shown[name] == data.replace(" ", "")


# --- round trips ----------------------------------------------------------------------------------------


def random_counts(rng, positions, width, rounds):
    """Sets of 1 .. min(rounds, width) ids, the last id of the vocabulary often among them."""
    drawn = []
    for _ in range(positions):
        size = int(rng.integers(1, min(rounds, width, 200) + 1))
        ids = set(rng.integers(width, size=size).tolist()) | ({width - 1} if rng.random() < 0.5 else set())
        ids = sorted(ids)[-min(rounds, width) :]
        counts = 1 + rng.multinomial(rounds - len(ids), np.full(len(ids), 1 / len(ids)))
        drawn.append(dict(zip(ids, counts.tolist(), strict=True)))
    return flat_counts(drawn, rounds)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(COUNTS),
    seed=st.integers(0, 2**32),
    positions=st.integers(0, 6),
    rounds=st.sampled_from([1, 2, 3, 49, 50, 63, 64, 65, 127, 128, 129, 1000, 4096, 2**20]),
    width=st.sampled_from([1, 2, 50, 2**16, 2**17 - 1, 2**17, 2**18, 151_936, 2**20]),
)
def test_counts_survive_exactly_or_are_refused(name, seed, positions, rounds, width):
    """decode(encode(x)) is x within a codec's limits; outside them the spec is refused, never the data bent."""
    spec, codec = spec_of(name, width, rounds), CODECS[name]
    if rounds > codec.max_rounds or width > 2**codec.id_bits:
        with pytest.raises(RecipeError, match=f"codec {name} holds"):
            check_codec(spec)
        return
    flat = random_counts(np.random.default_rng(seed), positions, width, rounds)
    assert_same(by_id(decode(encode(flat, spec), positions, spec)), flat)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("kept", ["one", "all different", "last id"])
def test_extreme_sets_survive(name, kept):
    """One id drawn every time, every draw different, and the last id of the largest vocabulary."""
    codec, rounds = CODECS[name], CODECS[name].max_rounds if kept == "one" else 50
    width = 2**codec.id_bits
    chosen = {
        "one": {0: rounds},
        "all different": dict.fromkeys(range(rounds), 1),
        "last id": {0: rounds - 1, width - 1: 1},
    }[kept]
    flat, spec = flat_counts([chosen] * 3, rounds), spec_of(name, width, rounds)
    assert_same(by_id(decode(encode(flat, spec), 3, spec)), flat)


@pytest.mark.parametrize("rounds", [1, 64, 128, 512, 4096])
def test_every_draw_different_survives_for_any_number_of_rounds(rounds):
    """N ids with a count of one each, N from 1 to 4096, in the default codec."""
    spec = default_codec(rounds, 2**20)
    flat = flat_counts([dict.fromkeys(range(2**20 - rounds, 2**20), 1), {0: rounds}], rounds)
    assert_same(decode(encode(flat, spec), 2, spec), flat)


@pytest.mark.parametrize("name", COUNTS)
def test_the_order_of_ids_does_not_change_the_bytes(name):
    """Entries are stored in ascending id order, so equal sets have equal bytes."""
    spec = spec_of(name, 100, 6)
    ascending = encode(flat_counts([{1: 1, 9: 2, 50: 3}, {0: 6}], 6), spec)
    assert encode(flat_counts([{50: 3, 1: 1, 9: 2}, {0: 6}], 6), spec) == ascending


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 2**24 - 1),
                st.floats(2**-47, 2**16, width=32).map(np.float32),
            ),
            max_size=9,
        ),
        max_size=5,
    )
)
def test_prob40_keeps_ids_and_order_and_weights_to_a_third_of_a_per_mille(positions):
    """The stated bound: a relative error of at most 2^(1/2048) - 1 = 0.034 % from 2^-47 to 2^16."""
    flat, spec = flat_weights(positions), spec_of("prob40", 2**24)
    found = decode(encode(flat, spec), len(positions), spec)
    np.testing.assert_array_equal(found.ids, flat.ids)
    np.testing.assert_array_equal(found.sizes, flat.sizes)
    np.testing.assert_allclose(found.weights, flat.weights, rtol=0.00034)


def test_prob24_errs_by_no_more_than_it_states():
    """With o octaves between neighbours the error is at most 2.2 % sqrt(o), and never adds up along the set."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 2000)) * rng.uniform(0.5, 4, size=(400, 1))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = np.sort(p / p.sum(-1, keepdims=True), axis=-1)[:, ::-1][:, :50].astype(np.float32)
    flat = FlatTargets.from_padded(np.broadcast_to(np.arange(50), p.shape), p)
    spec = spec_of("prob24", 2**17)
    found = decode(encode(flat, spec), 400, spec).padded()[1]
    error = np.abs(np.log2(found) - np.log2(p))
    octaves = -np.diff(np.log2(p), axis=-1, prepend=0)
    # A gap that is below what the previous rounding took keeps the previous error: at most that maximum.
    bound = np.maximum.accumulate((np.sqrt(octaves) + 0.05) / 32, axis=-1)
    assert octaves.max() < 15.7
    assert (error <= bound).all()
    assert np.abs(found / p - 1).mean() < 0.01
    assert error[:, -1].mean() < 2 * error[:, 5].mean()


def test_prob24_beats_equal_intervals_by_far():
    """The paper's first code, 128 equal intervals of [0, 1], loses 30 times as much of the divergence."""
    rng = np.random.default_rng(1)
    p = np.sort(rng.dirichlet(np.full(3000, 0.02), size=200), axis=-1)[:, ::-1][:, :12].astype(np.float32)
    flat = FlatTargets.from_padded(np.broadcast_to(np.arange(12), p.shape), p)
    spec = spec_of("prob24", 2**17)
    ratio = decode(encode(flat, spec), 200, spec).padded()[1]
    equal = (np.floor(p * 128).clip(0, 127) + 0.5) / 128

    def divergence(q):
        return (p * np.log(p / q) - p + q).sum(-1).mean()

    assert divergence(ratio) * 30 < divergence(equal)


@pytest.mark.parametrize("name", WEIGHTS)
def test_positive_weights_never_vanish_and_zeros_do(name):
    """The smallest float32 comes back positive; a weight of 0 is left out."""
    flat = flat_weights([[(1, 0.5), (2, 0.0), (3, 1e-45)], [(4, 0.0)]])
    found = decode(encode(flat, spec_of(name, 10)), 2, spec_of(name, 10))
    assert found.ids.tolist() == [1, 3]
    assert found.sizes.tolist() == [2, 0]
    assert (found.weights > 0).all()


def test_prob24_sorts_by_weight():
    """Ratios need descending weights; equal weights keep their order."""
    flat = flat_weights([[(1, 0.125), (2, 0.5), (3, 0.125)]])
    found = decode(encode(flat, spec_of("prob24", 10)), 1, spec_of("prob24", 10))
    assert found.ids.tolist() == [2, 1, 3]
    np.testing.assert_allclose(found.weights, [0.5, 0.125, 0.125], rtol=0.031)


@pytest.mark.parametrize(("width", "size"), [(65536, 2), (65537, 3), (2**24, 3), (2**24 + 1, 4)])
def test_input_ids_take_the_fewest_whole_bytes(width, size):
    """2, 3 or 4 bytes, by the number of logits alone."""
    assert id_bytes(width) == size


# --- importance draws -----------------------------------------------------------------------------------


def drawn(temperature, rounds=50, positions=200, width=4000, seed=0):
    """Draws as the sampler makes them, and its own weights: plain, self-normalised. Peaked and flat positions."""
    import torch

    from sparsekd.samplers import sample_importance

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(positions, width, generator=generator) * torch.linspace(0.5, 5, positions)[:, None]
    draws = sample_importance(logits, rounds=rounds, temperature=temperature, seed=seed)
    given = Importance(log2_p=draws.log2_p.numpy(), entropy=draws.entropy.float().numpy(), temperature=temperature)
    flat = FlatTargets.from_padded(draws.ids.numpy(), draws.counts.numpy(), rounds, given)
    kept = draws.counts.numpy() > 0
    return flat, *(draws.targets(normalize=normalize).weights.numpy()[kept] for normalize in (False, True))


def error_bound(flat):
    """[M] octaves by which a stored p may be off: 1/2048 for the largest, then sqrt(o) / 32 for a gap of o octaves."""
    bounds = np.zeros(len(flat.ids))
    for entries in np.split(np.arange(len(flat.ids)), np.cumsum(flat.sizes)[:-1]):
        order = entries[np.argsort(-flat.importance.log2_p[entries], kind="stable")]
        gaps = -np.diff(flat.importance.log2_p[order], prepend=flat.importance.log2_p[order[0]])
        steps = (np.sqrt(gaps) + 0.05) / 32
        steps[0] = 1 / 2048
        bounds[order] = np.maximum.accumulate(steps)
    return bounds


def as_dict(flat):
    return dict(zip(zip(flat.positions.tolist(), flat.ids.tolist(), strict=True), range(len(flat.ids)), strict=True))


def in_words(rounds, temperature, normalize=True):
    """The spec of the codec that takes a word an entry."""
    weighing = {"temperature": temperature, "normalize": normalize}
    return codec_spec("ratio32" if rounds <= 64 else "ratio48", logit_width=4000, rounds=rounds, **weighing)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 0.8, 1.2, 2.0])
@pytest.mark.parametrize("rounds", [50, 1000])
def test_decoded_importance_weights_are_the_samplers_to_the_stated_precision(temperature, rounds):
    """Counts exactly; both weightings, read from the same bytes, within |1 - t| times the error of p (format page)."""
    flat, plain, normalised = drawn(temperature, rounds, positions=100)
    data = encode(flat, in_words(rounds, temperature))
    spec = in_words(rounds, temperature, normalize=False)
    found = decode(data, len(flat.sizes), spec)
    where = as_dict(found)
    at = np.array([where[key] for key in as_dict(flat)])
    np.testing.assert_array_equal(found.values[at], flat.values)
    power, bound = abs(1 - temperature), error_bound(flat)
    assert (np.abs(found.importance.log2_p[at] - flat.importance.log2_p) <= bound).all()
    error = np.abs(np.log2(found.weights[at]) - np.log2(plain))
    assert (error <= power * (bound + 2**-12) + 1e-6).all()
    again = decode(data, len(flat.sizes), spec | {"normalize": True})
    worst = np.maximum.reduceat(bound, np.cumsum(flat.sizes) - flat.sizes)
    error = np.abs(np.log2(again.weights[at]) - np.log2(normalised))
    assert (error <= power * (bound + worst[flat.positions]) + 1e-6).all()
    assert (np.abs(again.weights[at] - normalised)).mean() < 0.01 * power * normalised.mean()


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.5])
def test_weights_of_importance_draws_are_rounded_once(temperature):
    """Whatever p, H and N: the float32 beside the float64 formula, counts (2^H p)^(1-t) / N or that over its sum."""
    rng, sizes = np.random.default_rng(0), np.array([7, 0, 13, 1, 9])
    owner, power = np.repeat(np.arange(5), sizes), 1 - temperature
    logs, entropy = -12 * rng.random(30, np.float32), 12 * rng.random(5, np.float32)
    values = rng.integers(1, 10_000, 30).astype(np.uint32)
    plain = values * np.exp2(power * (logs.astype(np.float64) + entropy[owner])) / 9999
    given = Importance(log2_p=logs, entropy=entropy, temperature=temperature, normalize=False)
    flat = FlatTargets(ids=np.arange(30, dtype=np.uint32), values=values, sizes=sizes, rounds=9999, importance=given)
    np.testing.assert_allclose(flat.weights, plain, rtol=6e-8)
    normal = replace(flat, importance=replace(given, normalize=True))
    np.testing.assert_allclose(normal.weights, plain / np.bincount(owner, plain)[owner], rtol=6e-8)


def test_the_two_weightings_differ_as_the_docstring_says():
    """One draw, t = 0.5: self-normalised weighs it 1 whatever its p; plain weighs it p/q, and Σ_i q_i p_i/q_i = 1."""
    p = np.array([0.6, 0.3, 0.1])
    q = p**0.5 / (p**0.5).sum()
    entropy = np.log2((p**0.5).sum()) / 0.5
    given = Importance(log2_p=np.log2(p), entropy=np.full(3, entropy), temperature=0.5, normalize=False)
    one = FlatTargets(ids=np.arange(3), values=np.ones(3, np.uint32), sizes=np.ones(3, int), rounds=1, importance=given)
    np.testing.assert_allclose(one.weights, p / q, rtol=6e-8)
    assert (q * one.weights).sum() == pytest.approx(1, rel=6e-8)
    from dataclasses import replace

    np.testing.assert_allclose(replace(one, importance=replace(given, normalize=True)).weights, 1)


@pytest.mark.parametrize("rounds", [50, 1000])
def test_draws_read_back_are_the_same_bytes_again(rounds):
    """encode(decode(b)) is b, so that carrying targets from cache to cache loses nothing; smaller than raw40 + size."""
    flat, *_ = drawn(0.5, rounds)
    spec = in_words(rounds, 0.5)
    data = encode(flat, spec)
    assert encode(decode(data, len(flat.sizes), spec), spec) == data
    assert len(data) == 4 * len(flat.sizes) + (4 if rounds == 50 else 6) * len(flat.ids)


def test_taking_and_joining_positions_keeps_what_weighs_them():
    """take(any order) and join carry log2_p and entropies along; a position's weights do not depend on its company."""
    flat, *_ = drawn(0.5, positions=6)
    order = [4, 0, 0, 5]
    parts = FlatTargets.join([flat.take([position]) for position in order])
    assert_same(parts, flat.take(order))
    np.testing.assert_array_equal(parts.padded()[1], flat.padded()[1][order][:, : int(parts.sizes.max())])


def test_an_extreme_position_has_finite_positive_weights():
    """t = 10 and p = 2^-149, or t = 0 and p = 2^-140: no overflow, no weight that would be taken for padding."""
    for temperature, log2_p in ((10.0, [-149, 0]), (0.0, [-140, -149])):
        for normalize in (False, True):
            given = Importance(
                log2_p=np.array(log2_p), entropy=np.zeros(1), temperature=temperature, normalize=normalize
            )
            flat = FlatTargets(
                ids=np.array([1, 2]), values=np.array([1, 1]), sizes=np.array([2]), rounds=2, importance=given
            )
            assert (flat.weights > 0).all()
            assert np.isfinite(flat.weights).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.6}, r"temperature=0\.6, codec ratio32 was set up for temperature=0\.5"),
        ({"log2_p": np.array([-1.0, np.nan])}, "position 0 has log2_p=nan"),
        ({"log2_p": np.array([-1.0, 0.5])}, r"position 0 has log2_p=0\.5; it is finite and at most 0"),
        ({"entropy": np.array([np.inf])}, "position 0 has an entropy that is none"),
    ],
)
def test_draws_that_do_not_fit_are_not_written(change, words):
    """Another temperature, and numbers that are no log-probabilities or entropies."""
    settings = {"log2_p": np.array([-1.0, -2.0]), "entropy": np.array([1.0]), "temperature": 0.5} | change
    flat = FlatTargets(
        ids=np.array([1, 2], np.uint32),
        values=np.array([2, 3], np.uint32),
        sizes=np.array([2]),
        rounds=5,
        importance=Importance(**settings),
    )
    with pytest.raises(MismatchError, match=words):
        encode(flat, spec_of("ratio32", 10, 5, temperature=0.5, normalize=True))
    with pytest.raises(MismatchError, match="targets are importance draws, codec raw24 holds counts"):
        encode(flat, spec_of("raw24", 10, 5))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("0018", "2 bytes cannot hold 2 numbers of 1 positions"),
        ("0018 0000 0700", "2 bytes are no whole number of 4-byte words"),
        ("0018 0000 07000c00", "need 5, the counts sum to 4"),
        ("0018 0000 e8031000", "position 0 has id 1000, but logit_width=1000"),
        ("0018 0000 07001001", "position 0 has a first step of 1 after its largest probability"),
        ("0018 ffff 070000ff 080000ff 090008ff", r"position 0 has a probability below 2\^-150"),
    ],
)
def test_damaged_draws_are_named(data, words):
    """Numbers, sums, ranges and steps are checked, and the position is named."""
    with pytest.raises(FormatError, match=words):
        decode(bytes.fromhex(data), 1, spec_of("ratio32", 1000, 5, temperature=0.5, normalize=True))


# --- FlatTargets ----------------------------------------------------------------------------------------


def test_padding_and_flattening_are_inverse():
    """from_padded drops the zeros that padded adds; no position loses its place, empty ones included."""
    flat = flat_counts([{3: 2, 5: 3}, {}, {1: 5}], 5)
    ids, weights = flat.padded()
    assert ids.tolist() == [[3, 5], [0, 0], [1, 0]]
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [[0.4, 0.6], [0, 0], [1, 0]])
    back = FlatTargets.from_padded(ids, np.rint(weights * 5).astype(int), 5)
    assert_same(back, flat)
    assert back.values.dtype == np.uint32


def test_no_positions_pad_to_width_one():
    """K is at least 1, so shapes stay usable when nothing is supervised."""
    ids, weights = flat_counts([], 5).padded()
    assert ids.shape == weights.shape == (0, 1)


def test_arrays_that_disagree_are_refused():
    """Sizes must sum to the number of entries."""
    with pytest.raises(ValueError, match="2 ids and 2 values, but the sizes sum to 3"):
        FlatTargets(ids=np.zeros(2), values=np.zeros(2), sizes=np.array([3]))
    with pytest.raises(ValueError, match=r"ids span -1\.\.4"):
        FlatTargets.from_padded(np.array([[-1, 4]]), np.array([[1, 1]]), 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"curve": np.ones((2, 3))}, "2 curves, but 1 positions have one entry"),
        ({"scale": np.ones(3)}, "3 scales, but there are 2 positions"),
        ({"importance": (2, 2)}, "2 log2_p and 2 entropies with rounds=4, but there are 3 counts of 2 positions"),
        ({"importance": (3, 3)}, "3 log2_p and 3 entropies with rounds=4"),
        ({"importance": (3, 2), "rounds": None}, "3 log2_p and 2 entropies with rounds=None"),
    ],
)
def test_arrays_beside_the_entries_have_their_lengths(change, words):
    if "importance" in change:
        entries, positions = change["importance"]
        weighing = Importance(log2_p=-np.ones(entries), entropy=np.ones(positions), temperature=0.5)
        change = change | {"importance": weighing}
    with pytest.raises(ValueError, match=words):
        replace(flat_counts([{4: 3, 5: 1}, {6: 4}], 4), **change)


def test_a_position_that_would_blow_up_the_padding_is_refused():
    """65535 entries in one of 4096 positions would pad to 3 GB."""
    sizes = np.zeros(4096, np.int64)
    sizes[0] = 65535
    flat = FlatTargets(ids=np.zeros(65535, np.uint32), values=np.ones(65535, np.float32), sizes=sizes)
    with pytest.raises(FormatError, match="padding 4096 positions to 65535 entries"):
        flat.padded()


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "width", "name"),
    [
        (1, 2, "split"),
        (50, 32_000, "split"),
        (4096, 2**20, "split"),
        (None, 2**20, "prob40"),
    ],
)
def test_the_default_codec_is_the_smallest_that_fits(rounds, width, name):
    """split for counts of any number of rounds, prob40 for weights."""
    assert default_codec(rounds, width)["name"] == name


@pytest.mark.parametrize(("normalize", "name"), [(True, "split_ratio"), (False, "split_ratio_unbiased")])
def test_importance_draws_are_stored_unweighed_by_default(normalize, name):
    """split_ratio, rounded without bias where the weighting has none; the spec says how to weigh."""
    spec = default_codec(65, 2**20, temperature=0.8, normalize=normalize)
    assert spec == spec_of(name, 2**20, 65, temperature=0.8, normalize=normalize)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (spec_of("paper24", 131_073, 50), "paper24 holds ids below 131072, but logit_width=131073; raw24 holds"),
        (spec_of("raw24", 1000, 65), "raw24 holds 1 to 64 rounds, but rounds=65; raw24 .* raw40"),
        (spec_of("raw40", 2**20 + 1, 5), "raw40 holds ids below 1048576, but logit_width=1048577"),
        (spec_of("prob24", 200_000), "prob24 holds ids below 131072, but logit_width=200000; prob40"),
        (spec_of("zip", 10), "codec 'zip' is unknown; this sparsekd has raw24"),
        (spec_of("raw24", 10), r"raw24 takes the keys \['logit_width', 'name', 'rounds'\]"),
        (spec_of("prob40", 10, 5), "prob40 takes the keys"),
        (spec_of("raw24", True, 5), "logit_width=True"),
        (spec_of("raw24", 10, 5.0), r"rounds=5\.0"),
        (spec_of("ratio32", 10, 65, temperature=0.8, normalize=True), "rounds=65; ratio32 .* ratio48"),
        (spec_of("ratio32", 10, 5), r"ratio32 takes the keys .*'normalize', 'rounds', 'temperature'"),
        (spec_of("ratio32", 10, 5, temperature=1, normalize=True), "temperature=1; draws with .* need raw24"),
        (spec_of("ratio48", 10, 5, temperature=float("nan"), normalize=True), "temperature=nan"),
        (
            spec_of("ratio48", 10, 5, temperature=10.5, normalize=True),
            r"from 0 to 10 that is not 1, .* temperature=10\.5",
        ),
        (spec_of("ratio48", 10, 5, temperature=-0.5, normalize=True), r"temperature=-0\.5"),
        (spec_of("ratio48", 10, 5, temperature="0.5", normalize=True), "temperature='0.5'"),
        (spec_of("ratio48", 10, 5, temperature=0.8, normalize=1), "normalize=1"),
    ],
)
def test_a_codec_that_does_not_fit_is_refused_with_the_way_out(spec, words):
    """The message has the limit, the value, and the codecs that would do."""
    with pytest.raises(RecipeError, match=words):
        check_codec(spec)


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        (flat_counts([{1: 5}, {1: 4}], 5), "counts of supervised position 1 sum to 4, but rounds=5"),
        (flat_counts([{1: 5}, {}], 5), "counts of supervised position 1 sum to 0"),
        (flat_counts([{1: 0, 2: 5}], 5), "a count is 0"),
        (flat_counts([{100: 5}], 5), "position 0 has id 100, but logit_width=100"),
        (flat_counts([{1: 4}], 4), "targets have rounds=4, codec raw24 was set up for rounds=5"),
        (flat_weights([[(1, 1.0)]]), "targets have rounds=None"),
    ],
)
def test_targets_that_do_not_fit_are_not_written(flat, words):
    """The encoder names the position and both values."""
    with pytest.raises(MismatchError, match=words):
        encode(flat, spec_of("raw24", 100, 5))


def test_the_largest_and_the_smallest_weights():
    """prob40 reaches from 2^16 to 2^-48 (less is taken for that), prob24 from 1 to 2^-149 in steps; what is more is
    refused, not cut."""
    flat, spec = flat_weights([[(1, 2.0**16), (2, 2.0**-48), (3, 1e-30)]]), spec_of("prob40", 100)
    least = np.float32(2 ** (16 - 65535 / 1024))
    assert decode(encode(flat, spec), 1, spec).values.tolist() == [2.0**16, least, least]
    with pytest.raises(MismatchError, match=r"prob40 holds weights up to 65536, got 65600\.0; draw more rounds"):
        encode(flat_weights([[(1, 65600.0)]]), spec)
    falling, spec = flat_weights([[(i, 2.0 ** (-149 * i / 60)) for i in range(61)]]), spec_of("prob24", 100)
    found = decode(encode(falling, spec), 1, spec).values
    np.testing.assert_allclose(np.log2(found), np.log2(falling.values), atol=0.05)  # 2.2 % √octaves, of 2.5
    with pytest.raises(MismatchError, match=r"prob24 holds probabilities, got a weight of 1\.5; use prob40"):
        encode(flat_weights([[(1, 1.5)]]), spec)


def weighed(flat, temperature=0.5):
    """The same counts as draws of q ∝ p^t, of probability 1/2 each."""
    logs, entropy = np.full(len(flat.ids), -1, np.float32), np.ones(len(flat.sizes), np.float32)
    return replace(flat, importance=Importance(log2_p=logs, entropy=entropy, temperature=temperature))


@pytest.mark.parametrize("name", COUNTS + DRAWS)
@pytest.mark.parametrize("drawn", [{1: 4}, {1: 5, 2: 1}, {}])
def test_counts_that_are_not_all_of_the_rounds_are_not_written(name, drawn):
    """Whatever else is stored of a draw, the reader knows from the rounds where a position ends."""
    weighing = {"temperature": 0.5, "normalize": True} if name in DRAWS else {}
    flat = flat_counts([{1: 5}, drawn], 5)
    with pytest.raises(MismatchError, match=rf"position 1 sum to {sum(drawn.values())}, but rounds=5"):
        encode(weighed(flat) if name in DRAWS else flat, spec_of(name, 100, 5, **weighing))


@pytest.mark.parametrize("name", [name for name in COUNTS + DRAWS if CODECS[name].max_rounds == 2**20])
def test_a_row_of_more_than_two_to_the_31_draws_survives(name):
    """2,100 positions of 2^20 rounds each: sums over a row do not fit in 32 bits."""
    weighing = {"temperature": 0.5, "normalize": True} if name in DRAWS else {}
    flat, spec = flat_counts([{7: 2**20 - 1, 9: 1}] * 2100, 2**20), spec_of(name, 100, 2**20, **weighing)
    found = decode(encode(weighed(flat) if name in DRAWS else flat, spec), 2100, spec)
    assert_same(by_id(replace(found, importance=None)), flat)


@pytest.mark.parametrize("name", CODECS)
def test_arrays_come_back_in_the_types_that_flat_targets_have(name):
    """uint32 ids and counts, float32 weights, int64 sizes, whatever words a codec packs them into."""
    flat, weighing = flat_counts([{7: 3, 9: 2}] * 3, 5), {}
    if name in DRAWS:
        flat, weighing = weighed(flat), {"temperature": 0.5, "normalize": True}
    elif name not in COUNTS:
        flat = replace(flat, rounds=None, values=(flat.values / 5).astype(np.float32))
    if CODECS[name].holds == "sorted curves":
        flat = flat.take(np.arange(0))
        flat, weighing = replace(flat, curve=np.zeros((0, 2), np.float32)), {"edges": [0, 1, 100]}
    spec = spec_of(name, 100, flat.rounds, **weighing)
    found = decode(encode(flat, spec), len(flat.sizes), spec)
    values = np.float32 if flat.rounds is None else np.uint32
    assert (found.ids.dtype, found.values.dtype, found.sizes.dtype) == (np.uint32, values, np.int64)
    if found.importance is not None:
        assert (found.importance.log2_p.dtype, found.importance.entropy.dtype) == (np.float32, np.float32)


def test_an_id_twice_is_refused():
    """Counts of one id must be added up by whoever drew them."""
    flat = FlatTargets(
        ids=np.array([3, 9, 3], np.uint32),
        values=np.array([1, 3, 1], np.uint32),
        sizes=np.array([3]),
        rounds=5,
    )
    with pytest.raises(MismatchError, match="position 0 has id 3 twice"):
        encode(flat, spec_of("raw24", 100, 5))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("weight", [-0.5, np.nan, np.inf])
def test_weights_that_are_no_weights_are_refused(name, weight):
    """Negative and non-finite weights are named with their position."""
    with pytest.raises(MismatchError, match="supervised position 1 has weight"):
        encode(flat_weights([[(0, 0.5)], [(1, weight)]]), spec_of(name, 10))


def test_prob24_refuses_weights_above_one():
    """Its first ratio is to 1; importance weights above 1 belong in prob40."""
    with pytest.raises(MismatchError, match=r"prob24 holds probabilities, got a weight of 1\.5; use prob40"):
        encode(flat_weights([[(1, 1.5)]]), spec_of("prob24", 10))


def test_more_entries_than_sixteen_bits_count_are_refused():
    """The size of a position is stored in two bytes."""
    with pytest.raises(MismatchError, match="65536 entries, the format holds 65535"):
        encode(flat_weights([[(i, 0.5) for i in range(65536)]]), spec_of("prob40", 2**20))


def test_a_row_must_fit_its_mask_and_vocabulary():
    """One target per supervised position, input ids below the number of logits."""
    flat, spec = flat_counts([{1: 5}], 5), spec_of("raw24", 10, 5)
    with pytest.raises(MismatchError, match="targets for 1 positions, but 2 are supervised"):
        encode_row(np.zeros(3, np.uint32), flat, np.ones(3, bool), spec)
    with pytest.raises(MismatchError, match=r"input ids span 0\.\.10, but logit_width=10"):
        encode_row(np.array([0, 10]), flat, np.ones(2, bool), spec)


# --- damaged bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("03000c e70300", "need 10, the counts sum to 5"),
        ("03000c e70300 070010 010010", "need 10, the counts sum to 15"),
        ("03000c e70300 07000c", "from supervised position 1 on"),
        ("030014 070010 070008", "from supervised position 0 on"),
        ("e7030c 030000 070010", "position 0 has id 3 after 999, ids must ascend"),
        ("07000c 070000 070010", "position 0 has id 7 after 7"),
        ("070010 e9030c ea0300", "position 1 has id 1001, but logit_width=1000"),
        ("03000c e70300 0700", "8 bytes are no whole number of 3-byte words"),
        ("", "need 10, the counts sum to 0"),
    ],
)
def test_damaged_counts_are_named(data, words):
    """Sums, order and range are checked for every position, and the first bad one is named."""
    with pytest.raises(FormatError, match=words):
        decode(bytes.fromhex(data), 2, spec_of("raw24", 1000, 5))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("0200 0000", "4 bytes cannot hold 3 sizes"),
        ("0200 0000 0100 e703000044", "the sizes sum to 3, 1 entries follow"),
        ("0000 0000 ffff", "the sizes sum to 65535, 0 entries follow"),
        ("0100 0000 0000 e803000044", "position 0 has id 1000, but logit_width=1000"),
        ("0100 0000 0000 e7030000", "4 bytes are no whole number of 5-byte words"),
    ],
)
def test_damaged_weights_are_named(data, words):
    """Sizes must fill the bytes exactly; nothing is allocated from a size that is not covered."""
    with pytest.raises(FormatError, match=words):
        decode(bytes.fromhex(data), 3, spec_of("prob40", 1000))


def test_prob24_refuses_weights_below_every_float():
    """Ten full steps of 15.75 octaves would be 2^-157."""
    data = bytes.fromhex("0a00" + "0000fe" * 10)
    with pytest.raises(FormatError, match=r"position 0 has a weight below 2\^-150"):
        decode(data, 1, spec_of("prob24", 1000))


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(list(CODECS)),
    data=st.binary(max_size=60),
    positions=st.integers(0, 5),
    rounds=st.integers(1, 64),
)
def test_any_bytes_decode_or_are_refused(name, data, positions, rounds):
    """No bytes crash a decoder, and bytes it accepts are exactly what the encoder writes for counts."""
    weighing = {"temperature": 0.5, "normalize": True} if name in DRAWS else {}
    spec = spec_of(name, 5000, None if name in WEIGHTS else rounds, **weighing)
    try:
        flat = decode(data, positions, spec)
    except SparseKDError:
        return
    assert len(flat.sizes) == positions
    assert (flat.weights > 0).all()
    if name == "split":  # zstd has many frames for the same content
        assert_same(decode(encode(flat, spec), positions, spec), flat)
    elif name in COUNTS:
        assert encode(flat, spec) == data


def test_a_damaged_row_is_named():
    """A short block and an input id beyond the vocabulary."""
    spec, supervised = spec_of("raw24", 1000, 5), np.zeros(2, bool)
    with pytest.raises(FormatError, match="block has 3 bytes, its 2 input ids need 4"):
        decode_row(b"123", 2, supervised, spec)
    with pytest.raises(FormatError, match="input id 1000, but logit_width=1000"):
        decode_row(bytes.fromhex("0000 e803"), 2, supervised, spec)
