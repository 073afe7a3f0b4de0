"""Figure 2c: the calibration of figure 2b on images: CIFAR-100 from the user's files, or striped shapes of our own.

Shapes: B images of a batch, [B, channels, side, side] float32 about zero.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.errors import FormatError, SourceError
from sparsekd.reproduction import Reproduction, Result, Settings
from sparsekd.toy_tasks import Batch, Task, compare, plot_panels, result_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is trained and judged: steps of `batch` images, `heldout` batches of our own images."""

    batch: int
    steps: int
    heldout: int
    teacher_width: int
    student_width: int


SIZES = {
    "quick": Sizes(batch=64, steps=900, heldout=150, teacher_width=20, student_width=14),
    "full": Sizes(batch=128, steps=10_000, heldout=300, teacher_width=48, student_width=32),
}


def convnet(width: int, channels: int, side: int, classes: int) -> nn.Module:
    """Two (from 32 pixels: three) strided convolutions and a linear layer: a few thousand weights."""
    layers: list[nn.Module] = []
    inner = channels
    while side > 4:
        layers += [nn.Conv2d(inner, width, 3, stride=2, padding=1), nn.GELU()]
        inner, width, side = width, 2 * width, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner * side * side, 128), nn.GELU(), nn.Linear(128, classes))


# -- images of our own: stripes of 10 directions and 5 widths, seen through a disc or a ring

SIDE, DIRECTIONS, WIDTHS, WINDOWS = 16, 10, 5, 2
NOISE = 2.4  # a good teacher is right on 45 % and leaves 14 % of its mass outside its top 7
STRIPED = DIRECTIONS * WIDTHS * WINDOWS


def striped(labels: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 1, 16, 16] images of those classes: place, phase and noise differ from image to image.

    Neighbouring directions and widths look alike under the noise, so a good teacher spreads its mass over many classes.
    """
    count = len(labels)
    direction = (labels % DIRECTIONS).float() * (math.pi / DIRECTIONS)
    width = 3.0 * 1.25 ** (labels // DIRECTIONS % WIDTHS).float()
    is_ring = labels // (DIRECTIONS * WIDTHS) == 1
    random = torch.rand(3, count, 1, 1, generator=generator)
    grid = torch.arange(SIDE, dtype=torch.float32) - (SIDE - 1) / 2
    y, x = grid[:, None] + (random[0] - 0.5), grid[None, :] + (random[1] - 0.5)
    along = x * direction.cos()[:, None, None] + y * direction.sin()[:, None, None]
    stripes = (2 * math.pi * (along / width[:, None, None] + 0.15 * random[2])).cos()
    radius = (x**2 + y**2).sqrt()
    window = torch.where(is_ring[:, None, None], ((radius - 5).abs() < 2).float(), (radius < 6.5).float())
    noise = torch.randn(count, SIDE, SIDE, generator=generator) * NOISE
    return (stripes * window + noise)[:, None]


def striped_task(size: Sizes) -> Task:
    """An endless stream of striped shapes in 64 classes."""

    def stream(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            labels = torch.randint(STRIPED, (size.batch,), generator=generator)
            yield striped(labels, generator), labels

    return Task(
        classes=STRIPED,
        stream=stream,
        heldout=lambda generator: itertools.islice(stream(generator), size.heldout),
        network=lambda width: convnet(width, 1, SIDE, STRIPED),
        teacher_width=size.teacher_width,
        student_width=size.student_width,
        teacher_steps=3 * size.steps,
        steps=size.steps,
        rate=4e-3,
    )


# -- CIFAR-100 from the user's files


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """One split: pixels [N, 3, 32, 32] uint8 and labels [N] int64."""

    pixels: Tensor
    labels: Tensor


def read_cifar(folder: str | Path) -> dict[str, Images]:
    """{"train": ..., "test": ...} from the python version's two files, or from train/CLASS/*.png and test/CLASS/*.png.

    Raises:
        SourceError: neither is there, or the two splits name different classes.
        FormatError: a file that is not CIFAR-100's, or a pickle that asks for more than arrays.
    """
    root = Path(folder)
    root = root / "cifar-100-python" if (root / "cifar-100-python").is_dir() else root
    if all((root / split).is_file() for split in ("train", "test")):
        return {split: _read_pickle(root / split) for split in ("train", "test")}
    if all((root / split).is_dir() for split in ("train", "test")):
        return _read_folders(root)
    raise SourceError(
        f"no CIFAR-100 in {folder}: it needs the python version's files train and test, or folders of images "
        "train/CLASS/*.png and test/CLASS/*.png; without data=... fig2c makes images of its own"
    )


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and plain values; a pickle that names any other function or class is refused unread."""

    def find_class(self, module: str, name: str) -> Any:
        import codecs

        import numpy as np

        known = {"_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_pickle(path: Path) -> Images:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        pixels, labels = torch.as_tensor(content[b"data"]), torch.as_tensor(content[b"fine_labels"])
        span = (int(labels.min()), int(labels.max()))
        if pixels.dtype != torch.uint8 or len(labels) != len(pixels) or span[0] < 0 or span[1] > 99:
            found = f"{len(pixels)} images of {pixels.dtype} and {len(labels)} labels ({span[0]} to {span[1]})"
            raise ValueError(f"{found}, where it has bytes and labels 0 to 99")
        return Images(pixels=pixels.reshape(-1, 3, 32, 32), labels=labels.long())
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FormatError(f"{path} is not a file of CIFAR-100's python version: {error}") from None


def _read_folders(root: Path) -> dict[str, Images]:
    classes = {split: sorted(p.name for p in (root / split).iterdir() if p.is_dir()) for split in ("train", "test")}
    if classes["train"] != classes["test"] or not classes["train"]:
        counts = f"{len(classes['train'])} and {len(classes['test'])}"
        raise SourceError(f"the folders in {root}/train and {root}/test differ: {counts} classes; give both the same")
    return {split: _read_classes(root / split, classes[split]) for split in classes}


def _read_classes(folder: Path, classes: list[str]) -> Images:
    import numpy as np
    from PIL import Image

    pixels, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.png")):
            with Image.open(path) as image:
                pixels.append(np.asarray(image.convert("RGB").resize((32, 32))))
            labels.append(label)
    if not pixels:
        raise SourceError(f"no *.png in the class folders of {folder}")
    return Images(pixels=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), labels=torch.tensor(labels))


def cifar_task(images: dict[str, Images], size: Sizes) -> Task:
    """Random training images, half of them mirrored; judged on the whole test split."""
    train, test = images["train"], images["test"]
    classes = int(max(train.labels.max(), test.labels.max())) + 1

    def stream(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            index = torch.randint(len(train.labels), (size.batch,), generator=generator)
            mirrored = torch.rand(size.batch, 1, 1, 1, generator=generator) < 0.5
            pixels = _scaled(train.pixels[index])
            yield torch.where(mirrored, pixels.flip(-1), pixels), train.labels[index]

    def heldout(generator: torch.Generator) -> Iterator[Batch]:
        for start in range(0, len(test.labels), 500):
            yield _scaled(test.pixels[start : start + 500]), test.labels[start : start + 500]

    return Task(
        classes=classes,
        stream=stream,
        heldout=heldout,
        network=lambda width: convnet(width, 3, 32, classes),
        teacher_width=size.teacher_width,
        student_width=size.student_width,
        teacher_steps=3 * size.steps,
        steps=size.steps,
    )


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 64 - 2


def fig2c(folder: Path, settings: Settings) -> Result:
    """A small convolutional network on CIFAR-100 where `data` names it, else on striped shapes, for each method."""
    size = SIZES[settings.profile]
    trained = f"{size.steps:,} steps of {size.batch} images, {settings.seeds} seeds"
    paper = "The paper: a ResNet-18 made smaller, on CIFAR-100, one seed; its plot prints no numbers."
    if settings.data:
        images = read_cifar(settings.data)
        own = f"Here the user's {len(images['train'].labels):,} training images of CIFAR-100 and a small convolutional "
        return result_of(compare(cifar_task(images, size), settings), f"{own}network, {trained}. {paper}")
    own = (
        f"Here NOT CIFAR-100 (data=FOLDER takes it) but {STRIPED} classes of noisy striped shapes of our own making, "
        f"{SIDE} × {SIDE} pixels, and a small convolutional network, {trained}. The noise keeps classes ambiguous: in "
        "a trial with less (4 % of the mass outside the top 7) such short training left FullKD's student "
        "under-confident and Top-K's no worse calibrated than it. "
    )
    return result_of(compare(striped_task(size), settings), own + paper)


FIG_2C = Reproduction(
    title="Calibration on images",
    source="fig. 2c, section 2.2, app. B",
    claim="The same on images: Top-K makes the student over-confident, cross-entropy, the full distribution and random "
    "sampling do not.",
    run=fig2c,
    plot=plot_panels,
    uses=("seeds", "profile", "data"),
)
