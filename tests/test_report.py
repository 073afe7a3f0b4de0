"""The report says what the numbers say: hand-made folders in, numbers and pages out."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsekd import comparison, plots
from sparsekd.errors import SourceError
from sparsekd.report import aggregate, render_html, report, terminal_table

METHODS = (
    {"name": "ce", "label": "Cross-entropy", "cache": None},
    {"name": "topk", "label": "Top-K 12", "cache": "topk12"},
    {"name": "rs", "label": "Random sampling N=50", "cache": "rs50"},
    {"name": "full_kd", "label": "Full KD (online teacher)", "cache": None},
)
LOSSES = {"ce": 4.703, "topk": 5.057, "rs": 4.342, "full_kd": 4.324}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def diagram(gap: float) -> list[dict[str, Any]]:
    """Fifteen bins whose accuracy lies `gap` below the confidence in the middle."""
    bins = []
    for i in range(15):
        c = (i + 0.5) / 15
        accuracy = min(1.0, max(0.0, c - gap * math.sin(math.pi * c) ** 0.7))
        bins.append({"count": int(40_000 * math.exp(-3.2 * c)) + 800, "confidence": c, "accuracy": accuracy})
    return bins


def evaluation(loss: float, gap: float, accept: float) -> dict[str, Any]:
    bins = diagram(gap)
    total = sum(b["count"] for b in bins)
    return {
        "loss": {"mean": loss, "standard_error": 0.021},
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / 3.4,
        "ece": sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / total,
        "reliability": bins,
        "acceptance": {"mean": accept, "standard_error": 0.002},
        "agreement": {"mean": accept - 0.09, "standard_error": 0.003},
        "tokens": 52_000,
        "rows": 204,
    }


def training(name: str, seed: int, final: float, rng: random.Random) -> dict[str, Any]:
    log: list[dict[str, Any]] = []
    for step in range(50, 1501, 50):
        log.append({"step": step - 10, "loss": 3.0, "learning_rate": 1e-3})
        level = final + 2.9 * math.exp(-step / 260) + 0.25 * (1500 - step) / 1500 + rng.gauss(0, 0.008)
        log.append({"step": step, "eval_loss": final if step == 1500 else level})
    speed = {"ce": 21_400, "topk": 20_800, "rs": 20_500, "full_kd": 9_700}[name] * (1 + rng.gauss(0, 0.01))
    return {"method": name, "seed": seed, "seconds": 3.1e6 / speed, "tokens_per_second": speed, "log": log}


def make_run(root: Path, seeds: tuple[int, ...] = (0, 1, 2), losses: dict[str, float] = LOSSES) -> Path:
    """A folder as a finished run leaves it, with invented but realistic numbers."""
    rng = random.Random(7)
    gaps, accepts = (
        {"ce": 0.012, "topk": 0.21, "rs": 0.015, "full_kd": 0.010},
        {"topk": 0.47, "rs": 0.561, "full_kd": 0.566},
    )
    write(
        root / "run.json",
        {
            "title": "Standard-library Python, 2 k vocabulary",
            "profile": "quick",
            "seeds": list(seeds),
            "corpus": {
                "source": "builtin",
                "characters": 9_012_331,
                "tokens": 3_100_000,
                "sha256": "3f9a1c77d0e2",
            },
            "teacher": {"params": 1_310_720, "loss": 3.871, "layers": 4, "hidden": 128},
            "student": {"params": 327_680, "layers": 2, "hidden": 64},
            "methods": [dict(m) for m in METHODS],
            "commands": {
                "pack": "sparsekd pack source=builtin tokenizer=train seq_len=256 out=demo/rows",
                "capture": "sparsekd capture rows=demo/rows teacher=demo/teacher "
                "sampler=random_sampling sampler.rounds=50 out=demo/caches/rs50",
                "train": "sparsekd train cache=demo/caches/rs50 student=tiny seed=0 out=demo/students/rs-s0",
            },
            "machine": "2 CPU cores, 23 GB, Linux",
            "seconds": {"pack": 21, "teacher": 412, "capture": 61, "train": 1710, "evaluate": 95},
            "versions": {"sparsekd": "0.1.0", "python": "3.12.4", "torch": "2.13.0"},
        },
    )
    for m in METHODS:
        name = str(m["name"])
        for seed in seeds:
            luck = random.Random(seed).gauss(0, 0.02) + rng.gauss(0, 0.006)
            folder = root / "students" / f"{name}-s{seed}"
            write(folder / "metrics.json", training(name, seed, losses[name] + luck, rng))
            accept = accepts.get(name, 0.512) + rng.gauss(0, 0.002)
            write(folder / "evaluation.json", evaluation(losses[name] + luck, gaps[name], accept))
    write(
        root / "teacher" / "evaluation.json",
        evaluation(3.871, 0.006, 0.0) | {"acceptance": None, "agreement": None},
    )
    for cache, size in (("topk12", 38.2), ("rs50", 41.7)):
        totals = {"tokens": 3_100_000, "positions": 3_087_890, "pairs": 37_000_000}
        shards = [{"bytes": int(size * 1_550_000)}] * 2
        manifest = {"spec": {"logit_width": 2048}, "stats": totals, "shards": shards}
        write(root / "caches" / cache / "manifest.json", manifest)
        stats = {"unique_ids": {"mean": 13.2, "histogram": [0, 3, 5]}, "bytes_per_token": size, "rounds": 50}
        write(root / "caches" / cache / "stats.json", stats)
    rounds = [1, 2, 5, 10, 20, 50, 100, 200]
    unique = [0.98 * r**0.66 * (1 + rng.gauss(0, 0.015)) for r in rounds]
    write(
        root / "unique_ids.json",
        {"rounds": rounds, "unique": unique, "power_law": {"exponent": 0.66, "prefactor": 0.98}},
    )
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return render_html(aggregate(finished))


def tiny_run(root: Path, losses: dict[str, list[float]], **extra: Any) -> Path:
    """Students with nothing but a loss per seed."""
    methods = [m for m in METHODS if m["name"] in losses]
    write(root / "run.json", {"seeds": list(range(len(next(iter(losses.values()))))), "methods": methods} | extra)
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            write(root / "students" / f"{name}-s{seed}" / "evaluation.json", {"loss": {"mean": loss}})
    return root


def by_name(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {m["name"]: m for m in summary["methods"]}


# -- numbers


def test_numbers_by_hand(tmp_path: Path) -> None:
    """CE 5, 6; random sampling 4, 4.5; full KD 3, 4: differences -1, -1.5 and 2.5/4 of the gap closed."""
    root = tiny_run(tmp_path, {"ce": [5.0, 6.0], "rs": [4.0, 4.5], "full_kd": [3.0, 4.0]})
    got = by_name(aggregate(root))
    assert (got["ce"]["loss"]["mean"], got["ce"]["loss"]["standard_error"]) == (5.5, pytest.approx(0.5))
    difference = got["rs"]["against_ce"]
    assert difference["values"] == {"0": -1.0, "1": -1.5}
    assert (difference["mean"], difference["standard_error"]) == (-1.25, pytest.approx(0.25))
    assert difference["high"] == pytest.approx(-1.25 + 12.706 * 0.25)
    # Ratio 5/8; residuals 1 - 2·5/8 and 1.5 - 2·5/8; error = sqrt(2 · 2/16)/4.
    assert got["rs"]["gap_closed"]["mean"] == pytest.approx(2.5 / 4)
    assert got["rs"]["gap_closed"]["standard_error"] == pytest.approx(math.sqrt(2 * 2 / 16) / 4)
    assert [got[n]["gap_closed"]["mean"] for n in ("ce", "full_kd")] == [0.0, 1.0]


def test_differences_are_paired_over_shared_seeds_only(tmp_path: Path) -> None:
    """A seed that one method lacks drops out of the difference, not out of that method's own mean."""
    root = tiny_run(tmp_path, {"ce": [5.0, 6.0, 9.0], "rs": [4.0, 5.5, 1.0]})
    shutil.rmtree(root / "students" / "ce-s2")
    got = by_name(aggregate(root))
    assert got["rs"]["against_ce"]["values"] == {"0": -1.0, "1": -0.5}
    assert got["rs"]["loss"]["mean"] == pytest.approx(3.5)


def test_intervals_use_the_quantile_of_few_seeds(tmp_path: Path) -> None:
    """Three seeds: the 95 % interval is ± 4.303 standard errors."""
    d = by_name(aggregate(tiny_run(tmp_path, {"ce": [5.0, 5.0, 5.0], "rs": [4.9, 4.8, 4.7]})))["rs"]["against_ce"]
    assert (d["mean"] - d["low"]) / d["standard_error"] == pytest.approx(4.303)


def test_seeds_reliability_is_pooled_by_count() -> None:
    """Bins of 10 at 0.5 and 30 at 0.9 pool to 40 at 0.8; empty bins stay empty."""
    from sparsekd.report import _pool

    empty = {"count": 0, "confidence": None, "accuracy": None}
    one = [{"count": 10, "confidence": 0.5, "accuracy": 0.1}, empty]
    two = [{"count": 30, "confidence": 0.9, "accuracy": 0.5}, empty]
    assert _pool([one, two]) == [{"count": 40, "confidence": pytest.approx(0.8), "accuracy": pytest.approx(0.4)}, empty]


def test_mean_curves_use_the_steps_that_all_seeds_have() -> None:
    """Steps 1 and 3 are shared; averaging step 2 over one seed would bend the curve."""
    from sparsekd.report import _mean_curve

    assert _mean_curve([[[1, 5.0], [2, 9.0], [3, 4.0]], [], [[3, 3.0], [1, 6.0]]]) == [[1, 5.5], [3, 3.5]]


def test_speed_storage_and_curves(finished: Path) -> None:
    """Speed is paired with CE's, bytes come from the cache's measure, dense is 2 bytes times the logit width."""
    summary = aggregate(finished)
    got = by_name(summary)
    speeds = [
        json.loads((finished / "students" / f"{n}-s1" / "metrics.json").read_text())["tokens_per_second"]
        for n in ("rs", "ce")
    ]
    assert got["ce"]["relative_speed"]["mean"] == 1.0
    assert got["rs"]["relative_speed"]["mean"] == pytest.approx(speeds[0] / speeds[1], rel=0.05)
    bars = {b["name"]: b["bytes_per_token"] for b in summary["storage"]}
    assert bars == {"dense": 4096, "topk": 38.2, "rs": 41.7}
    assert [p[0] for p in got["rs"]["curve"]] == list(range(50, 1501, 50))
    ends = [s["curve"][-1][1] for s in got["rs"]["students"]]
    assert got["rs"]["curve"][-1][1] == pytest.approx(sum(ends) / 3)
    assert summary["notes"] == []


def test_bytes_per_token_fall_back_to_the_manifest(finished: Path, tmp_path: Path) -> None:
    """Without the demo's stats.json the files' bytes over the tokens are used, and the ids over the positions."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    (root / "caches/rs50/stats.json").unlink()
    summary = aggregate(root)
    assert by_name(summary)["rs"]["bytes_per_token"] == pytest.approx(41.7)
    assert by_name(summary)["rs"]["unique_ids"] == pytest.approx(37_000_000 / 3_087_890)
    assert summary["notes"] == []


def test_seed_statistics_agree_with_the_metrics(finished: Path) -> None:
    """The report's torch-free errors are those of sparsekd.metrics: paired means, and the ratio of sums."""
    from sparsekd import metrics

    got = by_name(aggregate(finished))
    d = {name: list(got[name]["against_ce"]["values"].values()) for name in ("rs", "full_kd")}
    paired = metrics.mean_and_standard_error(d["rs"])
    assert got["rs"]["against_ce"]["mean"] == pytest.approx(paired.mean)
    assert got["rs"]["against_ce"]["standard_error"] == pytest.approx(paired.standard_error)
    ratio = metrics.ratio_of_sums([-x for x in d["rs"]], [-x for x in d["full_kd"]])
    assert got["rs"]["gap_closed"]["mean"] == pytest.approx(ratio.mean)
    assert got["rs"]["gap_closed"]["standard_error"] == pytest.approx(ratio.standard_error)


# -- the verdict


CE = [5.00, 5.10, 4.90]


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (
            {"ce": CE, "topk": [5.30, 5.41, 5.20], "rs": [4.60, 4.71, 4.50], "full_kd": [4.50, 4.61, 4.40]},
            "Random sampling N=50 beats cross-entropy and Top-K 12, closing 80 % of the gap to full distillation.",
        ),
        (
            {"ce": CE, "topk": [4.60, 4.69, 4.52], "rs": [4.58, 4.72, 4.50]},
            "Random sampling N=50 beats cross-entropy, but does not differ from Top-K 12 beyond the noise.",
        ),
        (
            {"ce": CE, "topk": [4.60, 4.70, 4.50], "rs": [4.80, 4.91, 4.70]},
            "Random sampling N=50 beats cross-entropy, but is worse than Top-K 12.",
        ),
        (
            {"ce": CE, "rs": [4.90, 5.25, 4.80]},
            "Random sampling N=50 does not differ from cross-entropy beyond the noise.",
        ),
        ({"ce": CE, "rs": [5.20, 5.31, 5.10]}, "Random sampling N=50 is worse than cross-entropy."),
        (
            {"ce": [5.0], "rs": [4.6]},
            "With one seed, Random sampling N=50 ended 0.400 nats below cross-entropy; "
            "one seed has no error bar, so nothing is claimed.",
        ),
        (
            {"ce": CE},
            "There is nothing to compare yet: no sparse method and baseline were evaluated with a shared seed.",
        ),
    ],
)
def test_the_verdict_claims_what_the_numbers_carry(
    tmp_path: Path, losses: dict[str, list[float]], sentence: str
) -> None:
    """Better, tied, worse, one seed, nothing: each gets its own honest sentence, on the page and in the terminal."""
    summary = aggregate(tiny_run(tmp_path, losses))
    assert summary["verdict"] == sentence
    assert sentence.split(",")[0][:40] in render_html(summary).replace("\u00a0", " ")
    assert sentence in " ".join(terminal_table(summary).split())


def test_no_gap_is_claimed_where_full_distillation_does_not_win(tmp_path: Path) -> None:
    """A gap within the noise, or negative, gives no percentage, and the page says why."""
    summary = aggregate(tiny_run(tmp_path, {"ce": CE, "rs": [4.6, 4.7, 4.5], "full_kd": [4.9, 5.2, 4.85]}))
    assert by_name(summary)["rs"]["gap_closed"] is None
    assert any("did not beat Cross-entropy beyond the noise" in note for note in summary["notes"])
    assert "closing" not in summary["verdict"]


# -- what is missing


def test_an_empty_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Nothing to report is an error that names the folder and the command that fills it."""
    with pytest.raises(
        SourceError, match=r"no results in .*neither run.json nor .* `sparsekd evaluate model=.* or `sparsekd demo out="
    ):
        report(tmp_path)
    with pytest.raises(SourceError, match="no results"):
        report(tmp_path / "absent")
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "absent").exists()


PIECES = (
    "run.json",
    "unique_ids.json",
    "teacher/evaluation.json",
    "students/rs-s1/metrics.json",
    "students/rs-s1/evaluation.json",
    "caches/rs50/manifest.json",
)


@pytest.mark.parametrize("damage", ["absent", "{", "[1]", "{}", '{"loss": {"mean": NaN}}', "\xff\xfe"])
def test_any_piece_may_be_missing_or_damaged(
    finished: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page appears for each broken piece, and a note on it names the file unless it is merely empty."""
    monkeypatch.setattr(plots, "available", lambda: False)  # figures of broken runs: the next test
    for i, piece in enumerate(PIECES):
        root = Path(shutil.copytree(finished, tmp_path / str(i)))
        (root / piece).unlink()
        if damage != "absent":
            (root / piece).write_bytes(damage.encode("latin-1"))
        report(root)
        html = (root / "report.html").read_text(encoding="utf-8")
        assert "Random sampling N=50" in html or piece == "run.json"
        if not damage.startswith("{") or damage == "{":
            assert f"<li>{piece} " in html


def test_figures_survive_values_of_the_wrong_kind(finished: Path, tmp_path: Path) -> None:
    """Strings, nulls, lists and negative numbers in every field of an evaluation still draw a page."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    original = json.loads((root / "students/rs-s0/evaluation.json").read_text())
    for odd in (None, "7", [], {}, -1, True):
        write(root / "students/rs-s0/evaluation.json", dict.fromkeys(original, odd))
        write(root / "students/rs-s0/metrics.json", {"log": [{"step": odd, "eval_loss": odd}, odd], "seconds": odd})
        write(root / "unique_ids.json", {"rounds": [odd, 1, 2], "unique": [1, odd, 2], "power_law": odd})
        assert render_html(aggregate(root)).endswith("</html>\n")


def test_a_missing_method_is_a_note_and_empty_cells(finished: Path, tmp_path: Path) -> None:
    """All seeds of a method gone: its row stays with dashes, the others keep their numbers."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    for seed in range(3):
        shutil.rmtree(root / "students" / f"topk-s{seed}")
    summary = aggregate(root)
    assert summary["notes"] == [f"students/topk-s{seed} is missing." for seed in range(3)]
    assert by_name(summary)["topk"]["loss"] is None
    assert "students/topk-s1 is missing." in render_html(summary)
    assert re.search(r"Top-K 12 +- +- ", terminal_table(summary))


def test_students_that_run_json_does_not_know_are_named(finished: Path, tmp_path: Path) -> None:
    """A stray seed is left out of the means, and said."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.copytree(root / "students/rs-s0", root / "students/rs-s9")
    assert aggregate(root)["notes"] == ["students/rs-s9 is not part of run.json and was left out."]


@pytest.mark.parametrize("home", ["students", "."])
def test_students_of_ones_own_need_no_names_of_ours(tmp_path: Path, home: str) -> None:
    """Folders of any name, no run.json: their recipes say which is the baseline, the seed, and where the cache is."""
    losses = {"plain": ("ce", 5.0), "full": ("cached", 4.25), "online-s7": ("full_kd", 4.0), "notes": (None, 0)}
    write(tmp_path / "cache" / "manifest.json", {"stats": {"tokens": 10}, "shards": [{"bytes": 120}]})
    for name, (method, loss) in losses.items():
        folder = tmp_path / "mine" / home / name
        if method is None:
            write(folder / "notes.txt", "no student")
            continue
        beside = {"cache": os.path.relpath(tmp_path / "cache", folder)}
        write(folder / "recipe.json", {"method": method, "seed": 7, "beside": beside})
        write(folder / "evaluation.json", {"loss": {"mean": loss}})
        write(folder / "metrics.json", {"log": []})
    summary = aggregate(tmp_path / "mine")
    found = by_name(summary)
    assert {name: m["role"] for name, m in found.items()} == {"plain": "ce", "full": "other", "online": "full_kd"}
    assert [s["seed"] for m in summary["methods"] for s in m["students"]] == [7, 7, 7]
    assert (found["full"]["gap_closed"]["mean"], found["full"]["bytes_per_token"]) == (0.75, 12)
    assert found["plain"]["bytes_per_token"] is None  # it read its rows there, no targets
    write(tmp_path / "mine" / home / "full" / "recipe.json", {"method": 3, "seed": "x", "beside": {"cache": 7}})
    assert by_name(aggregate(tmp_path / "mine"))["full"]["bytes_per_token"] is None
    assert not [note for note in summary["notes"] if "plain" in note or "full" in note or "online" in note]
    assert render_html(summary).endswith("</html>\n")


def test_without_matplotlib_the_tables_stay(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots, but all numbers, and the page says how to get the plots."""
    monkeypatch.setattr(plots, "available", lambda: False)
    html = render_html(aggregate(finished))
    assert "<svg" not in html
    assert "pip install &#x27;sparsekd[report]&#x27;" in html
    assert "Random sampling N=50</th>" in html


# -- the page


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids, references and the headings."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "aria-labelledby"):
                self.references.add((value or "").lstrip("#"))
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    return parser


def test_the_page_is_well_formed(page: str) -> None:
    """Tags nest and close, ids are unique over all figures, every reference has its target."""
    found = outline(page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert found.references <= set(found.ids)
    assert found.tags.count("h1") == 1
    assert found.tags.count("svg") == 5 + 5  # two curves, differences, storage, unique ids; five panels


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    """No address, script, import or outside image: it opens the same in ten years and without a network."""
    for word in ("http:", "https:", "<script", "@import", "src=", "<link", "javascript:", "onload"):
        assert word not in page
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    assert "file:" not in page


def test_figures_are_described_and_themed(page: str) -> None:
    """Each SVG has a role and a description, and takes every colour from the page's two themes."""
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for svg in svgs:
        assert re.match(r'<svg viewBox="[^"]+" role="img" aria-label="[^"]{10,}">', svg)
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "prefers-color-scheme:dark" in page
    used = set(re.findall(r"var\(--([\w-]+)\)", page)) - {"lead"}
    assert used <= plots.PALETTE.keys() == plots.DARK.keys()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [plots.PALETTE, plots.DARK])
def test_every_text_colour_is_readable(theme: dict[str, str]) -> None:
    """At least 4.5:1 against the paper in both themes (WCAG AA), hairlines aside."""
    for name in theme.keys() - {"line", "paper"}:
        light, dark = sorted((luminance(theme[name]), luminance(theme["paper"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_the_table_shows_the_numbers(finished: Path, page: str) -> None:
    """The random sampling row holds its aggregated loss, error, ECE and bytes."""
    m = by_name(aggregate(finished))["rs"]
    row = re.search(r'<tr class="lead">.*?</tr>', page, flags=re.DOTALL)
    assert row
    text = re.sub(r"<[^>]+>", " ", row[0])
    for number in (f"{m['loss']['mean']:.3f}", f"{m['loss']['standard_error']:.3f}", f"{100 * m['ece']['mean']:.2f}"):
        assert number in text
    assert "41.7" in text


def test_words_from_outside_are_only_words(finished: Path, tmp_path: Path) -> None:
    """Markup and mathematics in a label reach the page as text, in tables and in figures."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    run = json.loads((root / "run.json").read_text())
    run["methods"][2]["label"] = "<script>x</script> & $x^2$"
    run["title"] = run["machine"] = "</title><img src=x>"
    run["commands"] = ["echo '<b>'"]
    run["corpus"] = {"<i>": ["<u>", {"deep": None}]}
    write(root / "run.json", run)
    html = render_html(aggregate(root))
    for markup in ("<script", "<img", "<u>", "<i>", "<b>'"):
        assert markup not in html
    label = "&lt;script&gt;x&lt;/script&gt; &amp; $x^2$"
    assert f"{label}</th>" in html
    assert re.search(rf"<text[^>]*>[^<]*{re.escape(label)}</text>", html)
    assert outline(html).open == []


def test_equal_folders_give_equal_pages(finished: Path, page: str) -> None:
    """No dates, no random ids: the bytes depend on the numbers alone."""
    assert render_html(aggregate(finished)) == page


def test_report_writes_both_files_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    """report.json is the returned summary as strict JSON; no temporary file stays."""
    summary = report(finished, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    text = (tmp_path / "out/report.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == summary


# -- small laws


def test_a_methods_colour_does_not_depend_on_its_neighbours() -> None:
    """Roles have fixed colours; a second Top-K gets a colour of its own."""
    rs, topk, other = ({"name": n, "role": r} for n, r in (("rs50", "rs"), ("topk12", "topk"), ("topk50", "topk")))
    assert plots.colours([rs])["rs50"] == plots.colours([topk, other, rs])["rs50"] == "rs"
    assert len(set(plots.colours([rs, topk, other]).values())) == 5  # with teacher and dense


def test_labels_move_apart_and_keep_their_order() -> None:
    """After spreading no two values are closer than the gap, the order holds, the centre stays."""
    rng = random.Random(0)
    for _ in range(200):
        values = [rng.gauss(0, 1) for _ in range(rng.randint(1, 7))]
        got = plots.spread(values, 0.5)
        placed = sorted(got)
        assert all(b - a >= 0.5 - 1e-9 for a, b in itertools.pairwise(placed))
        assert sorted(range(len(got)), key=got.__getitem__) == sorted(range(len(values)), key=values.__getitem__)
        assert sum(got) == pytest.approx(sum(values))
    assert plots.spread([0.0, 3.0], 0.5) == [0.0, 3.0]


def test_the_terminal_table_fits_and_aligns(finished: Path) -> None:
    """No line passes 80 columns, however long the labels; all rows are equally wide."""
    summary = aggregate(finished)
    summary["methods"][1]["label"] = "Top-K with a very long name indeed, 12 ids"
    lines = terminal_table(summary).splitlines()
    assert max(map(len, lines)) <= 80
    assert len({len(line) for line in lines[:6]}) == 1
    assert "Top-K with a very long …" in lines[3]


def test_student_t_beyond_the_table() -> None:
    """16 and 100 degrees of freedom: 2.120 and 1.984, met within 0.003."""
    assert comparison.t975(16) == pytest.approx(2.120, abs=0.004)
    assert comparison.t975(100) == pytest.approx(1.984, abs=0.004)


def test_importing_the_report_needs_neither_torch_nor_matplotlib() -> None:
    """Plots know no torch, and matplotlib waits until a figure is drawn."""
    code = "import sys, sparsekd.report; print([m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
