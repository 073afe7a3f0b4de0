"""The command line: thin verbs over the programs.

    sparsekd VERB [-c recipe.yaml] [key=value ...]

The same keys in YAML and on the command line. A user's error is one sentence and exit code 2, without a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from sparsekd.console import Bar, capture_progress, estimate, listed, many, number, show_training, speaks
from sparsekd.errors import SparseKDError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sparse offline knowledge distillation: run the teacher once, train any number of students from its cache.",
)

Recipe = Annotated[str | None, typer.Option("--config", "-c", metavar="FILE", help="A recipe in YAML.")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings, over those of the recipe.")]
# What the verbs of --help stand under.
CACHE, AGAIN, STUDENT, JUDGE, WHOLE = "A cache", "Caches from caches", "Students", "Judging", "All of it, and pages"
ShowSettings = Annotated[
    bool, typer.Option("--settings", help="List all settings with their defaults and meaning, and stop.")
]


def _example(verb: str, settings: str) -> str:
    return f"For example: sparsekd {verb} {settings}. All settings: sparsekd {verb} --settings"


@app.command(
    epilog=_example("pack", "source=corpus/*.jsonl tokenizer=train seq_len=256 out=rows"), rich_help_panel=CACHE
)
def pack(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Documents -> rows: tokenise, shuffle, join and cut to seq_len; train and held-out splits."""
    manifest = _run("pack", config, settings, show)
    for name, split in manifest["splits"].items():
        print(f"{name:>8}: {split['rows']:,} rows, {split['tokens']:,} tokens, {many(split['documents'], 'document')}")
    if any(manifest["skipped"].values()):
        print("left out: " + listed({why: count for why, count in manifest["skipped"].items() if count}))


@app.command(epilog=_example("repack", "rows=rows tokenizer=OTHER out=other-rows"), rich_help_panel=CACHE)
def repack(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Rows -> the same rows, text for text, in another tokenizer's tokens: for a second teacher, or a student."""
    with Bar("row") as progress:
        manifest = _run("repack", config, settings, show, progress=progress)
    for name, split in manifest["splits"].items():
        empty = ", ".join(
            f"{count:,} left empty ({why.replace('_', ' ')})" for why, count in split["empty"].items() if count
        )
        print(
            f"{name:>8}: {split['rows']:,} rows of {manifest['seq_len']}, {split['tokens']:,} tokens"
            + (f"; {empty}" if empty else "")
        )


@app.command(epilog=_example("plan", "rows=rows teacher=MODEL tokens=1e10 out=plan"), rich_help_panel=CACHE)
def plan(
    config: Recipe = None,
    settings: Settings = None,
    show: ShowSettings = False,
    fidelity: Annotated[str | None, typer.Option(help="paper: as exact as 50 draws with replacement.")] = None,
    angle: Annotated[float | None, typer.Option(help="At most so many degrees from the full gradient.")] = None,
    budget_gb: Annotated[float | None, typer.Option(help="The best that fits so many gigabytes.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw fidelity against bytes.")] = False,
) -> None:
    """Rows + teacher -> what each sampler would cost and err, the cheapest that will do, and its capture recipe."""
    from sparsekd.plan import plan_text

    goals = {"fidelity": fidelity, "angle": angle, "budget_gb": budget_gb, "plot": "true" if plot else None}
    words = [*(settings or []), *(f"{name}={value}" for name, value in goals.items() if value is not None)]
    with Bar("row") as progress:
        result = _run("plan", config, words, show, progress=progress)
    print(plan_text(result))
    print(f"\nthe choice's recipe: sparsekd capture -c {result['recipe']}")


@app.command(epilog=_example("capture", "rows=rows teacher=MODEL out=cache sampler.rounds=50"), rich_help_panel=CACHE)
def capture(
    config: Recipe = None,
    settings: Settings = None,
    show: ShowSettings = False,
    shard_range: Annotated[str | None, typer.Option(metavar="a:b", help="Make only shards a .. b-1.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write although the disk looks too small.")] = False,
) -> None:
    """Rows -> cache: run the teacher once, draw sparse targets, write shards. Run again to resume."""
    words = list(settings or [])
    words += [f"shard_range={shard_range}"] if shard_range else []
    words += ["force=true"] if force else []
    with Bar("tok") as progress:
        manifest = _run("capture", config, words, show, progress=capture_progress(progress))
    if manifest is not None and "tensor_parallel_size" in manifest["spec"]["capture"] and not speaks():
        return
    if manifest is None:
        print("this worker's shards are made; others are still missing: the cache is complete when they are")
    else:
        stats, size = manifest["stats"], sum(shard["bytes"] for shard in manifest["shards"])
        print(
            f"{stats['tokens']:,} tokens, {stats['pairs'] / max(stats['positions'], 1):.1f} ids and "
            f"{size / stats['tokens']:.1f} bytes per token in {len(manifest['shards'])} shards"
        )


@app.command(rich_help_panel=CACHE)
def inspect(
    folder: Annotated[str, typer.Argument(help="A cache (a folder or URL), or a folder of packed rows.")],
    row: Annotated[int | None, typer.Option(help="Show this row as text, a cache's with its targets.")] = None,
    positions: Annotated[
        int | None, typer.Option(min=1, help="How many positions of the row; default: 24 of a cache, else all.")
    ] = None,
) -> None:
    """What is in a cache, or in packed rows, in words and numbers; with --row, one row as text (and its targets)."""
    from sparsekd.inspect import describe

    print(describe(folder, row, positions))


@app.command(rich_help_panel=CACHE)
def verify(
    cache: Annotated[str, typer.Argument(help="A cache folder or URL.")],
    teacher: Annotated[str | None, typer.Option(help="Recompute rows with this teacher and compare.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many random rows to recompute.")] = 16,
) -> None:
    """Check every byte of a cache; with --teacher, draw random rows again and compare bit for bit."""
    from sparsekd.cache import CacheReader
    from sparsekd.cache import verify as verify_cache

    with Bar("shard") as progress:
        report = verify_cache(cache, progress=progress)
    for problem in report.problems:
        print(f"  {problem}")
    if report.problems:
        _fail(f"{cache}: {len(report.problems)} problems in {report.shards} shards; run the same capture to mend them")
    if speaks():
        print(f"{cache}: {report.shards} shards, {report.rows:,} rows, every checksum holds")
    if teacher is not None:
        from sparsekd.recompute import recompute
        from sparsekd.vocab import quiet_transformers

        quiet_transformers()
        with CacheReader(cache) as reader:
            found = recompute(reader, teacher, rows)
        if not speaks():
            return
        if found["differing"] == 0:
            print(f"{found['rows']} rows drawn again from {teacher}: identical bit for bit")
        else:
            print(
                f"{found['rows']} rows drawn again from {teacher}: {found['identical']} identical; "
                f"{found['differing'] / found['positions']:.2%} of positions differ, mean total variation "
                f"{found['drift']:.2e} (other hardware, software or tensor_parallel_size moves the last bits of logits)"
            )


@app.command(epilog=_example("merge", "CACHE CACHE out=cache"), rich_help_panel=AGAIN)
def merge(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Caches of the same rows with different seeds -> one cache of all their draws, without loss."""
    caches = [word for word in settings or [] if "=" not in word]
    words = [word for word in settings or [] if "=" in word] + ([f"caches={json.dumps(caches)}"] if caches else [])
    with Bar("shard") as progress:
        manifest = _run("merge", config, words, show, progress=progress)
    sampler, stats = manifest["spec"]["sampler"], manifest["stats"]
    print(
        f"{' + '.join(map(str, sampler['parts']))} = {sampler['rounds']} rounds, "
        f"{stats['pairs'] / max(stats['positions'], 1):.1f} ids per token"
    )


@app.command(
    epilog=_example("misalign", "cache=cache rows=other out=misaligned i_know_this_is_misaligned=true"),
    rich_help_panel=AGAIN,
)
def misalign(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Cache -> the same tokens packed otherwise, with targets of the wrong contexts: to measure what that costs."""
    with Bar("shard") as progress:
        fates = _run("misalign", config, settings, show, progress=progress)
    dropped = {name.removeprefix("dropped_"): count for name, count in fates.items() if name.startswith("dropped_")}
    print(f"{fates['carried']:,} targets carried to other contexts; dropped: " + listed(dropped))


@app.command(epilog=_example("transcode", "CACHE tokenizer=STUDENT out=transcoded"), rich_help_panel=AGAIN)
def transcode(
    cache: Annotated[str | None, typer.Argument(help="A cache folder; or cache=FOLDER among the settings.")] = None,
    settings: Settings = None,
    config: Recipe = None,
    show: ShowSettings = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what it costs, on some rows.")] = False,
) -> None:
    """Cache -> cache in another tokenizer's vocabulary, without the teacher. Run again to resume."""
    words = [cache if "=" in cache else f"cache={cache}"] if cache else []
    words += [*(settings or []), *(["dry_run=true"] if dry_run else [])]
    with Bar("shard") as progress:
        result = _run("transcode", config, words, show, progress=progress)
    for name, value in result["survey"].items():
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        print(f"{name.replace('_', ' '):>25}  {shown.lower()}")
    if "manifest" in result:
        stats = result["manifest"]["stats"]
        print(f"{stats['positions']:,} positions with {stats['pairs'] / max(stats['positions'], 1):.1f} ids each")


@app.command(epilog=_example("pool", "caches=[A, B] weights=[0.7, 0.3] out=pooled"), rich_help_panel=AGAIN)
def pool(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Caches of several teachers on the same rows -> one, the weighted mean of their targets. Run again to resume."""
    with Bar("shard") as progress:
        stats = _run("pool", config, settings, show, progress=progress)["stats"]
    print(f"{stats['positions']:,} positions with {stats['pairs'] / max(stats['positions'], 1):.1f} ids each")


@app.command(epilog=_example("adapt", "teacher=MODEL rows=rows out=adapted"), rich_help_panel=STUDENT)
def adapt(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Teacher + rows -> a teacher fine-tuned on them, to capture from instead. Run again to resume."""
    with Bar("step") as progress:
        metrics = _run("adapt", config, settings, show, progress=False, callbacks=lambda: [show_training(progress)])
    print(
        f"adapted in {metrics['steps']:,} steps, {metrics['tokens']:,} tokens, train loss {metrics['train_loss']:.3f}"
    )


@app.command(epilog=_example("train", "cache=cache student=tiny out=student eval_rows=rows"), rich_help_panel=STUDENT)
def train(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Cache -> student: transformers' Trainer on the cache alone. Run again to resume."""
    with Bar("step") as progress:
        metrics = _run("train", config, settings, show, progress=False, callbacks=lambda: [show_training(progress)])
    if not speaks():
        return
    print(
        f"{metrics['method']}: {metrics['steps']:,} steps, {metrics['tokens']:,} tokens, "
        f"train loss {metrics['train_loss']:.3f}, {metrics['tokens_per_second'] or 0:,.0f} tokens/s"
    )


@app.command(epilog=_example("evaluate", "model=student rows=rows teacher=MODEL"), rich_help_panel=JUDGE)
def evaluate(
    config: Recipe = None,
    settings: Settings = None,
    show: ShowSettings = False,
    names: Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="The same as `sparsekd tasks`.")] = None,
) -> None:
    """Model + held-out rows -> evaluation.json: loss, bits per byte, calibration, speculative acceptance."""
    if names is not None:
        return tasks(config, [*(settings or []), f"tasks={names}"], show)
    with Bar("row") as progress:
        result = _run("evaluate", config, settings, show, progress=progress)
    for name in ("loss", "accuracy", "acceptance", "agreement", "teacher_kl"):
        if name in result:
            print(f"{name:>15}  {number(result[name]['mean'])} ± {number(result[name]['standard_error'])}")
    for name in ("perplexity", "bits_per_byte", "ece"):
        print(f"{name:>15}  {number(result[name])}")


@app.command(
    epilog=_example("judge", "model=student prompts=dolly.jsonl judge_model=NAME out=judged"), rich_help_panel=JUDGE
)
def judge(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Model + prompts -> judge.json: responses rated beside the ground truth by a chat endpoint; resumes."""
    with Bar("answer") as progress:
        result = _run("judge", config, settings, show, progress=progress)
    error, counts = result["score"]["standard_error"], result["counts"]
    print(f"score {result['score']['mean']:.1%}" + (f" ± {error:.1%}" if error is not None else ""))
    names = ("prompts", "rated", "malformed", "failed", "empty_responses", "cut_off_responses")
    print(", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in names))


@app.command(epilog=_example("answer", "model=student prompts=questions.jsonl out=answers"), rich_help_panel=JUDGE)
def answer(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Model + prompts -> answers.jsonl (greedy text, which `pack` reads) and answers.json: F1, Rouge-Lsum."""
    with Bar("answer") as progress:
        result = _run("answer", config, settings, show, progress=progress)
    for name in ("f1", "exact_match", "rouge_lsum"):
        if name in result:
            print(f"{name:>12}  {estimate(result[name])}")
    counts = result["counts"]
    print(f"{many(counts['answers'], 'answer')}, {counts['empty']:,} empty, {counts['cut_off']:,} cut off")


@app.command(epilog=_example("tasks", "model=student tasks=hellaswag,piqa"), rich_help_panel=JUDGE)
def tasks(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Model -> tasks.json: zero-shot tasks of lm-eval, or of a folder of your own (include_path=FOLDER)."""
    result = _run("tasks", config, settings, show)
    for name, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            print(f"{name:>24}  {metric:<16} {estimate(value)}")
    if result["average"] is not None:
        print(f"{'average':>24}  {'':<16} {estimate(result['average'])}")


@app.command(
    epilog=_example("speculate", "teacher=MODEL student=student rows=rows draft_length=4"), rich_help_panel=JUDGE
)
def speculate(config: Recipe = None, settings: Settings = None, show: ShowSettings = False) -> None:
    """Teacher + student -> speculate.json: drafts accepted, expected and in real generation, and the speed-up."""
    with Bar("prompt") as progress:
        result = _run("speculate", config, settings, show, progress=progress)
    measured, speed = result["measured"], result["speed"]
    expected = result["expected"]["teacher_text"]["tokens_per_call"]
    print(f"     drafts accepted  {estimate(measured['acceptance'])} (on the rows {estimate(result['acceptance'])})")
    print(f"     tokens per call  {measured['tokens_per_call']:.4f} (expected {expected:.4f})")
    print(
        f"            speed-up  {estimate(speed['speedup'])} (a draft costs {speed['student_cost']:.2f} teacher steps)"
    )


@app.command(rich_help_panel=WHOLE)
def report(
    folder: Annotated[
        str, typer.Argument(help="A folder that `sparsekd demo` made, or one of students that were evaluated.")
    ] = "demo",
) -> None:
    """A run's JSON files -> report.html, one self-contained page, and report.json."""
    from sparsekd.report import report as write_report
    from sparsekd.report import terminal_table

    print(terminal_table(write_report(folder)))
    print(f"wrote {folder}/report.html")


@app.command(rich_help_panel=WHOLE)
def reproduce(
    names: Annotated[str, typer.Argument(help="fig2a, table1, ... (several joined by commas), or all.")] = "all",
    settings: Settings = None,
    config: Recipe = None,
    show: ShowSettings = False,
    teacher: Annotated[str | None, typer.Option(help="Your own teacher, with --rows.")] = None,
    rows: Annotated[str | None, typer.Option(help="Your own packed rows.")] = None,
) -> None:
    """The paper's figures and tables beside its numbers: result.json, PNG and one page, index.html."""
    words = [f"name={names}", *(settings or [])]
    words += [f"{key}={value}" for key, value in (("teacher", teacher), ("rows", rows)) if value]
    _run("reproduce", config, words, show)


@app.command(rich_help_panel=WHOLE)
def demo(
    out: Annotated[str | None, typer.Argument(help="Where everything goes; or out=FOLDER.")] = None,
    settings: Settings = None,
    config: Recipe = None,
    show: ShowSettings = False,
    profile: Annotated[
        str | None, typer.Option(help="smoke, quick (about 7 CPU-minutes, the default) or full (about 25).")
    ] = None,
) -> None:
    """Everything on real text: tokenizer, teacher, caches, students of every method, report.html."""
    words = [out if "=" in out else f"out={out}"] if out else []
    words += [*(settings or []), *([f"profile={profile}"] if profile else [])]
    _run("demo", config, words, show)


def _run(
    verb: str,
    config: str | None,
    words: list[str] | None,
    show: bool,
    callbacks: Callable[[], list[Any]] | None = None,
    **more: Any,
) -> Any:
    """Read the recipe and call the program; `callbacks` makes what needs transformers, once the recipe is sound."""
    from sparsekd import recipes
    from sparsekd.vocab import quiet_transformers

    if show:
        print(f"settings of {verb}, in YAML as key: value, on the command line as key=value\n")
        print(recipes.settings_text(verb))
        raise typer.Exit
    values = recipes.read_recipe(verb, config, words or [])
    quiet_transformers()
    if callbacks is not None:
        more["callbacks"] = callbacks()
    return recipes.stage(verb)(**values, **more)


def _fail(message: str) -> None:
    print(f"sparsekd: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """The console script: our errors as one sentence and exit code 2, Ctrl-C as 130."""
    try:
        code = app(standalone_mode=False, prog_name="sparsekd")
        if code == 130:  # newer typers turn Ctrl-C into this
            raise KeyboardInterrupt
        if code:
            raise SystemExit(code)
    except SparseKDError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        print("\nsparsekd: interrupted; what is written is kept, run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `sparsekd inspect ... | head`: nobody reads on, the flush at exit included
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    except OSError as error:  # a file that went away, a right that is missing, a full disk
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except Exception as error:
        if not type(error).__module__.startswith(("click", "typer")):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is its message
            raise SystemExit(2) from None
        _fail(_usage(error))


def _usage(error: Any) -> str:
    """A usage error of the command line itself, with where to read on."""
    from sparsekd.recipes import STAGES

    path = getattr(getattr(error, "ctx", None), "command_path", "sparsekd")
    message = (error.format_message() if hasattr(error, "format_message") else str(error)).rstrip(".?")
    option = getattr(error, "option_name", None)
    if option and path.split()[-1] in STAGES:
        message += f"; settings have no dashes: {option.lstrip('-').replace('-', '_')}=VALUE"
    return f"{message}; {path} --help shows what there is"
