"""Laws of document sources: every format gives the same documents, and a refusal names the place and the way out."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsekd import corpus, sources
from sparsekd.corpus import Document, Reading, describe, document_of, documents
from sparsekd.errors import RecipeError, SourceError

TEXTS = ["first text", "zwölf Boxkämpfer\nzweite Zeile", "", "last, with a trailing space "]


def texts_of(source: Any, **reading: Any) -> list[str]:
    return [document.text for document in documents(source, **reading)]


def write_json_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def record_document(record: dict[str, Any], **reading: Any) -> Document:
    return document_of(record, Reading(**reading), "here")


# -- formats


def test_json_lines_parquet_and_saved_datasets_give_the_same_documents(tmp_path: Path) -> None:
    """The container does not matter: JSON lines, gzipped ones, Parquet and a saved dataset agree."""
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3, 4]})
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "saved"):
        assert texts_of(tmp_path / name) == TEXTS, name
    assert texts_of(tmp_path / "splits", split="test") == TEXTS
    with pytest.raises(SourceError, match=r"has no split 'train'; it has test: set split="):
        texts_of(tmp_path / "splits")


def test_parquet_row_groups_are_streamed_in_order(tmp_path: Path) -> None:
    """Many row groups give one stream in file order, and only the columns that matter are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"body": [f"text {i}" for i in range(1000)], "junk": ["x"] * 1000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=64)
    assert texts_of(tmp_path / "a.parquet", field="body") == [f"text {i}" for i in range(1000)]
    columns = corpus._columns(["body", "junk"], Reading(field="body"), "here")
    assert columns == ["body"]


def test_a_hub_style_id_is_streamed_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id goes to load_dataset with its config, split and revision, streaming."""
    import datasets

    seen: dict[str, Any] = {}

    def load_dataset(path: str, config: str | None, **kwargs: Any) -> Any:
        seen.update(path=path, config=config, **kwargs)
        return ({"text": text} for text in TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of("someone/data:en", split="validation", revision="abc") == TEXTS
    assert seen == {
        "path": "someone/data", "config": "en", "split": "validation", "revision": "abc", "streaming": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text_by", "expected"),
    [
        ("document", ["one\ntwo\n\n\nthree\r\nfour"]),
        ("paragraph", ["one\ntwo", "three\nfour"]),
        ("line", ["one", "two", "", "", "three", "four"]),
    ],
)
def test_text_by_says_what_a_document_is(tmp_path: Path, text_by: str, expected: list[str]) -> None:
    """A text file is one document, or its paragraphs, or its lines; a byte order mark is not text."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\n\nthree\r\nfour")
    assert texts_of(tmp_path / "a.txt", text_by=text_by) == expected


def test_line_origins_are_line_numbers(tmp_path: Path) -> None:
    """A document's origin is the line where it begins, for error messages later."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\nmore\n")
    origins = [document.origin.rpartition(":")[2] for document in documents(tmp_path / "a.txt", text_by="paragraph")]
    assert origins == ["1", "3"]


def test_folders_globs_and_lists_have_a_fixed_order(tmp_path: Path) -> None:
    """Folders and globs are read in sorted order, lists in the given order; hidden files do not count."""
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts_of(f"{tmp_path}/**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts_of([tmp_path / "sub/c.txt", f"{tmp_path}/a.*"]) == ["sub/c.txt", "a.txt"]


# -- records


def test_pairs_supervise_the_response_only() -> None:
    """prompt + response follow each other as they are, and only the response is a target."""
    record = {"prompt": "2+2=", "response": "4", "id": 7}
    assert record_document(record).pieces == (("2+2=", False), ("4", True))
    named = {"question": "2+2=", "answer": "4", "text": "unused"}
    assert record_document(named, prompt_field="question", response_field="answer").pieces[1] == ("4", True)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "Add.\n\n2, 2\n\n"),
        ({"instruction": "Add.", "input": "", "output": "4"}, "Add.\n\n"),
        ({"instruction": "Add.", "context": "2, 2", "response": "4", "category": "sums"}, "Add.\n\n2, 2\n\n"),
    ],
)
def test_instruction_records_get_blank_lines(record: dict[str, Any], prompt: str) -> None:
    """instruction, input (or context) and output (or response) become one prompt and its response."""
    assert record_document(record).pieces == ((prompt, False), ("4", True))


def test_messages_stay_messages_without_nulls() -> None:
    """A list of messages is kept for the chat template; null fields are dropped, as templates print them."""
    record = {"messages": [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "yo"}]}
    assert record_document(record).messages[0] == {"role": "user", "content": "hi"}
    assert record_document({"chat": record["messages"]}, field="chat") == record_document(record)


def test_equal_documents_have_equal_bytes_wherever_they_come_from() -> None:
    """canonical_bytes ignores the origin, and tells supervised text from prompt text."""
    one, two = (Document(pieces=(("a", True),), origin=origin) for origin in ("x:1", "y:2"))
    assert one.canonical_bytes() == two.canonical_bytes()
    assert one.canonical_bytes() != Document(pieces=(("a", False),)).canonical_bytes()


# -- builtin


def test_builtin_is_the_standard_library_without_tests() -> None:
    """The builtin corpus is millions of characters of sources in path order, with a hash and no tests in it."""
    files = sources.builtin_files()
    names = [path.as_posix() for path in files]
    assert sum(path.stat().st_size for path in files) > 5e6
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any(part in name for name in names for part in ("/test/", "/tests/", "site-packages", "idlelib"))
    first = next(documents("builtin"))
    assert first.text == files[0].read_bytes().decode()


def test_builtin_is_described_by_version_and_hash() -> None:
    """The description pins what the corpus was: the Python version and a sha256 that repeats."""
    described = describe("builtin")
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["sha256"] == sources.builtin_sha256()
    assert len(described["sha256"]) == 64


def test_files_are_described_by_number_and_bytes(tmp_path: Path) -> None:
    """A file that grew changes the description, so rows packed from the old one are not taken for new."""
    (tmp_path / "a.txt").write_text("four")
    before = describe(tmp_path / "a.txt")
    assert (before["files"], before["bytes"], corpus.total_bytes(tmp_path)) == (1, 4, 4)
    (tmp_path / "a.txt").write_text("four!")
    assert describe(tmp_path / "a.txt") != before
    (tmp_path / "a.txt").write_text("fo_r")
    assert describe(tmp_path / "a.txt") != before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_described_unread(tmp_path: Path) -> None:
    """Opening it would take what is in it, or wait for whoever writes."""
    os.mkfifo(tmp_path / "a.txt")
    assert describe(tmp_path / "a.txt")["bytes"] == 0


def test_of_a_large_file_stretches_are_compared(tmp_path: Path) -> None:
    """All of 1 MB; beyond, both ends and what lies between in 16 parts, and not what lies between those."""
    path, found = tmp_path / "a.txt", {}
    for size, noticed in ((2**20, [0, 2**16, 2**19, 2**20 - 1]), (2**22, [0, 2**16 - 1, 2**22 - 1, 2**22 - 2**15])):
        path.write_bytes(bytes(size))
        whole = sources.sampled_sha256([str(path)])
        for at in [*noticed, 2**17]:
            path.write_bytes(bytes(at) + b"1" + bytes(size - at - 1))
            found[size, at] = sources.sampled_sha256([str(path)]) != whole
    assert [each for each, differs in found.items() if not differs] == [(2**22, 2**17)]


# -- refusals


def test_a_missing_file_shows_what_is_near(tmp_path: Path) -> None:
    """A misspelt path is answered with the contents of the nearest folder that exists."""
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(SourceError, match=r"trian\.jsonl does not exist; the nearest folder .* holds train\.jsonl"):
        texts_of(tmp_path / "trian.jsonl")
    with pytest.raises(SourceError, match=r"the nearest folder .* holds train\.jsonl"):
        texts_of(tmp_path / "no" / "such" / "a.txt")


def test_a_glob_without_matches_is_named(tmp_path: Path) -> None:
    """A glob that matches nothing is an error, not an empty corpus."""
    with pytest.raises(SourceError, match=r"the glob '.*\*\.md' matches no file; the nearest folder .* holds nothing"):
        texts_of(f"{tmp_path}/*.md")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not JSON .*each line is one record"),
        (b'{"text": "a"}\n[1, 2]\n', r"a\.jsonl:2 is a JSON list, not a record"),
        (b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
        (b'{"body": "a", "title": "b"}\n', r"a\.jsonl:1 has no field 'text'; it has 'body', 'title': set field="),
        (b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is int, not text; choose another field="),
        (
            b'{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}',
            r"a\.jsonl:1: field 'prompt' is list, not text; join the messages of both sides in one list, field=",
        ),
        (b'{"text": "a\\ud800"}\n', r"a\.jsonl:1: field 'text' holds half a surrogate pair, U\+D800 at character 1"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl is not UTF-8: byte 0xe9 at offset 24; convert it"),
        (b'{"text": "a", "prompt": "b", "output": "c"}\n', r"read in 2 ways: text, prompt and output; say which"),
        (b'{"messages": [{"from": "human"}]}\n', r"holds a message with from; each needs role and content"),
        (b'{"prompt": "a"}\n', r"has no field 'text'; it has 'prompt'"),
        (b"\n\n", r"holds no document; give files with at least one"),
    ],
)  # fmt: skip
def test_bad_records_name_their_place(tmp_path: Path, content: bytes, words: str) -> None:
    """A record that cannot be used is refused with file and line, what is there, and the way out."""
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(SourceError, match=words):
        texts_of(tmp_path / "a.jsonl")


def test_one_document_larger_than_the_memory_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump in one text file, before a byte of it is read; cut up it is read, and so is a file that fits."""
    (tmp_path / "dump.txt").write_text("a line of the dump\n\n" * 50)
    monkeypatch.setattr(corpus, "_physical_memory", lambda: 79_000)
    with pytest.raises(SourceError, match=r"dump\.txt is one document of 1e-06 GB: .* by text_by=paragraph or line"):
        texts_of(tmp_path / "dump.txt")
    assert len(texts_of(tmp_path / "dump.txt", text_by="paragraph")) == 50
    monkeypatch.setattr(corpus, "_physical_memory", lambda: 80_000)
    assert len(texts_of(tmp_path / "dump.txt")) == 1


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    """A Latin-1 file is refused with the byte and its offset, however the file is cut."""
    (tmp_path / "a.txt").write_bytes(b"line one\ncaf\xe9\n")
    for text_by in corpus.TEXT_BY:
        with pytest.raises(SourceError, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 12; convert it \(iconv"):
            texts_of(tmp_path / "a.txt", text_by=text_by)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("a.csv", r"load_dataset\('csv', data_files=\.\.\.\)\), or leave it out"),
        ("A.TSV.gz", "make JSON lines or Parquet"),
        ("a.tar.gz", "unpack it"),
        ("a.jsonl.zst", r"unpack it \(of compressed files only \.gz is read\)"),
        ("a.arrow", "give the folder that save_to_disk wrote"),
    ],
)
def test_a_file_that_is_no_text_is_refused_with_what_to_make_of_it(tmp_path: Path, name: str, way_out: str) -> None:
    """A table would be read as prose, commas, quotes and all; whatever is in the file, its name says enough."""
    (tmp_path / name).write_text("text\nhello\n")
    with pytest.raises(SourceError, match=rf"{re.escape(name)} is no text; .*{way_out}"):
        list(documents(str(tmp_path)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.parquet", "saved"])
def test_damaged_containers_are_refused(tmp_path: Path, name: str) -> None:
    """A truncated gzip, a file that is no Parquet and a gutted dataset are our error, naming the file."""
    if name == "saved":
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    else:
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "abc"}\n' * 100)[:-9])
    with pytest.raises(SourceError, match=f"{name} cannot be read: .*repair it or leave it out"):
        texts_of(tmp_path / name)


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `datasets` is not installed, its sources say which extra brings it."""
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    (tmp_path / "a.parquet").touch()
    for module in ("datasets", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for source in (tmp_path / "saved", tmp_path / "a.parquet", "someone/data"):
        with pytest.raises(SourceError, match=r"pip install 'sparsekd\[data\]'"):
            texts_of(source)


def test_an_unknown_dataset_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever load_dataset raises, the first line of it is told, and that a file may have been meant."""
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("cannot reach it\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SourceError, match=r"'someone/data' cannot be opened: cannot reach it; if a file was meant"):
        texts_of("someone/data")


@pytest.mark.parametrize(
    ("source", "reading", "words"),
    [
        ("builtin", {"text_by": "word"}, r"text_by='word' is unknown; it is one of document, paragraph, line"),
        ("builtin", {"prompt_field": "q"}, r"prompt_field is set without response_field"),
        ("builtin", {"response_field": "a"}, r"response_field is set without prompt_field"),
        ("builtin", {"field": "x", "prompt_field": "q", "response_field": "a"}, r"contradict each other"),
        ("", {}, r"source is empty"),
        ([], {}, r"source=\[\] names nothing"),
        (iter(["builtin"]), {}, r"names nothing; give a path, a glob"),
    ],
)
def test_contradicting_settings_are_refused(source: Any, reading: dict[str, Any], words: str) -> None:
    """Settings that cannot be meant are refused before anything is read."""
    with pytest.raises(RecipeError, match=words):
        texts_of(source, **reading)


def test_a_parquet_without_the_field_names_its_columns(tmp_path: Path) -> None:
    """A missing Parquet column is told with the columns there are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"], "title": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"has no field 'txt'; it has 'body', 'title'"):
        texts_of(tmp_path / "a.parquet", field="txt")
    with pytest.raises(SourceError, match=r"has no field 'text'; it has 'body', 'title'"):
        texts_of(tmp_path / "a.parquet")
