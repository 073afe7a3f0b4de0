"""Bytes of tokens, and two tokenizations of one text laid over each other."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from sparsekd import vocab_bytes
from sparsekd.align import identical_spans, last_start_before, shared_starts, token_starts
from sparsekd.errors import SourceError
from sparsekd.vocab import train_tokenizer
from sparsekd.vocab_bytes import (
    backend_of,
    description_of,
    document_text,
    encode_texts,
    plain_description,
    segmentation,
    text_of,
    vocabulary_bytes,
    with_prefix,
)

CORPUS = [
    "The cat sees the dog, and counts 1 2 3.\n",
    "naïve café — 你好 🙂👩‍👩‍👧\r\n\tdef f(x):\n        return x\n",
] * 20


def fast(backend, **more):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **more)


def byte_level(size=400, texts=CORPUS):
    return train_tokenizer(texts, size)


def byte_level_with_prefix():
    from tokenizers import pre_tokenizers

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _byte_pieces():
    return [f"<0x{byte:02X}>" for byte in range(256)]


def llama2_like():
    """SentencePiece's BPE as transformers keeps Llama 2: no pre-tokenizer, a normalizer that prepends ▁."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = sorted(set("".join(CORPUS).replace(" ", "▁")) - {"🙂", "你"})
    words = ["he", "The", "at", "▁c", "▁cat", "▁t", "▁the", "▁▁", "▁▁▁▁"]
    merges = [("h", "e"), ("T", "he"), ("a", "t"), ("▁", "c"), ("▁c", "at"), ("▁", "t"), ("▁t", "he"), ("▁", "▁")]
    merges += [("▁▁", "▁▁")]
    pieces = ["<unk>", "<s>", "</s>", *_byte_pieces(), *letters, *words]
    model = models.BPE(
        vocab={piece: n for n, piece in enumerate(pieces)},
        merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram_like():
    """SentencePiece's Unigram with byte fallback and the newer Metaspace pre-tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(set("".join(CORPUS).replace(" ", "▁")) - {"🙂", "你"})
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *[(piece, -12.0) for piece in _byte_pieces()]]
    vocab += [(letter, -6.0) for letter in letters]
    vocab += [("▁the", -2.0), ("▁cat", -3.0), ("▁c", -4.0), ("at", -4.0), ("The", -3.0), ("▁co", -4.0)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    return fast(backend, unk_token="<unk>", eos_token="</s>")


FAMILIES = {
    "byte_level": byte_level,
    "byte_level_with_prefix": byte_level_with_prefix,
    "llama2_like": llama2_like,
    "unigram_like": unigram_like,
}
PIECES = [
    "The cat",
    " the",
    "  ",
    "\r\n",
    "\n",
    "\t",
    "🙂",
    "👩‍👩‍👧",
    "你好",
    "é",
    "́",
    "<s>",
    "</s>",
    "a",
    "\x00",
]
PIECES += ["<|endoftext|>", "\ufeff", "Ġ", " 12", "'s", "\u2028", "\U0010ffff", "def f(x):\n    "]


# SentencePiece itself reads these as a space and as one byte: texts with them do not come back.
AMBIGUOUS = ["▁", "<0x41>"]


def random_texts(count, pieces, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(pieces, k=rng.randrange(0, 8))) for _ in range(count)]


@pytest.fixture(scope="module")
def families():
    return {name: make() for name, make in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_thousand_random_texts_come_back_byte_for_byte(families, name):
    """Bytes of the tokens = bytes of the text: split characters, CRLF, emoji, leading spaces, control strings, ''."""
    tokenizer = families[name]
    vocabulary, backend = vocabulary_bytes(tokenizer), backend_of(plain_description(description_of(tokenizer)))
    texts = random_texts(10_000, PIECES + AMBIGUOUS * name.startswith("byte_level"))
    for text, found in zip(texts, encode_texts(backend, texts), strict=True):
        assert text_of(found.ids, vocabulary) == text.encode()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_documents_text_is_found_below_the_added_space(families, name):
    """What the tokenizer itself gives for a document is its bytes behind the prefix that `with_prefix` puts there."""
    tokenizer = families[name]
    vocabulary, backend = vocabulary_bytes(tokenizer), backend_of(plain_description(description_of(tokenizer)))
    for text in ["The cat", "a", " a", "  a", "\na", "你", "🙂 x", "\ta"]:
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        inside = with_prefix(text.encode(), vocabulary)
        assert text_of(whole, vocabulary) == inside
        assert encode_texts(backend, [inside.decode()])[0].ids == whole
        if vocabulary.prefix != vocab_bytes.UNLESS_SPACE or not text.startswith(" "):
            assert document_text(whole, vocabulary) == text.encode()


def test_golden_bytes_of_byte_level_pieces():
    """Ġ is a space, Ċ a line end, Ã© the two bytes of é; EOS has no bytes."""
    vocabulary = vocabulary_bytes(byte_level())
    by_piece = byte_level().get_vocab()
    assert vocabulary.of_id[by_piece["Ġ"]] == b" "
    assert vocabulary.of_id[by_piece["Ċ"]] == b"\n"
    assert vocabulary.of_id[by_piece["Ã"]] + vocabulary.of_id[by_piece["©"]] == "é".encode()
    assert vocabulary.of_id[0] is None
    assert vocabulary.control == {"<|endoftext|>": 0}
    assert (vocabulary.bos, vocabulary.eos, vocabulary.prefix) == (None, 0, vocab_bytes.NEVER)


def test_golden_bytes_of_sentencepiece_pieces():
    """▁ is a space, <0x0A> a line end, <unk> and </s> nothing."""
    vocabulary, ids = vocabulary_bytes(llama2_like()), llama2_like().get_vocab()
    assert vocabulary.of_id[ids["▁cat"]] == b" cat"
    assert vocabulary.of_id[ids["<0x0A>"]] == b"\n"
    assert vocabulary.of_id[ids["<unk>"]] is None
    assert vocabulary.of_id[ids["</s>"]] is None
    assert vocabulary.prefix == vocab_bytes.ALWAYS


def test_every_byte_has_one_sign_in_gpt2s_alphabet():
    """The 256 signs that `tokenizers` names, each a byte of its own."""
    from tokenizers import pre_tokenizers

    table = vocab_bytes._unicode_to_byte()
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda m, p: (m.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), p.BertPreTokenizer()),
            "a WordPiece model",
        ),
        (lambda m, p: (m.WordLevel({"a": 0}, unk_token="a"), p.Whitespace()), "a WordLevel model"),
        (lambda m, p: (m.BPE({"a": 0}, []), p.Whitespace()), r"drops characters of the text \(Whitespace\)"),
        (lambda m, p: (m.BPE({"a": 0}, []), p.Split(" ", "removed")), r"drops characters of the text \(Split\)"),
        (lambda m, p: (m.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"), p.ByteLevel()), "end_of_word_suffix='</w>'"),
        (lambda m, p: (m.BPE({"a": 0}, []), p.Punctuation()), r"neither byte-level nor SentencePiece .*Punctuation"),
    ],
)
def test_other_families_are_refused_by_name(build, words):
    """What cannot be laid over the text is told by what it is."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model, pre = build(models, pre_tokenizers)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre
    with pytest.raises(SourceError, match=words):
        vocabulary_bytes(fast(backend))


def test_a_tokenizer_in_python_is_refused():
    """No backend, no description."""

    class Slow:
        name_or_path = "slow"

    with pytest.raises(SourceError, match=r"slow \(Slow\) is written in Python"):
        vocabulary_bytes(Slow())


def test_segmentation_forgets_the_numbering_only():
    """A permuted vocabulary cuts alike; another vocabulary or another regex does not."""
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = byte_level()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(description["model"]["vocab"])
    description["model"]["vocab"] = {piece: size - 1 - n for piece, n in description["model"]["vocab"].items()}
    description["added_tokens"][0]["id"] = size - 1
    permuted = fast(Tokenizer.from_str(json.dumps(description)), eos_token="<|endoftext|>")
    assert permuted.get_vocab() != tokenizer.get_vocab()
    assert segmentation(description_of(permuted)) == segmentation(description_of(tokenizer))
    assert segmentation(description_of(byte_level(300))) != segmentation(description_of(tokenizer))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert segmentation(description_of(permuted)) != segmentation(description_of(tokenizer))


def test_runs_of_bytes_that_are_no_text():
    """Halves of characters are cut out, what stands around them stays."""
    assert list(vocab_bytes.valid_runs(b"\xbd\xa0ab\xe4\xbd")) == [
        (b"\xbd", False), (b"\xa0", False), (b"ab", True), (b"\xe4\xbd", False),
    ]  # fmt: skip
    assert list(vocab_bytes.valid_runs("你é".encode())) == [("你é".encode(), True)]
    assert list(vocab_bytes.valid_runs(b"")) == []


# --- laying over ----------------------------------------------------------------------------------------


def test_starts_by_hand():
    """ "ab|c|d|ef" over "a|bc|d|e|f": bytes 0, 3, 4 and the end are shared, "d" is the token in common."""
    a, b = token_starts(np.array([2, 1, 1, 2])), token_starts(np.array([1, 2, 1, 1, 1]))
    assert a.tolist() == [0, 2, 3, 4, 6]
    index_a, index_b = shared_starts(a, b)
    assert (index_a.tolist(), index_b.tolist()) == ([0, 2, 3, 4], [0, 2, 3, 5])
    same_a, same_b = identical_spans(a, b)
    assert (same_a.tolist(), same_b.tolist()) == ([2], [2])
    assert last_start_before(a, np.array([0, 1, 2, 3, 5])).tolist() == [0, 0, 1, 2, 3]


def test_empty_texts_share_their_only_boundary():
    """Nothing over nothing."""
    nothing = token_starts(np.zeros(0, np.int64))
    assert [part.tolist() for part in shared_starts(nothing, nothing)] == [[0], [0]]
    assert [part.tolist() for part in identical_spans(nothing, nothing)] == [[], []]


def test_two_texts_are_refused():
    """Lengths that differ are no tokenizations of one text."""
    with pytest.raises(ValueError, match="cover 3 and 2 bytes"):
        shared_starts(token_starts(np.array([3])), token_starts(np.array([2])))


def test_shared_starts_equal_a_walk_over_bytes():
    """Random cuts of one text, against a set of bytes."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 40))
        cuts = [np.flatnonzero(np.r_[True, rng.random(size - 1) < 0.4, True]) for _ in range(2)]
        index_a, index_b = shared_starts(*cuts)
        assert cuts[0][index_a].tolist() == cuts[1][index_b].tolist() == sorted(set(cuts[0]) & set(cuts[1]))
        spans = [set(zip(cut[:-1].tolist(), cut[1:].tolist(), strict=True)) for cut in cuts]
        same_a, same_b = identical_spans(*cuts)
        assert {(int(cuts[0][i]), int(cuts[0][i + 1])) for i in same_a} == spans[0] & spans[1]
        assert cuts[0][same_a].tolist() == cuts[1][same_b].tolist()
