"""Tokenizers: open or train one, tell two apart, and turn documents into ids with supervision.

    tokenizer = load_tokenizer("path/or/id")
    encoded = encode(tokenizer, [Document(pieces=(("2+2=", False), ("4", True)))])[0]

Text of a document is data: a string such as "<|endoftext|>" in it is encoded as ordinary text. Only a chat
template and the ends of a document produce control tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import Document
from .errors import RecipeError, SourceError

EOS = "<|endoftext|>"
SMALLEST_VOCAB = 257  # the 256 bytes and EOS: what a byte-level vocabulary cannot do without

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HIDE = "\ufdd0"  # a noncharacter: Unicode keeps it for internal use, so templates cannot mean anything by it


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One document as T tokens.

    Attributes:
        ids: [T] uint32, the document's ends (BOS, EOS) included.
        supervised: [T] bool, whether the token is a training target.
        bytes, supervised_bytes: UTF-8 bytes of the text that became tokens, and of its supervised part.
    """

    ids: np.ndarray
    supervised: np.ndarray
    bytes: int
    supervised_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of a document encoded on its own, so that a prompt's tokens do not depend on the response.

    Attributes:
        control: whether control-token strings in it are meant (a template wrote them) or are just text.
    """

    text: str
    supervised: bool
    control: bool = False


# -- opening, training, telling apart


def quiet_transformers() -> None:
    """Keep the terminal for our own lines: a bar for each file that a library loads is noise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer in a folder or of a model id, as AutoTokenizer opens it; remote code is never run.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    path = Path(source).expanduser()
    if not path.exists() and (str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1):
        raise SourceError(f"the tokenizer folder {path} does not exist; give one that save_pretrained wrote, or an id")
    try:
        return AutoTokenizer.from_pretrained(str(path) if path.exists() else str(source))
    except Exception as error:  # OSError, ValueError, KeyError, hub errors: transformers has no common class
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        raise SourceError(
            f"the tokenizer {str(source)!r} cannot be opened: {first_line}; "
            "give a folder that save_pretrained wrote, or a model's id"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab_size` entries with EOS "<|endoftext|>" as id 0.

    Every text round-trips, for all 256 bytes are in the alphabet. The same texts give the same tokenizer; it
    is smaller than asked for when the texts hold too few pairs that occur twice.

    Raises:
        RecipeError: vocab_size is below 257, the bytes and EOS.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise RecipeError(f"vocab_size={vocab_size} is below {SMALLEST_VOCAB}, the 256 bytes and EOS; raise it")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, clean_up_tokenization_spaces=False, name_or_path="trained"
    )


def fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) over all that decides which ids a text gets; two tokenizers are one iff it is equal.

    Survives save and load. Truncation and padding state, the pad token, the decoder and the chat template do
    not count: users set those without changing an id.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python has no description but its vocabulary
        description: dict[str, Any] = {"vocab": tokenizer.get_vocab()}
    else:
        description = json.loads(backend.to_str())
        for name in ("truncation", "padding", "decoder", "version"):
            description.pop(name, None)
    description["special_ids"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def vocab_size(tokenizer: Any) -> int:
    """The number of ids a model needs: len(tokenizer), or more where the ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def name_of(tokenizer: Any) -> str:
    """What error messages call the tokenizer: the path or id that it came from."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def document_ends(tokenizer: Any) -> tuple[int | None, int]:
    """(BOS id or None, EOS id) to stand around each document; BOS only where the tokenizer itself adds it.

    Raises:
        SourceError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise SourceError(
            f"tokenizer {name_of(tokenizer)} has no EOS token, so documents would run together; "
            "set tokenizer.eos_token to a token of its vocabulary and save it, or take another tokenizer"
        )
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos]
    return (int(bos) if adds_bos else None), int(tokenizer.eos_token_id)


# -- documents -> ids


def encode(tokenizer: Any, documents: Sequence[Document]) -> list[Encoded]:
    """Each document as tokens: [BOS] text EOS, or a chat as the tokenizer's template renders it.

    Plain text is supervised throughout. Of a pair only the response and its EOS are; of a chat only what
    the assistant says, up to and including the token that ends its turn. Prompt and response are encoded
    apart, as they are when a model generates.

    Raises:
        SourceError: no EOS, no chat template for a chat, or a template in which responses cannot be found.
    """
    ends = document_ends(tokenizer)
    special = _special_pattern(tokenizer)
    pieces = [_pieces(tokenizer, document, special) for document in documents]
    flat = [(piece, index > 0) for several in pieces for index, piece in enumerate(several)]
    ids = _encode_pieces(tokenizer, flat)
    return [
        _assemble(tokenizer, document, several, [next(ids) for _ in several], ends)
        for document, several in zip(documents, pieces, strict=True)
    ]


def _encode_pieces(tokenizer: Any, pieces: list[tuple[Piece, bool]]) -> Iterator[list[int]]:
    """The ids of each (piece, whether it continues another), in order.

    Two batch calls, because whether control strings are control is a switch of the whole call.
    """
    anchor = _anchor(tokenizer)
    encoded = {}
    for control in (False, True):
        texts = [anchor * after + piece.text for piece, after in pieces if piece.control == control]
        encoded[control] = iter(_batch(tokenizer, texts, split_special_tokens=not control))
    head = _batch(tokenizer, [anchor], split_special_tokens=True)[0] if anchor else []
    for piece, after in pieces:
        ids = next(encoded[piece.control])
        if not (anchor and after):
            yield ids
        elif ids[: len(head)] == head:
            yield ids[len(head) :]
        else:  # the anchor melted into the text: rather a space too many than a lost token
            yield _batch(tokenizer, [piece.text], split_special_tokens=not piece.control)[0]


def _anchor(tokenizer: Any) -> str:
    """A line end to put before continuing text, where the tokenizer adds a space to whatever it is given.

    SentencePiece's do: "t" alone is "▁t", so that prompt "ca" and response "t" would become "ca t".
    """
    alone, anchor, anchored = _batch(tokenizer, ["a", "\n", "\na"], split_special_tokens=True)
    return "" if anchor + alone == anchored else "\n"


def _batch(tokenizer: Any, texts: list[str], *, split_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # "longer than the model's maximum" is not said: rows are cut to seq_len later
    )["input_ids"]


def _assemble(
    tokenizer: Any,
    document: Document,
    pieces: list[Piece],
    ids: list[list[int]],
    ends: tuple[int | None, int],
) -> Encoded:
    bos, eos = ends
    parts = [(part, piece.supervised) for part, piece in zip(ids, pieces, strict=True) if part]
    if parts and bos is not None and not document.messages:  # a template writes its own BOS
        parts.insert(0, ([bos], parts[0][1]))
    if parts and not _ends_itself(tokenizer, document, pieces):
        parts.append(([eos], pieces[-1].supervised))
    sizes = [len(part) for part, _ in parts]
    return Encoded(
        ids=np.concatenate([np.array(part, np.uint32) for part, _ in parts] or [np.zeros(0, np.uint32)]),
        supervised=np.repeat(np.array([flag for _, flag in parts], bool), sizes),
        bytes=sum(len(piece.text.encode()) for piece in pieces),
        supervised_bytes=sum(len(piece.text.encode()) for piece in pieces if piece.supervised),
    )


def _ends_itself(tokenizer: Any, document: Document, pieces: list[Piece]) -> bool:
    """Whether a chat template closed with EOS (and perhaps a line end): a second EOS would be noise."""
    last = next((piece for piece in reversed(pieces) if piece.text.strip()), None)
    closes = last is not None and last.control and last.text.rstrip().endswith(tokenizer.eos_token)
    return bool(document.messages) and closes


def _pieces(tokenizer: Any, document: Document, special: re.Pattern[str]) -> list[Piece]:
    if document.messages:
        return _chat_pieces(tokenizer, document, special)
    return [Piece(text=text, supervised=supervised) for text, supervised in document.pieces if text]


# -- chats


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches each control-token string, longest first, and the character that hides them."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    strings = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, [*sorted(strings, key=lambda s: (-len(s), s)), _HIDE])))


def _chat_pieces(tokenizer: Any, document: Document, special: re.Pattern[str]) -> list[Piece]:
    """The rendered chat, cut where supervision changes and around control-token strings that users typed.

    Those strings are hidden from the template behind numbers, and come back as text: else a message could end
    its own turn and speak in another role.
    """
    template = _template(tokenizer, document)
    typed: list[str] = []
    messages = [_map_strings(message, lambda text: _hide(text, special, typed)) for message in document.messages]
    find = _marked_spans if _GENERATION_MARK.search(template) else _prefix_spans
    try:
        rendered, spans = find(tokenizer, messages, template, document.origin)
    except SourceError:
        raise
    except Exception as error:  # jinja's errors, and what template code raises by itself
        raise SourceError(
            f"{document.origin}: the chat template of {name_of(tokenizer)} refuses these messages: {error}; "
            "repair the record or leave it out"
        ) from error
    return [
        shown
        for text, supervised in _cut(rendered, [_trim(rendered, span, special) for span in spans])
        for shown in _reveal(text, supervised, typed)
    ]


def _template(tokenizer: Any, document: Document) -> str:
    try:
        return tokenizer.get_chat_template()
    except Exception as error:  # ValueError in a sentence of many lines
        raise SourceError(
            f"{document.origin} holds chat messages, and tokenizer {name_of(tokenizer)} has no chat "
            "template; take the tokenizer of a chat model, set tokenizer.chat_template, "
            "or give prompt and response fields"
        ) from error


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key == "role" else _map_strings(item, change) for key, item in value.items()}
    return [_map_strings(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def _hide(text: str, special: re.Pattern[str], typed: list[str]) -> str:
    def number(match: re.Match[str]) -> str:
        typed.append(match.group())
        return f"{_HIDE}{len(typed) - 1}{_HIDE}"

    return special.sub(number, text)


def _reveal(text: str, supervised: bool, typed: list[str]) -> Iterator[Piece]:
    """Text with the hidden strings back in their places, each as a piece that is not control."""
    for index, part in enumerate(text.split(_HIDE)):  # odd parts are the numbers
        if part:
            shown = typed[int(part)] if index % 2 else part
            yield Piece(text=shown, supervised=supervised, control=not index % 2)


Spans = list[tuple[int, int]]


def _marked_spans(tokenizer: Any, messages: list[Any], template: str, origin: str) -> tuple[str, Spans]:
    """The spans between the template's own {% generation %} marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return rendered[0], [tuple(span) for span in spans[0]]


def _prefix_spans(tokenizer: Any, messages: list[Any], template: str, origin: str) -> tuple[str, Spans]:
    """A response is what the chat up to it has more than its prompt; both must be prefixes of the whole."""

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    whole, spans = render(len(messages), False), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, upto = render(index, True), render(index + 1, False)
            if not (whole.startswith(upto) and upto.startswith(prompt)):
                raise SourceError(
                    f"{origin}: the chat template of {name_of(tokenizer)} renders message {index} "
                    "differently alone and in the whole chat, so the response cannot be found in it; "
                    "use a template with {% generation %} marks, or give prompt and response fields"
                )
            spans.append((len(prompt), len(upto)))
    return whole, spans


def _trim(rendered: str, span: tuple[int, int], special: re.Pattern[str]) -> tuple[int, int]:
    """Without the white space after the token that ends a turn: a model that stops there never writes it."""
    start, end = span
    text = rendered[start:end].rstrip()
    ends_turn = any(match.end() == len(text) for match in special.finditer(text) if match.group() != _HIDE)
    return (start, start + len(text)) if ends_turn else span


def _cut(text: str, spans: Spans) -> Iterator[tuple[str, bool]]:
    """The text in order, cut at the spans: (inside a span?) is the flag."""
    position = 0
    for start, end in spans:
        yield text[position:start], False
        yield text[start:end], True
        position = end
    yield text[position:], False
