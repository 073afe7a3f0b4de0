"""Speculative decoding: how many tokens a student drafts for its teacher, expected and in real generation.

A drafted token x of the student's q is kept with probability min(1, p(x) / q(x)) under the teacher's p (Leviathan
et al. 2023), so a draft at a position is kept with probability Σ min(p, q). Everything here is at temperature 1.
Shapes: P positions of one text, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekd import heads, metrics, models
from sparsekd.checks import check_at_least, check_seed, make_folder
from sparsekd.drafts import drafting, expected_acceptance, expected_calls
from sparsekd.errors import MismatchError, ModelError, RecipeError, SourceError
from sparsekd.files import write_atomically
from sparsekd.metrics import Estimate
from sparsekd.packed import RowsReader

# Draft lengths of the curve in speculate.json, beside the one that was measured.
CURVE = (1, 2, 3, 4, 5, 6, 8, 12, 16)
CHUNK_POSITIONS = 256  # whose logits exist at a time
_WARM_UP_TOKENS = 4


# --- the program -----------------------------------------------------------------------------------------


def speculate(
    *,
    teacher: str,
    student: str,
    rows: str | Path,
    split: str = "heldout",
    draft_length: int = 4,
    prompts: int = 8,
    prompt_tokens: int | None = None,
    new_tokens: int = 64,
    seed: int = 0,
    dtype: str = "float32",
    device: str | None = None,
    out: str | Path | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Let `student` draft for `teacher`: expected and measured acceptance, and the speed; also `out/speculate.json`.

    The teacher goes on with beginnings of held-out rows, sampling at temperature 1, alone and with the student's
    drafts in turn, so that a busy machine slows both. Nothing stops at an end-of-text token: rows do not either.

    Args:
        teacher, student: folders or hub ids of models of one vocabulary.
        rows: packed rows of their tokenizer.
        split: of the rows; the first `prompts` of them are used.
        draft_length: tokens that the student drafts before each teacher call, always.
        prompts: how many rows are continued (fewer where the split has fewer).
        prompt_tokens: of each row (default: half the row).
        new_tokens: generated after each prompt.
        seed: of the sampling.
        dtype: of both models: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:N", for both.
        out: folder for speculate.json (default: the student's, when it is a folder).
        progress: called with (prompts done, prompts in all).

    Returns:
        acceptance: Σ min(p, q) of a token of the held-out rows, {mean, standard_error};
        expected: accepted, tokens_per_call and standard_error, by "independent" (the formula of that mean), "heldout"
            (probabilities along the rows) and "teacher_text" (exact, along what the teacher wrote alone);
        measured: the same of assisted generation, with its acceptance (accepted / examined drafts), its calls and
            `expected_calls`, what the text that came out should have taken: their difference is chance alone;
        speed: tokens per second of teacher, student and both together, and `speedup` over the teacher alone
            {mean, standard_error}; `expected_speedup` from tokens_per_call and the student's cost (Leviathan et al.);
        curve: tokens per call by draft length, "independent" and "heldout".

    Raises:
        MismatchError: models or rows that do not fit together.
        ModelError: a model that transformers cannot assist, or be assisted by.
        RecipeError, SourceError: a setting out of range, no rows.
    """
    check_at_least(1, draft_length=draft_length, prompts=prompts, prompt_tokens=prompt_tokens)
    check_at_least(2, new_tokens=new_tokens)
    check_seed(seed)
    reader = RowsReader(rows, split)
    starts = _prompts(reader, prompts, prompt_tokens)
    writer, drafter = _open_pair(teacher, student, reader, dtype, device)
    for model, whose in ((writer, "teacher"), (drafter, "student")):
        _check_context(model, whose, reader.seq_len, len(starts[0]), new_tokens)
    heldout = _along_rows(writer, drafter, reader, len(starts))
    runs = _generate_all(writer, drafter, starts, draft_length, new_tokens, seed, progress)
    kept = {
        kind: [_acceptance(writer, drafter, each.text)[1][-new_tokens:] for each in runs[kind]]
        for kind in ("alone", "assisted")
    }
    result = _result(runs, heldout, kept, draft_length)
    result |= {
        "settings": {
            "teacher": teacher,
            "student": student,
            "draft_length": draft_length,
            "prompts": len(starts),
            "prompt_tokens": len(starts[0]),
            "new_tokens": new_tokens,
            "seed": seed,
            "dtype": dtype,
            "device": str(next(writer.parameters()).device),
        }
    }
    target = Path(out) if out else Path(student) if Path(student).is_dir() else None
    if target is not None:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_atomically(make_folder(target) / "speculate.json", text.encode())
    return result


def _prompts(reader: RowsReader, prompts: int, prompt_tokens: int | None) -> list[Tensor]:
    if not len(reader):
        raise SourceError(f"{reader.path} has no rows in split {reader.split!r}; pack with heldout above 0")
    length = prompt_tokens or max(1, reader.seq_len // 2)
    if length > reader.seq_len:
        raise RecipeError(f"prompt_tokens={length} is more than a row has ({reader.seq_len}); give at most that")
    batch = reader.batch(range(min(prompts, len(reader))))
    return list(torch.from_numpy(batch.input_ids[:, :length].astype(np.int64)))


def _open_pair(teacher: str, student: str, reader: RowsReader, dtype: str, device: str | None) -> tuple[Any, Any]:
    size, way_out, opened = (
        reader.manifest["tokenizer"]["vocab_size"],
        "speculate on rows packed with its tokenizer",
        [],
    )
    for path, whose in ((teacher, "teacher"), (student, "student")):
        model = models.open_model(path, dtype=dtype, device=device)
        heads.check_rebuilt(model)
        models.check_own_tokenizer(path, reader.tokenizer_hash, whose, way_out)
        models.check_width(model, size, f"{whose} {path}", way_out)
        opened.append(model)
    models.cut_padding(opened[0], opened[1], size, "teacher and student")
    return opened[0], opened[1]


def _check_context(model: Any, whose: str, seq_len: int, prompt_tokens: int, new_tokens: int) -> None:
    models.check_context(model, seq_len, whose)
    context = getattr(heads.inner_model(model).config.get_text_config(), "max_position_embeddings", None)
    if context and prompt_tokens + new_tokens > context:
        raise MismatchError(
            f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} are beyond the {whose}'s context of {context} "
            f"tokens; give new_tokens={max(context - prompt_tokens, 0)} or fewer"
        )


# --- acceptance along a text -------------------------------------------------------------------------------


def _along_rows(teacher: Any, student: Any, reader: RowsReader, count: int) -> list[Tensor]:
    """Σ min(p, q) at the supervised positions of each row that has some."""
    found = []
    for index in range(count):
        row = reader[index]
        acceptance_P, _ = _acceptance(teacher, student, torch.from_numpy(row.input_ids.astype(np.int64)))
        found.append(acceptance_P[torch.from_numpy(row.supervised[1:])])
    if not any(len(row) for row in found):
        raise SourceError(f"the first {count} rows of {reader.path} have no supervised token; raise prompts")
    return [row for row in found if len(row)]


@torch.no_grad()
def _acceptance(teacher: Any, student: Any, ids_L: Tensor) -> tuple[Tensor, Tensor]:
    """Σ min(p, q) and min(1, q(x) / p(x)) for the tokens 1 .. L-1 of a text, float64 [L-1] on the CPU."""
    ids = ids_L.to(next(teacher.parameters()).device)
    hidden = [heads.body_of(m)(input_ids=ids[None], use_cache=False).last_hidden_state[0] for m in (teacher, student)]
    sums, kept = [], []
    for start in range(0, len(ids) - 1, CHUNK_POSITIONS):
        part = slice(start, min(start + CHUNK_POSITIONS, len(ids) - 1))
        labels_C = ids[1:][part]
        p_CV, q_CV = (heads.head_of(m).logits(h[part]) for m, h in zip((teacher, student), hidden, strict=True))
        sums.append(metrics.speculative_acceptance(p_CV, q_CV).double().cpu())
        gap_C = metrics.token_losses(p_CV, labels_C).double() - metrics.token_losses(q_CV, labels_C).double()
        kept.append(gap_C.clamp(max=0).exp().cpu())
    return torch.cat(sums), torch.cat(kept)


# --- generation ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Generated:
    """A prompt with its continuation, the tokens that each call of the model added, and the time it took."""

    text: Tensor
    blocks: list[int]
    seconds: float


class _BlockSizes:
    """A streamer: transformers hands it the prompt, then what each teacher call added to the text."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, value: Tensor) -> None:
        self.sizes.append(value.numel())

    def end(self) -> None:
        pass


def _generate_all(
    teacher: Any,
    student: Any,
    prompts: list[Tensor],
    draft_length: int,
    new_tokens: int,
    seed: int,
    progress: Callable[[int, int], Any] | None,
) -> dict[str, list[_Generated]]:
    """Each prompt continued by the teacher alone, with drafts, and by the student alone, in turn."""
    _set_generation(teacher, draft_length)
    _set_generation(student, draft_length)
    kinds = {"alone": (teacher, None), "assisted": (teacher, student), "student": (student, None)}
    runs: dict[str, list[_Generated]] = {kind: [] for kind in kinds}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for model, assistant in kinds.values():  # the first call of a model allocates and compiles
            _generate(model, assistant, prompts[0], min(new_tokens, _WARM_UP_TOKENS))
        for done, prompt in enumerate(prompts, 1):
            for kind, (model, assistant) in kinds.items():
                runs[kind].append(_generate(model, assistant, prompt, new_tokens))
            if progress:
                progress(done, len(prompts))
    return runs


def _set_generation(model: Any, draft_length: int) -> None:
    """Plain sampling at temperature 1, drafts of one length, no end: also where the model's own defaults differ.

    transformers reads the drafts' settings from the assistant, fills in top_k = 50 where a config is silent, and by
    default ends a draft early when the assistant is unsure, which would be another acceptance rate.
    """
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_assistant_tokens=draft_length,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )


def _generate(model: Any, assistant: Any, prompt: Tensor, new_tokens: int) -> _Generated:
    ids = prompt[None].to(next(model.parameters()).device)
    streamer = _BlockSizes()
    more = {} if assistant is None else {"assistant_model": assistant}
    begin = _clock(ids)
    try:
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=streamer, **more
        )
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"transformers cannot generate with {type(model).__name__} and drafts of {type(assistant).__name__}: "
            f"{str(error).strip().splitlines()[0].rstrip('.')}; take models that keep an ordinary key-value cache"
        ) from error
    return _Generated(text=text[0].cpu(), blocks=streamer.sizes[1:], seconds=_clock(ids) - begin)


def _clock(where: Tensor) -> float:
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
    return time.perf_counter()


# --- results ---------------------------------------------------------------------------------------------


def _result(
    runs: dict[str, list[_Generated]], heldout: list[Tensor], kept: dict[str, list[Tensor]], draft_length: int
) -> dict[str, Any]:
    rate = metrics.ratio_of_sums([float(row.sum()) for row in heldout], [len(row) for row in heldout])
    lengths = sorted({*CURVE, draft_length})
    measured = _measured([each.blocks for each in runs["assisted"]], kept["assisted"], draft_length)
    return {
        "acceptance": _plain(rate),
        "expected": {
            "independent": asdict(expected_acceptance(rate.mean, draft_length)),
            "heldout": asdict(expected_acceptance(heldout, draft_length)),
            "teacher_text": asdict(expected_acceptance(kept["alone"], draft_length)),
        },
        "measured": measured,
        "speed": _speed(runs, measured["tokens_per_call"], draft_length),
        "curve": [
            {
                "draft_length": length,
                "independent": expected_acceptance(rate.mean, length).tokens_per_call,
                "heldout": expected_acceptance(heldout, length).tokens_per_call,
            }
            for length in lengths
        ],
    }


def _measured(blocks: list[list[int]], kept: list[Tensor], draft_length: int) -> dict[str, Any]:
    """Counts of real drafts: a call that adds b tokens accepted b - 1 drafts and refused the next, if there was one."""
    tokens, calls = [sum(sizes) for sizes in blocks], [len(sizes) for sizes in blocks]
    accepted = [total - count for total, count in zip(tokens, calls, strict=True)]
    examined = [got + _refused(sizes, draft_length) for got, sizes in zip(accepted, blocks, strict=True)]
    expected = [expected_calls(text, draft_length) for text in kept]
    excess = metrics.mean_and_standard_error([real - mean for real, mean in zip(calls, expected, strict=True)])
    return asdict(drafting(metrics.ratio_of_sums(tokens, calls))) | {
        "acceptance": _plain(metrics.ratio_of_sums(accepted, examined)),
        "tokens": sum(tokens),
        "calls": sum(calls),
        "expected_calls": math.fsum(expected),
        "excess_calls": _plain(excess),  # of one prompt
    }


def _refused(sizes: list[int], draft_length: int) -> int:
    left, refused = sum(sizes), 0
    for size in sizes:
        refused += size - 1 < min(draft_length, left - 1)
        left -= size
    return refused


def _speed(runs: dict[str, list[_Generated]], tokens_per_call: float, draft_length: int) -> dict[str, Any]:
    tokens = {kind: sum(sum(each.blocks) for each in run) for kind, run in runs.items()}
    seconds = {kind: math.fsum(each.seconds for each in run) for kind, run in runs.items()}
    cost = seconds["student"] / tokens["student"] / (seconds["alone"] / tokens["alone"])
    speedup = metrics.ratio_of_sums(
        [each.seconds for each in runs["alone"]], [each.seconds for each in runs["assisted"]]
    )
    return {
        "teacher_tokens_per_second": tokens["alone"] / seconds["alone"],
        "student_tokens_per_second": tokens["student"] / seconds["student"],
        "assisted_tokens_per_second": tokens["assisted"] / seconds["assisted"],
        "speedup": _plain(speedup),
        "student_cost": cost,
        "expected_speedup": tokens_per_call / (draft_length * cost + 1),
    }


def _plain(value: Estimate) -> dict[str, float | None]:
    error = value.standard_error
    return {"mean": value.mean, "standard_error": error if math.isfinite(error) else None}
