"""A model's greedy answers to the prompts of a test set: a teacher's text to learn from, or a student's to be scored.

sparsekd answer model=TEACHER prompts=train.jsonl out=taught       # taught/answers.jsonl: what `pack` reads
sparsekd answer model=STUDENT prompts=test.jsonl out=scores        # scores/answers.json: F1, exact match, Rouge-Lsum
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsekd import generation, heads, models, vocab
from sparsekd.checks import check_at_least, make_folder
from sparsekd.errors import RecipeError
from sparsekd.files import write_atomically, write_json
from sparsekd.instructions import Prompt, digest, item_number, load_prompts

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def answer(
    *,
    model: str,
    prompts: str | Path,
    out: str | Path,
    kind: str = "auto",
    min_response_words: int | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    prompt_format: str = "plain",
    tokenizer: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Answer every prompt by the likeliest next tokens; scores against the references go to `out/answers.json`.

    `out/answers.jsonl` has instruction, response and reference of each, so that `sparsekd pack
    source=out/answers.jsonl` makes rows of the model's own text.

    Args:
        model: a folder that save_pretrained wrote, or a model's id; decoder-only or encoder-decoder.
        prompts: JSON lines in one of the shapes that `kind` names.
        out: the folder that takes both files.
        kind: dolly (instruction, context, response), selfinst, vicuna, sni, unni, or auto: what the first record
            plainly is.
        min_response_words: the fewest words of a reference that is kept.
        limit: draw this many prompts, by the seed.
        max_new_tokens: answers are cut off there, and the cut ones counted.
        prompt_format: plain (the prompt and a blank line, as pack joins instruction records), chat or auto.
        tokenizer: a folder or an id, when the model's folder brings none.
        seed: of the choice of prompts.
        batch_size: answers generated at once.
        dtype, device: of the model.
        progress: called with (answers done, all).

    Returns:
        f1, exact_match and rouge_lsum, each {mean, standard_error} over the prompts that have a reference (None where
        there is none), counts, and settings.

    Raises:
        SourceError, ModelError: prompts or a model that cannot be read.
        RecipeError: a setting out of range, or the package rouge-score is missing.
    """
    check_at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if prompt_format not in generation.PROMPT_FORMATS:
        raise RecipeError(f"prompt_format={prompt_format!r} is not one of {', '.join(generation.PROMPT_FORMATS)}")
    questions = load_prompts(prompts, kind=kind, min_response_words=min_response_words, limit=limit, seed=seed)
    measures = SCORES if any(each.reference for each in questions) else {}
    scorers = {name: make() for name, make in measures.items()}  # a missing package shows before the first answer
    opened = models.open_answering_model(model, dtype=dtype, device=device)
    words = vocab.load_tokenizer(tokenizer or model)
    folder, given = make_folder(out), []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        given += generation.respond(
            opened,
            words,
            [generation.PROMPT_FORMATS[prompt_format](words, each.prompt) for each in batch],
            items=[item_number(each.id) for each in batch],
            seed=seed,
            temperature=0.0,
            max_new_tokens=max_new_tokens,
        )
        if progress:
            progress(len(given), len(questions))
    texts = [each.text for each in given]
    write_atomically(folder / "answers.jsonl", _lines(questions, texts))
    result: dict[str, Any] = {name: _mean(questions, texts, scorer) for name, scorer in scorers.items()}
    result |= {
        "counts": {
            "answers": len(given),
            "empty": sum(not each.text for each in given),
            "cut_off": sum(not each.finished for each in given),
        },
        "settings": {
            "model": model,
            "weights": models.weights_hash(heads.inner_model(opened)),
            "prompts": digest(questions),
            "max_new_tokens": max_new_tokens,
            "prompt_format": prompt_format,
        },
    }
    write_json(folder / "answers.json", result)
    return result


def _lines(questions: Sequence[Prompt], texts: Sequence[str]) -> bytes:
    """Empty answers are left out: there is nothing to learn from one. An `instruction` is packed with the blank line
    after it that the model was asked with; a `prompt` would be packed as it is."""
    records = [
        {"instruction": each.prompt, "response": text, "reference": each.reference}
        for each, text in zip(questions, texts, strict=True)
        if text
    ]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


# --- scores -------------------------------------------------------------------------------------------------


def normalized(text: str) -> list[str]:
    """SQuAD's words: lower case, without punctuation and articles."""
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def token_f1(text: str, reference: str) -> float:
    """SQuAD's F1: 2 · shared words / (words of both), as multisets; two empty ones agree."""
    words, wanted = normalized(text), normalized(reference)
    if not words or not wanted:
        return float(words == wanted)
    return 2 * sum((Counter(words) & Counter(wanted)).values()) / (len(words) + len(wanted))


def exact_match(text: str, reference: str) -> float:
    """1 where the words are the same."""
    return float(normalized(text) == normalized(reference))


def _rouge_lsum() -> Callable[[str, str], float]:
    """F-measure of rouge-score's rougeLsum with stemming, sentences on lines."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise RecipeError(
            f"Rouge-Lsum needs the package rouge-score ({error}): pip install 'sparsekd[eval]'"
        ) from error
    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    return lambda text, reference: float(scorer.score(reference, text)["rougeLsum"].fmeasure)


# name -> what makes (answer, reference) -> 0 .. 1
SCORES: dict[str, Callable[[], Callable[[str, str], float]]] = {
    "f1": lambda: token_f1,
    "exact_match": lambda: exact_match,
    "rouge_lsum": _rouge_lsum,
}


def _mean(questions: Sequence[Prompt], texts: Sequence[str], scorer: Callable[[str, str], float]) -> dict[str, float]:
    """{mean, standard_error} over the prompts that have a reference."""
    pairs = zip(questions, texts, strict=True)
    found = [scorer(text, each.reference) for each, text in pairs if each.reference is not None]
    mean = math.fsum(found) / len(found)
    spread = math.fsum((value - mean) ** 2 for value in found) / max(len(found) - 1, 1)
    return {"mean": mean, "standard_error": math.sqrt(spread / len(found))}
