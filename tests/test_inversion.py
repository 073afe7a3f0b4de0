"""The quick inversion of a row's cumulative distribution: its law, its twin, and what it does to memory."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd as skd
from sparsekd import inversion
from sparsekd.errors import ModelError

GRID = (torch.arange(2**18, dtype=torch.float64) + 0.5) / 2**18


def softmax_blocks(logits_NV: torch.Tensor) -> torch.Tensor:
    return inversion.in_blocks(logits_NV.float().softmax(-1))


@pytest.mark.parametrize("vocab_size", [5, 64, 300, 4096 + 17, 131072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_law_on_a_grid(vocab_size, dtype):
    """On a grid of 2^18 points each id is hit in proportion to its float64 mass: cumulatively to half a step and 1e-7.

    This is the exact law, without Monte Carlo; one float32 cumulative sum would fail.
    """
    logits = (4 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))).to(dtype)
    hits = torch.bincount(inversion.ids_at(logits[None], GRID[None])[0], minlength=vocab_size).double() / 2**18
    gap = (hits.cumsum(0) - logits.double().softmax(-1).cumsum(0)).abs().max()
    assert gap <= 0.5 / 2**18 + 1e-7


def test_block_masses_are_float64_sums():
    """Each block's share against float64: total variation below 2e-7, flat, sharp and with impossible ids."""
    for scale in (0, 1, 5, 20):
        logits = scale * torch.randn(8, 40_000, generator=torch.Generator().manual_seed(scale))
        logits[1, 100:9000] = -torch.inf
        truth = inversion.in_blocks(logits.double().softmax(-1)).sum(-1)
        masses = inversion.block_masses(logits)
        assert (masses / masses.sum(-1, keepdim=True) - truth).abs().sum(-1).max() / 2 < 2e-7


@pytest.mark.parametrize("scale", [0.1, 2, 10])
@pytest.mark.parametrize("vocab_size", [7, 32, 300, 4096])
def test_the_twin_gives_the_same_ids(vocab_size, scale):
    """`invert` of the softmax in blocks: equal but where a point lies within rounding (1e-7) of an interval's end."""
    logits = scale * torch.randn(200, vocab_size, generator=torch.Generator().manual_seed(1))
    points = torch.rand(200, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64).sort(-1).values
    quick, slow = inversion.ids_at(logits, points), inversion.invert(softmax_blocks(logits), points)
    assert (quick.diff(dim=-1) >= 0).all()
    ends = logits.double().softmax(-1).cumsum(-1)
    near = (ends.gather(-1, torch.minimum(quick, slow)) - points).abs() < 1e-7
    assert (near | (quick == slow)).all()
    assert (quick != slow).float().mean() < 1e-3


def test_the_search_by_halves_is_one_over_the_rounded_ends():
    """Points on the ends of ids, a step of 2^-40 or of float64 beside them, anywhere; ids without mass; any scale."""
    generator, whole = torch.Generator().manual_seed(3), 2**inversion.FRACTION_BITS
    logits = torch.randn(40, inversion.BLOCK, generator=generator) * torch.logspace(-2, 1.5, 40)[:, None]
    logits[::3, 4:9] = -torch.inf
    running = inversion._running_masses(logits.clone())
    rounded = (running / running[:, -1:] * whole).long()
    near = [rounded.double() / whole + each for each in (0, -1 / whole, 1 / whole, 1e-16, -1e-16)]
    near += [
        torch.rand(40, 64, generator=generator, dtype=torch.float64),
        torch.tensor([[0.0, 1 - 2**-53]]).expand(40, 2),
    ]
    points = torch.cat(near, -1).clamp_(0, 1 - 2**-53)
    expected = torch.searchsorted(rounded, (points * whole).long().clamp_(max=whole - 1), right=True)
    opened = torch.arange(40).repeat_interleave(points.shape[1])
    assert torch.equal(inversion._offsets(running, opened, points.flatten()), expected.flatten())
    assert len(expected.unique()) == inversion.BLOCK


def test_points_at_the_ends_stay_in_the_support():
    """0 and the largest number below 1 give ids with mass, though the row begins and ends with impossible ids."""
    logits = torch.full((2, 200), -torch.inf)
    logits[:, 70:75] = torch.tensor([0.0, -3.0, 1.0, -torch.inf, -20.0])
    ids = inversion.ids_at(logits, torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64).expand(2, 2))
    assert ids.tolist() == [[70, 74]] * 2


@pytest.mark.parametrize("temperature", [0.0, 0.004, 0.5, 0.8, 1.3, 4.0])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(7, torch.float32), (300, torch.bfloat16), (4099, torch.float32)])
def test_tilted_draws_are_those_of_the_dense_twin(temperature, vocab_size, dtype):
    """q ∝ p^t straight from logits: ids as by float64 cumulative sums but where a point lies within 1e-7 of an end;
    log2 p to 1e-6 and the entropy to 2e-6 / |1 - t|, with masked ids out of q at every t."""
    logits = (2 * torch.randn(200, vocab_size, generator=torch.Generator().manual_seed(5))).to(dtype)
    logits[:, 1::3] = -torch.inf
    points = torch.rand(200, 50, generator=torch.Generator().manual_seed(6), dtype=torch.float64).sort(-1).values
    masses, log2_q = inversion.tilted_masses(logits, temperature)
    _, log2_all = inversion.tilted_masses(logits, 1.0)
    quick = inversion.ids_in(logits, masses, points, temperature)
    slow, log2_p, entropy = oracles.importance_plain(logits, points, temperature)
    p = logits.double().softmax(-1)
    ends = p.pow(temperature).where(p > 0, 0).cumsum(-1)
    near = ((ends / ends[:, -1:]).gather(-1, torch.minimum(quick, slow)) - points).abs() < 1e-7
    assert (near | (quick == slow)).all()
    assert (quick != slow).float().mean() < 1e-3
    assert (quick % 3 != 1).all()
    ours = (logits.double() - logits.double().amax(-1, keepdim=True)).gather(-1, slow) / math.log(2) - log2_all[:, None]
    torch.testing.assert_close(ours, log2_p, atol=1e-6, rtol=0)
    ours = (log2_q - temperature * log2_all) / (1 - temperature)
    torch.testing.assert_close(ours, entropy, atol=2e-6 / abs(1 - temperature), rtol=0)


def test_tilted_logits_that_are_nan_are_refused():
    """At t = 0 too, where masked ids are 0 times minus infinity."""
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(3, 40)
        logits[1, 5] = bad
        for temperature in (0.0, 0.7):
            with pytest.raises(ModelError, match="NaN or inf at 1 of 3 positions"):
                skd.sample(logits, "systematic", temperature=temperature)


@pytest.mark.parametrize("vocab_size", [96, 100])
def test_strides_and_neighbours_change_nothing(vocab_size):
    """A transposed or expanded tensor, and any part of the batch, gives each row the same ids."""
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(3))
    points = torch.rand(40, 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64).sort(-1).values
    whole = inversion.ids_at(logits, points)
    assert torch.equal(inversion.ids_at(logits.T.contiguous().T, points), whole)
    assert torch.equal(inversion.ids_at(logits[7:9], points[7:9]), whole[7:9])
    repeated = inversion.ids_at(logits[:1].expand(40, -1), points[:1].expand(40, -1))
    assert torch.equal(repeated, whole[:1].expand(40, -1))


class Sizes(TorchDispatchMode):
    """Notes the operators that touch a tensor of at least `least` entries, and the most bytes that one made."""

    def __init__(self, least: int, given: torch.Tensor) -> None:
        super().__init__()
        self.least, self.given, self.touched, self.made = least, given.untyped_storage().data_ptr(), [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in (*args, *(kwargs or {}).values(), result) if isinstance(each, torch.Tensor)]
        views = ("slice", "view", "unsafe_view", "expand", "unflatten", "alias", "detach", "empty")
        if any(each.numel() >= self.least for each in tensors) and not any(v in func.__name__ for v in views):
            self.touched.append(func.__name__)
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.given:
            self.made = max(self.made, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("sampler", ["random_sampling", "systematic"])
def test_a_row_is_passed_over_three_times(sampler):
    """One softmax into a reused buffer, one sum over it, one gather of the opened blocks: no operator more sees V.

    A regression test of speed that no busy machine can trip: the rest of the work is in V / 32 and rounds.
    """
    logits = torch.randn(4, 131072)
    with Sizes(least=4 * 131072, given=logits) as sizes:
        skd.sample(logits, sampler, rounds=50)
    assert sizes.touched == ["softmax.int_out", "sum.dim_IntList", "index_select.default"]
    # Of q ∝ p^t: the same for q and for p, whose sums weigh the draws; peaks are read from what was just written.
    with Sizes(least=4 * 131072, given=logits) as sizes:
        skd.sample(logits, sampler, rounds=50, temperature=0.8)
    once = ["softmax.int_out", "sum.dim_IntList", "amax.default"]
    draws = ["index_select.default", "gather.default", "amax.default"]
    assert sizes.touched == ["copy_.default", "mul_.Tensor", *once, *once, *draws]


def test_memory_beside_the_logits_is_a_tenth_of_the_probabilities():
    """No tensor above 2 `CHUNK_BYTES` is made, however many positions there are: here the logits are 128 MiB."""
    logits = torch.randn(256, 131072)
    with Sizes(least=1, given=logits) as sizes:
        skd.sample(logits, "random_sampling", rounds=50)
    assert 2**20 < sizes.made <= 2 * inversion.CHUNK_BYTES["cpu"] < 0.1 * 4 * logits.numel()


@pytest.mark.parametrize("vocab_size", [96, 100])
def test_blocks_that_an_accelerator_opens_unasked_are_the_same(vocab_size):
    """All that are opened come first, in their order; what stands behind them gives no id."""
    logits = 3 * torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(5))
    points = torch.rand(6, 20, generator=torch.Generator().manual_seed(6), dtype=torch.float64).sort(-1).values
    block = inversion.locate(inversion.block_masses(logits).cumsum(-1), points)[0]
    block_P = (block + 4 * torch.arange(6)[:, None]).flatten()
    opens = torch.cat([torch.tensor([True]), block_P[1:] != block_P[:-1]])
    opened = inversion._opened_unasked(block_P, opens.cumsum(0) - 1)
    assert torch.equal(opened[: opens.sum()], block_P[opens])
    assert not opened[opens.sum() :].any()


def test_a_single_row_is_added_up_as_one_of_several():
    values = torch.rand(1, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inversion.running_sums(values), values.cumsum(-1))
    assert inversion.running_sums(values[:0]).shape == (0, 5000)
