"""The page of benchmarks: a missed bar is called missed, what failed says so, and ratios are taken within a round."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page, timing = load("page"), load("timing")


@pytest.mark.parametrize(
    ("value", "wanted", "least", "verdict"),
    [
        (1.0, 1.0, False, "met"),
        (1.01, 1.0, False, "**missed**"),
        (3.2, 3.0, True, "met"),
        (2.9, 3.0, True, "**missed**"),
    ],
)
def test_a_missed_bar_is_called_missed(value, wanted, least, verdict):
    assert page.bar(value, wanted, least=least)[2] == verdict


def test_the_page_shows_what_was_found_and_what_failed():
    """Sections in order; one that did not run gives its reason and nothing else."""
    capture = {
        "machine": {"torch": "2.0", "liger-kernel": None},
        "capture": [
            {
                "teacher": "10m",
                "parameters": 18e6,
                "vocab": 32768,
                "tokens_per_second_over_bare_cpu": 0.9,
                "teacher_waited": 0.002,
            }
        ],
        "writer": {"raw24": 2e6},
    }
    text = page.page({"losses": {"failed": "no memory"}, "capture": capture}, "A note.")
    assert text.index("## The loss\n\nDid not run: no memory") < text.index("## Capture")
    assert "| 0.90 | ≥ 0.95 | **missed** |" in text
    assert "| 2.00 M tokens/s | ≥ 1 M tokens/s | met |" in text
    assert "Not installed, so not compared: liger-kernel." in text
    assert "A note." in text


def test_a_benchmark_that_dies_is_a_failure_on_the_page(tmp_path, monkeypatch):
    """Its last words are kept; one that works hands over its last line."""
    monkeypatch.setattr(page, "HERE", tmp_path)
    (tmp_path / "dies.py").write_text("raise SystemExit('out of luck')")
    (tmp_path / "works.py").write_text("print('table')\nprint('{\"a\": 1}')")
    assert page.run("dies", []) == {"failed": "out of luck"}
    assert page.run("works", []) == {"a": 1}


def test_variants_take_turns_and_ratios_are_within_a_round():
    """A machine that slows down tenfold from round to round leaves the ratio as it is."""
    order, now = [], [0.0]

    def costs(name: str, cost: float):
        def run() -> None:
            order.append(name)
            now[0] += cost * 10 ** (len(order) // 2)

        return run

    seconds = timing.alternating({"base": costs("base", 10), "other": costs("other", 2)}, 3, clock=lambda: now[0])
    assert order == ["base", "other"] * 4
    assert timing.ratios(seconds, "base")["base"] == 1
    assert timing.ratios(seconds, "base")["other"] == pytest.approx(2)  # ten times later in the count, a fifth the cost
    assert [round(each) for each in seconds["base"]] == [100, 1000, 10000]
