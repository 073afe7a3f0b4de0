"""The page of benchmarks: a missed bar is called missed, what failed says so, and ratios are taken within a round."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(BENCHMARKS))
page, timing, losses, samplers, capture = map(load, ("page", "timing", "losses", "samplers", "capture"))
SIZES = losses.Sizes(tokens=40, hidden=8, vocab=64, kept=3)


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
                "tokens_per_second_over_bare": 0.9,
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
    assert page.run("dies", "") == {"failed": "out of luck"}
    assert page.run("works", "") == {"a": 1}


def test_a_kernel_that_was_left_out_is_said(tmp_path, monkeypatch):
    """A GPU that it does not run on is measured with torch in its place, and a page that kept still would mislead."""
    monkeypatch.setattr(page, "HERE", tmp_path)
    (tmp_path / "asks.py").write_text(
        "import torch\nfrom sparsekd import trust\n"
        "trust.agrees('the loss', print, print, torch.device('cpu'), lambda *_: 0.5, 0.1)\nprint('{}')"
    )
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    found = page.run("asks", "")
    why = "the Triton kernel of the loss is off by 0.5 on cpu; plain torch takes its place, slower"
    assert found == {"without": [why]}
    monkeypatch.setitem(page.SECTIONS, "capture", lambda *_: "Figures.")
    assert f"## Capture\n\n**Without its kernel**: {why}.\n\nFigures." in page.page({"capture": found}, "")


def test_the_page_is_written_after_every_section(tmp_path, monkeypatch):
    """A machine that is taken away leaves what was measured."""
    monkeypatch.setattr(page, "run", lambda name, words: {"failed": "gone"} if name == "samplers" else 1 / 0)
    monkeypatch.setattr(sys, "argv", ["page", "--device", "cuda", "--only", "samplers,capture", "--out", str(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        page.main()
    assert "Did not run: gone" in (tmp_path / "benchmarks_gpu.md").read_text()


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


def test_what_takes_too_long_to_warm_up_counts_from_the_first_round():
    calls = []
    seconds = timing.alternating({"only": lambda: calls.append(1)}, 2, warm=0)
    assert (len(calls), len(seconds["only"])) == (2, 2)


def test_on_an_accelerator_the_clock_waits_for_what_was_queued(monkeypatch):
    """Its reading is later than the end of the work that was queued before."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("done"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: events.append("read") or 3.0)
    assert timing.clock_for("cuda")() == 3.0
    assert events == ["done", "read"]
    assert timing.clock_for("cpu") is timing.time.process_time


def test_a_gpus_peak_is_beyond_inputs_and_gradients(monkeypatch):
    """7 bytes over what was there and the two gradients that were made; none for a head whose gradient is elsewhere."""
    gradients = 4 * SIZES.hidden * (SIZES.tokens + SIZES.vocab)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 107 + gradients)
    assert losses.cuda_growth("fused_linear_sparse_kl", SIZES) == 7
    into = losses.cuda_growth("fused, gradient into head.grad", SIZES)
    assert into == 7 + 4 * SIZES.hidden * SIZES.vocab


def test_every_way_to_the_same_loss_gives_the_same_loss():
    """All variants of one equation agree, peers and formulas of peers included, and every one gives both gradients."""
    x = losses.make(SIZES)
    x["targets"] = losses.SparseTargets(
        ids=torch.stack([torch.randperm(SIZES.vocab)[: SIZES.kept] for _ in range(SIZES.tokens)]),
        weights=torch.full((SIZES.tokens, SIZES.kept), 1 / SIZES.kept),
    )
    found = losses.variants("cpu")
    sparse = [name for name in found if "KL" in name or "sparse_kl" in name]
    hard = [losses.BASE, "fused, cross-entropy alone", *losses.peers("cpu")]
    for names in (sparse, hard):
        for name in names:
            torch.testing.assert_close(found[name](x), found[names[0]](x), rtol=1e-5, atol=1e-6)
    assert len(sparse) == 5
    for name in set(found) - {"three bare products", "fused, gradient into head.grad"}:
        losses.step(found[name], x)
        assert min(x[leaf].grad.abs().max() for leaf in ("hidden", "head")) > 0, name


@pytest.mark.parametrize("device", page.PAGES)
def test_the_words_of_a_page_are_ones_its_programs_know(device, monkeypatch):
    """Each section's program starts with them (up to its first work): a page that fails after an hour helps nobody."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for section, (program, words) in page.PAGES[device].runs.items():
        assert section in page.SECTIONS
        assert section in page.TITLES
        module = load(program)
        seen = []
        first = {"losses": "times", "samplers": "measure", "capture": "capture_share", "reading": "make_records"}
        monkeypatch.setattr(module, first[program], lambda *given, seen=seen: seen.append(given) or 1 / 0)
        monkeypatch.setattr(sys, "argv", [program, *words.split()])
        with pytest.raises(ZeroDivisionError):
            module.main()
        if "--device" in words:
            assert "cuda" in seen[0] or seen[0][0].device == "cuda"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_loss_is_drawn_with_its_bars_and_curves(device, tmp_path):
    """What the programs give on tiny sizes makes a page and a plot; a GPU's page has its own bars, peers and names."""
    found = losses.times(SIZES, losses.variants("cpu"), 1)
    points = losses.curve("tokens", (8, 16), SIZES, 1)
    assert [point["tokens"] for point in points] == [8, 16]
    sizes = SIZES.__dict__ | {"device": device}
    facts = {"torch": "2", **({} if device == "cpu" else {"accelerator": "one GPU"})}
    curves = {
        name: [{**point, name: point["tokens"]} for point in points] for name in ("tokens", "hidden", "vocab", "kept")
    }
    result = {"machine": facts, "sizes": sizes, "chunk_bytes": 1, "variants": found, "curves": curves}
    kind = page.PAGES[device]
    text = page.page({"losses": result}, "", kind)
    assert ("need a GPU" in text) == (device == "cpu")
    assert "fused_linear_sparse_kl / three bare products | " in text
    assert f"(images/{kind.plots}_losses.svg)" in text
    page.plots({"losses": result}, tmp_path, kind.plots)
    assert (tmp_path / f"{kind.plots}_losses.svg").exists()


def test_sampling_and_capture_run_at_tiny_sizes():
    """The functions that a device is handed to, whole."""
    column = samplers.measure(64, 8, 5, 1)
    assert set(column["ratio"]) == set(column["us_per_position"])
    assert column["law_gap"] < 1e-5
    share = capture.capture_share("tiny", 128, 1, "cpu", 16)
    assert share["tokens_per_second_over_bare"] > 0


def test_what_eight_gpus_would_wait_is_arithmetic():
    """A hand-over of 1 ms and 1 M tokens/s a core: at 1 M tokens/s a GPU reads all the time, at 2 M it waits half."""
    found = {
        "waits": {"read ahead, µs a batch": 1000.0},
        "tokens_per_second": {"split": 1e6},
    }
    text = page.eight_gpus(found, (1.0, 0.5), flops=6e6)
    assert "take 8.00 M tokens/s, 100.0% of one core" in text
    assert "wait 3.05% of the time;" in text
    assert "take 16.00 M tokens/s, 200.0% of one core" in text
    assert "wait 50.00% of the time" in text
