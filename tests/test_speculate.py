"""Speculative decoding: the expected number of teacher calls against brute force, and real generation against both."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SEQ_LEN

from sparsekd import models
from sparsekd.cli import app
from sparsekd.drafts import expected_acceptance, expected_calls
from sparsekd.errors import MismatchError, ModelError, RecipeError, SourceError
from sparsekd.evaluate import evaluate
from sparsekd.packed import RowsReader
from sparsekd.rows import pack
from sparsekd.speculate import _acceptance, speculate
from sparsekd.train import train

NEW_TOKENS, PROMPTS, DRAFT = 40, 10, 3


@pytest.fixture(scope="module")
def drafter(world, tmp_path_factory) -> str:
    """A student that agrees with its teacher often, but by no means always."""
    out = tmp_path_factory.mktemp("drafting") / "student"
    shape = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    settings = {"max_steps": 60, "batch_size": 8, "learning_rate": 2e-2}
    train(out=out, student=shape, cache=world.cache, device="cpu", progress=False, **settings)
    return str(out)


@pytest.fixture(scope="module")
def measured(world, drafter, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("speculated")
    sizes = {"draft_length": DRAFT, "prompts": PROMPTS, "prompt_tokens": 8, "new_tokens": NEW_TOKENS}
    result = speculate(teacher=world.teacher, student=drafter, rows=world.rows, device="cpu", out=out, **sizes)
    assert json.loads((out / "speculate.json").read_text()) == result
    return result


# --- expected: exact laws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.85, 1.0])
@pytest.mark.parametrize("length", [1, 4, 7])
def test_one_rate_gives_the_geometric_sum(rate, length):
    """Independent drafts: (1 - a^(g+1)) / (1 - a) tokens per call, g + 1 when every draft is kept."""
    found = expected_acceptance(rate, length)
    assert found.tokens_per_call == pytest.approx((1 - rate ** (length + 1)) / (1 - rate) if rate < 1 else length + 1)
    assert found.accepted == pytest.approx(found.tokens_per_call - 1)
    assert found.standard_error == 0


def test_a_long_text_of_one_rate_tends_to_the_formula():
    """What the ends of texts cost vanishes with their length."""
    text = torch.full((4000,), 0.7)
    along, formula = expected_acceptance([text], 5), expected_acceptance(0.7, 5)
    assert along.tokens_per_call == pytest.approx(formula.tokens_per_call, rel=1e-3)
    assert along.tokens_per_call < formula.tokens_per_call


def test_hard_positions_in_clusters_cost_less_than_the_formula_of_the_mean_says():
    """Half a text always kept and half never: 1 call per token there, 1 per g + 1 here."""
    text = torch.cat([torch.ones(400), torch.zeros(400)])
    assert expected_calls(text, 3) == pytest.approx(400 / 4 + 400)
    assert expected_acceptance([text], 3).tokens_per_call < expected_acceptance(0.5, 3).tokens_per_call


def test_a_small_text_by_hand():
    """Three tokens, one draft a call: the last is never drafted when the call before it ends there."""
    # A call at 0 drafts token 0: kept (0.5), it ends at 1 and the next call, at 2, drafts nothing: 2 calls.
    # Refused (0.5), the next call is at 1, drafts token 1: kept (0.2) it ends the text: 2 calls; else (0.8): 3 calls.
    assert expected_calls(torch.tensor([0.5, 0.2, 0.9]), 1) == pytest.approx(0.5 * 2 + 0.5 * (0.2 * 2 + 0.8 * 3))


def test_texts_weigh_by_their_length_and_give_an_error():
    """Σ tokens / Σ calls over texts; one text alone has no error, an empty one does not count."""
    kept, refused = torch.ones(8), torch.zeros(4)
    both = expected_acceptance([kept, refused, torch.zeros(0)], 3)
    assert both.tokens_per_call == pytest.approx((8 + 4) / (2 + 4))
    assert both.standard_error > 0
    assert expected_acceptance([kept], 3).standard_error is None


@pytest.mark.parametrize("length", [1, 2, 3])
def test_calls_along_the_teachers_own_texts_are_exact(length):
    """E over texts of `expected_calls` of min(1, q/p) equals a walk through every outcome of speculative sampling."""
    generator = torch.Generator().manual_seed(length)
    size, tokens = 3, 4
    p, q = torch.rand(2, size + 1, size, generator=generator, dtype=torch.float64).pow(3).unbind()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)  # by the token before; size stands for none

    def along(text: tuple[int, ...]) -> float:
        before = (size, *text[:-1])
        kept = [min(1.0, float(q[b, x] / p[b, x])) for b, x in zip(before, text, strict=True)]
        chance = math.prod(float(p[b, x]) for b, x in zip(before, text, strict=True))
        return chance * expected_calls(torch.tensor(kept, dtype=torch.float64), length)

    texts = itertools.product(range(size), repeat=tokens)
    assert sum(map(along, texts)) == pytest.approx(walk(p, q, size, tokens, length), rel=1e-12)


def walk(p: torch.Tensor, q: torch.Tensor, before: int, left: int, length: int) -> float:
    """Expected calls for `left` more tokens, by Algorithm 1 of Leviathan et al.: draft, keep or replace, go on."""
    if left == 0:
        return 0.0

    def drafts(before: int, left: int, more: int) -> float:
        if more == 0:  # every draft was kept: the teacher's own token
            return sum(float(p[before, x]) * walk(p, q, x, left - 1, length) for x in range(p.shape[1]))
        lower = torch.minimum(p[before], q[before])
        kept = sum(float(lower[x]) * drafts(x, left - 1, more - 1) for x in range(p.shape[1]))
        rest = p[before] - lower  # what is refused is drawn from the rest, so each token has its p in all
        return kept + sum(float(rest[x]) * walk(p, q, x, left - 1, length) for x in range(p.shape[1]))

    return 1 + drafts(before, left, min(length, left - 1))


@pytest.mark.parametrize(
    ("acceptance", "length", "words"),
    [
        (1.2, 3, "acceptance=1.2"),
        (math.nan, 3, "acceptance=nan is no probability"),
        ([torch.tensor([0.5, -0.1])], 3, "give values in \\[0, 1\\]"),
        ([], 3, "no text"),
        (0.5, 0, "draft_length=0 is too small"),
    ],
)
def test_what_is_no_probability_is_refused(acceptance, length, words):
    """Rates outside [0, 1], no text, and drafts of no token."""
    with pytest.raises(RecipeError, match=words):
        expected_acceptance(acceptance, length)


# --- measured ----------------------------------------------------------------------------------------------


def test_generation_takes_as_many_calls_as_its_own_text_should(measured):
    """Given the text that came out, measured minus expected calls has mean 0: within 3 standard errors over prompts."""
    excess = measured["measured"]["excess_calls"]
    assert abs(excess["mean"]) < 3 * excess["standard_error"]
    # The test can fail: the error is a few percent of the calls, and half the drafts are kept.
    assert excess["standard_error"] * PROMPTS < 0.15 * measured["measured"]["calls"]
    assert 0.15 < measured["measured"]["acceptance"]["mean"] < 0.95


def test_generation_agrees_with_what_other_texts_of_the_teacher_promise(measured):
    """Tokens per call, measured and expected along independent texts, within 3 joint standard errors."""
    real, promised = measured["measured"], measured["expected"]["teacher_text"]
    joint = math.hypot(real["standard_error"], promised["standard_error"])
    assert abs(real["tokens_per_call"] - promised["tokens_per_call"]) < 3 * joint


def test_acceptance_along_a_text_is_that_of_whole_tables(world, drafter, monkeypatch):
    """Σ min(p, q) and min(1, q(x) / p(x)) of each token after the first, whatever the chunks."""
    monkeypatch.setattr("sparsekd.speculate.CHUNK_POSITIONS", 7)
    ids = torch.from_numpy(RowsReader(world.rows, "heldout")[0].input_ids.astype("int64"))
    teacher, student = (models.open_model(path, device="cpu") for path in (world.teacher, drafter))
    with torch.no_grad():
        p, q = (model(ids[None]).logits[0, :-1].double().softmax(-1) for model in (teacher, student))
    x = ids[1:, None]
    sums, kept = _acceptance(teacher, student, ids)
    torch.testing.assert_close(sums, torch.minimum(p, q).sum(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(kept, (q.gather(1, x) / p.gather(1, x)).clamp(max=1)[:, 0], rtol=1e-4, atol=1e-7)


def test_every_token_may_be_drafted(world, tmp_path):
    """Two untrained models are both nearly flat and agree: sampling cut to some best tokens would make them differ."""
    sizes = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        models.new_student(sizes, vocab_size=300, seq_len=64).save_pretrained(tmp_path / name)
    found = speculate(
        teacher=str(tmp_path / "teacher"),
        student=str(tmp_path / "student"),
        rows=world.rows,
        prompts=6,
        prompt_tokens=4,
        new_tokens=40,
        device="cpu",
    )
    assert found["acceptance"]["mean"] > 0.9
    real = found["measured"]["acceptance"]
    assert abs(real["mean"] - found["acceptance"]["mean"]) < 4 * real["standard_error"]
    assert found["measured"]["tokens_per_call"] > 3


def test_counts_are_whole(measured):
    """Every prompt got its tokens; each call added what it accepted and one token more."""
    real = measured["measured"]
    assert real["tokens"] == PROMPTS * NEW_TOKENS
    assert real["tokens_per_call"] == pytest.approx(real["tokens"] / real["calls"])
    assert real["accepted"] == pytest.approx(real["tokens_per_call"] - 1)


def test_the_acceptance_of_the_rows_is_that_of_evaluate(world, drafter, measured, tmp_path):
    """Σ min(p, q) over the same rows is the same number by both programs."""
    judged = evaluate(
        model=drafter, teacher=world.teacher, rows=world.rows, limit_rows=PROMPTS, device="cpu", out=tmp_path
    )
    assert measured["acceptance"]["mean"] == pytest.approx(judged["acceptance"]["mean"], rel=1e-6)
    independent = expected_acceptance(judged["acceptance"]["mean"], DRAFT)
    assert measured["expected"]["independent"]["accepted"] == pytest.approx(independent.accepted, rel=1e-6)


def test_longer_drafts_are_never_worth_less_tokens(measured):
    """Tokens per call grow with the draft length, both ways of expecting them."""
    for kind in ("independent", "heldout"):
        values = [point[kind] for point in measured["curve"]]
        assert values == sorted(values)
        at = next(point[kind] for point in measured["curve"] if point["draft_length"] == DRAFT)
        assert at == pytest.approx(measured["expected"][kind]["tokens_per_call"])


def test_speeds_belong_together(measured):
    """The speed-up is the ratio of the two speeds, whose tokens are equally many."""
    speed = measured["speed"]
    ratio = speed["assisted_tokens_per_second"] / speed["teacher_tokens_per_second"]
    assert speed["speedup"]["mean"] == pytest.approx(ratio)
    cost = speed["teacher_tokens_per_second"] / speed["student_tokens_per_second"]
    assert speed["student_cost"] == pytest.approx(cost)


def test_a_teacher_that_drafts_for_itself_is_always_right(world, tmp_path):
    """Acceptance 1, and every call adds draft_length + 1 tokens."""
    sizes = {"draft_length": 4, "prompts": 2, "prompt_tokens": 4, "new_tokens": 20}
    found = speculate(
        teacher=world.teacher, student=world.teacher, rows=world.rows, device="cpu", out=tmp_path, **sizes
    )
    assert found["acceptance"]["mean"] == pytest.approx(1, abs=1e-6)
    assert found["measured"]["acceptance"]["mean"] == 1
    assert found["measured"]["calls"] == 2 * 20 / 5


def test_a_models_own_defaults_of_generation_change_nothing(world, drafter, tmp_path):
    """A teacher that by its generation_config samples colder, from two tokens, and stops early: the same texts."""
    shutil.copytree(world.teacher, tmp_path / "teacher")
    own = {"do_sample": True, "temperature": 0.3, "top_k": 2, "repetition_penalty": 1.5, "eos_token_id": [5, 7, 260]}
    (tmp_path / "teacher" / "generation_config.json").write_text(json.dumps(own))
    settings = {"student": drafter, "rows": world.rows, "device": "cpu", "out": tmp_path, "prompts": 2}
    first, again = (
        speculate(teacher=teacher, prompt_tokens=4, new_tokens=30, **settings)["measured"]
        for teacher in (world.teacher, str(tmp_path / "teacher"))
    )
    assert again == first


def test_one_seed_gives_the_same_texts_and_leaves_torch_alone(world, drafter, tmp_path):
    """The counts repeat with the seed, and the caller's random state is where it was."""
    settings = {"teacher": world.teacher, "student": drafter, "rows": world.rows, "device": "cpu", "out": tmp_path}
    state = torch.get_rng_state()
    first, again, other = (
        speculate(prompts=2, prompt_tokens=4, new_tokens=16, seed=seed, **settings)["measured"] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert first["expected_calls"] != other["expected_calls"]


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"draft_length": 0}, RecipeError, "draft_length=0 is too small"),
        ({"prompts": 0}, RecipeError, "prompts=0 is too small"),
        ({"new_tokens": 1}, RecipeError, "new_tokens=1 is too small; give at least 2"),
        ({"prompt_tokens": SEQ_LEN + 1}, RecipeError, f"prompt_tokens={SEQ_LEN + 1} is more than a row has"),
        ({"prompt_tokens": 10, "new_tokens": 55}, MismatchError, "context of 64 tokens; give new_tokens=54 or fewer"),
        ({"split": "test"}, SourceError, "no split 'test'"),
        ({"student": "./nowhere"}, ModelError, "no model at ./nowhere"),
    ],
)
def test_settings_that_cannot_be_are_refused(world, drafter, settings, error, words):
    """Each with the value and the way out, before anything is generated."""
    usual = {"teacher": world.teacher, "student": drafter, "rows": world.rows, "device": "cpu"}
    with pytest.raises(error, match=words):
        speculate(**usual | settings)


def test_padding_is_cut_and_another_width_refused(world, drafter, tmp_path):
    """A head padded further drafts as without its padding; more rows than a padding has are named and refused."""
    for width in (320, 1400):
        model = models.open_model(drafter, device="cpu")
        model.resize_token_embeddings(width, mean_resizing=False)
        model.save_pretrained(tmp_path / str(width))
    settings = {"teacher": world.teacher, "rows": world.rows, "device": "cpu", "prompts": 2, "new_tokens": 8}
    plain, padded = (speculate(student=str(each), **settings) for each in (drafter, tmp_path / "320"))
    assert padded["expected"] == plain["expected"]
    with pytest.raises(MismatchError, match="teacher and student make 300 and 1400 logits for 300 tokens"):
        speculate(student=str(tmp_path / "1400"), **settings)


def test_rows_of_another_tokenizer_are_refused(world, drafter, tmp_path):
    """The prompts must be in the models' own tokens."""
    rows = tmp_path / "rows"
    pack(source=world.corpus, tokenizer="train", vocab_size=280, seq_len=SEQ_LEN, heldout=0.1, out=rows, progress=False)
    with pytest.raises(MismatchError, match="tokenizer differs"):
        speculate(teacher=world.teacher, student=drafter, rows=rows, device="cpu")


def test_the_students_folder_gets_the_numbers_by_default(world, drafter):
    """Without out=, speculate.json lies beside the student."""
    speculate(
        teacher=world.teacher, student=drafter, rows=world.rows, prompts=1, prompt_tokens=2, new_tokens=4, device="cpu"
    )
    assert json.loads((Path(drafter) / "speculate.json").read_text())["settings"]["prompts"] == 1


def test_the_verb_prints_what_the_file_holds(world, drafter, tmp_path, capsys):
    """Acceptance, tokens per call and the speed-up, each on a line."""
    words = [f"teacher={world.teacher}", f"student={drafter}", f"rows={world.rows}", f"out={tmp_path}", "device=cpu"]
    app(["speculate", *words, "prompts=2", "prompt_tokens=4", "new_tokens=8"], standalone_mode=False)
    found = json.loads((tmp_path / "speculate.json").read_text())
    accepted, tokens, speed = capsys.readouterr().out.splitlines()
    assert f"drafts accepted  {found['measured']['acceptance']['mean']:.4f} ± " in accepted
    assert f"tokens per call  {found['measured']['tokens_per_call']:.4f} (expected" in tokens
    assert f"speed-up  {found['speed']['speedup']['mean']:.4f} ± " in speed
