"""Tables 11 and 13: the texts they are made from, the packings they compare, and both from rows to findings."""

from __future__ import annotations

import ast
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SEQ_LEN

import sparsekd as skd
from sparsekd import lab as lab_module
from sparsekd import teacher_tables
from sparsekd.lab import Lab, LabSettings
from sparsekd.packed import RowsReader
from sparsekd.reproduction import Settings
from sparsekd.teacher_tables import ADAPTED, ALIGNED, ORIGINAL, SHORT, SHUFFLED, packings, printed_anew, texts_of

TINY = LabSettings(
    teacher_steps=8,
    student={"family": "tiny", "hidden_size": 16, "intermediate_size": 32},
    student_rows=64,
    student_steps=4,
    batch_size=16,
    eval_rows=8,
    seeds=(0,),
)


@pytest.fixture
def settings(world, monkeypatch):
    """A lab of tiny students trained in this process, its own sizes for rows of another length than the world's."""
    monkeypatch.setitem(lab_module.SETTINGS, "quick", TINY)
    monkeypatch.setattr(lab_module, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    return Settings(seeds=1, rows=world.rows, teacher=world.teacher, say=lambda _: None)


def test_documents_come_back_as_they_were_packed(world):
    """Both splits together hold the corpus's texts, each once; the padding of the last row adds nothing."""
    with open(world.corpus, encoding="utf-8") as file:
        corpus = [json.loads(line)["text"] for line in file]
    assert sorted([*texts_of(world.rows), *texts_of(world.rows, "heldout")]) == sorted(corpus)
    first = list(texts_of(world.rows, limit_rows=4))
    assert first[:-1] == list(texts_of(world.rows))[: len(first) - 1]


def test_printed_anew_is_the_same_code_in_another_hand():
    """By hand: no comments, single quotes, one line; equal syntax trees; what is no Python gives nothing."""
    source = 'x = "yes"  # one\n\n\ny = f(1,\n      "\\d")\n'
    assert printed_anew(source) == "x = 'yes'\ny = f(1, '\\\\d')"
    assert ast.dump(ast.parse(printed_anew(source))) == ast.dump(ast.parse(source.replace("\\d", "\\\\d")))
    assert printed_anew("def (:") == ""
    assert printed_anew("x = '\0'") == ""


def test_packings_differ_in_targets_alone(settings, world, tmp_path):
    """Three caches of one packing: equal rows and positions; two say whose packing their targets were made for."""
    lab = Lab(tmp_path / "lab", TINY, rows=world.rows, teacher=world.teacher, say=lambda _: None)
    caches, kept = packings(lab)
    readers = {label: skd.CacheReader(path) for label, path in caches.items()}
    assert all(reader.stats["positions"] == kept for reader in readers.values())
    for row in range(len(readers[ALIGNED])):
        ours, *others = (reader.record(row) for reader in readers.values())
        for other in others:
            assert np.array_equal(ours.input_ids, other.input_ids)
            assert np.array_equal(ours.supervised[1:], other.supervised[1:])
    made_for = {label: reader.spec.data.get("misaligned") for label, reader in readers.items()}
    assert made_for[ALIGNED] is None
    assert [(made_for[x]["seed"], made_for[x]["seq_len"]) for x in (SHUFFLED, SHORT)] == [
        (1, SEQ_LEN),
        (1, SEQ_LEN // 4),
    ]
    rows = RowsReader(tmp_path / "lab" / "packings" / "rows-seed0-32")
    assert readers[ALIGNED].spec.data["fingerprint"] == rows.fingerprint
    assert kept > 0.8 * sum(int(row.supervised[1:].sum()) for row in rows)
    assert packings(lab) == (caches, kept)


def test_table_13_from_rows_to_findings(settings, tmp_path):
    """All five students, and no two alike; with one seed nothing is decided."""
    result = teacher_tables.table13(tmp_path / "table13", settings)
    assert list(result.ours.rows) == ["CE", SHORT, SHUFFLED, ALIGNED, "FullKD"]
    losses = [cells[1].mean for cells in result.ours.rows.values()]
    assert len(set(losses)) == 5
    assert [finding.holds for finding in result.findings] == [None] * 4
    assert "learns from the same" in result.scale


def test_table_11_adapts_the_given_teacher(settings, world, tmp_path):
    """The user's teacher is the original; the adapted one is another, made from it, and each has its students."""
    result = teacher_tables.table11(tmp_path / "table11", settings)
    assert list(result.ours.rows) == ["CE", ORIGINAL, ADAPTED]
    facts = json.loads((tmp_path / "lab" / "adapted" / "adapt.json").read_text())
    assert facts["teacher"]["id"] == world.teacher
    assert facts["weights"] != facts["teacher"]["weights"]
    assert result.ours.rows["CE"][2].mean == 0
    of_teachers = [result.ours.rows[label][0].mean for label in (ORIGINAL, ADAPTED)]
    assert of_teachers[0] != of_teachers[1]
    students = [result.ours.rows[label][1].mean for label in (ORIGINAL, ADAPTED)]
    assert students[0] != students[1]
    assert world.teacher in result.scale
