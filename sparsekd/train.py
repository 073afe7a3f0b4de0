"""Train a student from a cache, from rows, or under an online teacher: stock `transformers.Trainer` throughout."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sparsekd import models, vocab
from sparsekd.cache import CacheReader, check_alignment
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.models import check_own_tokenizer
from sparsekd.packed import RowsReader
from sparsekd.student import CacheDataset, SparseKDCollator, attach_full_kd, attach_sparse_kd

METHODS = ("ce", "cached", "full_kd")
SCHEDULES = ("cosine", "constant")
# Settings that may change between the parts of one run.
_FREE = {
    "out",
    "log_steps",
    "save_steps",
    "keep_checkpoints",
    "report_to",
    "run_name",
    "dataloader_workers",
    "eval_limit",
}


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
        student: a name of `models.FAMILY`, a dict of sizes, or a checkpoint (path or hub id).
        cache: the training set (rows and targets); `rows`: plain rows, for "ce" and "full_kd" without a cache.
        method: "cached" learns what the cache holds, "ce" the next token, "full_kd" an online `teacher`.
        tokenizer: the student's, when its checkpoint brings none (default: the cache's own).
        eval_rows: packed rows whose held-out split (its first `eval_limit` rows) is evaluated every `eval_steps`.
        seed: of the student's initial weights and of the order of rows.
        ce_weight: α of α CE + (1-α) KD (paper, section 5.3).
        dtype: "float32", or "bfloat16" for mixed precision.

    Raises:
        MismatchError, RecipeError, CacheError, ModelError, SourceError: before the first step.
    """
    recipe = {k: v for k, v in locals().items() if k not in ("callbacks", "progress")}
    recipe = json.loads(json.dumps(recipe, default=str))
    out = Path(out)
    if (finished := _finished(out, recipe)) is not None:
        return finished
    if schedule not in SCHEDULES:
        raise RecipeError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    data, facts = _open_data(method, cache, rows)
    try:
        import transformers

        transformers.set_seed(seed)
        model = models.new_student(student, vocab_size=facts["logit_width"], seq_len=facts["seq_len"])
        text_tokenizer = _fit(model, student, tokenizer, data, facts)
        held_out = _open_eval(eval_rows, facts)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if method == "cached":
            attach_sparse_kd(model, ce_weight=ce_weight)
        elif method == "full_kd":
            attach_full_kd(model, _open_teacher(teacher, facts, dtype, device), ce_weight=ce_weight)
        steps = _total_steps(len(data), batch_size * grad_accum * _world(), epochs, max_steps)
        arguments = transformers.TrainingArguments(
            output_dir=str(out),
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=grad_accum,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adam_beta1=adam_betas[0],
            adam_beta2=adam_betas[1],
            max_grad_norm=max_grad_norm,
            lr_scheduler_type="cosine_with_min_lr" if schedule == "cosine" else "constant_with_warmup",
            lr_scheduler_kwargs={"min_lr_rate": min_lr_ratio} if schedule == "cosine" else None,
            warmup_steps=math.ceil(warmup_ratio * steps),
            bf16=dtype == "bfloat16",
            use_cpu=(device or models.default_device()) == "cpu",
            logging_steps=log_steps,
            eval_strategy="steps" if held_out is not None and eval_steps else "no",
            eval_steps=eval_steps or None,
            prediction_loss_only=True,
            save_steps=save_steps,
            save_total_limit=keep_checkpoints,
            # The dataset itself is shuffled, statelessly by (seed, epoch): resuming needs one integer.
            train_sampling_strategy="sequential",
            dataloader_num_workers=dataloader_workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            dataloader_drop_last=True,
            remove_unused_columns=False,
            report_to=report_to,
            run_name=run_name,
            disable_tqdm=not progress,
            log_level="error",
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=CacheDataset(data, seed=seed),
            eval_dataset=None if held_out is None else CacheDataset(held_out, shuffle=False, limit=eval_limit),
            data_collator=SparseKDCollator(with_targets=method == "cached"),
            callbacks=[clock := _step_clock(), *(callbacks or [])],
        )
        if not progress:
            trainer.remove_callback(transformers.PrinterCallback)
        if trainer.is_world_process_zero():
            _write_json(out / "recipe.json", recipe)
        result = trainer.train(resume_from_checkpoint=_last_checkpoint(out))
        return _finish(trainer, result, out, method, seed, clock.seconds, facts, text_tokenizer)
    finally:
        if isinstance(data, CacheReader):
            data.close()


# --- what it trains on, and refusals --------------------------------------------------------------------


def _open_data(method: str, cache: str | None, rows: str | None) -> tuple[Any, dict[str, Any]]:
    """The training rows and what must fit to them."""
    if method not in METHODS:
        raise RecipeError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if (cache is None) == (rows is None):
        raise RecipeError("give cache=FOLDER, or rows=FOLDER for method=ce or full_kd (one of them, not both)")
    if cache is None:
        if method == "cached":
            raise RecipeError("method=cached needs cache=FOLDER; rows=FOLDER alone has no targets")
        reader = RowsReader(str(rows))
        manifest = reader.manifest["tokenizer"]
        facts = {"seq_len": reader.seq_len, "logit_width": manifest["vocab_size"], "id_max": manifest["vocab_size"] - 1}
        return reader, facts | {"tokenizer": manifest, "fingerprint": reader.fingerprint, "home": Path(str(rows))}
    opened = CacheReader(cache)
    check_alignment(opened)
    spec = opened.spec
    facts = {"seq_len": spec.seq_len, "logit_width": spec.logit_width, "id_max": opened.stats["id_max"]}
    facts |= {"tokenizer": spec.tokenizer, "fingerprint": spec.data.get("fingerprint"), "teacher": spec.teacher}
    return opened, facts | {"home": Path(cache)}


def _fit(model: Any, student: Any, tokenizer: str | None, data: Any, facts: dict[str, Any]) -> Any:
    """Refuse a student that cannot read these rows; returns the tokenizer to save beside it."""
    models.check_context(model, facts["seq_len"], "student")
    size = max(facts["tokenizer"]["vocab_size"], facts["id_max"] + 1)
    if models.logit_width(model) < size:
        raise MismatchError(
            f"vocabulary differs: the training set has ids up to {size - 1}, the student makes "
            f"{models.logit_width(model)} logits; take a student of the same tokenizer"
        )
    wanted = facts["tokenizer"]["hash"]
    if isinstance(student, str) and student not in models.FAMILY:
        check_own_tokenizer(student, wanted, "student", "take a student of the same tokenizer")
    if tokenizer is not None:
        check_own_tokenizer(tokenizer, wanted, "tokenizer", "give the one that the rows were packed with")
        return vocab.load_tokenizer(tokenizer)
    folder = facts["home"] / "tokenizer"
    return vocab.load_tokenizer(folder) if folder.is_dir() else None


def _open_eval(eval_rows: str | None, facts: dict[str, Any]) -> RowsReader | None:
    if eval_rows is None:
        return None
    held_out = RowsReader(eval_rows, "heldout")
    check_same_rows(held_out, facts["tokenizer"]["hash"], facts["seq_len"])
    trained_on = held_out.manifest["splits"].get("train", {}).get("fingerprint")
    if trained_on != facts["fingerprint"]:
        raise MismatchError(
            f"rows differ: the training set was made from rows {str(facts['fingerprint'])[:12]}, {eval_rows} holds "
            f"{str(trained_on)[:12]}; evaluate on the rows that were captured, or capture these"
        )
    return held_out


def check_same_rows(rows: RowsReader, tokenizer_hash: str, seq_len: int) -> None:
    """Refuse rows of another tokenizer or length than the training set's."""
    if rows.tokenizer_hash != tokenizer_hash:
        raise MismatchError(
            f"tokenizer differs: the training set was made with {tokenizer_hash[:12]}, {rows.path} with "
            f"{rows.tokenizer_hash[:12]}; pack both with one tokenizer"
        )
    if rows.seq_len != seq_len:
        raise MismatchError(
            f"packing differs: the training set has seq_len={seq_len}, {rows.path} has {rows.seq_len}; "
            f"re-pack with seq_len={seq_len}"
        )


def _open_teacher(teacher: str | None, facts: dict[str, Any], dtype: str | None, device: str | None) -> Any:
    if teacher is None:
        raise RecipeError("method=full_kd runs the teacher online: give teacher=MODEL")
    model = models.open_model(teacher, dtype=dtype or "float32", device=device)
    check_own_tokenizer(teacher, facts["tokenizer"]["hash"], "teacher", "pack the rows with the teacher's tokenizer")
    models.check_context(model, facts["seq_len"], "teacher")
    if models.logit_width(model) != facts["logit_width"]:
        raise MismatchError(
            f"vocabulary differs: the training set has {facts['logit_width']} logits, teacher {teacher} makes "
            f"{models.logit_width(model)}; give the teacher of the cache"
        )
    return model


# --- the run --------------------------------------------------------------------------------------------


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _total_steps(rows: int, rows_per_step: int, epochs: float, max_steps: int) -> int:
    if rows < rows_per_step:
        raise RecipeError(
            f"one step takes {rows_per_step} rows (batch_size x grad_accum x processes), the training set has {rows}; "
            "lower batch_size or grad_accum"
        )
    return max_steps if max_steps > 0 else max(1, int(epochs * (rows // rows_per_step)))


def _last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that was written whole (its trainer state comes last)."""
    found = [p for p in out.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None


def _finished(out: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of a run that is complete; refuse a folder that belongs to another recipe."""
    if not (out / "recipe.json").exists():
        if out.exists() and any(out.iterdir()):
            raise MismatchError(f"{out} is not empty and holds no training run; give another out=FOLDER")
        return None
    old = json.loads((out / "recipe.json").read_text())
    for key in sorted((old.keys() | recipe.keys()) - _FREE):
        if old.get(key) != recipe.get(key):
            raise MismatchError(
                f"{out} holds a run with {key}={old.get(key)!r}, this one has {recipe.get(key)!r}; give another "
                "out=FOLDER, or the same settings to resume"
            )
    done = out / "metrics.json"
    return json.loads(done.read_text()) if done.exists() else None


def _step_clock() -> Any:
    """A callback that times every optimizer step by itself: evaluation and checkpoints are not training speed."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    return StepClock()


def _finish(
    trainer: Any,
    result: Any,
    out: Path,
    method: str,
    seed: int,
    seconds: list[float],
    facts: dict[str, Any],
    tokenizer: Any,
) -> dict[str, Any]:
    """Save the student, its tokenizer and the metrics; metrics.json is written last: it marks the run as complete."""
    state = trainer.state
    per_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * _world()
    tokens_per_step = per_step * facts["seq_len"]
    metrics = {
        "method": method,
        "seed": seed,
        "steps": state.global_step,
        "tokens": state.global_step * tokens_per_step,
        "seconds": sum(seconds),
        # By the median step: a busy machine's stalls say nothing about the method.
        "tokens_per_second": tokens_per_step / statistics.median(seconds) if seconds else None,
        "train_loss": result.training_loss,
        "fingerprint": facts["fingerprint"],
        "tokenizer": facts["tokenizer"],
        "log": [{k: v for k, v in entry.items() if not k.endswith("_per_second")} for entry in state.log_history],
    }
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        if tokenizer is not None:
            tokenizer.save_pretrained(str(out))
        _write_json(out / "metrics.json", metrics)
    return metrics


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
