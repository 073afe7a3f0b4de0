"""What a person sees of a command: progress on stderr, numbers as words."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def speaks() -> bool:
    """Under torchrun, one process does."""
    return os.environ.get("RANK", "0") == "0"


class Bar:
    """A progress bar on stderr (a terminal only), opened by its first call: `progress(done, total)`."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.bar: Any = None

    def __enter__(self) -> Any:
        return self

    def __call__(self, done: int, total: int, **postfix: str) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, unit=self.unit, unit_scale=True, disable=None, dynamic_ncols=True)
        if postfix:
            self.bar.set_postfix(postfix, refresh=False)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def capture_progress(bar: Any) -> Callable[[int, dict[str, Any]], None]:
    def show(done: int, facts: dict[str, Any]) -> None:
        bar(done, facts["total"], shard=str(facts["shard"]), bytes=f"{facts['bytes_per_token']:.1f}/tok")

    return show


def show_training(bar: Any) -> Any:
    """A Trainer callback: a bar on a terminal, a line per log elsewhere, and a line per evaluation on both."""
    from transformers import TrainerCallback

    class ShowTraining(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, _control: Any, **__: Any) -> None:
            if state.is_world_process_zero:
                bar(state.global_step, state.max_steps)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
            if not state.is_world_process_zero:
                return
            step = f"step {state.global_step:,}/{state.max_steps:,}"
            if "eval_loss" in logs:
                line(f"{step}  held-out loss {logs['eval_loss']:.4f}")
            elif "loss" in logs and sys.stderr.isatty():
                bar(state.global_step, state.max_steps, loss=f"{logs['loss']:.3f}")
            elif "loss" in logs:
                line(f"{step}  loss {logs['loss']:.4f}")

    return ShowTraining()


def line(text: str) -> None:
    """A line on stderr that an open progress bar makes room for."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def number(value: float | None) -> str:
    """Four decimals; a dash for what is undefined (the standard error of one row)."""
    return "–" if value is None else f"{value:.4f}"


def estimate(value: dict[str, Any]) -> str:
    mean, error = value["mean"], value["standard_error"]
    if mean is None:
        return "no number"
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"
