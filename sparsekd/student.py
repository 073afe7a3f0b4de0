"""Students that learn from a cache inside a stock training loop.

`attach_sparse_kd` teaches a model's own forward to take sparse targets and return the loss, so that whatever wraps
the model (Trainer, DDP, FSDP, PEFT, autocast) stays in charge. Shapes: B rows, L tokens, K kept ids.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekd.cache import CacheReader
from sparsekd.divergences import check_divergence, check_sparse_divergence, full_divergence, sparse_divergence
from sparsekd.errors import MismatchError, ModelError
from sparsekd.files import is_url
from sparsekd.fused import fused_linear_sparse_kl
from sparsekd.heads import body_of, check_rebuilt, head_of, inner_model, replace_forward, router_loss
from sparsekd.losses import LossOptions, full_kl
from sparsekd.order import permute, permute_near
from sparsekd.padded import pad_rows
from sparsekd.prefix_sets import PrefixSets
from sparsekd.read_ahead import ReadAhead
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
        ValueError: a divergence that sparse targets cannot give, an unknown residual.
        ModelError: prompt tuning, LoRA on the head, or a head that cannot be rebuilt from its weights.
    """
    check_sparse_divergence(divergence)
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


def _hard_weights(targets: SparseTargets, labels: Tensor | None, ratio: float) -> Tensor | None:
    if ratio == 1 or labels is None:
        return None
    return hard_token_weights(targets, labels, ratio=ratio)


def attach_full_kd(model: Any, teacher: Any, *, ce_weight: float = 0.0, divergence: str = "forward_kl") -> Any:
    """The online baseline: in training, forward runs the teacher and returns `full_kl` to its whole distribution.

    With another `divergence` of `divergences.DIVERGENCES` (paper, section 6.3) it returns that one.

    The teacher is held outside the student's modules: it is neither saved, wrapped nor trained. In eval mode forward
    is what it was.
    """
    check_divergence(divergence)
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


# Measured (docs/LOG.md): 770 µs to read 16 rows of 128 tokens, 2,300 to send them and 1,100 to receive them.
_WORKERS = (
    "a cache on a local disk is read by worker processes: it costs several times as much to bring a batch from one "
    "process to another as to read it; with num_workers=0 (Trainer: dataloader_num_workers=0) a thread reads ahead"
)


class CacheDataset(torch.utils.data.Dataset):
    """A cache (or rows) as a map-style dataset in a stateless shuffled order.

    Item i of an epoch is row `permute(i, len, seed, epoch)`: the order hangs on (seed, epoch) alone, so the state of a
    run is one integer. Use it with a sequential sampler; `set_epoch` is called by Trainer and accelerate, in a loop of
    your own by you (worker processes that stay hear of it too). `rows` may be a cache's path. `limit` keeps the first
    rows only. `multiple_of` (the rows of one optimizer step) ends each epoch with a whole step: the rows left
    over are others in every epoch, and an epoch has as many steps for any split of a step into batches and processes.

    A data loader without worker processes finds the next batch read already (`read_ahead`): give it none (a local cache
    warns of them; for a remote one, whose reading is waiting, and for rows that take work they are right). Once a
    SparseKDCollator has asked for a batch, the next ones are made for it there, codec `split`'s rows decoded together.
    """

    def __init__(
        self,
        rows: CacheReader | Any | str | Path,
        *,
        seed: int = 0,
        shuffle: bool = True,
        limit: int | None = None,
        multiple_of: int = 1,
    ) -> None:
        self.rows = CacheReader(rows) if isinstance(rows, str | Path) else rows
        self.seed = seed
        self.shuffle = shuffle
        self.size = len(self.rows) if limit is None else min(limit, len(self.rows))
        self.multiple_of = multiple_of
        # Shared memory: else persistent workers would read the first epoch's order for ever.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.collator: SparseKDCollator | None = None  # that asked for a batch, last
        self._read_ahead = ReadAhead()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __repr__(self) -> str:
        order = f"seed={self.seed}, epoch={self.epoch}" if self.shuffle else "in order"
        return f"CacheDataset({len(self):,} rows, {order}, of {self.rows!r})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def __len__(self) -> int:
        return self.size - self.size % self.multiple_of

    def row_number(self, index: int) -> int:
        """Which row of the cache item `index` of this epoch is."""
        return int(permute(index, self.size, self.seed, self.epoch)) if self.shuffle else index

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.row_number(index)]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]:
        """The items of a batch, as torch's data loader asks for them."""
        if (worker := torch.utils.data.get_worker_info()) is not None:
            if worker.id == 0 and isinstance(self.rows, CacheReader) and not is_url(self.rows.path):
                warnings.warn(_WORKERS, stacklevel=2)
            return self._items(self.epoch, indices)
        return self._read_ahead(partial(self._items, self.epoch), indices, size=len(self), epoch=self.epoch)

    def _items(self, epoch: int, indices: Sequence[int]) -> RowBatch:
        numbers = permute_near(indices, self.size, self.seed, epoch) if self.shuffle else list(indices)
        return RowBatch(self, numbers)


class RowBatch(Sequence[Any]):
    """The rows of a batch: read, or already the tensors that the dataset's collator will ask for; a row that is looked
    at beside those is read again. Pickled, it is the list of its rows."""

    def __init__(self, dataset: CacheDataset, numbers: Sequence[int]) -> None:
        self.dataset, self.numbers, self.collator = dataset, numbers, dataset.collator
        self._rows: list[Any] | None = None
        if isinstance(dataset.rows, CacheReader):
            dataset.rows.fetch(numbers)
        if self.collator is None:
            self._rows = [dataset.rows[number] for number in numbers]
        else:
            self._made = self.collator.of_numbers(dataset.rows, numbers)

    def collated(self, collator: SparseKDCollator) -> dict[str, Tensor]:
        """`collator(list(self))`; the dataset's next batches are made for this collator."""
        self.dataset.collator = collator
        alike = type(collator) is SparseKDCollator and collator == self.collator  # a subclass may have more to it
        return self._made if alike or collator is self.collator else collator.of_rows(list(self))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[each] for each in range(len(self))[at]]
        return self.dataset.rows[self.numbers[at]] if self._rows is None else self._rows[at]

    def __reduce__(self) -> Any:
        return list, (list(self),)


# The share of a batch's weight that may be drawn for ids that are no tokens: a teacher hardly believes in its padding.
_MOST_PADDING = 0.01


@dataclass(frozen=True, kw_only=True)
class SparseKDCollator:
    """Rows -> a batch of `input_ids`, `labels` (-100 where unsupervised), and for cached rows `kd_ids`, `kd_weights`.

    The first token of a row follows nothing, so it is never a label: `num_items_in_batch` is then the same whether
    Trainer knows that the model shifts labels or not.

    `with_targets=False` leaves the targets out (plain training on a cache's rows). `vocab_size`, the student's number
    of logits, leaves out the draws of ids from it on, which the padding of a wider teacher's head had.
    """

    with_targets: bool = True
    vocab_size: int | None = None

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Tensors [B, L], [B, L] and twice [B, L-1, K]; targets are padded with weight 0 to the batch's largest K."""
        return rows.collated(self) if isinstance(rows, RowBatch) else self.of_rows(rows)

    def of_numbers(self, rows: CacheReader | Any, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The batch of rows by number, read together where the cache has a way."""
        together = rows.padded(numbers) if isinstance(rows, CacheReader) and self.with_targets else None
        if together is None:
            return self.of_rows([rows[number] for number in numbers])
        return _inputs(together.input_ids, together.supervised) | self._targets(together.ids, together.weights)

    def of_rows(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of rows read one by one."""
        supervised = np.stack([row.supervised for row in rows])
        batch = _inputs(np.stack([row.input_ids for row in rows]), supervised)
        if not self.with_targets or not hasattr(rows[0], "flat"):
            return batch
        if rows[0].flat.curve is not None:
            raise MismatchError(
                "these targets are sorted curves, which say nothing about ids: train with method=uld or alm, or "
                "capture with a sampler"
            )
        return batch | self._targets(*pad_rows([row.flat for row in rows], supervised[:, 1:]))

    def _targets(self, ids: NDArray[Any], weights: NDArray[Any]) -> dict[str, Tensor]:
        if self.vocab_size is not None:
            ids, weights = _without_padding(ids, weights, self.vocab_size)
        return {"kd_ids": torch.from_numpy(ids), "kd_weights": torch.from_numpy(weights)}


def _inputs(input_ids_BL: NDArray[Any], supervised_BL: NDArray[Any]) -> dict[str, Tensor]:
    ids = input_ids_BL.astype(np.int64)
    labels = np.where(supervised_BL, ids, -100)
    labels[:, 0] = -100
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _without_padding(ids: NDArray[Any], weights: NDArray[Any], vocab_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    beyond = ids >= vocab_size
    lost, whole = weights[beyond].sum(), weights.sum()
    if lost > _MOST_PADDING * whole:
        raise MismatchError(
            f"{lost / whole:.1%} of a batch's weight is on ids from {vocab_size} on, which the student lacks; take a "
            "student of the same tokenizer"
        )
    return np.where(beyond, 0, ids), np.where(beyond, 0, weights)


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
