"""What the sparse loss costs beside cross-entropy: time and peak memory of one forward + backward from hidden states.

    python benchmarks/losses.py [--tokens 1024] [--hidden 512] [--vocab 32768] [--kept 12] [--rounds 5]
                                [--dtype bfloat16] [--times-only]

Every figure is a ratio to `F.cross_entropy(F.linear(hidden, head), labels)` in the same run, in CPU seconds (others may
use the machine too), variants in turn, median over rounds. Peak memory is the process's growth over (hidden, head, and
both gradients), one subprocess per variant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import sparsekd as skd
from sparsekd.fused_chunks import default_rows
from sparsekd.targets import SparseTargets


def make(n: int, h: int, v: int, k: int, dtype: str) -> dict[str, object]:
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    return {
        "hidden": torch.randn(n, h).to(kind).requires_grad_(),
        "head": (torch.randn(v, h) / h**0.5).to(kind).requires_grad_(),
        "targets": SparseTargets(ids=torch.randint(v, (n, k)), weights=torch.full((n, k), 1 / k)),
        "labels": torch.randint(v, (n,)),
        "sum": torch.zeros(v, h),
    }


def products(x: dict) -> torch.Tensor:
    """The three matrix products of a head and nothing else, chunk by chunk: the floor."""
    hidden, head = x["hidden"].detach(), x["head"].detach()
    rows = default_rows(head)
    buffer = torch.empty(rows, len(head), dtype=head.dtype)
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = torch.mm(hidden[part], head.T, out=buffer[: len(hidden[part])])
        torch.mm(logits, head, out=grad_hidden[part])
        torch.addmm(grad_head, logits.T, hidden[part], beta=int(start > 0), out=grad_head)
    return torch.zeros((), requires_grad=True)


def fused(x: dict, **options: object) -> torch.Tensor:
    return skd.fused_linear_sparse_kl(x["hidden"], x["head"], x["targets"], **options)


VARIANTS = {
    "cross-entropy (plain torch)": lambda x: F.cross_entropy(F.linear(x["hidden"], x["head"]), x["labels"]),
    "three bare products": products,
    "dense KL (targets densified)": lambda x: F.kl_div(
        F.linear(x["hidden"], x["head"]).log_softmax(-1),
        x["targets"].densify(len(x["head"])),
        reduction="batchmean",
    ),
    "sparse_kl on logits": lambda x: skd.sparse_kl(F.linear(x["hidden"], x["head"]), x["targets"]),
    "fused_linear_sparse_kl": fused,
    "fused, cross-entropy alone": lambda x: fused(
        x | {"targets": SparseTargets(ids=x["targets"].ids[:, :0], weights=x["targets"].weights[:, :0])},
        labels=x["labels"],
        ce_weight=1.0,
    ),
    "fused, 0.1 CE + z-loss + weights": lambda x: fused(
        x, labels=x["labels"], ce_weight=0.1, z_loss=1e-4, token_weights=torch.ones(len(x["labels"]))
    ),
    "the same at temperature 2": lambda x: fused(
        x, labels=x["labels"], ce_weight=0.1, z_loss=1e-4, token_weights=torch.ones(len(x["labels"])), temperature=2.0
    ),
    "fused, gradient into head.grad": lambda x: fused(x, accumulate_into=x["sum"]),
}


def step(variant: str, x: dict) -> float:
    for leaf in ("hidden", "head"):
        x[leaf].grad = None
    started = time.process_time()
    VARIANTS[variant](x).backward()
    return time.process_time() - started


def peak_bytes(variant: str, sizes: list[int | str]) -> int:
    """Growth of a fresh process's peak over what the inputs and gradients take, in bytes."""
    words = [sys.executable, __file__, "--memory-of", variant, *map(str, sizes)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def measure_memory(variant: str, sizes: list[int | str]) -> None:
    x = make(*sizes)
    small = {**x, "hidden": x["hidden"][:1].detach().requires_grad_(), "labels": x["labels"][:1]}
    step(variant, {**small, "targets": x["targets"][:1]})  # both gradients and workspaces exist from here on
    x["head"].grad = x["hidden"].grad = None
    before = peak_now()
    step(variant, x)
    print(peak_now() - before)


def peak_now() -> int:
    """VmHWM in bytes (Linux). Not ru_maxrss: that starts at the parent's peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    if sys.argv[1:2] == ["--memory-of"]:
        return measure_memory(sys.argv[2], [*map(int, sys.argv[3:-1]), sys.argv[-1]])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 1024), ("hidden", 512), ("vocab", 32768), ("kept", 12), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times-only", action="store_true")
    a = parser.parse_args()
    sizes = [a.tokens, a.hidden, a.vocab, a.kept, a.dtype]
    x = make(*sizes)
    seconds = {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:
        step(variant, x)
    for _ in range(a.rounds):
        for variant in VARIANTS:
            seconds[variant].append(step(variant, x))
    base = next(iter(VARIANTS))
    print(f"{a.tokens} tokens, hidden {a.hidden}, vocabulary {a.vocab:,}, {a.kept} ids a token, {a.dtype}, ", end="")
    print(f"{torch.get_num_threads()} threads; [tokens, vocab] fp32 is {a.tokens * a.vocab * 4 / 2**20:.0f} MiB\n")
    print(f"{'':<34}{'time / CE':>12}{'peak MiB':>12}{'peak / CE':>12}")
    results = {}
    peaks = {variant: 0 if a.times_only else peak_bytes(variant, sizes) for variant in VARIANTS}
    for variant in VARIANTS:
        ratio = statistics.median(s / b for s, b in zip(seconds[variant], seconds[base], strict=True))
        results[variant] = {"time_ratio": ratio, "peak_bytes": peaks[variant]}
        share = peaks[variant] / (peaks[base] or 1)
        print(f"{variant:<34}{ratio:>12.2f}{peaks[variant] / 2**20:>12.0f}{share:>12.2f}")
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
