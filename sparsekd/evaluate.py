"""Judge a model on held-out rows: loss, calibration, and how well it drafts for the teacher.

Shapes: B rows, L tokens, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekd import heads, metrics, models
from sparsekd.checks import check_at_least, make_folder
from sparsekd.errors import RecipeError, SourceError
from sparsekd.files import write_atomically
from sparsekd.packed import RowsReader
from sparsekd.samplers import sample

# Logits exist for this many float32 bytes at a time, for the model and for the teacher.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


def evaluate(
    *,
    model: str,
    rows: str | Path,
    split: str = "heldout",
    teacher: str | None = None,
    out: str | Path | None = None,
    batch_size: int = 8,
    limit_rows: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Measure `model` on a split of packed rows; also written to `out/evaluation.json` (default: the model's folder).

    Only supervised tokens count. Means come with their standard error over rows (None when there is one row).

    Args:
        model: a folder that save_pretrained or `sparsekd train` wrote, or a hub id.
        rows: what `sparsekd pack` wrote with the model's tokenizer.
        split: of the rows; its first `limit_rows` are used.
        teacher: compare with this model of the same tokenizer.
        out: the folder that takes evaluation.json; default: the model's.
        batch_size: rows of a forward pass; changes no result beyond rounding.
        limit_rows: only the first rows of the split.
        dtype: float32, bfloat16 or float16, of the model and the teacher.
        device: "cpu", "cuda" or "cuda:N"; default: the accelerator where there is one.
        progress: called with (rows done, rows in all).

    Returns:
        loss (nats per token), perplexity, bits_per_byte (at the whole split's tokens per byte), ece and reliability
        (15 bins, Guo et al. 2017), accuracy;
        with a teacher also, over the ids that both have, acceptance (Σ min(p, q), the expected speculative acceptance
        of a drafted token), agreement (same top token) and teacher_kl (nats, KL(teacher || model)).

    Raises:
        MismatchError: a model or teacher that does not fit the rows.
        SourceError: no rows, or none with a supervised token, in the split.
        RecipeError: a size below 1.
    """
    reader = _open_rows(rows, split, batch_size=batch_size, limit_rows=limit_rows)
    student = _open(model, reader, dtype, device, "model")
    other = None if teacher is None else _open(teacher, reader, dtype, device, "teacher")
    width = heads.logit_width(student)
    if other is not None:
        tokens = reader.manifest["tokenizer"]["vocab_size"]
        width = models.shared_width((width, heads.logit_width(other)), tokens, "model and teacher")
    count = min(len(reader), limit_rows or len(reader))
    tally, bins = metrics.Tally(), metrics.CalibrationBins()
    for start in range(0, count, batch_size):
        batch = reader.batch(range(start, min(start + batch_size, count)))
        for logits_CV, teacher_CV, labels_C, rows_C in _chunks(student, other, batch):
            confidence, correct = metrics.top1(logits_CV, labels_C)
            bins.add(confidence, correct)
            values = {"loss": metrics.token_losses(logits_CV, labels_C), "accuracy": correct.double()}
            if teacher_CV is not None:
                values |= _against_teacher(teacher_CV[:, :width], logits_CV[:, :width])
            tally.add(rows_C, **values)
        if progress:
            progress(min(start + batch_size, count), count)
    if not tally.tokens:
        raise SourceError(f"the first {count} rows of {rows} have no supervised token; raise limit_rows")
    result = _plain(_result(tally, bins, reader.manifest["splits"][split]))
    target = Path(out) if out else Path(model) if Path(model).is_dir() else None
    if target is not None:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_atomically(make_folder(target) / "evaluation.json", text.encode())
    return result


def unique_ids(
    *,
    teacher: str,
    rows: str | Path,
    split: str = "heldout",
    rounds: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500),
    limit_rows: int = 16,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Mean number of distinct ids against rounds of random sampling, and the power law through it (paper, figure 5).

    Args:
        limit_rows: how many rows are looked at.
        seed: of the draws, and of the rows: seed s takes the s-th `limit_rows` rows, round and round.

    Returns:
        rounds, unique (mean distinct ids for each), positions, and power_law: unique ≈ prefactor * rounds^exponent,
        by least squares on the logarithms.

    Raises:
        as `evaluate`.
    """
    if len(set(rounds)) < 2 or min(rounds) < 1:
        raise RecipeError(f"rounds={rounds}: a curve needs two different numbers of rounds, each at least 1")
    reader = _open_rows(rows, split, limit_rows=limit_rows)
    model = _open(teacher, reader, "float32", device, "teacher")
    count = min(limit_rows, len(reader))
    batch = reader.batch((seed * count + np.arange(count)) % len(reader))
    sums, positions = np.zeros(len(rounds)), 0
    for logits_CV, _, _, rows_C in _chunks(model, None, batch):
        # Each position draws by itself: the keys count positions on from chunk to chunk.
        keys = torch.arange(positions, positions + len(logits_CV), device=logits_CV.device)
        for index, draws in enumerate(rounds):
            drawn = sample(logits_CV, "random_sampling", rounds=draws, seed=seed, rows=rows_C, positions=keys)
            sums[index] += float((drawn.weights > 0).sum())
        positions += len(logits_CV)
    if not positions:
        raise SourceError(f"the {count} rows of {rows} looked at have no supervised token; raise limit_rows")
    mean = sums / positions
    exponent, offset = np.polyfit(np.log(rounds), np.log(mean), 1)
    fit = {"exponent": float(exponent), "prefactor": float(np.exp(offset))}
    return {"rounds": list(rounds), "unique": mean.tolist(), "positions": positions, "power_law": fit}


def _open_rows(rows: str | Path, split: str, **sizes: int | None) -> RowsReader:
    check_at_least(1, **sizes)
    reader = RowsReader(rows, split)
    if not len(reader):
        raise SourceError(f"{rows} has no rows in split {split!r}; pack with heldout above 0, or name another split")
    return reader


def _open(path: str, reader: RowsReader, dtype: str, device: str | None, whose: str) -> Any:
    model = models.open_model(path, dtype=dtype, device=device)
    heads.check_rebuilt(model)
    models.check_context(model, reader.seq_len, whose)
    models.check_own_tokenizer(path, reader.tokenizer_hash, whose, "evaluate on rows packed with its tokenizer")
    size, way_out = reader.manifest["tokenizer"]["vocab_size"], "evaluate on rows packed with its tokenizer"
    models.check_width(model, size, f"{whose} {path}", way_out)
    return model


@torch.no_grad()
def _chunks(model: Any, teacher: Any, batch: Any) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """(logits, teacher logits, labels, row numbers) of the supervised positions, a chunk at a time."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(batch.input_ids.astype(np.int64)).to(device)
    rows, positions = (torch.from_numpy(each).to(device) for each in batch.supervised[:, 1:].nonzero())
    labels = ids[rows, positions + 1]
    numbers = torch.from_numpy(np.asarray(batch.indices)).to(device)[rows]
    own = _hidden(model, ids)[rows, positions]
    other = own if teacher is None else _hidden(teacher, ids)[rows, positions]
    step = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * heads.logit_width(model)))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        logits_CV = heads.head_of(model).logits(own[part])
        teacher_CV = None if teacher is None else heads.head_of(teacher).logits(other[part])
        yield logits_CV, teacher_CV, labels[part], numbers[part]


def _hidden(model: Any, ids: Tensor) -> Tensor:
    return heads.body_of(model)(input_ids=ids, use_cache=False).last_hidden_state


def _against_teacher(teacher_CV: Tensor, logits_CV: Tensor) -> dict[str, Tensor]:
    log_t, log_p = teacher_CV.float().log_softmax(-1), logits_CV.float().log_softmax(-1)
    return {
        "acceptance": metrics.speculative_acceptance(teacher_CV, logits_CV),
        "agreement": metrics.top1_agreement(teacher_CV, logits_CV).double(),
        "teacher_kl": (log_t.exp() * (log_t - log_p)).sum(-1),
    }


def _result(tally: metrics.Tally, bins: metrics.CalibrationBins, split: dict[str, Any]) -> dict[str, Any]:
    loss, calibration = tally.estimate("loss"), bins.result()
    text_bytes = split.get("supervised_bytes") or split["bytes"]
    result: dict[str, Any] = {
        name: {"mean": value.mean, "standard_error": value.standard_error} for name, value in tally.estimates().items()
    }
    return result | {
        "perplexity": metrics.perplexity(loss.mean),
        "bits_per_byte": metrics.bits_per_byte(loss.mean, tokens=split["supervised"], text_bytes=text_bytes),
        "ece": calibration.ece,
        "reliability": [
            {"count": b.count, "confidence": b.confidence, "accuracy": b.accuracy} for b in calibration.reliability
        ],
        "tokens": tally.tokens,
        "rows": tally.rows,
    }


def _plain(value: Any) -> Any:
    """The same with None for the numbers that JSON does not know (one row has no standard error)."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
