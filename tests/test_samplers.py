"""Samplers: the laws each must obey, run over the dict of samplers."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

import sparsekd as skd
from sparsekd import inversion, rng, samplers
from sparsekd.errors import ModelError, RecipeError

# Every sampler with the settings its laws are checked at. A new sampler is tested by being listed here.
VARIANTS = {
    "rs1": ("random_sampling", {"rounds": 1}),
    "rs12": ("random_sampling", {"rounds": 12}),
    "rs50": ("random_sampling", {"rounds": 50}),
    "rs50_flatter": ("random_sampling", {"rounds": 50, "temperature": 0.8, "normalize": False}),
    "rs50_peaked": ("random_sampling", {"rounds": 50, "temperature": 1.2, "normalize": False}),
    "rs50_normalized": ("random_sampling", {"rounds": 50, "temperature": 0.8}),
    "rs50_uniform": ("random_sampling", {"rounds": 50, "temperature": 0.0, "normalize": False}),
    "sys1": ("systematic", {"rounds": 1}),
    "sys25": ("systematic", {"rounds": 25}),
    "sys25_flatter": ("systematic", {"rounds": 25, "temperature": 0.8}),
    "sys25_normalized": ("systematic", {"rounds": 25, "temperature": 0.8, "normalize": True}),
    "top12": ("top_k", {"k": 12}),
    "top_p": ("top_p", {"p": 0.9, "k": 40}),
    "full": ("full", {}),
}
UNBIASED = [name for name, (sampler, p) in VARIANTS.items() if samplers.is_unbiased(sampler, p)]


def test_every_sampler_has_a_variant():
    """The laws run over all of SAMPLERS: one that is not listed above fails here."""
    assert {sampler for sampler, _ in VARIANTS.values()} == set(skd.SAMPLERS)


def zipf_logits(vocab_size: int, peaked: bool) -> torch.Tensor:
    """A shuffled Zipf row: exponent 1.5 (entropy about 2 nats) or 0.3 (nearly flat)."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    return -(1.5 if peaked else 0.3) * (order + 1.0).log()


GROUPS, ALONE = 32, 16


def groups_of(p: torch.Tensor) -> torch.Tensor:
    """[V] group of each id: the 16 likeliest alone, the others in 16 stripes, so that few are too rare to judge."""
    group = ALONE + torch.arange(len(p)) % (GROUPS - ALONE)
    group[p.topk(ALONE).indices] = torch.arange(ALONE)
    return group


@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [300, 32768, 262144])
@pytest.mark.parametrize(
    "variant", [name for name in UNBIASED if name not in ("full", "rs50_uniform", "sys1", "sys25_flatter")]
)
def test_unbiased(variant, vocab_size, dtype, peaked):
    """The mean of many draws is within 5 standard errors of p, for each of 32 groups of ids (paper, A.6).

    The standard error is the sample's own, over positions with the same logits and different keys.
    """
    sampler, parameters = VARIANTS[variant]
    logits = zipf_logits(vocab_size, peaked).to(dtype)
    p, positions = oracles.blocked_cdf_law(logits), min(4000, 2**27 // vocab_size)
    group, sums = groups_of(p), []
    for start in range(0, positions, 256):
        keys = torch.arange(start, min(start + 256, positions))
        targets = skd.sample(logits.expand(len(keys), -1), sampler, seed=7, positions=keys, **parameters)
        sums.append(
            torch.zeros(len(keys), GROUPS).double().scatter_add_(1, group[targets.ids], targets.weights.double())
        )
    estimates = torch.cat(sums)
    truth = torch.zeros(GROUPS).double().scatter_add_(0, group, p)
    judged = truth * parameters["rounds"] * positions >= 20  # rarer groups are Poisson: 5 sigma says nothing there
    assert truth[judged].sum() > 0.6
    error = estimates.std(0) / math.sqrt(positions)
    assert ((estimates.mean(0) - truth).abs() <= 5 * error)[judged].all()


def shuffled(vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_ids_is_unbiased(seed, temperature):
    """Systematic draws over the vocabulary in another order: the mean of 20,000 is p, id by id, within 5 errors."""
    logits, order = torch.randn(30, generator=torch.Generator().manual_seed(seed)), shuffled(30, seed)
    settings = {"rounds": 5, "temperature": temperature, "order": order}
    dense = skd.sample(logits.expand(20000, -1), "systematic", **settings).densify(30).double()
    assert ((dense.mean(0) - logits.double().softmax(-1)).abs() <= 5 * dense.std(0) / math.sqrt(20000)).all()
    assert (dense.std(0) > 0.01).all()  # so the errors that are allowed are small ones


def test_an_order_by_its_twin():
    """Counts are those of a walk over the ids in that order; ids come back ascending, padding behind them."""
    logits, order = 2 * torch.randn(40, 90, generator=torch.Generator().manual_seed(0)), shuffled(90)
    keys = rng.Keys(seed=3, rows=torch.zeros(40, dtype=torch.int64), positions=torch.arange(40))
    drawn = skd.sample(logits, "systematic", rounds=30, seed=3, order=order)
    counts = (drawn.densify(90) * 30).round().long()
    for row, u, p in zip(counts, keys.uniforms(1)[:, 0].tolist(), logits.double().softmax(-1), strict=True):
        assert row[order].tolist() == oracles.systematic_plain(p[order].tolist(), u, 30)
    for ids, weights in zip(drawn.ids, drawn.weights, strict=True):
        kept = int((weights > 0).sum())
        assert (weights[:kept] > 0).all()
        assert (ids[:kept].diff() > 0).all()
        assert (ids[kept:] == 0).all()
    assert not torch.equal(
        counts, (skd.sample(logits, "systematic", rounds=30, seed=3).densify(90) * 30).round().long()
    )
    same = skd.sample(logits, "systematic", rounds=30, seed=3, order=torch.arange(90))
    assert torch.equal(same.densify(90), skd.sample(logits, "systematic", rounds=30, seed=3).densify(90))


def test_importance_draws_keep_an_orders_ids_together():
    """ids, counts and log2 p of q ∝ p^t in an order: weighed, they are the targets of `sample` in that order."""
    logits, order = 2 * torch.randn(40, 90, generator=torch.Generator().manual_seed(0)), shuffled(90)
    settings = {"rounds": 20, "temperature": 0.7, "order": order}
    draws = samplers.sample_importance(logits, "systematic", **settings)
    kept = draws.counts > 0
    truth = logits.double().log_softmax(-1).gather(-1, draws.ids) / math.log(2)
    torch.testing.assert_close(draws.log2_p[kept], truth[kept], atol=1e-6, rtol=0)
    drawn = skd.sample(logits, "systematic", **settings)
    torch.testing.assert_close(draws.targets(normalize=False).densify(90), drawn.densify(90))


@pytest.mark.parametrize(
    ("sampler", "order", "words"),
    [
        ("random_sampling", torch.arange(10), "order is for systematic, .*; random_sampling has no use for it"),
        ("systematic", torch.arange(9), r"order has shape \(9,\); it must hold each of the ids 0 to 9 once"),
        ("systematic", torch.arange(10)[None], r"order has shape \(1, 10\); it must hold"),
        ("systematic", torch.zeros(10, dtype=torch.int64), "must hold each of the ids 0 to 9 once"),
    ],
)
def test_an_order_that_is_none_is_refused(sampler, order, words):
    with pytest.raises(RecipeError, match=words):
        skd.sample(torch.zeros(1, 10), sampler, order=order)


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.3])
@pytest.mark.parametrize("sampler", samplers.POINTS)
def test_other_proposals_are_unbiased(sampler, temperature):
    """q ∝ p^t with plain weights, down to the uniform one (t = 0): shown on 30 ids, where 20,000 positions suffice."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0))
    settings = {"rounds": 5, "temperature": temperature, "normalize": False}
    dense = skd.sample(logits.expand(20000, -1), sampler, **settings).densify(30).double()
    assert ((dense.mean(0) - logits.double().softmax(-1)).abs() <= 5 * dense.std(0) / math.sqrt(20000)).all()


def test_normalized_importance_weights_are_biased():
    """Self-normalised weights (section 3.4) at t = 0.8 are off by O(1/N): is_unbiased rightly denies them."""
    assert not samplers.is_unbiased("random_sampling", {"rounds": 2, "temperature": 0.5})
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    targets = skd.sample(logits.expand(40000, -1), "random_sampling", rounds=2, temperature=0.2)
    error = (targets.densify(4).mean(0) - logits[0].softmax(-1)).abs().max()
    assert error > 0.02


@pytest.mark.parametrize("temperature", [0.0, 0.5, 0.99, 1.2, 2.0])
def test_importance_draws_have_all_that_weighs_them(temperature):
    """log2 p, and the Rényi entropy H with p/q = (2^H p)^(1-t), against float64 by definition; masked ids are out."""
    logits = 3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = -torch.inf
    draws = samplers.sample_importance(logits, rounds=20, temperature=temperature)
    p = logits.double().softmax(-1)
    q = torch.where(p > 0, p**temperature, 0)
    q /= q.sum(-1, keepdim=True)
    kept = draws.counts > 0
    assert (draws.counts.sum(-1) == 20).all()
    torch.testing.assert_close(draws.log2_p[kept], p.gather(-1, draws.ids)[kept].log2(), atol=1e-6, rtol=0)
    truth = torch.where(p > 0, p**temperature, 0).sum(-1).log2() / (1 - temperature)
    torch.testing.assert_close(draws.entropy, truth, atol=2e-6 / abs(1 - temperature), rtol=0)
    plain = draws.targets(normalize=False)
    worth = draws.counts / 20 * (p / q).gather(-1, draws.ids).nan_to_num()
    torch.testing.assert_close(plain.weights, worth.float() * kept, rtol=3e-6, atol=0)
    normalised = skd.sample(logits, "random_sampling", rounds=20, temperature=temperature)
    torch.testing.assert_close(normalised.densify(300), (plain.densify(300).T / plain.mass()).T, rtol=3e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sum_of_weights(variant):
    """Σ weights is what each docstring says: 1, 1 on average, or the mass that was kept."""
    sampler, parameters = VARIANTS[variant]
    logits = 2 * torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    targets = skd.sample(logits, sampler, **parameters)
    p, mass = logits.softmax(-1), targets.mass()
    if sampler == "top_k":
        torch.testing.assert_close(mass, p.topk(12).values.sum(-1))
    elif sampler == "top_p":
        kept = p.topk(40).values.cumsum(-1)
        reached = kept[:, -1] >= 0.9
        assert (mass[reached] >= 0.9 - 1e-6).all()
        torch.testing.assert_close(mass[~reached], kept[~reached, -1])
    elif (samplers.default_parameters(sampler) | parameters).get("normalize", True) or "temperature" not in parameters:
        torch.testing.assert_close(mass, torch.ones(400))
    else:
        assert abs(mass.mean() - 1) < 5 * mass.std() / 20


@pytest.mark.parametrize("variant", [name for name, (sampler, _) in VARIANTS.items() if sampler in samplers.POINTS])
def test_counts_are_integers_of_distinct_ids(variant):
    """At temperature 1 weights * rounds are integers that sum to rounds; ids are distinct and ascending."""
    sampler, parameters = VARIANTS[variant]
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    targets = skd.sample(logits, sampler, **parameters)
    for ids, weights in zip(targets.ids, targets.weights, strict=True):
        kept = ids[weights > 0]
        assert (kept.diff() > 0).all()
    if samplers.count_rounds(sampler, parameters):
        counts = targets.weights * parameters["rounds"]
        torch.testing.assert_close(counts, counts.round(), atol=1e-5, rtol=0)
        assert (counts.round().sum(-1) == parameters["rounds"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_position_depends_on_its_key_and_logits_only(variant, dtype):
    """Batch size, order and neighbours change nothing; another seed, row or position does."""
    sampler, parameters = VARIANTS[variant]
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows, positions = torch.arange(64) // 8 + 2**33, torch.arange(64) % 8
    whole = skd.sample(logits, sampler, seed=5, rows=rows, positions=positions, **parameters).densify(1000)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    for part in (shuffled[:1], shuffled[1:20], shuffled[20:]):
        alone = skd.sample(logits[part], sampler, seed=5, rows=rows[part], positions=positions[part], **parameters)
        assert torch.equal(alone.densify(1000), whole[part])
    if sampler in samplers.POINTS:
        for change in (
            {"seed": 6},
            {"seed": 5 + 2**32},
            {"rows": rows + 2**32},
            {"positions": positions + 8},
        ):
            keys = {"seed": 5, "rows": rows, "positions": positions} | change
            assert not torch.equal(skd.sample(logits, sampler, **keys, **parameters).densify(1000), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_change_nothing(variant, monkeypatch):
    """One position at a time gives the same targets, though each chunk then has a width of its own."""
    sampler, parameters = VARIANTS[variant]
    logits = torch.logspace(-1, 1, 30)[:, None] * torch.randn(30, 100, generator=torch.Generator().manual_seed(3))
    whole = skd.sample(logits, sampler, **parameters)
    monkeypatch.setitem(inversion.CHUNK_BYTES, "cpu", 1)
    parts = skd.sample(logits, sampler, **parameters)
    assert torch.equal(parts.ids, whole.ids)
    assert torch.equal(parts.weights, whole.weights)


@pytest.mark.parametrize("vocab_size", [64, 300, 4096 + 17, 131072])
def test_inverse_cdf_law_on_a_grid(vocab_size):
    """On a grid of 2^18 uniforms each id is hit in proportion to its float64 mass: cumulative laws within 1e-7.

    This is the exact law of the two-level inversion, without Monte Carlo; one float32 cumulative sum would fail.
    """
    logits = 4 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    grid = (torch.arange(2**18, dtype=torch.float64) + 0.5) / 2**18
    mass = inversion.in_blocks((logits - logits.max()).exp()[None])
    hits = torch.bincount(inversion.invert(mass, grid[None])[0], minlength=vocab_size).double() / 2**18
    # Differences of the cumulative laws at id boundaries: at most half a grid step by rounding to the grid.
    gap = (hits.cumsum(0) - logits.double().softmax(-1).cumsum(0)).abs().max()
    assert gap <= 0.5 / 2**18 + 1e-7


def every_systematic(p: torch.Tensor, rounds: int, grid: int) -> torch.Tensor:
    """[grid, V] counts of systematic draws at u = (m + 1/2) / grid: its whole law, without Monte Carlo."""
    u = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    points = (u[:, None] + torch.arange(rounds)) / rounds
    mass = inversion.in_blocks(p.float()[None]).expand(grid, -1, -1)
    ids, counts = inversion.merge_draws(inversion.invert(mass, points))
    return torch.zeros(grid, len(p), dtype=torch.int64).scatter_add_(1, ids, counts)


@pytest.mark.parametrize("rounds", [1, 7, 25, 300])
@pytest.mark.parametrize("order", [None, 1, 2])
def test_systematic_law(rounds, order):
    """Over all u: E[count] = N p, Var = f (1 - f) with f = frac(N p), every count is N p rounded down or up.

    In any order of the ids: what the order changes is which ids come together, never an id's own law.
    """
    p, grid = zipf_logits(300, True).double().softmax(-1), 1024
    if order is not None:
        p = p[torch.randperm(300, generator=torch.Generator().manual_seed(order))]
    counts, wanted = every_systematic(p, rounds, grid), rounds * p
    assert (counts.sum(-1) == rounds).all()
    near = 1e-5 * rounds  # float32 masses: an id whose N p is this close to an integer may be taken for it
    assert (counts >= (wanted - near).floor()).all()
    assert (counts <= (wanted + near).ceil()).all()
    # An indicator of an interval, averaged over a grid, is off by at most one grid step at each end.
    f = wanted.frac()
    assert ((counts.double().mean(0) - wanted).abs() <= 2 / grid + near).all()
    assert ((counts.double().var(0, correction=0) - f * (1 - f)).abs() <= 4 / grid + near).all()
    if rounds > 1:  # draws with replacement do vary more, or this test could not tell the two apart
        assert (f * (1 - f)).sum() < 0.9 * (wanted * (1 - p)).sum()


def test_systematic_is_exact_where_every_expected_count_is_whole():
    """N p integer for each id: no variance at all."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(500, -1)
    dense = skd.sample(logits, "systematic", rounds=16).densify(4)
    assert torch.equal(dense, torch.tensor([[0.5, 0.25, 0.125, 0.125]]).expand(500, -1))


def test_systematic_by_hand_and_by_its_twin():
    """p = 0.5, 0.3, 0.2 with N = 5: points u/5 + 0, .2, .4, .6, .8 give 3, 1, 1 at u = 0.2 and 2, 2, 1 at u = 0.7."""
    by_hand = {0.2: [3, 1, 1], 0.7: [2, 2, 1]}
    for u, counts in by_hand.items():
        assert oracles.systematic_plain([0.5, 0.3, 0.2], u, 5) == counts
    logits = 2 * torch.randn(40, 90, generator=torch.Generator().manual_seed(0))
    keys = rng.Keys(seed=3, rows=torch.zeros(40, dtype=torch.int64), positions=torch.arange(40))
    drawn = (samplers.systematic(logits, keys, rounds=30).densify(90) * 30).round().long()
    for row, u, p in zip(drawn, keys.uniforms(1)[:, 0].tolist(), logits.double().softmax(-1), strict=True):
        assert row.tolist() == oracles.systematic_plain(p.tolist(), u, 30)


def test_extreme_uniforms_never_leave_the_support():
    """u = 0 and the largest u below 1 give ids with mass, though the row begins and ends with impossible ids."""
    logits = torch.full((2, 200), -torch.inf)
    logits[:, 70:75] = torch.tensor([0.0, -3.0, 1.0, -torch.inf, -20.0])
    edge = torch.tensor([[0.0, 1 - 2.0**-53]]).expand(2, 2)
    ids = inversion.invert(inversion.in_blocks(inversion.shifted_logits(logits).exp()), edge.double())
    assert ids[:, 0].eq(70).all()
    assert ids[:, 1].eq(74).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_impossible_ids_get_no_weight(variant):
    """Ids with logit -inf are never given weight, at any temperature."""
    sampler, parameters = VARIANTS[variant]
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = -torch.inf
    dense = skd.sample(logits, sampler, **parameters).densify(200)
    assert (dense[:, ::2] == 0).all()
    assert torch.isfinite(dense).all()


def test_top_k_is_softmax_topk():
    """Weights equal softmax(logits).topk(k): not renormalised; ties go to the lower id; k beyond V keeps V."""
    logits = torch.randn(30, 100, generator=torch.Generator().manual_seed(0))
    targets = skd.sample(logits, "top_k", k=7)
    torch.testing.assert_close(targets.weights, logits.softmax(-1).topk(7).values)
    assert torch.equal(targets.ids, logits.topk(7).indices)
    assert skd.sample(torch.zeros(1, 100), "top_k", k=3).ids.diff().gt(0).all()
    assert skd.sample(logits[:, :5], "top_k", k=12).ids.shape == (30, 5)


def test_top_p_keeps_the_fewest_that_reach_p():
    """By hand: 0.5, 0.3, 0.15, 0.05 at p = 0.8 keeps two, at p = 0.81 three."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, kept in ((0.79, 2), (0.81, 3), (1.0, 4)):
        assert (skd.sample(logits, "top_p", p=p, k=4).weights > 0).sum() == kept


def test_philox_known_answers():
    """The published Philox4x32-10 vectors, and the plain-Python twin on random counters."""
    mask = 0xFFFFFFFF
    known = {
        (0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (mask, mask, mask, mask, 2**64 - 1): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0x299F31D0A4093822): (
            0xD16CFE09,
            0x94FDCCEB,
            0x5001E420,
            0x24126EA1,
        ),
    }
    for (*counter, seed), words in known.items():
        assert tuple(map(int, rng.philox(tuple(torch.tensor(c) for c in counter), seed))) == words
        assert oracles.philox_plain(tuple(counter), seed) == words
    numbers = torch.randint(2**32, (100, 4), generator=torch.Generator().manual_seed(0))
    ours = torch.stack(rng.philox(tuple(numbers.T), 12345678901234567))
    for row, words in zip(numbers.tolist(), ours.T.tolist(), strict=True):
        assert oracles.philox_plain(tuple(row), 12345678901234567) == tuple(words)


def test_uniforms_are_uniform_and_prefixes_agree():
    """53-bit uniforms in [0, 1); asking for fewer draws gives a prefix, so rounds can be topped up."""
    keys = rng.Keys(seed=3, rows=torch.zeros(2000, dtype=torch.int64), positions=torch.arange(2000))
    u = keys.uniforms(51)
    assert torch.equal(keys.uniforms(20), u[:, :20])
    assert 0 <= u.min() < 1e-4 < 1 - 1e-4 < u.max() < 1
    histogram = torch.histc(u.float(), 100, 0, 1)
    chi2 = ((histogram - 1020) ** 2 / 1020).sum()
    assert chi2 < 99 + 5 * math.sqrt(2 * 99)


def test_uniforms_and_coins_are_words_of_their_counters():
    """53 bits of two words each, draw by draw, by the plain-Python twin: another version goes on with a cache."""
    keys = rng.Keys(seed=2**63 + 5, rows=torch.tensor([7, 2**33 + 1]), positions=torch.tensor([0, 2**32 - 2]))

    def unit(high, low):
        return ((high << 21) | (low >> 11)) / 2**53

    for drawn, coin, row, position in zip(keys.uniforms(5), keys.coins(), keys.rows, keys.positions, strict=True):
        key = (int(position), int(row) % 2**32, int(row) >> 32)
        pairs = [oracles.philox_plain((pair, *key), keys.seed) for pair in range(3)]
        assert drawn.tolist() == [unit(*words[at : at + 2]) for words in pairs for at in (0, 2)][:5]
        assert float(coin) == unit(*oracles.philox_plain((2**32 - 1, *key), keys.seed)[:2])


@pytest.mark.parametrize(
    ("sampler", "parameters", "words"),
    [
        ("nucleus", {}, "unknown sampler 'nucleus'; there are random_sampling, systematic, top_k"),
        ("top_k", {"rounds": 5}, "sampler top_k has no parameter 'rounds'; it has: k"),
        ("random_sampling", {"rounds": 0}, "sampler.rounds=0 is out of range: 1 to"),
        ("random_sampling", {"rounds": 2**20 + 1}, "sampler.rounds=1048577 is out of range: 1 to 1048576"),
        ("systematic", {"rounds": 4.5}, "sampler.rounds=4.5 is out of range: 1 to 1048576, whole numbers"),
        ("top_k", {"k": 2**16}, "sampler.k=65536 is out of range: 1 to 65535"),
        ("random_sampling", {"normalize": 0.5}, "sampler.normalize=0.5 is out of range"),
        ("systematic", {"temperature": float("nan")}, "sampler.temperature=nan is out of range: 0 to 10$"),
        ("top_p", {"p": 1.5}, "sampler.p=1.5 is out of range"),
    ],
)
def test_misuse_is_refused(sampler, parameters, words):
    with pytest.raises(RecipeError, match=words):
        skd.sample(torch.zeros(1, 10), sampler, **parameters)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler": "top_k", "temperature": 0.5}, "sampler top_k has no parameter 'rounds'"),
        ({"temperature": 11.0}, "sampler.temperature=11.0 is out of range: 0 to 10"),
        ({"temperature": 1.0}, r"at temperature=1 draws are from p itself .* take sample\("),
    ],
)
def test_importance_draws_that_are_none_are_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        samplers.sample_importance(torch.zeros(1, 10), rounds=5, **settings)


def test_logits_of_a_whole_batch_are_refused_with_the_way_out():
    """Draws are keyed by row and position: [B, L, V] has to say which they are."""
    with pytest.raises(ValueError, match=r"logits are \(2, 3, 5\), draws are made from \[N, V\]: give logits.flatten"):
        skd.sample(torch.zeros(2, 3, 5), "systematic")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_logits_that_are_not_finite_are_refused(sampler, bad):
    """A teacher that overflowed is not sampled from: `draw` marks the position, whoever reads what it drew refuses."""
    logits = torch.zeros(4, 100)
    logits[2, 3] = bad
    drawn = samplers.draw(logits, sampler)
    assert drawn.weights.isnan().any(-1).tolist() == [False, False, True, False]
    assert 0 <= int(drawn.ids.min()) <= int(drawn.ids.max()) < 100
    with pytest.raises(ModelError, match="NaN or inf at 1 of 4 positions"):
        skd.sample(logits, sampler)
