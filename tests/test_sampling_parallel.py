"""Three gloo processes, and two of them as a group: a head split by vocabulary is sampled as the whole one is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd as skd
from sparsekd import sampling_parallel
from sparsekd.errors import MismatchError, ModelError, RecipeError
from sparsekd.fused_parallel import VocabularyShard
from sparsekd.inversion import ids_in, tilted_masses
from sparsekd.rng import Keys
from sparsekd.samplers import sample_importance

GRID = (torch.arange(2**18, dtype=torch.float64) + 0.5) / 2**18
N = 200
# Who ends where, in the order of ids: unequal, no multiple of a block of 32, one below a block; with two processes the
# later rank holds the earlier ids.
CUTS = {3: (5, 1043), 2: (1043,)}
V = 2500
DRAWS = [
    ("random_sampling", {"rounds": 50}),
    ("random_sampling", {"rounds": 12, "temperature": 0.8}),
    ("random_sampling", {"rounds": 12, "temperature": 0.0, "normalize": False}),
    ("systematic", {"rounds": 50}),
    ("systematic", {"rounds": 1}),
    ("systematic", {"rounds": 25, "temperature": 1.3}),
]


class World:
    """A process's place among `size`: its group and its ids."""

    def __init__(self, group, size):
        self.group, self.size, self.rank = group, size, dist.get_rank(group)
        place = self.rank if size == 3 else size - 1 - self.rank
        edges = [0, *CUTS[size], V]
        self.own = slice(edges[place], edges[place + 1])

    def shard(self, **changes):
        return VocabularyShard(**{"group": self.group, "start": self.own.start, "vocab_size": V} | changes)


def logits_like(dtype, scale=2.0):
    logits = (scale * torch.randn(N, V, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[:, 1::3] = -torch.inf
    logits[:20, :1043] = -torch.inf  # a process whose ids are all impossible
    logits[20:40, 5:] = -torch.inf
    logits[20:30, 5] = -200.0  # one whose mass is 0 in float64's neighbourhood, yet not impossible
    return logits


def near_an_end(logits, points, ids, others, temperature):
    """Where a point lies within 1e-6 of the end of the lower id's interval, by float64."""
    p = logits.double().softmax(-1)
    ends = p.pow(temperature).where(p > 0, 0).cumsum(-1)
    return ((ends / ends[:, -1:]).gather(-1, torch.minimum(ids, others)) - points).abs() < 1e-6


def check_targets(world):
    """`sample` gives the targets that one process gives, in all processes."""
    rows, positions = torch.arange(N) // 8, torch.arange(N) % 8
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = logits_like(dtype)
        for sampler, parameters in DRAWS:
            settings = {"seed": 3, "rows": rows, "positions": positions, **parameters}
            alone = skd.sample(logits, sampler, **settings)
            shared = skd.sample(logits[:, world.own], sampler, shard=world.shard(), **settings)
            same = (alone.densify(V) - shared.densify(V)).abs().amax(-1) <= 1e-5
            assert same.float().mean() >= 0.99, (sampler, parameters, dtype)  # a draw in a million falls otherwise
            first = [torch.empty_like(shared.weights) for _ in range(world.size)]
            dist.all_gather(first, shared.weights.contiguous(), group=world.group)
            assert all(torch.equal(each, shared.weights) for each in first)


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    pair = dist.new_group([0, 2])
    worlds = [World(None, 3)] + ([] if rank == 1 else [World(pair, 2)])
    for world in worlds:
        check_targets(world)
    dist.barrier()
    dist.destroy_process_group()


def test_a_split_head_is_sampled_as_the_whole_one(tmp_path):
    mp.spawn(process, args=(str(tmp_path),), nprocs=3)
