"""The equations of the sparse losses, on a tile of rows: one read of the logits, one write of their gradient.

Shapes: C rows, V vocabulary, K kept ids, J = K, or K + 1 where the true token is one more of them. With z the logits,
lse_T = log Σ exp(z / T), t the (treated) targets, S their sum, u a mass on every id, α, ζ and T of `LossOptions`:

    loss     = κ (S lse_T - Σ t z / T - Σ u z / T)  +  α (lse_1 - z_y)  +  ζ lse_1²  +  constant,   κ = (1 - α) T²
    dloss/dz = (κ/T) S softmax(z / T)  +  (α + 2 ζ lse_1) softmax(z)  -  sparse  -  (κ/T) u

where `sparse` holds (κ/T) t at the kept ids and α at the true token y: at T = 1 everything is a softmax - sparse -
uniform, so no variant costs a further pass over V; at T ≠ 1 an α or ζ costs a second exponential. Targets that are
sets of tokens (`prefix_sets`) add their masses to S, and what they subtract lies at their tokens.

`read_` and `write_` meet between the two passes, where a vocabulary that is split over processes is summed up. They are
given z / T: a product with the head's weights is divided by T for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekd.prefix_sets import PrefixSets, SetEntries, SetsSeen, read_sets, subtract_sets_, take_apart
from sparsekd.residuals import RESIDUALS, Treated
from sparsekd.targets import SparseTargets

# Rows are worked on in tiles of about this size: all passes over a tile but the first find it in a CPU's cache.
TILE_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossOptions:
    """How a loss is put together; the keywords of `sparse_kl`, `sparse_ce` and `fused_linear_sparse_kl`.

    Attributes:
        ce_weight: α in [0, 1] of α CE + (1-α) KD; needs labels when above 0.
        temperature: T of the student's softmax in the KL term, whose value and gradient are scaled by T².
        residual: what becomes of the teacher's mass that the targets left out; a name of `residuals.RESIDUALS`.
        z_loss: ζ of the penalty ζ (log Σ exp z)², which keeps logits from drifting (PaLM's is 1e-4).
        token_weights: [...] factors of the positions' losses (see `residuals.hard_token_weights`); the mean still
            divides by the number of positions.
        ignore_index: positions with this label count for nothing.
        reduction: "mean" over positions that are not ignored, "sum", or "none" ([...], 0 where ignored).
        num_items_in_batch: divides the sum instead of the count, so that gradient accumulation and data
            parallelism weigh every position alike (as transformers' Trainer passes it).
        entropy: whether the constant Σ t log t is part of the value (it is, in a KL).
    """

    ce_weight: float = 0.0
    temperature: float = 1.0
    residual: str = "none"
    z_loss: float = 0.0
    token_weights: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    num_items_in_batch: Tensor | int | None = None
    entropy: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight={self.ce_weight} is out of range: 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss={self.z_loss} must not be negative")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={self.residual!r} is not one of {', '.join(RESIDUALS)}")
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={self.reduction!r} is not one of mean, sum, none")

    @property
    def needs_labels(self) -> bool:
        """Whether the loss reads the true next token."""
        return self.ce_weight > 0 or self.residual == "label"

    @property
    def kd_scale(self) -> float:
        """κ = (1 - α) T²."""
        return (1 - self.ce_weight) * self.temperature**2

    @property
    def two_softmaxes(self) -> bool:
        """Whether softmax(z) is needed beside softmax(z / T)."""
        return self.temperature != 1 and (self.ce_weight > 0 or self.z_loss > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadForm:
    """How hidden states become logits: z = softcap * tanh(scale * (h Wᵀ + bias) / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def factor(self, temperature: float) -> float:
        """What h Wᵀ + bias is multiplied by before a tanh, or (without one) to be z / T."""
        return self.scale / (temperature if self.softcap is None else self.softcap)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What rows are before their logits are known.

    Attributes:
        ids, sparse: [C, J] where something is subtracted from the softmax, and how much; ids may repeat.
        mass: [C] κ S, with the uniform part; factor of lse_T in the loss.
        constant: [C] what the value has beside the logits (κ Σ t log t).
        uniform: [C] (κ/T) u, or None.
        missing: [C] the ghost token's mass, or None.
        kept: [C, J] bool, the distinct ids that the ghost token does not cover, or None.
        sets: the entries that are sets, their weights times κ, or None.
    """

    ids: Tensor
    sparse: Tensor
    mass: Tensor
    constant: Tensor
    uniform: Tensor | None = None
    missing: Tensor | None = None
    kept: Tensor | None = None
    sets: SetEntries | None = None

    def __getitem__(self, part: Any) -> Rows:
        """Some of the rows."""
        parts: dict[str, Any] = {name: None if x is None else x[part] for name, x in self.tensors().items()}
        return Rows(**parts)

    def tensors(self) -> dict[str, Tensor | SetEntries | None]:
        """The attributes by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __len__(self) -> int:
        return len(self.ids)


def prepare(
    targets: SparseTargets,
    labels: Tensor | None,
    options: LossOptions,
    vocab_size: int,
    dtype: torch.dtype,
    sets: PrefixSets | None = None,
) -> Rows:
    """`Rows` of targets [C, K] and labels [C]; work of order C K, no pass over V."""
    targets, entries = SparseTargets(ids=targets.ids.long(), weights=targets.weights.to(dtype)), None
    if sets is not None:
        _check_sets(sets, options, vocab_size)
        targets, entries = take_apart(targets, sets)
    treated = RESIDUALS[options.residual](targets, labels, vocab_size)
    kappa, weights = options.kd_scale, treated.weights
    mass, uniform, missing = weights.sum(-1), treated.uniform, None
    if uniform is not None:
        mass = mass + uniform * vocab_size
    if entries is not None:
        mass = mass + entries.sums(entries.signed)
    if treated.ghost:
        missing = treated.missing()
    ids, sparse = treated.ids, (kappa / options.temperature) * weights
    kept = weights > 0 if treated.ghost else None
    if options.ce_weight and labels is not None:  # the hard label is just target K + 1
        ids = torch.cat([ids, labels[:, None]], -1)
        sparse = torch.cat([sparse, sparse.new_full((len(ids), 1), options.ce_weight)], -1)
        kept = None if kept is None else torch.cat([kept, kept.new_zeros(len(ids), 1)], -1)
    _check_ids(ids, vocab_size)
    return Rows(
        ids=ids,
        sparse=sparse,
        mass=kappa * mass,
        constant=kappa * _entropy(treated, missing, vocab_size) if options.entropy else torch.zeros_like(mass),
        uniform=None if uniform is None else (kappa / options.temperature) * uniform,
        missing=None if missing is None else kappa * missing,
        kept=kept,
        sets=None if entries is None else replace(entries, signed=kappa * entries.signed),
    )


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    """A kernel would read what lies behind the logits. Without a wait on an accelerator, where no id can be named."""
    inside = ((ids >= 0) & (ids < vocab_size)).all()
    words = (
        f"the logits have {vocab_size} ids; of another vocabulary? (of padding alone: SparseKDCollator(vocab_size=))"
    )
    if ids.device.type != "cpu":
        torch._assert_async(inside, f"targets or labels name ids beyond the logits: {words}")
    elif not inside:
        raise ValueError(f"targets or labels name ids from {ids.min()} to {ids.max()}, {words}")


def _check_sets(sets: PrefixSets, options: LossOptions, vocab_size: int) -> None:
    if vocab_size < sets.vocab_size:
        raise ValueError(f"the sets are of a vocabulary of {sets.vocab_size} tokens, the logits of {vocab_size}")
    if options.residual != "none":
        raise ValueError(
            f"residual={options.residual!r} is about mass that targets left out; targets with sets of tokens leave out "
            "none: take residual='none'"
        )


def _entropy(treated: Treated, missing: Tensor | None, vocab_size: int) -> Tensor:
    """Σ τ log τ of the treated target τ over all ids, [C]."""
    weights, total = treated.weights, torch.zeros_like(treated.weights[:, :0].sum(-1))
    if treated.uniform is not None:
        alone = vocab_size - (weights > 0).sum(-1)
        total = total + alone * torch.xlogy(treated.uniform, treated.uniform)
        weights = torch.where(weights > 0, weights + treated.uniform[:, None], weights)
    if missing is not None:
        total = total + torch.xlogy(missing, missing)
    return total + torch.xlogy(weights, weights).sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What one pass over the logits found, per row [C]; of a part of the vocabulary, or (see `merge`) of all of it.

    Attributes:
        largest: max z / T.
        total: Σ exp(z / T - largest).
        dot: Σ sparse z + Σ uniform z.
        hard_total: Σ exp(z - T largest), or None where that is `total` or not needed.
        rest: Σ exp(z / T - largest) over the ids under the ghost token, or None.
        unit: what the buffer must be multiplied by to be exp(z / T - largest).
        hard_unit: what `hard_CV` must be multiplied by to be exp(z - T largest), or None.
        picked: [C, J] z / T at the kept ids, for the ghost token; or None.
        hard_CV: softmax(z) of the own ids, up to a factor a row; or None.
        sets: what was read of the targets that are sets, or None.
    """

    largest: Tensor
    total: Tensor
    dot: Tensor
    unit: Tensor
    hard_total: Tensor | None = None
    hard_unit: Tensor | None = None
    rest: Tensor | None = None
    picked: Tensor | None = None
    hard_CV: Tensor | None = None
    sets: SetsSeen | None = None


def read_(logits_CV: Tensor, rows: Rows, options: LossOptions) -> Seen:
    """First pass over z / T: leaves its softmax in `logits_CV` (0 at the kept ids, where there is a ghost token).

    Not exp and a sum: torch's softmax is faster than its exp alone. The largest of its numbers is 1 / Σ exp(z - max z).
    """
    # A padding entry must not meet a student's logit of -inf: 0 * inf is NaN.
    picked = logits_CV.gather(-1, rows.ids).masked_fill_(rows.sparse == 0, 0)
    dot = (rows.sparse * picked).sum(-1)
    if rows.uniform is not None:
        dot += rows.uniform * logits_CV.sum(-1)
    dot *= options.temperature
    sets = None if rows.sets is None else read_sets(logits_CV, rows.sets)
    largest = logits_CV.amax(-1)
    squared = options.two_softmaxes and options.temperature == 2  # then exp(z) is the square of exp(z / T)
    hard_CV = None
    if options.two_softmaxes and not squared:
        hard_CV = logits_CV * options.temperature
        torch.softmax(hard_CV, -1, out=hard_CV)  # in place: a second new tile costs more than both softmaxes
    hard_total = hard_unit = None if hard_CV is None else hard_CV.amax(-1).reciprocal()
    torch.softmax(logits_CV, -1, out=logits_CV)
    total = unit = logits_CV.amax(-1).reciprocal()
    if squared:
        hard_CV, hard_unit = logits_CV.square(), unit.square()
        hard_total = hard_CV.sum(-1) * hard_unit
    rest = None
    if rows.kept is not None:  # summed over the ids outside: 1 - Σ_K p would cancel where the set holds nearly all
        inside = logits_CV.gather(-1, rows.ids) * rows.kept
        logits_CV.scatter_add_(-1, rows.ids, -inside)
        rest = logits_CV.sum(-1) * unit
        total = rest + inside.sum(-1) * unit
    return Seen(
        largest=largest,
        total=total,
        dot=dot,
        unit=unit,
        hard_total=hard_total,
        hard_unit=hard_unit,
        rest=rest,
        picked=None if rows.kept is None else picked,
        hard_CV=hard_CV,
        sets=sets,
    )


def write_(logits_CV: Tensor, rows: Rows, seen: Seen, options: LossOptions, scale: Tensor | None) -> Tensor:
    """Losses [C]; with `scale` [C], turns what `read_` left into scale * dloss/dz (else leaves scratch)."""
    alpha, zeta, temperature = options.ce_weight, options.z_loss, options.temperature
    soft_lse = seen.largest + seen.total.log()
    hard_lse = soft_lse if seen.hard_total is None else temperature * seen.largest + seen.hard_total.log()
    losses = rows.mass * soft_lse - seen.dot + rows.constant
    inside = outside = rows.mass
    if rows.missing is not None and seen.rest is not None:
        rest = seen.rest.clamp(min=torch.finfo(inside.dtype).tiny)
        losses -= rows.missing * (rest.log() - seen.total.log())
        inside = rows.mass + rows.missing
        outside = inside - rows.missing * seen.total / rest
    if rows.sets is not None and seen.sets is not None:
        losses -= rows.sets.sums(rows.sets.signed * seen.sets.lse)
    hard = None
    if alpha or zeta:
        losses += (alpha + zeta * hard_lse) * hard_lse
        hard = alpha + 2 * zeta * hard_lse
    if scale is None:
        return losses
    inside, outside = inside / temperature, outside / temperature
    if hard is not None and seen.hard_CV is None:  # one softmax for both
        inside, outside, hard = inside + hard, outside + hard, None
    logits_CV *= (scale * outside * (seen.unit / seen.total))[:, None]
    if hard is not None and seen.hard_CV is not None and seen.hard_unit is not None and seen.hard_total is not None:
        logits_CV.addcmul_(seen.hard_CV, (scale * hard * (seen.hard_unit / seen.hard_total))[:, None])
    if rows.uniform is not None:
        logits_CV -= (scale * rows.uniform)[:, None]
    sparse = rows.sparse
    if rows.kept is not None and seen.picked is not None:  # taken out by `read_`: they get p - t here
        sparse = sparse - inside[:, None] * (seen.picked - soft_lse[:, None]).exp() * rows.kept
    logits_CV.scatter_add_(-1, rows.ids, -scale[:, None] * sparse)
    if rows.sets is not None and seen.sets is not None:
        subtract_sets_(logits_CV, rows.sets, seen.sets, scale / temperature)
    return losses


def losses_(logits_CV: Tensor, rows: Rows, options: LossOptions, scale: Tensor | None = None) -> Tensor:
    """Losses [C] of a chunk; overwrites `logits_CV` with `scale` [C] times dloss/dlogits (or with scratch).

    `logits_CV` is float32 or float64; works tile by tile.
    """
    losses = torch.empty_like(rows.mass)
    for part in row_chunks(logits_CV):
        tile, some = logits_CV[part], rows[part]
        if options.temperature != 1:
            tile /= options.temperature
        losses[part] = write_(tile, some, read_(tile, some, options), options, None if scale is None else scale[part])
    return losses


def row_chunks(logits_NV: Tensor) -> Iterator[slice]:
    """Slices of rows whose float32 copy is about `TILE_BYTES`."""
    budget = TILE_BYTES.get(logits_NV.device.type, TILE_BYTES["cuda"])
    step = max(1, budget // (4 * logits_NV.shape[-1]))
    for start in range(0, len(logits_NV), step):
        yield slice(start, start + step)
