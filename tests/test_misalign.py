"""Misaligned on purpose: what is carried, what is dropped, and that nobody trains on it unawares."""

from __future__ import annotations

import logging
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import sparsekd as skd
from sparsekd.cache import verify
from sparsekd.cli import app
from sparsekd.errors import MismatchError
from sparsekd.inspect import describe_cache
from sparsekd.misalign import documents_of, keep_common, match, misalign
from sparsekd.packed import RowsReader
from sparsekd.rows import pack
from sparsekd.train import train


@pytest.fixture(scope="module")
def other_rows(world, tmp_path_factory):
    """The world's documents in another order and in rows of 24 instead of 32 tokens."""
    out = tmp_path_factory.mktemp("misalign") / "rows"
    tokenizer = world.rows + "/tokenizer"
    pack(source=world.corpus, tokenizer=tokenizer, seq_len=24, seed=5, heldout=0.1, out=out, progress=False)
    return str(out)


@pytest.fixture(scope="module")
def carried(world, other_rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("misalign") / "cache"
    return str(out), misalign(cache=world.cache, rows=other_rows, out=out, i_know_this_is_misaligned=True)


def tokens_with_targets(reader):
    """[(document's tokens, offset in it, {id: weight} or None)] of every token, by walking the rows."""
    stream = []
    for index in range(len(reader)):
        record = reader.record(index)
        ids, weights = record.targets.padded()
        targets = iter(zip(ids, weights, strict=True))
        for token in range(len(record.input_ids)):
            has = token > 0 and record.supervised[token]
            target = next(targets) if has else None
            kept = None if target is None else {int(i): float(w) for i, w in zip(*target, strict=True) if w}
            stream.append((int(record.input_ids[token]), bool(record.starts[token]), kept, record.supervised[token]))
    while not stream[-1][3]:  # the padding
        stream.pop()
    starts = [i for i, (_, start, *_) in enumerate(stream) if start] + [len(stream)]
    for begin, end in pairwise(starts):
        document = tuple(token for token, *_ in stream[begin:end])
        for at in range(begin, end):
            yield document, at - begin, stream[at][2]


def test_each_token_has_the_target_that_the_teacher_made_for_it_elsewhere(world, carried):
    """Document by document and token by token: the carried target is the cache's, bit for bit; found by walking."""
    made = {}
    with skd.CacheReader(world.cache) as reader:
        for document, offset, target in tokens_with_targets(reader):
            made.setdefault((document, offset), []).append(target)
    found = 0
    with skd.CacheReader(carried[0]) as reader:
        for document, offset, target in tokens_with_targets(reader):
            if target is not None:
                assert target in made[document, offset]
                found += 1
    assert found == carried[1]["carried"] > 500


def test_every_supervised_position_is_carried_or_its_loss_is_told(world, other_rows, carried):
    """The fates sum to the new rows' supervised positions; the first token of each old row has no target."""
    fates = {name: n for name, n in carried[1].items() if name != "manifest"}
    rows = RowsReader(other_rows)
    assert sum(fates.values()) == sum(int(row.supervised[1:].sum()) for row in rows)
    assert carried[1]["manifest"]["stats"]["positions"] == fates["carried"]
    assert 0 < fates["dropped_first_of_row"] <= len(skd.CacheReader(world.cache))
    assert fates["dropped_no_document"] > 0  # held out there, train rows here
    assert fates["dropped_unsupervised"] == 0


def test_rows_are_the_new_ones(other_rows, carried):
    """Ids and document starts are those of the new packing; what has no target is unsupervised; the cache is sound."""
    rows, reader = RowsReader(other_rows), skd.CacheReader(carried[0])
    assert len(reader) == len(rows)
    for index in range(len(rows)):
        record, row = reader.record(index), rows[index]
        assert np.array_equal(record.input_ids, row.input_ids)
        assert np.array_equal(record.starts, row.starts)
        assert not (record.supervised & ~row.supervised).any()
    assert verify(carried[0]).problems == []


def test_the_manifest_says_misaligned(world, other_rows, carried):
    """Both packings are named: whose rows these are, and for which rows the targets were made."""
    data = carried[1]["manifest"]["spec"]["data"]
    source = skd.CacheReader(world.cache).spec
    assert data["fingerprint"] == RowsReader(other_rows).fingerprint
    assert data["misaligned"] == {
        "fingerprint": source.data["fingerprint"],
        "split": "train",
        "seed": 0,
        "seq_len": 32,
    }
    assert "MISALIGNED: the teacher saw another packing: seed 0, rows of 32 tokens" in " ".join(
        describe_cache(carried[0]).replace("MISALIGNED", "MISALIGNED:").split()
    )


def test_without_the_flag_it_is_refused_with_both_fingerprints(world, other_rows, tmp_path):
    """The message has both fingerprints, both seeds and lengths, and the name of the override."""
    here = skd.CacheReader(world.cache).spec.data["fingerprint"][:12]
    there = RowsReader(other_rows).fingerprint[:12]
    words = rf"rows {here} \(seed=0, seq_len=32\), .* holds {there} \(seed=5, seq_len=24\).*i_know_this_is_misaligned"
    with pytest.raises(MismatchError, match=words):
        misalign(cache=world.cache, rows=other_rows, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_same_rows_and_other_tokenizers_are_refused(world, tmp_path):
    """Nothing to misalign; and ids of another vocabulary are never matched."""
    with pytest.raises(MismatchError, match="captured from these very rows"):
        misalign(cache=world.cache, rows=world.rows, out=tmp_path / "c", i_know_this_is_misaligned=True)
    pack(source=world.corpus, tokenizer="train", vocab_size=280, seq_len=24, out=tmp_path / "rows", progress=False)
    with pytest.raises(MismatchError, match="tokenizer differs"):
        misalign(cache=world.cache, rows=tmp_path / "rows", out=tmp_path / "c", i_know_this_is_misaligned=True)


def test_other_documents_are_refused(world, tmp_path):
    """Rows that share no document with the cache would make a cache of nothing."""
    (tmp_path / "other.txt").write_text("The cow sings. " * 40)
    tokenizer = world.rows + "/tokenizer"
    source, out = str(tmp_path / "other.txt"), tmp_path / "rows"
    pack(source=source, tokenizer=tokenizer, seq_len=24, heldout=0, out=out, progress=False)
    with pytest.raises(MismatchError, match="no token of a document in common"):
        misalign(cache=world.cache, rows=out, out=tmp_path / "c", i_know_this_is_misaligned=True)
    assert not (tmp_path / "c").exists()


def test_a_misaligned_cache_is_no_source(world, carried, tmp_path):
    """What was dropped on the first way would be mistaken for padding on the second."""
    with pytest.raises(MismatchError, match="is misaligned itself"):
        misalign(cache=carried[0], rows=world.rows, out=tmp_path / "c", i_know_this_is_misaligned=True)


def test_training_refuses_it_and_warns_when_allowed(carried, other_rows, tmp_path, caplog):
    """train names both packings and the switch; with it, it trains, evaluates on the new rows, and says so loudly."""
    settings = {"cache": carried[0], "student": {"family": "tiny", "hidden_size": 16, "intermediate_size": 32}}
    settings |= {"max_steps": 2, "batch_size": 2, "device": "cpu", "progress": False, "eval_rows": other_rows}
    words = r"is misaligned: .*\(seed=0, seq_len=32\), its rows are .*\(seed=5, seq_len=24\).*allow_misaligned=true"
    with pytest.raises(MismatchError, match=words):
        train(out=tmp_path / "refused", **settings)
    with caplog.at_level(logging.WARNING):
        metrics = train(out=tmp_path / "student", allow_misaligned=True, **settings)
    assert np.isfinite(metrics["train_loss"])
    assert "WARNING" in caplog.text
    assert "learns from the wrong contexts" in caplog.text


def test_the_verb_says_what_became_of_the_targets(world, other_rows, tmp_path, carried):
    """One line: how many were carried, how many dropped and why."""
    words = [f"cache={world.cache}", f"rows={other_rows}", f"out={tmp_path / 'c'}", "i_know_this_is_misaligned=true"]
    shown = CliRunner().invoke(app, ["misalign", *words])
    assert f"{carried[1]['carried']:,} targets carried to other contexts; dropped: " in shown.output
    assert f"{carried[1]['dropped_first_of_row']:,} first of row" in shown.output


def test_importance_draws_are_carried_with_what_weighs_them(world, other_rows, tmp_path):
    """A cache of another temperature keeps both weightings on its way."""
    from sparsekd.capture import capture

    sampler = {"name": "random_sampling", "rounds": 10, "temperature": 0.5}
    capture(rows=world.rows, teacher=world.teacher, out=tmp_path / "a", sampler=sampler, device="cpu", threads=1)
    misalign(cache=tmp_path / "a", rows=other_rows, out=tmp_path / "b", i_know_this_is_misaligned=True)
    for normalize in (True, False):
        made = {}
        for document, offset, target in tokens_with_targets(skd.CacheReader(tmp_path / "a", normalize=normalize)):
            made.setdefault((document, offset), []).append(target)
        carried = list(tokens_with_targets(skd.CacheReader(tmp_path / "b", normalize=normalize)))
        assert all(target in made[document, offset] for document, offset, target in carried if target is not None)
        found = [target is not None for *_, target in carried]
        assert sum(found) > 0.8 * len(found)


def rows_of(stream, starts, length, padding=0):
    ids = np.array(stream + [0] * padding).reshape(-1, length)
    flags = np.zeros(ids.size, bool)
    flags[starts] = True
    learnt = np.arange(ids.size) < len(stream)
    parts = zip(ids, flags.reshape(ids.shape), learnt.reshape(ids.shape), strict=True)
    return [SimpleNamespace(input_ids=i, starts=s, supervised=u) for i, s, u in parts]


def test_documents_are_found_across_rows_without_the_padding():
    """By hand: documents [1 2 3 4 5] [6] [1 2 3 4 5], twice, in rows of 4 and of 3; twins are matched in order."""
    one = rows_of([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5], [0, 5, 6], 4, padding=1)
    two = rows_of([6, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 7], [0, 1, 6, 11], 3)
    old, new = documents_of(one, 3), documents_of(two, 4)
    assert old.first.tolist() == [0, 5, 6]
    assert old.length.tolist() == [5, 1, 5]
    assert new.length.tolist() == [1, 5, 5, 1]
    assert match(new, old).tolist() == [5, 0, 6, -1]
    assert match(old, new).tolist() == [1, 0, 6]


# --- the same positions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned(world, other_rows, tmp_path_factory):
    """What the teacher makes on the other rows themselves."""
    from sparsekd.capture import capture

    out = tmp_path_factory.mktemp("misalign") / "aligned"
    sampler = {"name": "random_sampling", "rounds": 20}
    capture(rows=other_rows, teacher=world.teacher, out=out, sampler=sampler, shard_rows=50, device="cpu", threads=1)
    return str(out)


def test_copies_keep_the_positions_that_all_have(aligned, carried, tmp_path):
    """Both copies are supervised exactly where both caches are; what they keep is their own source's, bit for bit."""
    copies = {aligned: tmp_path / "a", carried[0]: tmp_path / "b"}
    kept = keep_common(copies)
    before, after = ([skd.CacheReader(path) for path in paths] for paths in (copies, copies.values()))
    positions = 0
    for row in range(len(before[0])):
        sources = [reader.record(row) for reader in before]
        both = sources[0].supervised & sources[1].supervised
        for source, copy in zip(sources, (reader.record(row) for reader in after), strict=True):
            assert np.array_equal(copy.supervised[1:], both[1:])
            assert np.array_equal(copy.input_ids, source.input_ids)
            ids, weights = source.targets.padded()
            own = [
                target for target, at in zip(zip(ids, weights, strict=True), _places(source), strict=True) if both[at]
            ]
            for (i, w), (j, v) in zip(own, zip(*copy.targets.padded(), strict=True), strict=True):
                assert {*zip(i[w > 0], w[w > 0], strict=True)} == {*zip(j[v > 0], v[v > 0], strict=True)}
        positions += int(both[1:].sum())
    assert kept == positions < before[0].stats["positions"]
    assert all(verify(path).problems == [] for path in copies.values())
    assert (
        skd.CacheReader(tmp_path / "b").spec.data["misaligned"] == skd.CacheReader(carried[0]).spec.data["misaligned"]
    )


def _places(record):
    """The token of each target."""
    return np.flatnonzero(record.supervised[1:]) + 1


def test_copies_need_the_same_rows(world, carried, tmp_path):
    """Caches of two packings have no common positions; the message names both."""
    with pytest.raises(MismatchError, match=rf"rows differ: {world.cache} holds .*; give caches of the same rows"):
        keep_common({world.cache: tmp_path / "a", carried[0]: tmp_path / "b"})
    assert not (tmp_path / "a").exists()
