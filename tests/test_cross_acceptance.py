"""Acceptance across tokenizers: the maximum is the least cut, and what lands where is exact where it can be."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from test_align import CORPUS, byte_level
from test_transcode import truncated

from sparsekd import models
from sparsekd.cross_acceptance import Said, acceptance, carried, cross_acceptance, open_exam, own_acceptance
from sparsekd.fates import Answers
from sparsekd.pair import cut_ids, pair_of
from sparsekd.set_table import SetTable
from sparsekd.vocab import load_tokenizer
from sparsekd.vocab_bytes import text_of

# Sets of eight tokens that lie inside one another or apart.
LAMINAR = SetTable(
    vocab_size=8,
    order=np.array([5, 2, 7, 0, 1, 6, 3, 4]),
    first=np.array([0, 0, 3, 5, 4, 0]),
    last=np.array([2, 5, 5, 8, 5, 8]),
)


def least_cut(points, masses, q):
    """max Σ_v min(p'_v, q_v) is a flow from tokens and sets to tokens; it equals the least cut (all 256 are tried)."""
    holds = [({v}, mass) for v, mass in enumerate(points)]
    holds += [(set(LAMINAR.members(s).tolist()), mass) for s, mass in masses.items()]
    cuts = itertools.product((False, True), repeat=len(q))
    return min(
        sum(q[v] for v, chosen in enumerate(cut) if chosen)
        + sum(mass for tokens, mass in holds if not all(cut[v] for v in tokens))
        for cut in cuts
    )


def test_the_maximum_is_the_least_cut():
    """Sparse and flat masses on tokens and nested sets, and on none."""
    rng, found, expected, parts = np.random.default_rng(0), [], [], []
    q = rng.dirichlet(np.full(8, 0.3), 40)
    for row in range(40):
        chosen = np.flatnonzero(rng.random(6) < 0.6) if row else np.zeros(0, int)
        mass = rng.dirichlet(np.full(8 + len(chosen), 0.4))
        parts.append((mass[:8], dict(zip(chosen.tolist(), mass[8:].tolist(), strict=True))))
        expected.append(least_cut(*parts[-1], q[row]))
    said = Said(
        points=np.array([points for points, _ in parts]),
        position=np.concatenate([np.full(len(masses), row) for row, (_, masses) in enumerate(parts)]),
        sets=np.array([s for _, masses in parts for s in masses]),
        masses=np.array([m for _, masses in parts for m in masses.values()]),
        table=LAMINAR,
    )
    found = acceptance(said, q)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[0] == pytest.approx(np.minimum(parts[0][0], q[0]).sum())
    assert (found > np.minimum(said.points, q).sum(-1) + 1e-3).sum() > 20


def test_one_tokenizer_is_plain_acceptance():
    """Nothing is open, all lands where it is: Σ min(p, q)."""
    tokenizer, rng = byte_level(300, CORPUS[:1]), np.random.default_rng(1)  # no token is a part of a character
    pair = pair_of(tokenizer, tokenizer)
    width = len(pair.control)
    p, q = rng.dirichlet(np.full(width, 0.1), (2, 5))
    kept, said = carried(p, np.zeros(5, np.int64), Answers(pair=pair))
    assert kept.tolist() == [0, 1, 2, 3, 4]
    assert said.points == pytest.approx(p, abs=1e-15)
    assert not len(said.masses)
    assert acceptance(said, q) == pytest.approx(np.minimum(p, q).sum(-1))


def test_a_finer_student_is_exact():
    """Of a BPE with fewer merges each teacher token begins with one token: q(v) = Σ p(w) over those w accepts all."""
    teacher, rng = byte_level(), np.random.default_rng(2)
    pair = pair_of(teacher, truncated(teacher, 30))
    p = rng.dirichlet(np.full(len(pair.control), 0.3), 3)
    begins = [cut_ids([piece], pair)[0][0] if piece else pair.student.eos for piece in pair.teacher.of_id]
    exact = np.stack([np.bincount(begins, each, len(pair.student.of_id)) for each in p])
    _, said = carried(p, np.zeros(3, np.int64), Answers(pair=pair))
    assert acceptance(said, exact) == pytest.approx(np.ones(3))
    inside = set(said.sets.tolist())
    assert all(said.table.last[s] - said.table.first[s] > 1 for s in inside)


def test_positions_have_the_same_bytes_before_them(world, tmp_path):
    """Both models have read one text at every place; masses sum to 1; own acceptance is the definition, row by row."""
    import torch

    texts = [json.loads(line)["text"] for line in Path(world.corpus).read_text().splitlines()]
    byte_level(400, texts[::-1]).save_pretrained(tmp_path / "other")
    exam = open_exam(teacher=world.teacher, rows=world.rows, tokenizer=str(tmp_path / "other"), count=4)
    pair = pair_of(*(load_tokenizer(path) for path in (f"{world.rows}/tokenizer", tmp_path / "other")))
    assert len(exam.places) > 40
    for (row, at), (own_row, own_at) in zip(exam.places.tolist(), exam.own_places.tolist(), strict=True):
        before = text_of(exam.rows[row][:at], pair.student)
        assert row == own_row
        assert before == text_of(exam.own_rows[row][:own_at], pair.teacher)
        assert before
    sums = exam.said.points.sum(-1) + np.bincount(exam.said.position, exam.said.masses, len(exam.places))
    assert sums == pytest.approx(np.ones(len(sums)))
    assert 0 < exam.said.masses.sum() < len(sums)
    model = models.open_model(world.teacher)
    assert own_acceptance(exam, model) == pytest.approx(np.ones(len(sums)))
    fresh = models.new_student("tiny", vocab_size=len(pair.student.of_id), seq_len=64)
    found = cross_acceptance(exam, fresh.eval())
    assert ((found > 0) & (found < 1)).all()
    with torch.no_grad():
        row, at = exam.places[7]
        logits = fresh(input_ids=torch.tensor(exam.rows[row])[None]).logits[0, at - 1]
    entries = exam.said.position == 7
    alone = Said(points=exam.said.points[7:8], position=exam.said.position[entries] - 7, sets=exam.said.sets[entries],
                 masses=exam.said.masses[entries], table=exam.said.table)  # fmt: skip
    assert acceptance(alone, logits.double().softmax(-1).numpy()[None])[0] == pytest.approx(found[7])
