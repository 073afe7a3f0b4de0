"""A teacher in parts: each process of a torchrun holds a share of its body and of its head's rows, all draw together.

transformers splits the body by the model's own plan. The head is split here, in the order in which draws pass over the
ids. All processes pass the same rows and get the same targets (`sampling_parallel.py`: no logits travel, but for sorted
curves), the first one writes them. With one process everything here is what it would be without.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd import heads, models
from sparsekd.errors import ModelError, RecipeError
from sparsekd.fused_parallel import VocabularyShard
from sparsekd.inversion import BLOCK
from sparsekd.making import processes
from sparsekd.samplers import SAMPLERS
from sparsekd.sampling_parallel import check_split

Value = TypeVar("Value")


def check_parts(size: int, sampler: str) -> None:
    """RecipeError where a teacher in `size` parts cannot be had, or cannot be drawn from so."""
    if size == 1:
        return
    if processes() != size:
        raise RecipeError(
            f"tensor_parallel_size={size} takes {size} processes, here are {processes()}; start them with torchrun "
            f"--nproc_per_node {size} -m sparsekd capture ...; to use more, start it again with another shard_range"
        )
    if sampler in SAMPLERS:  # a sketch has all logits brought together
        check_split(sampler)


def open_teacher_model(path: str, size: int, *, dtype: str, device: str) -> Any:
    """`models.open_model(path, dtype=dtype, device=device)`, in `size` parts over as many processes.

    Raises:
        ModelError: a model that transformers has no plan for, or whose attention heads `size` does not divide.
        RecipeError: a device that transformers does not split over here.
    """
    if size == 1:
        return models.open_model(path, dtype=dtype, device=device)
    from transformers.distributed import DistributedConfig

    model = models.open_model(path, dtype=dtype, device=device, distributed_config=DistributedConfig(tp_size=size))
    name, config = type(model).__name__, model.config.get_text_config()
    for each in ("num_attention_heads", "num_key_value_heads"):
        if (getattr(config, each, None) or size) % size:
            raise ModelError(f"{name} has {each}={getattr(config, each)}, no multiple of tensor_parallel_size={size}")
    # transformers 5.17 opens it whole in every process, 5.23 refuses it.
    if not any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ModelError(
            f"transformers has no tensor-parallel plan for {name}; without tensor_parallel_size, torchrun's processes "
            "hold a whole teacher each and share the shards out"
        )
    return model


def own_rows(head: heads.Head, order_V: Tensor | None, size: int) -> tuple[heads.Head, VocabularyShard | None]:
    """Of a whole head, what this process draws from: `Head.in_order(order)` with its share of the ids' rows alone.

    Shares end at whole blocks of `inversion.BLOCK` ids, as whole heads are drawn from, but for the last.
    """
    if size == 1:
        return (head if order_V is None else head.in_order(order_V)), None
    if head.weight_VH is None:
        raise ModelError("this teacher's head cannot be read, so it cannot be split; leave tensor_parallel_size out")
    vocab_size, rank = len(head.weight_VH), dist.get_rank()
    ends = [part * vocab_size // size // BLOCK * BLOCK for part in range(size)] + [vocab_size]
    order_V = torch.arange(vocab_size, device=head.weight_VH.device) if order_V is None else order_V
    shard = VocabularyShard(start=ends[rank], vocab_size=vocab_size)
    return head.in_order(order_V[ends[rank] : ends[rank + 1]]), shard


def is_first(size: int) -> bool:
    """Whether this process writes."""
    return size == 1 or dist.get_rank() == 0


def of_first(value: Value, size: int) -> Value:
    """The first process's value, in all of them; waits for it."""
    if size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]
