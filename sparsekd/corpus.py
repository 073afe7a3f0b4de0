"""Documents from sources, streamed: text files, JSON lines, Parquet, `datasets`, and Python's own library.

    for document in documents("corpus/*.jsonl.gz", field="body"):
        print(document.text)

One document at a time is in memory, so a dump of many gigabytes in one text file needs `text_by="paragraph"`
or `"line"`. Nothing here knows tokenizers: chats stay messages until `vocab.encode` renders them.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import RecipeError, SourceError
from .sources import (
    JSON_LINES,
    Origin,
    as_list,
    builtin_files,
    builtin_sha256,
    missing,
    resolve,
    sampled_sha256,
    unreadable,
)

TEXT_BY = ("document", "paragraph", "line")
PROMPT_FIELDS = ("prompt", "instruction")
CONTEXT_FIELDS = ("input", "context")
RESPONSE_FIELDS = ("response", "completion", "output")
# What would be read as prose (a table), or be refused for its bytes alone.
_NOT_READ = {
    (".csv", ".tsv"): "make JSON lines or Parquet of the table (datasets.load_dataset('csv', data_files=...))",
    (".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz"): "unpack it (of compressed files only .gz is read)",
    (".arrow",): "give the folder that save_to_disk wrote",
}
# Of memory for each byte of a text while it is tokenised: 166 measured at 1.8 bytes a token, so 75 at 4.
_BYTES_A_BYTE = 80
NEEDS_DATASETS = "{what} needs the package `datasets`: pip install 'sparsekd[data]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Either pieces of text, each a training target or not, or the messages of a chat.

    Attributes:
        pieces: (text, supervised) pairs that follow each other; plain text is one supervised piece.
        messages: {"role", "content"} records for the tokenizer's chat template; pieces are then empty.
        origin: where it was read, such as "data.jsonl:17"; for error messages.
    """

    pieces: tuple[tuple[str, bool], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    origin: str = ""

    @property
    def text(self) -> str:
        """The pieces joined, or the messages' contents joined by line ends (roles and template left out)."""
        if self.messages:
            return "\n".join(str(message.get("content") or "") for message in self.messages)
        return "".join(text for text, _ in self.pieces)

    def canonical_bytes(self) -> bytes:
        """Bytes that are equal iff two documents are: where they were read does not count."""
        return json.dumps([self.pieces, self.messages], sort_keys=True).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How records and files become documents.

    Attributes:
        field: the record's text (or its list of messages); None means "text", unless the record plainly is
            messages or a pair.
        text_by: what one document is in a text file: "document" (the file), "paragraph" or "line".
        prompt_field, response_field: the two sides of a supervised record.
        split: which split of a `datasets` source.
        revision: which commit, tag or branch of a `datasets` id.
    """

    field: str | None = None
    text_by: str = "document"
    prompt_field: str | None = None
    response_field: str | None = None
    split: str = "train"
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.text_by not in TEXT_BY:
            raise RecipeError(f"text_by={self.text_by!r} is unknown; it is one of {', '.join(TEXT_BY)}")
        if bool(self.prompt_field) != bool(self.response_field):
            given, absent = ("prompt_field", "response_field")[:: 1 if self.prompt_field else -1]
            raise RecipeError(f"{given} is set without {absent}; a supervised record has both sides")
        if self.field and self.prompt_field:
            raise RecipeError(
                f"field={self.field!r} and prompt_field={self.prompt_field!r} contradict each other; "
                "keep field for text and messages, or prompt_field and response_field for pairs"
            )


def documents(source: Any, **reading: Any) -> Iterator[Document]:
    """The documents of `source`, in a fixed order, one at a time.

    Args:
        source: "builtin"; a path, glob or folder; a `datasets` id ("id" or "id:config"); a list of those.
        reading: the attributes of `Reading`.

    Raises:
        SourceError: a source that is missing, empty or damaged; it names the file and the place in it.
        RecipeError: settings that contradict each other.
    """
    how = Reading(**reading)
    found = False
    for origin in origins(source):
        for document in _read(origin, how):
            found = True
            yield document
    if not found:
        raise SourceError(f"source={source!r} holds no document; give files with at least one")


def describe(source: Any, **reading: Any) -> dict[str, Any]:
    """What identifies `source` without reading all of it: a JSON-able dict for manifests.

    For "builtin" that is the Python version and the corpus's sha256; for files their number, total bytes and a sha256
    over 1 MB of each at most.
    """
    how = Reading(**reading)
    parts = [_describe_one(one, how) for one in as_list(source)]
    return parts[0] if len(parts) == 1 else {"kind": "list", "parts": parts}


def total_bytes(source: Any) -> int | None:
    """The bytes of all files of `source`, or None where they cannot be known beforehand."""
    found = list(origins(source))
    if any(kind not in ("file", "builtin") for kind, _ in found):
        return None
    files = [Path(place) for kind, place in found if kind == "file"]
    files += [path for kind, _ in found if kind == "builtin" for path in builtin_files()]
    return sum(path.stat().st_size for path in files)


def origins(source: Any) -> Iterator[Origin]:
    """The files and datasets that `source` names, in order."""
    return (origin for one in as_list(source) for origin in resolve(str(one)))


def _describe_one(source: Any, how: Reading) -> dict[str, Any]:
    found = resolve(str(source))
    kind, place = found[0]
    if kind == "builtin":
        return {"kind": "builtin", "python": platform.python_version(), "sha256": builtin_sha256()}
    if kind == "file":
        size, contents = sum(Path(path).stat().st_size for _, path in found), sampled_sha256(path for _, path in found)
        files = {"files": len(found), "bytes": size, "sampled_sha256": contents}
        return {"kind": "files", "source": str(source), **files}
    if kind == "saved":
        return {"kind": "dataset", "path": place, "split": how.split}
    return {"kind": "dataset", "id": place, "revision": how.revision, "split": how.split}


# -- reading


def _read(origin: Origin, how: Reading) -> Iterator[Document]:
    kind, place = origin
    readers: dict[str, Callable[[str, Reading], Iterator[Document]]] = {
        "builtin": lambda _, __: (_whole(str(path)) for path in builtin_files()),
        "file": _read_file,
        "saved": _read_saved,
        "id": _read_id,
    }
    return readers[kind](place, how)


def _read_file(path: str, how: Reading) -> Iterator[Document]:
    name = path.lower().removesuffix(".gz")
    for suffixes, way_out in _NOT_READ.items():
        if name.endswith(suffixes):
            raise SourceError(f"{path} is no text; {way_out}, or leave it out of source")
    if name.endswith(".parquet"):
        return _read_parquet(path, how)
    if name.endswith(JSON_LINES):
        return _read_json_lines(path, how)
    if how.text_by == "document":
        return iter([_whole(path)])
    return _read_paragraphs(path) if how.text_by == "paragraph" else _read_lines(path)


def _open(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _whole(path: str) -> Document:
    try:
        _check_memory(path)
        with _open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise unreadable(path, error) from error
    return Document(pieces=((_decode(content, path, 0).removeprefix("\ufeff"), True),), origin=path)


def _check_memory(path: str) -> None:
    """Refuse a file that is one document too large for any tokenizer here, before the system kills us over it."""
    size, memory = Path(path).stat().st_size, _physical_memory()
    if memory and size * _BYTES_A_BYTE > memory:
        raise SourceError(
            f"{path} is one document of {size / 1e9:.2g} GB: a tokenizer takes {_BYTES_A_BYTE} times that and more, "
            f"and there are {memory / 1e9:.2g} GB of memory; cut it into documents by text_by=paragraph or line"
        )


def _physical_memory() -> int | None:
    """In bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _decode(content: bytes, path: str, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise SourceError(
            f"{path} is not UTF-8: byte 0x{wrong:02x} at offset {offset + error.start}; "
            "convert it (iconv -t UTF-8) or leave it out of source"
        ) from None


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end), decoded line by line so that an error has a place."""
    offset = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                text = _decode(raw, path, offset)
                offset += len(raw)
                yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")
    except (OSError, EOFError) as error:
        raise unreadable(path, error) from error


def _read_lines(path: str) -> Iterator[Document]:
    return (Document(pieces=((text, True),), origin=f"{path}:{number}") for number, text in _lines(path))


def _read_paragraphs(path: str) -> Iterator[Document]:
    """Paragraphs are separated by blank lines."""
    paragraph: list[str] = []
    number = 0
    for number, line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield Document(pieces=(("\n".join(paragraph), True),), origin=f"{path}:{number - len(paragraph)}")
            paragraph = []
    if paragraph:
        yield Document(pieces=(("\n".join(paragraph), True),), origin=f"{path}:{number - len(paragraph) + 1}")


def _read_json_lines(path: str, how: Reading) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SourceError(
                f"{where} is not JSON ({error}); each line is one record, a JSON array is not read"
            ) from None
        if not isinstance(record, dict):
            raise SourceError(f'{where} is a JSON {type(record).__name__}, not a record such as {{"text": "..."}}')
        yield document_of(record, how, where)


def _read_parquet(path: str, how: Reading) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise SourceError(NEEDS_DATASETS.format(what=f"reading {path}")) from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, how, path)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    yield document_of(record, how, f"{path}: record {number}")
                    number += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these two
        raise unreadable(path, error) from error


def _columns(names: list[str], how: Reading, where: str) -> list[str]:
    """Only the columns that can matter: the others are never read from the disk."""
    named = [name for name in (how.field, how.prompt_field, how.response_field) if name]
    for name in named:
        if name not in names:
            raise SourceError(_no_field(name, names, where))
    if named:
        contexts = CONTEXT_FIELDS if how.prompt_field == "instruction" else ()
        return [name for name in names if name in (*named, *contexts)]
    useful = ("text", "messages", *PROMPT_FIELDS, *CONTEXT_FIELDS, *RESPONSE_FIELDS)
    return [name for name in names if name in useful] or names  # all: the error will name them


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise SourceError(NEEDS_DATASETS.format(what=what)) from None
    return datasets


def _read_saved(path: str, how: Reading) -> Iterator[Document]:
    datasets = _datasets(f"reading the saved dataset {path}")
    try:
        data = datasets.load_from_disk(path)
    except Exception as error:  # whatever `datasets` and pyarrow raise for a damaged folder
        raise unreadable(path, error) from error
    if isinstance(data, dict) and how.split not in data:
        raise SourceError(f"{path} has no split {how.split!r}; it has {', '.join(data)}: set split=")
    return _records(data[how.split] if isinstance(data, dict) else data, how, path)


def _read_id(name: str, how: Reading) -> Iterator[Document]:
    datasets = _datasets(f"the dataset {name!r}")
    identity, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(identity, config or None, split=how.split, revision=how.revision, streaming=True)
    except Exception as error:  # offline, unknown id, unknown split, gated: each has its own class over there
        first_line = str(error).strip().partition("\n")[0]
        raise SourceError(
            f"the dataset {name!r} cannot be opened: {first_line}; if a file was meant, {missing(Path(name))}"
        ) from error
    return _records(data, how, name)


def _records(data: Iterable[dict[str, Any]], how: Reading, where: str) -> Iterator[Document]:
    return (document_of(record, how, f"{where}: record {number}") for number, record in enumerate(data))


# -- one record -> one document


def document_of(record: dict[str, Any], how: Reading, where: str) -> Document:
    """The document that a record stands for: text, messages, or a prompt with its response.

    Raises:
        SourceError: a field that is missing or of another type, or a record that can be read in two ways.
    """
    if how.prompt_field and how.response_field:
        return _pair(record, how.prompt_field, how.response_field, where)
    if how.field:
        return _text_or_messages(record, how.field, where)
    return _guess(record, where)


def _guess(record: dict[str, Any], where: str) -> Document:
    prompt = next((name for name in PROMPT_FIELDS if name in record), None)
    response = next((name for name in RESPONSE_FIELDS if name in record), None)
    ways: list[str] = [name for name in ("text", "messages") if name in record]
    if prompt and response:
        ways.append(f"{prompt} and {response}")
    if len(ways) > 1:
        raise SourceError(
            f"{where} can be read in {len(ways)} ways: {', '.join(ways)}; "
            "say which by field=, or by prompt_field= and response_field="
        )
    if prompt and response:
        return _pair(record, prompt, response, where)
    return _text_or_messages(record, ways[0] if ways else "text", where)


def _no_field(name: str, names: Iterable[str], where: str) -> str:
    return (
        f"{where} has no field {name!r}; it has {', '.join(map(repr, names)) or 'none'}: "
        "set field=, or prompt_field= and response_field="
    )


def _get(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise SourceError(_no_field(name, record, where))
    return record[name]


def _string(record: dict[str, Any], name: str, where: str) -> str:
    value = _get(record, name, where)
    if value is None:  # a null in a column of strings: an empty document, which packing skips and counts
        return ""
    if not isinstance(value, str):
        chat = isinstance(value, list) and isinstance(next(iter(value), None), dict)
        way_out = "join the messages of both sides in one list, field=messages" if chat else "choose another field="
        raise SourceError(f"{where}: field {name!r} is {type(value).__name__}, not text; {way_out}")
    return _encodable(value, name, where)


def _encodable(value: str, name: str, where: str) -> str:
    """JSON can spell half a surrogate pair, which is no text and which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ord(value[error.start])
        raise SourceError(
            f"{where}: field {name!r} holds half a surrogate pair, U+{half:04X} at character {error.start}; "
            "repair the record or leave it out"
        ) from None
    return value


def _text_or_messages(record: dict[str, Any], name: str, where: str) -> Document:
    value = _get(record, name, where)
    if isinstance(value, list):
        return Document(messages=tuple(_message(item, name, where) for item in value), origin=where)
    return Document(pieces=((_string(record, name, where), True),), origin=where)


def _message(item: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or "content" not in item:
        shown = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
        raise SourceError(f"{where}: field {name!r} holds a message with {shown}; each needs role and content")
    _encodable(json.dumps(item, ensure_ascii=False), name, where)
    return {key: value for key, value in item.items() if value is not None}


def _pair(record: dict[str, Any], prompt_field: str, response_field: str, where: str) -> Document:
    """Prompt and response as they are; the parts of an `instruction` record are set apart by blank lines."""
    prompt, response = (_string(record, name, where) for name in (prompt_field, response_field))
    if prompt_field == "instruction":
        context = next((name for name in CONTEXT_FIELDS if name in record and name != response_field), None)
        parts = [prompt, _string(record, context, where) if context else ""]
        prompt = "".join(f"{part}\n\n" for part in parts if part.strip())
    return Document(pieces=((prompt, False), (response, True)), origin=where)
