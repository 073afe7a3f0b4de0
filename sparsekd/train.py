"""Train a student from a cache, from rows, or under an online teacher, with transformers' Trainer."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from sparsekd import heads, models
from sparsekd.batches import CacheDataset, SparseKDCollator
from sparsekd.cache import CacheReader
from sparsekd.checks import make_folder
from sparsekd.cross_set import open_cross_heldout, open_cross_set, tokenizer_of
from sparsekd.cross_student import CROSS_METHODS, CrossCollator, attach_cross_kd
from sparsekd.errors import RecipeError
from sparsekd.files import write_json
from sparsekd.making import processes
from sparsekd.overlay import OverlaidRows
from sparsekd.prompted import PromptedRows
from sparsekd.student import attach_full_kd, attach_sparse_kd, pace, student_trainer
from sparsekd.training_run import (
    check_unchanged,
    finished,
    full_disk_said,
    last_checkpoint,
    mean_logged,
    readable_log,
    start,
)
from sparsekd.training_set import (
    TrainingSet,
    check_student,
    open_heldout,
    open_prefix_sets,
    open_teacher,
    open_tokenizer,
    open_training_set,
)
from sparsekd.training_settings import check_position_weights, check_settings, on_cpu


def train(
    *,
    out: str | Path,
    student: str | dict[str, Any],
    cache: str | None = None,
    rows: str | None = None,
    method: str = "cached",
    teacher: str | None = None,
    tokenizer: str | None = None,
    eval_rows: str | None = None,
    seed: int = 0,
    epochs: float = 1.0,
    max_steps: int = -1,
    batch_size: int = 8,
    grad_accum: int = 1,
    learning_rate: float = 4e-4,
    schedule: str = "cosine",
    min_lr_ratio: float = 0.1,
    warmup_ratio: float = 0.04,
    weight_decay: float = 0.0,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    max_grad_norm: float = 1.0,
    ce_weight: float = 0.0,
    residual: str = "none",
    hard_ratio: float = 1.0,
    divergence: str = "forward_kl",
    align: str = "bytes",
    kd_weight: float | None = None,
    max_length: int | None = None,
    normalize: bool | None = None,
    allow_misaligned: bool = False,
    allow_biased: bool = False,
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
    """Train (or go on training) a student into the folder `out`; returns what is also in `out/metrics.json`.

    Hyper-parameters default to the paper's (table 14). `out` ends up with the student, its tokenizer, `recipe.json`
    and `metrics.json`; run the same call again to resume at exactly the next row after the last checkpoint.

    Args:
        out: the folder that takes the student and its checkpoints; the same call on it goes on.
        student: a new one of a size (tiny, mini, small, 10m, 30m, 100m, 300m, 1b, 3b, or a dict of sizes), or a
            checkpoint (path or hub id); for "uld" and "alm" also an encoder-decoder, which learns the answers of
            instruction rows.
        cache: the training set: rows and targets.
        rows: plain packed rows instead, for "ce" and "full_kd".
        method: "cached" learns what the cache holds, "ce" the next token, "full_kd" an online `teacher`; "uld" and
            "alm" learn from a teacher of another vocabulary: a cache of sampler=sorted_curve, read with the student's
            own `tokenizer`, and the loss is CE + kd_weight · method.
        teacher: of "full_kd": a folder or hub id.
        tokenizer: the student's, when its checkpoint brings none (default: the cache's own).
        eval_rows: packed rows whose held-out split is evaluated: mean cross-entropy over its supervised tokens.
        seed: of the student's initial weights and of the order of rows.
        epochs: passes over the rows, unless `max_steps` is given; the rows that do not fill a last step are left out,
            other ones in each epoch.
        max_steps: optimizer steps of the whole run; -1 goes by `epochs`.
        batch_size: rows of one process's forward; a step takes batch_size x grad_accum x processes rows.
        grad_accum: forwards before each optimizer step.
        learning_rate: the highest one.
        schedule: "cosine" falls from `learning_rate` to `min_lr_ratio` of it, "constant" stays; both rise linearly
            from 0 over the first `warmup_ratio` of the steps.
        min_lr_ratio: of `learning_rate`, where "cosine" ends.
        warmup_ratio: share of the steps.
        weight_decay: AdamW's; biases and norms have none.
        adam_betas: AdamW's two decay rates.
        max_grad_norm: gradients are scaled down to this 2-norm; 0 leaves them.
        ce_weight: α of α CE + (1-α) KD (paper, section 5.3).
        residual: for "cached": what becomes of the teacher's mass that the cache left out: none, renormalize, smooth,
            ghost or label (paper, sections 2 and 3).
        hard_ratio: for "cached": learning rate of the harder half of a batch's tokens over the easier half's (5.3).
        divergence: forward_kl, reverse_kl, forward_reverse_kl, l1 or mse (6.3); a cache can give forward_kl and mse.
        align: for "uld": positions face each other where both models have read the same bytes, or by "index", as
            published.
        kd_weight: for "uld" (default 1.5, as published) and "alm" (default 1): factor of their loss beside CE;
            0 is text only. ULD above 1 can hold a student that starts from scratch at wrong tokens (see docs/guide.md).
        max_length: for "uld" and "alm": student tokens of a row; default: twice the teacher's. Others are cut off.
        normalize: for a cache of importance draws: self-normalised (true) or plain unbiased weights (false); default:
            as captured.
        allow_misaligned: train on what `sparsekd misalign` made, whose targets belong to other contexts.
        allow_biased: for "uld": take a cache of counts, whose sorted draws are far too steep, for its curves.
        dtype: "float32", or "bfloat16" for mixed precision (weights stay float32).
        device: "cpu" or "cuda" (one per process; choose among several by CUDA_VISIBLE_DEVICES).
        gradient_checkpointing: compute activations twice instead of keeping them.
        dataloader_workers: processes that read rows ahead; none for a cache on a local disk, which a thread reads.
        log_steps: steps between logged losses.
        eval_steps: steps between evaluations; 0: only at the end.
        eval_limit: only the first rows of the held-out split.
        save_steps: steps between checkpoints: what an interruption loses at most.
        keep_checkpoints: how many of the newest are kept.
        report_to: "none", or trackers that transformers knows ("tensorboard", "wandb", ...).
        run_name: for the trackers.
        progress: show a progress bar and the log.
        callbacks: further `transformers.TrainerCallback`s.

    Raises:
        MismatchError, RecipeError, CacheError, ModelError, SourceError: before the first step.
        ModelError: the loss is no number any more.
        StorageError: the disk is full; the last whole checkpoint is kept.
    """
    recipe = {k: v for k, v in locals().items() if k not in ("callbacks", "progress")}
    out = Path(out).expanduser()
    recipe = json.loads(json.dumps(recipe | {"out": out, "processes": processes()}, default=str))
    check_settings(recipe)
    if (metrics := finished(out, recipe)) is not None:
        return metrics
    data = _open_data(recipe)
    try:
        check_unchanged(out, data.identity)
        return _run(out, recipe, data, progress, callbacks or [])
    finally:
        data.close()


def _open_data(recipe: dict[str, Any]) -> TrainingSet:
    if recipe["method"] in CROSS_METHODS:
        where = [recipe[key] for key in ("cache", "tokenizer", "student", "max_length")]
        return open_cross_set(*where, allow_biased=recipe["allow_biased"])
    asked = {key: recipe[key] for key in ("normalize", "allow_misaligned")}
    data = open_training_set(recipe["method"], recipe["cache"], recipe["rows"], **asked)
    if isinstance(data.rows, CacheReader):
        check_position_weights(recipe, data.rows.spec.codec)
    return data


def _run(out: Path, recipe: dict[str, Any], data: TrainingSet, progress: bool, callbacks: list[Any]) -> dict[str, Any]:
    """Everything that can be refused, then the steps, then what the folder ends up with."""
    cross = recipe["method"] in CROSS_METHODS
    steps, rows_per_step = _plan(len(data.rows), recipe)
    teacher = None
    if recipe["method"] == "full_kd":
        place = "cpu" if on_cpu(recipe) else models.default_device()
        teacher, data = open_teacher(recipe["teacher"], data, dtype=recipe["dtype"] or "float32", device=place)
    heldout = (open_cross_heldout if cross else open_heldout)(recipe["eval_rows"], data)
    model = _open_student(recipe["student"], data, recipe["seed"], under_teacher=teacher is not None)
    if teacher is not None:
        models.cut_padding(teacher, model, data.tokenizer["vocab_size"], "teacher and student")
    tokenizer = open_tokenizer(
        tokenizer_of(recipe["tokenizer"], recipe["student"]) if cross else recipe["tokenizer"], data
    )
    make_folder(out)
    if recipe["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _attach_loss(model, recipe, data, teacher)
    trainer = student_trainer(
        model=model,
        args=_arguments(recipe, steps, progress),
        train_dataset=CacheDataset(data.rows, seed=recipe["seed"], multiple_of=rows_per_step),
        eval_dataset=None if heldout is None else CacheDataset(heldout, shuffle=False, limit=recipe["eval_limit"]),
        data_collator=_collator(recipe["method"], data, heads.logit_width(model)),
        callbacks=[clock := pace(evaluates=heldout is not None), *callbacks],
    )
    if not progress:
        _silence(trainer)
    if trainer.is_world_process_zero():
        start(out, recipe, data.identity)
    with full_disk_said(out):
        trainer.train(resume_from_checkpoint=last_checkpoint(out))
        return _finish(trainer, out, recipe, rows_per_step, clock.seconds, data, tokenizer)


def _attach_loss(model: Any, recipe: dict[str, Any], data: TrainingSet, teacher: Any) -> None:
    """The model's own forward returns the method's loss; "ce" is what it returns already."""
    if recipe["method"] == "cached":
        asked = {key: recipe[key] for key in ("ce_weight", "residual", "hard_ratio", "divergence")}
        attach_sparse_kd(model, **asked, sets=open_prefix_sets(data))
    elif teacher is not None:
        attach_full_kd(model, teacher, ce_weight=recipe["ce_weight"], divergence=recipe["divergence"])
    elif isinstance(data.rows, OverlaidRows):
        asked = {key: recipe[key] for key in ("align", "kd_weight")}
        attach_cross_kd(model, recipe["method"], edges=data.rows.edges, **asked)


def _collator(method: str, data: TrainingSet, width: int) -> Any:
    if method in CROSS_METHODS:
        return CrossCollator()
    return SparseKDCollator(with_targets=method == "cached", vocab_size=width if width <= data.id_max else None)


def _open_student(student: Any, data: TrainingSet, seed: int, *, under_teacher: bool) -> Any:
    """The student; a new one's weights hang on the seed alone."""
    import transformers

    transformers.set_seed(seed)
    if isinstance(data.rows, PromptedRows):
        model = models.open_answering_model(student, device="cpu").train()
    else:
        model = models.new_student(student, vocab_size=data.logit_width, seq_len=data.seq_len)
    check_student(model, student, data, under_teacher=under_teacher)
    return model


def _silence(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _arguments(recipe: dict[str, Any], steps: int, progress: bool) -> Any:
    import transformers

    cosine = recipe["schedule"] == "cosine"
    # Named only when wanted: its name is about to change.
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = transformers.TrainingArguments(
        output_dir=recipe["out"],
        seed=recipe["seed"],
        max_steps=steps,
        per_device_train_batch_size=recipe["batch_size"],
        per_device_eval_batch_size=recipe["batch_size"],
        gradient_accumulation_steps=recipe["grad_accum"],
        learning_rate=recipe["learning_rate"],
        weight_decay=recipe["weight_decay"],
        adam_beta1=recipe["adam_betas"][0],
        adam_beta2=recipe["adam_betas"][1],
        max_grad_norm=recipe["max_grad_norm"],
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": recipe["min_lr_ratio"]} if cosine else None,
        warmup_steps=math.ceil(recipe["warmup_ratio"] * steps),
        bf16=recipe["dtype"] == "bfloat16",
        use_cpu=on_cpu(recipe),
        logging_steps=recipe["log_steps"],
        # A loss that is no number must show: Trainer would log the mean of the losses before it.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe["eval_rows"] and recipe["eval_steps"] else "no",
        eval_steps=recipe["eval_steps"] or None,
        save_steps=recipe["save_steps"],
        save_total_limit=recipe["keep_checkpoints"],
        # The dataset itself is shuffled, statelessly by (seed, epoch): resuming needs one integer.
        train_sampling_strategy="sequential",
        dataloader_num_workers=recipe["dataloader_workers"],
        dataloader_pin_memory=not on_cpu(recipe),
        # Else handing over a batch waits for the whole step before it, and the GPU for the host's next one.
        accelerator_config={"non_blocking": not on_cpu(recipe)},
        remove_unused_columns=False,
        report_to=recipe["report_to"],
        run_name=recipe["run_name"],
        disable_tqdm=not progress,
        log_level="error",
        **(checkpointing if recipe["gradient_checkpointing"] else {}),
    )
    if arguments.n_gpu > 1:
        # Else Trainer wraps the model in torch's DataParallel, whose copies call the first one's forward.
        arguments._n_gpu = 1
    return arguments


def _plan(rows: int, recipe: dict[str, Any]) -> tuple[int, int]:
    """(optimizer steps of the whole run, rows of one step)."""
    per_step = recipe["batch_size"] * recipe["grad_accum"] * recipe["processes"]
    if rows < per_step:
        raise RecipeError(
            f"one step takes {per_step} rows (batch_size x grad_accum x processes), the training set has {rows}; "
            "lower batch_size or grad_accum"
        )
    if recipe["max_steps"] > 0:
        return recipe["max_steps"], per_step
    return max(1, int(recipe["epochs"] * (rows // per_step))), per_step


def _finish(
    trainer: Any,
    out: Path,
    recipe: dict[str, Any],
    rows_per_step: int,
    seconds: list[float],
    data: TrainingSet,
    tokenizer: Any,
) -> dict[str, Any]:
    """Save the student, its tokenizer and the metrics; metrics.json is written last: it marks the run as complete."""
    log, steps = readable_log(trainer.state.log_history), trainer.state.global_step
    tokens_per_step = rows_per_step * data.seq_len
    metrics = {
        "method": recipe["method"],
        "seed": recipe["seed"],
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "seconds": sum(seconds),  # of the steps since the last resume
        # By the median step: a busy machine's stalls say nothing about the method.
        "tokens_per_second": tokens_per_step / statistics.median(seconds) if seconds else None,
        "train_loss": mean_logged(log),
        "fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer,
        "log": log,
    }
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        if tokenizer is not None:
            tokenizer.save_pretrained(str(out))
        write_json(out / "metrics.json", metrics)
    return metrics
