"""Runs the benchmarks and writes docs/benchmarks.md, docs/benchmarks.json and the plots in docs/images.

    python benchmarks/page.py [--out docs] [--only samplers,reading] [--note "..."]

Each benchmark is a process of its own, one thread, whose last line of output is JSON; this page only lays their figures
beside the bars of the project. What cannot run here says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Each file with the words that make it last minutes on two cores.
RUNS = {"losses": [], "samplers": ["--rounds", "5"], "capture": [], "reading": []}
Json = dict[str, Any]


def run(name: str, words: list[str]) -> Json:
    """What one benchmark found, or {"failed": its last words}."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / f"{name}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word of why"])[-1]}
    found: Json = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def bar(value: float, wanted: float, *, least: bool = False, unit: str = "") -> list[str]:
    """Found, bar and verdict: `least` where more is better."""
    met = value >= wanted if least else value <= wanted
    return [f"{value:.2f}{unit}", f"{'≥' if least else '≤'} {wanted:g}{unit}", "met" if met else "**missed**"]


# --- sections ---------------------------------------------------------------------------------------------


def losses(found: Json) -> str:
    rows = [
        [name, f"{each['time_ratio']:.2f}", f"{each['peak_bytes'] / 2**20:.0f} MiB"]
        for name, each in found.items()
        if isinstance(each, dict) and "time_ratio" in each
    ]
    return "One step from hidden states, over `F.linear` + `F.cross_entropy`.\n\n" + table(
        ["", "time", "peak memory beyond gradients"], rows
    )


def samplers(found: Json) -> str:
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
        + "\n![cost of sampling](images/bench_sampling.svg)\n"
    )


def capture(found: Json) -> str:
    rows = [
        [
            f"capture / bare forward, teacher of {each['parameters'] / 1e6:.0f}M, V = {each['vocab']:,}",
            *bar(each["tokens_per_second_over_bare_cpu"], 0.95, least=True),
        ]
        for each in found["capture"]
    ]
    rows += [
        [f"the teacher waits for the writer, {each['teacher']}", *bar(100 * each["teacher_waited"], 1, unit=" %")]
        for each in found["capture"]
    ]
    rows += [
        [f"coded, checked, written by one core, {codec}", *bar(rate / 1e6, 1, least=True, unit=" M tokens/s")]
        for codec, rate in found["writer"].items()
    ]
    return (
        "End to end, the writer's CPU time included. Sampling costs the same beside any teacher, so its share falls "
        "with the teacher's size.\n\n" + table(["", "found", "bar", ""], rows)
    )


def reading(found: Json) -> str:
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
    wait = found["waits"]["read ahead, wall"]
    rows.append(["a step of the demo waits for its batch", *bar(100 * wait, 0.5, unit=" %")])
    rows.append(["the same without reading ahead", f"{found['waits']['read in the step, wall']:.1%}", "", ""])
    return (
        "To ready tensors on one core, batches of 8 rows of 4,096 tokens. The peers read uncompressed counts, "
        "unchecked, `datasets` from memory.\n\n"
        + table(["", "found", "bar", ""], rows)
        + "\n![finding rows](images/bench_order.svg)\n"
    )


SECTIONS: dict[str, Callable[[Json], str]] = {
    "losses": losses,
    "samplers": samplers,
    "capture": capture,
    "reading": reading,
}
TITLES = {"losses": "The loss", "samplers": "Sampling", "capture": "Capture", "reading": "Reading"}


# --- plots --------------------------------------------------------------------------------------------------


def plots(results: dict[str, Json], folder: Path) -> None:
    """Cost against V and N, and against the size of a cache."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    plt.rcParams["svg.hashsalt"] = "sparsekd"
    folder.mkdir(parents=True, exist_ok=True)
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
            axis.set(xlabel=label, ylabel="CPU µs a position")
        left.legend(fontsize=8)
        figure.savefig(folder / "bench_sampling.svg", metadata={"Date": None})
    found = results.get("reading", {})
    if "order_us" in found:
        figure, axis = plt.subplots(figsize=(4.5, 3), layout="constrained")
        axis.semilogx([float(size) for size in found["order_us"]], list(found["order_us"].values()), "o-")
        axis.set(xlabel="rows of the cache", ylabel="µs to find 64 rows", ylim=(0, None))
        figure.savefig(folder / "bench_order.svg", metadata={"Date": None})


# --- the page -----------------------------------------------------------------------------------------------


def page(results: dict[str, Json], note: str) -> str:
    facts: Json = next((each["machine"] for each in results.values() if "machine" in each), {})
    versions = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    absent = ", ".join(name for name, value in facts.items() if value is None)
    parts = [
        "# Benchmarks\n",
        "Written by `make bench`: each figure is a ratio within one run, variants in turn, CPU seconds, medians, fp32, "
        f"one thread. {note}\n",
        f"Machine: {versions}." + (f" Not installed, so not compared: {absent}." if absent else "") + "\n",
        "Not compared: Liger's kernels are Triton's and need a GPU. Nothing here has run on one yet.\n",
    ]
    for name, found in results.items():
        body = f"Did not run: {found['failed']}\n" if "failed" in found else SECTIONS[name](found)
        parts.append(f"## {TITLES[name]}\n\n{body}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--only", default=",".join(RUNS), help="some of: " + ", ".join(RUNS))
    parser.add_argument("--note", default="")
    a = parser.parse_args()
    record = a.out / "benchmarks.json"
    results: dict[str, Json] = json.loads(record.read_text()) if record.exists() else {}
    for name in a.only.split(","):
        print(f"{name} ...", flush=True)
        results[name] = run(name, RUNS[name])
    results = {name: results[name] for name in RUNS if name in results}
    a.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(results, indent=1) + "\n")
    plots(results, a.out / "images")
    (a.out / "benchmarks.md").write_text(page(results, a.note))


if __name__ == "__main__":
    main()
