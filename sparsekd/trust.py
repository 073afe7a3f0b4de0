"""What a GPU is asked once a process before a kernel is relied on: whether it computes there what torch computes.

Compilers, drivers and versions differ, and a wrong gradient or a shifted draw does not show. A kernel that fails is
left out with a warning, and plain torch takes its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch

# Largest difference on an example: kernel, its twin in torch, where -> a share of what is right.
Gap = Callable[[Callable[..., object], Callable[..., object], torch.device], float]


@cache
def agrees(
    name: str, kernel: Callable[..., object], twin: Callable[..., object], device: torch.device, gap: Gap, most: float
) -> bool:
    """Whether `gap(kernel, twin, device)` is at most `most`; says so once where it is not, or raises."""
    try:
        found = gap(kernel, twin, device)
    except Exception as error:  # of a compiler, a driver, a library that is not there: any is a reason to do without
        return _without(f"the Triton kernel of {name} does not run on {device} ({type(error).__name__}: {error})")
    return found <= most or _without(f"the Triton kernel of {name} is off by {found:.1g} on {device}")


def _without(why: str) -> bool:
    warnings.warn(f"{why}; plain torch takes its place, slower", stacklevel=2)
    return False
