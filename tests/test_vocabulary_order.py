"""The order of a vocabulary by its head: a permutation, exact on every machine, likes together, less noise."""

from __future__ import annotations

import oracles
import pytest
import torch
from conftest import folder_bytes

import sparsekd as skd
from sparsekd import heads, models
from sparsekd import vocabulary_order as module
from sparsekd.cache import verify
from sparsekd.capture import capture
from sparsekd.errors import MismatchError, ModelError, RecipeError
from sparsekd.merge import merge
from sparsekd.recompute import recompute
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
    rows = head(600, 96).bfloat16()
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
    assert order_hash(vocabulary_order(rows)) == "2c02ed91ab9f7d611bd24208312fa45dcefdafd5f50a6e3992be885e2f829683"


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


# --- in a capture -----------------------------------------------------------------------------------------


def run(world, out, order=None, seed=0, **settings):
    sampler = {"name": "systematic", "rounds": 20} | ({} if order is None else {"order": order})
    shared = {"rows": world.rows, "teacher": world.teacher, "limit_rows": 24, "shard_rows": 8, "device": "cpu"}
    return capture(out=out, sampler=sampler, seed=seed, **shared | settings)


def test_the_cache_says_its_order_and_is_made_again_bit_for_bit(world, tmp_path):
    """By default the head's; its hash is in the spec, ids are the vocabulary's, and random rows come out the same."""
    spec = run(world, tmp_path / "c")["spec"]
    weight = models.open_model(world.teacher, device="cpu").get_output_embeddings().weight
    assert (spec["sampler"]["order"], spec["sampler"]["order_sha256"]) == ("head", order_hash(vocabulary_order(weight)))
    assert spec["sampler"]["unbiased"]
    assert verify(tmp_path / "c").problems == []
    with skd.CacheReader(tmp_path / "c") as reader:
        assert recompute(reader, world.teacher, rows=6, device="cpu")["identical"] == 6
        # A position's next token is found in its targets as often as in those drawn in the order of ids.
        run(world, tmp_path / "ids", order="ids")
        with skd.CacheReader(tmp_path / "ids") as plain:
            assert reader.stats["next_token_hits"] == pytest.approx(plain.stats["next_token_hits"], rel=0.1)
            assert "order_sha256" not in plain.spec.sampler
            assert reader.flat(3).ids.tolist() != plain.flat(3).ids.tolist()


def test_workers_find_the_order_for_themselves(world, tmp_path, monkeypatch):
    """Ranges, ranks, a lost shard: the same bytes, with no file of the order beside them."""
    run(world, tmp_path / "whole")
    want = folder_bytes(tmp_path / "whole")
    run(world, tmp_path / "ranges", shard_range="1:")
    run(world, tmp_path / "ranges", shard_range="0:1")
    assert folder_bytes(tmp_path / "ranges") == want
    (tmp_path / "whole" / "shard-00001.safetensors").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        run(world, tmp_path / "whole")
    assert folder_bytes(tmp_path / "whole") == want


def test_another_order_is_refused(world, tmp_path, monkeypatch):
    """A cache of one order is not gone on with in another, nor recomputed where the head's comes out otherwise."""
    run(world, tmp_path / "c")
    with pytest.raises(
        MismatchError, match=r"with sampler\.order='head', this capture has sampler\.order='ids'; use an"
    ):
        run(world, tmp_path / "c", order="ids")
    monkeypatch.setattr(module, "STEPS", 1)
    with pytest.raises(MismatchError, match=r"with sampler\.order_sha256="):
        run(world, tmp_path / "c")
    with (
        skd.CacheReader(tmp_path / "c") as reader,
        pytest.raises(MismatchError, match="order of the teacher's head diff"),
    ):
        recompute(reader, world.teacher, rows=1, device="cpu")


def test_merged_parts_share_an_order(world, tmp_path):
    """Counts of two seeds add up and are drawn again; a part in the order of ids does not belong to them."""
    for seed, order in enumerate((None, "head", "ids")):
        run(world, tmp_path / f"{seed}", order=order, seed=seed)
    merge(caches=[str(tmp_path / "0"), str(tmp_path / "1")], out=tmp_path / "sum")
    with skd.CacheReader(tmp_path / "sum") as reader:
        assert reader.spec.sampler["rounds"] == 40
        assert recompute(reader, world.teacher, rows=3, device="cpu")["identical"] == 3
    with pytest.raises(MismatchError, match=r"sampler\.order='head', .* has sampler\.order='ids'"):
        merge(caches=[str(tmp_path / "0"), str(tmp_path / "2")], out=tmp_path / "no")


def test_a_head_that_cannot_be_read(world, tmp_path, monkeypatch):
    """The default then draws in the order of ids, and sampler.order=head is refused; so is an order that is none."""
    monkeypatch.setattr("sparsekd.capture.read_head", lambda model: heads.Head(weight_VH=None))
    assert run(world, tmp_path / "c")["spec"]["sampler"]["order"] == "ids"
    with pytest.raises(ModelError, match=r"sampler\.order=head needs a head that can be read"):
        run(world, tmp_path / "d", order="head")
    with pytest.raises(RecipeError, match=r"sampler\.order='rank' is unknown; there are head and ids"):
        run(world, tmp_path / "d", order="rank")
    with pytest.raises(RecipeError, match="random_sampling has no parameter 'order'"):
        capture(
            rows=world.rows,
            teacher=world.teacher,
            out=tmp_path / "d",
            sampler={"name": "random_sampling", "order": "ids"},
        )


def test_a_head_in_order_gives_ordered_logits():
    """Bias, scale and soft-cap go along; without a weight there is nothing to order."""
    hidden, order = head(5, 8), torch.randperm(30, generator=torch.Generator().manual_seed(0))
    plain = heads.Head(weight_VH=head(30, 8), bias=head(30, 1)[:, 0], scale=0.5, softcap=3.0)
    torch.testing.assert_close(plain.in_order(order).logits(hidden), plain.logits(hidden)[:, order])
    with pytest.raises(ModelError, match="no rows to put in order"):
        heads.Head(weight_VH=None).in_order(order)
