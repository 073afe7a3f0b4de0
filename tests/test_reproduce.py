"""Reproductions are run once, kept, drawn and shown beside the paper's numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from sparsekd import plots
from sparsekd import reproduce as frame
from sparsekd.errors import MismatchError, RecipeError
from sparsekd.reproduce import REPRODUCTIONS, names_of, reproduce
from sparsekd.reproduce_page import terminal_text
from sparsekd.reproduction import (
    Cell,
    Column,
    Finding,
    Reproduction,
    Result,
    Settings,
    Table,
    beside,
    exact,
    from_json,
    over,
    shown,
    to_json,
)

OURS = Table(
    columns=(Column(name="Loss", unit="nats", form=".2f"), Column(name="Words")),
    rows={"CE": (Cell(mean=2.5, standard_error=0.25, n=3), "plain"), "Mine": (Cell(mean=-1.0), None)},
)
PAPER = Table(columns=(Column(name="ECE", form=".1f"), Column(name="Loss", form=".2f")), rows={"CE": exact(1.2, 2.81)})
RESULT = Result(
    ours=OURS,
    paper=PAPER,
    scale="Here small, there large.",
    findings=(
        Finding(text="It holds.", holds=True),
        Finding(text="It <fails>.", holds=False),
        Finding(text="By the way."),
    ),
    data={"heights": [1.0, 2.0]},
)


def draw(result: Result) -> object:
    with plots.canvas(200, 100, left=20, right=5, bottom=20) as (figure, axes):
        axes.plot(result.data["heights"], color=plots.PALETTE["rs"])
    return figure


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Two quick reproductions stand in for the paper's; the list tells with which settings they ran."""
    seen: list[Settings] = []

    def run(folder: Path, settings: Settings) -> Result:
        assert folder.is_dir()
        seen.append(settings)
        return RESULT

    one = Reproduction(title="One & only", source="fig. 1", claim="It is so.", run=run, plot=draw)
    two = Reproduction(title="Two", source="table 2", claim="It is so too.", run=run, uses=("teacher", "rows"))
    monkeypatch.setattr(frame, "REPRODUCTIONS", {"one": one, "two": two})
    return seen


# -- the value


def test_a_result_survives_json():
    """to_json then from_json gives an equal result, through the text of strict JSON."""
    text = json.dumps(to_json(RESULT), allow_nan=False)
    assert from_json(json.loads(text)) == RESULT


def test_diverged_numbers_survive_json():
    """inf and nan, which a diverging method may give, are kept although JSON has no such numbers."""
    table = Table(columns=OURS.columns[:1], rows={"t = 0": (Cell(mean=math.inf, standard_error=math.nan, n=3),)})
    back = from_json(json.loads(json.dumps(to_json(Result(ours=table, scale="")), allow_nan=False)))
    (cell,) = back.ours.rows["t = 0"]
    assert cell.mean == math.inf
    assert math.isnan(cell.standard_error)


def test_a_row_has_a_cell_for_each_column():
    """A table whose row is too short is refused when it is made."""
    with pytest.raises(ValueError, match=r"row 'CE' has 1 cells for 2 columns"):
        Table(columns=OURS.columns, rows={"CE": exact(1)})


def test_over_is_the_mean_with_its_standard_error():
    """Three seeds 1, 2, 3: mean 2, error 1/√3; one seed has no error; none is None."""
    cell = over([1.0, 2.0, 3.0])
    assert (cell.mean, cell.n) == (2.0, 3)
    assert cell.standard_error == pytest.approx(1 / math.sqrt(3))
    assert over([5.0]) == Cell(mean=5.0, standard_error=None, n=1)
    assert over([None]) is None


def test_cells_as_text():
    """True minus signs, the error in the column's own format, a dash for nothing, words as they are."""
    assert shown(Cell(mean=-2.5, standard_error=0.25), ".2f") == "−2.50 ± 0.25"
    assert shown(Cell(mean=1e-15), ".0e") == "1e−15"
    assert shown(None, ".2f") == "–"
    assert shown("yes", ".2f") == "yes"


def test_the_papers_numbers_stand_beside_ours_by_name():
    """Columns and rows are matched by name: ours first, then what only the paper has; gaps are None."""
    columns, rows = beside(RESULT)
    assert [c.name for c in columns] == ["Loss", "Words", "ECE"]
    assert dict(rows)["CE"] == [(OURS.rows["CE"][0], Cell(mean=2.81)), ("plain", None), (None, Cell(mean=1.2))]
    assert dict(rows)["Mine"] == [(Cell(mean=-1.0), None), (None, None), (None, None)]


# -- running


def test_a_complete_result_is_not_run_again(runs, tmp_path):
    """The second call reads what the first wrote, and returns an equal result."""
    first = reproduce(name="one", out=tmp_path, progress=False)
    second = reproduce(name="one", out=tmp_path, progress=False)
    assert len(runs) == 1
    assert first == second == {"one": RESULT}


def test_numbers_plot_and_page_are_written(runs, tmp_path):
    """result.json, a PNG and an SVG for each name that has a plot, one page for all."""
    reproduce(out=tmp_path, seeds=2, progress=False)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"index.html", "one/result.json", "one/one.png", "one/one.svg", "two/result.json"}
    record = json.loads((tmp_path / "one/result.json").read_text())
    assert record["settings"] == {"seeds": 2, "profile": "quick"}
    assert record["result"]["ours"]["rows"]["CE"][0] == {"mean": 2.5, "standard_error": 0.25, "n": 3}
    assert (tmp_path / "one/one.png").read_bytes().startswith(b"\x89PNG")


def test_other_settings_need_another_folder(runs, tmp_path):
    """A kept result made with other settings is refused, with both values and the way out."""
    reproduce(name="one", out=tmp_path, progress=False)
    with pytest.raises(MismatchError, match=r"one was made with seeds=3, now seeds=5 is asked for; choose another out"):
        reproduce(name="one", out=tmp_path, seeds=5, progress=False)


def test_only_settings_that_matter_must_agree(runs, tmp_path):
    """`two` does not use seeds, so another number of seeds keeps its result."""
    reproduce(name="two", out=tmp_path, progress=False)
    reproduce(name="two", out=tmp_path, seeds=5, progress=False)
    assert len(runs) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}', '{"result": {"ours": 3}, "settings": {}}'])
def test_a_damaged_result_is_made_again(runs, tmp_path, text):
    """A result.json that is cut off or foreign counts as missing."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one/result.json").write_text(text)
    assert reproduce(name="one", out=tmp_path, progress=False) == {"one": RESULT}
    assert len(runs) == 1


def test_a_plot_that_fails_loses_no_work(runs, tmp_path, monkeypatch):
    """The numbers are on disk before the plot is drawn; the next call draws it without running."""
    good = frame.REPRODUCTIONS["one"]

    def broken(result: Result) -> object:
        raise ZeroDivisionError

    monkeypatch.setitem(frame.REPRODUCTIONS, "one", dataclasses.replace(good, plot=broken))
    with pytest.raises(ZeroDivisionError):
        reproduce(name="one", out=tmp_path, progress=False)
    monkeypatch.setitem(frame.REPRODUCTIONS, "one", good)
    reproduce(name="one", out=tmp_path, progress=False)
    assert len(runs) == 1
    assert (tmp_path / "one/one.png").exists()


def test_settings_reach_the_script(runs, tmp_path):
    """What the user asked for is what `run` gets."""
    reproduce(name="two", out=tmp_path, rows="r", teacher="t", data="d", seeds=4, profile="full", progress=False)
    assert runs == [Settings(rows="r", teacher="t", data="d", seeds=4, profile="full")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "fig9"}, r"name='fig9' is not one of one, two, all"),
        ({"profile": "huge"}, r"profile='huge' is not one of quick, full"),
        ({"seeds": 0}, r"seeds=0: there must be at least 1"),
        ({"teacher": "t"}, r"add rows=FOLDER"),
    ],
)
def test_refusals_say_the_way_out(runs, tmp_path, settings, words):
    """Nothing is run or written when a setting is wrong."""
    with pytest.raises(RecipeError, match=words):
        reproduce(out=tmp_path / "new", progress=False, **settings)
    assert runs == []
    assert not (tmp_path / "new").exists()


def test_names_come_in_the_pages_order(runs):
    """Several names, joined by commas in any order."""
    assert names_of("two, one") == names_of("all") == ["one", "two"]


# -- what people see


def test_the_terminal_shows_the_papers_numbers_in_brackets(runs):
    """Ours, the paper's in brackets, the findings with their marks, the scale."""
    text = terminal_text("one", frame.REPRODUCTIONS["one"], RESULT)
    line = next(line for line in text.splitlines() if line.startswith("CE"))
    assert re.split(r"\s{2,}", line) == ["CE", "2.50 ± 0.25 [2.81]", "plain", "– [1.2]"]
    assert "✓ It holds." in text
    assert "✗ It <fails>." in text
    assert "Scale: Here small, there large." in text


def test_the_page_counts_claims_and_escapes_words(runs, tmp_path):
    """Remarks are no claims; words from results cannot become markup; the page asks for nothing from outside."""
    reproduce(out=tmp_path, progress=False)
    page = (tmp_path / "index.html").read_text()
    assert "2 of 4 claims reproduced" in page
    assert "It &lt;fails&gt;." in page
    assert "One &amp; only" in page
    assert "<fails>" not in page
    assert "paper 2.81" in page
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "var(--rs)" in page[page.index("<svg") :]


def test_the_page_keeps_what_earlier_runs_made(runs, tmp_path):
    """index.html shows every result in the folder, not only those of the last call."""
    reproduce(name="one", out=tmp_path, progress=False)
    reproduce(name="two", out=tmp_path, progress=False)
    page = (tmp_path / "index.html").read_text()
    assert 'id="one"' in page
    assert 'id="two"' in page


@pytest.mark.parametrize("name", sorted(REPRODUCTIONS))
def test_every_reproduction_says_what_it_is(name):
    """A title, a source, the paper's claim as a sentence, and only settings that exist."""
    entry = REPRODUCTIONS[name]
    assert entry.title
    assert entry.source
    assert entry.claim.endswith(".")
    assert set(entry.uses) <= {f.name for f in dataclasses.fields(Settings)} - {"say"}
