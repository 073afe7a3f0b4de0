"""Two tokenizers side by side: what the ids of both spell, and any text in the tokens of either.

    pair = pair_of(teacher_tokenizer, student_tokenizer)
    cut_ids([b" the cat"], pair)                # [[262, 3797]], the student's tokens
    teachers_cuts(pair)[262]                    # the teacher's tokens of " the"

Shapes: V teacher vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from .align import token_starts
from .cutting import Cutter, blob_of, cut_all, cutter_of, ready
from .joints import Joints, joints_of
from .vocab_bytes import (
    VocabBytes,
    backend_of,
    cuts_by_merges,
    decoded,
    description_of,
    encode_texts,
    plain_description,
    segmentation,
    text_of,
    valid_runs,
    vocabulary_bytes,
    words_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two tokenizers, and what a map between them needs.

    Attributes:
        backend, teachers: the student's and the teacher's as `tokenizers.Tokenizer`s that encode text as it stands.
        control: [V] int64, the student's id for a control token of the teacher's (by role, else by its string), or -1.
        same: [V] int64 ids where the two differ in numbering only, else None.
        lengths: [student's V] int64 bytes.
        short: the student's tokens of at most 3 bytes: what bytes that are no text (half a character) become.
        crossed: [256, 256] bool, the neighbouring bytes that some token of the student's has inside it.
        words: what cuts a text before the student's model does, see `vocab_bytes.words_of`.
        cutter: the student's model for compiled loops, where there are some for it.
        joints: the student's merges, where a word is cut by BPE merges, whose tokens depend on their neighbours only.
    """

    teacher: VocabBytes
    student: VocabBytes
    backend: Any
    teachers: Any
    control: np.ndarray
    same: np.ndarray | None
    lengths: np.ndarray
    short: dict[bytes, int]
    crossed: np.ndarray
    words: str
    joints: Joints | None
    cutter: Cutter | None


def pair_of(teacher: Any, student: Any, logit_width: int | None = None) -> Pair:
    """Two transformers tokenizers as a pair; `logit_width` is V where the teacher's model is wider than its tokenizer.

    Raises:
        SourceError: a tokenizer of a family that is not understood.
    """
    theirs, ours = description_of(teacher), description_of(student)
    of_teacher, of_student = vocabulary_bytes(teacher, theirs), vocabulary_bytes(student, ours)
    width = max(logit_width or 0, len(of_teacher.of_id))
    plain = plain_description(ours)
    backend, words = backend_of(plain), words_of(ours)
    joints = joints_of(ours["model"]) if cuts_by_merges(ours["model"], backend, of_student) else None
    return Pair(
        teacher=of_teacher,
        student=of_student,
        backend=backend,
        teachers=backend_of(plain_description(theirs)),
        control=_control(of_teacher, of_student, width),
        same=_renumbering(theirs, ours, teacher, student, width),
        lengths=of_student.lengths(),
        short=_short(of_student),
        crossed=crossed_bytes(of_student.of_id),
        words=words,
        cutter=cutter_of(plain["model"], of_student, words, joints),
        joints=joints,
    )


def _control(teacher: VocabBytes, student: VocabBytes, width: int) -> np.ndarray:
    control = np.full(width, -1)
    for string, token in teacher.control.items():
        control[token] = student.control.get(string, -1)
    for ours, theirs in ((teacher.bos, student.bos), (teacher.eos, student.eos)):
        if ours is not None:
            control[ours] = -1 if theirs is None else theirs
    return control


def _short(vocabulary: VocabBytes) -> dict[bytes, int]:
    return {piece: token for token, piece in enumerate(vocabulary.of_id) if piece and len(piece) <= 3}


def crossed_bytes(of_id: Sequence[bytes | None]) -> np.ndarray:
    """[256, 256] bool: [a, b] where some token has the bytes a b side by side; everywhere else every text is cut."""
    pieces = [piece for piece in of_id if piece]
    data = np.frombuffer(b"".join(pieces), np.uint8)
    inside = np.ones(len(data), bool)
    inside[token_starts(np.array([len(piece) for piece in pieces], np.int64))[1:] - 1] = False
    crossed = np.zeros((256, 256), bool)
    crossed[data[:-1][inside[:-1]], data[1:][inside[:-1]]] = True
    return crossed


def _renumbering(
    of_teacher: dict[str, Any], of_student: dict[str, Any], teacher: Any, student: Any, width: int
) -> np.ndarray | None:
    """`Pair.same` of two tokenizers and what their tokenizer.json say."""
    if segmentation(of_teacher) != segmentation(of_student):
        return None
    renumbered, theirs = np.full(width, -1), student.get_vocab()
    for piece, token in teacher.get_vocab().items():
        renumbered[token] = theirs[piece]
    return renumbered


# --- the student's tokens -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A stretch in the student's tokens: ids, where each starts (and the end), and which of them start a word."""

    ids: list[int]
    starts: np.ndarray
    words: np.ndarray
    comes_back: bool


def cut_texts(texts: Sequence[bytes], pair: Pair) -> list[Cut]:
    """Each text by the student's tokenizer; bytes that are no UTF-8 one by one."""
    runs = [list(valid_runs(text)) for text in texts]
    valid = [run.decode() for several in runs for run, fine in several if fine]
    encodings = iter(encode_texts(pair.backend, valid, words=True))
    return [_cut(text, several, encodings, pair) for text, several in zip(texts, runs, strict=True)]


def cut_ids(texts: Sequence[bytes], pair: Pair) -> list[list[int] | None]:
    """The student's tokens of each text; None for a text that does not come back from them."""
    return _as_lists(*_cut_flat(texts, pair.backend, pair.student, pair.short))


def cut_flat(texts: Sequence[bytes], pair: Pair) -> tuple[list[int], list[int]]:
    """(ids, sizes): `cut_ids` one after another, and how many each text has, -1 for None; compiled where possible."""
    loops = ready(pair.cutter, len(texts))
    if pair.cutter is not None and loops is not None and (blob := blob_of(texts)).is_text.all():
        return cut_all(loops, pair.cutter, blob)
    return _cut_flat(texts, pair.backend, pair.student, pair.short)


def teachers_cuts(pair: Pair) -> list[list[int] | None]:
    """The teacher's tokens of the text of each of the student's tokens; None: no text, or it does not come back."""
    texts = [piece or b"" for piece in pair.student.of_id]
    cuts = _as_lists(*_cut_flat(texts, pair.teachers, pair.teacher, _short(pair.teacher)))
    return [cut if text else None for text, cut in zip(texts, cuts, strict=True)]


def _as_lists(ids: list[int], sizes: list[int]) -> list[list[int] | None]:
    ends = accumulate(max(size, 0) for size in sizes)
    return [None if size < 0 else ids[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _cut_flat(
    texts: Sequence[bytes], backend: Any, vocabulary: VocabBytes, short: dict[bytes, int]
) -> tuple[list[int], list[int]]:
    # One flat list: a list for each text would have the garbage collector look through all objects again and again.
    ids: list[int] = []
    sizes: list[int] = []
    of_id = vocabulary.of_id
    for text, found in zip(texts, _read(texts, backend, short), strict=True):
        comes_back = b"".join([of_id[token] or b"" for token in found]) == text
        sizes.append(len(found) if comes_back else -1)
        if comes_back:
            ids += found
    return ids, sizes


def _read(texts: Sequence[bytes], backend: Any, short: dict[bytes, int]) -> Iterator[list[int]]:
    """The ids of each text; bytes that are no UTF-8 one by one, none at all where a byte has no token."""
    wholes = [decoded(text) for text in texts]
    encodings = iter(encode_texts(backend, [whole for whole in wholes if whole is not None]))
    for text, whole in zip(texts, wholes, strict=True):
        yield _read_runs(text, backend, short) if whole is None else next(encodings).ids


def _read_runs(text: bytes, backend: Any, short: dict[bytes, int]) -> list[int]:
    parts = [
        encode_texts(backend, [run.decode()])[0].ids if fine else _greedy(run, short) for run, fine in valid_runs(text)
    ]
    ids = [token for part in parts for token in part]
    return [] if -1 in ids else ids


def _cut(text: bytes, runs: list[tuple[bytes, bool]], encodings: Iterator[Any], pair: Pair) -> Cut:
    ids: list[int] = []
    words: list[bool] = []
    for run, fine in runs:
        if fine:
            found = next(encodings)
            numbers = [-1, *found.word_ids]
            ids += found.ids
            words += [a != b for a, b in pairwise(numbers)]
        else:
            found_ids = _greedy(run, pair.short)
            ids += found_ids
            words += [False] * len(found_ids)
    if -1 in ids:
        return Cut(ids=[], starts=np.zeros(1, np.int64), words=np.zeros(0, bool), comes_back=False)
    comes_back = text_of(ids, pair.student) == text
    starts = token_starts(pair.lengths[np.array(ids, np.int64)])
    return Cut(ids=ids, starts=starts, words=_word_starts(ids, np.array(words, bool), pair), comes_back=comes_back)


def _greedy(data: bytes, short: dict[bytes, int]) -> list[int]:
    """Bytes that are no text, by the longest tokens that fit; -1 where none does."""
    ids = []
    while data:
        size = next((size for size in (3, 2, 1) if data[:size] in short), 0)
        ids.append(short.get(data[:size], -1))
        data = data[size or 1 :]
    return ids


def _word_starts(ids: list[int], words: np.ndarray, pair: Pair) -> np.ndarray:
    """[S] bool; without a pre-tokenizer, a token that begins with a space after one that does not end with one."""
    if len(ids) > 1 and not words[1:].any():
        pieces = [pair.student.of_id[token] or b"" for token in ids]
        words = np.array([True, *(b.startswith(b" ") and not a.endswith(b" ") for a, b in pairwise(pieces))])
    return words
