"""Runs the benchmarks and writes docs/benchmarks.md, docs/benchmarks.json and the plots in docs/images.

    python benchmarks/page.py [--device cuda] [--out docs] [--only samplers,reading] [--note "..."]

With `--device cuda` the same page of a GPU: docs/benchmarks_gpu.md. Each benchmark is a process of its own, one
thread, whose last line of output is JSON; this page only lays their figures beside the bars of the project. What cannot
run here says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import ratios

HERE = Path(__file__).parent
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page: its file, how it was measured, what its plots begin with, and per section a program and its words."""

    file: str
    method: str
    plots: str
    runs: dict[str, tuple[str, str]]


PAGES = {
    # Words that make it last a quarter of an hour on two cores.
    "cpu": Page(
        file="benchmarks",
        method="Written by `make bench`: each figure is a ratio within one run, variants in turn, CPU seconds, "
        "medians, fp32, one thread.",
        plots="bench",
        runs={
            "losses": ("losses", "--curves"),
            "losses_large": (
                "losses",
                "--tokens 2048 --hidden 1024 --vocab 128256 --few --rounds 2 --warm 0",
            ),
            "samplers": ("samplers", "--rounds 5"),
            "capture": ("capture", ""),
            "reading": ("reading", ""),
        },
    ),
    "cuda": Page(
        file="benchmarks_gpu",
        method="Written by `make bench-gpu`: each figure is a ratio within one run, variants in turn, wall seconds "
        "between synchronisations, medians, bf16. Reading is the host's.",
        plots="bench_gpu",
        runs={
            "losses": (
                "losses",
                "--device cuda --dtype bfloat16 --tokens 8192 --hidden 1024 --vocab 128256 --rounds 20 --curves",
            ),
            "losses_large": (
                "losses",
                "--device cuda --dtype bfloat16 --tokens 8192 --hidden 3072 --vocab 128256 --rounds 20",
            ),
            "samplers": ("samplers", "--device cuda --rounds 20"),
            "capture": ("capture", "--device cuda --teachers 300m,3b --vocab 128256"),
            "reading": ("reading", ""),
        },
    ),
}


# What `trust` says of a kernel that is left out: figures are then torch's.
WITHOUT_A_KERNEL = "plain torch takes its place"


def run(name: str, words: str) -> Json:
    """What one benchmark found, and which kernels it had to do without, or {"failed": its last words}."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(HERE / f"{name}.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        print(done.stderr, file=sys.stderr, flush=True)
        return {"failed": (lines or ["no word of why"])[-1]}
    found: Json = json.loads(done.stdout.strip().splitlines()[-1])
    without = sorted({line.split("Warning: ")[-1] for line in lines if WITHOUT_A_KERNEL in line})
    return found | ({"without": without} if without else {})


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def bar(value: float, wanted: float, *, least: bool = False, unit: str = "") -> list[str]:
    """Found, bar and verdict: `least` where more is better."""
    met = value >= wanted if least else value <= wanted
    return [f"{value:.2f}{unit}", f"{'≥' if least else '≤'} {round(wanted, 2):g}{unit}", "met" if met else "**missed**"]


# --- sections ---------------------------------------------------------------------------------------------


# What is divided by what, and the bar: largest, or least share of the speed.
OPTIONS = (
    "fused, 0.1 CE + z-loss + weights",
    "the same at temperature 2",
    "fused, 12 of 31 labels sets of tokens",
)
PLAIN, FUSED, FUSED_CE = "cross-entropy (plain torch)", "fused_linear_sparse_kl", "fused, cross-entropy alone"
PRODUCTS, DENSE = "three bare products", "dense KL (targets densified)"
PEER_LOSSES = ("torch's linear_cross_entropy, chunked", "Liger's fused cross-entropy", "cut cross-entropy")
LOSS_BARS: dict[str, list[tuple[str, str, float]]] = {
    "cpu": [
        (FUSED, FUSED_CE, 1.02),
        ("the same, 50 labels a token", FUSED_CE, 1.02),
        (FUSED, PLAIN, 0.90),
        (FUSED, PRODUCTS, 1 / 0.90),
        (FUSED, DENSE, 0.70),
        *((name, FUSED, 1.02) for name in OPTIONS),
    ],
    "cuda": [(FUSED, FUSED_CE, 1.01), (FUSED, PRODUCTS, 1.12), *((FUSED, name, 1.0) for name in PEER_LOSSES)],
}


def losses(found: Json, plots: str) -> str:
    sizes, each = found["sizes"], found["variants"]
    bars = [
        [
            f"{above} / {below}",
            *bar(ratios({name: each[name]["seconds"] for name in (above, below)}, below)[above], wanted),
        ]
        for above, below, wanted in LOSS_BARS[sizes["device"]]
        if above in each and below in each
    ]
    if "peak_bytes" in each[FUSED]:
        peak, logits = each[FUSED]["peak_bytes"], 4 * sizes["tokens"] * sizes["vocab"]
        bars.append([f"peak memory of {FUSED} / one chunk", *bar(peak / found["chunk_bytes"], 1.1)])
        if found["chunk_bytes"] * 8 == logits:  # the bar is for chunks of an eighth
            bars.append([f"peak memory of {FUSED} / fp32 [T, V]", *bar(peak / logits, 0.14)])
    rows = [
        [name, f"{one['time_ratio']:.2f}", f"{one['us_per_token']:.1f}", _mebibytes(one.get("peak_bytes"))]
        for name, one in each.items()
    ]
    parts = [
        f"One step from hidden states: T = {sizes['tokens']:,}, H = {sizes['hidden']:,}, V = {sizes['vocab']:,}, "
        f"{sizes['kept']} labels a token, {sizes['dtype']}. Time over `F.linear` + `F.cross_entropy`. Top-k KL is "
        "other trainers' loss, re-stated by formula.\n",
        table(["", "found", "bar", ""], bars),
        table(["", "time", "µs a token", "peak memory beyond gradients"], rows),
    ]
    if found["curves"]:
        parts.append(f"![cost of the loss](images/{plots}_losses.svg)\n")
    return "\n".join(parts)


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB"


def samplers(found: Json, plots: str) -> str:
    columns = found["by_vocab"]
    rows = [[name, *(f"{c['ratio'][name]:.2f}" for c in columns)] for name in columns[0]["ratio"]]
    rows.append(
        ["random_sampling, µs a position", *(f"{c['us_per_position']['random_sampling']:.0f}" for c in columns)]
    )
    rows.append(["largest gap of the drawn law to float64", *(f"{c['law_gap']:.1e}" for c in columns)])
    large = columns[-1]
    bars = [
        [f"{name} / softmax at V = {large['vocab']:,}", *bar(large["ratio"][name], 1.0)]
        for name in ("random_sampling", "systematic")
    ]
    bars.append(["largest tensor made / probabilities", *bar(large["extra_memory"]["random_sampling"], 0.1)])
    return (
        "50 draws a position, over one `softmax` of the same logits. The floor is the softmax into memory that exists: "
        "a fresh large tensor is mostly the price of its pages.\n\n"
        + table(["", "found", "bar", ""], bars)
        + "\n"
        + table(["V =", *(f"{c['vocab']:,}" for c in columns)], rows)
        + f"\n![cost of sampling](images/{plots}_sampling.svg)\n"
    )


def capture(found: Json, plots: str) -> str:
    rows = [
        [
            f"capture / bare forward, teacher of {each['parameters'] / 1e6:.0f}M, V = {each['vocab']:,}",
            # Sampling may cost 3 % of the forward of a teacher of 3B, everything 5 %.
            *bar(each["tokens_per_second_over_bare"], 0.97 if each["parameters"] > 2e9 else 0.95, least=True),
        ]
        for each in found["capture"]
    ]
    rows += [
        [
            f"the teacher waits for the writer, {each['parameters'] / 1e6:.0f}M",
            *bar(100 * each["teacher_waited"], 1, unit=" %"),
        ]
        for each in found["capture"]
    ]
    rows += [
        [f"coded, checked, written by one core, {codec}", *bar(rate / 1e6, 1, least=True, unit=" M tokens/s")]
        for codec, rate in found["writer"].items()
    ]
    return (
        "End to end, the writer's CPU time included. Sampling costs the same beside any teacher, so its share falls "
        "with the teacher's size. Draws reach the writer through a queue of batches; the shared-memory rings of the "
        "paper's D.2 could save at most what the teacher waits, below.\n\n" + table(["", "found", "bar", ""], rows)
    )


def reading(found: Json, plots: str) -> str:
    rates, bars = found["tokens_per_second"], {"raw24": 3.0, "split": 1.0}
    rows = [[f"{c}, shuffled epoch", *bar(rates[c] / 1e6, b, least=True, unit=" M tokens/s")] for c, b in bars.items()]
    rows += [[name, f"{rate / 1e6:.2f} M tokens/s", "", "peer"] for name, rate in rates.items() if name not in bars]
    rows += [
        [f"random row, {codec}, before decoding", *bar(spent["before decoding"], 50, unit=" µs")]
        for codec, spent in found["row_us"].items()
    ]
    rows.append(
        ["64 rows found among 10⁹ (resuming anywhere)", *bar(found["order_us"]["1e+09"] / 1e3, 1000, unit=" ms")]
    )
    waits, clock = found["waits"], "CPU of the training thread"
    rows.append(["a step of the demo waits for its batch", *bar(100 * waits["read ahead, wall"], 0.5, unit=" %")])
    rows.append(
        ["CPU time of a step that goes to its batch", *bar(100 * waits[f"read ahead, {clock}"], 0.5, unit=" %")]
    )
    rows.append(["the same without reading ahead", f"{waits[f'read in the step, {clock}']:.1%}", "", ""])
    share = waits[f"ready in memory, {clock}"]
    rows.append(["the same ready in memory: torch's DataLoader alone", f"{share:.2%}", "", "floor"])
    return (
        "To ready tensors on one core, batches of 8 rows of 4,096 tokens. The peers read uncompressed counts, "
        "unchecked, `datasets` from memory.\n\n"
        + table(["", "found", "bar", ""], rows)
        + f"\n{eight_gpus(found)}\n\n![finding rows](images/{plots}_order.svg)\n"
    )


def eight_gpus(found: Json, students: tuple[float, ...] = (300e6, 3e9), flops: float = 0.4 * 989e12) -> str:
    """What 8 H100s at 40 % of their bf16 peak would wait, by arithmetic: 6 FLOPs a parameter and token, one reading
    process a GPU, batches of 8 rows of 4,096 tokens, handed over as slowly as the demo's step found them to be."""
    waits, rate = found["waits"], found["tokens_per_second"]["split"]
    hand_over = waits["read ahead, µs a batch"] / 1e6
    parts = []
    for parameters in students:
        needed = flops / (6 * parameters)
        busy, share = needed / rate, hand_over * needed / (8 * 4096)
        late = max(0.0, 1 - 1 / busy)  # of the time, where one core reads more slowly than a GPU trains
        parts.append(
            f"{parameters / 1e9:g}B parameters take {8 * needed / 1e6:.2f} M tokens/s, {busy:.1%} of one core a "
            f"GPU with `split`, and wait {max(late, share):.2%} of the time"
        )
    return (
        "On 8 H100s, by arithmetic from these rates (40 % of 989 TFLOP/s, 6 FLOPs a parameter and token, one process a "
        f"GPU reading ahead, {1e3 * hand_over:.2f} ms to hand a batch over as in the demo): "
        + "; ".join(parts)
        + ". Not measured."
    )


SECTIONS: dict[str, Callable[[Json, str], str]] = {
    "losses": losses,
    "losses_large": losses,
    "samplers": samplers,
    "capture": capture,
    "reading": reading,
}
TITLES = {
    "losses": "The loss",
    "losses_large": "The loss, larger",
    "samplers": "Sampling",
    "capture": "Capture",
    "reading": "Reading",
}


# --- plots --------------------------------------------------------------------------------------------------


def plots(results: dict[str, Json], folder: Path, prefix: str) -> None:
    """Cost against T, H, V, K and N, and against the size of a cache."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    plt.rcParams["svg.hashsalt"] = "sparsekd"
    folder.mkdir(parents=True, exist_ok=True)
    curves = results.get("losses", {}).get("curves")
    if curves:
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained", sharey=True)
        labels = {"tokens": "tokens T", "hidden": "hidden size H", "vocab": "vocabulary V", "kept": "labels a token K"}
        for axis, (key, points) in zip(axes, curves.items(), strict=True):
            for name in points[0]["variants"]:
                cost = [point["variants"][name]["us_per_token"] for point in points]
                axis.loglog([point[key] for point in points], cost, "o-", label=name)
            axis.set(xlabel=labels[key])
            axis.set_xticks([point[key] for point in points], [f"{point[key]:,}" for point in points])
            axis.minorticks_off()
        axes[0].set(ylabel="µs a token")
        axes[-1].legend(fontsize=7)
        figure.savefig(folder / f"{prefix}_losses.svg", metadata={"Date": None})
    found = results.get("samplers", {})
    if "by_vocab" in found:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        names = ("softmax", "softmax + torch.multinomial", "random_sampling", "systematic")
        for axis, columns, key, label in (
            (left, found["by_vocab"], "vocab", "vocabulary V, 50 draws"),
            (right, found["by_draws"], "draws", "draws N, V = 32,768"),
        ):
            for name in names:
                axis.loglog([c[key] for c in columns], [c["us_per_position"][name] for c in columns], "o-", label=name)
            axis.set(xlabel=label, ylabel="µs a position")
        left.legend(fontsize=8)
        figure.savefig(folder / f"{prefix}_sampling.svg", metadata={"Date": None})
    found = results.get("reading", {})
    if "order_us" in found:
        figure, axis = plt.subplots(figsize=(4.5, 3), layout="constrained")
        axis.semilogx([float(size) for size in found["order_us"]], list(found["order_us"].values()), "o-")
        axis.set(xlabel="rows of the cache", ylabel="µs to find 64 rows", ylim=(0, None))
        figure.savefig(folder / f"{prefix}_order.svg", metadata={"Date": None})


# --- the page -----------------------------------------------------------------------------------------------


def page(results: dict[str, Json], note: str, kind: Page = PAGES["cpu"]) -> str:
    facts: Json = next((each["machine"] for each in results.values() if "machine" in each), {})
    versions = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    absent = ", ".join(name for name, value in facts.items() if value is None)
    parts = [
        "# Benchmarks\n",
        f"{kind.method} {note}".rstrip() + "\n",
    ]
    if facts:
        unlike = f" Not installed, so not compared: {absent}." if absent else ""
        parts.append(f"Machine: {versions}.{unlike}\n")
    if "accelerator" not in facts:
        parts.append("Not compared: Liger's kernels are Triton's and need a GPU. Nothing here has run on one yet.\n")
    for name, found in results.items():
        body = f"Did not run: {found['failed']}\n" if "failed" in found else SECTIONS[name](found, kind.plots)
        without = "".join(f"**Without its kernel**: {why}.\n\n" for why in found.get("without", []))
        parts.append(f"## {TITLES[name]}\n\n{without}{body}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=PAGES)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--only", help="some of: " + ", ".join(SECTIONS) + "; the others stay as they were")
    parser.add_argument("--note", default="")
    a = parser.parse_args()
    kind = PAGES[a.device]
    record = a.out / f"{kind.file}.json"
    results: dict[str, Json] = json.loads(record.read_text()) if record.exists() else {}
    for name in a.only.split(",") if a.only is not None else kind.runs:
        print(f"{name} ...", flush=True)
        results[name] = run(*kind.runs[name])
        write(results, a.out, kind, a.note)  # a machine that is taken away leaves what was measured


def write(results: dict[str, Json], out: Path, kind: Page, note: str) -> None:
    """The record, the plots and the page, with the sections that there are."""
    results = {name: results[name] for name in kind.runs if name in results}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{kind.file}.json").write_text(json.dumps(results, indent=1) + "\n")
    plots(results, out / "images", kind.plots)
    (out / f"{kind.file}.md").write_text(page(results, note, kind))


if __name__ == "__main__":
    main()
