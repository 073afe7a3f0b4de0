"""What sampling from a split head sends and costs, beside one process that holds the whole head.

    python benchmarks/sampling_parallel.py [--vocab 128256] [--positions 256] [--world 2] [--rounds 5]

Bytes are what a process gives to collectives, for a position, over those of its own bf16 logits, which a gather would
send instead. CPU seconds: of all processes together over one process's on the whole logits, in turn, median over
rounds, one thread each; gloo's own threads count.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd as skd
from sparsekd.fused_parallel import VocabularyShard

VARIANTS = {
    "systematic, 50": ("systematic", {"rounds": 50}),
    "systematic, 50, t = 0.8": ("systematic", {"rounds": 50, "temperature": 0.8}),
    "random_sampling, 50": ("random_sampling", {"rounds": 50}),
    "top_k, 12": ("top_k", {"k": 12}),
}


class Sent(TorchDispatchMode):
    """Bytes that collectives take from this process."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.bytes += sum(each.nbytes for each in (args[1] if "allgather" in func.__name__ else args[0]))
        return func(*args, **(kwargs or {}))


def cpu_seconds(call) -> torch.Tensor:
    start = time.process_time()
    call()
    return torch.tensor(time.process_time() - start)


def process(rank: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.world)
    logits = 3 * torch.randn(args.positions, args.vocab, generator=torch.Generator().manual_seed(0))
    logits = logits.bfloat16()
    edges = [args.vocab * place // args.world for place in range(args.world + 1)]
    own = logits[:, edges[rank] : edges[rank + 1]].contiguous()
    shard = VocabularyShard(start=edges[rank], vocab_size=args.vocab)
    for name, (sampler, settings) in VARIANTS.items():
        with Sent() as sent:
            shared = skd.sample(own, sampler, shard=shard, **settings)
        alone = skd.sample(logits, sampler, **settings)
        same = torch.isclose(shared.densify(args.vocab), alone.densify(args.vocab), atol=1e-6).all(-1).float().mean()
        costs = []
        for _ in range(args.rounds):
            split = cpu_seconds(lambda: skd.sample(own, sampler, shard=shard, **settings))  # noqa: B023
            dist.all_reduce(split)
            whole = cpu_seconds(lambda: skd.sample(logits, sampler, **settings))  # noqa: B023
            costs.append(float(split / whole))
            dist.barrier()
        if rank == 0:
            each = sent.bytes / args.positions
            ratio = each / (2 * own.shape[1])
            print(
                f"{name:25} {each:7.1f} bytes a position, {ratio:.2e} of the own logits; "
                f"CPU {sorted(costs)[len(costs) // 2]:.2f} of one process's; positions alike {same:.4f}",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, args=(folder, parser.parse_args()), nprocs=parser.parse_args().world)
