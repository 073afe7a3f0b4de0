"""The whole path on the standard library's own source text: what `make demo` runs.

corpus -> tokenizer -> rows -> teacher -> caches -> students (every method, several seeds) -> evaluation -> report.html

The work is the lab's (`lab.Lab`), which skips what is complete, so the demo can be interrupted and run again.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparsekd.checks import make_folder
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.files import write_json
from sparsekd.lab import Arm, Lab, LabSettings

# The paper's two with its own codes, 24 bits a label: ratio-coded probabilities for top-k, exact counts for random
# sampling. Beside them our default.
METHODS: dict[str, Arm] = {
    "ce": Arm(name="ce", label="Cross-entropy", train={"method": "ce"}),
    "topk": Arm(name="topk", label="Top-K 12", sampler={"name": "top_k", "k": 12}, codec="prob24"),
    "rs": Arm(
        name="rs",
        label="Random sampling N=50",
        sampler={"name": "random_sampling", "rounds": 50},
        codec="raw24",
    ),
    "systematic": Arm(
        name="systematic",
        label="Systematic N=50",
        sampler={"name": "systematic", "rounds": 50},
        codec="split",
    ),
    "full_kd": Arm(name="full_kd", label="Full KD (online teacher)", train={"method": "full_kd"}),
}
ROWS_OF = "rs"  # whose cache gives the rows to the methods that have none

_QUICK = LabSettings(
    teacher={"family": "mini", "hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 256},
    curve_points=6,
)
PROFILES = {
    "smoke": replace(
        _QUICK,
        vocab_size=512,
        seq_len=64,
        limit_tokens=120_000,
        teacher={"family": "tiny"},
        teacher_steps=60,
        student={"family": "tiny", "hidden_size": 32, "intermediate_size": 96},
        student_rows=256,
        student_steps=16,
        eval_rows=24,
        seeds=(0, 1),
    ),
    "quick": _QUICK,
    "full": replace(
        _QUICK,
        vocab_size=2048,
        limit_tokens=None,
        teacher={"family": "small"},
        teacher_steps=600,
        student={
            "family": "tiny",
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 256,
        },
        student_rows=2560,
        student_steps=320,
        eval_rows=256,
    ),
}


def run_demo(
    *, out: str | Path = "demo", profile: str = "quick", progress: Callable[[str], None] | None = None
) -> Path:
    """Run (or go on running) the demo in the folder `out`; returns the path of report.html.

    Args:
        out: where everything goes.
        profile: smoke (seconds, and numbers that say nothing), quick (about 7 CPU-minutes) or full (about 25).
        progress: takes lines; default: print.
    """
    from sparsekd.report import aggregate, report, terminal_table
    from sparsekd.vocab import quiet_transformers

    if profile not in PROFILES:
        raise RecipeError(f"profile={profile!r} is not one of {', '.join(PROFILES)}")
    quiet_transformers()
    say = progress or print
    folder, settings = Path(out), replace(PROFILES[profile], device="cpu")
    _claim(folder, profile, settings)
    clock = Clock(folder / "seconds.json", say)
    started = time.perf_counter()
    say(f"sparsekd demo, profile {profile}, in {folder}/ (interrupt and run again as you like)")
    _make(Lab(folder, settings, say=say), clock)
    _describe(folder, profile, settings, clock.seconds)
    report(folder)
    say("")
    say(terminal_table(aggregate(folder)))
    say(f"\n{folder / 'report.html'}  ({time.perf_counter() - started:.0f} s)")
    return folder / "report.html"


def _make(lab: Lab, clock: Clock) -> None:
    """Every stage in its order, timed."""
    settings = lab.settings
    with clock.stage("pack", "documents -> tokenizer -> rows"):
        lab.rows()
    with clock.stage("teacher", f"teacher: {settings.teacher_steps} steps of {settings.batch_size} rows"):
        lab.teacher()
    for name, arm in METHODS.items():
        if arm.sampler:
            with clock.stage(f"capture {name}", f"teacher -> cache {name}"):
                lab.cache(arm)
    count = len(METHODS) * len(settings.seeds)
    with clock.stage("students", f"{count} students: {', '.join(METHODS)} x {len(settings.seeds)} seeds, evaluated"):
        shared = lab.cache(METHODS[ROWS_OF])
        lab.run(METHODS.values(), caches={arm.label: shared for arm in METHODS.values() if not arm.sampler})
    with clock.stage("evaluate", "the teacher's own loss, unique ids by rounds"):
        _evaluate_teacher(lab)


def _evaluate_teacher(lab: Lab) -> None:
    from sparsekd.evaluate import evaluate, unique_ids

    rows, teacher, curve = lab.rows(), lab.teacher(), lab.folder / "unique_ids.json"
    if not (Path(teacher) / "evaluation.json").exists():
        evaluate(model=teacher, rows=rows, batch_size=32, limit_rows=lab.settings.eval_rows, device="cpu")
    if not curve.exists():
        write_json(curve, unique_ids(teacher=teacher, rows=rows, device="cpu"))


class Clock:
    """Says each stage and remembers how long it took, over restarts."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def stage(self, name: str, words: str) -> Iterator[None]:
        started = time.perf_counter()
        self.say(f"  {words} ...")
        yield
        spent = time.perf_counter() - started
        self.seconds[name] = max(self.seconds.get(name, 0.0), spent)
        write_json(self.path, self.seconds)


def _claim(folder: Path, profile: str, settings: LabSettings) -> None:
    """A folder belongs to one profile."""
    make_folder(folder)
    path, text = folder / "profile.json", json.dumps({"name": profile, **asdict(settings)}, indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        held = json.loads(path.read_text()).get("name")
        raise MismatchError(
            f"{folder} holds a demo of profile {held!r} with other settings than {profile!r} has now; remove it, or "
            "name another folder: sparsekd demo FOLDER"
        )
    if not path.exists() and any(folder.iterdir()):
        raise MismatchError(f"{folder} is not empty and holds no demo; name another folder: sparsekd demo FOLDER")
    path.write_text(text)


def _describe(folder: Path, profile: str, settings: LabSettings, seconds: dict[str, float]) -> None:
    """run.json: what the report says of how it was made."""
    import torch
    import transformers

    from sparsekd import __version__

    teacher = json.loads((folder / "teacher" / "evaluation.json").read_text())
    manifest = json.loads((folder / "rows" / "manifest.json").read_text())
    student = settings.student if isinstance(settings.student, dict) else {"family": settings.student}
    used = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, no accelerator"
    write_json(
        folder / "run.json",
        {
            "title": "Sparse distillation of a small language model",
            "profile": profile,
            "seeds": list(settings.seeds),
            "corpus": {**manifest["source"], **{k: v["tokens"] for k, v in manifest["splits"].items()}},
            "teacher": {"loss": teacher["loss"]["mean"], "params": _parameters(folder / "teacher"), **settings.teacher},
            "student": {"params": _parameters(folder / "students" / f"ce-s{settings.seeds[0]}"), **student},
            "methods": [_method(name, arm) for name, arm in METHODS.items()],
            "commands": {"everything": f"sparsekd demo {folder} --profile {profile}"},
            "settings": asdict(settings),
            "machine": used,
            "versions": {
                "sparsekd": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        },
    )


def _method(name: str, arm: Arm) -> dict[str, Any]:
    method = arm.train.get("method", "cached")
    return {"name": name, "label": arm.label, "method": method, "cache": name if arm.sampler else None}


def _parameters(model: Path) -> int:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="numpy") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (not a dict)
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return total
