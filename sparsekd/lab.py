"""A small language-model laboratory: rows and a teacher, caches and students made on demand and kept.

The tables of `reproduce` are lists of arms (ways to train a student) over one lab: what two tables share is trained
once, and an interrupted table goes on. Students of one seed share their initial weights and the order of their rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sparsekd.errors import MismatchError, ModelError
from sparsekd.files import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train a student.

    Attributes:
        label: in tables.
        name: of its folders, when a reader should recognise them; else they are named after what is done.
        sampler: of the cache it learns from; None for "ce" and "full_kd".
        codec: of that cache; None takes the default.
        train: further settings of `sparsekd.train.train` (method, residual, ce_weight, ...).
        redrawn: whether each student's seed is that of a cache of its own, so that errors over seeds hold the noise of
            draws too; else all its students learn from one cache.
    """

    label: str
    name: str | None = None
    sampler: dict[str, Any] | None = None
    codec: str | None = None
    train: dict[str, Any] = field(default_factory=dict)
    redrawn: bool = False

    def key(self) -> str:
        """A folder name that hangs on what is done, not on how it is called."""
        text = json.dumps(
            {k: v for k, v in asdict(self).items() if k not in ("label", "name", "redrawn")}, sort_keys=True
        )
        name = self.sampler["name"] if self.sampler else self.train.get("method", "cached")
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabSettings:
    """How large the lab's models and runs are; tokens of a student = steps * batch_size * seq_len.

    `curve_points` is how often a student's held-out loss is taken while it trains.
    """

    vocab_size: int = 1024
    seq_len: int = 128
    limit_tokens: int | None = 2_000_000
    heldout: float = 0.05
    teacher: dict[str, Any] = field(
        default_factory=lambda: {
            "family": "mini",
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 256,
        }
    )
    teacher_steps: int = 450
    student: str | dict[str, Any] = "tiny"
    student_rows: int = 1600
    student_steps: int = 200
    batch_size: int = 16
    learning_rate: float = 3e-3
    eval_rows: int = 160
    curve_points: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str | None = None
    dtype: str | None = None


SETTINGS = {
    "smoke": LabSettings(
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
    "quick": LabSettings(),
    "full": LabSettings(vocab_size=2048, limit_tokens=None, teacher_steps=900, student_rows=4800, student_steps=600),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """An arm's students: one evaluation (`evaluation.json`) and one training log (`metrics.json`) for each seed.

    `cache` is the statistics of the first seed's cache.
    """

    arm: Arm
    evaluations: tuple[dict[str, Any], ...]
    metrics: tuple[dict[str, Any], ...]
    cache: dict[str, Any] | None

    def diverged(self) -> bool:
        """Whether any of its students ended without a finite loss."""
        return any(e.get("diverged") or e["loss"]["mean"] is None for e in self.evaluations)

    def losses(self) -> list[float]:
        """Held-out loss by seed."""
        return [e["loss"]["mean"] for e in self.evaluations]

    def ids_per_token(self) -> float | None:
        """Mean distinct ids per position of its cache."""
        return None if self.cache is None else float(self.cache["unique_ids"]["mean"])


class Lab:
    """A folder with rows, a teacher, caches and students; everything is made when first asked for.

    `rows` and `teacher` may be the user's own (a real model pair on a GPU); otherwise they are made from the built-in
    corpus.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: LabSettings,
        *,
        rows: str | None = None,
        teacher: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.settings, self.say = Path(folder), settings, say
        self._rows, self._teacher = rows, teacher
        self._claim()

    def _claim(self) -> None:
        """A lab folder belongs to one set of settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "lab.json"
        sizes = {k: v for k, v in asdict(self.settings).items() if k not in ("seeds", "curve_points")}
        text = json.dumps(sizes | {"own_rows": self._rows, "own_teacher": self._teacher}, indent=1) + "\n"
        if path.exists() and path.read_text() != text:
            raise MismatchError(f"{self.folder} holds a lab with other settings; name another folder or remove it")
        path.write_text(text)

    def rows(self) -> str:
        """The packed rows."""
        if self._rows is None:
            from sparsekd.rows import pack

            s, self._rows = self.settings, str(self.folder / "rows")
            pack(
                source="builtin",
                tokenizer="train",
                vocab_size=s.vocab_size,
                seq_len=s.seq_len,
                heldout=s.heldout,
                limit_tokens=s.limit_tokens,
                out=self._rows,
                progress=False,
            )
        return self._rows

    def seq_len(self) -> int:
        """Tokens of a row: the user's rows have their own."""
        from sparsekd.packed import RowsReader

        with RowsReader(self.rows()) as reader:
            return reader.seq_len

    def teacher(self) -> str:
        """The teacher's folder, trained by cross-entropy when none was given."""
        if self._teacher is None:
            self._teacher = str(self.folder / "teacher")
            if not is_trained(self._teacher):
                self.say(f"  lab: training the teacher, {self.settings.teacher_steps} steps")
                self.train_teacher(self._teacher, self.rows())
        return self._teacher

    def train_teacher(self, out: str | Path, rows: str) -> None:
        """A model of the teacher's size, trained by cross-entropy on `rows` for the teacher's steps."""
        from sparsekd.train import train

        s = self.settings
        train(
            out=out,
            student=s.teacher,
            rows=rows,
            method="ce",
            max_steps=s.teacher_steps,
            batch_size=s.batch_size,
            learning_rate=s.learning_rate,
            save_steps=200,
            device=s.device,
            dtype=s.dtype,
            progress=False,
        )

    def text(self) -> str:
        """What it reads, in a few words."""
        if self._rows is not None and Path(self._rows) != self.folder / "rows":
            return f"the rows in {self._rows}"
        return f"the standard library's source text, vocabulary {self.settings.vocab_size}"

    def cache(self, arm: Arm, *, teacher: str | None = None, rows: str | None = None, student_seed: int = 0) -> str:
        """The cache of an arm's sampler (captured when missing), of the lab's first rows or of all of others."""
        from sparsekd.capture import capture

        teacher = teacher or self.teacher()
        sampler, seed = arm.sampler or {"name": "top_k", "k": 1}, student_seed if arm.redrawn else 0
        made = json.dumps(
            [
                sampler,
                arm.codec,
                self._inside(teacher),
                *([self._inside(rows)] if rows else []),
                *([seed] if seed else []),
            ],
            sort_keys=True,
        )
        name = hashlib.sha256(made.encode()).hexdigest()[:10]
        path = self.folder / "caches" / (arm.name or f"{sampler['name']}-{name}")
        if arm.name and seed:
            path = path.with_name(f"{path.name}-s{seed}")
        if not (path / "stats.json").exists():
            capture(
                rows=rows or self.rows(),
                teacher=teacher,
                out=path,
                sampler=sampler,
                codec=arm.codec,
                seed=seed,
                batch_size=32,
                limit_rows=None if rows else self.settings.student_rows,
                device=self.settings.device,
                dtype=self.settings.dtype,
            )
            write_stats(path)
        return str(path)

    def run(
        self,
        arms: Iterable[Arm],
        *,
        teacher: str | None = None,
        caches: dict[str, str] | None = None,
        exam: dict[str, Any] | None = None,
    ) -> list[Outcome]:
        """Train and evaluate every arm at every seed.

        Args:
            teacher: instead of the lab's.
            caches: gives an arm (by label) a cache of its own.
            exam: what `evaluate` judges students on (rows, split, teacher, limit_rows), where it is not the lab's
                held-out rows beside its teacher.
        """
        arms, todo = list(arms), {}
        paths = {
            (arm.label, seed): (caches or {}).get(arm.label) or self.cache(arm, teacher=teacher, student_seed=seed)
            for seed in self.settings.seeds
            for arm in arms
        }
        for seed in self.settings.seeds:
            for arm in arms:
                folder = self._student(arm, seed, paths[arm.label, seed])
                if not (folder / "evaluation.json").exists():
                    todo[folder] = (arm, seed, paths[arm.label, seed])
        self._train([(str(folder), *job) for folder, job in todo.items()], teacher, exam)
        return [self._outcome(arm, [paths[arm.label, seed] for seed in self.settings.seeds]) for arm in arms]

    def student_folder(self, arm: Arm, seed: int, cache: str | None = None) -> Path:
        """Where the student of an arm and a seed lies once it was run (with a cache of its own, if it had one)."""
        return self._student(arm, seed, cache or self.cache(arm, student_seed=seed))

    def _student(self, arm: Arm, seed: int, cache: str) -> Path:
        if arm.name:
            return self.folder / "students" / f"{arm.name}-s{seed}"
        return self.folder / "students" / f"{arm.key()}-{Path(cache).name.rpartition('-')[2]}-s{seed}"

    def _inside(self, path: str) -> str:
        """A path in the lab without the lab's own, so that a lab can be moved."""
        return str(Path(path).relative_to(self.folder)) if Path(path).is_relative_to(self.folder) else path

    def _train(
        self, jobs: Sequence[tuple[str, Arm, int, str]], teacher: str | None, exam: dict[str, Any] | None
    ) -> None:
        """Students side by side, one CPU thread each; on an accelerator one after another."""
        if not jobs:
            return
        models = (self.rows(), teacher or self.teacher())
        exam = exam or {"rows": models[0], "teacher": models[1], "limit_rows": self.settings.eval_rows}
        workers = max(1, min(os.cpu_count() or 1, len(jobs))) if self.settings.device in (None, "cpu") else 1
        self.say(f"  lab: training {len(jobs)} students")
        from sparsekd.models import one_thread

        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=one_thread)
        try:
            futures = {pool.submit(_train_one, self.settings, models, exam, job): job for job in jobs}
            for done, future in enumerate(as_completed(futures), start=1):
                _, arm, seed, _ = futures[future]
                self.say(f"    {done:>3}/{len(jobs)}  {arm.label:<28} seed {seed}  loss {future.result():.3f}")
        except BaseException:  # Ctrl-C: students that are under way have their checkpoints
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        pool.shutdown()

    def _outcome(self, arm: Arm, caches: Sequence[str]) -> Outcome:
        folders = [self._student(arm, seed, path) for seed, path in zip(self.settings.seeds, caches, strict=True)]
        stats = Path(caches[0]) / "stats.json"
        return Outcome(
            arm=arm,
            evaluations=tuple(json.loads((f / "evaluation.json").read_text()) for f in folders),
            metrics=tuple(json.loads((f / "metrics.json").read_text()) for f in folders),
            cache=json.loads(stats.read_text()) if arm.sampler and stats.exists() else None,
        )


def is_trained(folder: str | Path) -> bool:
    """Whether a training run was finished there: its metrics are written last."""
    return (Path(folder) / "metrics.json").exists()


def write_stats(cache: Path) -> None:
    """stats.json of a cache, which says that it is complete, and tells a table its ids per token."""
    from sparsekd.cache import CacheReader
    from sparsekd.inspect import cache_stats

    with CacheReader(cache) as reader:
        write_json(cache / "stats.json", cache_stats(reader))


def _train_one(s: LabSettings, models: tuple[str, str], exam: dict[str, Any], job: tuple[str, Arm, int, str]) -> float:
    """One student trained and evaluated, in a process of the pool; a run that diverges is recorded as infinite loss."""
    from sparsekd.evaluate import evaluate
    from sparsekd.vocab import quiet_transformers

    quiet_transformers()
    (rows, teacher), (out, arm, seed, cache) = models, job
    method = arm.train.get("method", "cached")
    try:
        _train_student(s, rows, teacher, out, arm, seed, cache, method)
        result = evaluate(model=out, batch_size=32, device=s.device, **exam)
    except ModelError as error:  # what the paper writes as an infinite loss
        result = {"diverged": str(error), "loss": {"mean": None, "standard_error": None}}
        write_json(Path(out) / "metrics.json", {"diverged": str(error)})
        write_json(Path(out) / "evaluation.json", result)  # last: its presence says that the student is done
    loss = result["loss"]["mean"]
    return float("inf") if loss is None else float(loss)


def _train_student(
    s: LabSettings, rows: str, teacher: str, out: str, arm: Arm, seed: int, cache: str, method: str
) -> None:
    from sparsekd.train import train

    train(
        out=out,
        student=s.student,
        cache=cache,
        teacher=teacher if method == "full_kd" else None,
        seed=seed,
        max_steps=s.student_steps,
        batch_size=s.batch_size,
        learning_rate=s.learning_rate,
        log_steps=max(1, s.student_steps // 30),
        eval_rows=rows if s.curve_points else None,
        eval_steps=max(1, s.student_steps // s.curve_points) if s.curve_points else 0,
        eval_limit=64,
        save_steps=max(1, s.student_steps // 2),
        keep_checkpoints=1,
        device=s.device,
        dtype=s.dtype,
        progress=False,
        **{"method": method} | arm.train,
    )
