"""What every benchmark here shares: variants in turn, CPU seconds, medians of ratios, and what the machine is."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping


def alternating(
    variants: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    clock: Callable[[], float] = time.process_time,
    warm: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round but the first `warm`, the variants one after another within a round.

    CPU seconds by default: on a shared machine the wall measures the neighbours. A ratio is taken within a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm + rounds):
        for name, run in variants.items():
            begin = clock()
            run()
            if turn >= warm:
                seconds[name].append(clock() - begin)
    return seconds


def clock_for(device: str) -> Callable[[], float]:
    """CPU seconds of this process; on an accelerator wall seconds, all that was queued before being done first."""
    if device == "cpu":
        return time.process_time
    import torch

    def done() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return done


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """The median over rounds of each variant's seconds over those of `base` in the same round."""
    return {
        name: statistics.median(own / other for own, other in zip(spent, seconds[base], strict=True))
        for name, spent in seconds.items()
    }


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(spent) for name, spent in seconds.items()}


PACKAGES = ("torch", "numpy", "transformers", "pyarrow", "datasets", "zstandard", "numba", "triton")
# Packages that a figure is compared with where they run: on a GPU.
PEERS = ("liger-kernel", "cut-cross-entropy")


def machine(device: str = "cpu") -> dict[str, object]:
    """Versions, threads, processor and accelerator: what stands beside every figure."""
    import torch

    found = {"python": platform.python_version(), "threads": torch.get_num_threads(), "processor": _processor()}
    if device != "cpu":
        found["accelerator"] = torch.cuda.get_device_name()
    for package in PACKAGES + PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
