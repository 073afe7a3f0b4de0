"""The one noun: what its dense form is, of any leading shape, and what it is made from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsekd.targets import SparseTargets

IDS = torch.tensor([[[3, 0, 3], [1, 0, 0]], [[2, 4, 1], [0, 0, 0]]])
WEIGHTS = torch.tensor([[[0.5, 0.25, 0.125], [1, 0, 0]], [[0.5, 0.25, 0.25], [0, 0, 0]]])


def test_densify_by_hand():
    """Repeated ids add up, padding adds nothing; leading dimensions stay, are joined into one, or are picked from."""
    targets = SparseTargets(ids=IDS, weights=WEIGHTS)
    dense = torch.zeros(2, 2, 5)
    dense[0, 0, [3, 0]], dense[0, 1, 1] = torch.tensor([0.625, 0.25]), 1.0
    dense[1, 0, [2, 4, 1]] = torch.tensor([0.5, 0.25, 0.25])
    assert torch.equal(targets.densify(5), dense)
    assert torch.equal(targets.flatten().densify(5), dense.view(4, 5))
    assert torch.equal(targets[1].densify(5), dense[1])
    assert torch.equal(targets.mass(), dense.sum(-1))
    assert len(targets) == 2


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64])
def test_what_numpy_holds_becomes_int64_and_float32(dtype):
    """Whatever has `.ids` and `.weights`; targets themselves are handed back as they are."""
    given = SimpleNamespace(ids=IDS.numpy().astype(dtype), weights=WEIGHTS.double().numpy())
    targets = SparseTargets.of(given)
    assert (targets.ids.dtype, targets.weights.dtype) == (torch.int64, torch.float32)
    assert torch.equal(targets.ids, IDS)
    assert torch.equal(targets.weights, WEIGHTS)
    assert SparseTargets.of(targets) is targets


def test_ids_without_weights_are_refused():
    with pytest.raises(ValueError, match=r"ids and weights differ in shape: \(2, 2, 3\) and \(2, 2, 2\)"):
        SparseTargets(ids=IDS, weights=WEIGHTS[..., :2])
