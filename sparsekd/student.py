"""Students that learn from a cache inside a stock training loop.

`attach_sparse_kd` teaches a model's own forward to take sparse targets and return the loss, so that whatever wraps
the model (Trainer, DDP, FSDP, PEFT, autocast) stays in charge. Shapes: B rows, L tokens, K kept ids.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekd.divergences import check_divergence, check_sparse_divergence, full_divergence, sparse_divergence
from sparsekd.errors import ModelError
from sparsekd.fused import fused_linear_sparse_kl
from sparsekd.heads import body_of, check_rebuilt, head_of, inner_model, replace_forward, router_loss
from sparsekd.losses import LossOptions, full_kl
from sparsekd.prefix_sets import PrefixSets
from sparsekd.residuals import hard_token_weights
from sparsekd.targets import SparseTargets


def attach_sparse_kd(
    model: Any,
    *,
    ce_weight: float = 0.0,
    residual: str = "none",
    hard_ratio: float = 1.0,
    divergence: str = "forward_kl",
    chunk_rows: int | None = None,
    sets: PrefixSets | None = None,
) -> Any:
    """Teach `model.forward` to take `kd_ids` and `kd_weights` and return the distillation loss; returns the model.

    With them, the loss equals `sparse_kl(logits[:, :-1], targets, labels=labels[:, 1:], ce_weight=...)`, computed by
    `fused_linear_sparse_kl` without the logits. Without them, forward is what it was (labels give the model's own
    cross-entropy, generation works). May be called before or after PEFT wraps the model.

    Args:
        ce_weight: α of α CE + (1-α) KD.
        residual: what becomes of the mass that the targets left out, a name of `residuals.RESIDUALS`.
        hard_ratio: loss factor of the harder half of a forward's tokens over that of the easier half, 1 on average
            (`residuals.hard_token_weights`; paper, section 5.3).
        divergence: "forward_kl", or "mse", which makes the logits ([tokens, V] exists).
        chunk_rows: of `fused_linear_sparse_kl`.
        sets: what ids beyond the vocabulary stand for in a transcoded cache; the loss is then `sparse_ce`'s.

    Raises:
        ValueError: a divergence that sparse targets cannot give, or beside it what only forward_kl has; an unknown
            residual.
        ModelError: prompt tuning, LoRA on the head, or a head that cannot be rebuilt from its weights.
    """
    check_sparse_divergence(divergence)
    _check_beside(divergence, ce_weight=ce_weight, residual=residual, hard_ratio=hard_ratio)
    LossOptions(ce_weight=ce_weight, residual=residual)
    if sets is not None and (residual, hard_ratio, divergence) != ("none", 1.0, "forward_kl"):
        raise ValueError("a cache with prefix sets takes residual=none, hard_ratio=1 and divergence=forward_kl only")
    _refuse_prompt_tuning(model)
    check_rebuilt(model)
    inner = inner_model(model)
    own_forward = inner.forward

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        kd_ids: Tensor | None = None,
        kd_weights: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if kd_ids is None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return own_forward(input_ids=input_ids, labels=labels, **kwargs)
        nonlocal sets
        assert kd_weights is not None
        output = body_of(self)(input_ids=input_ids, **({"use_cache": False} | kwargs))
        hidden, balance = output.last_hidden_state, router_loss(self, output)
        sets = None if sets is None else sets.to(hidden.device)  # and there they stay
        _check_positions(kd_ids, hidden)
        head, targets = head_of(self), SparseTargets(ids=kd_ids, weights=kd_weights)
        next_ids = None if labels is None else labels[:, 1:]
        if divergence != "forward_kl":
            logits = head.logits(hidden[:, :-1])
            mix = partial(sparse_divergence, logits, targets, divergence)
            return _output(mix(labels=next_ids, num_items_in_batch=num_items_in_batch) + balance)
        assert head.weight_VH is not None
        loss = fused_linear_sparse_kl(
            hidden[:, :-1],
            head.weight_VH,
            targets,
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            labels=next_ids,
            ce_weight=ce_weight,
            residual=residual,
            token_weights=_hard_weights(targets, next_ids, hard_ratio),
            num_items_in_batch=num_items_in_batch,
            chunk_rows=chunk_rows,
            sets=sets,
        )
        return _output(loss + balance)

    replace_forward(model, forward, targets=("kd_ids", "kd_weights"))
    return model


def _check_beside(divergence: str, **settings: Any) -> None:
    """Another divergence is all of the loss; what would be left out without a word is refused."""
    plain = {"ce_weight": 0.0, "residual": "none", "hard_ratio": 1.0}
    for name, value in settings.items():
        if divergence != "forward_kl" and value != plain[name]:
            raise ValueError(f"{name}={value} goes with divergence=forward_kl only, not with {divergence}")


def _hard_weights(targets: SparseTargets, labels: Tensor | None, ratio: float) -> Tensor | None:
    if ratio == 1 or labels is None:
        return None
    return hard_token_weights(targets, labels, ratio=ratio)


def attach_full_kd(model: Any, teacher: Any, *, ce_weight: float = 0.0, divergence: str = "forward_kl") -> Any:
    """The online baseline: in training, forward runs the teacher and returns `full_kl` to its whole distribution.

    With another `divergence` of `divergences.DIVERGENCES` (paper, section 6.3) it returns that one, without ce_weight.

    The teacher is held outside the student's modules: it is neither saved, wrapped nor trained. In eval mode forward
    is what it was.
    """
    check_divergence(divergence)
    _check_beside(divergence, ce_weight=ce_weight)
    inner = inner_model(model)
    own_forward = inner.forward
    held = [teacher.eval().requires_grad_(False)]

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not self.training or labels is None:
            return own_forward(input_ids=input_ids, labels=labels, **kwargs)
        with torch.no_grad():
            teacher_logits = held[0](input_ids=input_ids, use_cache=False).logits[:, :-1]
        output = own_forward(input_ids=input_ids, **({"use_cache": False} | kwargs))
        logits, balance = output.logits[:, :-1], router_loss(self, output)
        if divergence != "forward_kl":
            next_ids = labels[:, 1:]
            mix = partial(full_divergence, logits, teacher_logits, divergence)
            return _output(mix(labels=next_ids, num_items_in_batch=num_items_in_batch) + balance)
        loss = full_kl(
            logits,
            teacher_logits,
            labels=labels[:, 1:],
            ce_weight=ce_weight,
            num_items_in_batch=num_items_in_batch,
        )
        return _output(loss + balance)

    replace_forward(model, forward)
    return model


def student_trainer(**settings: Any) -> Any:
    """A `transformers.Trainer(**settings)` that counts tokens rightly where the stock one does not.

    - A step without any supervised token has loss 0 (stock: 0/0, which poisons the weights).
    - `evaluate` is the mean over all supervised tokens of the evaluation set (stock: a mean of batch means, which
      depends on the batch size where rows have unequal numbers of supervised tokens).
    """
    import transformers

    class StudentTrainer(transformers.Trainer):
        control: Any

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).clamp(min=1)
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)

        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            metrics = {f"{metric_key_prefix}_loss": _mean_loss(self, eval_dataset or self.eval_dataset)}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return StudentTrainer(**settings)


@torch.no_grad()
def _mean_loss(trainer: Any, rows: Any) -> float:
    """Σ cross-entropy / supervised tokens over `rows`, shared among the processes."""
    batch_size, rank = trainer.args.eval_batch_size, trainer.args.process_index
    device = trainer.args.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    trainer.model.eval()
    for start in range(0, len(rows), batch_size * trainer.args.world_size):
        first = start + rank * batch_size
        mine = range(first, min(first + batch_size, len(rows)))
        # A process without rows runs the first one for nothing: sharded models need everyone in every forward.
        batch = trainer.data_collator([rows[i] for i in mine or [0]])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        with trainer.compute_loss_context_manager():
            loss = trainer.model(**{k: batch[k].to(device) for k in ("input_ids", "labels")}).loss
        if mine and tokens:
            sums += torch.stack([loss.double() * tokens, torch.full_like(loss, tokens, dtype=torch.float64)])
    total, count = trainer.accelerator.reduce(sums, "sum").tolist()
    return total / count if count else float("nan")


def pace(*, evaluates: bool) -> Any:
    """A callback that times each step by itself (evaluation and checkpoints are not training speed), ends the run
    without a checkpoint, and stops when the loss is no number.

    The run's own end is no checkpoint: Trainer, resumed there in mid-epoch, would take one step too many.
    Losses are logged wherever a checkpoint is made, so that the log of a resumed run equals an uninterrupted one's.
    """
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.started: Any = None
            self.unread: Any = None

        def on_step_begin(self, args: Any, *_: Any, **__: Any) -> None:
            self.started = _now(args.device)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended = _now(args.device)
            self.read()
            self.unread = self.started, ended
            if state.global_step >= state.max_steps:
                control.should_save, control.should_log, control.should_evaluate = False, True, evaluates
            control.should_log = control.should_log or control.should_save

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.read()

        def read(self) -> None:
            """The time of the step before, while this one is under way: a GPU that is waited for has run dry."""
            if self.unread is not None:
                self.seconds.append(_seconds_between(*self.unread))
            self.unread = None

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if not math.isfinite(logs.get("loss", 0.0)):
                raise ModelError(
                    f"the loss is {logs['loss']} at step {state.global_step}: training has diverged; lower "
                    "learning_rate, lengthen warmup_ratio or lower max_grad_norm"
                )

    return Pace()


def _now(device: torch.device) -> Any:
    """Now, by the clock; on a GPU, which works behind the host, the moment when it comes to here."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _refuse_prompt_tuning(model: Any) -> None:
    for config in (getattr(model, "peft_config", None) or {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise ModelError(
                f"{config.peft_type} adds virtual tokens, which shift every position against the cache's targets; "
                "use LoRA or full training"
            )


def _check_positions(kd_ids: Tensor, hidden: Tensor) -> None:
    if kd_ids.shape[:2] != (hidden.shape[0], hidden.shape[1] - 1):
        raise ValueError(
            f"targets have positions {tuple(kd_ids.shape[:2])}, the batch needs "
            f"{(hidden.shape[0], hidden.shape[1] - 1)}: one for each token but the last of a row"
        )


def _output(loss: Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(loss=loss)
