"""The fused loss equals the loss on materialised logits, in value, gradients and everything but memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsekd as skd
from sparsekd import fused
from sparsekd.prefix_sets import PrefixSets
from sparsekd.targets import SparseTargets

N, H, V, K = 37, 19, 83, 6

FORMS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 8.0},
}
OPTIONS = {
    "kd": {},
    "mixed": {"ce_weight": 0.2},
    "hot_mixed": {"ce_weight": 0.2, "temperature": 2.0},
    "all": {"ce_weight": 0.2, "temperature": 0.7, "z_loss": 0.01, "token_weights": torch.linspace(0, 2, N)},
}


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


# --- targets that are sets --------------------------------------------------------------------------------

TOKENS, SETS = V - 3, 40  # the head is wider than the vocabulary


def example_sets():
    """Sets of 1 to 30 tokens that lie inside one another, and targets of tokens, sets and conditions."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(TOKENS - 30, (SETS,), generator=generator)
    sizes = torch.randint(1, 31, (SETS,), generator=generator)
    order = torch.randperm(TOKENS, generator=generator)
    sets = PrefixSets(vocab_size=TOKENS, order=order, first=first, last=first + sizes)
    ids = torch.stack([torch.randperm(TOKENS + 2 * SETS, generator=generator)[: 2 * K] for _ in range(N)])
    weights = torch.rand(N, 2 * K, generator=generator, dtype=torch.float64) / K
    weights[::4, 3:] = 0
    weights[10:14] *= ids[10:14] < TOKENS  # rows without a set
    return sets, SparseTargets(ids=ids, weights=weights)


def set_gradients(leaves, labels, **options):
    sets, targets = example_sets()
    loss = skd.fused_linear_sparse_kl(*leaves[:2], targets, bias=leaves[2], labels=labels, sets=sets, **options)
    return gradients(loss, leaves)


def dense_set_gradients(leaves, labels, *, token_weights=None, softcap=None, scale=1.0, **options):
    sets, targets = example_sets()
    logits = oracles.head_logits(*leaves, scale=scale, softcap=softcap)
    losses = oracles.dense_loss(logits, targets, labels, sets=sets, **options)
    kept = (labels != -100).sum()
    return gradients((losses * (1 if token_weights is None else token_weights)).sum() / kept, leaves)


@pytest.mark.parametrize("chunk_rows", [8, 64])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", [{}, {"scale": 1.7, "softcap": 8.0}])
def test_sets_are_the_dense_formula(form, option, chunk_rows):
    """float64 autograd on log-sum-exps made set by set, to 1e-10; ignored rows and a padded head included."""
    *leaves, _, labels = example()
    ours = set_gradients(leaves, labels, chunk_rows=chunk_rows, **form, **OPTIONS[option])
    for one, two in zip(ours, dense_set_gradients(leaves, labels, **form, **OPTIONS[option]), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sets_in_low_precision_err_no_more_than_materialised_logits(dtype):
    *leaves, _, labels = example(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sets, targets = example_sets()
    plain = gradients(skd.sparse_ce(oracles.head_logits(*leaves), targets, labels=labels, sets=sets), leaves)
    truth = dense_set_gradients(exact, labels)
    for ours, theirs, true in zip(set_gradients(leaves, labels, chunk_rows=8), plain, truth, strict=True):
        slack = 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (ours.double() - true).abs().max() <= (theirs.double() - true).abs().max() + slack


def test_sets_of_impossible_tokens():
    """Logits of -inf (a masked vocabulary) inside sets: the others' share grows, and no gradient is NaN."""
    sets, targets = example_sets()
    logits = torch.randn(N, V, dtype=torch.float64).index_fill(1, sets.order[::3], -torch.inf).requires_grad_()
    targets = SparseTargets(ids=targets.ids, weights=targets.weights * (targets.ids >= TOKENS))
    whole = [
        (logits.detach()[:, sets.order[a:b]] > -torch.inf).any() for a, b in zip(sets.first, sets.last, strict=True)
    ]
    targets.weights[~torch.stack(whole)[(targets.ids - TOKENS) % SETS]] = 0
    loss = skd.sparse_ce(logits, targets, sets=sets)
    low = logits.detach().clamp(min=-600).requires_grad_()
    want = gradients(oracles.dense_loss(low, targets, sets=sets).mean(), [low])
    for ours, theirs in zip(gradients(loss, [logits]), want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_sets_that_do_not_fit_are_refused():
    """What has no meaning with sets, and ids beyond them: none is taken for another."""
    hidden, head, *_ = example()
    sets, targets = example_sets()
    for residual in ("renormalize", "smooth", "ghost"):
        with pytest.raises(ValueError, match=f"residual='{residual}' is about mass that targets left out"):
            skd.fused_linear_sparse_kl(hidden, head, targets, sets=sets, residual=residual)
    with pytest.raises(ValueError, match="vocabulary of 80 tokens, the logits of 70"):
        skd.fused_linear_sparse_kl(hidden, head[:70], targets, sets=sets)
    beyond = SparseTargets(ids=targets.ids.clone().fill_(TOKENS + 2 * SETS), weights=targets.weights)
    with pytest.raises(ValueError, match="targets name id 160, tokens and sets end at 159"):
        skd.fused_linear_sparse_kl(hidden, head, beyond, sets=sets)


def test_what_does_not_fit_is_refused_with_the_way_out():
    hidden, head, _, targets, labels = example()
    layer = torch.nn.Linear(H, V)
    with pytest.raises(ValueError, match=r"head_VH is a Linear, not a tensor .* give its weight"):
        skd.fused_linear_sparse_kl(hidden, layer, targets)
    with pytest.raises(ValueError, match=r"hidden \(37, 19\) and head \(19, 83\) differ in H; give head.T"):
        skd.fused_linear_sparse_kl(hidden, head.T, targets)
    for name, wrong in (("targets", targets.ids + V), ("labels", labels.clamp(min=0) + V)):
        ids, given = (wrong, labels) if name == "targets" else (targets.ids, wrong)
        changed = SparseTargets(ids=ids, weights=targets.weights)
        for call in (skd.fused_linear_sparse_kl, lambda h, w, *rest, **more: skd.sparse_kl(h @ w.T, *rest, **more)):
            with pytest.raises(ValueError, match=r"ids from .* the logits have 83 ids; .*SparseKDCollator"):
                call(hidden, head, changed, labels=given, ce_weight=0.1)


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


class Passes(TorchDispatchMode):
    """Counts operators by name that make or change a tensor of at least `size` numbers, and the rows of products."""

    def __init__(self, size):
        super().__init__()
        self.size, self.large, self.product_rows = size, Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        read = [x.numel() for x in (*args, out) if isinstance(x, torch.Tensor)]
        if (
            name not in ("slice", "view", "empty", "detach", "t", "alias", "permute")
            and max(read, default=0) >= self.size
        ):
            self.large[name] += 1
        if name in ("mm", "addmm"):
            self.product_rows.append(len(out))
        return out


def passes(targets=None, **options):
    """What one step of 32 rows of V = 512, in one chunk, does with [C, V]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 8, generator=generator).requires_grad_()
    head = torch.randn(512, 8, generator=generator).requires_grad_()
    tokens = SparseTargets(ids=torch.arange(4).expand(32, 4), weights=torch.rand(32, 4, generator=generator))
    into = torch.zeros_like(head)  # with it, the operators are not behind a custom one
    with Passes(32 * 512) as counted:
        skd.fused_linear_sparse_kl(hidden, head, targets or tokens, accumulate_into=into, **options)
    return counted


def test_no_option_costs_a_pass_over_the_vocabulary():
    """Cross-entropy, z-loss, token weights, num_items, residuals and T alone change no operator over [C, V]."""
    plain = passes().large
    assert plain["mm"] + plain["addmm"] == 3
    assert plain.total() == 3 + 6  # gather, largest logit, softmax, largest share, scale, scatter
    labels = torch.arange(32)
    mixed = {"ce_weight": 0.1, "z_loss": 1e-4, "token_weights": torch.ones(32), "num_items_in_batch": 7}
    for residual in ("none", "label", "renormalize"):
        assert passes(labels=labels, residual=residual, **mixed).large == plain
    smooth = passes(labels=labels, residual="smooth", **mixed).large - plain
    assert smooth == Counter({"sum": 1, "sub_": 1})
    hot = passes(labels=labels, temperature=2.0, **mixed).large - plain
    assert hot == Counter({"pow": 1, "sum": 1, "addcmul_": 1})  # exp(z) is the square of exp(z / 2)
    hot = passes(labels=labels, temperature=3.0, **mixed).large - plain
    assert hot == Counter({"mul": 1, "softmax": 1, "amax": 1, "addcmul_": 1})
    assert passes(temperature=3.0).large == plain  # a product is divided by T for nothing


def test_sets_cost_work_on_their_own_tokens():
    """One read from the tile and one addition to it, each of as many numbers as the sets have tokens."""
    order = torch.arange(512)
    sets = PrefixSets(vocab_size=512, order=order, first=order[:2], last=order[:2] + 3)
    targets = SparseTargets(ids=512 + torch.arange(4).expand(32, 4), weights=torch.ones(32, 4))
    assert passes(targets, sets=sets).large - passes().large == Counter({"index_select": 1, "scatter_add_": 1})


def test_ignored_positions_are_left_out_of_the_products():
    labels = torch.where(torch.arange(32) % 4 == 0, 3, -100)
    assert passes(labels=labels).product_rows == [8, 8, 512]  # logits, their gradient, the head's


@pytest.mark.parametrize("option", OPTIONS)
def test_16_bits_without_instructions_run_in_float32(option, monkeypatch):
    """On a CPU that cannot multiply bf16, chunks are float32: gradients err by their own last rounding only."""
    hidden, head, bias, targets, labels = example(torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, head, bias)]
    truth = gradients(
        skd.sparse_kl(oracles.head_logits(*exact, softcap=8.0), targets, labels=labels, **OPTIONS[option]), exact
    )
    monkeypatch.setattr(fused, "FAST_ON_CPU", {torch.float32, torch.float64})
    leaves = [hidden, head, bias]
    loss = skd.fused_linear_sparse_kl(
        hidden, head, targets, bias=bias, labels=labels, chunk_rows=8, softcap=8.0, **OPTIONS[option]
    )
    for ours, true, leaf in zip(gradients(loss, leaves), truth, [loss, *leaves], strict=True):
        assert ours.dtype == leaf.dtype
        assert ((ours - true).abs() <= 2**-8 * true.abs() + 1e-5).all()


def test_the_heads_gradient_adds_up_in_float32(monkeypatch):
    """bf16, 4,096 chunks of one row with equal gradients: the sum is exact (in bf16 it would stall at 256)."""
    monkeypatch.setattr(fused, "FAST_ON_CPU", {torch.float32, torch.bfloat16})
    rows = 4096
    hidden, head = torch.ones(rows, 2).bfloat16(), torch.zeros(4, 2).bfloat16().requires_grad_()
    targets = SparseTargets(ids=torch.zeros(rows, 1, dtype=torch.long), weights=torch.ones(rows, 1))
    loss = skd.fused_linear_sparse_kl(hidden, head, targets, chunk_rows=1, reduction="sum")
    got = torch.autograd.grad(loss, head)[0].float()
    assert (got == torch.tensor([-0.75, 0.25, 0.25, 0.25])[:, None] * rows).all()


def test_gradient_straight_into_the_heads():
    """accumulate_into adds dW to what is there, gives autograd none, and refuses a factor that comes too late."""
    hidden, head, _, targets, labels = example()
    want = gradients(skd.fused_linear_sparse_kl(hidden, head, targets, labels=labels, chunk_rows=8), [hidden, head])
    head.grad = torch.ones_like(head)
    settings = {"labels": labels, "chunk_rows": 8, "accumulate_into": head.grad}
    skd.fused_linear_sparse_kl(hidden, head, targets, **settings).backward()
    torch.testing.assert_close(head.grad, want[2] + 1, atol=1e-12, rtol=0)
    torch.testing.assert_close(hidden.grad, want[1], atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="scale with num_items_in_batch"):
        (2 * skd.fused_linear_sparse_kl(hidden, head, targets, **settings)).backward()
    with pytest.raises(ValueError, match=r"accumulate_into \(2,\) and head \(83, 19\) differ"):
        skd.fused_linear_sparse_kl(hidden, head, targets, accumulate_into=torch.zeros(2))


def test_accumulation_in_16_bits():
    """A bf16 head's gradient may be added to a float32 tensor: nothing is rounded between steps."""
    hidden, head, _, targets, _ = example(torch.bfloat16)
    into = torch.zeros(V, H)
    for _ in range(2):
        skd.fused_linear_sparse_kl(hidden, head, targets, accumulate_into=into, chunk_rows=8).backward()
    once = torch.autograd.grad(skd.fused_linear_sparse_kl(hidden, head, targets, chunk_rows=8), head)[0]
    torch.testing.assert_close(into, 2 * once.float(), rtol=2**-7, atol=1e-4)


def compiled_step(hidden, head, ids, weights, labels, tables=None):
    sets = None
    if tables is not None:
        order, first, last = tables
        sets = PrefixSets(vocab_size=TOKENS, order=order, first=first, last=last)
    targets = SparseTargets(ids=ids, weights=weights)
    loss = skd.fused_linear_sparse_kl(
        hidden.tanh(), head, targets, labels=labels, ce_weight=0.1, softcap=8.0, sets=sets
    )
    return 2 * loss


@pytest.mark.parametrize("with_sets", [False, True])
def test_one_node_of_a_compiled_graph(with_sets):
    """torch.compile(fullgraph=True) traces value and gradients through one operator; the same numbers come out."""
    hidden, head, _, targets, labels = example(torch.float32)
    tables = None
    if with_sets:
        sets, targets = example_sets()
        tables = sets.order, sets.first, sets.last
    arguments = (hidden, head, targets.ids, targets.weights, labels, tables)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    seen = gradients(torch.compile(compiled_step, fullgraph=True, backend=backend)(*arguments), [hidden, head])
    made = gradients(torch.compile(compiled_step, fullgraph=True, backend="aot_eager")(*arguments), [hidden, head])
    for ours, theirs, true in zip(seen, made, gradients(compiled_step(*arguments), [hidden, head]), strict=True):
        torch.testing.assert_close(ours, true, atol=0, rtol=0)
        torch.testing.assert_close(theirs, true, atol=0, rtol=0)
    assert sum("sparsekd" in str(node.target) for node in graphs[0].graph.nodes) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.15 reads it itself when it checks
def test_the_operator_keeps_torchs_laws():
    """Schema, fake tensors and autograd registration, as torch checks them."""
    hidden, head, _, targets, labels = example(torch.float32)
    sets, of_sets = example_sets()
    options = ([0.1, 2.0, 0.01, 1.0, 0.0], "none", 8, torch.float32, [True, True, False])
    for given, tables in (
        (targets, (None, None, None, 0)),
        (of_sets, (sets.order, sets.first, sets.last, TOKENS)),
    ):
        arguments = (hidden, head, None, given.ids, given.weights, labels.clamp(min=0), labels != -100)
        rest = (torch.tensor(5), None, *tables, *options)
        torch.library.opcheck(torch.ops.sparsekd.fused_linear_sparse_kl, (*arguments, *rest))


def test_under_gradient_checkpointing():
    hidden, head, _, targets, labels = example()
    arguments = (hidden, head, targets.ids, targets.weights, labels)
    again = gradients(checkpoint(compiled_step, *arguments, use_reentrant=False), [hidden, head])
    for ours, true in zip(again, gradients(compiled_step(*arguments), [hidden, head]), strict=True):
        torch.testing.assert_close(ours, true, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_second_backward_is_right_or_refused(dtype):
    """Gradients are scaled in place: a second backward is an error, or (16 bits, no factor) the same once more."""
    hidden, head, _, targets, _ = example(dtype)
    loss = skd.fused_linear_sparse_kl(hidden, head, targets)
    loss.backward(retain_graph=True)
    once = head.grad.clone()
    if dtype == torch.bfloat16:
        loss.backward()
        torch.testing.assert_close(head.grad, 2 * once)
    else:
        with pytest.raises(RuntimeError, match="a second backward through fused_linear_sparse_kl"):
            loss.backward()
    scaled = 3 * skd.fused_linear_sparse_kl(hidden, head, targets)
    scaled.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|a second backward"):
        scaled.backward()


def step_passes(factor: float, dtype: torch.dtype = torch.float32, chunk_rows: int = 8) -> Counter:
    """Operators of a step of 24 rows that touch a tensor as large as the head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 64, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(512, 64, generator=generator).to(dtype).requires_grad_()
    targets = SparseTargets(ids=torch.arange(4).expand(24, 4), weights=torch.rand(24, 4, generator=generator))
    with Passes(512 * 64) as counted:
        (factor * skd.fused_linear_sparse_kl(hidden, head, targets, chunk_rows=chunk_rows)).backward()
    return counted.large


def test_a_factor_on_the_loss_costs_no_pass_over_the_head():
    """The last chunk's product scales what it adds to; 2 of 3 chunks are added before."""
    assert step_passes(2.5) == step_passes(1.0) == Counter({"mm": 3, "addmm": 6})


@pytest.fixture
def far(monkeypatch):
    """Factors are read as on an accelerator: by the device alone."""
    monkeypatch.setattr(fused, "_on_host", lambda x: False)


@pytest.mark.parametrize("chunk_rows", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_factor_on_an_accelerator(far, dtype, chunk_rows):
    """Of one chunk and of more, in the head's dtype: as the factor on the loss of materialised logits."""
    hidden, head, _, targets, labels = example(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, head)]
    want = gradients(2.5 * skd.sparse_kl(exact[0] @ exact[1].T, targets, labels=labels), exact)
    plain = gradients(2.5 * skd.sparse_kl(hidden @ head.T, targets, labels=labels), [hidden, head])
    loss = 2.5 * skd.fused_linear_sparse_kl(hidden, head, targets, labels=labels, chunk_rows=chunk_rows)
    for ours, theirs, true in zip(gradients(loss, [hidden, head]), plain, want, strict=True):
        assert ours.dtype == theirs.dtype
        slack = max(4 * torch.finfo(dtype).eps, 1e-12) * true.abs().max()
        assert (ours.double() - true).abs().max() <= (theirs.double() - true).abs().max() + slack


def test_a_factor_on_an_accelerator_costs_no_pass_over_the_head(far):
    """16 bits: one chunk's product is all there is; three are added up in float32, which is rounded with the factor."""

    one, three = (step_passes(2.5, torch.bfloat16, rows) for rows in (24, 8))
    assert [one, three] == [step_passes(1.0, torch.bfloat16, rows) for rows in (24, 8)]
    assert one == Counter({"mm": 1, "addmm": 2})
    assert (three["mul"], three["mul_"], three["_to_copy"]) == (1, 0, 0)


@pytest.mark.parametrize("chunk_rows", [1, 8, 64])
def test_losses_of_one_thread_keep_apart(chunk_rows):
    """Two losses wait for their last products at once, one is never asked for: nobody writes over another's chunk."""
    hidden, head, _, targets, labels = example()
    settings = {"labels": labels, "chunk_rows": chunk_rows}
    plain = [skd.sparse_kl(scale * hidden @ head.T, targets, labels=labels) for scale in (1.0, 0.5)]
    fused = [skd.fused_linear_sparse_kl(hidden, head, targets, scale=scale, **settings) for scale in (1.0, 0.5, 2.0)]
    wanted = torch.autograd.grad(3 * plain[0] - 2 * plain[1], [hidden, head])
    skd.fused_linear_sparse_kl(hidden, head, targets, scale=3.0, **settings).backward()
    for ours, theirs in zip(torch.autograd.grad(3 * fused[0] - 2 * fused[1], [hidden, head]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("residual", ["none", "ghost", "smooth"])
def test_nothing_waits_for_a_device(residual):
    """On tensors without data, which answer no question about values, a whole step goes through."""
    hidden, head = (torch.empty(n, 8, device="meta", dtype=torch.bfloat16) for n in (40, 30))
    ids, labels = torch.empty(40, 5, device="meta", dtype=torch.long), torch.empty(40, device="meta", dtype=torch.long)
    numbers = [0.1, 2.0, 0.01, 1.0, 30.0]
    loss, found = fused._step(
        hidden, head, None, ids, torch.empty(40, 5, device="meta"), labels, labels != -100,
        torch.ones((), device="meta"), None, None, None, None, 0, numbers, residual, 16, torch.bfloat16,
        [True, True, False],
    )  # fmt: skip
    assert (loss.shape, found.hidden.shape, found.head.dtype) == ((), (40, 8), torch.bfloat16)


@pytest.mark.parametrize("chunk_rows", [16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_backward_waits_for_a_device(dtype, chunk_rows):
    """A whole step with a factor on its loss, by the way that an accelerator takes: the last product waits for it."""
    hidden, head = (torch.empty(n, 8, device="meta", dtype=dtype).requires_grad_() for n in (40, 30))
    ids, weights = torch.empty(40, 5, device="meta", dtype=torch.long), torch.empty(40, 5, device="meta")
    settings = {"labels": ids[:, 0], "ce_weight": 0.1, "temperature": 2.0, "token_weights": weights[:, 0]}
    targets = SparseTargets(ids=ids, weights=weights)
    (2.5 * skd.fused_linear_sparse_kl(hidden, head, targets, chunk_rows=chunk_rows, **settings)).backward()
    assert (hidden.grad.dtype, head.grad.dtype, head.grad.shape) == (dtype, dtype, head.shape)


_MEMORY = """
import ctypes, sys, torch
from pathlib import Path
import sparsekd as skd
from sparsekd.prefix_sets import PrefixSets
from sparsekd.targets import SparseTargets
torch.set_num_threads(1)
n, h, v, rows = 2048, 64, 32768, int(sys.argv[1])
first = torch.randint(v - 8, (v,))
sets = PrefixSets(vocab_size=v, order=torch.randperm(v), first=first, last=first + torch.randint(2, 8, (v,)))
options = eval(sys.argv[2])
hidden, head = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
ids = torch.randint(3 * v if "sets" in options else v, (n, 12))
targets = SparseTargets(ids=ids, weights=torch.full((n, 12), 1 / 12))
def resident(name):  # not ru_maxrss, which starts at the parent's peak and hides everything
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
labels = torch.ones(n).long()
skd.fused_linear_sparse_kl(hidden[:1], head, targets[:1], chunk_rows=1, labels=labels[:1], **options).backward()
hidden.grad = head.grad = None
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
skd.fused_linear_sparse_kl(hidden, head, targets, chunk_rows=rows, labels=labels, **options).backward()
print(resident("VmHWM") - before - 4 * (hidden.numel() + head.numel()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize(
    "options", ["{}", "dict(ce_weight=0.1, temperature=2.0, z_loss=1e-4, softcap=30.0)", "dict(sets=sets)"]
)
def test_peak_memory_is_chunk_by_vocabulary(options):
    """Beyond dW and dh, forward and backward take one [512, V] buffer of 64 MiB; a second dW would be 8 MiB more."""
    words = [sys.executable, "-c", _MEMORY, "512", options]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert 0.98 < int(out) / (512 * 32768 * 4) < 1.10
