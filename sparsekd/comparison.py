"""One method against another, seed by seed, and the sentence that may be said about it.

A method here is the plain dict that `report.aggregate` builds: name, label, role, and `students` with their seed,
loss and speed. Students of one seed start from the same weights and see the same rows in the same order, so
differences are taken seed by seed. A difference counts where its 95 % Student-t interval excludes zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Method = Mapping[str, Any]

# The 97.5 % quantiles of Student's t for 1, 2, 3... degrees of freedom: three seeds need 4.3 errors, not 1.96.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def over_seeds(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, standard error (None with one value) and number of the values that are there; None without any."""
    found = [v for v in values if v is not None]
    if not found:
        return None
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return {"mean": statistics.fmean(found), "standard_error": error, "n": len(found)}


def paired_difference(a: Method, b: Method) -> dict[str, Any] | None:
    """Loss of `a` minus loss of `b` over the seeds both have, in nats per token (negative: `a` is better).

    mean, standard_error, the 95 % interval low..high (None with one seed) and the values by seed.
    """
    values = {seed: x - y for seed, (x, y) in _shared(a, b, _loss).items()}
    estimate = over_seeds(values.values())
    if estimate is None:
        return None
    low = high = None
    if estimate["standard_error"] is not None:
        half = estimate["standard_error"] * t975(len(values) - 1)
        low, high = estimate["mean"] - half, estimate["mean"] + half
    return {**estimate, "low": low, "high": high, "values": {str(seed): v for seed, v in values.items()}}


def gap_closed(method: Method, ce: Method, full: Method) -> dict[str, Any] | None:
    """Σ (CE - method) / Σ (CE - full KD) over shared seeds, with the linearised error of a ratio.

    0 for cross-entropy itself and 1 for full distillation, by definition; None where the gap is not positive.
    """
    if method is ce or method is full:
        return {"mean": float(method is full), "standard_error": None}
    shared, bounds = _shared(method, ce, _loss), _shared(full, ce, _loss)
    pairs = [(c - x, c - bounds[seed][0]) for seed, (x, c) in shared.items() if seed in bounds]
    total = math.fsum(whole for _, whole in pairs)
    if total <= 0:
        return None
    ratio, n = math.fsum(part for part, _ in pairs) / total, len(pairs)
    residual = math.fsum((part - ratio * whole) ** 2 for part, whole in pairs)
    return {"mean": ratio, "standard_error": math.sqrt(n / (n - 1) * residual) / total if n > 1 else None}


def relative_speed(method: Method, ce: Method) -> dict[str, Any] | None:
    """Training tokens per second as a multiple of cross-entropy's, seed by seed."""
    shared = _shared(method, ce, lambda student: student["tokens_per_second"] or None)
    return over_seeds(x / y for x, y in shared.values())


def compare(methods: Sequence[dict[str, Any]], notes: list[str]) -> None:
    """Adds to each method what needs the baselines: against_ce, gap_closed, relative_speed (None without)."""
    ce, full = (next((m for m in methods if m["role"] == r and m["loss"]), None) for r in ("ce", "full_kd"))
    gap = paired_difference(full, ce) if ce and full else None
    is_open = gap is not None and gap["mean"] < 0 and (gap["high"] is None or gap["high"] < 0)
    if ce and full and gap and not is_open:
        notes.append(f"No share of a gap is given: {full['label']} did not beat {ce['label']} beyond the noise.")
    for m in methods:
        m["against_ce"] = paired_difference(m, ce) if ce and m is not ce else None
        m["gap_closed"] = gap_closed(m, ce, full) if ce and full and is_open and m["loss"] else None
        m["relative_speed"] = relative_speed(m, ce) if ce else None


def leading(methods: Sequence[Method]) -> Method | None:
    """The method a verdict is about: systematic or random sampling, the first evaluated, else another sparse method."""
    measured = [m for m in methods if m["loss"]]
    return next((m for role in ("systematic", "rs", "other", "topk") for m in measured if m["role"] == role), None)


def comparisons(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The leading method against cross-entropy and each Top-K: paired difference and its `outcome`.

    An outcome is better, worse, unclear (the interval holds 0) or unknown (one shared seed).
    """
    lead = leading(methods)
    if lead is None:
        return []
    rivals = [m for m in methods if m["role"] in ("ce", "topk") and m is not lead]
    found = [(m, paired_difference(lead, m)) for m in rivals]
    return [
        {"method": lead["name"], "rival": m["name"], "label": _said(m), "outcome": _outcome(d), **d}
        for m, d in found
        if d
    ]


def verdict(methods: Sequence[Method], compared: Sequence[Mapping[str, Any]]) -> str:
    """One honest sentence: what the leading method beats beyond the errors, and what it does not."""
    lead = leading(methods)
    if lead is None or not compared:
        return "There is nothing to compare yet: no sparse method and baseline were evaluated with a shared seed."
    if all(c["outcome"] == "unknown" for c in compared):
        return _verdict_of_one_seed(lead, compared)
    said = [
        phrase.format(_and(c["label"] for c in compared if c["outcome"] == outcome))
        for outcome, phrase in _PHRASES.items()
        if any(c["outcome"] == outcome for c in compared)
    ]
    return f"{lead['label']} {', but '.join(said[:2])}{''.join(f', and {s}' for s in said[2:])}{_closing(lead)}."


_PHRASES = {
    "better": "beats {}",
    "unclear": "does not differ from {} beyond the noise",
    "worse": "is worse than {}",
    "unknown": "shares only one seed with {}",
}


def _verdict_of_one_seed(lead: Method, compared: Sequence[Mapping[str, Any]]) -> str:
    seen = _and(f"{abs(c['mean']):.3f} nats {'below' if c['mean'] < 0 else 'above'} {c['label']}" for c in compared)
    return f"With one seed, {lead['label']} ended {seen}; one seed has no error bar, so nothing is claimed."


def _closing(lead: Method) -> str:
    closed = lead.get("gap_closed")
    if not closed or closed["mean"] <= 0:
        return ""
    return f", closing {100 * closed['mean']:.0f} % of the gap to full distillation"


def _outcome(difference: Mapping[str, Any]) -> str:
    if difference["low"] is None:
        return "unknown"
    if difference["high"] < 0:
        return "better"
    return "worse" if difference["low"] > 0 else "unclear"


def _said(method: Method) -> str:
    """The label inside a sentence: cross-entropy is no proper name."""
    return method["label"].lower() if method["role"] == "ce" else method["label"]


def _and(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _loss(student: Mapping[str, Any]) -> float | None:
    return student["loss"]["mean"] if student["loss"] else None


def _shared(a: Method, b: Method, value: Callable[[Mapping[str, Any]], float | None]) -> dict[int, tuple[float, float]]:
    """{seed: (a's value, b's value)} where both have one."""
    left, right = ({s["seed"]: value(s) for s in m["students"]} for m in (a, b))
    both = ((seed, x, right.get(seed)) for seed, x in left.items())
    return {seed: (x, y) for seed, x, y in both if x is not None and y is not None}


def t975(freedom: int) -> float:
    # Beyond the table 1.96 + 2.5/df is within 0.003 of the quantile, from above.
    return _T975[freedom - 1] if freedom <= len(_T975) else 1.96 + 2.5 / freedom
