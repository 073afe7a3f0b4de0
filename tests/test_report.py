"""The report says what the numbers say: hand-made folders in, numbers and pages out."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

METHODS = (
    {"name": "ce", "label": "Cross-entropy", "cache": None},
    {"name": "topk", "label": "Top-K 12", "cache": "topk12"},
    {"name": "rs", "label": "Random sampling N=50", "cache": "rs50"},
    {"name": "full_kd", "label": "Full KD (online teacher)", "cache": None},
)
LOSSES = {"ce": 4.703, "topk": 5.057, "rs": 4.342, "full_kd": 4.324}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def diagram(gap: float) -> list[dict[str, Any]]:
    """Fifteen bins whose accuracy lies `gap` below the confidence in the middle."""
    bins = []
    for i in range(15):
        c = (i + 0.5) / 15
        accuracy = min(1.0, max(0.0, c - gap * math.sin(math.pi * c) ** 0.7))
        bins.append({"count": int(40_000 * math.exp(-3.2 * c)) + 800, "confidence": c, "accuracy": accuracy})
    return bins


def evaluation(loss: float, gap: float, accept: float) -> dict[str, Any]:
    bins = diagram(gap)
    total = sum(b["count"] for b in bins)
    return {
        "loss": {"mean": loss, "standard_error": 0.021},
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / 3.4,
        "ece": sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / total,
        "reliability": bins,
        "acceptance": {"mean": accept, "standard_error": 0.002},
        "agreement": {"mean": accept - 0.09, "standard_error": 0.003},
        "tokens": 52_000,
        "rows": 204,
    }


def training(name: str, seed: int, final: float, rng: random.Random) -> dict[str, Any]:
    log: list[dict[str, Any]] = []
    for step in range(50, 1501, 50):
        log.append({"step": step - 10, "loss": 3.0, "learning_rate": 1e-3})
        level = final + 2.9 * math.exp(-step / 260) + 0.25 * (1500 - step) / 1500 + rng.gauss(0, 0.008)
        log.append({"step": step, "eval_loss": final if step == 1500 else level})
    speed = {"ce": 21_400, "topk": 20_800, "rs": 20_500, "full_kd": 9_700}[name] * (1 + rng.gauss(0, 0.01))
    return {"method": name, "seed": seed, "seconds": 3.1e6 / speed, "tokens_per_second": speed, "log": log}


def make_run(root: Path, seeds: tuple[int, ...] = (0, 1, 2), losses: dict[str, float] = LOSSES) -> Path:
    """A folder as a finished run leaves it, with invented but realistic numbers."""
    rng = random.Random(7)
    gaps, accepts = (
        {"ce": 0.012, "topk": 0.21, "rs": 0.015, "full_kd": 0.010},
        {"topk": 0.47, "rs": 0.561, "full_kd": 0.566},
    )
    write(
        root / "run.json",
        {
            "title": "Standard-library Python, 2 k vocabulary",
            "profile": "quick",
            "seeds": list(seeds),
            "corpus": {
                "source": "builtin",
                "characters": 9_012_331,
                "tokens": 3_100_000,
                "sha256": "3f9a1c77d0e2",
            },
            "teacher": {"params": 1_310_720, "loss": 3.871, "layers": 4, "hidden": 128},
            "student": {"params": 327_680, "layers": 2, "hidden": 64},
            "methods": [dict(m) for m in METHODS],
            "commands": {
                "pack": "sparsekd pack source=builtin tokenizer=train seq_len=256 out=demo/rows",
                "capture": "sparsekd capture rows=demo/rows teacher=demo/teacher sampler=random_sampling sampler.rounds=50 out=demo/caches/rs50",
                "train": "sparsekd train cache=demo/caches/rs50 student=tiny seed=0 out=demo/students/rs-s0",
            },
            "machine": "2 CPU cores, 23 GB, Linux",
            "seconds": {"pack": 21, "teacher": 412, "capture": 61, "train": 1710, "evaluate": 95},
            "versions": {"sparsekd": "0.1.0", "python": "3.12.4", "torch": "2.13.0"},
        },
    )
    for m in METHODS:
        name = str(m["name"])
        for seed in seeds:
            luck = random.Random(seed).gauss(0, 0.02) + rng.gauss(0, 0.006)
            folder = root / "students" / f"{name}-s{seed}"
            write(folder / "metrics.json", training(name, seed, losses[name] + luck, rng))
            accept = accepts.get(name, 0.512) + rng.gauss(0, 0.002)
            write(folder / "evaluation.json", evaluation(losses[name] + luck, gaps[name], accept))
    write(
        root / "teacher" / "evaluation.json",
        evaluation(3.871, 0.006, 0.0) | {"acceptance": None, "agreement": None},
    )
    for cache, size in (("topk12", 38.2), ("rs50", 41.7)):
        totals = {
            "tokens": 3_100_000,
            "positions": 3_087_890,
            "pairs": 37_000_000,
            "payload_bytes": int(size * 3_100_000),
        }
        write(root / "caches" / cache / "manifest.json", {"spec": {"logit_width": 2048}, "totals": totals})
        stats = {"unique_ids": {"mean": 13.2, "histogram": [0, 3, 5]}, "bytes_per_token": size, "rounds": 50}
        write(root / "caches" / cache / "stats.json", stats)
    rounds = [1, 2, 5, 10, 20, 50, 100, 200]
    unique = [0.98 * r**0.66 * (1 + rng.gauss(0, 0.015)) for r in rounds]
    write(
        root / "unique_ids.json",
        {"rounds": rounds, "unique": unique, "power_law": {"exponent": 0.66, "prefactor": 0.98}},
    )
    return root
