"""The Triton kernel, in Triton's interpreter, against the torch rows that it stands in for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_fused import FORMS
from test_fused import OPTIONS as MIXES

from sparsekd import fused_chunks
from sparsekd.prefix_sets import PrefixSets
from sparsekd.residuals import RESIDUALS
from sparsekd.row_losses import HeadForm, LossOptions, prepare
from sparsekd.targets import SparseTargets

fused_triton = pytest.importorskip("sparsekd.fused_triton", exc_type=ImportError)
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    triton.__version__.startswith("3.6") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 makes scalars of one-element arrays, which numpy 2.4 refuses",
)
C, V, K = 5, 301, 6


@pytest.fixture
def kernel(monkeypatch):
    """`fused_triton`, with blocks far smaller than the vocabulary."""
    monkeypatch.setattr(fused_triton, "LARGEST_BLOCK", 64)
    return fused_triton


def example(options, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    products = 4 * torch.randn(C, V, generator=generator, dtype=torch.float64)
    products[1, 50:120] = -torch.inf  # a masked vocabulary
    ids = torch.stack([torch.randperm(40, generator=generator)[:K] for _ in range(C)])
    weights = torch.rand(C, K, generator=generator, dtype=torch.float64) / 4
    weights[2, 3:], weights[3] = 0, 0
    labels = ids[:, 1].clone()  # among the kept ids: the sparse part repeats an id
    labels[4] = V - 1
    rows = prepare(SparseTargets(ids=ids, weights=weights), labels, options, V, dtype)
    factors, bias = torch.rand(2 * C, generator=generator).double(), torch.randn(V, generator=generator).double()
    return products, rows, factors[:C], bias


def single(value):
    """Everything in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return dataclasses.replace(value, **{name: single(x) for name, x in value.tensors().items() if x is not None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [name for name in RESIDUALS if name != "ghost"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("form", ["plain", "all"])
def test_equals_the_rows_in_torch(kernel, form, mix, residual, dtype):
    """Losses and gradients err against float64 by float32's (bf16's) rounding, duplicates and masked ids included."""
    settings = {name: value for name, value in MIXES[mix].items() if name != "token_weights"}
    options = LossOptions(**settings, residual=residual)
    shape = HeadForm(**{name: value for name, value in FORMS[form].items() if name != "bias"})
    products, rows, factors, bias = example(options)
    if residual == "smooth" or shape.softcap:  # an even tail on an impossible token is an infinite loss
        products = products.clamp(min=-9)
    products = products.to(dtype)
    bias = bias if FORMS[form].get("bias") else None
    truth = products.double() * shape.factor(options.temperature)
    want = fused_chunks.chunk_losses_(truth, rows, factors, bias, shape, options)
    arguments = (single(factors), None if bias is None else single(bias), shape, options)
    assert kernel.fits(single(rows))
    got = kernel.chunk_losses_(products, single(rows), *arguments)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    last_bit = 2e-5 if dtype == torch.float32 else 2**-7  # the interpreter cuts bf16 off, a GPU rounds
    torch.testing.assert_close(products.double(), truth, atol=2e-6, rtol=last_bit)


def test_a_value_alone_leaves_the_logits(kernel):
    options = LossOptions(ce_weight=0.2, z_loss=0.01)
    products, rows, _, _ = example(options)
    kept = products.float()
    got = kernel.chunk_losses_(kept, single(rows), None, None, HeadForm(), options)
    want = fused_chunks.chunk_losses_(products.clone(), rows, None, None, HeadForm(), options)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(kept, products.float(), atol=0, rtol=0)


def test_what_it_does_not_compute_goes_to_torch(kernel):
    """The ghost token, sets, float64 and more reads than pairs can be compared are not for the kernel."""
    _, ghost, _, _ = example(LossOptions(residual="ghost"), torch.float32)
    _, double, _, _ = example(LossOptions())
    wide = SparseTargets(ids=torch.zeros(C, 129, dtype=torch.long), weights=torch.ones(C, 129))
    one = torch.ones(1, dtype=torch.long)
    sets = PrefixSets(vocab_size=V, order=torch.arange(V), first=0 * one, last=one)
    others = [
        prepare(wide[:, :given], None, LossOptions(), V, torch.float32, there)
        for given, there in ((129, None), (9, sets))
    ]
    assert not any(map(kernel.fits, (ghost, double, *others)))


def test_repeated_ids_add_up(kernel):
    """The same id three times over: p - Σ t, as scatter_add gives it."""
    ids, weights = torch.tensor([[7, 7, 9, 7]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    logits, options = torch.zeros(1, 16), LossOptions()
    rows = prepare(SparseTargets(ids=ids, weights=weights), None, options, 16, torch.float32)
    kernel.chunk_losses_(logits, rows, torch.ones(1), None, HeadForm(), options)
    want = torch.full((1, 16), 1 / 16)
    want[0, 7] -= 0.7
    want[0, 9] -= 0.3
    torch.testing.assert_close(logits, want, atol=1e-6, rtol=0)
