"""What the hot paths do, counted and not timed: the same on a busy machine and an idle one. CI compares with a record.

    python benchmarks/costs.py            # prints the counts
    python benchmarks/costs.py --record   # and writes them to tests/costs.json: after a change that is meant to cost

Two counts. Passes: the bytes that torch's operators read and write, over those of the logits in float32 (a product
counts its operands once). Lines: lines of sparsekd's Python run per row of a cache, compiled loops left out. A further
pass over the vocabulary is at least 1 more of the first; a further step over a row's arrays at least 1 of the second.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from reading import epoch, make_records, write_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsekd as skd
from sparsekd import codec, compiled
from sparsekd.targets import SparseTargets

RECORD = Path(__file__).parent.parent / "tests" / "costs.json"
PACKAGE = str(Path(skd.__file__).parent)
ROWS, SEQ_LEN, VOCAB = 16, 64, 4096


class Traffic(TorchDispatchMode):
    """Sums up the bytes of the tensors that operators read and write; views and new memory cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in function._schema.returns)
        if not view and "empty" not in function.__name__:
            touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in touched)
        return out


def passes(run: Callable[[], object], logits: int) -> float:
    """Bytes touched by `run` over those of so many float32 numbers."""
    with Traffic() as traffic:
        run()
    return round(traffic.bytes / (4 * logits), 2)


def fused(tokens: int = 32, hidden: int = 8, **options: Any) -> float:
    """One step of the fused loss, forward (the backward of `accumulate_into` only hands over), in two chunks."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    head = torch.randn(VOCAB, hidden, generator=generator).requires_grad_()
    ids = torch.arange(12).expand(tokens, 12)
    targets, into = SparseTargets(ids=ids, weights=torch.full(ids.shape, 1 / 12)), torch.zeros_like(head)
    labels = torch.arange(tokens)
    step = partial(skd.fused_linear_sparse_kl, states, head, targets, labels=labels, chunk_rows=tokens // 2)
    return passes(lambda: step(accumulate_into=into, **options), tokens * VOCAB)


def sampler(name: str, **parameters: Any) -> float:
    logits = torch.randn(8, 32768, generator=torch.Generator().manual_seed(0)) * 3
    return passes(lambda: skd.sample(logits, name, **parameters), logits.numel())


def lines(run: Callable[[], object]) -> float:
    """Lines of the package that `run` executes, a row: after one run that imports and fills what is kept."""
    count = 0

    def local(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return local

    run()
    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        run()
    finally:
        sys.settrace(before)
    return round(count / ROWS, 1)


@contextmanager
def numpy_alone() -> Iterator[None]:
    """Whether numba is installed, and has begun to compile, must not change a count."""
    with mock.patch.object(compiled, "load", return_value=None):
        yield


def stored(name: str) -> dict[str, float]:
    """Coding, decoding and reading the rows of a cache by the codec of that name."""
    records = make_records(ROWS, SEQ_LEN, VOCAB)
    with tempfile.TemporaryDirectory() as folder, numpy_alone():
        cache = write_cache(Path(folder), records, VOCAB, name)
        spec, flats = cache.spec.codec, [cache.flat(row) for row in range(ROWS)]
        coded = [codec.encode(each, spec) for each in flats]
        sizes = [len(each.sizes) for each in flats]
        return {
            f"encode {name}, lines": lines(lambda: [codec.encode(each, spec) for each in flats]),
            f"decode {name}, lines": lines(
                lambda: [codec.decode(data, size, spec) for data, size in zip(coded, sizes, strict=True)]
            ),
            f"read {name}, lines": lines(lambda: epoch(cache)),
        }


MIXED = {"ce_weight": 0.1, "z_loss": 1e-4}
COSTS: dict[str, Callable[[], dict[str, float]]] = {
    "loss": lambda: {
        "fused, passes": fused(),
        "fused with CE and z-loss, passes": fused(**MIXED),
        "fused at temperature 2, passes": fused(temperature=2.0, **MIXED),
        "fused at temperature 3, passes": fused(temperature=3.0, **MIXED),
        "fused, ghost token, passes": fused(residual="ghost"),
    },
    "samplers": lambda: {
        "random_sampling, passes": sampler("random_sampling", rounds=50),
        "systematic, passes": sampler("systematic", rounds=50),
        "top_k, passes": sampler("top_k", k=12),
    },
    "raw24": partial(stored, "raw24"),
    "split": partial(stored, "split"),
}


def measured(parts: Any = COSTS) -> dict[str, float]:
    return {name: count for part in parts for name, count in COSTS[part]().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    torch.set_num_threads(1)
    found = json.dumps(measured(), indent=1)
    if parser.parse_args().record:
        RECORD.write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
