"""What the sparse loss costs beside cross-entropy: time and peak memory of one forward + backward from hidden states.

    python benchmarks/losses.py [--tokens 1024] [--hidden 512] [--vocab 32768] [--kept 12] [--rounds 5]

Every figure is a ratio to `F.cross_entropy(F.linear(hidden, head), labels)` in the same run, variants in turn, median
over rounds. Peak memory is the process's growth over (hidden, head, and both gradients), one subprocess per variant.
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
from sparsekd.targets import SparseTargets


def make(n: int, h: int, v: int, k: int) -> dict[str, object]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(n, h, requires_grad=True),
        "head": (torch.randn(v, h) / h**0.5).requires_grad_(),
        "targets": SparseTargets(ids=torch.randint(v, (n, k)), weights=torch.full((n, k), 1 / k)),
        "labels": torch.randint(v, (n,)),
    }


VARIANTS = {
    "cross-entropy (plain torch)": lambda x: F.cross_entropy(F.linear(x["hidden"], x["head"]), x["labels"]),
    "dense KL (targets densified)": lambda x: F.kl_div(
        F.linear(x["hidden"], x["head"]).log_softmax(-1),
        x["targets"].densify(len(x["head"])),
        reduction="batchmean",
    ),
    "sparse_kl on logits": lambda x: skd.sparse_kl(F.linear(x["hidden"], x["head"]), x["targets"]),
    "fused_linear_sparse_kl": lambda x: skd.fused_linear_sparse_kl(x["hidden"], x["head"], x["targets"]),
    "fused, with 0.1 cross-entropy": lambda x: skd.fused_linear_sparse_kl(
        x["hidden"], x["head"], x["targets"], labels=x["labels"], ce_weight=0.1
    ),
}


def step(variant: str, x: dict) -> float:
    for leaf in ("hidden", "head"):
        x[leaf].grad = None
    started = time.perf_counter()
    VARIANTS[variant](x).backward()
    return time.perf_counter() - started


def peak_bytes(variant: str, sizes: list[int]) -> int:
    """Growth of a fresh process's peak over what the inputs and gradients take, in bytes."""
    words = [sys.executable, __file__, "--memory-of", variant, *map(str, sizes)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def measure_memory(variant: str, sizes: list[int]) -> None:
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
        return measure_memory(sys.argv[2], [int(word) for word in sys.argv[3:]])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 1024), ("hidden", 512), ("vocab", 32768), ("kept", 12), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    sizes = [a.tokens, a.hidden, a.vocab, a.kept]
    x = make(*sizes)
    seconds = {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:
        step(variant, x)
    for _ in range(a.rounds):
        for variant in VARIANTS:
            seconds[variant].append(step(variant, x))
    base = next(iter(VARIANTS))
    print(f"{a.tokens} tokens, hidden {a.hidden}, vocabulary {a.vocab:,}, {a.kept} ids a token, fp32, ", end="")
    print(f"{torch.get_num_threads()} threads; [tokens, vocab] fp32 is {a.tokens * a.vocab * 4 / 2**20:.0f} MiB\n")
    print(f"{'':<32}{'time / CE':>12}{'peak MiB':>12}{'peak / CE':>12}")
    results, peaks = {}, {variant: peak_bytes(variant, sizes) for variant in VARIANTS}
    for variant in VARIANTS:
        ratio = statistics.median(s / b for s, b in zip(seconds[variant], seconds[base], strict=True))
        results[variant] = {"time_ratio": ratio, "peak_bytes": peaks[variant]}
        share = peaks[variant] / peaks[base]
        print(f"{variant:<32}{ratio:>12.2f}{peaks[variant] / 2**20:>12.0f}{share:>12.2f}")
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
