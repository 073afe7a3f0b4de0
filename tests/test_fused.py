"""The fused loss equals the loss on materialised logits, in value, gradients and everything but memory."""

from __future__ import annotations

import subprocess
import sys

import oracles
import pytest
import torch

import sparsekd as skd
from sparsekd.targets import SparseTargets

N, H, V, K = 37, 19, 83, 6

FORMS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 8.0},
}
OPTIONS = {"kd": {}, "mixed": {"ce_weight": 0.2}, "hot_mixed": {"ce_weight": 0.2, "temperature": 2.0}}


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    weights = torch.rand(N, K, generator=generator, dtype=torch.float64)
    weights[::4, 3:] = 0
    labels = torch.randint(V, (N,), generator=generator)
    labels[2::5] = -100
    return hidden, head, bias, SparseTargets(ids=ids, weights=weights / 2), labels


def gradients(loss, leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def both(form, option, chunk_rows, dtype=torch.float64):
    hidden, head, bias, targets, labels = example(dtype)
    settings = {name: value for name, value in FORMS[form].items() if name != "bias"}
    used_bias = bias if FORMS[form].get("bias") else None
    leaves = [hidden, head] + ([bias] if used_bias is not None else [])
    fused = skd.fused_linear_sparse_kl(
        hidden,
        head,
        targets,
        bias=used_bias,
        labels=labels,
        chunk_rows=chunk_rows,
        **settings,
        **OPTIONS[option],
    )
    logits = oracles.head_logits(hidden, head, used_bias, **settings)
    plain = skd.sparse_kl(logits, targets, labels=labels, **OPTIONS[option])
    return gradients(fused, leaves), gradients(plain, leaves)


@pytest.mark.parametrize("chunk_rows", [1, 8, 64])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loss_on_materialised_logits(form, option, chunk_rows):
    """Value, dh, dW and db agree to 1e-10 in float64 for every head form and chunk size."""
    fused, plain = both(form, option, chunk_rows)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_errs_no_more_than_materialised_logits(form, dtype):
    """Against float64 truth on the same rounded inputs, the fused path errs no more than the plain one, plus eps."""
    hidden, head, bias, targets, labels = example(dtype)
    settings = {name: value for name, value in FORMS[form].items() if name != "bias"}
    leaves = [hidden, head, bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = gradients(skd.sparse_kl(oracles.head_logits(*exact, **settings), targets, labels=labels), exact)
    plain = gradients(skd.sparse_kl(oracles.head_logits(*leaves, **settings), targets, labels=labels), leaves)
    fused = gradients(
        skd.fused_linear_sparse_kl(hidden, head, targets, bias=bias, labels=labels, chunk_rows=8, **settings),
        leaves,
    )
    for ours, theirs, true in zip(fused, plain, truth, strict=True):
        slack = 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (ours.double() - true).abs().max() <= (theirs.double() - true).abs().max() + slack


def test_scaled_backward_and_reductions():
    """A factor on the loss reaches the gradients; sum and num_items_in_batch scale as in sparse_kl."""
    hidden, head, _, targets, labels = example()
    for settings in ({"reduction": "sum"}, {"num_items_in_batch": 11}):
        fused = skd.fused_linear_sparse_kl(hidden, head, targets, labels=labels, **settings)
        plain = skd.sparse_kl(hidden @ head.T, targets, labels=labels, **settings)
        for ours, theirs in zip(
            gradients(2.5 * fused, [hidden, head]), gradients(2.5 * plain, [hidden, head]), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_frozen_head_and_no_grad():
    """A frozen head gets no gradient, hidden states still do; under no_grad only the value is made."""
    hidden, head, _, targets, _ = example()
    loss = skd.fused_linear_sparse_kl(hidden, head.detach(), targets)
    want = torch.autograd.grad(skd.sparse_kl(hidden @ head.T.detach(), targets), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], want, atol=1e-12, rtol=0)
    with torch.no_grad():
        assert not skd.fused_linear_sparse_kl(hidden, head, targets).requires_grad


def test_nothing_supervised_is_zero():
    """All labels ignored: loss 0 and zero gradients, not NaN."""
    hidden, head, _, targets, labels = example()
    loss = skd.fused_linear_sparse_kl(hidden, head, targets, labels=torch.full_like(labels, -100))
    assert all((value == 0).all() for value in gradients(loss, [hidden, head]))


def test_autocast_runs_the_products_in_bf16():
    """Under autocast, float32 parameters give the loss of a bf16 linear, and float32 gradients."""
    hidden, head, _, targets, _ = example(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = skd.fused_linear_sparse_kl(hidden, head, targets)
        plain = skd.sparse_kl(torch.nn.functional.linear(hidden, head), targets)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=0)
    grads = torch.autograd.grad(fused, [hidden, head])
    assert {g.dtype for g in grads} == {torch.float32}


def test_none_reduction_points_to_sparse_kl():
    hidden, head, _, targets, _ = example()
    with pytest.raises(ValueError, match="sparse_kl on logits offers 'none'"):
        skd.fused_linear_sparse_kl(hidden, head, targets, reduction="none")


_MEMORY = """
import sys, torch
import sparsekd as skd
from sparsekd.targets import SparseTargets
torch.set_num_threads(1)
n, h, v, rows = 2048, 64, 32768, int(sys.argv[1])
hidden, head = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
targets = SparseTargets(ids=torch.randint(v, (n, 12)), weights=torch.full((n, 12), 1 / 12))
def peak():  # VmHWM; ru_maxrss would start at the parent's peak and hide everything
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
skd.fused_linear_sparse_kl(hidden[:1], head, targets[:1], chunk_rows=1).backward()  # warm up: dW, dh, workspaces
before = peak()
skd.fused_linear_sparse_kl(hidden, head, targets, chunk_rows=rows).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize("rows", [256, 512])
def test_peak_memory_is_chunk_by_vocabulary(rows):
    """Beyond dW and dh the peak is one [chunk, V] buffer: between 0.8 and 1.6 of chunk * V * 4 bytes."""
    out = subprocess.run([sys.executable, "-c", _MEMORY, str(rows)], capture_output=True, text=True, check=True).stdout
    assert 0.8 < int(out) / (rows * 32768 * 4) < 1.6
