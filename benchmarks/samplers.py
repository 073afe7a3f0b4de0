"""What sampling costs beside a softmax, and how close the drawn law is to float64: one table.

    python benchmarks/samplers.py [--positions 256] [--rounds 5]

Times are ratios to `logits.softmax(-1)` of the same logits in the same run, median over rounds. The law's error is the
largest gap between cumulative distributions on a grid of 2^18 uniforms (a grid step is 3.8e-6).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import sparsekd as skd
from sparsekd import inversion

VARIANTS = {
    "softmax": lambda x: x.softmax(-1),
    "softmax + torch.multinomial(50)": lambda x: torch.multinomial(x.float().softmax(-1), 50, replacement=True),
    "random_sampling(50)": lambda x: skd.sample(x, "random_sampling", rounds=50),
    "random_sampling(50), t = 0.8": lambda x: skd.sample(x, "random_sampling", rounds=50, temperature=0.8),
    "systematic(25)": lambda x: skd.sample(x, "systematic", rounds=25),
    "top_k(12)": lambda x: skd.sample(x, "top_k", k=12),
}


def seconds(run, x) -> float:
    started = time.perf_counter()
    run(x)
    return time.perf_counter() - started


def law_gap(logits_V: torch.Tensor) -> float:
    grid = (torch.arange(2**18, dtype=torch.float64) + 0.5) / 2**18
    mass = inversion.in_blocks(inversion.shifted_logits(logits_V[None]).exp_())
    hits = torch.bincount(inversion.invert(mass, grid[None])[0], minlength=mass[0].numel()).double() / 2**18
    return float((hits.cumsum(0)[: len(logits_V)] - logits_V.double().softmax(-1).cumsum(0)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    print(f"{a.positions} positions, {torch.get_num_threads()} threads; time / softmax\n")
    print(f"{'vocabulary':<34}" + "".join(f"{v:>12,}" for v in (2048, 32768, 131072)))
    columns = []
    for vocab in (2048, 32768, 131072):
        x = 3 * torch.randn(a.positions, vocab, generator=torch.Generator().manual_seed(0))
        spent = {name: [] for name in VARIANTS}
        for _ in range(a.rounds + 1):
            for name, run in VARIANTS.items():
                spent[name].append(seconds(run, x))
        base = statistics.median(spent["softmax"][1:])
        columns.append({name: statistics.median(s[1:]) / base for name, s in spent.items()} | {"law": law_gap(x[0])})
    for name in VARIANTS:
        print(f"{name:<34}" + "".join(f"{c[name]:>12.2f}" for c in columns))
    print(f"{'largest gap of the law':<34}" + "".join(f"{c['law']:>12.1e}" for c in columns))


if __name__ == "__main__":
    main()
