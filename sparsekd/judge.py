"""Instruction following, rated by a language model (paper, appendix E.3).

A model answers each prompt several times at temperature 1; a judge behind an OpenAI-compatible endpoint rates the
ground truth and the response from 1 to 10, in one request, without being told which is which; the score is
Σ response ratings / Σ ground-truth ratings.

Every response and every rating is a line of `record.jsonl` before the next is asked for, so an interrupted run goes on
where it was. A rating that cannot be read is asked for again, then recorded as malformed: it is never guessed.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekd import generation, heads, models, vocab
from sparsekd.checks import check_at_least, check_seed, make_folder
from sparsekd.endpoint import KEY_VARIABLE, Endpoint, Unanswered, open_endpoint
from sparsekd.errors import MismatchError, ModelError, RecipeError, SourceError
from sparsekd.files import write_atomically
from sparsekd.instructions import Prompt, digest, item_number, load_prompts
from sparsekd.journal import Journal
from sparsekd.rating import AGAIN, QUESTION, Rating, rate, reference_first, score

Progress = Callable[[int, int], Any]
Line = dict[str, Any]
Item = tuple[str, int]  # a prompt's id and the number of its response

# Fields of each request beyond model and messages; `judge_settings` overrides them, null takes one out.
JUDGE_SETTINGS = {"temperature": 0, "max_tokens": 512}
FAILURES_IN_A_ROW = 5  # questions without an answer before the endpoint is taken to be down


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the model under test is asked; what `judge` says of each."""

    responses: int
    temperature: float
    max_new_tokens: int
    max_prompt_tokens: int | None
    prompt_format: str
    batch_size: int
    dtype: str
    seed: int

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("responses", "max_new_tokens", "batch_size")}
        check_at_least(1, max_prompt_tokens=self.max_prompt_tokens, **sizes)
        check_seed(self.seed)
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"temperature={self.temperature} is not above 0; the paper's is 1")
        if self.prompt_format not in generation.PROMPT_FORMATS:
            formats = ", ".join(generation.PROMPT_FORMATS)
            raise RecipeError(f"prompt_format={self.prompt_format!r} is not one of {formats}")


def judge(
    *,
    model: str,
    prompts: str | Path,
    out: str | Path,
    judge_model: str,
    endpoint: str = "http://localhost:8000/v1",
    kind: str = "auto",
    min_response_words: int | None = None,
    limit: int | None = None,
    responses: int = 5,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    max_prompt_tokens: int | None = None,
    prompt_format: str = "auto",
    tokenizer: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    judge_settings: dict[str, Any] | None = None,
    retries: int = 5,
    timeout_s: float = 120.0,
    concurrency: int = 4,
    api_key_env: str | None = KEY_VARIABLE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score `model` against the ground truth of a test set; also written to `out/judge.json`.

    The judge gets the prompt, the ground truth and the response, in an order that a coin per prompt decides and that
    alternates between its responses, so that a judge's liking for the first answer cancels. Run again with the same
    settings, it asks only for what `out/record.jsonl` does not hold yet.

    Args:
        model: a folder that save_pretrained wrote, or a model's id.
        prompts: JSON lines in one of the shapes that `kind` names.
        out: the folder that takes record.jsonl and judge.json.
        judge_model: what the endpoint calls the judge.
        endpoint: an OpenAI-compatible address, up to and including the version.
        kind: dolly, selfinst, vicuna, sni, unni, or auto: what the first record plainly is.
        min_response_words: the fewest words of a ground truth that is kept; default: 12 for sni and unni ("longer than
            11"), else no filter.
        limit: draw this many prompts, by the seed.
        responses: how often each prompt is answered.
        temperature: of the model under test, above 0; neither top-k nor top-p is applied.
        max_new_tokens: responses are cut off there, and the cut ones counted.
        max_prompt_tokens: leave out prompts with more tokens, and count them; default: a prompt that does not fit the
            model's context is an error.
        prompt_format: plain (the prompt and a blank line, as pack joins instruction records), chat (the tokenizer's
            template), or auto: chat where there is a template.
        tokenizer: a folder or an id, when the model's folder brings none.
        seed: of the draws, of the order of the two answers, and of the choice of prompts.
        batch_size: responses generated at once.
        dtype, device: of the model under test.
        judge_settings: more fields of each request; default: temperature 0 and max_tokens 512. null takes one out.
        retries: how often a failed request is sent again, and how often an unreadable rating is asked for again.
        timeout_s: seconds before a request counts as failed.
        concurrency: requests at a time.
        api_key_env: the environment variable that holds the endpoint's key; null to send none.
        progress: called with (responses and ratings done, both in all).

    Returns:
        score (mean and standard error over prompts), score_by_response (the ratio of each of the `responses` rounds),
        average_score (the mean of those, its standard error over rounds), mean_ratings of ground truths, responses,
        first and second answers, counts, and settings.

    Raises:
        SourceError: prompts that cannot be read or have no ground truth.
        ModelError: no such model, a judge that refuses us or does not answer, or no rating that could be read.
        MismatchError: `out` holds a record of other settings; prompts beyond the model's context.
        RecipeError: a setting out of range.
    """
    sampling = Sampling(
        responses=responses,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        prompt_format=prompt_format,
        batch_size=batch_size,
        dtype=dtype,
        seed=seed,
    )
    check_at_least(1, concurrency=concurrency)
    asked = {key: value for key, value in (JUDGE_SETTINGS | (judge_settings or {})).items() if value is not None}
    rater = open_endpoint(
        endpoint, judge_model, api_key_env=api_key_env, settings=asked, retries=retries, timeout_s=timeout_s
    )
    questions = load_prompts(prompts, kind=kind, min_response_words=min_response_words, limit=limit, seed=seed)
    _check_references(questions, prompts)
    opened, words = models.open_model(model, dtype=dtype, device=device), vocab.load_tokenizer(tokenizer or model)
    ids = _that_fit({each.id: _ids(words, each, sampling) for each in questions}, opened, sampling)
    kept = [each for each in questions if each.id in ids]
    settings = _settings(opened, words, kept, sampling, rater)
    folder = make_folder(out)
    with Journal(folder / "record.jsonl") as journal:
        _begin(journal, settings)
        _respond_to_all(journal, opened, words, ids, sampling, progress)
        _rate_all(journal, rater, kept, sampling, concurrency, progress)
        lines = list(journal.lines)
    result = summary(lines) | {
        "settings": settings | {"model": model, "prompts_file": str(prompts), "endpoint": endpoint}
    }
    result["counts"] |= {"prompts": len(kept), "prompts_left_out": len(questions) - len(kept)}
    write_atomically(folder / "judge.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result


# -- what is asked


def _check_references(prompts: Sequence[Prompt], path: str | Path) -> None:
    without = [each.id for each in prompts if each.reference is None]
    if without:
        raise SourceError(
            f"{path}:{without[0]} and {len(without) - 1} more records have no ground truth to rate a response beside; "
            "add it as the field 'reference'"
        )


def _ids(tokenizer: Any, prompt: Prompt, sampling: Sampling) -> list[int]:
    return generation.PROMPT_FORMATS[sampling.prompt_format](tokenizer, prompt.prompt)


def _that_fit(ids: dict[str, list[int]], model: Any, sampling: Sampling) -> dict[str, list[int]]:
    """The prompts of at most max_prompt_tokens, refused if one of them leaves no room for a response."""
    longest = sampling.max_prompt_tokens or math.inf
    kept = {name: each for name, each in ids.items() if len(each) <= longest}
    if not kept:
        raise SourceError(f"every prompt has more than {longest} tokens; raise max_prompt_tokens={longest}")
    context = getattr(heads.inner_model(model).config.get_text_config(), "max_position_embeddings", None) or math.inf
    over = {name: len(each) for name, each in kept.items() if len(each) + sampling.max_new_tokens > context}
    if over:
        name, room = next(iter(over)), context - sampling.max_new_tokens
        way_out = f"or leave such prompts out with max_prompt_tokens={room}" if room > 0 else f"below {context}"
        raise MismatchError(
            f"{len(over)} of {len(kept)} prompts do not fit: line {name} has {over[name]} tokens, and with "
            f"max_new_tokens={sampling.max_new_tokens} it goes beyond the model's context of {context}; "
            f"lower max_new_tokens, {way_out}"
        )
    return kept


def _settings(model: Any, tokenizer: Any, prompts: list[Prompt], sampling: Sampling, rater: Endpoint) -> Line:
    """What the record's numbers depend on: not the address, for servers move, and never the key."""
    return asdict(sampling) | {
        "weights": models.weights_hash(heads.inner_model(model)),
        "tokenizer": vocab.fingerprint(tokenizer),
        "prompts": digest(prompts),
        "judge_model": rater.model,
        "judge_settings": rater.settings,
        "question": hashlib.sha256((QUESTION + AGAIN).encode()).hexdigest(),
    }


def _begin(journal: Journal, settings: Line) -> None:
    """Record the settings, or compare them with those that the recorded responses were made with."""
    before: Line = next((line for line in reversed(journal.lines) if line.get("line") == "settings"), {})
    if not _lines(journal.lines, "response"):  # nothing hangs on them yet: the first batch may have been too large
        if before != (line := {"line": "settings"} | settings):
            journal.append(line)
        return
    for name, value in settings.items():
        if before.get(name) != value:
            raise MismatchError(
                f"{name} differs: {journal.path} was begun with {before.get(name)!r}, this run has {value!r}; "
                "give another out=FOLDER, or the settings of before"
            )


def _lines(journal_lines: Sequence[Line], kind: str) -> dict[Item, Line]:
    """The last line of a kind for each item."""
    return {(line["prompt"], line["index"]): line for line in journal_lines if line.get("line") == kind}


# -- responses


def _respond_to_all(
    journal: Journal,
    model: Any,
    tokenizer: Any,
    ids: dict[str, list[int]],
    sampling: Sampling,
    progress: Progress | None,
) -> None:
    """Record the responses that are missing. Batches are always the same, as a batch's shape rounds its logits."""
    done = _lines(journal.lines, "response")
    items = [(name, index) for name in ids for index in range(sampling.responses)]
    for start in range(0, len(items), sampling.batch_size):
        batch = items[start : start + sampling.batch_size]
        if all(item in done for item in batch):
            continue
        responses = generation.respond(
            model,
            tokenizer,
            [ids[name] for name, _ in batch],
            items=[item_number(*item) for item in batch],
            seed=sampling.seed,
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
        )
        for (name, index), response in zip(batch, responses, strict=True):
            if (name, index) not in done:
                journal.append({"line": "response", "prompt": name, "index": index} | asdict(response))
        if progress:
            progress(start + len(batch), 2 * len(items))


# -- ratings


def _rate_all(
    journal: Journal,
    rater: Endpoint,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    concurrency: int,
    progress: Progress | None,
) -> None:
    """Record a rating for each response that has none, several at a time.

    Raises:
        ModelError: the judge refuses us, or leaves FAILURES_IN_A_ROW questions without an answer.
    """
    texts = {item: line["text"] for item, line in _lines(journal.lines, "response").items()}
    ratings = _lines(journal.lines, "rating")
    everything = [(each, index) for each in prompts for index in range(sampling.responses)]
    todo = [(p, i) for p, i in everything if ratings.get((p.id, i), {}).get("status") not in ("rated", "malformed")]
    stop, failures = threading.Event(), 0

    def work(prompt: Prompt, index: int) -> Line:
        if stop.is_set():
            raise CancelledError
        first = reference_first(sampling.seed, prompt.id, index)
        try:
            line = _rating_line(rater, prompt, index, texts[prompt.id, index], first, lambda s: _wait(stop, s))
            journal.append(line)
        except BaseException:  # a key that is refused, a full disk: no other thread need try
            stop.set()
            raise
        return line

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            waiting = [pool.submit(work, *item) for item in todo]
            for done, future in enumerate(as_completed(waiting), 2 * len(everything) - len(todo) + 1):
                failures = failures + 1 if future.result()["status"] == "failed" else 0
                if failures >= FAILURES_IN_A_ROW:
                    raise ModelError(_gave_up(future.result()["problem"], journal, failures))
                if progress:
                    progress(done, 2 * len(everything))
        except BaseException:  # Ctrl-C included: what was already asked is still recorded, then all threads end
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _gave_up(problem: str, journal: Journal, failures: int) -> str:
    kept = sum(line["status"] != "failed" for line in _lines(journal.lines, "rating").values())
    return (
        f"the judge left {failures} questions in a row without an answer: {problem}; {kept} ratings are kept in "
        f"{journal.path}: run the same command again when it answers"
    )


def _wait(stop: threading.Event, seconds: float) -> None:
    if stop.wait(seconds):
        raise CancelledError


def _rating_line(
    rater: Endpoint, prompt: Prompt, index: int, text: str, first: bool, sleep: Callable[[float], Any]
) -> Line:
    """Ask for one rating. "failed" is no verdict: the next run asks again; "malformed" is one, and final."""
    line = {"line": "rating", "prompt": prompt.id, "index": index, "reference_first": first}
    tag = f"{item_number(prompt.prompt, prompt.reference or '', text):016x}"[-8:]
    try:
        verdict = rate(rater, prompt, text, first=first, tag=tag, sleep=sleep)
    except Unanswered as error:
        return line | {"status": "failed", "problem": str(error)}
    line |= {"requests": verdict.requests, "reply": verdict.reply}
    if verdict.ratings is None:
        return line | {"status": "malformed", "problem": verdict.problem}
    return line | {"status": "rated", "reference": verdict.ratings[0], "response": verdict.ratings[1]}


# -- numbers


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """`score` of a record's lines, and counts of all that happened.

    Raises:
        ModelError: none of the ratings could be read.
    """
    responses, verdicts = _lines(lines, "response"), _lines(lines, "rating")
    by_status = {
        status: [line for line in verdicts.values() if line["status"] == status]
        for status in ("rated", "malformed", "failed")
    }
    counts = {
        "responses": len(responses),
        "empty_responses": sum(not line["text"] for line in responses.values()),
        "cut_off_responses": sum(not line["finished"] for line in responses.values()),
        **{status: len(of_status) for status, of_status in by_status.items()},
        "requests": sum(line.get("requests", 0) for line in lines if line.get("line") == "rating"),
    }
    if not by_status["rated"]:
        raise ModelError(_nothing_rated(list(verdicts.values())))
    fields = Rating.__dataclass_fields__
    ratings = [Rating(**{name: line[name] for name in fields}) for line in by_status["rated"]]
    return score(ratings) | {"counts": counts}


def _nothing_rated(verdicts: Sequence[Line]) -> str:
    last = verdicts[-1]
    again = "run the same command again when the judge answers"
    way_out = again if last["status"] == "failed" else "give another judge_model= and another out=FOLDER"
    return f"none of {len(verdicts)} ratings came about; of the last, {last['problem']}; {way_out}"
