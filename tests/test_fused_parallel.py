"""Two gloo processes: a head split by vocabulary gives the loss and gradients of the whole one; DDP averages them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_fused import H, N, V, example

import sparsekd as skd
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


def check_parallel(rank, residual, options):
    hidden, head, bias, targets, labels = example()
    settings = {"labels": labels, "residual": residual, "chunk_rows": 8, **options}
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


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for residual, options in itertools.product(RESIDUALS, OPTIONS):
        check_parallel(rank, residual, options)
    check_ddp(rank)
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Every residual and option: loss, dh, dW and db agree to 1e-10 in both processes, from head rows [0, 31), [31, V)."""
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)


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
