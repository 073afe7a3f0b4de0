"""What sampling costs beside a softmax, how close the drawn law is to float64, and how it grows with V and N.

    python benchmarks/samplers.py [--rounds 7] [--device cuda]

CPU seconds over those of `logits.softmax(-1)` of the same logits, variants in turn, median over rounds, one thread; on
a GPU wall seconds between synchronisations, of bf16 logits. The softmax is given as it is called (a fresh tensor) and
written into memory that exists, which a large one never is. The last line is JSON. Extra bytes are those of the largest
tensor that a call makes, over the probabilities' own. The law's error is the largest gap between cumulative
distributions on a grid of 2^18 points (a step is 3.8e-6).
"""

from __future__ import annotations

import argparse
import json

import torch
from timing import alternating, clock_for, machine, medians, ratios
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd as skd
from sparsekd import inversion

BASE = "softmax"


def variants(logits: torch.Tensor, buffer: torch.Tensor, draws: int) -> dict[str, object]:
    return {
        BASE: lambda: logits.softmax(-1),
        "softmax into existing memory": lambda: torch.softmax(logits, -1, out=buffer),
        "softmax + torch.multinomial": lambda: torch.multinomial(
            logits.softmax(-1, dtype=torch.float32), draws, replacement=True
        ),
        "softmax + cumsum + searchsorted, fp32": lambda: by_cumsum(logits, draws),
        "random_sampling": lambda: skd.sample(logits, "random_sampling", rounds=draws),
        "systematic": lambda: skd.sample(logits, "systematic", rounds=draws),
        "top_k(12)": lambda: skd.sample(logits, "top_k", k=12),
    }


def by_cumsum(logits: torch.Tensor, draws: int) -> torch.Tensor:
    """The one-liner, with its float32 rounding: tail ids cannot be drawn."""
    cumulative = logits.softmax(-1, dtype=torch.float32).cumsum(-1)
    uniform = torch.rand(len(logits), draws, device=logits.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that is made, views of what was given left out."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.given:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def extra_memory(logits: torch.Tensor, run) -> float:
    with Largest(logits) as largest:
        run()
    return largest.bytes / logits.nbytes


def law_gap(logits_V: torch.Tensor) -> float:
    grid = (torch.arange(2**18, dtype=torch.float64, device=logits_V.device) + 0.5) / 2**18
    hits = torch.bincount(inversion.ids_at(logits_V[None], grid[None])[0], minlength=len(logits_V)).double() / 2**18
    return float((hits.cumsum(0) - logits_V.double().softmax(-1).cumsum(0)).abs().max())


def measure(vocab: int, positions: int, draws: int, rounds: int, device: str = "cpu") -> dict[str, object]:
    """One column: ratios to the softmax, microseconds a position, memory and the law's error."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    logits = (3 * torch.randn(positions, vocab, device=device)).to(dtype)
    runs = variants(logits, torch.empty_like(logits), draws)
    seconds = alternating(runs, rounds, clock_for(device))
    return {
        "vocab": vocab,
        "positions": positions,
        "draws": draws,
        "ratio": ratios(seconds, BASE),
        "us_per_position": {name: 1e6 * spent / positions for name, spent in medians(seconds).items()},
        "extra_memory": {name: extra_memory(logits, run) for name, run in runs.items() if name != BASE},
        "law_gap": law_gap(logits[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(1)
    most, logits = (4096, 2**25) if a.device == "cpu" else (8192, 2**30)  # positions, logits of a call
    columns = [measure(v, min(most, logits // v), 50, a.rounds, a.device) for v in (2048, 8192, 32768, 128256)]
    by_draws = [measure(32768, most // 16, n, max(3, a.rounds // 2), a.device) for n in (5, 12, 25, 100, 200)]
    print("time / softmax, 50 draws\n")
    print(f"{'vocabulary':<40}" + "".join(f"{c['vocab']:>12,}" for c in columns))
    for name in columns[0]["ratio"]:
        print(f"{name:<40}" + "".join(f"{c['ratio'][name]:>12.2f}" for c in columns))
    for name in ("random_sampling", "systematic"):
        print(f"{name + ', µs a position':<40}" + "".join(f"{c['us_per_position'][name]:>12.1f}" for c in columns))
    memory = "".join(f"{c['extra_memory']['random_sampling']:>12.3f}" for c in columns)
    print(f"{'largest tensor / probabilities':<40}" + memory)
    print(f"{'largest gap of the law':<40}" + "".join(f"{c['law_gap']:>12.1e}" for c in columns))
    print("\n" + json.dumps({"machine": machine(a.device), "by_vocab": columns, "by_draws": by_draws}))


if __name__ == "__main__":
    main()
