"""What an import pulls in, each measured in an interpreter of its own."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekd

HEAVY = ("torch", "transformers", "numpy", "datasets", "matplotlib", "tokenizers", "pydantic", "pyarrow")
PROBE = """
import sys, time
started = time.perf_counter()
{statement}
print(time.perf_counter() - started, *[name for name in {heavy!r} if name in sys.modules])
"""


def pulled_in(statement: str) -> tuple[float, set[str]]:
    """Seconds and heavy packages of a statement in a fresh interpreter."""
    code = PROBE.format(statement=statement, heavy=HEAVY)
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return float(words[0]), set(words[1:])


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("sparsekd", set()),
        ("sparsekd.errors", set()),
        ("sparsekd.cli", set()),
        ("sparsekd.demo", set()),
        ("sparsekd.report", set()),
        ("sparsekd.recipes", {"pydantic"}),
        ("sparsekd.cache", {"numpy"}),
        ("sparsekd.inspect", {"numpy"}),
        ("sparsekd.rows", {"numpy"}),
    ],
)
def test_an_import_pulls_in_no_more_than_it_needs(module, allowed):
    """Heavy packages come with the functions that need them, not with the module."""
    assert pulled_in(f"import {module}")[1] <= allowed


def test_the_measure_sees_heavy_packages():
    """A statement that does import them is told apart; otherwise the laws above would hold of anything."""
    assert "numpy" in pulled_in("from sparsekd import CacheReader")[1]
    assert "torch" in pulled_in("from sparsekd import sample")[1]


def test_importing_sparsekd_takes_no_time():
    """Below a fifth of a second, whatever is installed beside it (the best of three: the machine is shared)."""
    assert min(pulled_in("import sparsekd")[0] for _ in range(3)) < 0.2


def test_type_checkers_see_the_public_names():
    """What is imported for them alone is each lazy name from its home: completion and types in an editor."""
    tree = ast.parse(Path(sparsekd.__file__).read_text())
    shown = [
        (name.asname, name.name, node.module)
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]
    assert sorted(shown) == sorted((name, name, f"sparsekd.{home}") for name, home in sparsekd._HOME.items())


def test_help_needs_no_torch():
    """`sparsekd --help` and a verb's help answer without loading the programs."""
    for words in (["sparsekd", "--help"], ["sparsekd", "train", "--help"], ["sparsekd", "inspect", "--help"]):
        statement = (
            f"import io, contextlib; sys.argv = {words!r}; from sparsekd.cli import main\n"
            "with contextlib.redirect_stdout(io.StringIO()):\n    main()"
        )
        assert pulled_in(statement)[1] <= {"pydantic"}


@pytest.mark.parametrize("name", sparsekd.__all__)
def test_every_public_name_resolves(name):
    """`sparsekd.name` is what its module defines, and dir() lists it."""
    value = getattr(sparsekd, name)
    assert name in dir(sparsekd)
    if name in sparsekd._HOME:
        assert value is getattr(importlib.import_module(f"sparsekd.{sparsekd._HOME[name]}"), name)


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    """AttributeError lists the public names."""
    with pytest.raises(AttributeError, match=r"no attribute 'smaple'; it has .*sample"):
        sparsekd.smaple
