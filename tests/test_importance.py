"""Importance draws on their way from the teacher to a student: one cache, two weightings."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from conftest import SEQ_LEN

import sparsekd as skd
from sparsekd import models
from sparsekd.cache import verify
from sparsekd.capture import capture
from sparsekd.errors import RecipeError
from sparsekd.recompute import recompute
from sparsekd.train import train

SAMPLER = {"name": "random_sampling", "rounds": 20, "temperature": 0.5}
TINY = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32}


def run(world, out, sampler, **settings):
    settings = {"rows": world.rows, "teacher": world.teacher, "device": "cpu", "threads": 1} | settings
    capture(out=out, sampler=sampler, **settings)
    return str(out)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("importance") / "cache", SAMPLER, limit_rows=32)


@pytest.mark.parametrize("normalize", [True, False])
def test_both_weightings_are_read_from_one_cache(world, cache, normalize):
    """Row by row, what the reader gives is what the sampler gives for the same normalize, to a few percent."""
    reader, model = skd.CacheReader(cache, normalize=normalize), models.open_model(world.teacher, device="cpu")
    for index in (0, 7, 31):
        row = reader[index]
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0, :-1]
        keys = {"rows": torch.full((SEQ_LEN - 1,), index), "positions": torch.arange(SEQ_LEN - 1)}
        settings = {key: SAMPLER[key] for key in ("rounds", "temperature")}
        drawn = skd.sample(logits, "random_sampling", normalize=normalize, **settings, **keys).densify(300)
        stored = skd.SparseTargets.of(row.targets).densify(300)
        supervised = torch.from_numpy(row.supervised[1:])
        close = torch.isclose(stored, drawn, rtol=0.06, atol=1e-6)[supervised]
        assert close.float().mean() > 0.999  # logits of another batch shape may move a draw
        sums = stored.sum(-1)[supervised]
        assert torch.allclose(sums, torch.ones(len(sums)), atol=1e-5) == normalize


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_systematic_draws_are_those_of_the_sampler(world, tmp_path, temperature):
    """Counts and importance draws alike: a captured row holds what `sample` draws by that name, not by another."""
    sampler = {"name": "systematic", "rounds": 20, "temperature": temperature, "order": "ids"}
    with skd.CacheReader(run(world, tmp_path / "c", sampler, limit_rows=16)) as reader:
        row, spec = reader[5], reader.spec
    assert spec.sampler["unbiased"]
    model = models.open_model(world.teacher, device="cpu")
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0, :-1]
    keys = {"rows": torch.full((SEQ_LEN - 1,), 5), "positions": torch.arange(SEQ_LEN - 1)}
    stored, supervised = skd.SparseTargets.of(row.targets).densify(300), torch.from_numpy(row.supervised[1:])
    close = {}
    for name in ("systematic", "random_sampling"):
        drawn = skd.sample(logits, name, rounds=20, temperature=temperature, normalize=False, **keys).densify(300)
        close[name] = torch.isclose(stored, drawn, rtol=0.06, atol=1e-6).all(-1)[supervised].float().mean()
    assert close["systematic"] > 0.95  # positions; logits of another batch shape may move a draw
    assert close["random_sampling"] < 0.5


def test_plain_weights_are_unbiased_and_normalised_ones_are_not(world, tmp_path):
    """One draw each, t = 0.5: over all positions the mean plain sum is 1 within 4 standard errors; normalised, the
    probability of the drawn ids themselves is missed: the weight is always 1."""
    path = run(world, tmp_path / "one", SAMPLER | {"rounds": 1}, limit_rows=64)
    plain = np.concatenate([skd.CacheReader(path, normalize=False).flat(row).weights for row in range(64)])
    assert abs(plain.mean() - 1) < 4 * plain.std() / len(plain) ** 0.5
    assert plain.std() > 0.3
    assert (skd.CacheReader(path, normalize=True).flat(0).weights == 1).all()


def test_a_reader_in_a_worker_keeps_its_weighting(cache):
    """Pickled readers read the same weights; without normalize they are as captured."""
    plain = skd.CacheReader(cache, normalize=False)
    again = pickle.loads(pickle.dumps(plain))
    assert np.array_equal(again.flat(3).weights, plain.flat(3).weights)
    assert not np.array_equal(skd.CacheReader(cache).flat(3).weights, plain.flat(3).weights)


def test_a_cache_with_one_weighting_refuses_the_choice(world, tmp_path):
    """Counts of draws from p have no other weighting; reader and train say so."""
    for normalize in (True, False):
        with pytest.raises(RecipeError, match=r"\(codec split\) has one only"):
            skd.CacheReader(world.cache, normalize=normalize)
    with pytest.raises(RecipeError, match=r"normalize=false .* sampler\.temperature"):
        train(out=tmp_path / "s", cache=world.cache, student=TINY, normalize=False, device="cpu")
    with pytest.raises(RecipeError, match="normalize=true is about a cache's targets"):
        train(out=tmp_path / "s", rows=world.rows, method="ce", student=TINY, normalize=True, device="cpu")


def test_a_codec_that_cannot_hold_the_draws_is_refused(world, tmp_path):
    """Counts alone lose what weighs them; the codecs that would do are named, the best first."""
    with pytest.raises(
        RecipeError, match="gives importance draws; take split_ratio or split_ratio_unbiased or ratio32"
    ):
        run(world, tmp_path / "c", SAMPLER, codec="raw24")
    with pytest.raises(RecipeError, match=r"codec=ratio32 holds importance draws, .* gives counts; take raw24"):
        run(world, tmp_path / "c", SAMPLER | {"temperature": 1.0}, codec="ratio32")


@pytest.mark.parametrize("codec", ["split_ratio", "split_ratio_unbiased", "ratio32"])
def test_the_cache_is_sound_and_made_again_bit_for_bit(world, tmp_path, cache, codec):
    """verify finds nothing, and random rows drawn again from the teacher equal the stored ones."""
    path = cache if codec == "split_ratio" else run(world, tmp_path / "c", SAMPLER, limit_rows=32, codec=codec)
    assert verify(path).problems == []
    with skd.CacheReader(path) as reader:
        assert reader.spec.codec["name"] == codec
        assert recompute(reader, world.teacher, rows=5, device="cpu")["identical"] == 5


@pytest.mark.parametrize("normalize", [True, False])
def test_a_uniform_proposal_runs_end_to_end(world, tmp_path, normalize):
    """t = 0: ids are drawn uniformly, the cache opens, a student takes its steps; whether it learns is its affair."""
    path = run(world, tmp_path / "cache", SAMPLER | {"temperature": 0.0, "normalize": normalize}, limit_rows=32)
    spread = [len(set(skd.CacheReader(path).flat(row).ids.tolist())) for row in range(4)]
    assert min(spread) > 150  # of 300 ids, in 31 positions of 20 draws
    settings = {"cache": path, "student": TINY, "eval_rows": world.rows, "device": "cpu", "progress": False}
    metrics = train(out=tmp_path / "s", max_steps=6, batch_size=4, learning_rate=1e-2, **settings)
    assert metrics["steps"] == 6
    assert np.isfinite(metrics["train_loss"])


@pytest.mark.parametrize("rounds", [200, 1000])
def test_more_than_128_rounds_keep_their_counts(world, tmp_path, rounds):
    """N beyond the paper's 7 bits: counts sum to N exactly, plain (split) and with ratios (split_ratio)."""
    for temperature, codec in ((1.0, "split"), (0.9, "split_ratio")):
        sampler = {"name": "random_sampling", "rounds": rounds, "temperature": temperature}
        reader = skd.CacheReader(run(world, tmp_path / codec, sampler, limit_rows=8))
        assert reader.spec.codec["name"] == codec
        flat = reader.flat(5)
        assert flat.values.max() > 64
        assert (np.bincount(flat.positions, weights=flat.values) == rounds).all()
