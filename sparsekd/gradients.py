"""A student's parameter gradients under sparse targets, beside those under the whole teacher (paper, section 4.2).

Shapes: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import sparsekd as skd
from sparsekd import metrics, models
from sparsekd.drawing import head_order, read_head
from sparsekd.packed import RowsReader
from sparsekd.samplers import ORDERED

_AT_ONCE = 16  # rows


def gradient_geometry(
    *,
    student: str,
    teacher: str,
    rows: str,
    methods: Mapping[str, tuple[str, Mapping[str, Any]]],
    seed: int = 0,
    batch_rows: int = 192,
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """How far each method's gradient is from full distillation's, for one batch of a student as it stands.

    Args:
        student, teacher: folders or hub ids of models of one vocabulary.
        rows: packed rows of their tokenizer; the first `batch_rows` of the train split are the batch.
        methods: {label: (a name of SAMPLERS, its parameters)}; drawn in the order that capture draws in by default.
        seed: of the draws.

    Returns:
        {label: {"ids": mean ids kept per position, "angle": degrees to FullKD's gradient, "ratio": of their norms,
        "error": ‖g - g_FullKD‖ / ‖g_FullKD‖}}; the gradient is that of the summed loss over all parameters.
    """
    device = models.check_device(device)
    learner, model = models.open_model(student, device=device), models.open_model(teacher, device=device)
    parameters = list(learner.parameters())
    in_order = any(sampler in ORDERED for sampler, _ in methods.values())
    order_V = head_order(read_head(model)) if in_order else None
    sums = {name: [torch.zeros_like(p) for p in parameters] for name in ("FullKD", *methods)}
    ids, positions = dict.fromkeys(methods, 0.0), 0
    reader = RowsReader(rows)
    for start in range(0, min(batch_rows, len(reader)), _AT_ONCE):
        batch = reader.batch(range(start, min(start + _AT_ONCE, len(reader))))
        tokens = torch.from_numpy(batch.input_ids.astype(np.int64)).to(device)
        with torch.no_grad():
            wanted = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        logits = learner(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        losses = {"FullKD": skd.full_kl(logits, wanted, reduction="sum")}
        for name, (sampler, parameters_of) in methods.items():
            keys: dict[str, Any] = {"rows": torch.full((len(wanted),), start), "positions": torch.arange(len(wanted))}
            order = order_V if sampler in ORDERED else None
            targets = skd.sample(wanted, sampler, seed=seed, **keys, order=order, **parameters_of)
            losses[name] = skd.sparse_kl(logits, targets, reduction="sum")
            ids[name] += float((targets.weights > 0).sum())
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            for total, gradient in zip(sums[name], found, strict=True):
                total += gradient
        positions += len(wanted)
    full = sums["FullKD"]
    norm = sum(float(g.double().square().sum()) for g in full) ** 0.5
    return {
        name: {
            "ids": ids[name] / positions,
            "angle": metrics.gradient_angle(sums[name], full),
            "ratio": metrics.norm_ratio(sums[name], full),
            "error": sum(float((a - b).double().square().sum()) for a, b in zip(sums[name], full, strict=True)) ** 0.5
            / norm,
        }
        for name in methods
    }
