"""Hot paths do no more than the record says: passes over the logits and lines a row, which no noise can move."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sparsekd import codec, fused_chunks, samplers

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import costs

# Versions of torch and numpy may split an operator; a further pass over the logits is 6 % of the dearest step at least.
SLACK = {"passes": 1.04, "lines": 1.10}


def exceeded(part: str) -> dict[str, tuple[float, float]]:
    """What of a part costs more than recorded: (found, recorded)."""
    record = json.loads(costs.RECORD.read_text())
    found = costs.measured([part])
    assert found.keys() <= record.keys()
    most = {name: record[name] * SLACK[name.rpartition(" ")[2]] for name in found}
    return {name: (count, record[name]) for name, count in found.items() if count > most[name]}


@pytest.mark.parametrize("part", costs.COSTS)
def test_no_more_than_recorded(part):
    """Where more is meant: `python benchmarks/costs.py --record`, and a word in docs/LOG.md of what it buys."""
    assert exceeded(part) == {}


def test_one_more_pass_over_the_logits_is_found(monkeypatch):
    read = fused_chunks.read_
    monkeypatch.setattr(fused_chunks, "read_", lambda tile, *rest: read(tile.mul_(1.0), *rest))
    assert exceeded("loss").keys() == {name for name in json.loads(costs.RECORD.read_text()) if name[:5] == "fused"}


def test_a_softmax_before_sampling_is_found(monkeypatch):
    drawn = samplers.SAMPLERS["systematic"]
    slow = {"systematic": lambda logits, keys, **rest: drawn(logits.softmax(-1).log(), keys, **rest)}
    monkeypatch.setattr(samplers, "SAMPLERS", samplers.SAMPLERS | slow)
    assert exceeded("samplers").keys() == {"systematic, passes"}


@pytest.mark.parametrize("name", ["raw24", "split"])
def test_decoding_twice_is_found(monkeypatch, name):
    decode = codec.decode

    def twice(*words):
        decode(*words)
        return decode(*words)

    monkeypatch.setattr(codec, "decode", twice)
    assert f"decode {name}, lines" in exceeded(name)


def test_counts_are_the_same_each_time():
    assert costs.measured(["loss", "raw24"]) == costs.measured(["loss", "raw24"])


def test_what_a_pass_is():
    """Reading and writing all of a tensor is 2, a view and new memory are 0."""
    x = torch.ones(10)
    assert costs.passes(lambda: x.view(2, 5).t().mul(2.0), 10) == 2
    assert costs.passes(lambda: x.sum(), 10) == pytest.approx(1.1)
    assert costs.passes(lambda: torch.empty_like(x), 10) == 0
