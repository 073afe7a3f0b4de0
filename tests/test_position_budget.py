"""Positions chosen by the teacher's entropy: the law, its unbiasedness, its bytes, and who refuses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEQ_LEN, folder_bytes

import sparsekd as skd
from sparsekd import models
from sparsekd.cache import verify
from sparsekd.capture import capture
from sparsekd.codec import FlatTargets, codec_spec, decode, encode
from sparsekd.codec_ints import encode_ints
from sparsekd.errors import FormatError, MismatchError, RecipeError
from sparsekd.inspect import describe_cache
from sparsekd.merge import merge
from sparsekd.packed import RowsReader
from sparsekd.position_budget import LAWS, PositionLaw, calibrate, entropies, inclusion, law_of
from sparsekd.recompute import recompute
from sparsekd.rng import Keys
from sparsekd.train import train

HALF = {"positions": 0.5, "positions_by": "entropy"}
TINY = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32}


def run(world, out, **settings):
    settings = {"sampler": {"name": "systematic", "rounds": 20}, "batch_size": 8, "shard_rows": 16} | settings
    return capture(rows=world.rows, teacher=world.teacher, out=out, device="cpu", **settings)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("budget") / "cache"
    run(world, out, limit_rows=64, **HALF)
    return str(out)


# --- the law --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", LAWS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_the_law_meets_its_share_and_stays_above_a_quarter_of_it(by, share):
    """Mean probability over the calibration's positions to 1e-4 (one of 20,000 a step up); extremes stay in bounds."""
    entropy = torch.from_numpy(np.random.default_rng(0).gamma(2, 1, size=20_000))
    law = calibrate(entropy, by, share)
    pi = inclusion(law.levels(entropy))
    assert float(pi.mean()) == pytest.approx(share, rel=1e-4)
    ends = inclusion(law.levels(torch.tensor([0.0, 1e-9, 12.0, 200.0])))
    assert float(torch.cat([pi, ends]).min()) >= share / 4 * 2 ** (-1 / 16)
    assert float(torch.cat([pi, ends]).max()) <= 1
    exact = (law.scale * LAWS[by](entropy)).clamp(share / 4, 1)
    assert float((pi / exact).log2().abs().max()) <= 1 / 16 + 1e-9
    rising = pi[entropy.argsort()].diff()
    assert bool(((rising >= 0) if by == "entropy" else (rising <= 0)).all())


def test_a_share_below_all_levels_is_refused():
    """The least π is a quarter of the share: of 2^-29 level 248, and a byte is stored."""
    entropy = torch.ones(10)
    assert int(calibrate(entropy, "entropy", 2**-29).levels(entropy).max()) <= 255
    with pytest.raises(
        RecipeError, match=r"positions=9.3\d*e-10 is too small a share for positions_by=entropy: at least"
    ):
        calibrate(entropy, "entropy", 2**-30)


def test_by_hand():
    """scale 0.25, entropies 2, 4, 9, 0: π = 1/2, 1, 1, share/4 = 1/8, levels 8, 0, 0, 24."""
    law = PositionLaw(by="entropy", share=0.5, scale=0.25)
    assert law.levels(torch.tensor([2.0, 4.0, 9.0, 0.0])).tolist() == [8, 0, 0, 24]
    uniform, sure = torch.zeros(1, 8), torch.tensor([[0.0] + [-torch.inf] * 7])
    assert entropies(torch.cat([uniform, sure])).tolist() == pytest.approx([np.log(8), 0])


@pytest.mark.parametrize("by", LAWS)
def test_the_gradient_summed_over_kept_positions_is_unbiased(by):
    """Over 3,000 seeds the mean of Σ kept share/π (q - t̂), over the share, is Σ all (q - p), within 5 standard errors;
    without the weights it is not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 12, generator=generator) * torch.tensor([0.3, 1, 2, 3, 5, 8])[:, None]
    p, q = logits.double().softmax(-1), torch.full((6, 12), 1 / 12, dtype=torch.float64)
    entropy = entropies(logits)
    law = calibrate(entropy, by, 0.5)
    levels, count = law.levels(entropy), 3000
    rows = torch.arange(count).repeat_interleave(6)
    keys = Keys(seed=3, rows=rows, positions=torch.arange(6).repeat(count))
    kept = law.kept(levels.repeat(count), keys)
    drawn = skd.sample(logits.repeat(count, 1), "systematic", rounds=7, seed=3, rows=rows, positions=keys.positions)
    pull = (q.repeat(count, 1) - drawn.densify(12).double()) * kept[:, None]
    for weights, fair in ((0.5 / inclusion(levels), True), (torch.ones(6), False)):
        sums = (pull * weights.repeat(count)[:, None]).view(count, 6, 12).sum(1) / 0.5
        error = sums.std(0) / count**0.5
        off = (sums.mean(0) - (q - p).sum(0)).abs() / error
        assert bool((off < 5).all()) == fair


# --- caches ---------------------------------------------------------------------------------------------


def test_a_cache_holds_the_law_the_share_and_the_exact_weights(world, cache):
    """Each kept position's weights sum to share/π of its own teacher's entropy; about half of them are kept."""
    reader, model = skd.CacheReader(cache), models.open_model(world.teacher, device="cpu")
    law = law_of(reader.spec.capture)
    assert (law.by, law.share, reader.spec.codec["share"]) == ("entropy", 0.5, 0.5)
    rows, kept, wanted, equal = RowsReader(world.rows), 0, 0, []
    for index in range(0, 64, 7):
        row, whole = reader[index], rows.batch(range(index, index + 1))
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0, :-1]
        scale = 0.5 / inclusion(law.levels(entropies(logits))).numpy()
        sums = row.targets.weights.sum(-1)[row.supervised[1:]]
        equal += np.isclose(sums, scale[row.supervised[1:]], rtol=1e-6).tolist()
        kept, wanted = kept + len(sums), wanted + int(whole.supervised[0, 1:].sum())
        assert not (row.supervised[1:] & ~whole.supervised[0, 1:].astype(bool)).any()
    assert np.mean(equal) > 0.98  # logits of another batch shape may move an entropy over a step
    share = reader.stats["positions"] / (64 * (SEQ_LEN - 1))
    assert share == pytest.approx(0.5, abs=0.06)
    assert abs(kept / wanted - 0.5) < 5 * 0.5 / wanted**0.5
    assert "50% kept, by the teacher's entropy" in describe_cache(cache)
    assert verify(cache).problems == []


@pytest.mark.parametrize(("codec", "temperature"), [("split_ratio_unbiased", 0.5), ("ratio32", 0.5), ("raw24", 1.0)])
def test_every_kind_of_draws_is_scaled(world, tmp_path, codec, temperature):
    """Self-normalised draws and counts: a position's weights sum to its scale, whatever the codec."""
    sampler = {"name": "random_sampling", "rounds": 20, "temperature": temperature}
    run(world, tmp_path / "c", limit_rows=16, sampler=sampler, codec=codec, positions=0.5, positions_by="certainty")
    reader = skd.CacheReader(tmp_path / "c")
    flat = reader.flat(5)
    sums = np.bincount(flat.positions, weights=flat.weights, minlength=len(flat.sizes))
    np.testing.assert_allclose(sums, flat.scale, rtol=1e-5)
    assert len(set(flat.scale.tolist())) > 1
    assert verify(tmp_path / "c").problems == []


def test_any_workers_and_restarts_make_the_same_bytes(world, cache, tmp_path):
    """Two shard ranges out of order, one after another; another batch size is another cache."""
    for part in ("2:4", "0:2"):
        run(world, tmp_path / "parts", limit_rows=64, shard_range=part, **HALF)
    assert folder_bytes(tmp_path / "parts") == folder_bytes(cache)
    with pytest.raises(MismatchError, match="seed"):
        run(world, tmp_path / "parts", limit_rows=64, seed=1, **HALF)


def test_the_same_seed_keeps_the_same_positions_under_every_law_that_is_likelier():
    """One coin a position: what is kept with probability π is kept with any larger one."""
    keys = Keys(seed=0, rows=torch.zeros(5000, dtype=torch.int64), positions=torch.arange(5000))
    law = PositionLaw(by="entropy", share=0.5, scale=1.0)
    few, many = law.kept(torch.full((5000,), 16), keys), law.kept(torch.full((5000,), 8), keys)
    assert bool((many | ~few).all())
    assert abs(float(few.double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 5000) ** 0.5
    assert abs(float(many.double().mean()) - 0.5) < 4 * (0.5 * 0.5 / 5000) ** 0.5


def test_rows_drawn_again_are_compared_with_their_weights(world, cache):
    """verify --teacher: the same targets, scales included, but for logits that another number of positions moved."""
    found = recompute(skd.CacheReader(cache), world.teacher, rows=6, device="cpu")
    assert found["rows"] == 6
    assert found["differing"] <= 0.02 * found["positions"]


def test_a_student_learns_from_it_and_other_losses_are_refused(world, cache, tmp_path):
    """Weights are in the targets: what mixes labels in, or rescales targets, would weigh positions wrongly."""
    settings = {"cache": cache, "student": TINY, "device": "cpu", "progress": False, "max_steps": 6, "batch_size": 8}
    assert np.isfinite(train(out=tmp_path / "s", **settings)["train_loss"])
    for name, value in (("ce_weight", 0.1), ("residual", "ghost"), ("method", "ce"), ("hard_ratio", 2.0)):
        with pytest.raises(RecipeError, match=f"{name}={value} needs every position to weigh alike"):
            train(out=tmp_path / "r", **settings | {name: value})


def test_what_cannot_be_weighed_is_refused(world, cache, tmp_path):
    run(world, tmp_path / "other", limit_rows=64, seed=1, **HALF)
    with pytest.raises(RecipeError, match="positions chosen by the teacher's entropy"):
        merge(caches=[cache, str(tmp_path / "other")], out=tmp_path / "both")
    for settings, words in (
        ({"positions_by": "entropy"}, "positions_by=entropy chooses among positions, and all are kept"),
        ({"positions_by": "length", "positions": 0.5}, "'length' is unknown; there are evenly, entropy, certainty"),
        ({"sampler": "sorted_curve", **HALF}, "sampler sorted_curve gives none"),
    ):
        with pytest.raises(RecipeError, match=words):
            run(world, tmp_path / "c", **settings)


# --- bytes ----------------------------------------------------------------------------------------------

FLAT = FlatTargets(
    ids=np.uint32([3, 999, 7]),
    values=np.uint32([4, 1, 5]),
    sizes=np.array([2, 1], np.int64),
    rounds=5,
    scale=np.array([0.5, 0.5 * 2**1.5]),
)
# levels 0 and 12 as a list of integers (a zstd frame with one raw block), then raw24 as ever
GOLDEN = "0b000000 28b52ffd 2002 110000 000c 03000c e70300 070010"


def spec_of(**changes):
    return codec_spec("raw24", logit_width=1000, rounds=5) | {"share": 0.5} | changes


def test_scales_have_the_bytes_that_the_format_page_shows():
    """By hand; weights are counts over rounds times the scale."""
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text().splitlines()
    shown = ["".join(line.split()[1:]) for line in page if line.startswith("levels   ")]
    assert shown == [GOLDEN.replace(" ", "")]
    assert encode(FLAT, spec_of()) == bytes.fromhex(GOLDEN)
    found = decode(bytes.fromhex(GOLDEN), 2, spec_of())
    np.testing.assert_allclose(found.scale, FLAT.scale, rtol=1e-15)
    np.testing.assert_allclose(found.weights, [0.4, 0.1, 0.5 * 2**1.5], rtol=1e-6)
    np.testing.assert_array_equal(found.take([1, 0]).weights, found.weights[[2, 0, 1]])


@pytest.mark.parametrize(
    ("levels", "words"), [([0], "position 1 has no scale"), ([0, 256], "position 1 has level 256 of its scale")]
)
def test_damaged_scales_are_named(levels, words):
    rest = bytes.fromhex("03000c e70300 070010")
    with pytest.raises(FormatError, match=words):
        decode(encode_ints([levels]) + rest, 2, spec_of())
    for end in range(len(bytes.fromhex(GOLDEN))):
        with pytest.raises(FormatError):
            decode(bytes.fromhex(GOLDEN)[:end], 2, spec_of())


def test_scales_that_do_not_fit_are_refused():
    for flat, spec, words in (
        (replace(FLAT, scale=np.array([0.5, 0.7])), spec_of(), r"position 1 has scale 0\.7; with share=0\.5"),
        (replace(FLAT, scale=np.array([0.4, 0.5])), spec_of(), "position 0 has scale"),
        (replace(FLAT, scale=None), spec_of(), "targets have no scales"),
        (FLAT, codec_spec("raw24", logit_width=1000, rounds=5), "was set up for none"),
    ):
        with pytest.raises(MismatchError, match=words):
            encode(flat, spec)
    with pytest.raises(RecipeError, match=r"share between 0 and 1, but share=1\.5"):
        encode(FLAT, spec_of(share=1.5))
