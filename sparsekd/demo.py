"""The whole path on the standard library's own source text: what `make demo` runs.

corpus -> tokenizer -> rows -> teacher -> caches -> students (four methods, several seeds) -> evaluation -> report.html

Each step is skipped when its folder is complete, so the demo can be interrupted and run again.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sparsekd.checks import make_folder
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.files import write_json

METHODS: dict[str, dict[str, Any]] = {
    "ce": {"label": "Cross-entropy", "method": "ce", "cache": None},
    "topk": {"label": "Top-K 12", "method": "cached", "cache": "topk12"},
    "rs": {"label": "Random sampling N=50", "method": "cached", "cache": "rs50"},
    "full_kd": {"label": "Full KD (online teacher)", "method": "full_kd", "cache": None},
}
# The paper's own codes, 24 bits a label: ratio-coded probabilities for top-k, exact counts for random sampling.
CACHES: dict[str, dict[str, Any]] = {
    "topk12": {"sampler": {"name": "top_k", "k": 12}, "codec": "prob24"},
    "rs50": {"sampler": {"name": "random_sampling", "rounds": 50}, "codec": "raw24"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """How large a demo is. Tokens = steps * batch_size * seq_len."""

    vocab_size: int
    seq_len: int
    teacher: dict[str, Any]
    teacher_steps: int
    student: dict[str, Any]
    student_rows: int
    student_steps: int
    batch_size: int = 16
    limit_tokens: int | None = None
    heldout: float = 0.05
    eval_rows: int = 160
    seeds: tuple[int, ...] = (0, 1, 2)
    teacher_lr: float = 3e-3
    student_lr: float = 3e-3


PROFILES = {
    "smoke": Profile(
        vocab_size=512,
        seq_len=64,
        teacher={"family": "tiny"},
        teacher_steps=60,
        student={"family": "tiny", "hidden_size": 32, "intermediate_size": 96},
        student_rows=256,
        student_steps=16,
        limit_tokens=120_000,
        eval_rows=24,
        seeds=(0, 1),
    ),
    "quick": Profile(
        vocab_size=1024,
        seq_len=128,
        teacher={"family": "mini", "hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 256},
        teacher_steps=450,
        student={"family": "tiny"},
        student_rows=1600,
        student_steps=200,
        limit_tokens=2_000_000,
    ),
    "full": Profile(
        vocab_size=2048,
        seq_len=128,
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
        limit_tokens=None,
        eval_rows=256,
    ),
}


def run_demo(out: str | Path = "demo", profile: str = "quick", say: Callable[[str], None] = print) -> Path:
    """Run (or go on running) the demo in the folder `out`; returns the path of report.html."""
    from sparsekd.report import aggregate, report, terminal_table
    from sparsekd.vocab import quiet_transformers

    if profile not in PROFILES:
        raise RecipeError(f"profile={profile!r} is not one of {', '.join(PROFILES)}")
    quiet_transformers()
    folder, settings = Path(out), PROFILES[profile]
    _claim(folder, profile, settings)
    clock = Clock(folder / "seconds.json", say)
    started = time.perf_counter()
    say(f"sparsekd demo, profile {profile}, in {folder}/ (interrupt and run again as you like)")
    with clock.stage("pack", "documents -> tokenizer -> rows"):
        manifest = _pack(folder, settings)
    with clock.stage("teacher", f"teacher: {settings.teacher_steps} steps of {settings.batch_size} rows"):
        _train_teacher(folder, settings)
    for name, kind in CACHES.items():
        with clock.stage(f"capture {name}", f"teacher -> cache {name}"):
            _capture(folder, settings, name, kind)
    jobs = [(method, seed) for seed in settings.seeds for method in METHODS]
    with clock.stage("students", f"{len(jobs)} students: {', '.join(METHODS)} x {len(settings.seeds)} seeds"):
        _train_students(folder, settings, jobs, say)
    with clock.stage("evaluate", "held-out loss, calibration, acceptance"):
        _evaluate(folder, settings, jobs)
    _describe(folder, profile, settings, manifest, clock.seconds)
    report(folder)
    say("")
    say(terminal_table(aggregate(folder)))
    say(f"\n{folder / 'report.html'}  ({time.perf_counter() - started:.0f} s)")
    return folder / "report.html"


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


def _claim(folder: Path, profile: str, settings: Profile) -> None:
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


def _pack(folder: Path, settings: Profile) -> dict[str, Any]:
    from sparsekd.rows import pack

    return pack(
        source="builtin",
        tokenizer="train",
        vocab_size=settings.vocab_size,
        seq_len=settings.seq_len,
        heldout=settings.heldout,
        limit_tokens=settings.limit_tokens,
        out=folder / "rows",
        progress=False,
    )


def _train_teacher(folder: Path, settings: Profile) -> None:
    from sparsekd.train import train

    train(
        out=folder / "teacher",
        student=settings.teacher,
        rows=str(folder / "rows"),
        method="ce",
        max_steps=settings.teacher_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.teacher_lr,
        save_steps=200,
        device="cpu",
        progress=False,
    )


def _capture(folder: Path, settings: Profile, name: str, kind: dict[str, Any]) -> None:
    from sparsekd.cache import CacheReader
    from sparsekd.capture import capture
    from sparsekd.inspect import cache_stats

    path = folder / "caches" / name
    if (path / "stats.json").exists():
        return
    capture(
        rows=folder / "rows",
        teacher=str(folder / "teacher"),
        out=path,
        **kind,
        batch_size=32,
        limit_rows=settings.student_rows,
        device="cpu",
    )
    with CacheReader(path) as reader:
        write_json(path / "stats.json", cache_stats(reader))


def _train_students(folder: Path, settings: Profile, jobs: list[tuple[str, int]], say: Callable[[str], None]) -> None:
    """Students side by side, one thread each: so small a model gains nothing from a second one."""
    todo = [job for job in jobs if not (_student(folder, *job) / "metrics.json").exists()]
    workers = max(1, min(os.cpu_count() or 1, len(todo)))
    if not todo:
        return
    from sparsekd.models import one_thread

    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=one_thread)
    try:
        futures = {pool.submit(train_student, str(folder), settings, *job): job for job in todo}
        for future, (method, seed) in futures.items():
            metrics = future.result()
            last = [entry["eval_loss"] for entry in metrics["log"] if "eval_loss" in entry][-1]
            say(f"    {METHODS[method]['label']:<26} seed {seed}   validation loss {last:.3f}")
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    pool.shutdown()


def train_student(folder: str, settings: Profile, name: str, seed: int) -> dict[str, Any]:
    """One student; all methods of a seed share their initial weights and the order of their rows."""
    from sparsekd.train import train
    from sparsekd.vocab import quiet_transformers

    quiet_transformers()
    home, method = Path(folder), METHODS[name]
    return train(
        out=_student(home, name, seed),
        student=settings.student,
        cache=str(home / "caches" / (method["cache"] or "rs50")),
        method=method["method"],
        teacher=str(home / "teacher") if method["method"] == "full_kd" else None,
        eval_rows=str(home / "rows"),
        seed=seed,
        max_steps=settings.student_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.student_lr,
        log_steps=max(1, settings.student_steps // 30),
        eval_steps=max(1, settings.student_steps // 6),
        eval_limit=64,
        save_steps=max(1, settings.student_steps // 2),
        keep_checkpoints=1,
        device="cpu",
        progress=False,
    )


def _evaluate(folder: Path, settings: Profile, jobs: list[tuple[str, int]]) -> None:
    from sparsekd.evaluate import evaluate, unique_ids

    rows, teacher = folder / "rows", str(folder / "teacher")
    models = [(folder / "teacher", None), *((_student(folder, *job), teacher) for job in jobs)]
    for path, judge in models:
        if not (path / "evaluation.json").exists():
            evaluate(
                model=str(path), rows=rows, teacher=judge, batch_size=32, limit_rows=settings.eval_rows, device="cpu"
            )
    if not (folder / "unique_ids.json").exists():
        write_json(folder / "unique_ids.json", unique_ids(teacher=teacher, rows=rows, device="cpu"))


def _describe(
    folder: Path, profile: str, settings: Profile, manifest: dict[str, Any], seconds: dict[str, float]
) -> None:
    """run.json: what the report says of how it was made."""
    import torch
    import transformers

    from sparsekd import __version__

    teacher = json.loads((folder / "teacher" / "evaluation.json").read_text())
    used = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, no accelerator"
    write_json(
        folder / "run.json",
        {
            "title": "Sparse distillation of a small language model",
            "profile": profile,
            "seeds": list(settings.seeds),
            "corpus": {**manifest["source"], **{k: v["tokens"] for k, v in manifest["splits"].items()}},
            "teacher": {"loss": teacher["loss"]["mean"], "params": _parameters(folder / "teacher"), **settings.teacher},
            "student": {"params": _parameters(_student(folder, "ce", settings.seeds[0])), **settings.student},
            "methods": [{"name": name, **method} for name, method in METHODS.items()],
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


def _student(folder: Path, method: str, seed: int) -> Path:
    return folder / "students" / f"{method}-s{seed}"


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
