"""Students of another vocabulary: rows laid over each other by bytes, the batch, the loss, a run from end to end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsekd import models, vocab
from sparsekd.cache import CacheReader
from sparsekd.capture import capture
from sparsekd.cross_set import open_cross_set
from sparsekd.cross_student import CrossCollator, attach_cross_kd
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.overlay import OverlaidRows, overlay
from sparsekd.pair import pair_of
from sparsekd.rows import pack
from sparsekd.sketch import SortedCurve
from sparsekd.train import train
from sparsekd.uld import Tokenized, uld
from sparsekd.vocab_bytes import text_of

TINY = {"family": "tiny", "hidden_size": 32, "intermediate_size": 64}


@pytest.fixture(scope="module")
def cross(world, tmp_path_factory):
    """The world's teacher as curves, and the same corpus packed with a tokenizer of 420 ids instead of 300."""
    home = tmp_path_factory.mktemp("cross")
    capture(
        rows=world.rows, teacher=world.teacher, out=home / "curves", sampler="sorted_curve", shard_rows=40, device="cpu"
    )
    pack(
        source=world.corpus,
        tokenizer="train",
        vocab_size=420,
        seq_len=32,
        heldout=0.1,
        out=home / "rows",
        progress=False,
    )
    teacher, student = (vocab.load_tokenizer(folder) for folder in (f"{world.rows}/tokenizer", home / "rows/tokenizer"))
    assert vocab.fingerprint(teacher) != vocab.fingerprint(student)
    return SimpleNamespace(
        curves=str(home / "curves"),
        rows=str(home / "rows"),
        tokenizer=str(home / "rows/tokenizer"),
        pair=pair_of(teacher, student),
    )


# --- rows -----------------------------------------------------------------------------------------------------


def test_every_token_spells_the_bytes_that_it_is_said_to(cross):
    """Of both: the text between a token's start and end is the token's own bytes, and the whole text is one."""
    with CacheReader(cross.curves) as reader:
        for number in range(0, len(reader), 7):
            row = reader[number]
            student, teacher = overlay(row.input_ids, row.starts, row.supervised, cross.pair)
            text = {}
            for tokens, vocabulary in ((student, cross.pair.student), (teacher, cross.pair.teacher)):
                for token, start, end in zip(tokens.ids, tokens.starts, tokens.ends, strict=True):
                    spelt = vocabulary.of_id[token]
                    if spelt is None:
                        assert end - start in (0, 1)
                        continue
                    assert end - start == len(spelt)
                    for at, byte in enumerate(spelt, start):
                        assert text.setdefault(at, byte) == byte
            assert text_of(student.ids, cross.pair.student) == text_of(teacher.ids, cross.pair.teacher)


def test_the_end_of_a_document_is_a_byte_of_its_own(cross):
    """The teacher's EOS faces the student's, and not the first token of the next document."""
    with CacheReader(cross.curves) as reader:
        row = next(r for r in (reader[i] for i in range(len(reader))) if r.starts[1:].any())
    student, teacher = overlay(row.input_ids, row.starts, row.supervised, cross.pair)
    ours = student.starts[student.ids == cross.pair.student.eos]
    theirs = teacher.starts[teacher.ids == cross.pair.teacher.eos]
    assert len(ours)
    assert ours.tolist() == theirs.tolist()
    assert not set(ours.tolist()) & set(student.starts[student.ids != cross.pair.student.eos].tolist())


def test_a_student_token_is_learnt_where_all_of_its_bytes_are(cross):
    """With every third teacher token masked, against a loop over bytes."""
    with CacheReader(cross.curves) as reader:
        row = reader[5]
    supervised = np.arange(len(row.input_ids)) % 3 != 0
    student, teacher = overlay(row.input_ids, row.starts, supervised, cross.pair)
    learnt = {}
    for start, end, fine in zip(teacher.starts, teacher.ends, teacher.supervised, strict=True):
        learnt |= {byte: bool(fine) for byte in range(start, end)}
    want = [all(learnt[byte] for byte in range(a, b)) for a, b in zip(student.starts, student.ends, strict=True)]
    assert student.supervised.tolist() == want
    assert 0 < sum(want) < len(want)


def test_the_same_tokenizer_gives_the_row_back(world):
    tokenizer = vocab.load_tokenizer(f"{world.rows}/tokenizer")
    with CacheReader(world.cache) as reader:
        row = reader[3]
    student, teacher = overlay(row.input_ids, row.starts, row.supervised, pair_of(tokenizer, tokenizer))
    assert student.ids.tolist() == row.input_ids.tolist()
    assert student.starts.tolist() == teacher.starts.tolist()
    assert student.supervised.tolist() == row.supervised.tolist()


# --- the batch and the loss -------------------------------------------------------------------------------------


def items(cross, count=3):
    return [OverlaidRows(CacheReader(cross.curves), cross.pair)[i] for i in range(count)]


def tiny_model(family="tiny"):
    torch.manual_seed(0)
    if family == "tiny":
        return models.new_student(TINY, vocab_size=420, seq_len=64)
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=420, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()  # no dropout


def test_a_batch_is_padded_on_the_right(cross):
    rows = items(cross)
    batch = CrossCollator()(rows)
    longest = max(len(row.student.ids) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["starts"].shape == (3, longest)
    assert batch["teacher_curve"].shape == (3, 32, rows[0].curve.shape[1])
    for i, row in enumerate(rows):
        size = len(row.student.ids)
        assert batch["input_ids"][i, :size].tolist() == row.student.ids.tolist()
        assert (batch["labels"][i, size:] == -100).all()
        assert batch["labels"][i, 0] == -100


def edges_of(cross):
    with CacheReader(cross.curves) as reader:
        return tuple(reader.spec.codec["edges"])


@pytest.mark.parametrize("align", ["bytes", "index"])
def test_forward_returns_the_loss_of_its_logits(cross, align):
    """The attached forward equals `uld` on the model's own logits."""
    model, batch = tiny_model(), CrossCollator()(items(cross))
    logits = model(input_ids=batch["input_ids"]).logits
    want = uld(
        logits,
        SortedCurve(masses=batch["teacher_curve"], edges=edges_of(cross)),
        tokens=Tokenized(labels=batch["labels"], starts=batch["starts"]),
        teacher_tokens=Tokenized(labels=batch["teacher_labels"], starts=batch["teacher_starts"]),
        align=align,
    )
    attach_cross_kd(model, "uld", edges=edges_of(cross), align=align)
    torch.testing.assert_close(model(**batch).loss, want)
    plain = model(input_ids=batch["input_ids"], labels=batch["labels"])
    assert plain.logits is not None


def test_an_encoder_decoders_labels_are_not_shifted(cross):
    """Without KD (weight 0) the loss is the model's own, which predicts label l at position l."""
    model, batch = tiny_model("t5"), CrossCollator()(items(cross))
    own = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    attach_cross_kd(model, "uld", edges=edges_of(cross), kd_weight=0.0)
    torch.testing.assert_close(model(**batch).loss, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["tiny", "t5"])
@pytest.mark.parametrize("method", ["uld", "alm"])
def test_gradient_steps_lower_the_loss(cross, method, family):
    model, batch = tiny_model(family), CrossCollator()(items(cross))
    attach_cross_kd(model, method, edges=edges_of(cross))

    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


# --- end to end -------------------------------------------------------------------------------------------------


def settings(cross, **changed):
    return {
        "cache": cross.curves,
        "student": TINY,
        "tokenizer": cross.tokenizer,
        "max_steps": 30,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "device": "cpu",
        "progress": False,
    } | changed


@pytest.mark.parametrize("method", ["uld", "alm"])
def test_train_from_a_cache_of_curves(cross, method, tmp_path):
    """The student learns, is evaluated on rows of its own tokenizer, and is saved with that tokenizer."""
    metrics = train(out=tmp_path / "student", method=method, eval_rows=cross.rows, eval_steps=10, **settings(cross))
    losses = [entry["eval_loss"] for entry in metrics["log"] if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    saved = vocab.load_tokenizer(tmp_path / "student")
    assert vocab.fingerprint(saved) == vocab.fingerprint(vocab.load_tokenizer(cross.tokenizer))
    assert vocab.vocab_size(saved) == json.loads((tmp_path / "student/config.json").read_text())["vocab_size"]


def test_sampled_targets_are_refused_with_the_reason(cross, world, tmp_path):
    with pytest.raises(RecipeError, match=r"holds counts of sampler random_sampling.*far too steep"):
        train(out=tmp_path / "s", method="uld", **settings(cross, cache=world.cache))


def test_sampled_targets_all_the_same(cross, world, tmp_path):
    """Who insists trains on sorted counts, which is `uld` on the same targets; ALM has nothing to insist on."""
    data = open_cross_set(world.cache, cross.tokenizer, TINY, None, allow_biased=True)
    row, stored = data.rows[0], CacheReader(world.cache)[0].targets.weights
    assert row.curve.shape[-1] == len(data.rows.edges) - 1 == data.rows.reader.spec.sampler["rounds"]
    np.testing.assert_array_equal(row.curve[:-1, : stored.shape[-1]], -np.sort(-stored, -1))
    assert not row.curve[:, stored.shape[-1] :].any()
    found = train(out=tmp_path / "s", method="uld", allow_biased=True, **settings(cross, cache=world.cache))
    assert found["steps"] > 0
    with pytest.raises(RecipeError, match="allow_biased is for method=uld on a cache of counts"):
        train(out=tmp_path / "a", method="alm", allow_biased=True, **settings(cross, cache=world.cache))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokenizer": None}, RecipeError, "brings no tokenizer"),
        ({"cache": None}, RecipeError, "need cache=FOLDER of sampler=sorted_curve"),
        ({"align": "words"}, RecipeError, "align='words' is not one of index, bytes"),
        ({"ce_weight": 0.5}, RecipeError, "ce_weight=0.5 is not for method=uld"),
        ({"method": "cached", "kd_weight": 1.0}, RecipeError, "kd_weight and max_length are for method=uld or alm"),
    ],
)
def test_misuse_is_refused(cross, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        train(out=tmp_path / "s", **settings(cross, **({"method": "uld"} | change)))


def test_evaluation_rows_of_another_tokenizer_are_refused(cross, world, tmp_path):
    with pytest.raises(MismatchError, match="pack the same documents with the student's tokenizer"):
        train(out=tmp_path / "s", method="uld", eval_rows=world.rows, **settings(cross))


def test_rows_are_cut_to_max_length(cross):
    data = open_cross_set(cross.curves, cross.tokenizer, TINY, 10)
    assert max(len(data.rows[i].student.ids) for i in range(5)) == 10
    data.close()
