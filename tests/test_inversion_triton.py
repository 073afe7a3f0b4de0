"""The samplers' Triton kernel, in Triton's interpreter: block masses against float64 and draws against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_samplers import VARIANTS

from sparsekd import inversion, trust
from sparsekd.errors import ModelError
from sparsekd.samplers import sample

inversion_triton = pytest.importorskip("sparsekd.inversion_triton", exc_type=ImportError)
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    triton.__version__.startswith("3.6") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 makes scalars of one-element arrays, which numpy 2.4 refuses",
)


@pytest.fixture
def kernel(monkeypatch):
    """The kernel in the place that it has on a GPU, with programs smaller than a row."""
    monkeypatch.setattr(inversion_triton, "BLOCKS", 16)
    monkeypatch.setattr(inversion, "_kernel_on", lambda logits_NV: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 31, 512, 1000])
def test_peaks_and_sums(kernel, vocab, dtype):
    """Of each block in float64, to float32's rounding: ragged ends, wider rows, blocks without mass."""
    wide = (5 * torch.randn(4, 1100, generator=torch.Generator().manual_seed(0))).to(dtype)
    wide[1, 32:200] = -torch.inf
    logits = wide[:, :vocab]
    peaks, sums = inversion_triton.peaks_and_sums(logits, 0.7, 32)
    padded = torch.nn.functional.pad(0.7 * logits.double(), (0, -vocab % 32), value=-torch.inf).unflatten(1, (-1, 32))
    want = padded.amax(-1)
    torch.testing.assert_close(peaks.double(), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sums.double() * peaks.double().exp(), padded.exp().sum(-1), atol=0, rtol=2e-5)


def test_block_masses_are_float64_sums(kernel):
    """Each block's share against float64: total variation below 2e-7, as torch's masses."""
    for scale in (0, 1, 5, 20):
        logits = scale * torch.randn(4, 10_000, generator=torch.Generator().manual_seed(scale))
        logits[1, 100:9000] = -torch.inf
        truth = inversion.in_blocks(logits.double().softmax(-1)).sum(-1)
        masses, log2_total = inversion.kernel_masses(logits)
        assert (masses - truth).abs().sum(-1).max() / 2 < 2e-7
        exact = (logits.double() - logits.double().amax(-1, keepdim=True)).exp().sum(-1).log2()
        torch.testing.assert_close(log2_total, exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_draws_are_those_without_it(name, monkeypatch, request):
    """The same ids and weights for every sampler, but for points within rounding of an interval's end."""
    logits = (3 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(2))).to(torch.bfloat16)
    sampler, settings = VARIANTS[name]
    plain = sample(logits, sampler, **settings).densify(1000)
    request.getfixturevalue("kernel")
    ours = sample(logits, sampler, **settings).densify(1000)
    assert ((ours - plain).abs() > 1e-5).float().mean() < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_distribution_is_refused(kernel, bad):
    logits = torch.zeros(3, 700)
    logits[1, 333] = bad
    with pytest.raises(ModelError, match="1 of 3 positions"):
        sample(logits, "systematic", rounds=5)
    with pytest.raises(ModelError, match="3 of 3 positions"):
        sample(torch.full((3, 700), -torch.inf), "systematic", rounds=5)


def test_a_gpu_is_asked_before_it_is_trusted():
    """What `trust` sees: rounding of a kernel that is right, masses that are not, an error."""
    here, limit = torch.device("cpu"), inversion.LARGEST_GAP

    def tilted(logits, temperature):
        return inversion.kernel_masses(logits, temperature * 1.0001)

    def broken(logits, temperature):
        raise ImportError("no compiler")

    def asked(kernel):
        return trust.agrees("the samplers", kernel, inversion.torch_masses, here, inversion._gap, limit)

    with torch.device("meta"):  # a default device of the user's is not where the example comes from
        assert asked(inversion.kernel_masses)
    for other, words in ((tilted, "off by"), (broken, "ImportError: no compiler")):
        with pytest.warns(UserWarning, match=words):
            assert not asked(other)
