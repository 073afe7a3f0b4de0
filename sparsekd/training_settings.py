"""The settings of a training run, and the refusals of those that no method would heed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sparsekd import models
from sparsekd.checks import check_at_least
from sparsekd.cross_student import CROSS_METHODS
from sparsekd.divergences import DIVERGENCES, check_sparse_divergence
from sparsekd.errors import RecipeError
from sparsekd.residuals import RESIDUALS
from sparsekd.uld import PAIRINGS

METHODS = ("ce", "cached", "full_kd", *CROSS_METHODS)
SCHEDULES = ("cosine", "constant")
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "schedule": SCHEDULES,
    "dtype": ("float32", "bfloat16"),
    "residual": tuple(RESIDUALS),
    "divergence": tuple(DIVERGENCES),
    "align": tuple(PAIRINGS),
}
_COUNTS = ("max_length", "batch_size", "grad_accum", "log_steps", "save_steps", "keep_checkpoints", "eval_limit")
_AMOUNTS = ("weight_decay", "max_grad_norm", "dataloader_workers", "eval_steps")
_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (("max_steps",), "at least 1, or -1 to go by epochs", lambda v: v >= 1 or v == -1),
    (("epochs", "learning_rate", "hard_ratio"), "above 0", lambda v: 0 < v < math.inf),
    (("kd_weight",), "0 (text only) or above", lambda v: 0 <= v < math.inf),
    (("ce_weight", "min_lr_ratio", "warmup_ratio"), "between 0 and 1", lambda v: 0 <= v <= 1),
    (("seed",), "in [0, 2^32)", lambda v: 0 <= v < 2**32),
)


def check_settings(recipe: dict[str, Any]) -> None:
    """Before anything is opened.

    Raises:
        RecipeError: a setting out of its range, an unknown name, or one that this method has no use for.
    """
    for name, known in _CHOICES.items():
        if recipe[name] is not None and recipe[name] not in known:
            raise RecipeError(f"{name}={recipe[name]!r} is not one of {', '.join(known)}")
    check_at_least(1, **{name: recipe[name] for name in _COUNTS})
    check_at_least(0, **{name: recipe[name] for name in _AMOUNTS})
    for names, words, holds in _RANGES:
        for name in names:
            if recipe[name] is not None and not holds(recipe[name]):
                raise RecipeError(f"{name}={recipe[name]} must be {words}")
    if len(recipe["adam_betas"]) != 2 or not all(0 <= beta < 1 for beta in recipe["adam_betas"]):
        raise RecipeError(f"adam_betas={recipe['adam_betas']} must be two numbers in [0, 1)")
    if models.check_device(recipe["device"]) not in ("cpu", "cuda", models.default_device()):
        raise RecipeError(
            f"device={recipe['device']}: a process trains on the first accelerator it sees; choose it by "
            "CUDA_VISIBLE_DEVICES and give device=cuda"
        )
    if recipe["teacher"] is not None and recipe["method"] != "full_kd":
        raise RecipeError(f"teacher= is for method=full_kd; method={recipe['method']} runs none, leave it out")
    _check_objective(recipe)


def _check_objective(recipe: dict[str, Any]) -> None:
    """Settings of the loss that a method does not have would be silently ignored: refuse them."""
    method, divergence = recipe["method"], recipe["divergence"]
    if method in CROSS_METHODS:
        for name, plain in (("rows", None), ("ce_weight", 0.0), ("divergence", "forward_kl"), ("normalize", None)):
            if recipe[name] != plain:
                raise RecipeError(
                    f"{name}={recipe[name]} is not for method={method}: its loss is CE + kd_weight {method}"
                )
    elif recipe["kd_weight"] is not None or recipe["max_length"] is not None:
        raise RecipeError(f"kd_weight and max_length are for method={' or '.join(CROSS_METHODS)}, not {method}")
    if recipe["allow_biased"] and method != "uld":
        raise RecipeError(f"allow_biased is for method=uld on a cache of counts, not for method={method}")
    for name, plain in (("residual", "none"), ("hard_ratio", 1.0)):
        if recipe[name] != plain and method != "cached":
            raise RecipeError(f"{name}={recipe[name]} is for method=cached; method={method} has no sparse targets")
    if divergence == "forward_kl":
        return
    if method == "ce":
        raise RecipeError(f"divergence={divergence} is for method=cached or full_kd; method=ce has no teacher")
    for name, plain in (("residual", "none"), ("hard_ratio", 1.0), ("ce_weight", 0.0)):
        if recipe[name] != plain:
            raise RecipeError(f"{name}={recipe[name]} goes with divergence=forward_kl only, not with {divergence}")
    if method == "cached":
        try:
            check_sparse_divergence(divergence)
        except ValueError as error:
            raise RecipeError(str(error)) from None


def check_position_weights(recipe: dict[str, Any], codec: dict[str, Any]) -> None:
    """Positions kept unevenly weigh unevenly, and only the targets' weights say so: refuse a loss that has other parts.

    Raises:
        RecipeError: the setting, and what to capture instead.
    """
    if "share" not in codec:
        return
    plain = {"method": "cached", "ce_weight": 0.0, "residual": "none", "hard_ratio": 1.0, "divergence": "forward_kl"}
    for name, value in plain.items():
        if recipe[name] != value:
            raise RecipeError(
                f"{name}={recipe[name]} needs every position to weigh alike, but this cache's positions were chosen by "
                f"the teacher's entropy and its targets weigh the inverse; take {name}={value}, or capture with "
                "positions_by=evenly"
            )


def on_cpu(recipe: dict[str, Any]) -> bool:
    """Whether this run is one of a CPU."""
    return (recipe["device"] or models.default_device()) == "cpu"
