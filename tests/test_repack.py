"""Teachers of several tokenizers on one text: rows repacked, captured, transcoded, pooled, learnt."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SEQ_LEN, folder_bytes
from test_align import FAMILIES, byte_level, fast

from sparsekd.cache import CacheReader, RowRecord, verify
from sparsekd.capture import capture
from sparsekd.errors import MismatchError, SourceError
from sparsekd.fates import Answers
from sparsekd.flat import FlatTargets
from sparsekd.packed import PackedRow, RowsReader
from sparsekd.pair import pair_of
from sparsekd.pool import pool
from sparsekd.redraw import Places, rewrite
from sparsekd.repack import repack, repacked
from sparsekd.retokenise import retokenise
from sparsekd.rows import pack
from sparsekd.same_text import laid_over
from sparsekd.transcode import transcode
from sparsekd.transcoding import draws_of, sizes_of
from sparsekd.vocab import load_tokenizer
from sparsekd.vocab_bytes import UNLESS_SPACE, text_of, vocabulary_bytes

ROWS = 16
CODE = 2e-3  # what the codec of pooled weights rounds
TEXTS = [
    "The cat sees the dog, and counts 1 2 3.\n",
    "naïve café — 你好 🙂👩‍👩‍👧\r\n\tdef f(x):\n        return x\n",
    " a space before, caté  \n\n",
    "the",
]


@pytest.fixture(scope="module")
def families():
    return {name: make() for name, make in FAMILIES.items()} | {"small": byte_level(300)}


def rows_of(tokenizer, texts, seq_len):
    """Documents as `pack` joins them, cut anywhere: inside words and characters."""
    vocabulary = vocabulary_bytes(tokenizer)
    ids, starts = [], []
    for text in texts:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = [*([] if vocabulary.bos is None else [vocabulary.bos]), *found, vocabulary.eos]
        ids, starts = ids + found, starts + [True] + [False] * (len(found) - 1)
    fill = -len(ids) % seq_len
    learnt = np.array([True] * len(ids) + [False] * fill).reshape(-1, seq_len)
    parts = (np.array(ids + [vocabulary.eos] * fill, np.uint32), np.array(starts + [False] * fill))
    ids, starts = (part.reshape(-1, seq_len) for part in parts)
    return [
        PackedRow(index=i, input_ids=row, starts=s, supervised=m)
        for i, (row, s, m) in enumerate(zip(ids, starts, learnt, strict=True))
    ]


@pytest.mark.parametrize("names", list(itertools.product(FAMILIES, FAMILIES)), ids="-".join)
def test_both_ways_lead_to_the_same_rows(families, names):
    """A -> S and A -> B -> S are token for token the same, whatever S reads; a row that B cannot say is left empty."""
    a, b = (families[name] for name in names)
    size = vocabulary_bytes(a)
    rows = rows_of(a, TEXTS * 2, 23)
    there = pair_of(a, b)
    found = [repacked(row, there, size.eos)[0] for row in rows]
    lost = sum(each is None for each in found)
    ambiguous = size.prefix != UNLESS_SPACE and there.student.prefix == UNLESS_SPACE
    assert lost == 2 * ambiguous  # " a space before" and "a space before" are the same tokens there
    back = pair_of(a, a)
    for student in families.values():
        direct, after = pair_of(a, student), pair_of(b, student)
        for row, other in zip(rows, found, strict=True):
            if other is None:
                continue
            length = int(row.supervised.sum())
            straight = retokenise(
                [(row.input_ids[:length].astype(int), row.starts[:length])], direct, Answers(pair=back).contexts
            )
            round_about = retokenise([(other.ids, other.opens)], after, Answers(pair=back).contexts)
            assert straight[0].ids.tolist() == round_about[0].ids.tolist()
            assert np.flatnonzero(straight[0].starts).tolist() == np.flatnonzero(round_about[0].starts).tolist()


def without_bytes():
    """A Unigram that cannot write what is not among its letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyzT")]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return fast(backend, unk_token="<unk>", eos_token="</s>")


def test_text_that_cannot_be_written_is_lost(families):
    """Of three rows the one with a character that the other tokenizer does not have; `transcode` counts it too."""
    pair = pair_of(families["byte_level"], without_bytes())
    rows = rows_of(families["byte_level"], ["The cat", "你", "the dog"], 40)[0]
    ends = [0, *(np.flatnonzero(rows.input_ids[:-1] == pair.teacher.eos) + 1).tolist()]
    found = []
    for first, last in itertools.pairwise(ends[:4]):
        part = {name: getattr(rows, name)[first:last] for name in ("input_ids", "starts", "supervised")}
        found.append(repacked(PackedRow(index=0, **part), pair, pair.teacher.eos)[0] is None)
        row = retokenise([(part["input_ids"].astype(int), part["starts"])], pair, Answers(pair=pair).contexts)[0]
        assert (row.counts["lost_tokens"] > 0) == found[-1]
    assert found == [False, True, False]


# --- folders --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """A second teacher with another tokenizer, and caches of both on the same text in a third one's vocabulary."""
    from sparsekd.train import train

    home = tmp_path_factory.mktemp("two")
    texts = [json.loads(line)["text"] for line in Path(world.corpus).read_text().splitlines()]
    byte_level(340, texts[::-1]).save_pretrained(home / "other")
    byte_level(280, texts).save_pretrained(home / "student")
    repack(rows=world.rows, tokenizer=str(home / "other"), out=home / "rows")
    small = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32}
    words = {"method": "ce", "batch_size": 8, "learning_rate": 1e-2, "device": "cpu", "progress": False}
    train(out=home / "teacher", student=small, rows=str(home / "rows"), max_steps=20, **words)
    return home


def captured(home, world, out, sampler, limit_rows=ROWS):
    """Both teachers' caches, in the student's vocabulary."""
    for name, rows, teacher in (("a", world.rows, world.teacher), ("b", home / "rows", home / "teacher")):
        words = {"limit_rows": limit_rows, "shard_rows": 8, "batch_size": 8, "device": "cpu", "sampler": sampler}
        capture(rows=rows, teacher=str(teacher), out=out / name, **words)
    return [str(out / name) for name in ("a", "b")]


def test_the_rows_hold_the_same_text(world, two):
    """Every split, row by row; what fills a row is not learnt, and all of the text is; no document start is lost."""
    for split in ("train", "heldout"):
        old, new = RowsReader(world.rows, split), RowsReader(two / "rows", split)
        theirs, ours = (vocabulary_bytes(reader.tokenizer()) for reader in (old, new))
        before, after = (reader.manifest["splits"][split] for reader in (old, new))
        assert len(old) == len(new) == before["rows"]
        assert after["like"] == before["fingerprint"]
        for name in ("documents", "bytes", "supervised_bytes"):
            assert after[name] == before[name]
        assert after["empty"] == {"lost": 0, "too_long": 0}
        assert after["tokens"] == after["supervised"] == len(new) * new.seq_len - after["padding"]
        for a, b in zip(old, new, strict=True):
            assert text_of(a.input_ids, theirs) == text_of(b.input_ids, ours)
            assert a.starts.sum() == b.starts.sum()
            size = int(b.supervised.sum())
            assert b.supervised[:size].all()
            assert (b.input_ids[size:] == ours.eos).all()


def test_the_same_rows_give_the_same_bytes(world, two, tmp_path):
    """Twice; a folder that is there is kept; other settings on it are refused with both values."""
    repack(rows=world.rows, tokenizer=str(two / "other"), out=tmp_path / "rows")
    assert folder_bytes(tmp_path / "rows") == folder_bytes(two / "rows")
    kept = (tmp_path / "rows" / "train_ids.npy").stat().st_mtime_ns
    repack(rows=world.rows, tokenizer=str(two / "other"), out=tmp_path / "rows")
    assert (tmp_path / "rows" / "train_ids.npy").stat().st_mtime_ns == kept
    with pytest.raises(MismatchError, match="was packed with seq_len=None, these settings have 16"):
        repack(rows=world.rows, tokenizer=str(two / "other"), out=tmp_path / "rows", seq_len=16)
    with RowsReader(tmp_path / "rows") as reader:
        reader.verify()


def test_rows_too_long_are_left_empty(world, two, tmp_path):
    """They are counted, nothing of them is learnt; with no row left it is refused."""
    with RowsReader(two / "rows") as whole:
        sizes = [int(row.supervised.sum()) for row in whole]
    limit = int(np.median(sizes))
    found = repack(rows=world.rows, tokenizer=str(two / "other"), out=tmp_path / "rows", seq_len=limit)
    train = found["splits"]["train"]
    assert train["empty"]["too_long"] == sum(size > limit for size in sizes) > 0
    assert train["bytes"] < RowsReader(world.rows).manifest["splits"]["train"]["bytes"]
    with RowsReader(tmp_path / "rows") as rows:
        assert [bool(row.supervised.any()) for row in rows] == [size <= limit for size in sizes]
    with pytest.raises(SourceError, match="need more than seq_len=2; raise seq_len"):
        repack(rows=world.rows, tokenizer=str(two / "other"), out=tmp_path / "none", seq_len=2)


def test_prompts_stay_prompts(families, tmp_path):
    """Supervised tokens spell the responses, byte for byte, and no token goes from a prompt into its response."""
    lines = [{"prompt": f"The c{'a' * n}", "response": f"t sees the dog {n}."} for n in range(20)]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = {"seq_len": 24, "heldout": 0.0, "progress": False}
    pack(source=str(tmp_path / "sft.jsonl"), tokenizer=families["byte_level"], out=tmp_path / "a", **words)
    families["llama2_like"].save_pretrained(tmp_path / "llama")
    repack(rows=tmp_path / "a", tokenizer=str(tmp_path / "llama"), out=tmp_path / "b")
    readers = [RowsReader(tmp_path / name) for name in "ab"]
    spelled = [vocabulary_bytes(reader.tokenizer()) for reader in readers]
    for a, b in zip(*readers, strict=True):
        for mask in (lambda row: row.supervised, lambda row: ~row.supervised):
            texts = [text_of(r.input_ids[mask(r)], v) for r, v in zip((a, b), spelled, strict=True)]
            assert texts[0].replace(b" ", b"") == texts[1].replace(b" ", b"")  # the space that SentencePiece adds


# --- an ensemble ----------------------------------------------------------------------------------------


def losses(path, student):
    """{(row, position): (rejected + short) share} of a cache's draws in a student's vocabulary."""
    pair = pair_of(load_tokenizer(Path(path) / "tokenizer"), load_tokenizer(student))
    answers, found = Answers(pair=pair), {}
    with CacheReader(path) as reader:
        records = [reader.record(row) for row in range(len(reader))]
    sizes = sizes_of(records, pair)
    for number, (record, size) in enumerate(zip(records, sizes, strict=True)):
        row = retokenise([(record.input_ids[:size].astype(int), record.starts[:size])], pair, answers.contexts)[0]
        places = Places(source=row.source, context=row.context, labels=np.append(row.ids[:-1], -1))
        masses = rewrite(draws_of([record], [size]), places, answers, chain=0).masses
        lost = masses["rejected"] + masses["short"]
        found |= {(number, at): each for at, each in enumerate(lost.tolist())}
    return found


def dense(path, row):
    """[L, V] targets of the token at each place of a row."""
    with CacheReader(path) as reader:
        record, width = reader.record(row), reader.spec.tokenizer["vocab_size"]
    found = np.zeros((len(record.input_ids), width))
    where = np.flatnonzero(record.supervised[1:]) + 1
    np.add.at(found, (where[record.targets.positions], record.targets.ids), record.targets.weights)
    return found


def test_the_mean_over_draws_is_the_weighted_mean_of_both_teachers(world, two, tmp_path):
    """Pooled draws against both teachers' whole distributions in the student's vocabulary, within 5 standard errors
    wherever both speak and no draw is rejected (else they are ratios)."""
    weights, rounds, student = (0.7, 0.3), 1000, str(two / "student")
    exact = captured(two, world, tmp_path / "exact", {"name": "full"})
    draws = captured(two, world, tmp_path / "drawn", {"name": "random_sampling", "rounds": rounds})
    for path in exact + draws:
        transcode(cache=path, tokenizer=student, out=f"{path}-s", unresolved="point", chain=0, codec="prob40")
    pool(caches=[f"{path}-s" for path in draws], weights=list(weights), out=tmp_path / "pooled", codec="prob40")
    assert verify(tmp_path / "pooled").problems == []
    lost = [losses(path, student) for path in exact]
    total, variance, checked = 0.0, 0.0, 0
    for row in range(ROWS):
        wholes = [dense(f"{path}-s", row) for path in exact]
        both = wholes[0].any(-1) & wholes[1].any(-1)
        both &= np.array([max(each.get((row, at), 1) for each in lost) < 1e-9 for at in range(len(both))])
        off = dense(tmp_path / "pooled", row) - sum(w * t for w, t in zip(weights, wholes, strict=True))
        error = np.sqrt(sum(w * w * t * (1 - t) / rounds for w, t in zip(weights, wholes, strict=True)).clip(0))
        often = both[:, None] & (wholes[0] > 0.02) & (wholes[1] > 0.02)  # 20 draws: as good as normal
        assert (np.abs(off) <= 5 * error + CODE)[often].all()
        total, variance, checked = total + off[both].sum(0), variance + (error[both] ** 2).sum(0), checked + both.sum()
    assert checked > 50
    assert (np.abs(total) <= 5 * np.sqrt(variance) + CODE).all()


def test_a_student_learns_from_both(world, two, tmp_path):
    """The whole way, with sets, twice to the same bytes; the student is judged on the held-out rows in its tokens."""
    from sparsekd.train import train

    draws = captured(two, world, tmp_path, {"name": "systematic", "rounds": 20}, limit_rows=64)
    student = str(two / "student")
    for path in draws:
        transcode(cache=path, tokenizer=student, out=f"{path}-s")
    readers = [CacheReader(f"{path}-s") for path in draws]
    assert len({reader.spec.seq_len for reader in readers}) == 1
    for row in range(len(readers[0])):
        assert np.array_equal(*(reader.record(row).input_ids for reader in readers))
    for out in ("pooled", "again"):
        pool(caches=[f"{path}-s" for path in draws], weights=[0.6, 0.4], out=tmp_path / out)
    assert folder_bytes(tmp_path / "pooled") == folder_bytes(tmp_path / "again")
    repack(rows=world.rows, tokenizer=student, out=tmp_path / "heldout", seq_len=readers[0].spec.seq_len)
    words = {"student": {"family": "tiny", "hidden_size": 16, "intermediate_size": 32}, "batch_size": 8}
    words |= {"learning_rate": 1e-2, "device": "cpu", "progress": False, "cache": str(tmp_path / "pooled")}
    runs = [
        train(out=tmp_path / f"s{steps}", max_steps=steps, eval_rows=str(tmp_path / "heldout"), **words)
        for steps in (1, 20)
    ]
    judged = [[each["eval_loss"] for each in run["log"] if "eval_loss" in each][-1] for run in runs]
    assert judged[1] < judged[0] - 0.2
    with pytest.raises(MismatchError, match="tokenizer differs"):
        train(out=tmp_path / "t", max_steps=1, eval_rows=world.rows, **words)
    pack(source=world.corpus, tokenizer=student, seq_len=readers[0].spec.seq_len, heldout=0.2, seed=1,
         out=tmp_path / "foreign", progress=False)  # fmt: skip
    with pytest.raises(MismatchError, match="sparsekd repack"):
        train(out=tmp_path / "t", max_steps=1, eval_rows=str(tmp_path / "foreign"), **words)


def test_a_student_with_the_first_teachers_tokenizer(world, two, tmp_path):
    """The first cache keeps its rows, cut where prompts end; the second's targets come where both are cut alike, and
    the mean there is of both. A row that the second teacher could not read is the first's alone."""
    lines = [{"prompt": f"The {w} c", "response": f"ounts {n} {n + 1}."} for n in range(20) for w in ("cat", "dog")]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = f"{world.rows}/tokenizer"
    words = {"seq_len": SEQ_LEN, "heldout": 0.0, "progress": False}
    pack(source=str(tmp_path / "sft.jsonl"), tokenizer=tokenizer, out=tmp_path / "rows-a", **words)
    whole = repack(rows=tmp_path / "rows-a", tokenizer=str(two / "other"), out=tmp_path / "rows-b")
    repack(rows=tmp_path / "rows-a", tokenizer=str(two / "other"), out=tmp_path / "cut", seq_len=whole["seq_len"] - 3)
    with RowsReader(tmp_path / "cut") as rows:
        empty = [not row.supervised.any() for row in rows]
    words = {"shard_rows": 40, "batch_size": 8, "device": "cpu", "sampler": {"name": "systematic", "rounds": 20}}
    capture(rows=tmp_path / "rows-a", teacher=world.teacher, out=tmp_path / "a", **words)
    capture(rows=tmp_path / "cut", teacher=str(two / "teacher"), out=tmp_path / "b", **words)
    words = {"cache": tmp_path / "b", "tokenizer": tokenizer, "seq_len": SEQ_LEN, "unresolved": "point"}
    transcode(**words, out=tmp_path / "bs", codec="prob40")
    pool(caches=[str(tmp_path / "a"), str(tmp_path / "bs")], weights=[1, 3], out=tmp_path / "pooled", codec="prob40")
    names = vocabulary_bytes(load_tokenizer(tokenizer)).of_id
    both = alone = 0
    for row in range(len(empty)):
        with CacheReader(tmp_path / "a") as a, CacheReader(tmp_path / "bs") as b, CacheReader(tmp_path / "pooled") as p:
            mine, other, found = (reader.record(row).input_ids.tolist() for reader in (a, b, p))
        assert found == mine
        first, second, mean = (dense(tmp_path / name, row) for name in ("a", "bs", "pooled"))
        spans = [{span: at for at, span in enumerate(slow_spans(ids, names))} for ids in (mine, other)]
        for span, at in spans[0].items():
            there = spans[1].get(span)
            if there is None or empty[row] or not at or not second[there].any():
                assert np.allclose(mean[at], first[at], atol=1e-3)
                alone += first[at].any()
            else:
                share = 0.25 if first[at].any() else 0.0
                assert np.allclose(mean[at], share * first[at] + (1 - share) * second[there], atol=2e-3)
                both += share > 0
    assert any(empty)
    assert min(both, alone) > 10
    with pytest.raises(MismatchError, match=r"different text; .*sparsekd repack"):
        pool(caches=[world.cache, shuffled(world.cache, tmp_path / "foreign")], out=tmp_path / "p")


def slow_spans(ids, names):
    """(first byte, last byte + 1) of each token, a control token one byte."""
    found, at = [], 0
    for token in ids:
        size = 1 if names[token] is None else len(names[token])
        found.append((at, at + size))
        at += size
    return found


def shuffled(cache, out):
    """The cache with its first two rows exchanged."""
    from sparsekd.cache import CacheWriter

    with CacheReader(cache) as reader:
        records = [reader.record(row) for row in range(len(reader))]
        writer = CacheWriter(out, reader.spec)
    records[:2] = records[1::-1]
    for shard in range(reader.spec.shards):
        writer.write(shard, [records[row] for row in reader.spec.shard_range(shard)])
    writer.finalize()
    return str(out)


def test_targets_laid_over_another_cut_by_hand():
    """ "abc d" as ab|c| d and as a|bc| d: only " d" is one token of both; a text that differs is none."""
    from sparsekd.vocab_bytes import VocabBytes

    vocabulary = VocabBytes(
        of_id=(b"ab", b"c", b" d", b"a", b"bc", None, b"x"), control={}, bos=None, eos=5, prefix="never", name="toy"
    )
    sizes = np.array([1, 2])
    targets = FlatTargets(ids=np.array([1, 2, 0], np.uint32), values=np.array([1, 0.5, 0.5], np.float32), sizes=sizes)
    mine = RowRecord(
        input_ids=np.array([0, 1, 2, 5], np.uint32),
        targets=targets,
        starts=np.zeros(4, bool),
        supervised=np.array([False, True, True, False]),
    )
    onto = replace(mine, input_ids=np.array([3, 4, 2, 5], np.uint32))
    found = laid_over(mine, onto, vocabulary)
    assert found.supervised.tolist() == [False, False, True, False]
    assert found.targets.ids.tolist() == [2, 0]
    assert found.targets.weights.tolist() == [0.5, 0.5]
    assert np.array_equal(found.input_ids, onto.input_ids)
    assert laid_over(mine, replace(onto, input_ids=np.array([3, 4, 6, 5], np.uint32)), vocabulary) is None
