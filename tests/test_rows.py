"""Laws of packing: no token is lost, bytes repeat, splits share nothing, memory is bounded, damage is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd import rows, spool, vocab
from sparsekd.corpus import Document
from sparsekd.errors import MismatchError, RecipeError, SourceError, StorageError, VersionError
from sparsekd.rows import PackedRow, RowsReader, pack

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "hat", "had", "a", "bat"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return vocab.train_tokenizer([" ".join(WORDS) * 3] * 4, 300)


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) + f" number {i}" for i in range(count)]


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_texts(path: Path, lines: list[str]) -> Path:
    return write_records(path, [{"text": line} for line in lines])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def unpacked(path: Path, split: str, eos: int) -> list[list[int]]:
    """The documents of a split, cut at their starts, without padding: a reading independent of the packer."""
    reader = RowsReader(path, split)
    everything = reader.batch(range(len(reader)))
    ids, starts = everything.input_ids.ravel(), everything.starts.ravel()
    real = len(ids) - reader.manifest["splits"][split]["padding"]
    assert (ids[real:] == eos).all()
    assert not starts[real:].any()
    assert not everything.supervised.ravel()[real:].any()
    return [part.tolist() for part in np.split(ids[:real], np.flatnonzero(starts[:real]))[1:]]


def encoded(tokenizer: Any, lines: list[str]) -> list[list[int]]:
    return [[*tokenizer(line)["input_ids"], tokenizer.eos_token_id] for line in lines]


# -- laws


@pytest.mark.parametrize("seq_len", [2, 7, 16, 333])
def test_no_token_is_lost_and_no_document_changes(tmp_path: Path, tokenizer: Any, seq_len: int) -> None:
    """Rows minus padding are exactly the documents, each joined with EOS, each once, over both splits."""
    lines = texts(60)
    source = write_texts(tmp_path / "a.jsonl", lines)
    manifest = pack(source=source, tokenizer=tokenizer, seq_len=seq_len, out=tmp_path / "rows", heldout=0.2)
    found = [unpacked(tmp_path / "rows", split, tokenizer.eos_token_id) for split in ("train", "heldout")]
    assert sorted(found[0] + found[1]) == sorted(encoded(tokenizer, lines))
    for split, parts in zip(("train", "heldout"), found, strict=True):
        numbers = manifest["splits"][split]
        assert numbers["tokens"] == numbers["supervised"] == sum(map(len, parts))
        assert numbers["documents"] == len(parts)
        assert numbers["rows"] * seq_len == numbers["tokens"] + numbers["padding"]
        assert 0 <= numbers["padding"] < seq_len
    assert sum(manifest["splits"][split]["bytes"] for split in found_splits(manifest)) == sum(map(len, lines))


def found_splits(manifest: dict[str, Any]) -> list[str]:
    return list(manifest["splits"])


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), seq_len=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_cutting_keeps_the_stream(sizes: list[int], seq_len: int) -> None:
    """Joined rows equal joined documents followed by EOS padding, for any lengths."""
    tokens = np.arange(sum(sizes), dtype=np.uint32) + 100
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    joined = np.concatenate(list(rows._cut(parts, seq_len, 7))).ravel()
    assert joined.tolist() == tokens.tolist() + [7] * (-len(tokens) % seq_len)


def test_cutting_in_chunks_equals_cutting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the working buffer is invisible in the rows."""
    parts = [np.arange(n, dtype=np.uint32) for n in (5, 1, 9, 30, 2, 2, 8)]
    at_once = np.concatenate(list(rows._cut(parts, 4, 0)))
    monkeypatch.setattr(rows, "_CHUNK_TOKENS", 6)
    in_chunks = list(rows._cut(parts, 4, 0))
    assert len(in_chunks) > 3
    assert np.array_equal(np.concatenate(in_chunks), at_once)


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    """Two packs are equal file by file, the trained tokenizer and the manifest included."""
    source = write_texts(tmp_path / "a.jsonl", texts(50))
    for out in ("one", "two"):
        pack(source=source, tokenizer="train", vocab_size=280, seq_len=16, out=tmp_path / out, heldout=0.2, seed=3)
    one, two = (folder_bytes(tmp_path / out) for out in ("one", "two"))
    assert one == two
    assert {"manifest.json", "train_ids.npy", "heldout_supervised.npy", "tokenizer/tokenizer.json"} <= set(one)


def test_another_seed_is_another_order_and_fingerprint(tmp_path: Path, tokenizer: Any) -> None:
    """The seed shuffles: the same documents in another order, which is not the order of the file."""
    lines = texts(40)
    source = write_texts(tmp_path / "a.jsonl", lines)
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 16, "heldout": 0}
    for seed in (0, 1):
        pack(**common, out=tmp_path / str(seed), seed=seed)
    orders = [unpacked(tmp_path / str(seed), "train", tokenizer.eos_token_id) for seed in (0, 1)]
    assert orders[0] != orders[1] != encoded(tokenizer, lines)
    assert sorted(orders[0]) == sorted(orders[1])
    prints = {RowsReader(tmp_path / str(seed)).fingerprint for seed in (0, 1)}
    assert len(prints) == 2


def test_the_fingerprint_is_of_the_rows_not_of_where_they_came_from(tmp_path: Path, tokenizer: Any) -> None:
    """JSON lines, Parquet and a saved dataset of the same texts give identical rows and fingerprints."""
    import datasets

    lines = texts(30)
    data = datasets.Dataset.from_dict({"text": lines})
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    write_texts(tmp_path / "a.jsonl", lines)
    packed = [
        pack(source=tmp_path / name, tokenizer=tokenizer, seq_len=16, out=tmp_path / f"rows{i}", heldout=0.2)
        for i, name in enumerate(("a.jsonl", "a.parquet", "saved"))
    ]
    assert packed[0]["splits"] == packed[1]["splits"] == packed[2]["splits"]
    other_length = pack(source=tmp_path / "a.jsonl", tokenizer=tokenizer, seq_len=8, out=tmp_path / "rows8")
    assert other_length["splits"]["train"]["fingerprint"] != packed[0]["splits"]["train"]["fingerprint"]


def test_starts_and_row_contents_by_hand(tmp_path: Path) -> None:
    """One document of bytes, written out: ids, starts, supervision, padding, and the bits on the disk."""
    source = write_texts(tmp_path / "a.jsonl", ["ab"])
    made = vocab.train_tokenizer([], 257)
    pack(source=source, tokenizer=made, seq_len=5, out=tmp_path / "rows", heldout=0)
    a, b = (made.convert_tokens_to_ids(letter) for letter in "ab")
    row = RowsReader(tmp_path / "rows")[0]
    assert row.input_ids.tolist() == [a, b, 0, 0, 0]
    assert row.starts.tolist() == [True, False, False, False, False]
    assert row.supervised.tolist() == [True, True, True, False, False]
    on_disk = {kind: np.load(tmp_path / "rows" / f"train_{kind}.npy") for kind in ("ids", "starts", "supervised")}
    assert on_disk["ids"].dtype == np.uint16
    assert [on_disk["starts"].tolist(), on_disk["supervised"].tolist()] == [[[0b00001]], [[0b00111]]]


def test_a_pair_supervises_its_response_and_eos_in_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    """From record to row: the supervised tokens, in order, are the responses with their EOS."""
    records = [{"prompt": f"the cat {i} ", "response": f"sat {i}"} for i in range(20)]
    source = write_records(tmp_path / "a.jsonl", records)
    manifest = pack(source=source, tokenizer=tokenizer, seq_len=9, out=tmp_path / "rows", heldout=0)
    everything = RowsReader(tmp_path / "rows").batch(range(manifest["splits"]["train"]["rows"]))
    answers = tokenizer.decode(everything.input_ids[everything.supervised]).split(vocab.EOS)
    assert Counter(answers) == Counter([f"sat {i}" for i in range(20)] + [""])
    assert manifest["splits"]["train"]["supervised_bytes"] == sum(len(r["response"]) for r in records)


def test_ids_beyond_16_bits_are_stored_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary above 65,536 is stored in 32 bits, ids included."""
    made = vocab.train_tokenizer([], 257)
    monkeypatch.setattr(vocab, "vocab_size", lambda _: 1 << 17)
    big = vocab.Encoded(ids=np.array([1 << 16, 5], np.uint32), supervised=np.ones(2, bool), bytes=1, supervised_bytes=1)
    monkeypatch.setattr(vocab, "encode", lambda _, documents: [big for _ in documents])
    pack(source=write_texts(tmp_path / "a.jsonl", ["x"]), tokenizer=made, seq_len=2, out=tmp_path / "rows", heldout=0)
    assert RowsReader(tmp_path / "rows")[0].input_ids.tolist() == [1 << 16, 5]


# -- splits


def test_duplicates_never_straddle_the_split(tmp_path: Path, tokenizer: Any) -> None:
    """Exact copies go to one side together, wherever they stand in the source."""
    lines = texts(50) * 3
    source = write_texts(tmp_path / "a.jsonl", lines)
    pack(source=source, tokenizer=tokenizer, seq_len=16, out=tmp_path / "rows", heldout=0.3)
    train, heldout = (
        {tuple(document) for document in unpacked(tmp_path / "rows", split, tokenizer.eos_token_id)}
        for split in ("train", "heldout")
    )
    assert len(train) + len(heldout) == 50
    assert not train & heldout


def test_the_heldout_share_is_about_what_was_asked(tmp_path: Path, tokenizer: Any) -> None:
    """2000 distinct documents at heldout=0.1 hold out 200 within five standard deviations; it depends on the seed."""
    source = write_texts(tmp_path / "a.jsonl", texts(2000))
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 64, "heldout": 0.1}
    counts = [pack(**common, out=tmp_path / str(s), seed=s)["splits"]["heldout"]["documents"] for s in (0, 1)]
    assert all(abs(count - 200) < 5 * np.sqrt(2000 * 0.1 * 0.9) for count in counts)
    assert counts[0] != counts[1]


def test_a_small_corpus_still_gets_a_heldout_document(tmp_path: Path, tokenizer: Any) -> None:
    """When no hash falls below the share, the smallest one is held out; heldout=0 holds out nothing."""
    source = write_texts(tmp_path / "a.jsonl", ["one", "two"])
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 8}
    splits = pack(**common, out=tmp_path / "some", heldout=1e-9)["splits"]
    assert {name: split["documents"] for name, split in splits.items()} == {"train": 1, "heldout": 1}
    assert list(pack(**common, out=tmp_path / "none", heldout=0)["splits"]) == ["train"]
    with pytest.raises(SourceError, match=r"has no split 'heldout'; it has train"):
        RowsReader(tmp_path / "none", "heldout")


@pytest.mark.parametrize("lines", [["alone"], ["same", "same"]])
def test_one_document_cannot_be_split(tmp_path: Path, tokenizer: Any, lines: list[str]) -> None:
    """Two different documents are the least for a held-out split; the message says how to go without."""
    source = write_texts(tmp_path / "a.jsonl", lines)
    with pytest.raises(SourceError, match=r"leaves no document to train on: .* set heldout=0, give more documents"):
        pack(source=source, tokenizer=tokenizer, seq_len=8, out=tmp_path / "rows")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_blank_and_unanswered_documents_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    """Blank texts and prompts without a response are left out and counted; nothing left is an error."""
    records = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}, {"prompt": " ", "response": "\n"}]
    source = write_records(tmp_path / "a.jsonl", records)
    manifest = pack(source=source, tokenizer=tokenizer, seq_len=8, out=tmp_path / "rows", heldout=0)
    assert manifest["skipped"] == {"blank": 1, "no_response": 1}
    assert manifest["splits"]["train"]["documents"] == 1
    blank = write_texts(tmp_path / "b.jsonl", ["", "  "])
    with pytest.raises(SourceError, match=r"has tokens to train on: 2 are blank, 0 have no response"):
        pack(source=blank, tokenizer=tokenizer, seq_len=8, out=tmp_path / "other")


def test_limit_tokens_stops_after_the_document_that_reaches_it(tmp_path: Path, tokenizer: Any) -> None:
    """The packed documents are the shortest prefix of the source with at least limit_tokens tokens."""
    lines = texts(60)
    sizes = np.cumsum([len(ids) for ids in encoded(tokenizer, lines)])
    source = write_texts(tmp_path / "a.jsonl", lines)
    pack(source=source, tokenizer=tokenizer, seq_len=8, out=tmp_path / "rows", heldout=0, limit_tokens=300)
    count = int(np.searchsorted(sizes, 300)) + 1
    found = unpacked(tmp_path / "rows", "train", tokenizer.eos_token_id)
    assert sorted(found) == sorted(encoded(tokenizer, lines[:count]))


def test_spooling_in_small_chunks_changes_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many documents are looked at together is invisible in the rows."""
    source = write_texts(tmp_path / "a.jsonl", texts(50))
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 8, "heldout": 0.2}
    at_once = pack(**common, out=tmp_path / "one")
    monkeypatch.setattr(spool, "_CHUNK", 7)
    monkeypatch.setattr(rows, "_BATCH_DOCUMENTS", 3)
    assert pack(**common, out=tmp_path / "two") == at_once


# -- the folder


def test_packing_again_returns_what_is_there(tmp_path: Path, tokenizer: Any) -> None:
    """The same settings find the finished folder and touch nothing; a source that grew is noticed."""
    source = write_texts(tmp_path / "a.jsonl", texts(10))
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 8, "out": tmp_path / "rows"}
    first = pack(**common)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    assert pack(**common) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()} == times
    write_texts(source, texts(11))
    with pytest.raises(
        MismatchError, match=r"packed with source\.bytes=\d+, these settings have \d+; .* documents back"
    ):
        pack(**common)
    whole = write_texts(source, texts(10)).read_bytes()
    assert pack(**common) == first
    source.write_bytes(whole[:-4] + b"?" + whole[-3:])
    with pytest.raises(MismatchError, match=r"packed with source\.sampled_sha256=[0-9a-f]{64}, these settings have"):
        pack(**common)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_len": 16}, r"rows was packed with seq_len=8, these settings have 16; choose another out=, or pack with"),
        ({"field": "text"}, r"packed with field=None, these settings have text"),
        ({"seed": 1}, r"packed with seed=0, these settings have 1"),
        ({"heldout": 0.5}, r"packed with heldout=0\.02, these settings have 0\.5"),
        ({"tokenizer": "train"}, r"packed with tokenizer=[0-9a-f]{64}, these settings have train"),
    ],
)
def test_other_settings_on_the_same_folder_are_refused(
    tmp_path: Path, tokenizer: Any, change: dict[str, Any], words: str
) -> None:
    """A folder packed otherwise is never overwritten; the message names the first difference and the way out."""
    source = write_texts(tmp_path / "a.jsonl", texts(10))
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 8, "out": tmp_path / "rows"}
    pack(**common)
    with pytest.raises(MismatchError, match=words):
        pack(**common | change)


def test_a_damaged_folder_is_not_taken_for_packed(tmp_path: Path, tokenizer: Any) -> None:
    """The same settings do not make a folder whole that lost a file."""
    source = write_texts(tmp_path / "a.jsonl", texts(10))
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 8, "out": tmp_path / "rows"}
    pack(**common)
    (tmp_path / "rows" / "heldout_starts.npy").unlink()
    with pytest.raises(
        SourceError, match=r"heldout_starts\.npy is missing or damaged .*delete the folder and pack again"
    ):
        pack(**common)


def test_rows_are_on_the_disk_before_their_folder_has_its_name(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every array is synced when all of its bytes are written: a power cut leaves no folder with half of them."""
    synced, sync = {}, os.fsync

    def note(descriptor: int) -> None:
        found = os.fstat(descriptor)
        assert not (tmp_path / "rows").exists()
        synced[found.st_ino] = found.st_size
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    source = write_texts(tmp_path / "c.jsonl", texts(20))
    pack(source=source, tokenizer=tokenizer, seq_len=16, out=tmp_path / "rows", progress=False)
    arrays = list((tmp_path / "rows").glob("*.npy"))
    assert len(arrays) == 6
    assert {path.stat().st_ino: path.stat().st_size for path in arrays}.items() <= synced.items()


@pytest.mark.skipif(os.name == "nt", reason="folders have no such modes there")
def test_rows_are_as_public_as_any_other_folder(tmp_path: Path, tokenizer: Any) -> None:
    """The mode of a folder made by hand, under any mask; a folder that it lies in is made too."""
    source = write_texts(tmp_path / "c.jsonl", texts(5))
    before = os.umask(0o027)
    try:
        (tmp_path / "plain").mkdir()
        out = tmp_path / "not" / "there" / "yet"
        pack(source=source, tokenizer=tokenizer, seq_len=16, heldout=0, out=out, progress=False)
        assert os.umask(0o027) == 0o027, "the mask is left as it was"
    finally:
        os.umask(before)
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path, tokenizer: Any) -> None:
    """`out` with something else in it is refused and kept; an empty folder is taken."""
    source = write_texts(tmp_path / "a.jsonl", texts(10))
    (tmp_path / "thesis").mkdir()
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 8, "out": tmp_path / "thesis"}
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(MismatchError, match=r"thesis is not empty and holds no packed rows; give another out="):
        pack(**common)
    (tmp_path / "thesis" / "chapter.tex").unlink()
    assert pack(**common)["splits"]["train"]["rows"] > 0


def test_an_error_leaves_nothing_behind(tmp_path: Path, tokenizer: Any) -> None:
    """A bad record in the middle: no folder, no scratch; repaired, the pack runs."""
    source = write_texts(tmp_path / "a.jsonl", texts(10))
    good = source.read_text()
    source.write_text(good + "{broken\n")
    common = {"source": source, "tokenizer": tokenizer, "seq_len": 8, "out": tmp_path / "rows"}
    with pytest.raises(SourceError, match=r"a\.jsonl:11 is not JSON"):
        pack(**common)
    assert os.listdir(tmp_path) == ["a.jsonl"]
    source.write_text(good)
    assert pack(**common)["splits"]["train"]["rows"] > 0


def test_a_killed_pack_is_cleaned_up_by_the_next(tmp_path: Path, tokenizer: Any) -> None:
    """The scratch folder of a dead process goes; that of a living one stays."""
    import socket

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".rows.packing-{socket.gethostname()}-{pid}-abc" for pid in (dead.pid, os.getpid())]
    for name in names:
        (tmp_path / name).mkdir()
    source = write_texts(tmp_path / "a.jsonl", texts(10))
    pack(source=source, tokenizer=tokenizer, seq_len=8, out=tmp_path / "rows")
    assert sorted(os.listdir(tmp_path)) == sorted([names[1], "a.jsonl", "rows"])


def test_a_full_disk_is_told_and_cleaned_up(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left is a StorageError that says what is needed; nothing stays."""

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool, "write", full)
    source = write_texts(tmp_path / "a.jsonl", texts(10))
    with pytest.raises(StorageError, match=r"the disk of .*rows is full .*nothing was kept: free some space"):
        pack(source=source, tokenizer=tokenizer, seq_len=8, out=tmp_path / "rows")
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_len": 1}, r"seq_len=1 leaves no next token to predict"),
        ({"seed": -1}, r"seed=-1 is outside \[0, 2\^64\)"),
        ({"heldout": 1.0}, r"heldout=1\.0 is outside \[0, 1\)"),
        ({"heldout": -0.02}, r"heldout=-0\.02 is outside \[0, 1\)"),
        ({"limit_tokens": 0}, r"limit_tokens=0 keeps nothing"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """Every number is checked before anything is opened."""
    common = {"source": "no", "tokenizer": "no", "seq_len": 8, "out": tmp_path / "rows"}
    with pytest.raises(RecipeError, match=words):
        pack(**common | change)


# -- scale


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the documents take the same Python memory at the peak, far below the corpus's size."""

    def encode(_: Any, documents: list[Document]) -> list[vocab.Encoded]:  # BPE of 30 MB would take half a minute
        ids = [np.frombuffer(document.text.encode(), np.uint8).astype(np.uint32) for document in documents]
        return [
            vocab.Encoded(ids=i, supervised=np.ones(len(i), bool), bytes=len(i), supervised_bytes=len(i)) for i in ids
        ]

    monkeypatch.setattr(vocab, "encode", encode)
    made = vocab.train_tokenizer([], 257)
    line = json.dumps({"text": "x" * 10_000})
    peaks = []
    for megabytes in (3, 30):
        source = tmp_path / f"{megabytes}.jsonl"
        source.write_text((line + "\n") * (100 * megabytes))
        tracemalloc.start()
        manifest = pack(source=source, tokenizer=made, seq_len=512, out=tmp_path / str(megabytes), heldout=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert manifest["splits"]["train"]["bytes"] == megabytes * 10**6
    assert peaks[1] < 1.2 * peaks[0] + 1e6, peaks


def test_the_builtin_corpus_packs(tmp_path: Path) -> None:
    """source=builtin tokenizer=train needs nothing else; the manifest pins the corpus and the tokenizer."""
    manifest = pack(
        source="builtin", tokenizer="train", vocab_size=512, seq_len=64, out=tmp_path / "rows", limit_tokens=50_000
    )
    assert manifest["source"]["kind"] == "builtin"
    assert len(manifest["source"]["sha256"]) == 64
    assert manifest["tokenizer"]["name"] == "trained-512"
    train = RowsReader(tmp_path / "rows")
    made = train.tokenizer()
    assert (len(made), vocab.fingerprint(made)) == (512, manifest["tokenizer"]["hash"])
    assert "import" in made.decode(train.batch(range(50)).input_ids.ravel())


# -- reading


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    source = write_texts(folder / "a.jsonl", texts(40))
    pack(source=source, tokenizer=tokenizer, seq_len=16, out=folder / "rows", heldout=0.2)
    return folder / "rows"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "rows"))


def test_a_reader_is_a_sequence_of_rows(packed: Path) -> None:
    """Length, negative indices, IndexError and batches behave as a list's; dtypes are the promised ones."""
    with RowsReader(packed) as reader:
        row = reader[-1]
        assert isinstance(row, PackedRow)
        assert (row.index, row.input_ids.dtype, row.starts.dtype) == (len(reader) - 1, np.uint32, bool)
        assert len(list(reader)) == len(reader) == reader.manifest["splits"]["train"]["rows"]
        batch = reader.batch([2, 0])
        for place, index in enumerate((2, 0)):
            assert np.array_equal(batch.input_ids[place], reader[index].input_ids)
            assert np.array_equal(batch.starts[place], reader[index].starts)
            assert np.array_equal(batch.supervised[place], reader[index].supervised)
        for outside in (len(reader), -len(reader) - 1):
            with pytest.raises(IndexError, match=f"row {outside} of {len(reader)} rows"):
                reader[outside]


def test_a_pickled_reader_opens_the_files_itself(packed: Path) -> None:
    """A worker gets the path, not the rows."""
    reader = RowsReader(packed, "heldout")
    sent = pickle.dumps(reader)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent)[0].input_ids, reader[0].input_ids)


def test_verify_notices_every_changed_array(copy: Path) -> None:
    """An intact folder passes; one flipped bit in any array does not."""
    RowsReader(copy).verify()
    for kind in ("ids", "starts", "supervised"):
        path = copy / f"train_{kind}.npy"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(
            SourceError, match=r"rows have fingerprint .*, the manifest says .*delete the folder and pack again"
        ):
            RowsReader(copy).verify()
        path.write_bytes(good)


def test_an_exchanged_tokenizer_is_refused(copy: Path) -> None:
    """The tokenizer beside the rows must be the one that made them."""
    vocab.train_tokenizer(["other"] * 9, 260).save_pretrained(copy / "tokenizer")
    with pytest.raises(SourceError, match=r"tokenizer has hash .*, the rows were made with"):
        RowsReader(copy).tokenizer()


@pytest.mark.parametrize("kind", ["ids", "starts", "supervised"])
def test_truncated_arrays_are_refused(copy: Path, kind: str) -> None:
    """An array cut at any of many lengths, or missing, is a SourceError at opening."""
    path = copy / f"train_{kind}.npy"
    content = path.read_bytes()
    for length in (*range(0, 140), len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(
            SourceError, match=rf"train_{kind}\.npy is missing or damaged .*delete the folder and pack again"
        ):
            RowsReader(copy)
    path.unlink()
    with pytest.raises(SourceError, match=rf"train_{kind}\.npy is missing or damaged"):
        RowsReader(copy)


@pytest.mark.parametrize(
    "array", [np.zeros((3, 16), "<u2"), np.zeros((9, 16), "<f4"), np.zeros(9, "<u2"), np.array([None], object)]
)
def test_arrays_of_another_shape_or_type_are_refused(copy: Path, array: np.ndarray) -> None:
    """An array that is not what the manifest says is refused; pickled objects are never loaded."""
    np.save(copy / "train_ids.npy", array)
    with pytest.raises(SourceError, match=r"train_ids\.npy is .*delete the folder and pack again"):
        RowsReader(copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"manifest\.json cannot be read"),
        (b"\xff", r"manifest\.json cannot be read"),
        (b"[" * 100_000, r"manifest\.json cannot be read"),
        (b"[]", r"holds None, not 'sparsekd-rows'; give a folder that `sparsekd pack` wrote"),
        (b'{"format": "sparsekd-cache"}', r"holds 'sparsekd-cache', not 'sparsekd-rows'"),
        (b'{"format": "sparsekd-rows"}', r"has format_version None"),
        (b'{"format": "sparsekd-rows", "format_version": 1}', r"manifest\.json is damaged \(KeyError\('splits'\)\)"),
        (b'{"format": "sparsekd-rows", "format_version": 1, "splits": 3}', r"manifest\.json is damaged"),
        (b'{"format": "sparsekd-rows", "format_version": 1, "splits": {"train": 3}, "seq_len": 16}', "is damaged"),
    ],
)
def test_damaged_manifests_are_refused(copy: Path, content: bytes, words: str) -> None:
    """A manifest that is damaged or belongs to something else is one sentence, never a traceback."""
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(SourceError, match=words):
        RowsReader(copy)


def test_rows_of_a_newer_sparsekd_are_refused(copy: Path) -> None:
    """A newer format is named with both versions."""
    manifest = json.loads((copy / "manifest.json").read_text()) | {"format_version": 2}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VersionError, match=r"newer sparsekd \(format 2, this one reads 1\); upgrade sparsekd"):
        RowsReader(copy)


def test_a_folder_without_rows_says_how_to_make_them(tmp_path: Path) -> None:
    """A missing folder, and one that holds something else, name the verb that packs."""
    with pytest.raises(SourceError, match=r"nothing does not exist; make packed rows with `sparsekd pack`"):
        RowsReader(tmp_path / "nothing")
    (tmp_path / "thesis").mkdir()
    with pytest.raises(SourceError, match=r"thesis .*`sparsekd pack`"):
        RowsReader(tmp_path / "thesis")


def test_importing_rows_loads_neither_torch_nor_transformers() -> None:
    """Rows are numpy: a process that only reads them starts quickly."""
    code = "import sparsekd.rows, sys; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
