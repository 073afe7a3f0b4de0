"""sparsekd: sparse offline knowledge distillation for language models.

    import sparsekd as skd
    targets = skd.sample(logits_NV, "random_sampling", rounds=50, seed=0, rows=rows_N, positions=positions_N)
    loss = skd.sparse_kl(student_logits_NV, targets)

Importing is cheap: each public name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see of the names in _HOME
    from sparsekd.batches import CacheDataset as CacheDataset
    from sparsekd.batches import SparseKDCollator as SparseKDCollator
    from sparsekd.cache import CacheReader as CacheReader
    from sparsekd.cache import CacheWriter as CacheWriter
    from sparsekd.errors import SparseKDError as SparseKDError
    from sparsekd.fused import fused_linear_sparse_kl as fused_linear_sparse_kl
    from sparsekd.losses import full_kl as full_kl
    from sparsekd.losses import sparse_ce as sparse_ce
    from sparsekd.losses import sparse_kl as sparse_kl
    from sparsekd.packed import RowsReader as RowsReader
    from sparsekd.samplers import SAMPLERS as SAMPLERS
    from sparsekd.samplers import sample as sample
    from sparsekd.student import attach_full_kd as attach_full_kd
    from sparsekd.student import attach_sparse_kd as attach_sparse_kd
    from sparsekd.targets import SparseTargets as SparseTargets

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
    "CacheDataset": "batches",
    "SparseKDCollator": "batches",
    "attach_sparse_kd": "student",
    "attach_full_kd": "student",
}
__all__ = ["__version__", *_HOME]


if not TYPE_CHECKING:  # to a type checker it would make a name of every typing error

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'sparsekd' has no attribute {name!r}; it has {', '.join(_HOME)}")
        return getattr(importlib.import_module(f"sparsekd.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
