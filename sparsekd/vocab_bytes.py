"""The bytes that each token of a vocabulary stands for, and a tokenizer that encodes a piece of text as it stands.

    vocabulary = vocabulary_bytes(tokenizer)
    text_of([464, 3797], vocabulary)                        # b"The cat"
    plain = plain_description(description_of(tokenizer))
    encode_texts(backend_of(plain), ["The cat"])[0].ids     # [464, 3797]

Two families are known: byte-level BPE (GPT-2, Llama 3, Qwen, ...) and SentencePiece's BPE and Unigram as transformers
converts them (Llama 2, Mistral, T5, ...: spaces are "▁", other bytes "<0x0A>"). Anything else is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .errors import SourceError
from .vocab import name_of

# Whether a tokenizer puts a space before a text: never, always, or unless the text begins with one.
NEVER, ALWAYS, UNLESS_SPACE = "never", "always", "unless_space"
# What cuts a text into words, see `words_of`.
ONE, SPACES, PATTERNS = "one", "spaces", "patterns"

_LETTERS = re.compile(rb" ?[A-Za-z]+")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_PIECE = "▁"
_HIDDEN = "\ufdd0"  # a noncharacter: no text has it
# What deletes characters: the tokens could not be laid over the text.
_LOSSY = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabBytes:
    """What the ids of a tokenizer stand for.

    Attributes:
        of_id: the bytes of each id, or None for a control token (and for an id that no token has).
        control: the ids of control tokens by their strings.
        bos, eos: the ids that open and end a document, if there are any; bos only where the tokenizer itself adds it.
        prefix: NEVER, ALWAYS or UNLESS_SPACE: whether the tokenizer puts a space before a text.
        name: what messages call the tokenizer.
    """

    of_id: tuple[bytes | None, ...]
    control: dict[str, int]
    bos: int | None
    eos: int | None
    prefix: str
    name: str

    def lengths(self) -> np.ndarray:
        """[V] int64: bytes per id, 0 for control tokens."""
        return np.array([len(piece or b"") for piece in self.of_id], np.int64)

    def is_control(self) -> np.ndarray:
        """[V] bool: the ids without bytes."""
        return np.array([piece is None for piece in self.of_id])


def description_of(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a transformers tokenizer. Parsing one of 128,000 entries takes 0.3 s: do it once.

    Raises:
        SourceError: it is written in Python.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SourceError(
            f"tokenizer {name_of(tokenizer)} ({type(tokenizer).__name__}) is written in Python and does not say how it "
            "cuts a text; take its fast version (a folder with tokenizer.json)"
        )
    description: dict[str, Any] = json.loads(backend.to_str())
    return description


def vocabulary_bytes(tokenizer: Any, description: dict[str, Any] | None = None) -> VocabBytes:
    """The bytes of each token of a transformers tokenizer; `description` is its tokenizer.json, where it is at hand.

    Raises:
        SourceError: a tokenizer of another family, with what about it is not understood.
    """
    description = description or description_of(tokenizer)
    _check_supported(description, name_of(tokenizer))
    added = {token["id"]: token for token in description["added_tokens"]}
    read = _byte_level_piece if _is_byte_level(description) else _sentencepiece_piece(description["model"])
    pieces = tokenizer.get_vocab()
    of_id: list[bytes | None] = [None] * (max(pieces.values(), default=-1) + 1)
    for piece, token in pieces.items():
        if token not in added:
            of_id[token] = read(piece)
        elif not added[token]["special"]:
            of_id[token] = added[token]["content"].encode()
    return VocabBytes(
        of_id=tuple(of_id),
        control={token["content"]: index for index, token in added.items() if token["special"]},
        bos=_bos(tokenizer),
        eos=tokenizer.eos_token_id,
        prefix=_prefix(description),
        name=name_of(tokenizer),
    )


def text_of(ids: Iterable[int], vocabulary: VocabBytes) -> bytes:
    """The bytes of some tokens, control tokens passed over; a document's added space is among them."""
    return b"".join(vocabulary.of_id[int(token)] or b"" for token in ids)


def document_text(ids: Iterable[int], vocabulary: VocabBytes) -> bytes:
    """The bytes of a whole document: `text_of` without the space that the tokenizer put before it."""
    text = text_of(ids, vocabulary)
    return text[1:] if vocabulary.prefix != NEVER and text.startswith(b" ") else text


def with_prefix(text: bytes, vocabulary: VocabBytes) -> bytes:
    """A document's bytes as the tokenizer sees them: with the space that it puts before a text."""
    adds = vocabulary.prefix == ALWAYS or (vocabulary.prefix == UNLESS_SPACE and not text.startswith(b" "))
    return b" " + text if text and adds else text


def plain_description(description: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer that encodes text as it stands: no space put before it, no control tokens put
    around it or found in it, no truncation."""
    model, control = dict(description["model"]), {t["content"] for t in description["added_tokens"] if t["special"]}
    if "dropout" in model:
        model["dropout"] = None
    if model["type"] == "Unigram":  # its model would still find a control token's string in a text: hide it
        model["vocab"] = [[_HIDDEN + piece if piece in control else piece, score] for piece, score in model["vocab"]]
    return description | {
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "normalizer": _without_prefix(description["normalizer"]),
        "pre_tokenizer": _without_prefix(description["pre_tokenizer"]),
        "added_tokens": [token for token in description["added_tokens"] if not token["special"]],
        "model": model,
    }


def backend_of(description: dict[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` as a tokenizer.json describes it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(description))


def segmentation(description: dict[str, Any]) -> list[Any]:
    """All that decides where a text is cut: equal for two tokenizers that differ in the numbers of their ids only."""
    model = dict(description["model"])
    vocabulary = model.pop("vocab")
    pieces = sorted(vocabulary) if isinstance(vocabulary, dict) else sorted(map(tuple, vocabulary))
    model.pop("unk_id", None)
    added = sorted((token["content"], token["special"]) for token in description["added_tokens"])
    rest = [description["normalizer"], description["pre_tokenizer"]]
    return [model, added, rest, pieces]


def words_of(description: dict[str, Any]) -> str:
    """What cuts a text before the model does: ONE (nothing does), SPACES (each begins a word), or PATTERNS (more, or a
    BPE that looks words up whole before it merges)."""
    added = [token for token in description["added_tokens"] if not token["special"]]
    normalizers = [part for part in _parts(_without_prefix(description["normalizer"])) if part["type"] != "Sequence"]
    cutters = [part for part in _parts(_without_prefix(description["pre_tokenizer"])) if part["type"] != "Sequence"]
    if added or description["model"].get("ignore_merges") or not all(map(_only_makes_spaces, [*normalizers, *cutters])):
        return PATTERNS
    return SPACES if any(part.get("split", True) for part in cutters) else ONE


def _only_makes_spaces(part: dict[str, Any]) -> bool:
    return _makes_space_pieces(part) and part.get("pattern", {"String": " "}) == {"String": " "}


def cuts_by_merges(model: dict[str, Any], backend: Any, vocabulary: VocabBytes) -> bool:
    """Whether words are cut by BPE merges alone: no Unigram, no word looked up whole that merges do not give.

    `model` is the part of a tokenizer.json, `backend` encodes text as it stands.
    """
    if model["type"] != "BPE":
        return False
    if not model.get("ignore_merges"):
        return True
    words = {
        token: piece.decode() for token, piece in enumerate(vocabulary.of_id) if piece and _LETTERS.fullmatch(piece)
    }
    backend.model.ignore_merges = False
    found = encode_texts(backend, list(words.values()))
    backend.model.ignore_merges = True
    return all(e.ids == [token] for token, e in zip(words, found, strict=True))


# --- one family or the other ----------------------------------------------------------------------------


def _check_supported(description: dict[str, Any], name: str) -> None:
    """SourceError naming the first part of a tokenizer whose tokens are no stretches of the text."""
    model = description["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise SourceError(
            f"tokenizer {name} is a {model['type']} model; byte-level BPE and SentencePiece's BPE and Unigram are "
            "understood: take a model with one of those"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise SourceError(
                f"tokenizer {name} marks its pieces with {key}={model[key]!r}, so their bytes are not those of the "
                "text; take a byte-level or SentencePiece tokenizer"
            )
    parts = [*_parts(description["normalizer"]), *_parts(description["pre_tokenizer"])]
    for part in parts:
        if part["type"] in _LOSSY or str(part.get("behavior")).lower() == "removed":
            raise SourceError(
                f"tokenizer {name} drops characters of the text ({part['type']}), so its tokens cannot be laid over "
                "it; take a byte-level or SentencePiece tokenizer"
            )
    if not _is_byte_level(description) and not any(_makes_space_pieces(part) for part in parts):
        kinds = ", ".join(part["type"] for part in parts) or "nothing"
        raise SourceError(
            f"tokenizer {name} is neither byte-level nor SentencePiece (before its model: {kinds}); take one of those"
        )


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer and all that it is made of."""
    if part is not None:
        yield part
        for name in ("normalizers", "pretokenizers"):
            for below in part.get(name, ()):
                yield from _parts(below)


def _is_byte_level(description: dict[str, Any]) -> bool:
    parts = [*_parts(description["normalizer"]), *_parts(description["pre_tokenizer"])]
    return any(part["type"] == "ByteLevel" for part in parts)


def _makes_space_pieces(part: dict[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return bool(part.get("replacement", _SPACE_PIECE) == _SPACE_PIECE)
    return bool(part["type"] == "Replace" and part.get("content") == _SPACE_PIECE)


@cache
def _unicode_to_byte() -> dict[str, int]:
    """GPT-2's alphabet backwards: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level_piece(piece: str) -> bytes | None:
    """None for a piece outside the alphabet: no text ever becomes it."""
    table = _unicode_to_byte()
    return bytes(table[char] for char in piece) if all(char in table for char in piece) else None


def _sentencepiece_piece(model: dict[str, Any]) -> Any:
    falls_back, unknown = bool(model.get("byte_fallback")), _unknown(model)

    def read(piece: str) -> bytes | None:
        if piece == unknown:
            return None
        found = _BYTE_PIECE.fullmatch(piece) if falls_back else None
        return bytes([int(found[1], 16)]) if found else piece.replace(_SPACE_PIECE, " ").encode()

    return read


def _unknown(model: dict[str, Any]) -> str | None:
    index = model.get("unk_id")
    if index is not None:
        return str(model["vocab"][index][0])
    return model.get("unk_token")


def _bos(tokenizer: Any) -> int | None:
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos]
    return int(bos) if adds_bos else None


def _prefix(description: dict[str, Any]) -> str:
    for part in [*_parts(description["normalizer"]), *_parts(description["pre_tokenizer"])]:
        if part["type"] == "Prepend":
            return ALWAYS
        metaspace = part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        if metaspace or (part["type"] == "ByteLevel" and part.get("add_prefix_space")):
            return UNLESS_SPACE
    return NEVER


def _without_prefix(part: Any) -> Any:
    if part is None or part["type"] == "Prepend":
        return None
    changed = dict(part)
    if part["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel" and "add_prefix_space" in part:
        changed["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            changed[name] = [below for each in part[name] if (below := _without_prefix(each)) is not None]
    return changed


# --- bytes -> ids ---------------------------------------------------------------------------------------


def encode_texts(backend: Any, texts: Sequence[str], *, words: bool = False) -> list[Any]:
    """One `tokenizers.Encoding` per text, with its ids, and word_ids if `words`: the fast call leaves them out."""
    encode = backend.encode_batch if words else backend.encode_batch_fast
    found: list[Any] = encode(list(texts), add_special_tokens=False)
    return found


def decoded(data: bytes) -> str | None:
    """The text, or None for bytes that are no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def valid_runs(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """The bytes in order, cut into runs that are UTF-8 (True) and runs that are not."""
    while data:
        try:
            data.decode()
            yield data, True
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start], True
            yield data[error.start : error.end], False
            data = data[error.end :]


def prefix_ranges(of_id: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, first, last), each [V] int64: `order[first[v] : last[v]]` are the tokens that begin with token v's bytes.

    `order` is by bytes, where tokens of a common beginning stand together. A control token's set is itself alone.
    """
    order = sorted(range(len(of_id)), key=lambda token: (of_id[token] is None, of_id[token] or b"", token))
    pieces = [of_id[token] for token in order]
    first, last = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    open_: list[int] = []  # ranks whose set still goes on, shorter beginnings first
    for rank, piece in enumerate([*pieces, None]):
        while open_ and (piece is None or not piece.startswith(pieces[open_[-1]] or b"\0\0")):
            last[order[open_.pop()]] = rank
        if rank < len(order):
            twin = open_[-1] if open_ and piece is not None and pieces[open_[-1]] == piece else rank
            first[order[rank]] = first[order[twin]] if twin != rank else rank
            open_.append(rank)
    return np.array(order, np.int64), first, last
