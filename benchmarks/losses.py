"""What the sparse loss costs beside cross-entropy: time and peak memory of one forward + backward from hidden states.

    python benchmarks/losses.py [--tokens 1024] [--hidden 512] [--vocab 32768] [--kept 12] [--rounds 5]
                                [--dtype bfloat16] [--device cuda] [--few] [--curves] [--no-memory] [--warm 1]

Every figure is a ratio to `F.cross_entropy(F.linear(hidden, head), labels)` in the same run, variants in turn, median
over rounds: CPU seconds (others may use the machine too), on a GPU wall seconds between synchronisations. Peak memory
is what forward and backward take beyond (hidden, head, and both gradients): the growth of a fresh process on a CPU, the
allocator's on a GPU. `--few` leaves the options out; `--curves` adds cost against tokens, hidden size, vocabulary and
labels. The last line is JSON.

Peers run where their packages are and know the device. Top-k losses of other trainers are re-stated by formula, on
dense logits as they take them: Σ t (log t - log_softmax(z)) at the kept ids (TRL), and the same as gather - logsumexp
(Axolotl).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import alternating, clock_for, machine, medians, ratios

import sparsekd as skd
from sparsekd.fused_chunks import even_rows
from sparsekd.prefix_sets import PrefixSets
from sparsekd.targets import SparseTargets

BASE = "cross-entropy (plain torch)"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens, hidden size, vocabulary, labels a token, dtype of hidden states and head, and where."""

    tokens: int = 1024
    hidden: int = 512
    vocab: int = 32768
    kept: int = 12
    dtype: str = "float32"
    device: str = "cpu"


def make(sizes: Sizes) -> dict[str, Any]:
    torch.manual_seed(0)
    n, v, k = sizes.tokens, sizes.vocab, sizes.kept
    sets, of_sets = make_sets(sizes)
    place = {"dtype": getattr(torch, sizes.dtype), "device": sizes.device}
    return {
        "hidden": torch.randn(n, sizes.hidden, **place).requires_grad_(),
        "head": (torch.randn(v, sizes.hidden, **place) / sizes.hidden**0.5).requires_grad_(),
        "targets": SparseTargets(
            ids=torch.randint(v, (n, k), device=sizes.device), weights=torch.full((n, k), 1 / k, device=sizes.device)
        ),
        "labels": torch.randint(v, (n,), device=sizes.device),
        "sets": sets,
        "of_sets": of_sets,
    }


def make_sets(sizes: Sizes) -> tuple[PrefixSets, SparseTargets]:
    """31 labels a token, 12 of them sets of 13 tokens in the mean, as where 16k ids become 32k (docs/LOG.md)."""
    v = sizes.vocab
    size = (2 + torch.empty(v).exponential_(1 / 11)).long().clamp(max=v // 2)
    first = (torch.rand(v) * (v - size)).long()
    sets = PrefixSets(vocab_size=v, order=torch.randperm(v), first=first, last=first + size).to(sizes.device)
    ids = torch.randint(v, (sizes.tokens, 31), device=sizes.device)
    ids[:, :12] += v
    return sets, SparseTargets(ids=ids, weights=torch.full(ids.shape, 1 / 31, device=sizes.device))


# --- what is compared: inputs -> loss -----------------------------------------------------------------------


def products(x: dict[str, Any]) -> torch.Tensor:
    """The three matrix products of a head and nothing else, chunk by chunk: the floor."""
    hidden, head = x["hidden"].detach(), x["head"].detach()
    rows = min(len(hidden), even_rows(len(hidden), head))
    buffer = head.new_empty(rows, len(head))
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = torch.mm(hidden[part], head.T, out=buffer[: len(hidden[part])])
        torch.mm(logits, head, out=grad_hidden[part])
        torch.addmm(grad_head, logits.T, hidden[part], beta=int(start > 0), out=grad_head)
    return torch.zeros((), requires_grad=True)


def dense_kl(x: dict[str, Any]) -> torch.Tensor:
    log_p = F.linear(x["hidden"], x["head"]).log_softmax(-1)
    return F.kl_div(log_p, x["targets"].densify(len(x["head"])).to(log_p.dtype), reduction="batchmean")


def topk_by_log_softmax(x: dict[str, Any]) -> torch.Tensor:
    """Σ t (log t - log p) / N, the whole log_softmax made first."""
    logits, t = F.linear(x["hidden"], x["head"]), x["targets"]
    log_p = logits.float().log_softmax(-1).gather(-1, t.ids)
    return (t.weights * (t.weights.log() - log_p)).sum() / len(logits)


def topk_by_logsumexp(x: dict[str, Any]) -> torch.Tensor:
    """The same as Σ t (log t - z + logsumexp z) / N."""
    logits, t = F.linear(x["hidden"], x["head"]), x["targets"]
    log_p = logits.gather(-1, t.ids).float() - logits.logsumexp(-1, keepdim=True).float()
    return (t.weights * (t.weights.log() - log_p)).sum() / len(logits)


def fused(x: dict[str, Any], **options: Any) -> torch.Tensor:
    return skd.fused_linear_sparse_kl(x["hidden"], x["head"], x["targets"], **options)


def fused_50(x: dict[str, Any]) -> torch.Tensor:
    ids = torch.randint(len(x["head"]), (len(x["hidden"]), 50), device=x["head"].device)
    return fused(x | {"targets": SparseTargets(ids=ids, weights=torch.full_like(ids, 1 / 50, dtype=torch.float32))})


def fused_sets(x: dict[str, Any]) -> torch.Tensor:
    return fused(x | {"targets": x["of_sets"][: len(x["hidden"])]}, sets=x["sets"])


def fused_ce(x: dict[str, Any]) -> torch.Tensor:
    none = SparseTargets(ids=x["targets"].ids[:, :0], weights=x["targets"].weights[:, :0])
    return fused(x | {"targets": none}, labels=x["labels"], ce_weight=1.0)


def fused_mixed(x: dict[str, Any], **options: Any) -> torch.Tensor:
    ones = torch.ones(len(x["labels"]), device=x["labels"].device)
    return fused(x, labels=x["labels"], ce_weight=0.1, z_loss=1e-4, token_weights=ones, **options)


def fused_into(x: dict[str, Any]) -> torch.Tensor:
    if "sum" not in x:
        x["sum"] = torch.zeros_like(x["head"], dtype=torch.float32)
    return fused(x, accumulate_into=x["sum"])


def torch_fused_ce(x: dict[str, Any]) -> torch.Tensor:
    chunks = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x["hidden"], x["head"], x["labels"], options=chunks)


def liger_ce(x: dict[str, Any]) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(x["head"], x["hidden"], x["labels"])


def cut_ce(x: dict[str, Any]) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x["hidden"], x["head"], x["labels"])


Loss = Callable[[dict[str, Any]], torch.Tensor]
KEPT: dict[str, Loss] = {
    BASE: lambda x: F.cross_entropy(F.linear(x["hidden"], x["head"]), x["labels"]),
    "three bare products": products,
    "dense KL (targets densified)": dense_kl,
    "top-k KL, log_softmax + gather": topk_by_log_softmax,
    "fused_linear_sparse_kl": fused,
    "the same, 50 labels a token": fused_50,
    "fused, cross-entropy alone": fused_ce,
}
OPTIONS: dict[str, Loss] = {
    "top-k KL, gather - logsumexp": topk_by_logsumexp,
    "sparse_kl on logits": lambda x: skd.sparse_kl(F.linear(x["hidden"], x["head"]), x["targets"]),
    "fused, 0.1 CE + z-loss + weights": fused_mixed,
    "the same at temperature 2": partial(fused_mixed, temperature=2.0),
    "fused, 12 of 31 labels sets of tokens": fused_sets,
    "fused, gradient into head.grad": fused_into,
}
MEASURED_ALWAYS = (BASE, "fused_linear_sparse_kl")  # the peak of memory, with --few
ON_CURVES = (BASE, "three bare products", "top-k KL, log_softmax + gather", "fused_linear_sparse_kl")


def peers(device: str) -> dict[str, Loss]:
    """Fused cross-entropies of other packages, where they are installed and know the device."""
    found: dict[str, Loss] = {}
    if hasattr(F, "linear_cross_entropy"):
        found["torch's linear_cross_entropy, chunked"] = torch_fused_ce
    if device != "cpu" and find_spec("liger_kernel"):
        found["Liger's fused cross-entropy"] = liger_ce
    if device != "cpu" and find_spec("cut_cross_entropy"):
        found["cut cross-entropy"] = cut_ce
    return found


def variants(device: str) -> dict[str, Loss]:
    return KEPT | OPTIONS | peers(device)


# --- measuring --------------------------------------------------------------------------------------------


def step(loss: Loss, x: dict[str, Any]) -> None:
    x["hidden"].grad = x["head"].grad = None
    loss(x).backward()


def times(sizes: Sizes, names: Iterable[str], rounds: int, warm: int = 1) -> dict[str, dict[str, Any]]:
    """Per variant the ratio to cross-entropy, its microseconds a token, and its seconds round by round."""
    x, found = make(sizes), variants(sizes.device)
    runs = {name: partial(step, found[name], x) for name in names}
    spent = alternating(runs, rounds, clock_for(sizes.device), warm)
    shares, each = ratios(spent, BASE), medians(spent)
    return {
        name: {
            "time_ratio": shares[name],
            "us_per_token": 1e6 * each[name] / sizes.tokens,
            "seconds": [round(one, 6) for one in spent[name]],
        }
        for name in runs
    }


def curve(name: str, values: Iterable[int], base: Sizes, rounds: int) -> list[dict[str, Any]]:
    """Cost against one of the sizes."""
    points = [replace(base, **{name: value}) for value in values]
    found = [{name: getattr(point, name), "variants": times(point, ON_CURVES, rounds)} for point in points]
    for each in found:
        for variant in each["variants"].values():
            del variant["seconds"]
    return found


def peak_bytes(variant: str, sizes: Sizes) -> int:
    """What a step takes at its peak over what inputs and gradients take, in bytes."""
    if sizes.device != "cpu":
        return cuda_growth(variant, sizes)
    words = [sys.executable, __file__, "--memory-of", variant, json.dumps(asdict(sizes))]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def cuda_growth(variant: str, sizes: Sizes) -> int:
    x = make(sizes)
    step(variants(sizes.device)[variant], x)
    held = sum(leaf.numel() * leaf.element_size() for leaf in (x["hidden"], x["head"]) if leaf.grad is not None)
    x["hidden"].grad = x["head"].grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(variants(sizes.device)[variant], x)
    return torch.cuda.max_memory_allocated() - before - held


def process_growth(variant: str, sizes: Sizes) -> int:
    """The peak of resident memory while a step runs, less what was resident and what its gradients take.

    A step of one token ran before it, so that libraries are loaded; freed memory was given back. What the matrix
    product packs its operands into (5.5 MiB for a wide one, with MKL, once a process) is counted.
    """
    loss, x = variants(sizes.device)[variant], make(sizes)
    small = x | {"hidden": x["hidden"][:1].detach().requires_grad_(), "labels": x["labels"][:1]}
    step(loss, small | {"targets": x["targets"][:1]})
    x["head"].grad = x["hidden"].grad = None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    step(loss, x)
    return resident("VmHWM") - before - sum(x[leaf].numel() * x[leaf].element_size() for leaf in ("hidden", "head"))


def resident(name: str) -> int:
    """VmRSS or VmHWM (its peak) in bytes (Linux). Not ru_maxrss: that starts at the parent's peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def curves(sizes: Sizes, rounds: int) -> dict[str, list[dict[str, Any]]]:
    if sizes.device == "cpu":
        base = replace(sizes, tokens=512, hidden=512, vocab=8192, kept=12)
        ways = {"tokens": (128, 512, 2048), "hidden": (128, 512, 2048), "vocab": (2048, 8192, 32768, 131072)}
    else:
        base = replace(sizes, tokens=8192, hidden=1024, vocab=32768, kept=12)
        ways = {"tokens": (1024, 4096, 16384), "hidden": (512, 1024, 4096), "vocab": (8192, 32768, 131072)}
    return {name: curve(name, values, base, rounds) for name, values in (ways | {"kept": (1, 12, 50, 100)}).items()}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--memory-of"]:
        return print(process_growth(sys.argv[2], Sizes(**json.loads(sys.argv[3]))))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted")
    for name in ("few", "curves", "no-memory"):
        parser.add_argument(f"--{name}", action="store_true")
    a = parser.parse_args()
    sizes = Sizes(**{name: getattr(a, name) for name in asdict(Sizes())})
    names = KEPT if a.few else variants(sizes.device)
    found: dict[str, dict[str, Any]] = times(sizes, names, a.rounds, a.warm)
    print(", ".join(f"{name} {value}" for name, value in asdict(sizes).items()))
    print(f"[tokens, vocab] in fp32 is {sizes.tokens * sizes.vocab * 4 / 2**20:.0f} MiB\n")
    print(f"{'':<40}{'time / CE':>12}{'µs a token':>12}{'peak MiB':>12}")
    for name, each in found.items():
        if not a.no_memory and (not a.few or name in MEASURED_ALWAYS):
            each["peak_bytes"] = peak_bytes(name, sizes)
        peak = f"{each['peak_bytes'] / 2**20:>12.0f}" if "peak_bytes" in each else ""
        print(f"{name:<40}{each['time_ratio']:>12.2f}{each['us_per_token']:>12.2f}{peak}", flush=True)
    lines = curves(sizes, max(1, a.rounds // 2)) if a.curves else {}
    head = torch.empty(sizes.vocab, sizes.hidden, dtype=getattr(torch, sizes.dtype), device=sizes.device)
    chunk = min(sizes.tokens, even_rows(sizes.tokens, head)) * sizes.vocab * head.element_size()
    result = {"machine": machine(sizes.device), "sizes": asdict(sizes), "chunk_bytes": chunk}
    result |= {"variants": found, "curves": lines}
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
