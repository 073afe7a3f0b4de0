"""Sampled responses of a causal language model, whose randomness hangs on the item and not on the batch.

transformers' own sampling draws from one global stream, so a response changes with its neighbours in the batch, and
its defaults cut the distribution to 50 tokens. Here each next token inverts the whole softmax at one counter-based
uniform of (seed, item, step).

Shapes: B responses of a batch, T tokens so far, V logit width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd import vocab
from sparsekd.corpus import Document
from sparsekd.errors import RecipeError
from sparsekd.inversion import running_sums
from sparsekd.rng import Keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """What a model said.

    Attributes:
        text: without control tokens and surrounding white space.
        tokens: how many were generated, the ending one included.
        finished: whether the model ended it; else it was cut off at max_new_tokens.
    """

    text: str
    tokens: int
    finished: bool


# -- prompts -> ids


def _plain(tokenizer: Any, prompt: str) -> list[int]:
    """[BOS] prompt and a blank line: what `sparsekd pack` puts before the response of an instruction record."""
    encoded = vocab.encode(tokenizer, [Document(pieces=((f"{prompt}\n\n", False),))])[0]
    return encoded.ids[:-1].tolist()  # the last one is EOS


def _chat(tokenizer: Any, prompt: str) -> list[int]:
    """One user turn and the head of the assistant's."""
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"prompt_format=chat, and the tokenizer {vocab.name_of(tokenizer)} has no chat template; "
            "take prompt_format=plain"
        )
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _auto(tokenizer: Any, prompt: str) -> list[int]:
    return (_chat if getattr(tokenizer, "chat_template", None) else _plain)(tokenizer, prompt)


# prompt_format -> (tokenizer, prompt) -> ids
PROMPT_FORMATS: dict[str, Callable[[Any, str], list[int]]] = {"auto": _auto, "plain": _plain, "chat": _chat}


# -- ids -> responses


@torch.no_grad()
def respond(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    items: Sequence[int],
    seed: int,
    temperature: float,
    max_new_tokens: int,
) -> list[Response]:
    """One sampled response for each prompt, as one batch.

    Equals drawing token t of item i at softmax(logits / temperature) by the uniform of (seed, i, t): neither top-k
    nor top-p, and none of the penalties that a checkpoint's generation settings may hold. The batch moves a
    response only through the rounding of logits. Ids that the tokenizer does not have are never drawn.

    Args:
        prompts: ids of each; they are padded on the left. An encoder reads them ended by EOS, as it was trained to.
        temperature: 0 takes the likeliest token.
        items: [B] numbers of `instructions.item_number`: equal ones draw equal uniforms.
    """
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    apart = bool(getattr(model.config, "is_encoder_decoder", False))
    ending = [tokenizer.eos_token_id] if apart and tokenizer.eos_token_id is not None else []
    ids_BT, mask_BT = _left_padded([[*prompt, *ending] for prompt in prompts], pad)
    begin = 1 if apart else ids_BT.shape[1]  # a decoder apart has one token of its own before the response
    device = next(model.parameters()).device
    width = vocab.vocab_size(tokenizer)
    rows = torch.tensor(items, dtype=torch.int64, device=device)

    def draw(so_far_BT: Tensor, logits_BV: Tensor) -> Tensor:
        steps = torch.full_like(rows, so_far_BT.shape[1] - begin)
        uniforms_B = Keys(seed=seed, rows=rows, positions=steps).uniforms(1)[:, 0]
        known_BV = logits_BV[:, :width]
        drawn_B = known_BV.argmax(-1) if temperature == 0 else invert(known_BV / temperature, uniforms_B)
        return torch.full_like(logits_BV, -torch.inf).scatter(1, drawn_B[:, None], 0.0)

    out_BT = _generate(model, ids_BT.to(device), mask_BT.to(device), draw, sorted(ends), pad, max_new_tokens)
    return [_response(tokenizer, row, ends) for row in out_BT[:, begin:].tolist()]


def invert(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] the first id whose cumulative softmax exceeds the uniform in [0, 1); float64, as 128k tails ask for."""
    mass_BV = running_sums(logits_BV.double().softmax(-1))
    total_B1 = mass_BV[:, -1:].contiguous()
    drawn_B1 = torch.searchsorted(mass_BV, uniforms_B[:, None].double() * total_B1, right=True)
    # A product that rounds up to the total would fall behind the last id with any probability.
    return torch.minimum(drawn_B1, torch.searchsorted(mass_BV, total_B1))[:, 0]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids after which a response is over: the tokenizer's EOS, and what the model's settings add (a turn's end)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}


def _left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _generate(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, draw: Any, ends: list[int], pad: int, max_new_tokens: int
) -> Tensor:
    """Greedy search over what `draw` leaves: one token a step."""
    from transformers import GenerationConfig, LogitsProcessorList

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends,
        pad_token_id=pad,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    own, model.generation_config = model.generation_config, settings  # else its unset values come from the checkpoint
    try:
        return model.generate(input_ids=ids_BT, attention_mask=mask_BT, logits_processor=LogitsProcessorList([draw]))
    finally:
        model.generation_config = own


def _response(tokenizer: Any, tokens: list[int], ends: set[int]) -> Response:
    length = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    text = tokenizer.decode(tokens[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    finished = length < len(tokens)
    return Response(text=text.strip(), tokens=length + finished, finished=finished)
