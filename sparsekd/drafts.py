"""What drafts are worth: teacher calls saved, from the probabilities that a student's drafted tokens are accepted.

Shapes: P positions of one text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, tensor

from sparsekd import metrics
from sparsekd.checks import check_at_least
from sparsekd.errors import RecipeError
from sparsekd.metrics import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafting:
    """What one teacher call yields: `accepted` drafted tokens on average, and with the teacher's own `tokens_per_call`.

    `standard_error` is of both, over texts: None for one text, 0 for a known acceptance rate.
    """

    accepted: float
    tokens_per_call: float
    standard_error: float | None


def expected_acceptance(acceptance: float | Sequence[Tensor], draft_length: int) -> Drafting:
    """Accepted drafts and tokens per teacher call, from acceptance probabilities alone.

    Args:
        acceptance: one rate a for all positions, taken as independent: (1 - a^(g+1)) / (1 - a) tokens per call, for
            endless text; or the probabilities along texts, one [P] tensor each: hard positions come in clusters, and
            a text's end shortens its last drafts, so the numbers are lower and exact (see `expected_calls`).
        draft_length: g, tokens that the student drafts before each teacher call.

    Raises:
        RecipeError: a draft length below 1, a probability outside [0, 1], or no position at all.
    """
    check_at_least(1, draft_length=draft_length)
    if isinstance(acceptance, int | float):
        _check_probabilities(tensor([float(acceptance)]))
        return drafting(Estimate(mean=math.fsum(acceptance**k for k in range(draft_length + 1)), standard_error=0.0))
    texts = [text for text in acceptance if len(text)]
    if not texts:
        raise RecipeError("expected acceptance of no text; give at least one position")
    calls = [expected_calls(text, draft_length) for text in texts]
    return drafting(metrics.ratio_of_sums([len(text) for text in texts], calls))


def expected_calls(acceptance_P: Tensor, draft_length: int) -> float:
    """Expected number of teacher calls for a text of P tokens, one probability of an accepted draft for each.

    Let s(t) be the probability that a call starts at token t. With r tokens left the student drafts
    min(draft_length, r - 1) of them; a call that accepts k ends k + 1 tokens on. Σ s(t) is the number of calls.

    Given min(1, q(x) / p(x)) of each token x of a text that the teacher wrote, this is exact: that is the probability
    that x was an accepted draft, whatever came before. Given Σ min(p, q) it is an estimate for other texts.
    """
    _check_probabilities(acceptance_P)
    accept = acceptance_P.double().tolist()
    start = [1.0] + [0.0] * len(accept)
    for t in range(len(accept)):
        reached = start[t]
        drafted = min(draft_length, len(accept) - t - 1)
        for token in range(t, t + drafted):
            start[token + 1] += reached * (1 - accept[token])
            reached *= accept[token]
        start[t + drafted + 1] += reached
    return math.fsum(start[:-1])


def drafting(tokens_per_call: Estimate) -> Drafting:
    """A measured rate as a `Drafting`; one token of each call is the teacher's own."""
    error = tokens_per_call.standard_error
    return Drafting(
        accepted=tokens_per_call.mean - 1,
        tokens_per_call=tokens_per_call.mean,
        standard_error=error if math.isfinite(error) else None,
    )


def _check_probabilities(acceptance: Tensor) -> None:
    outside = ~((acceptance >= 0) & (acceptance <= 1))  # so written, a NaN counts
    if outside.any():
        raise RecipeError(f"acceptance={float(acceptance[outside][0])} is no probability; give values in [0, 1]")
