"""The arrows between modules hold: who may import whom, and who never touches torch, files or transformers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparsekd"

# A layer may import the layers before it in this list, and its own.
LAYERS: dict[str, set[str]] = {
    "errors": {"errors"},
    "maths": {
        "targets",
        "rng",
        "trust",
        "inversion",
        "inversion_triton",
        "importance",
        "samplers",
        "sampling_parallel",
        "vocabulary_order",
        "variance",
        "prefix_sets",
        "row_losses",
        "losses",
        "residuals",
        "divergences",
        "fused",
        "fused_chunks",
        "fused_gpu",
        "fused_parallel",
        "fused_triton",
        "sketch",
        "uld",
        "alm",
        "metrics",
    },
    "storage": {
        "checks",
        "order",
        "files",
        "journal",
        "words",
        "flat",
        "adding",
        "codec_weights",
        "codec_counts",
        "compiled",
        "array_kernels",
        "codec_kernels",
        "encode_kernels",
        "codec_ints",
        "codec_split",
        "codec_split_fast",
        "codec_split_weights",
        "codec_weights_fast",
        "codec_split_ratio",
        "codec_scale",
        "id_ranks",
        "codec_curve",
        "codec",
        "quantize",
        "shard",
        "manifest",
        "folder",
        "making",
        "canary",
        "padded",
        "read_ahead",
        "set_table",
        "verify",
        "cache",
    },
    "sources": {
        "sources",
        "corpus",
        "vocab",
        "vocab_bytes",
        "joints",
        "align",
        "cut_kernels",
        "cutting",
        "pair",
        "retokenise",
        "overlay",
        "prompted",
        "position_budget",
        "open_sets",
        "open_kernel",
        "fates",
        "redraw",
        "transcoding",
        "same_text",
        "spool",
        "packed",
        "packing",
        "rows",
        "heads",
        "models",
        "tensor_parallel",
        "generation",
        "instructions",
        "endpoint",
        "rating",
    },
    "programs": {
        "drawing",
        "shard_thread",
        "capture",
        "recompute",
        "misalign",
        "repack",
        "transcode",
        "pool",
        "merge",
        "plan_measures",
        "plan",
        "batches",
        "student",
        "cross_student",
        "cross_acceptance",
        "training_set",
        "training_settings",
        "training_run",
        "cross_set",
        "train",
        "evaluate",
        "judge",
        "answer",
        "inspect",
        "comparison",
        "plots",
        "report_page",
        "report",
        "demo",
        "adapt",
        "drafts",
        "speculate",
        "tasks",
        "reproduction",
        "toys",
        "laws",
        "toy_tasks",
        "toy_images",
        "gradients",
        "lab",
        "tables",
        "zero_shot",
        "teacher_tables",
        "frontier",
        "crosstok",
        "qa",
        "calibration",
        "unique_tokens",
        "measures",
        "reproduce_page",
        "reproduce",
    },
    "front": {"console", "recipes", "cli", "__main__"},
}
# Storage does not rest on maths, though it comes later.
NOT_BELOW = {"storage": {"maths"}}
# Programs meet on disk; these imports between them are meant.
PROGRAMS_TOGETHER = {
    "shard_thread": {"drawing"},
    "capture": {"drawing", "shard_thread"},
    "recompute": {"drawing"},
    "speculate": {"drafts"},
    "plan_measures": {"drawing"},
    "gradients": {"drawing"},
    "plan": {"drawing", "plan_measures", "plots"},
    "train": {"batches", "student", "training_set", "training_settings", "training_run", "cross_student", "cross_set"},
    "training_settings": {"cross_student"},
    "cross_student": {"batches"},
    "cross_set": {"training_set"},
    "adapt": {"train"},
    "report_page": {"plots"},
    "report": {"comparison", "report_page"},
    "reproduction": {"comparison"},
    "reproduce_page": {"report_page", "reproduction"},
    "toys": {"plots", "reproduction"},
    "laws": {"reproduction"},
    "toy_tasks": {"plots", "reproduction"},
    "toy_images": {"reproduction", "toy_tasks"},
    "lab": {"train", "capture", "evaluate", "inspect"},  # inside its functions only
    "tables": {"lab", "reproduction", "comparison", "plots", "zero_shot"},
    "zero_shot": {"lab", "reproduction", "tasks"},
    "measures": {"gradients", "lab", "tables", "reproduction", "plots", "student"},
    "unique_tokens": {"lab", "tables", "toys", "evaluate", "reproduction", "plots"},
    "calibration": {"lab", "tables", "reproduction", "plots"},
    "teacher_tables": {"lab", "tables", "reproduction", "misalign", "evaluate", "adapt", "train"},
    "frontier": {"lab", "measures", "tables", "reproduction", "plots"},
    "crosstok": {
        "cross_acceptance",
        "capture",
        "lab",
        "plots",
        "reproduction",
        "tables",
        "teacher_tables",
        "transcode",
    },
    "qa": {"answer", "capture", "lab", "reproduction", "tables", "train", "transcode"},
    "reproduce": {
        "crosstok",
        "qa",
        "frontier",
        "plots",
        "reproduction",
        "reproduce_page",
        "toys",
        "toy_tasks",
        "toy_images",
        "laws",
        "tables",
        "teacher_tables",
        "calibration",
        "unique_tokens",
        "measures",
    },
    "demo": {"lab", "evaluate", "report"},
}
# Libraries that a layer's modules must not name, wherever in the file.
FORBIDDEN = {
    "errors": {"torch", "numpy", "transformers", "datasets", "json", "pathlib", "os"},
    "maths": {"transformers", "datasets", "json", "pathlib", "os", "numpy", "safetensors"},
    "storage": {"torch", "transformers", "datasets"},
    "sources": {"matplotlib"},
    "programs": {"datasets"},
    "front": {"torch", "datasets", "matplotlib", "numpy"},
}
FORBIDDEN_IN = {
    name: {"torch", "transformers", "numpy"}
    for name in ("comparison", "plots", "report_page", "report", "reproduction", "reproduce_page")
}
# Imported inside functions only, so that `import sparsekd.x` stays quick and optional packages stay optional.
LATE = {
    "transformers",
    "datasets",
    "matplotlib",
    "peft",
    "pyarrow",
    "tokenizers",
    "accelerate",
    "tqdm",
    "yaml",
    "lm_eval",
    "rouge_score",
}


def imports(source: str) -> list[tuple[str, bool]]:
    """(module, at top level) of every import in a file; sparsekd's own as "sparsekd.name"."""
    tree = ast.parse(source)
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = _from_names(node)
        else:
            continue
        found += [(name, id(node) not in late) for name in names]
    return found


def _from_names(node: ast.ImportFrom) -> list[str]:
    home = "sparsekd" if node.level else ""
    module = ".".join(part for part in (home, node.module or "") if part)
    if module == "sparsekd":
        return [f"sparsekd.{alias.name}" for alias in node.names]
    return [module]


def own(name: str) -> str | None:
    """The module of sparsekd that an import names; the package itself (its version) is free."""
    parts = name.split(".")
    return parts[1] if parts[0] == "sparsekd" and len(parts) > 1 and parts[1] != "__version__" else None


def layer_of(module: str) -> str:
    return next((layer for layer, modules in LAYERS.items() if module in modules), "nowhere")


def violations(module: str, source: str) -> list[str]:
    """One sentence for each import of `module` that breaks an arrow."""
    layer, order = layer_of(module), list(LAYERS)
    if layer == "nowhere":
        return [f"{module} has no layer; give it one in LAYERS"]
    found = []
    for name, top in imports(source):
        library, other = name.split(".")[0], own(name)
        if library in FORBIDDEN[layer] | FORBIDDEN_IN.get(module, set()):
            found.append(f"{module} ({layer}) imports {library}")
        if top and library in LATE:
            found.append(f"{module} imports {library} at its head")
        if other is None or other == module:
            continue
        below = layer_of(other)
        if below == "nowhere" or order.index(below) > order.index(layer) or below in NOT_BELOW.get(layer, set()):
            found.append(f"{module} ({layer}) imports {other} ({below})")
        if layer == below == "programs" and (other not in PROGRAMS_TOGETHER.get(module, set())):
            found.append(f"the program {module} imports the program {other}")
        light = (module, other) == ("demo", "lab")  # the lab's own imports are late
        if top and not light and module in ("demo", "recipes", "cli") and below in ("programs", "sources", "maths"):
            found.append(f"{module} imports {other} at its head")
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A round trip through the imports, or []."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_every_import_follows_the_arrows(module):
    """A module names only libraries of its layer and modules of its layer or below."""
    assert violations(module, SOURCES[module]) == []


def test_the_table_names_only_modules_that_exist():
    """LAYERS lists exactly the files of the package."""
    assert set().union(*LAYERS.values()) == set(SOURCES)


def test_imports_make_no_cycle():
    """Following imports, late ones included, never leads back."""
    graph = {module: {o for n, _ in imports(text) if (o := own(n))} for module, text in SOURCES.items()}
    assert cycle(graph) == []


def test_the_package_itself_imports_nothing_heavy():
    """sparsekd/__init__.py loads its public names on first use; what type checkers alone import is no import."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    assert {name for name, _ in imports(ast.unparse(tree))} == {"__future__", "importlib", "typing"}


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        ("losses", "import json", "losses (maths) imports json"),
        ("losses", "def f():\n    from transformers import Trainer", "losses (maths) imports transformers"),
        ("cache", "def f():\n    import torch.nn", "cache (storage) imports torch"),
        ("cache", "from .samplers import sample", "cache (storage) imports samplers (maths)"),
        ("codec", "from .rows import pack", "codec (storage) imports rows (sources)"),
        ("capture", "from sparsekd.train import train", "the program capture imports the program train"),
        ("evaluate", "def f():\n    from sparsekd import capture", "the program evaluate imports the program capture"),
        ("demo", "from sparsekd.train import train", "demo imports train at its head"),
        ("rows", "import datasets", "rows imports datasets at its head"),
        ("rows", "from sparsekd.cli import main", "rows (sources) imports cli (front)"),
        ("report", "from torch import Tensor", "report (programs) imports torch"),
        ("errors", "from . import rng", "errors (errors) imports rng (maths)"),
        ("manager", "import os", "manager has no layer; give it one in LAYERS"),
        ("cli", "from sparsekd import newcomer", "cli (front) imports newcomer (nowhere)"),
    ],
)
def test_the_checker_finds_what_is_forbidden(module, line, words):
    """An import against an arrow is reported, at the head of a file and inside a function."""
    assert words in violations(module, line)


def test_the_checker_finds_cycles():
    """a -> b -> c -> a is told; a diamond is none."""
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}) == []


def test_the_map_names_every_module_once():
    """docs/map.md is where a newcomer begins."""
    named = re.findall(r"`([a-z_0-9]+)`", (PACKAGE.parent / "docs" / "map.md").read_text())
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(named) == sorted(modules)
