"""Sets of tokens as targets: the dense formula in float64, ranges by hand, and a population with an exact answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sparsekd.losses import sparse_ce
from sparsekd.prefix_sets import PrefixSets, log_set_masses, log_set_masses_one_by_one, prefix_set_ce
from sparsekd.redraw import UNRESOLVED, Entries
from sparsekd.targets import SparseTargets
from sparsekd.vocab_bytes import prefix_ranges

VOCABULARY = [b"a", b"ab", b"abc", b"b", None, b"ac", b"bca", b"a", b"\xff", b"\xff\xfe"]


def sets_of(pieces):
    order, first, last = map(torch.from_numpy, prefix_ranges(pieces))
    return PrefixSets(order=order, first=first, last=last)


def members(pieces):
    """[V, V]: 1 where the column's token begins with the row's bytes."""
    table = [[u == v or (a is not None and b is not None and b.startswith(a)) for v, b in enumerate(pieces)]
             for u, a in enumerate(pieces)]  # fmt: skip
    return torch.tensor(table, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(30))
def test_ranges_are_the_tokens_that_begin_alike(seed):
    """Against a test of every pair, twins and control tokens included."""
    rng = np.random.default_rng(seed)
    some = [bytes(rng.integers(0, 3, rng.integers(1, 5)).tolist()) for _ in range(25)]
    pieces = VOCABULARY if seed == 0 else [*some, None, *some[:3], None]
    order, first, last = prefix_ranges(pieces)
    assert sorted(order.tolist()) == list(range(len(pieces)))
    for token, row in enumerate(members(pieces)):
        assert set(order[first[token] : last[token]].tolist()) == set(row.nonzero()[:, 0].tolist())


def random_targets(rng, size, positions=6, kept=5):
    ids = torch.from_numpy(np.stack([rng.choice(2 * size, kept, replace=False) for _ in range(positions)]))
    weights = torch.from_numpy(rng.dirichlet(np.ones(kept), positions))
    weights[0, 0] = 0
    return SparseTargets(ids=ids, weights=weights)


def test_loss_and_gradient_are_the_dense_formulas():
    """float64, to 1e-12: the docstring's formula, and the gradient (Σt) q - t - Σ t_C q 1_C / q(C)."""
    rng, size = np.random.default_rng(0), len(VOCABULARY)
    targets, member = random_targets(rng, size), members(VOCABULARY)
    logits = torch.from_numpy(rng.normal(0, 3, (6, size))).requires_grad_()
    found = prefix_set_ce(logits, targets, sets_of(VOCABULARY), reduction="none")
    t, q = targets.densify(2 * size), logits.softmax(-1)
    dense = -(t[:, :size] * q.log() + t[:, size:] * (q @ member.T).log()).sum(-1)
    assert torch.allclose(found, dense, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    q = q.detach()
    inside = (t[:, size:] / (q @ member.T)) @ member * q
    assert torch.allclose(gradient, t.sum(-1, keepdim=True) * q - t[:, :size] - inside, atol=1e-12)


def test_small_masses_keep_their_digits():
    """A set of probability 1e-30 beside one of nearly 1, in float32: a difference of running sums would be 0."""
    logits = torch.zeros(1, len(VOCABULARY))
    logits[0, 8:] = -70
    targets = SparseTargets(ids=torch.tensor([[len(VOCABULARY) + 8]]), weights=torch.ones(1, 1))
    found = prefix_set_ce(logits, targets, sets_of(VOCABULARY))
    assert float(found) == pytest.approx(70 - np.log(2) + np.log(8), rel=1e-6)


def test_masses_are_their_slow_twins_underflow_included():
    """Logits over 200 nats, float32, values and gradients."""
    torch.manual_seed(0)
    size, sets = len(VOCABULARY), sets_of(VOCABULARY)
    assert torch.equal(sets.membership(torch.float64).to_dense(), members(VOCABULARY))
    rows, tokens = torch.arange(40).repeat_interleave(size), torch.arange(size).repeat(40)
    for scale in (1, 40):
        logits = [(scale * torch.randn(40, size)).requires_grad_() for _ in range(2)]
        logits[1].data.copy_(logits[0].data)
        found = [
            masses(z.log_softmax(-1), rows, tokens, sets)
            for z, masses in zip(logits, (log_set_masses, log_set_masses_one_by_one), strict=True)
        ]
        assert torch.allclose(*found, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(each.sum(), z)[0] for each, z in zip(found, logits, strict=True)]
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)
        assert (found[0].min().item() < -75) == (scale == 40)


def test_a_head_wider_than_the_vocabulary_keeps_its_mass():
    """Padded logits count in the softmax and belong to no set."""
    logits = torch.randn(1, len(VOCABULARY) + 3, dtype=torch.float64)
    q, sets = logits.softmax(-1)[0], sets_of(VOCABULARY)
    targets = SparseTargets(ids=torch.tensor([[len(VOCABULARY)]]), weights=torch.ones(1, 1, dtype=torch.float64))
    exact = -(members(VOCABULARY)[0] * q[: len(VOCABULARY)]).sum().log()
    assert float(prefix_set_ce(logits, targets, sets)) == pytest.approx(float(exact))
    with pytest.raises(ValueError, match="vocabulary of 10 tokens, the logits of 9"):
        prefix_set_ce(logits[:, :9], targets, sets)


def test_without_sets_it_is_sparse_ce():
    """Labels, weights of the label and ignored positions included."""
    rng, size = np.random.default_rng(1), len(VOCABULARY)
    logits = torch.from_numpy(rng.normal(0, 1, (2, 3, size)))
    ids = torch.from_numpy(np.stack([rng.choice(size, 4, replace=False) for _ in range(6)])).view(2, 3, 4)
    targets = SparseTargets(ids=ids, weights=torch.rand(2, 3, 4, dtype=torch.float64))
    labels = torch.tensor([[1, -100, 3], [4, 5, -100]])
    for words in ({"ce_weight": 0.3}, {"reduction": "sum"}, {"num_items_in_batch": 7}):
        ours = prefix_set_ce(logits, targets, sets_of(VOCABULARY), labels=labels, **words)
        assert torch.allclose(ours, sparse_ce(logits, targets, labels=labels, **words))


# --- a population with an exact answer --------------------------------------------------------------------
#
# Texts are a head and a tail. The teacher draws them one by one; the student has the heads, and tokens that join a head
# with one of two of its three tails. Nothing a head's draw says tells the joint tokens apart.

HEADS, TAILS = 6, 3


def population(seed):
    """p(head) [H], p(tail | head) [H, T], and the exact q [H, T] of joint tokens, or of the head for the last tail."""
    rng = np.random.default_rng(seed)
    heads, tails = rng.dirichlet(np.full(HEADS, 0.5)), rng.dirichlet(np.ones(TAILS), HEADS)
    return heads, tails, heads[:, None] * tails


def token(head, tail=TAILS - 1):
    """The student's id for a head with a tail; the last tail leaves the head as a token of its own."""
    return head * TAILS + (tail + 1) % TAILS


PIECES = [bytes([65 + head]) + b"\0xy"[tail : tail + 1] * (tail > 0) for head in range(HEADS) for tail in range(TAILS)]


def targets_of(heads, tails, unresolved, chain):
    """Per realised head: its probability and the mean of its targets. It goes on, the others stay open."""
    for realised in range(HEADS):
        entries = []
        for head in range(HEADS):
            if chain and head == realised:
                entries += [(token(head, tail), heads[head] * tails[head, tail], False) for tail in range(TAILS)]
            else:
                entries.append((token(head), heads[head], True))
        ids, weights, is_open = (np.array(part) for part in zip(*entries, strict=True))
        treated = UNRESOLVED[unresolved](Entries(np.zeros(len(ids), int), ids, weights, is_open), len(PIECES))
        yield heads[realised], treated.token, treated.weight


def minimiser(heads, tails, unresolved, chain):
    """The student's distribution of least mean loss, found by its gradient."""
    dense = torch.zeros(1, 2 * len(PIECES), dtype=torch.float64)
    for share, ids, weights in targets_of(heads, tails, unresolved, chain):
        dense[0].index_add_(0, torch.from_numpy(ids), torch.from_numpy(share * weights))
    targets = SparseTargets(ids=torch.arange(2 * len(PIECES))[None], weights=dense)
    logits = torch.zeros(1, len(PIECES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = prefix_set_ce(logits, targets, sets_of(PIECES))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)[0].numpy()


def distance(seed, unresolved, chain):
    heads, tails, exact = population(seed)
    q = np.zeros(len(PIECES))
    for head, tail in itertools.product(range(HEADS), range(TAILS)):
        q[token(head, tail)] = exact[head, tail]
    return np.abs(minimiser(heads, tails, unresolved, chain) - q).sum() / 2


@pytest.mark.parametrize("seed", range(2))
def test_sets_and_chains_reach_the_teacher_points_do_not(seed):
    """Total variation to the exact answer: below 1e-3 with sets and chains; points, and sets alone, stay far away."""
    assert distance(seed, "set", chain=True) < 1e-3
    assert distance(seed, "point", chain=True) > 0.1
    assert distance(seed, "point", chain=False) > 0.3
    assert distance(seed, "set", chain=False) > 0.05
