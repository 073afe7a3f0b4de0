"""Sets of tokens as targets: the dense formula in float64, ranges by hand, and a population with an exact answer."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from sparsekd.losses import sparse_ce
from sparsekd.prefix_sets import PrefixSets
from sparsekd.targets import SparseTargets
from sparsekd.vocab_bytes import prefix_ranges

VOCABULARY = [b"a", b"ab", b"abc", b"b", None, b"ac", b"bca", b"a", b"\xff", b"\xff\xfe"]


def sets_of(pieces):
    order, first, last = map(torch.from_numpy, prefix_ranges(pieces))
    return PrefixSets(vocab_size=len(pieces), order=order, first=first, last=last)


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


def random_targets(rng, size, positions=6, kept=7):
    """Tokens, sets and conditions of V tokens and V sets."""
    ids = torch.from_numpy(np.stack([rng.choice(3 * size, kept, replace=False) for _ in range(positions)]))
    weights = torch.from_numpy(rng.dirichlet(np.ones(kept), positions))
    weights[0, 0] = 0
    return SparseTargets(ids=ids, weights=weights)


def test_loss_and_gradient_are_the_dense_formulas():
    """float64, to 1e-12: the docstring's formula, and the gradient S q - t - Σ (t_C - m_C) q 1_C / q(C)."""
    rng, size = np.random.default_rng(0), len(VOCABULARY)
    targets, member = random_targets(rng, size), members(VOCABULARY)
    assert (targets.ids >= 2 * size).any()
    logits = torch.from_numpy(rng.normal(0, 3, (6, size))).requires_grad_()
    found = sparse_ce(logits, targets, sets=sets_of(VOCABULARY), reduction="none")
    t, q = targets.densify(3 * size), logits.softmax(-1)
    of_sets = t[:, size : 2 * size] - t[:, 2 * size :]
    dense = -(t[:, :size] * q.log() + of_sets * (q @ member.T).log()).sum(-1)
    torch.testing.assert_close(found, dense, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    q = q.detach()
    inside = (of_sets / (q @ member.T)) @ member * q
    mass = t[:, :size].sum(-1) + of_sets.sum(-1)
    torch.testing.assert_close(gradient, mass[:, None] * q - t[:, :size] - inside, atol=1e-12, rtol=0)


def test_a_token_given_its_set_says_nothing_of_the_set():
    """- log q(v | C): the gradient is q(. | C) - 1_v inside C and nothing outside."""
    size, member = len(VOCABULARY), members(VOCABULARY)
    logits = torch.randn(1, size, dtype=torch.float64, requires_grad=True)
    targets = SparseTargets(ids=torch.tensor([[1, 2 * size]]), weights=torch.ones(1, 2, dtype=torch.float64))
    loss = sparse_ce(logits, targets, sets=sets_of(VOCABULARY))
    q = logits.detach().softmax(-1)[0]
    inside = q * member[0] / (q * member[0]).sum()
    assert loss.item() == pytest.approx(-inside[1].log().item(), rel=1e-14)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient[0], inside - torch.eye(size, dtype=torch.float64)[1], atol=1e-14, rtol=0)


def test_small_masses_keep_their_digits():
    """A set of probability 1e-30 beside one of nearly 1, in float32: a difference of running sums would be 0."""
    logits = torch.zeros(1, len(VOCABULARY))
    logits[0, 8:] = -70
    targets = SparseTargets(ids=torch.tensor([[len(VOCABULARY) + 8]]), weights=torch.ones(1, 1))
    found = sparse_ce(logits, targets, sets=sets_of(VOCABULARY))
    assert float(found) == pytest.approx(70 - np.log(2) + np.log(8), rel=1e-6)


def test_masses_are_their_slow_twins():
    """Logits over 200 nats, float32, values and gradients."""
    torch.manual_seed(0)
    size, sets = len(VOCABULARY), sets_of(VOCABULARY)
    targets = SparseTargets(ids=size + torch.arange(size).repeat(40, 1), weights=torch.rand(40, size))
    for scale in (1, 40):
        logits = [(scale * torch.randn(40, size)).requires_grad_() for _ in range(2)]
        logits[1].data.copy_(logits[0].data)
        masses = oracles.log_set_masses(logits[1].log_softmax(-1), sets)
        assert (masses.min().item() < -75) == (scale == 40)
        found = [sparse_ce(logits[0], targets, sets=sets, reduction="sum"), -(targets.weights * masses).sum()]
        assert torch.allclose(*found, rtol=5e-7, atol=0)
        gradients = [torch.autograd.grad(each, z)[0] for each, z in zip(found, logits, strict=True)]
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_half_precision_logits_give_half_precision_gradients():
    """bfloat16: the loss in float32, the gradient the rounded one of float32."""
    rng, size = np.random.default_rng(3), len(VOCABULARY)
    targets, z = random_targets(rng, size), torch.randn(6, size).bfloat16()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        logits = z.to(dtype).requires_grad_()
        loss = sparse_ce(logits, targets, sets=sets_of(VOCABULARY))
        assert loss.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert gradients[0].dtype == torch.bfloat16
    assert torch.equal(gradients[0], gradients[1].bfloat16())


def test_a_head_wider_than_the_vocabulary_keeps_its_mass():
    """Padded logits count in the softmax and belong to no set."""
    logits = torch.randn(1, len(VOCABULARY) + 3, dtype=torch.float64)
    q, sets = logits.softmax(-1)[0], sets_of(VOCABULARY)
    targets = SparseTargets(ids=torch.tensor([[len(VOCABULARY)]]), weights=torch.ones(1, 1, dtype=torch.float64))
    exact = -(members(VOCABULARY)[0] * q[: len(VOCABULARY)]).sum().log()
    assert float(sparse_ce(logits, targets, sets=sets)) == pytest.approx(float(exact), rel=1e-14)
    with pytest.raises(ValueError, match="vocabulary of 10 tokens, the logits of 9"):
        sparse_ce(logits[:, :9], targets, sets=sets)


def test_without_sets_it_is_sparse_ce():
    """Labels, weights of the label and ignored positions included."""
    rng, size = np.random.default_rng(1), len(VOCABULARY)
    logits = torch.from_numpy(rng.normal(0, 1, (2, 3, size)))
    ids = torch.from_numpy(np.stack([rng.choice(size, 4, replace=False) for _ in range(6)])).view(2, 3, 4)
    targets = SparseTargets(ids=ids, weights=torch.rand(2, 3, 4, dtype=torch.float64))
    labels = torch.tensor([[1, -100, 3], [4, 5, -100]])
    for words in ({"ce_weight": 0.3}, {"reduction": "sum"}, {"num_items_in_batch": 7}):
        ours = sparse_ce(logits, targets, sets=sets_of(VOCABULARY), labels=labels, **words)
        torch.testing.assert_close(ours, sparse_ce(logits, targets, labels=labels, **words), rtol=1e-14, atol=0)


# --- a population with an exact answer --------------------------------------------------------------------
#
# Texts are a head and a tail. The teacher draws them one by one; the student has the heads, and tokens that join a head
# with one of two of its three tails. Nothing a head's draw says tells the joint tokens apart.

HEADS, TAILS = 6, 3
SIZE = HEADS * TAILS
PIECES = [bytes([65 + head]) + b"\0xy"[tail : tail + 1] * (tail > 0) for head in range(HEADS) for tail in range(TAILS)]
# The student's id of a head with a tail; the last tail leaves the head as a token of its own.
TOKEN = np.arange(HEADS)[:, None] * TAILS + (np.arange(TAILS) + 1) % TAILS
ALONE = TOKEN[:, -1]


def population(seed):
    """The teacher's p(head) [H] and p(tail | head) [H, T], and p(head) of a text that it did not write."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(HEADS, 0.5)), rng.dirichlet(np.ones(TAILS), HEADS), rng.dirichlet(np.ones(HEADS))


def draws_as(treat, heads):
    """[3 V] the weights of p(head): on the heads' sets, on the heads as they stand, or nowhere."""
    found = np.zeros(3 * SIZE)
    if treat != "drop":
        found[ALONE + SIZE * (treat == "set")] = heads
    return found


def given(head, dense_V):
    """Weights of tokens, under the condition that they begin with a head."""
    found = np.zeros(3 * SIZE)
    found[:SIZE], found[2 * SIZE + ALONE[head]] = dense_V, 1
    return found


def one_hot(token):
    return np.eye(SIZE)[token]


def followed(treat, heads, tails, head, tail):
    """The realised draw goes on into the next draws, weights multiplied by its share."""
    found = draws_as(treat, heads)
    if treat == "drop":
        found[TOKEN[head]] = tails[head]
        return found
    found[ALONE[head] + SIZE * (treat == "set")] -= heads[head]
    found[TOKEN[head]] += heads[head] * tails[head]
    return found


METHODS = {
    "labels": lambda heads, tails, head, tail: np.concatenate([one_hot(TOKEN[head, tail]), np.zeros(2 * SIZE)]),
    "points": lambda heads, tails, head, tail: draws_as("point", heads),
    "points, followed": lambda *text: followed("point", *text),
    "dropped, followed": lambda *text: followed("drop", *text),
    "sets": lambda heads, tails, head, tail: draws_as("set", heads),
    "sets, followed": lambda *text: followed("set", *text),
    "sets, half labels": lambda *text: (METHODS["sets, followed"](*text) + METHODS["labels"](*text)) / 2,
    "sets, labels inside": lambda heads, tails, head, tail: draws_as("set", heads)
    + given(head, one_hot(TOKEN[head, tail])),
    "sets, draws inside": lambda heads, tails, head, tail: draws_as("set", heads)
    + given(head, one_hot(TOKEN[head]).T @ tails[head]),
}  # fmt: skip


def texts(heads, tails, method, of_text):
    """(probability, targets [3 V]) of each text."""
    for head in range(HEADS):
        for tail in range(TAILS):
            yield of_text[head] * tails[head, tail], METHODS[method](heads, tails, head, tail)


def minimiser(heads, tails, method, of_text):
    """The student's distribution of least mean loss, found by its gradient."""
    dense = sum(share * targets for share, targets in texts(heads, tails, method, of_text))
    targets = SparseTargets(ids=torch.arange(3 * SIZE)[None], weights=torch.from_numpy(dense)[None])
    logits = torch.zeros(1, SIZE, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = sparse_ce(logits, targets, sets=sets_of(PIECES))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)[0].numpy()


def distance(seed, method, *, foreign=False):
    """Total variation between what a method learns and the teacher in the student's tokens."""
    heads, tails, others = population(seed)
    exact = np.zeros(SIZE)
    exact[TOKEN] = heads[:, None] * tails
    return np.abs(minimiser(heads, tails, method, others if foreign else heads) - exact).sum() / 2


@pytest.mark.parametrize("seed", range(2))
def test_sets_and_what_lies_inside_reach_the_teacher(seed):
    """Total variation below 1e-3, also on a text that is not the teacher's; points and dropping stay far away."""
    for method in ("sets, draws inside", "sets, labels inside"):
        assert distance(seed, method) < 1e-3
        assert distance(seed, method, foreign=True) < 1e-3
    assert distance(seed, "sets, followed") < 1e-3
    assert distance(seed, "labels", foreign=True) > 0.1
    assert distance(seed, "sets, half labels", foreign=True) > 0.05
    assert distance(seed, "points, followed") > 0.1
    assert distance(seed, "points") > 0.3
    assert distance(seed, "dropped, followed", foreign=True) > 0.1
    assert distance(seed, "sets") > 0.05


def gradients(heads, tails, method, q):
    """[texts, V] gradients at the student's q, and the texts' probabilities."""
    shares, targets = zip(*texts(heads, tails, method, heads), strict=True)
    logits = torch.from_numpy(np.log(q))[None].repeat(len(shares), 1).requires_grad_()
    weights = torch.from_numpy(np.stack(targets))
    sparse = SparseTargets(ids=torch.arange(3 * SIZE).expand(len(shares), -1), weights=weights)
    loss = sparse_ce(logits, sparse, sets=sets_of(PIECES), reduction="sum")
    return torch.autograd.grad(loss, logits)[0].numpy(), np.array(shares)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_unbiased_and_vary_less_than_cross_entropys(seed):
    """At any q the mean over texts is q - p, exactly. At p labels inside sets vary less than labels alone, draws inside
    not at all; elsewhere draws inside vary less than both. A followed draw's share is no weight for it: biased."""
    heads, tails, _ = population(seed)
    exact = np.zeros(SIZE)
    exact[TOKEN] = heads[:, None] * tails
    for q in (exact, np.random.default_rng(seed + 9).dirichlet(np.ones(SIZE))):
        spread = {}
        for method in ("labels", "sets, labels inside", "sets, draws inside"):
            found, shares = gradients(heads, tails, method, q)
            mean = shares @ found
            assert np.allclose(mean, q - exact, rtol=0, atol=1e-14)
            spread[method] = float(shares @ ((found - mean) ** 2).sum(-1))
        assert spread["sets, draws inside"] < min(spread["labels"], spread["sets, labels inside"]) / 1.5
        if q is exact:
            assert spread["sets, labels inside"] < spread["labels"] / 1.3
            assert spread["sets, draws inside"] < 1e-20
    found, shares = gradients(heads, tails, "sets, followed", q)
    assert np.abs(shares @ found - (q - exact)).max() > 1e-3
