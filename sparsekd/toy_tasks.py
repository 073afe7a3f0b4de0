"""Figures 2b and 2c: students of a small classifier, trained by cross-entropy and by three kinds of distillation.

Shapes: B examples of a batch, C classes. A task is a stream of labelled examples and a network; the methods are the
public functions that a language model's student would be trained with.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd import plots
from sparsekd.metrics import CalibrationBins, token_losses, top1
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, Settings, Table, over, shown

Batch = tuple[Tensor, Tensor]  # inputs, labels [B]
TOP_K, ROUNDS = 7, 50  # app. K
CE, FULL, TOPK, RS = "CE", "FullKD", f"Top-K {TOP_K}", f"Random sampling {ROUNDS}"
PAINT = {"Teacher": "ink", CE: "ce", FULL: "full-kd", TOPK: "topk", RS: "rs"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Labelled examples and how to learn them.

    Attributes:
        classes: how many labels there are.
        stream: generator -> endless training batches.
        heldout: generator -> batches to judge on, not seen in training.
        network: width -> an untrained classifier.
        teacher_width, student_width: of the networks.
        teacher_steps, steps: training steps of the teacher, which should know more than students can learn, and theirs.
        rate: peak learning rate.
    """

    classes: int
    stream: Callable[[torch.Generator], Iterator[Batch]]
    heldout: Callable[[torch.Generator], Iterator[Batch]]
    network: Callable[[int], nn.Module]
    teacher_width: int
    student_width: int
    teacher_steps: int
    steps: int
    rate: float = 2e-3


# -- methods: (student's logits, teacher's logits, labels, seed, step) -> loss


def _cross_entropy(logits: Tensor, teacher: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


def _full(logits: Tensor, teacher: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    return skd.full_kl(logits, teacher)


def _top_k(logits: Tensor, teacher: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    return skd.sparse_kl(logits, skd.sample(teacher, "top_k", k=TOP_K))


def _random_sampling(logits: Tensor, teacher: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    rows = torch.full((len(teacher),), step)
    return skd.sparse_kl(logits, skd.sample(teacher, "random_sampling", rounds=ROUNDS, seed=seed, rows=rows))


METHODS = {CE: _cross_entropy, FULL: _full, TOPK: _top_k, RS: _random_sampling}


# -- training and judging


def fit_teacher(task: Task, seed: int = 10_000) -> nn.Module:
    """The teacher, by cross-entropy, from another seed than its students."""
    return _fit(task, task.teacher_width, task.teacher_steps, seed, _cross_entropy, None)


def fit_student(task: Task, seed: int, method: str, teacher: nn.Module) -> nn.Module:
    """A student by one of METHODS. Students of a seed have the same start and see the same batches."""
    return _fit(task, task.student_width, task.steps, seed, METHODS[method], teacher)


def _fit(
    task: Task, width: int, steps: int, seed: int, loss: Callable[..., Tensor], teacher: nn.Module | None
) -> nn.Module:
    """A network trained by AdamW on a cosine schedule."""
    torch.manual_seed(seed)
    network = task.network(width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=task.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))
    stream = task.stream(torch.Generator().manual_seed(seed))
    for step in range(steps):
        inputs, labels = next(stream)
        with torch.no_grad():
            teacher_logits = inputs if teacher is None else teacher(inputs)
        optimizer.zero_grad()
        loss(network(inputs), teacher_logits, labels, seed, step).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 25)
    return min(1.0, (step + 1) / warm) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def judge(task: Task, network: nn.Module, teacher: nn.Module, seed: int) -> dict[str, Any]:
    """Accuracy, loss in nats, ECE and reliability bins on held-out data; of the teacher, the mass outside its top 7
    and the expected number of unique ids in 50 draws.
    """
    bins, correct, losses, beyond, kept, count = CalibrationBins(), 0, 0.0, 0.0, 0.0, 0
    for inputs, labels in task.heldout(torch.Generator().manual_seed(1_000_003 + seed)):
        logits = network(inputs)
        confidence, right = top1(logits, labels)
        bins.add(confidence, right)
        correct, count = correct + int(right.sum()), count + len(labels)
        losses += float(token_losses(logits, labels).sum())
        target = teacher(inputs).softmax(-1)
        beyond += float((1 - target.topk(min(TOP_K, task.classes)).values.sum(-1)).sum())
        kept += float((1 - (1 - target) ** ROUNDS).sum())
    calibration = bins.result()
    shares = [dataclasses.asdict(b) for b in calibration.reliability]
    surplus = sum(b.count * ((b.confidence or 0) - (b.accuracy or 0)) for b in calibration.reliability)
    return {
        "accuracy": 100 * correct / count,
        "loss": losses / count,
        "ece": 100 * calibration.ece,
        "over": 100 * surplus / count,
        "beyond": 100 * beyond / count,
        "kept": kept / count,
        "bins": shares,
    }


def compare(task: Task, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """{"Teacher" or a method: what `judge` says, one for each seed}. All students learn from one teacher."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PAINT}
    teacher = fit_teacher(task)
    for seed in range(settings.seeds):
        found["Teacher"].append(judge(task, teacher, teacher, seed))
        for name in METHODS:
            found[name].append(judge(task, fit_student(task, seed, name, teacher), teacher, seed))
        eces = ", ".join(f"{name} {runs[-1]['ece']:.1f}" for name, runs in found.items())
        settings.say(f"  seed {seed}: ECE in %: {eces}")
    return found


def result_of(found: Mapping[str, list[dict[str, Any]]], scale: str) -> Result:
    """The table, the findings and the reliability diagrams of `compare`."""
    columns = (
        Column(name="Accuracy", unit="%", form=".1f"),
        Column(name="Held-out loss", unit="nats", form=".3f"),
        Column(name="ECE", unit="%", form=".2f"),
        Column(name="Over-confidence", unit="points", form=".2f"),
    )
    keys = ("accuracy", "loss", "ece", "over")
    rows = {name: tuple(over(run[key] for run in runs) for key in keys) for name, runs in found.items()}
    panels = {
        name: {"bins": _pool([run["bins"] for run in runs]), "ece": sum(run["ece"] for run in runs) / len(runs)}
        for name, runs in found.items()
    }
    return Result(
        ours=Table(columns=columns, rows=rows),
        scale=scale,
        findings=_findings(found, rows),
        data={"panels": panels, "paint": PAINT},
    )


def _pool(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The seeds' reliability bins as one: every example counts alike."""
    pooled = []
    for bins in zip(*runs, strict=True):
        count = sum(b["count"] for b in bins)
        mean = {
            k: sum(b["count"] * (b[k] or 0) for b in bins) / count if count else None
            for k in ("confidence", "accuracy")
        }
        pooled.append({"count": count, **mean})
    return pooled


def _findings(found: Mapping[str, list[dict[str, Any]]], rows: Mapping[str, Any]) -> tuple[Finding, ...]:
    beyond, kept = (sum(run[key] for run in found["Teacher"]) / len(found["Teacher"]) for key in ("beyond", "kept"))
    ece = {name: cells[2].mean for name, cells in rows.items()}
    above = _paired(found, "over", TOPK, FULL)
    worse, apart = _paired(found, "ece", TOPK, FULL), _paired(found, "ece", RS, FULL)
    return (
        Finding(
            text=f"Top-K makes the student over-confident: by {rows[TOPK][3].mean:.1f} points, {_said(above)} against "
            f"FullKD's. Its targets leave out {beyond:.0f} % of the teacher's mass.",
            holds=rows[TOPK][3].mean > 0 and above.mean > 2 * (above.standard_error or 0),
        ),
        Finding(
            text=f"Its calibration error is {ece[TOPK]:.1f} %, {_said(worse)} points against FullKD's {ece[FULL]:.1f}.",
            holds=worse.mean > 2 * (worse.standard_error or 0),
        ),
        Finding(
            text=f"Random sampling is calibrated like FullKD: ECE {ece[RS]:.1f} % against {ece[FULL]:.1f} %, a "
            f"difference of {_said(apart)} where Top-K's is {worse.mean:+.1f}.",
            holds=abs(apart.mean) < 0.2 * worse.mean,
        ),
        Finding(
            text=f"CE and FullKD are nearly calibrated: ECE {ece[CE]:.1f} % and {ece[FULL]:.1f} %.",
            holds=max(ece[CE], ece[FULL]) < 0.5 * ece[TOPK],
        ),
        Finding(
            text=f"Accuracy: {', '.join(f'{name} {rows[name][0].mean:.1f} %' for name in METHODS)}. Top-K's differs "
            f"from FullKD's by {_said(_paired(found, 'accuracy', TOPK, FULL))} points.",
        ),
        Finding(
            text=f"App. K sets {ROUNDS} draws against K = {TOP_K}: here they keep {kept:.1f} unique classes, "
            f"{kept / TOP_K:.1f} times Top-K's budget.",
        ),
    )


def _paired(found: Mapping[str, list[dict[str, Any]]], key: str, a: str, b: str) -> Cell:
    """a - b, seed by seed."""
    cell = over(x[key] - y[key] for x, y in zip(found[a], found[b], strict=True))
    assert cell is not None
    return cell


def _said(cell: Cell) -> str:
    return shown(cell, "+.1f").replace("± +", "± ")


def plot_panels(result: Result) -> Any:
    """Reliability diagrams side by side: accuracy against confidence, the gap to the diagonal shaded."""
    panels = list(result.data["panels"].items())
    width, height, gap, left = 184, 184, 12, 44
    with plots.canvas(920, height + 78, left=left, right=0, bottom=44, top=34) as (figure, whole):
        whole.remove()
        total_w, total_h = left + len(panels) * (width - gap) + 8, height + 78
        for index, (name, panel) in enumerate(panels):
            box = (
                (left + index * (width - gap)) / total_w,
                44 / total_h,
                (width - 2.4 * gap) / total_w,
                height / total_h,
            )
            axes = figure.add_axes(box)
            plots.reliability_axes(axes, panel["bins"], plots.PALETTE[PAINT[name]])
            axes.text(0, 1.06, name, transform=axes.transAxes, color=plots.PALETTE[PAINT[name]], fontweight="bold")
            axes.text(0.06, 0.9, f"ECE {panel['ece']:.1f} %", color=plots.PALETTE["ink"], va="center")
            plots.axis_names(axes, "confidence", "accuracy" if not index else "")
            axes.set_yticklabels(["0", "½", "1"] if not index else [])
    return figure


# -- figure 2b: points around class centres


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussians:
    """Sizes of the synthetic classification; app. K: 1024 classes, 128 dimensions, sigma 1.5, 20,000 steps of 4096."""

    classes: int
    dimensions: int
    sigma: float
    batch: int
    steps: int
    heldout: int


SIZES_2B = {
    "quick": Gaussians(classes=128, dimensions=16, sigma=1.0, batch=128, steps=1200, heldout=160),
    "full": Gaussians(classes=1024, dimensions=128, sigma=1.5, batch=1024, steps=8000, heldout=100),
}


def gaussian_task(size: Gaussians) -> Task:
    """Class centres uniform in the unit cube, each class with its own spread up to sigma, as in app. K."""
    generator = torch.Generator().manual_seed(1234)
    centres = torch.rand(size.classes, size.dimensions, generator=generator)
    spreads = torch.rand(size.classes, 1, generator=generator) * size.sigma

    def stream(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            labels = torch.randint(size.classes, (size.batch,), generator=generator)
            noise = torch.randn(size.batch, size.dimensions, generator=generator)
            yield centres[labels] + noise * spreads[labels], labels

    def network(width: int) -> nn.Module:
        layers = [nn.Linear(size.dimensions, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(width, size.classes))

    return Task(
        classes=size.classes,
        stream=stream,
        heldout=lambda generator: itertools.islice(stream(generator), size.heldout),
        network=network,
        teacher_width=128,
        student_width=96,
        teacher_steps=2 * size.steps,
        steps=size.steps,
        rate=4e-3,
    )


def fig2b(folder: Path, settings: Settings) -> Result:
    """A 3-layer MLP on Gaussian classes, as app. K trains it, for each method and seed."""
    size = SIZES_2B[settings.profile]
    scale = (
        f"Here {size.classes:,} classes in {size.dimensions} dimensions, sigma {size.sigma}, {size.steps:,} steps of "
        f"{size.batch:,} points, cosine schedule, {settings.seeds} seeds. App. K: 1,024 classes in "
        "128 dimensions, sigma 1.5, 20,000 steps of 4,096 points, one seed; its plot prints no numbers."
    )
    return result_of(compare(gaussian_task(size), settings), scale)


FIG_2B = Reproduction(
    title="Calibration on a synthetic classification",
    source="fig. 2b, section 2.2, app. B, app. K",
    claim="Students of Top-K targets are over-confident; those of cross-entropy, of the full distribution and of "
    "random sampling are almost perfectly calibrated.",
    run=fig2b,
    plot=plot_panels,
)
