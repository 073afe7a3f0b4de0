"""Students that learn from a teacher of another vocabulary, through a cache of sorted curves, in a stock Trainer.

Shapes: B rows, S student's and T teacher's tokens, V student's vocabulary, C runs of a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.alm import alm
from sparsekd.batches import SparseKDCollator
from sparsekd.heads import inner_model, replace_forward, router_loss
from sparsekd.overlay import Overlaid, OverlaidRow
from sparsekd.prompted import PromptedRow
from sparsekd.sketch import SortedCurve
from sparsekd.uld import IGNORED, PAIRINGS, Tokenized, uld

_TEACHER = ("teacher_labels", "teacher_starts", "teacher_ends", "teacher_log_p", "teacher_curve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Both:
    """A batch as a loss takes it: logits [B, S, V], what each model read, and what the cache knows of the teacher."""

    logits: Tensor
    tokens: Tokenized
    teacher_tokens: Tokenized
    curve: SortedCurve
    log_p: Tensor
    num_items_in_batch: Tensor | int | None


def _uld(both: Both, kd_weight: float, align: str) -> Tensor:
    return uld(
        both.logits,
        both.curve,
        tokens=both.tokens,
        teacher_tokens=both.teacher_tokens,
        align=align,
        uld_weight=kd_weight,
        num_items_in_batch=both.num_items_in_batch,
    )


def _alm(both: Both, kd_weight: float, align: str) -> Tensor:
    return alm(
        both.logits,
        both.log_p,
        tokens=both.tokens,
        teacher_tokens=both.teacher_tokens,
        alm_weight=kd_weight,
        ce_weight=1.0,
        num_items_in_batch=both.num_items_in_batch,
    )


# method -> (batch, λ, alignment) -> loss
CROSS_METHODS: dict[str, Callable[[Both, float, str], Tensor]] = {"uld": _uld, "alm": _alm}
# λ of CE + λ KD: the authors' for ULD; coins of τ = 100 give small losses.
KD_WEIGHTS = {"uld": 1.5, "alm": 1.0}


def attach_cross_kd(
    model: Any, method: str, *, edges: Sequence[int], align: str = "bytes", kd_weight: float | None = None
) -> Any:
    """Teach `model.forward` to take a `CrossCollator`'s batch and return CE + λ · method; returns the model.

    Works for decoder-only models and for encoder-decoder ones, whose labels are not shifted and whose decoder begins
    with a token of its own. Without `teacher_labels`, forward is what it was.

    Args:
        method: a name of `CROSS_METHODS`.
        edges: of the cache's curves: `OverlaidRows.edges`.
        align: for "uld": a name of `uld.PAIRINGS`.
        kd_weight: λ; default: `KD_WEIGHTS`.
    """
    if method not in CROSS_METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(CROSS_METHODS)}")
    if align not in PAIRINGS:
        raise ValueError(f"align={align!r} is not one of {', '.join(PAIRINGS)}")
    inner, weight = inner_model(model), KD_WEIGHTS[method] if kd_weight is None else kd_weight
    own_forward, decodes_apart = inner.forward, bool(getattr(inner.config, "is_encoder_decoder", False))

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **given: Any,
    ) -> Any:
        teacher = {name: given.pop(name) for name in _TEACHER if name in given}
        if not teacher or labels is None:
            extra = {} if num_items_in_batch is None or decodes_apart else {"num_items_in_batch": num_items_in_batch}
            return own_forward(input_ids=input_ids, labels=labels, **given, **extra)
        given = given | ({"labels": labels} if decodes_apart else {"use_cache": False})
        output = own_forward(input_ids=input_ids, **given)
        tokens = Tokenized(labels=labels, starts=starts, ends=ends)
        logits, tokens = _shifted(output.logits, tokens) if decodes_apart else (output.logits, tokens)
        both = Both(
            logits=logits,
            tokens=tokens,
            teacher_tokens=Tokenized(
                labels=teacher["teacher_labels"], starts=teacher["teacher_starts"], ends=teacher["teacher_ends"]
            ),
            curve=SortedCurve(masses=teacher["teacher_curve"], edges=tuple(edges)),
            log_p=teacher["teacher_log_p"],
            num_items_in_batch=num_items_in_batch,
        )
        return type(output)(loss=CROSS_METHODS[method](both, weight, align) + router_loss(self, output))

    replace_forward(model, forward, targets=_TEACHER)
    return model


def _shifted(logits: Tensor, tokens: Tokenized) -> tuple[Tensor, Tokenized]:
    """An encoder-decoder's logits and tokens as if its decoder's first token stood in the labels: position l of them
    predicts label l, position l of a decoder-only model label l+1."""

    def wider(values: Tensor | None, first: int) -> Tensor | None:
        return None if values is None else F.pad(values, (1, 0), value=first)

    labels = F.pad(tokens.labels, (1, 0), value=IGNORED)
    shifted = Tokenized(labels=labels, starts=wider(tokens.starts, -1), ends=wider(tokens.ends, -1))
    return F.pad(logits, (0, 0, 0, 1)), shifted


class CrossCollator:
    """`OverlaidRow`s -> a batch for `attach_cross_kd`, padded on the right; packed rows (evaluation) as for others.

    input_ids, labels, starts and ends are [B, S]; teacher_labels, _starts, _ends and _log_p [B, T];
    teacher_curve [B, T, C]. Nothing attends to the padding of a causal model, and its labels are -100. Of
    `PromptedRow`s, input_ids and attention_mask are the prompts' [B, E].
    """

    def __init__(self, *, pad_id: int = 0) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[OverlaidRow | Any]) -> dict[str, Tensor]:
        if not isinstance(rows[0], OverlaidRow):
            return SparseKDCollator(with_targets=False)(rows)
        student, teacher = [row.student for row in rows], [row.teacher for row in rows]
        return {
            **self._read(rows),
            "starts": _stacked([each.starts for each in student], -1),
            "ends": _stacked([each.ends for each in student], -1),
            "teacher_labels": _stacked([_labels(each) for each in teacher], IGNORED),
            "teacher_starts": _stacked([each.starts for each in teacher], -1),
            "teacher_ends": _stacked([each.ends for each in teacher], -1),
            "teacher_log_p": _stacked([row.log_p for row in rows], 0.0),
            "teacher_curve": _stacked([row.curve for row in rows], 0.0),
        }

    def _read(self, rows: Sequence[OverlaidRow]) -> dict[str, Tensor]:
        """What the student reads and learns: the same tokens, or a prompt and its answer, whose first one counts."""
        prompts = [row.prompt for row in rows if isinstance(row, PromptedRow)]
        if not prompts:
            labels = [_labels(row.student) for row in rows]
            return {
                "input_ids": _stacked([row.student.ids for row in rows], self.pad_id),
                "labels": _stacked(labels, IGNORED),
            }
        answers = [np.where(row.student.supervised, row.student.ids, IGNORED) for row in rows]
        return {
            "input_ids": _stacked(prompts, self.pad_id),
            "attention_mask": _stacked([np.ones(len(prompt), np.int64) for prompt in prompts], 0),
            "labels": _stacked(answers, IGNORED),
        }


def _labels(tokens: Overlaid) -> np.ndarray:
    labels = np.where(tokens.supervised, tokens.ids, IGNORED)
    labels[:1] = IGNORED  # nothing predicts a row's first token
    return labels


def _stacked(arrays: list[np.ndarray], fill: float) -> Tensor:
    """[B, longest, ...]"""
    longest = max(map(len, arrays))
    rest = [(0, 0)] * (arrays[0].ndim - 1)
    padded = [np.pad(each, [(0, longest - len(each)), *rest], constant_values=fill) for each in arrays]
    return torch.from_numpy(np.stack(padded))
