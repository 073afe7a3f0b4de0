"""Transcoding: draws rewritten into another tokenizer's vocabulary, against a slow twin and exact answers."""

from __future__ import annotations

import numpy as np
import pytest
from slow_transcode import slow_transcode
from test_align import FAMILIES, byte_level

from sparsekd.redraw import Answers, Draws, rewrite
from sparsekd.retokenise import cut_ids, pair_of, retokenise

TEXTS = [
    "The cat sees the dog, and counts 1 2 3.\n",
    "The dog fears the catcat 123456 caté é\r\n\tdef f(xxx):\n        return x  \n\n",
    "naïve café — 你好 🙂👩‍👩‍👧 the  cat",
    "",
]


def random_draws(ids, width, pair, rng, rounds=12):
    """Draws for each token: what came, others that agree with the text, and some of the vocabulary."""
    of_id, found = pair.teacher.of_id, []
    pieces = [of_id[token] or b"" for token in ids]
    for j, token in enumerate(ids):
        rest = b"".join(pieces[j:])
        agreeing = [other for other, piece in enumerate(of_id) if piece and rest.startswith(piece)] or [token]
        some = [token, *rng.choice(agreeing, 2).tolist(), *rng.choice(width, 5).tolist()]
        counts = rng.multinomial(rounds, np.full(len(some), 1 / len(some)))
        chosen = {}
        for draw, count in zip(some, counts.tolist(), strict=True):
            if count:
                chosen[int(draw)] = chosen.get(int(draw), 0) + count / rounds
        found.append(chosen)
    return found


def as_draws(draws, ids):
    sizes = np.array([len(each) for each in draws])
    following = np.arange(1, len(ids) + 1)
    following[-1:] = -1
    return Draws(
        ids=np.array([token for each in draws for token in each], np.int64),
        weights=np.array([weight for each in draws for weight in each.values()]),
        first=np.cumsum(sizes) - sizes,
        sizes=sizes,
        realised=np.array(ids),
        following=following,
    )


@pytest.fixture(scope="module")
def families():
    return {name: make() for name, make in FAMILIES.items()} | {"small": byte_level(300)}


@pytest.mark.parametrize("unresolved", ["point", "drop"])
@pytest.mark.parametrize(
    ("teacher", "student"),
    [("byte_level", "small"), ("small", "byte_level"), ("byte_level", "llama2_like"), ("byte_level", "unigram_like"),
     ("llama2_like", "byte_level"), ("llama2_like", "unigram_like"), ("unigram_like", "llama2_like")],
)  # fmt: skip
def test_the_fast_path_is_its_slow_twin(families, teacher, student, unresolved):
    """Same targets and masses, position by position, though only the word so far is read before a draw."""
    from sparsekd.vocab_bytes import encode_texts, plain_backend

    rng = np.random.default_rng(0)
    pair = pair_of(families[teacher], families[student])
    answers, backend, width = Answers(pair=pair), plain_backend(families[teacher]), len(pair.control)
    control = {token: int(there) for token, there in enumerate(pair.control.tolist())}

    def encode(data):
        return cut_ids([data], pair)[0]

    eos, seen = pair.teacher.eos, dict.fromkeys(("accepted", "rejected", "short", "open", "dropped"), 0.0)
    for text in TEXTS:
        ids = [*encode_texts(backend, [text])[0].ids, eos]
        draws = random_draws(ids, width, pair, rng)
        starts = np.zeros(len(ids), bool)
        row = retokenise([(np.array(ids), starts)], pair, answers.contexts)[0]
        fast = rewrite(as_draws(draws, ids), row.source, row.context, answers, chain=2, unresolved=unresolved)
        slow = slow_transcode(
            ids, draws, pair.teacher.of_id, pair.student.of_id, encode, control, chain=2, unresolved=unresolved
        )
        assert row.ids.tolist() == [token for token, _, _ in slow]
        for i, (_, targets, masses) in enumerate(slow):
            mine = fast.position == i
            assert dict(zip(fast.token[mine].tolist(), fast.weight[mine].tolist(), strict=True)) == pytest.approx(
                targets
            )
            assert {name: mass[i] for name, mass in fast.masses.items()} == pytest.approx(masses, abs=1e-12)
            seen = {name: seen[name] + mass for name, mass in masses.items()}
    finer = (teacher, student) != ("small", "byte_level")  # else every student token starts where a teacher token does
    expected = {"accepted", "rejected", "open", *["short"] * finer, *["dropped"] * (unresolved == "drop")}
    assert {name for name, mass in seen.items() if mass} == expected
