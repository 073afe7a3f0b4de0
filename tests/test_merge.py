"""Caches of the same rows add up: count by count, in any order, resumable, and never by mistake."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import SEQ_LEN, folder_bytes
from typer.testing import CliRunner

import sparsekd as skd
from sparsekd import models
from sparsekd.adding import add_draws
from sparsekd.cache import CacheWriter, verify
from sparsekd.capture import capture
from sparsekd.cli import app
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.flat import FlatTargets, Importance, add_counts
from sparsekd.merge import merge
from sparsekd.recompute import recompute

PARTS = {"a": ("systematic", 10, 0), "b": ("systematic", 7, 1), "c": ("systematic", 30, 2)}


def make(world, out, sampler, rounds, seed, draws=None, **settings):
    draws = {"name": sampler, "rounds": rounds} | (draws or {})
    settings = {"rows": world.rows, "teacher": world.teacher, "limit_rows": 24, "shard_rows": 8} | settings
    capture(out=out, sampler=draws, seed=seed, device="cpu", **settings)
    return str(out)


@pytest.fixture(scope="module")
def parts(world, tmp_path_factory):
    home = tmp_path_factory.mktemp("parts")
    return {name: make(world, home / name, *settings) for name, settings in PARTS.items()}


def dense_counts(path, row):
    flat = skd.CacheReader(path).flat(row)
    dense = np.zeros((len(flat.sizes), 300), np.int64)
    dense[flat.positions, flat.ids] = flat.values
    return dense


def dense_of(flat):
    dense = np.zeros((len(flat.sizes), 300))
    dense[flat.positions, flat.ids] = flat.weights
    return dense


def test_add_counts_by_hand():
    """Positions {5: 2, 9: 1}, {} of 3 rounds and {9: 1, 4: 1}, {7: 2} of 2: {4: 1, 5: 2, 9: 2}, {7: 2} of 5."""
    first = FlatTargets(ids=np.uint32([5, 9]), values=np.uint32([2, 1]), sizes=np.array([2, 0]), rounds=3)
    second = FlatTargets(ids=np.uint32([9, 4, 7]), values=np.uint32([1, 1, 2]), sizes=np.array([2, 1]), rounds=2)
    both = add_counts([first, second])
    assert (both.ids.tolist(), both.values.tolist(), both.sizes.tolist()) == ([4, 5, 9, 7], [1, 2, 2, 2], [3, 1])
    assert both.rounds == 5


def test_counts_add_and_the_cache_is_sound(world, parts, tmp_path):
    """Every count is the sum of the parts'; what it was made from is in the manifest, and can be drawn again."""
    manifest = merge(caches=[parts["a"], parts["b"]], out=tmp_path / "ab")
    for row in range(24):
        expected = dense_counts(parts["a"], row) + dense_counts(parts["b"], row)
        assert np.array_equal(dense_counts(tmp_path / "ab", row), expected)
        assert (expected.sum(-1) == 17).all()
    sampler = manifest["spec"]["sampler"]
    assert (sampler["name"], sampler["rounds"], sampler["seed"], sampler["parts"]) == (
        "systematic",
        17,
        [0, 1],
        [10, 7],
    )
    assert manifest["spec"]["codec"]["rounds"] == 17
    assert verify(tmp_path / "ab").problems == []
    with skd.CacheReader(tmp_path / "ab") as reader:
        assert recompute(reader, world.teacher, rows=4, device="cpu")["identical"] == 4


@pytest.mark.parametrize("codec", ["split_ratio", "split_ratio_unbiased", "ratio48"])
@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_importance_draws_add_up(world, tmp_path, codec, temperature):
    """Plain weights of the sum are the mean of the parts', weighed by rounds, to the codec's rounding of a weight (for
    split_ratio, which rounds each entry by itself, nearly exactly); the sum is sound and is drawn again."""
    draws = {"temperature": temperature, "normalize": codec == "split_ratio"}
    parts = [
        make(world, tmp_path / f"{seed}", "systematic", rounds, seed, codec=codec, draws=draws)
        for seed, rounds in ((0, 10), (1, 15))
    ]
    manifest = merge(caches=parts, out=tmp_path / "sum")
    assert manifest["spec"]["codec"] == {"name": codec, "logit_width": 300, "rounds": 25} | draws
    readers = [skd.CacheReader(path, normalize=False) for path in (*parts, tmp_path / "sum")]
    for row in range(24):
        first, second, both = (dense_of(reader.flat(row)) for reader in readers)
        mean = 0.4 * first + 0.6 * second
        # What is left: a step of 2.2 % when a weight is rounded again (ratio48: 2.2 % √octaves of p, times |1 - t|).
        np.testing.assert_allclose(both, mean, rtol=1e-5 if codec == "split_ratio" else 0.05, atol=1e-6)
        assert np.array_equal(dense_counts(tmp_path / "sum", row), sum(dense_counts(part, row) for part in parts))
    assert verify(tmp_path / "sum").problems == []
    with skd.CacheReader(tmp_path / "sum") as reader:
        assert recompute(reader, world.teacher, rows=4, device="cpu")["identical"] == 4


def test_importance_draws_that_do_not_add_up(world, parts, tmp_path):
    """Another temperature, weights that lost their counts, a codec of plain counts."""
    settings = [("ratio48", 0.7), ("ratio48", 0.8), ("prob40", 0.7)]
    others = [
        make(world, tmp_path / f"{number}", "systematic", 10, 5 + number, codec=codec, draws={"temperature": t})
        for number, (codec, t) in enumerate(settings)
    ]
    with pytest.raises(MismatchError, match=r"sampler\.temperature=0\.7, .* has sampler\.temperature=0\.8"):
        merge(caches=others[:2], out=tmp_path / "out")
    with pytest.raises(MismatchError, match=r"sampler\.temperature"):
        merge(caches=[others[0], parts["a"]], out=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"holds prob40, not counts of draws; .* a codec that keeps them"):
        merge(caches=[others[2], others[0]], out=tmp_path / "out")
    again = make(world, tmp_path / "again", "systematic", 10, 9, codec="ratio48", draws={"temperature": 0.7})
    with pytest.raises(RecipeError, match="codec=split does not hold importance draws; leave codec out"):
        merge(caches=[others[0], again], out=tmp_path / "out", codec="split")


def test_add_draws_by_hand():
    """t = 0.5, H = 2: worths 2^((2 - 4) / 2) = 1/2 and 2^((2 - 6) / 2) = 1/4; drawn 1 and 3 times their mean is 5/16,
    which is p = 2^-2 · (5/16)^2; an id of one part alone keeps its p."""

    def part(ids, counts, log2_p, rounds):
        weighing = Importance(log2_p=np.float32(log2_p), entropy=np.float32([2]), temperature=0.5, normalize=False)
        values, sizes = np.uint32(counts), np.array([len(ids)])
        return FlatTargets(ids=np.uint32(ids), values=values, sizes=sizes, rounds=rounds, importance=weighing)

    both = add_draws([part([7, 3], [1, 1], [-4, -1], 2), part([7], [3], [-6], 3)])
    assert (both.ids.tolist(), both.values.tolist(), both.rounds) == ([3, 7], [1, 4], 5)
    np.testing.assert_allclose(np.exp2(both.importance.log2_p), [1 / 2, (5 / 16) ** 2 / 4], rtol=1e-6)
    np.testing.assert_allclose(both.weights, [2**0.5 / 5, 4 / 5 * 5 / 16], rtol=1e-6)


def test_a_sum_of_draws_has_no_probability_above_one():
    """Entropies that were rounded apart, 0.2 and 0 bits of a sure token: its p would be 2^0.1, which codecs refuse."""
    parts = [
        FlatTargets(
            ids=np.uint32([5]),
            values=np.uint32([3]),
            sizes=np.array([1]),
            rounds=3,
            importance=Importance(log2_p=np.float32([0]), entropy=np.float32([bits]), temperature=0.5),
        )
        for bits in (0.2, 0)
    ]
    alone = replace(parts[1], ids=np.uint32([6]))
    assert add_draws([parts[0], alone]).importance.log2_p[0] == 0
    assert add_draws([alone, alone]).importance.log2_p.tolist() == [0]


def test_order_and_grouping_change_no_byte_of_a_row(parts, tmp_path):
    """A + B is B + A byte for byte; (A + B) + C holds the rows of A + B + C."""
    merge(caches=[parts["a"], parts["b"]], out=tmp_path / "ab")
    merge(caches=[parts["b"], parts["a"]], out=tmp_path / "ba")
    assert folder_bytes(tmp_path / "ab") == folder_bytes(tmp_path / "ba")
    merge(caches=[parts["c"], str(tmp_path / "ab")], out=tmp_path / "ab_c")
    merge(caches=[parts["c"], parts["b"], parts["a"]], out=tmp_path / "abc")
    grouped, at_once = skd.CacheReader(tmp_path / "ab_c"), skd.CacheReader(tmp_path / "abc")
    assert grouped.spec == at_once.spec
    assert all(np.array_equal(dense_counts(grouped.path, r), dense_counts(at_once.path, r)) for r in range(24))


def test_a_merge_that_was_stopped_goes_on(parts, tmp_path):
    """With a shard missing and one damaged, the same command ends in the same bytes."""
    merge(caches=[parts["a"], parts["b"]], out=tmp_path / "ab")
    whole = folder_bytes(tmp_path / "ab")
    (tmp_path / "ab" / "shard-00001.safetensors").unlink()
    damaged = tmp_path / "ab" / "shard-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"abc")
    done = []
    merge(caches=[parts["a"], parts["b"]], out=tmp_path / "ab", progress=lambda *args: done.append(args))
    assert folder_bytes(tmp_path / "ab") == whole
    assert done == [(2, 3), (3, 3)]


def test_more_rounds_than_the_codec_holds_take_a_wider_one(world, parts, tmp_path):
    """10 + 55 rounds are over raw24's 64: nothing is cut."""
    codecs = {"codec": "raw24"}
    first = make(world, tmp_path / "x", "systematic", 10, 0, **codecs)
    second = make(world, tmp_path / "y", "systematic", 55, 5, **codecs)
    assert merge(caches=[first, second], out=tmp_path / "xy")["spec"]["codec"]["rounds"] == 65
    assert (dense_counts(tmp_path / "xy", 3).sum(-1) == 65).all()
    assert merge(caches=[first, second], out=tmp_path / "wide", codec="raw40")["spec"]["codec"]["name"] == "raw40"
    assert np.array_equal(dense_counts(tmp_path / "wide", 3), dense_counts(tmp_path / "xy", 3))
    with pytest.raises(RecipeError, match=r"codec raw24 holds 1 to 64 rounds, but rounds=65"):
        merge(caches=[first, second], out=tmp_path / "narrow", codec="raw24")
    with pytest.raises(RecipeError, match="codec=prob24 does not hold counts"):
        merge(caches=[first, second], out=tmp_path / "weights", codec="prob24")


def test_what_does_not_add_up_is_refused(world, parts, tmp_path):
    """The same seed, another sampler, other rows, another teacher, weights instead of counts, one cache alone."""
    home, other_teacher = tmp_path, str(tmp_path / "teacher")
    models.new_student({"family": "tiny"}, vocab_size=300, seq_len=SEQ_LEN).save_pretrained(other_teacher)
    cases = {
        "seed 0 was drawn with twice among .*; capture one of them with another seed, such as seed=[12]": make(
            world, home / "same", "systematic", 12, 0
        ),
        "sampler.name='systematic', .* has sampler.name='random_sampling'": make(
            world, home / "drawn", "random_sampling", 10, 3
        ),
        "rows=24, .* has rows=16": make(world, home / "fewer", "systematic", 10, 3, limit_rows=16),
        "teacher.* has teacher": make(world, home / "other", "systematic", 10, 3, teacher=other_teacher),
    }
    for words, other in cases.items():
        for pair in ([parts["a"], other], [parts["a"], parts["b"], other]):
            with pytest.raises(MismatchError, match=words):
                merge(caches=pair, out=home / "out")
    weights = home / "weights"
    capture(rows=world.rows, teacher=world.teacher, out=weights, sampler="top_k", limit_rows=24, device="cpu")
    with pytest.raises(RecipeError, match="not counts of draws; merge adds counts"):
        merge(caches=[str(weights), parts["a"]], out=home / "out")
    with pytest.raises(RecipeError, match="merge needs two caches or more, got 1"):
        merge(caches=[parts["a"]], out=home / "out")
    assert not (home / "out").exists()


def test_rows_that_are_not_those_they_are_said_to_be(parts, tmp_path):
    """Caches that name the same rows and hold others: compared as they are read, and said which."""
    with skd.CacheReader(parts["a"]) as reader:
        spec = replace(reader.spec, sampler=reader.spec.sampler | {"seed": 9})
        writer = CacheWriter(tmp_path / "other", spec)
        for shard in range(spec.shards):
            records = [reader.record(row) for row in spec.shard_range(shard)]
            if shard == 1:
                records[2] = replace(records[2], input_ids=records[2].input_ids[::-1])
            writer.write(shard, records)
        writer.finalize()
    with pytest.raises(MismatchError, match=r"row 10 of .*a and of .*other differ in input_ids"):
        merge(caches=[parts["a"], str(tmp_path / "other")], out=tmp_path / "out")


def test_the_verb(parts, tmp_path):
    """sparsekd merge A B out=C; A and B may also stand as caches=[A, B]."""
    result = CliRunner().invoke(app, ["merge", parts["a"], parts["b"], f"out={tmp_path / 'ab'}"])
    assert result.exit_code == 0, result.output
    assert "10 + 7 = 17 rounds" in result.output
    listed = CliRunner().invoke(app, ["merge", f"caches=[{parts['a']}, {parts['b']}]", f"out={tmp_path / 'again'}"])
    assert listed.exit_code == 0, listed.output
    assert folder_bytes(tmp_path / "ab") == folder_bytes(tmp_path / "again")
