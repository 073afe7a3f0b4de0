"""The Triton kernel, in Triton's interpreter, against the torch rows that it stands in for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_fused import FORMS, both
from test_fused import OPTIONS as MIXES

from sparsekd import fused_chunks, fused_gpu, trust
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
    """The ghost token, float64 and more reads than pairs can be compared are not for the kernel."""
    _, ghost, _, _ = example(LossOptions(residual="ghost"), torch.float32)
    _, double, _, _ = example(LossOptions())
    many = SparseTargets(ids=torch.zeros(C, 129, dtype=torch.long), weights=torch.ones(C, 129))
    wide = prepare(many, None, LossOptions(), V, torch.float32)
    assert not any(map(kernel.fits, (ghost, double, wide)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("form", ["plain", "all"])
def test_sets_equal_the_rows_in_torch(kernel, form, mix, dtype):
    """Sets in sets, conditions, rows without any, tokens that are targets too; in a buffer with wider rows."""
    settings = {name: value for name, value in MIXES[mix].items() if name != "token_weights"}
    options, generator = LossOptions(**settings, entropy=False), torch.Generator().manual_seed(1)
    shape = HeadForm(**{name: value for name, value in FORMS[form].items() if name != "bias"})
    first = torch.randint(V - 40, (30,), generator=generator)
    last = first + torch.randint(1, 40, (30,), generator=generator)
    sets = PrefixSets(vocab_size=V, order=torch.randperm(V, generator=generator), first=first, last=last)
    ids = torch.randint(V + 2 * len(sets), (C, K), generator=generator)
    ids[:, 0], ids[:, 1], ids[3] = sets.order[first[0]], V, torch.arange(K)
    targets = SparseTargets(ids=ids, weights=torch.rand(C, K, generator=generator, dtype=torch.float64) / 4)
    products, _, factors, bias = example(options)
    bias = bias if FORMS[form].get("bias") else None
    wide = torch.full((C, V + 11), torch.nan, dtype=dtype)
    wide[:, :V] = products.clamp(min=-9)
    products, labels = wide[:, :V], ids[:, 0].clone()
    truth = products.double() * shape.factor(options.temperature)
    rows = prepare(targets, labels, options, V, torch.float64, sets)
    want = fused_chunks.chunk_losses_(truth, rows, factors, bias, shape, options)
    rows = prepare(targets, labels, options, V, torch.float32, sets)
    got = kernel.chunk_losses_(products, rows, single(factors), None if bias is None else single(bias), shape, options)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    last_bit = 2e-5 if dtype == torch.float32 else 2**-6  # of what is taken away from as well
    torch.testing.assert_close(products.double(), truth, atol=last_bit * float(truth.abs().max()) / 8, rtol=last_bit)
    assert wide[:, V:].isnan().all()


@pytest.fixture
def trusted(kernel, monkeypatch):
    """The kernel in the place that it has on a GPU."""
    monkeypatch.setattr(fused_chunks, "row_kernel", lambda device, rows, twin: kernel.chunk_losses_)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_with_the_kernel_is_the_loss(trusted, form):
    """Value and gradients of the whole, chunks, ignored rows and all, as without it."""
    ours, plain = both(form, "all", 8, torch.float32)
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)


def test_a_gpu_is_asked_before_it_is_trusted(kernel):
    """What `largest_gap` sees: rounding of a kernel that is right, a wrong gradient, a wrong loss, an error."""
    here, twin = torch.device("cpu"), fused_chunks.chunk_losses_

    def doubled(logits, *rest):
        losses = kernel.chunk_losses_(logits, *rest)
        logits *= 1.02
        return losses

    def shifted(*arguments):
        return kernel.chunk_losses_(*arguments) * 1.02

    def broken(*arguments):
        raise ImportError("no compiler")

    def asked(other):
        return trust.agrees("the loss", other, twin, here, fused_gpu.largest_gap, fused_gpu.LARGEST_GAP)

    with torch.device("meta"):  # a default device of the user's is not where the example comes from
        assert asked(kernel.chunk_losses_)
    for other, words in ((doubled, "off by 0.02"), (shifted, "off by 0.02"), (broken, "ImportError: no compiler")):
        with pytest.warns(UserWarning, match=words):
            assert not asked(other)
    assert not fused_gpu.adds_in_float32(here, torch.bfloat16)


def test_chunks_of_a_gpu_are_alike_and_whole_tiles():
    """128k bf16 logits: two chunks of 4,096 rows, not 7 of 1,046 and one of 870; rows begin at 128 bytes."""
    head = torch.empty(128_256, 8, dtype=torch.bfloat16, device="meta")
    assert [fused_chunks.even_rows(count, head) for count in (8192, 9000, 4185, 4186)] == [4096, 3072, 4185, 2176]
    assert fused_chunks.even_rows(100, head) >= 100
    odd = fused_chunks.workspace(4, head[:50_257])
    assert (*odd.shape, odd.stride(0) % 64) == (4, 50_257, 0)


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
