"""What ULD loses by what is stored of the teacher: bias of the loss, and cosine of the gradient to the dense teacher's.

python benchmarks/uld.py demo        # a folder that `sparsekd demo` made: its teacher against each of its students
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd import models
from sparsekd.packed import RowsReader
from sparsekd.samplers import sample
from sparsekd.sketch import SortedCurve, curve_edges, run_sums, sorted_curve
from sparsekd.uld import as_curve, sorted_distance
from sparsekd.vocab import quiet_transformers

POSITIONS = 1024


def masses_only(teacher_NV: Tensor, student_NV: Tensor, top: int) -> Tensor:
    """Σ |Q_run - T_run|: runs compared as a whole, without drawing their ranks back."""
    edges = curve_edges(teacher_NV.shape[1], top)
    ranked = [logits.softmax(-1).sort(-1, descending=True).values for logits in (student_NV, teacher_NV)]
    return (run_sums(ranked[0], edges) - run_sums(ranked[1], edges)).abs().sum(-1)


def drawn(teacher_NV: Tensor, rounds: int) -> SortedCurve:
    return as_curve(sample(teacher_NV, "random_sampling", rounds=rounds), allow_biased=True)


# label -> (teacher's logits, student's logits) -> ULD [N]
STORED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sketch, top 8": lambda t, s: sorted_distance(s, sorted_curve(t, top=8)),
    "sketch, top 16": lambda t, s: sorted_distance(s, sorted_curve(t, top=16)),
    "sketch, top 32": lambda t, s: sorted_distance(s, sorted_curve(t, top=32)),
    "top 16, masses of runs only": lambda t, s: masses_only(t, s, 16),
    "12 draws": lambda t, s: sorted_distance(s, drawn(t, 12)),
    "50 draws": lambda t, s: sorted_distance(s, drawn(t, 50)),
    "200 draws": lambda t, s: sorted_distance(s, drawn(t, 200)),
}


def value_and_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], teacher: Tensor, student: Tensor
) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(teacher, leaf).mean()
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad.flatten()


def logits_of(model: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = models.open_model(model, dtype="float32", device="cpu")(input_ids=ids).logits
    return found.flatten(0, 1)[:POSITIONS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo")
    home = Path(parser.parse_args().demo)
    torch.set_num_threads(1)
    with RowsReader(home / "rows", "heldout") as rows:
        ids = torch.from_numpy(rows.batch(range(POSITIONS // rows.seq_len + 1)).input_ids.astype("int64"))
    teacher = logits_of(str(home / "teacher"), ids)
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in STORED}
    for student in sorted((home / "students").iterdir()):
        logits = logits_of(str(student), ids)
        want, gradient = value_and_gradient(lambda t, s: sorted_distance(s, as_curve(t)), teacher, logits)
        for label, loss in STORED.items():
            value, other = value_and_gradient(loss, teacher, logits)
            found[label].append((value / want - 1, F.cosine_similarity(other, gradient, dim=0).item()))
    print(f"{POSITIONS} positions, V = {teacher.shape[1]}, {len(found['12 draws'])} students: least .. mean .. largest")
    for label, pairs in found.items():
        biases, cosines = zip(*pairs, strict=True)
        shown = f"{min(biases):+7.2%} .. {statistics.mean(biases):+7.2%} .. {max(biases):+7.2%}"
        print(f"{label:28} bias {shown}   cosine {min(cosines):.3f} .. {max(cosines):.3f}")


if __name__ == "__main__":
    quiet_transformers()
    main()
