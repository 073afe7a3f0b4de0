"""Two gloo processes: a head split by vocabulary gives the loss and gradients of the whole one; DDP averages them.

So does FSDP2, with the head in the root's group or in one of its own."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_fused import H, N, V, example, example_sets
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sparsekd as skd
from sparsekd import models
from sparsekd.fused_parallel import VocabularyShard
from sparsekd.residuals import RESIDUALS
from sparsekd.row_losses import Rows
from sparsekd.targets import SparseTargets

CUT = 31  # the first process's rows of the head; the shares differ
OPTIONS = [
    {},
    {"ce_weight": 0.2, "z_loss": 0.01},
    {"ce_weight": 0.2, "z_loss": 0.01, "temperature": 2.0},
    {"softcap": 4.0, "scale": 1.7, "temperature": 0.5},
]


def own(rank, tensor):
    return (tensor[:CUT] if rank == 0 else tensor[CUT:]).detach().clone().requires_grad_()


def check_parallel(rank, residual, options, sets=None):
    hidden, head, bias, targets, labels = example()
    settings = {"labels": labels, "residual": residual, "chunk_rows": 8, **options}
    if sets is not None:
        settings["sets"], targets = sets
    whole = skd.fused_linear_sparse_kl(hidden, head, targets, bias=bias, **settings)
    want = [whole.detach(), *torch.autograd.grad(3 * whole, [hidden, head, bias])]
    head_own, bias_own = own(rank, head), own(rank, bias)
    shard = VocabularyShard(start=0 if rank == 0 else CUT, vocab_size=V)
    loss = skd.fused_linear_sparse_kl(hidden, head_own, targets, bias=bias_own, shard=shard, **settings)
    got = [loss.detach(), *torch.autograd.grad(3 * loss, [hidden, head_own, bias_own])]
    for ours, theirs in zip(got, [*want[:2], own(rank, want[2]), own(rank, want[3])], strict=True):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-10, rtol=0)


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(H, H), torch.nn.Linear(H, V, bias=False)

    def forward(self, hidden, targets, **options):
        return skd.fused_linear_sparse_kl(self.body(hidden), self.head.weight, targets, **options)


def check_ddp(rank):
    hidden, _, _, targets, labels = example(torch.float32)
    kept, half = int((labels != -100).sum()), slice(rank, None, 2)
    alone, wrapped = Student(), torch.nn.parallel.DistributedDataParallel(Student())
    alone(hidden.detach(), targets, labels=labels, num_items_in_batch=kept).backward()
    part = wrapped(hidden[half].detach(), targets[half], labels=labels[half], num_items_in_batch=kept)
    (2 * part).backward()  # DDP takes the mean over processes
    for one, two in zip(alone.parameters(), wrapped.module.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-6, rtol=1e-5)


def tiny_student(tied):
    torch.manual_seed(0)
    shape = {"family": "tiny", "tie_word_embeddings": tied}
    return skd.attach_sparse_kd(models.new_student(shape, vocab_size=V, seq_len=16).train(), ce_weight=0.1)


def tiny_batch(rows=slice(None)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (4, 12), generator=generator)
    labels = ids.clone()
    labels[:, 0] = labels[1, 5:] = -100  # the processes' halves have unequal numbers of positions that count
    batch = {
        "input_ids": ids,
        "labels": labels,
        "kd_ids": torch.randint(V, (4, 11, 5), generator=generator),
        "kd_weights": torch.rand(4, 11, 5, generator=generator),
    }
    return {name: each[rows] for name, each in batch.items()}


def check_fsdp(rank, tied, head_apart):
    mesh, items = init_device_mesh("cpu", (2,)), 37
    alone, sharded = tiny_student(tied), tiny_student(tied)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    if head_apart:
        fully_shard(sharded.lm_head, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for _ in range(2):  # the second step adds to the first's gradients
        whole = alone(**tiny_batch(), num_items_in_batch=items).loss
        whole.backward()
        part = sharded(**tiny_batch(slice(2 * rank, 2 * rank + 2)), num_items_in_batch=items).loss
        (2 * part).backward()  # FSDP takes the mean over processes
    both = part.detach().clone()
    dist.all_reduce(both)
    torch.testing.assert_close(both, whole.detach())
    assert isinstance(sharded.lm_head.weight, DTensor)
    for (name, one), two in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        assert one.grad.any(), name
        torch.testing.assert_close(two.grad.full_tensor(), one.grad, atol=1e-6, rtol=1e-5)
    if head_apart:
        head, into, hidden = sharded.lm_head.weight, torch.zeros(V, 64), torch.ones(N, 64)
        with pytest.raises(ValueError, match="accumulate_into takes a plain head"):
            skd.fused_linear_sparse_kl(hidden, head, example()[3], accumulate_into=into)


def process_fsdp(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for tied, head_apart in ((True, False), (False, False), (False, True)):
        check_fsdp(rank, tied, head_apart)
    dist.destroy_process_group()


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for residual, options in itertools.product(RESIDUALS, OPTIONS):
        check_parallel(rank, residual, options)
    sets, targets = example_sets()
    apart = (sets.order[sets.first] < CUT) != (sets.order[sets.last - 1] < CUT)
    assert apart.any()  # sets with tokens in both processes
    for options in OPTIONS:
        check_parallel(rank, "none", options, (sets, targets))
    check_ddp(rank)
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Every residual and option, and sets: loss, dh, dW, db agree to 1e-10 in both, head rows [0, 31), [31, V)."""
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)


def test_fsdp_trains_like_one_process(tmp_path):
    """FSDP2 with a tied head, an untied one, and one that is a group of its own, hence a DTensor in the loss."""
    mp.spawn(process_fsdp, args=(str(tmp_path),), nprocs=2)


def test_rows_outside_the_vocabulary_are_refused():
    hidden, head, _, targets, _ = example()
    with pytest.raises(ValueError, match=r"own rows \[80, 163\) lie outside the vocabulary \[0, 83\)"):
        skd.fused_linear_sparse_kl(hidden, head, targets, shard=VocabularyShard(start=80, vocab_size=V))


def test_no_entry_is_counted_twice():
    """Two shards' entries add up to the whole's, whatever ids there are."""
    ids, sparse = torch.randint(V, (N, 5)), torch.rand(N, 5)
    rows = Rows(ids=ids, sparse=sparse, mass=sparse.sum(-1), constant=sparse.sum(-1))
    parts = [VocabularyShard(start=start, vocab_size=V).own(rows, n) for start, n in ((0, CUT), (CUT, V - CUT))]
    dense = [
        SparseTargets(ids=part.ids, weights=part.sparse).densify(n)
        for part, n in zip(parts, (CUT, V - CUT), strict=True)
    ]
    torch.testing.assert_close(torch.cat(dense, -1), SparseTargets(ids=ids, weights=sparse).densify(V))
