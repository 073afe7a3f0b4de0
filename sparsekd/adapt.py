"""Adapt the teacher first: fine-tune it for a while on the rows that it will be captured on (paper, section 6.2).

A teacher that was trained on other text teaches this text less well; Sreenivas et al. (2024) and the paper's table
11 adapt it before the students come. The adapted teacher is another teacher: capture from it anew.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sparsekd import models, vocab
from sparsekd.errors import ModelError, RecipeError, SparseKDError
from sparsekd.files import write_atomically
from sparsekd.train import train


def adapt(
    *,
    out: str | Path,
    teacher: str,
    rows: str,
    eval_rows: str | None = None,
    seed: int = 0,
    epochs: float = 1.0,
    max_steps: int = -1,
    batch_size: int = 8,
    grad_accum: int = 1,
    learning_rate: float = 1e-5,
    schedule: str = "cosine",
    min_lr_ratio: float = 0.1,
    warmup_ratio: float = 0.04,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    dtype: str | None = None,
    device: str | None = None,
    gradient_checkpointing: bool = False,
    dataloader_workers: int = 0,
    log_steps: int = 10,
    eval_steps: int = 0,
    eval_limit: int | None = None,
    save_steps: int = 500,
    keep_checkpoints: int = 2,
    report_to: str | list[str] = "none",
    run_name: str | None = None,
    progress: bool = True,
    callbacks: list[Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune `teacher` by next-token cross-entropy on `rows` into the folder `out`: `train` with method "ce".

    `out` becomes a teacher for `capture`: weights in the original's dtype, the original's tokenizer, and `adapt.json`
    with the fingerprints of the weights before and after. Run the same call again to resume. (Training is done in
    float32; a 16-bit original is rounded back at the end, so a few steps at a low rate may be lost in rounding.)

    Args:
        out: folder of the adapted teacher.
        teacher: a folder or hub id.
        rows: packed rows, of the teacher's tokenizer; the train split is used.
        eval_rows: packed rows whose held-out split is evaluated.
        seed: of the order of rows.
        epochs: passes over the rows, unless `max_steps` is given.
        max_steps: optimizer steps of the whole run; -1 goes by `epochs`.
        batch_size: rows of one process's forward; a step takes batch_size x grad_accum x processes rows.
        grad_accum: forwards before each optimizer step.
        learning_rate: the highest one; low, because the teacher is to keep what it knows.
        schedule: "cosine" falls from `learning_rate` to `min_lr_ratio` of it, "constant" stays; both rise linearly
            from 0 over the first `warmup_ratio` of the steps.
        min_lr_ratio: of `learning_rate`, where "cosine" ends.
        warmup_ratio: share of the steps.
        weight_decay: AdamW's; biases and norms have none.
        max_grad_norm: gradients are scaled down to this 2-norm; 0 leaves them.
        dtype: of the arithmetic: "float32", or "bfloat16" for mixed precision. Training weights are float32 always.
        device: "cpu" or "cuda".
        gradient_checkpointing: compute activations twice instead of keeping them.
        dataloader_workers: processes that read rows ahead.
        log_steps: steps between logged losses.
        eval_steps: steps between evaluations; 0: only at the end.
        eval_limit: only the first rows of the held-out split.
        save_steps: steps between checkpoints.
        keep_checkpoints: how many of the newest are kept.
        report_to: "none", or trackers that transformers knows.
        run_name: for the trackers.
        progress: show a progress bar and the log.
        callbacks: further `transformers.TrainerCallback`s.

    Returns:
        what `train` returns, with "teacher" {id, weights, dtype} and "weights" of the adapted one.

    Raises:
        RecipeError: `out` is the teacher itself, or `teacher` is a name of a new model; and all that `train` refuses.
    """
    settings = {k: v for k, v in locals().items() if k != "teacher"}
    out = Path(out).expanduser()
    _check_paths(teacher, out)
    metrics = train(**settings, student=teacher, method="ce", tokenizer=_own_tokenizer(teacher))
    return metrics | _finish(teacher, out) if _is_first_process() else metrics


def _check_paths(teacher: str, out: Path) -> None:
    if teacher in models.FAMILY:
        raise RecipeError(
            f"teacher={teacher!r} names a new, untrained model; give a teacher's folder or hub id (./{teacher} for a "
            "folder of that name), or make one with `sparsekd train method=ce`"
        )
    if out.exists() and Path(teacher).expanduser().exists() and out.samefile(Path(teacher).expanduser()):
        raise RecipeError(f"out={out} is the teacher itself; give another out=FOLDER, the original is kept")


def _own_tokenizer(teacher: str) -> str | None:
    """The teacher, when it comes with a tokenizer: it is saved rather than the rows' copy, chat template and all."""
    try:
        vocab.load_tokenizer(teacher)
    except SparseKDError:
        return None
    return teacher


def _finish(teacher: str, out: Path) -> dict[str, Any]:
    """Weights back to the original's dtype, and adapt.json; the same when it is done twice, after an interruption."""
    if (out / "adapt.json").exists():
        return json.loads((out / "adapt.json").read_text())
    dtype = _dtype(teacher)
    original = models.describe(models.open_model(teacher, dtype=dtype, device="cpu"), teacher)
    adapted = models.open_model(str(out), dtype=dtype, device="cpu")
    if dtype != "float32":
        _save_again(adapted, out)
    facts: dict[str, Any] = {
        "teacher": {key: original[key] for key in ("id", "revision", "weights", "dtype")},
        "weights": models.weights_hash(adapted),
    }
    write_atomically(out / "adapt.json", (json.dumps(facts, indent=1) + "\n").encode())
    return facts


def _save_again(model: Any, out: Path) -> None:
    """Replace the weights of `out`, file by file, so that an interruption leaves a model that opens."""
    temporary = out / ".adapted.tmp"
    model.save_pretrained(str(temporary))
    written = sorted(temporary.iterdir(), key=lambda path: path.name.endswith(".json"))  # an index after its shards
    stale = {path.name for path in out.glob("model*.safetensors*")} - {path.name for path in written}
    for path in written:
        path.replace(out / path.name)
    for name in stale:
        (out / name).unlink()
    shutil.rmtree(temporary)


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _dtype(teacher: str) -> str:
    """The dtype that the checkpoint says it is stored in; float32 where it is silent or says something else."""
    from transformers import AutoConfig

    try:
        found = str(AutoConfig.from_pretrained(str(Path(teacher).expanduser())).dtype).removeprefix("torch.")
    except OSError as error:
        raise ModelError(f"cannot read the config of {teacher}: {error}; give a teacher's folder or hub id") from error
    return found if found in models.DTYPES else "float32"
