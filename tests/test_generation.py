"""Responses are draws of the whole softmax whose randomness hangs on (seed, item, step) and on nothing else."""

from __future__ import annotations

import pytest
import torch

from sparsekd import generation, models, vocab
from sparsekd.errors import RecipeError
from sparsekd.generation import PROMPT_FORMATS, invert, respond
from sparsekd.rng import Keys

ASKED = ["The cat sees", "The dog", "counts 1 2", "The owl fears the hen and"]


@pytest.fixture(scope="module")
def opened(world):
    return models.open_model(world.teacher), vocab.load_tokenizer(world.teacher)


def answers(opened, prompts=ASKED, items=None, **how):
    model, tokenizer = opened
    ids = [PROMPT_FORMATS["plain"](tokenizer, prompt) for prompt in prompts]
    settings = {"seed": 0, "temperature": 1.0, "max_new_tokens": 8} | how
    return respond(model, tokenizer, ids, items=items or list(range(len(ids))), **settings)


def test_a_response_does_not_depend_on_its_batch(opened):
    """Alone, padded beside longer prompts, or in another place: the same text."""
    together = answers(opened)
    alone = [answers(opened, [prompt], [item])[0] for item, prompt in enumerate(ASKED)]
    turned = answers(opened, ASKED[::-1], [3, 2, 1, 0])[::-1]
    assert together == alone == turned


def test_seeds_and_items_give_different_responses(opened):
    """Five items of one prompt are five draws, and another seed draws anew; the same numbers draw the same."""
    items = [11, 12, 13, 14, 15]
    drawn = [[r.text for r in answers(opened, ["The"] * 5, items, seed=seed)] for seed in (0, 0, 1)]
    assert len(set(drawn[0])) > 3
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_response_equals_inverting_the_softmax_by_hand(opened):
    """Token t of item i is the first id whose cumulative softmax at T exceeds the uniform of (seed, i, t)."""
    model, tokenizer = opened
    ids = PROMPT_FORMATS["plain"](tokenizer, "The cat")
    (response,) = respond(model, tokenizer, [ids], items=[2**40 + 3], seed=9, temperature=0.7, max_new_tokens=6)
    tokens = list(ids)
    for step in range(response.tokens):
        uniform = Keys(seed=9, rows=torch.tensor([2**40 + 3]), positions=torch.tensor([step])).uniforms(1).item()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1].double() / 0.7
        tokens.append(int((logits.softmax(-1).cumsum(-1) <= uniform).sum()))
    text = tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True).strip()
    assert response.text == text


def test_draws_follow_the_softmax():
    """The share of each id over a grid of uniforms is its probability, and impossible ids never come."""
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = invert(logits.expand(10_000, -1), uniforms)
    shares = torch.bincount(drawn, minlength=6) / 10_000
    torch.testing.assert_close(shares.float(), logits.softmax(-1), atol=2e-4, rtol=0)
    edge = invert(logits.expand(2, -1), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert edge.tolist() == [1, 4]


def test_a_checkpoints_own_generation_settings_do_not_count(opened):
    """Greedy or top-k defaults, penalties and a minimum length of a checkpoint would be another distribution."""
    from transformers import GenerationConfig

    model, _ = opened
    before, own = answers(opened), model.generation_config
    settings = {"top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 8, "do_sample": True, "temperature": 0.1}
    model.generation_config = strange = GenerationConfig(**own.to_diff_dict() | settings)
    try:
        assert answers(opened) == before
        assert model.generation_config is strange
    finally:
        model.generation_config = own


def test_an_ending_token_ends_a_response(opened):
    """It counts as a token, is not in the text, and its absence is told."""
    model, tokenizer = opened
    own = model.generation_config.eos_token_id
    full = answers(opened, ["The"], [1])[0]
    assert (full.tokens, full.finished) == (8, False)
    third = PROMPT_FORMATS["plain"](tokenizer, full.text)[2]
    model.generation_config.eos_token_id = [own, third]
    try:
        cut = answers(opened, ["The"], [1])[0]
    finally:
        model.generation_config.eos_token_id = own
    assert cut.finished
    assert cut.tokens <= 4
    assert full.text.startswith(cut.text)


def test_ids_beyond_the_tokenizer_are_never_drawn(opened):
    """Logits padded beyond the vocabulary hold whatever training left there."""
    import copy

    model, tokenizer = copy.deepcopy(opened[0]), opened[1]
    size = vocab.vocab_size(tokenizer)
    model.resize_token_embeddings(size + 64)
    with torch.no_grad():
        model.get_output_embeddings().weight[size:] = 100 * model.get_output_embeddings().weight[:64].sign()
    assert answers((model, tokenizer)) == answers(opened)


def test_a_plain_prompt_is_what_packing_puts_before_a_response(opened, tmp_path):
    """The ids equal the unsupervised part of an instruction record."""
    import json

    from sparsekd.corpus import documents

    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"instruction": "Do it.", "context": "x y", "response": "z"}) + "\n")
    packed = vocab.encode(opened[1], list(documents(str(path), prompt_field="instruction", response_field="response")))[
        0
    ]
    assert PROMPT_FORMATS["plain"](opened[1], "Do it.\n\nx y") == packed.ids[~packed.supervised].tolist()


def test_a_chat_prompt_is_the_templates(opened):
    """auto takes the template where there is one; chat without one is refused."""
    import copy

    tokenizer = copy.deepcopy(opened[1])
    assert PROMPT_FORMATS["auto"](tokenizer, "hi") == PROMPT_FORMATS["plain"](tokenizer, "hi")
    with pytest.raises(RecipeError, match="has no chat template; take prompt_format=plain"):
        PROMPT_FORMATS["chat"](tokenizer, "hi")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    )
    assert tokenizer.decode(PROMPT_FORMATS["auto"](tokenizer, "hi")) == "[user]hi[bot]"
    assert PROMPT_FORMATS["auto"](tokenizer, "hi") == PROMPT_FORMATS["chat"](tokenizer, "hi")
    assert generation.end_tokens(opened[0], tokenizer) == {tokenizer.eos_token_id}
