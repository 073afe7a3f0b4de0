"""What `sparsekd inspect` says: numbers against direct computation, text against the tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from sparsekd.cache import CacheReader
from sparsekd.capture import capture
from sparsekd.errors import RecipeError
from sparsekd.inspect import WIDTH, cache_stats, describe, describe_cache
from sparsekd.packed import RowsReader
from sparsekd.rows import pack
from sparsekd.vocab import load_tokenizer


@pytest.fixture(scope="module")
def topk(world, tmp_path_factory):
    """A top-k cache of the world's first rows."""
    out = tmp_path_factory.mktemp("topk") / "cache"
    capture(
        rows=world.rows, teacher=world.teacher, out=out, sampler={"name": "top_k", "k": 5}, codec="prob24",
        limit_rows=16, device="cpu", threads=1,
    )  # fmt: skip
    return str(out)


@pytest.fixture(scope="module")
def sft(world, tmp_path_factory):
    """A cache of prompts with responses."""
    home = tmp_path_factory.mktemp("sft")
    with (home / "sft.jsonl").open("w") as file:
        for index in range(30):
            record = {"prompt": f"The cat sees the dog {index % 9}", "response": " and counts 1 2 3."}
            file.write(json.dumps(record) + "\n")
    pack(source=str(home / "sft.jsonl"), tokenizer=f"{world.rows}/tokenizer", seq_len=32, heldout=0.1,
         out=home / "rows", progress=False)  # fmt: skip
    capture(rows=home / "rows", teacher=world.teacher, out=home / "cache", device="cpu", threads=1)
    return str(home / "cache")


def number(page, name):
    """The number that a page gives for a name."""
    line = next(line for line in page.splitlines() if line.startswith(f"{name} "))
    return float(re.search(r"  ([\d,.]+)", line)[1].replace(",", ""))


@pytest.fixture(params=["world", "topk", "sft"])
def cache(request, world):
    return world.cache if request.param == "world" else request.getfixturevalue(request.param)


def test_the_statistics_are_those_of_the_rows(cache):
    """Tokens, positions, ids per token, hits and mass agree with a count over every row."""
    with CacheReader(cache) as reader:
        stats = cache_stats(reader)
        rows = [reader[index] for index in range(len(reader))]
    kept = [(row.targets.weights > 0).sum(-1)[row.supervised[1:]] for row in rows]
    true = [row.targets.ids == row.input_ids[1:, None].astype(np.int64) for row in rows]
    mass = [(row.targets.weights * hit).sum(-1)[row.supervised[1:]] for row, hit in zip(rows, true, strict=True)]
    sizes, mass = np.concatenate(kept), np.concatenate(mass)
    assert stats["tokens"] == len(rows) * 32
    assert stats["positions"] == len(sizes)
    assert stats["unique_ids"]["histogram"] == np.bincount(sizes).tolist()
    assert stats["unique_ids"]["mean"] == pytest.approx(sizes.mean())
    assert stats["next_token_hit_rate"] == pytest.approx((mass > 0).mean())
    assert stats["next_token_weight"] == pytest.approx(mass.mean(), rel=1e-4)


def test_bytes_are_those_of_the_files(cache):
    """bytes is what the shards take on the disk."""
    with CacheReader(cache) as reader:
        stats = cache_stats(reader)
    assert stats["bytes"] == sum(path.stat().st_size for path in Path(cache).glob("*.safetensors"))
    assert stats["bytes_per_token"] == stats["bytes"] / stats["tokens"]


def test_the_page_shows_these_numbers(cache):
    """Rows, tokens, bytes and ids per token stand on the page as computed, in at most 100 columns."""
    with CacheReader(cache) as reader:
        stats = cache_stats(reader)
    page = describe_cache(cache)
    assert number(page, "rows") == stats["rows"]
    assert number(page, "tokens") == stats["tokens"]
    assert number(page, "bytes per token") == pytest.approx(stats["bytes_per_token"], abs=0.051)
    assert number(page, "ids per token") == pytest.approx(stats["unique_ids"]["mean"], abs=0.051)
    paths = [line for line in page.splitlines() if len(line) > WIDTH]
    assert all("/" in line for line in paths)  # a long path is not cut: it is there to be copied


def test_the_page_names_method_and_data(world, topk):
    """Sampler with the parameters that matter, whether it is biased, codec, and where the text came from."""
    page = describe_cache(world.cache)
    assert "random_sampling(rounds=20, temperature=1.0), seed 0, unbiased" in page
    assert "normalize" not in page  # at temperature 1 there is nothing to normalise
    assert "corpus.jsonl" in page
    assert "top_k(k=5), seed 0, biased" in describe_cache(topk)
    assert "prob24" in describe_cache(topk)


def test_another_temperature_shows_its_normalisation(world, tmp_path):
    """Away from temperature 1 `normalize` decides about bias and is shown."""
    capture(
        rows=world.rows, teacher=world.teacher, out=tmp_path / "c", limit_rows=8, device="cpu", threads=1,
        sampler={"name": "random_sampling", "rounds": 10, "temperature": 0.8},
    )  # fmt: skip
    page = " ".join(describe_cache(str(tmp_path / "c")).split())
    assert "random_sampling(normalize=True, rounds=10, temperature=0.8), seed 0, biased" in page


def test_one_size_needs_no_histogram(topk, world):
    """Top-k keeps k ids everywhere; the spread of random sampling is drawn, its shares summing to one."""
    assert describe_cache(topk).splitlines()[-1] == "ids per token: always 5"
    bars = describe_cache(world.cache).partition("ids per token (share of tokens)\n")[2].splitlines()
    assert sum(float(line.split()[-1].rstrip("%")) for line in bars) == pytest.approx(100, abs=1)
    assert bars[0].split()[0].startswith("1")  # from the smallest size that occurs


def test_a_row_is_shown_as_text_beside_its_targets(world):
    """Each line: position, its token, the next one, targets by weight; the next token carries a star."""
    tokenizer = load_tokenizer(f"{world.cache}/tokenizer")
    with CacheReader(world.cache) as reader:
        row, rows = reader[3], len(reader)
    page = describe_cache(world.cache, row=3, positions=6)
    lines = page.splitlines()
    assert lines[0].startswith(f"row 3 of {rows}: ")
    table = [line for line in lines if re.match(r"\s+\d+  ['<]", line)]
    assert [int(line.split()[0]) for line in table] == list(range(6))
    for p, line in enumerate(table):
        assert repr(tokenizer.decode([int(row.input_ids[p])])) in line or "<id" in line
        order = np.argsort(-row.targets.weights[p], kind="stable")
        best = tokenizer.decode([int(row.targets.ids[p][order[0]])])
        star = "*" if row.targets.ids[p][order[0]] == row.input_ids[p + 1] else ""
        assert f"{best!r}{star} {row.targets.weights[p].max():.2f}" in line
        assert len(line) <= WIDTH


def test_hidden_targets_are_counted(world):
    """Shown targets and the (+n) behind them are all that the position has."""
    with CacheReader(world.cache) as reader:
        row = reader[1]
    shown = set()
    for line in describe_cache(world.cache, row=1, positions=31).splitlines():
        if not re.match(r"\s+\d+  ['<].*\d\.\d\d", line):
            continue
        p = int(line.split()[0])
        shown.add(p)
        more = int(m[1]) if (m := re.search(r"\(\+(\d+)\)$", line)) else 0
        assert len(re.findall(r"\d\.\d\d(?= |$)", line)) + more == (row.targets.weights[p] > 0).sum()
    assert shown == set(np.flatnonzero(row.supervised[1:]))


def test_prompts_take_one_line(sft):
    """What is not learnt is shown as a stretch; only learnt positions count and have targets."""
    with CacheReader(sft) as reader:
        row = reader[0]
    page = describe_cache(sft, row=0, positions=31)
    stretches = re.findall(r"(?m)^ *(\d+)(?:-(\d+))?  not learnt: '", page)
    skipped = {p for first, last in stretches for p in range(int(first), int(last or first) + 1)}
    assert skipped == set(np.flatnonzero(~row.supervised[1:]).tolist())
    assert "The cat sees the dog" in page


def test_rows_outside_are_refused(world):
    """The message says which rows there are; negative numbers count from the end."""
    with CacheReader(world.cache) as reader:
        last = len(reader) - 1
    with pytest.raises(RecipeError, match=rf"row=99999 is not in .*; its rows are 0 to {last}"):
        describe_cache(world.cache, row=99999)
    assert describe_cache(world.cache, row=-1).startswith(f"row {last} of {last + 1}: ")


def test_a_url_is_read_like_a_folder(world):
    """file:// gives the same page and the same text: the tokenizer is fetched too."""
    url = f"file://{world.cache}"
    assert describe_cache(url).splitlines()[1:] == describe_cache(world.cache).splitlines()[1:]
    assert describe_cache(url, row=2) == describe_cache(world.cache, row=2)


def test_without_a_tokenizer_ids_are_shown(world, tmp_path):
    """A cache whose tokenizer folder is gone is still readable, as numbers."""
    shutil.copytree(world.cache, tmp_path / "c", ignore=shutil.ignore_patterns("tokenizer"))
    with CacheReader(world.cache) as reader:
        ids = reader[0].input_ids
    for path in (str(tmp_path / "c"), f"file://{tmp_path}/c"):
        assert f": {ids[0]} {ids[1]} {ids[2]}" in describe_cache(path, row=0)


def test_packed_rows_are_counted_split_by_split(world):
    """A folder of rows is told from a cache; its page has the manifest's numbers and what was left out."""
    page = describe(world.rows)
    with RowsReader(world.rows) as reader:
        for name, split in reader.manifest["splits"].items():
            counts = [split[key] for key in ("rows", "documents", "tokens", "supervised", "padding", "bytes")]
            line = next(line for line in page.splitlines() if line.startswith(name))
            assert [int(word.replace(",", "")) for word in line.split()[1:]] == counts
    assert describe(world.cache) == describe_cache(world.cache)


@pytest.mark.parametrize("positions", [None, 5])
def test_a_packed_row_is_its_documents(world, sft, positions):
    """Each stretch starts where a document or a prompt does, and the stretches together are the row."""
    for rows in (world.rows, str(Path(sft).parent / "rows")):
        with RowsReader(rows) as reader:
            tokenizer, row = reader.tokenizer(), reader[1]
            shown = positions or len(row.input_ids)
            stretches = re.findall(
                r"^ +(\d+)(?:-(\d+))?  (document: )?(not learnt: )?", describe(rows, 1, positions), re.M
            )
            spans = [(int(first), int(last or first) + 1, bool(new), not bare) for first, last, new, bare in stretches]
            assert [place for first, end, *_ in spans for place in range(first, end)] == list(range(shown))
            assert {first for first, _, new, _ in spans if new} == set(np.flatnonzero(row.starts[:shown]))
            assert all((row.supervised[first:end] == learnt).all() for first, end, _, learnt in spans)
            page = "".join(describe(rows, 1, positions).split())
            for first, end, *_ in (span for span in spans if span[3]):
                assert "".join(repr(tokenizer.decode(row.input_ids[first:end])).split()) in page
    with pytest.raises(RecipeError, match=r"row=9999 is not in .*; its rows are 0 to"):
        describe(world.rows, 9999)
