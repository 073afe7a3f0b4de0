"""Encoder-decoder students: prompts and answers out of packed rows, the batch, and a run from rows to answers."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsekd import models, vocab
from sparsekd.answer import answer
from sparsekd.cache import CacheReader
from sparsekd.capture import capture
from sparsekd.cross_student import CrossCollator
from sparsekd.errors import ModelError, RecipeError
from sparsekd.pair import pair_of
from sparsekd.prompted import PromptedRows, answers_of
from sparsekd.rows import pack
from sparsekd.train import train
from sparsekd.vocab_bytes import text_of

NOUNS = ["cat", "dog", "fox", "owl", "hen"]
TINY = {"family": "tiny", "hidden_size": 32, "intermediate_size": 64}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Questions packed, a teacher's curves of them, and a T5 of 31k parameters with another tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    home, draw = tmp_path_factory.mktemp("taught"), random.Random(0)
    records = [
        {
            "instruction": f"Who is behind the {(who := draw.choice(NOUNS))}?",
            "context": "",
            "response": f"It is the {who}'s brother.",
        }
        for _ in range(150)
    ]
    (home / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    packed = {"seq_len": 64, "heldout": 0.0, "source": str(home / "train.jsonl"), "progress": False}
    pack(out=home / "rows", tokenizer="train", vocab_size=280, **packed)
    student = vocab.train_tokenizer([str(record) for record in records], 320)
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16, "dropout_rate": 0.0}
    config = T5Config(vocab_size=vocab.vocab_size(student), decoder_start_token_id=0, eos_token_id=0, **shape)
    T5ForConditionalGeneration(config).save_pretrained(home / "t5")
    student.save_pretrained(home / "t5")
    teacher = models.new_student(TINY, vocab_size=280, seq_len=64)
    teacher.save_pretrained(home / "teacher")
    settings = {"teacher": str(home / "teacher"), "sampler": "sorted_curve", "device": "cpu"}
    capture(rows=home / "rows", out=home / "curves", **settings)
    pair = pair_of(vocab.load_tokenizer(home / "rows/tokenizer"), vocab.load_tokenizer(home / "t5"))
    return SimpleNamespace(home=home, curves=str(home / "curves"), t5=str(home / "t5"), pair=pair, records=records)


def test_answers_of_a_row_by_hand():
    """Two answers in one document, one in the next; what has no prompt, or one begun before the row, is left out."""
    starts = np.zeros(14, bool)
    starts[[3, 10, 12]] = True
    learnt = np.array([0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1], bool)
    assert answers_of(starts, learnt) == [(3, 5, 7), (3, 8, 10), (10, 11, 12)]


def test_rows_are_the_records(taught):
    """Prompts and answers in the student's tokens spell the records, each with its EOS, in both vocabularies."""
    with CacheReader(taught.curves) as reader:
        rows = PromptedRows(reader, taught.pair)
        assert 100 < len(rows) <= 150
        known = {(record["instruction"] + "\n\n", record["response"]) for record in taught.records}
        whole = 0
        for row in (rows[i] for i in range(len(rows))):
            prompt, reply = (bytes(text_of(ids, taught.pair.student)) for ids in (row.prompt, row.student.ids))
            assert row.prompt[-1] == taught.pair.student.eos
            assert any(p.encode() == prompt and r.encode().startswith(reply) for p, r in known)
            whole += row.student.ids[-1] == taught.pair.student.eos
            assert len(row.teacher.ids) == len(row.log_p) == len(row.curve)
            assert text_of(row.teacher.ids[1:], taught.pair.teacher) == reply
            assert row.teacher.supervised.tolist() == [False] + [True] * (len(row.teacher.ids) - 1)
            assert row.student.starts[0] == row.teacher.starts[1] == 0
            assert (row.log_p[:-1] < 0).all()
        assert whole > 0.8 * len(rows)


def test_a_batch_has_the_prompts_and_every_answers_first_token(taught):
    """The encoder's mask ends with its prompt; labels are the answers, the first token among them."""
    with CacheReader(taught.curves) as reader:
        rows = [PromptedRows(reader, taught.pair, 9)[i] for i in range(3)]
    batch = CrossCollator()(rows)
    for i, row in enumerate(rows):
        assert batch["attention_mask"][i].sum() == len(row.prompt) <= 9
        assert batch["input_ids"][i, : len(row.prompt)].tolist() == row.prompt.tolist()
        assert batch["labels"][i, : len(row.student.ids)].tolist() == row.student.ids.tolist()


@pytest.mark.parametrize(("method", "align"), [("uld", "index"), ("alm", "bytes")])
def test_an_encoder_decoder_learns_and_answers(taught, tmp_path, method, align):
    """Its loss falls, and `answer` reads what was saved: words of the answers, ended by itself."""
    settings = {"max_steps": 60, "batch_size": 16, "learning_rate": 1e-2, "device": "cpu", "progress": False}
    out = tmp_path / "student"
    metrics = train(
        out=out, cache=taught.curves, student=taught.t5, method=method, align=align, kd_weight=0.1, **settings
    )
    losses = [entry["loss"] for entry in metrics["log"]]
    assert losses[-1] < losses[0] / 2
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in taught.records[:4]))
    found = answer(model=str(out), prompts=tmp_path / "test.jsonl", out=tmp_path / "scores", device="cpu")
    assert found["counts"] == {"answers": 4, "empty": 0, "cut_off": 0}
    assert found["f1"]["mean"] > 0.4


def test_misuse_is_refused(taught, world, tmp_path):
    """Packed evaluation rows, a cache without prompts, and methods of decoder-only students."""
    given = {"out": tmp_path / "s", "student": taught.t5, "device": "cpu", "progress": False, "max_steps": 1}
    with pytest.raises(RecipeError, match="judge the student with `sparsekd answer`"):
        train(cache=taught.curves, method="uld", eval_rows=str(taught.home / "rows"), **given)
    with pytest.raises(ModelError, match="as a causal language model"):
        train(rows=str(taught.home / "rows"), method="ce", **given)
    capture(rows=world.rows, teacher=world.teacher, out=tmp_path / "plain", sampler="sorted_curve", device="cpu")
    with pytest.raises(RecipeError, match="no row of the cache holds an answer with its prompt"):
        train(cache=str(tmp_path / "plain"), method="uld", **given)
    holes = {"sampler": "sorted_curve", "positions": 0.5, "teacher": str(taught.home / "teacher"), "device": "cpu"}
    capture(rows=taught.home / "rows", out=tmp_path / "holes", **holes)
    with pytest.raises(RecipeError, match=r"positions=0\.5"):
        train(cache=str(tmp_path / "holes"), method="uld", **given)
