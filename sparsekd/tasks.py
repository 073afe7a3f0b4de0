"""Zero-shot tasks (paper, appendix E.1): multiple choice, cloze and perplexity tasks through lm-eval.

A task of your own is a YAML file in a folder, given as include_path=FOLDER, with its questions in a JSONL file:

    task: riddles                                 # the name for tasks=riddles
    dataset_path: json
    dataset_kwargs: {data_files: {test: /absolute/path/riddles.jsonl}}
    test_split: test
    output_type: multiple_choice                  # or loglikelihood, loglikelihood_rolling, generate_until
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"                  # {"question": "...", "choices": ["...", "..."], "answer": 0}
    doc_to_target: answer
    metric_list: [{metric: acc}, {metric: acc_norm}]

Such a task needs no network. A YAML file can name Python functions, which run: include folders that you trust.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsekd import models, vocab
from sparsekd.checks import check_at_least, make_folder
from sparsekd.errors import ModelError, RecipeError, SourceError
from sparsekd.files import write_atomically

# The paper's five (appendix L); its 0-shot score is their mean.
PAPER_TASKS = "arc_easy,hellaswag,lambada_openai,lambada_standard,piqa"
# The score of a task is the first of these that it reports: accuracy by log-likelihood per character where it has one.
SCORES = ("acc_norm", "acc", "exact_match")
_BOOTSTRAP = 1000  # resamples for the standard errors that have no formula (perplexity)


def run_tasks(
    *,
    model: str,
    tasks: str | list[str] = PAPER_TASKS,
    include_path: str | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
) -> dict[str, Any]:
    """Measure `model` on tasks of lm-eval, or of a folder of your own; also written to `out/tasks.json`.

    Args:
        model: a folder that comes with its tokenizer, or a hub id.
        tasks: names, separated by commas or as a list (default: those of the paper).
        include_path: folder of YAML tasks, which go before lm-eval's of the same name.
        out: folder for tasks.json (default: the model's, when it is a folder).
        limit: only the first questions of each task; for a quick look, not for numbers to report.
        num_fewshot: solved questions put before each one; a task that sets 0 itself stays at 0.
        batch_size: requests of a forward pass; changes no result beyond rounding.
        dtype: of the model: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        tasks: by task (and group), each metric as {mean, standard_error}, without an error where lm-eval has none;
        average: the mean of the tasks' scores, its standard_error, and which metric each score is (`SCORES`); tasks
            without any of these, such as perplexities, stay out; None when no task has one;
        questions: by task; settings: of this run, with lm-eval's version.

    Raises:
        RecipeError: lm-eval is not installed, an unknown task, a size below 1.
        SourceError: a task's data cannot be read: no network, or a file that is missing.
        ModelError: a model that cannot be opened, or that comes without a tokenizer.
    """
    check_at_least(1, limit=limit, batch_size=batch_size)
    check_at_least(0, num_fewshot=num_fewshot)
    _check_installed()
    names = _names(tasks)
    with _quiet():
        manager = _manager(names, include_path)
        loaded = [_load(manager, name) for name in names]
        found = _simple_evaluate(_wrap(model, dtype, device, batch_size), loaded, manager, limit, num_fewshot)
    result = _result(found) | {
        "settings": {
            "model": model,
            "tasks": names,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "dtype": dtype,
            "lm_eval": _version(),
        }
    }
    target = Path(out) if out else Path(model) if Path(model).is_dir() else None
    if target is not None:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_atomically(make_folder(target) / "tasks.json", text.encode())
    return result


# --- lm-eval ---------------------------------------------------------------------------------------------


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"tasks need the package lm-eval ({error}): pip install 'sparsekd[eval]'") from error


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _names(tasks: str | list[str]) -> list[str]:
    words = tasks.split(",") if isinstance(tasks, str) else tasks
    names = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not names:
        raise RecipeError(f"tasks={tasks!r} names no task; give some, such as tasks={PAPER_TASKS}")
    return names


def _manager(names: list[str], include_path: str | None) -> Any:
    """The index of tasks: the folder's alone when it has all names, because lm-eval's 14,000 take seconds to read."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else Path(include_path).expanduser()
    if folder is not None:
        if not folder.is_dir():
            raise RecipeError(f"include_path={include_path} is no folder; give one with YAML files of tasks")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            raise RecipeError(_unknown(name, manager.all_tasks, include_path))
    return manager


def _unknown(name: str, known: list[str], include_path: str | None) -> str:
    near = difflib.get_close_matches(name, known, n=3) or [each for each in known if each.startswith(name)][:3]
    hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
    where = "" if include_path is None else f" or in {include_path}"
    return f"there is no task {name!r} in lm-eval {_version()}{where}; {hint}"


def _load(manager: Any, name: str) -> Any:
    """A task with its data; whatever goes wrong there is the data's fault, named by the task."""
    try:
        loaded = manager.load([name])
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # datasets, hub, YAML, file and Python errors of a task's own code: no common class
        raise SourceError(f"cannot load the data of task {name!r}: {_first_line(error)}; {_way_out(error)}") from error
    top = loaded["groups"].get(name) or loaded["tasks"].get(name)
    return [top] if top is not None else list(loaded["tasks"].values())  # a tag stands for several tasks


def _way_out(error: Exception) -> str:
    offline = any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    if isinstance(error, FileNotFoundError):
        return "give data_files as absolute paths of files that exist"
    if isinstance(error, ConnectionError) or "offline" in str(error).lower():
        setting = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set" if offline else "there is no way to the hub"
        return f"{setting}: run it once with a network, or give tasks of your own by include_path=FOLDER"
    return "look at the task's YAML file and its data"


def _wrap(model: str, dtype: str, device: str | None, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    opened = models.open_model(model, dtype=dtype, device=device)
    try:
        tokenizer = vocab.load_tokenizer(model)
    except SourceError as error:
        raise ModelError(f"{model} comes without a tokenizer that can be read ({error}); tasks are text") from error
    return HFLM(pretrained=opened, tokenizer=tokenizer, batch_size=batch_size)


def _simple_evaluate(wrapped: Any, loaded: list[Any], manager: Any, limit: int | None, num_fewshot: int) -> Any:
    import lm_eval

    return lm_eval.simple_evaluate(
        model=wrapped,
        tasks=[each for several in loaded for each in several],
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=False,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's remarks go to stderr, its log only from errors on, and no processes are forked for resampling."""
    logger, multiprocessing = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's own switch; a fork of a process with threads can hang
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if multiprocessing is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = multiprocessing


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


# --- results ---------------------------------------------------------------------------------------------


def _result(found: dict[str, Any]) -> dict[str, Any]:
    tasks = {name: _metrics(values) for name, values in found["results"].items()}
    groups = {name for name, members in found.get("group_subtasks", {}).items() if members}
    return {
        "tasks": tasks,
        "average": _average({name: metrics for name, metrics in tasks.items() if name not in groups}),
        "questions": {name: counts["effective"] for name, counts in found["n-samples"].items()},
    }


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...} as {"acc": {mean, standard_error}}.

    What lm-eval reports after a filter of its answers keeps the filter's name: "exact_match,strict".
    """
    found = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            found[name] = {"mean": _number(value), "standard_error": _number(error)}
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _average(tasks: dict[str, dict[str, dict[str, float | None]]]) -> dict[str, Any] | None:
    """The mean of the tasks' scores; their errors are independent, so the mean's is √Σe² / n."""
    of = {
        name: metric for name, metrics in tasks.items() if (metric := next((s for s in SCORES if s in metrics), None))
    }
    scores = [tasks[name][metric] for name, metric in of.items()]
    means = [score["mean"] for score in scores if score["mean"] is not None]
    errors = [score["standard_error"] for score in scores if score["standard_error"] is not None]
    if not means or len(means) < len(scores):
        return None
    error = math.sqrt(math.fsum(e * e for e in errors)) / len(means) if len(errors) == len(means) else None
    return {"mean": math.fsum(means) / len(means), "standard_error": error, "of": of}
