"""sparsekd: sparse offline knowledge distillation for language models.

    import sparsekd as skd
    targets = skd.sample(logits_NV, "random_sampling", rounds=50, seed=0, rows=rows_N, positions=positions_N)
    loss = skd.sparse_kl(student_logits_NV, targets)

Importing is cheap: each public name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "SparseKDError": "errors",
    "SparseTargets": "targets",
    "SAMPLERS": "samplers",
    "sample": "samplers",
    "sparse_kl": "losses",
    "sparse_ce": "losses",
    "full_kl": "losses",
    "fused_linear_sparse_kl": "fused",
    "CacheReader": "cache",
    "CacheWriter": "cache",
    "RowsReader": "packed",
    "CacheDataset": "student",
    "SparseKDCollator": "student",
    "attach_sparse_kd": "student",
    "attach_full_kd": "student",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsekd' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(f"sparsekd.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
