"""Three gloo processes, and two of them as a group: a head split by vocabulary is sampled as the whole one is."""

from __future__ import annotations

import datetime
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd as skd
from sparsekd.errors import MismatchError, ModelError, RecipeError, SparseKDError
from sparsekd.fused_parallel import VocabularyShard
from sparsekd.inversion import ids_in, tilted_masses
from sparsekd.position_budget import entropies
from sparsekd.rng import Keys
from sparsekd.samplers import in_vocabulary, sample_importance
from sparsekd.sampling_parallel import agree, entropies_split, ids_at_split, shares, whole_logits

N, V, R = 96, 2500, 50
# Where the processes' ids end: unequal shares, no multiples of a block of 32, one smaller than a block.
CUTS = {3: (5, 1043), 2: (1043,)}
GRID = (torch.arange(2**18, dtype=torch.float64) + 0.5) / 2**18
DRAWS = [
    ("random_sampling", {"rounds": R}),
    ("random_sampling", {"rounds": 12, "temperature": 0.8}),
    ("random_sampling", {"rounds": 12, "temperature": 0.0, "normalize": False}),
    ("systematic", {"rounds": R}),
    ("systematic", {"rounds": 1}),
    ("systematic", {"rounds": 25, "temperature": 1.3}),
]


class World:
    """A process's place among `size`: its group and its ids. Of two, the later rank holds the earlier ids."""

    def __init__(self, group, size):
        self.group, self.size, self.rank = group, size, dist.get_rank(group)
        self.place = self.rank if size == 3 else 1 - self.rank

    def own(self, vocab_size=V):
        edges = [0, *CUTS[self.size], vocab_size]
        return slice(edges[self.place], edges[self.place + 1])

    def shard(self, vocab_size=V, **changes):
        return VocabularyShard(
            **{"group": self.group, "start": self.own(vocab_size).start, "vocab_size": vocab_size} | changes
        )

    def sample(self, logits, sampler, **settings):
        return skd.sample(logits[:, self.own(logits.shape[1])], sampler, shard=self.shard(logits.shape[1]), **settings)


def example(dtype=torch.float32, vocab_size=V):
    """Masked ids everywhere, and in some rows all ids of a process, or all but one far below the others."""
    logits = (2 * torch.randn(N, vocab_size, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[:, 1::3] = -torch.inf
    logits[:20, :1043] = -torch.inf
    logits[20:40, 5:] = -torch.inf
    logits[20:30, 5] = -200.0
    return logits


def everywhere_the_same(world, tensor):
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous(), group=world.group)
    return all(torch.equal(part, tensor) for part in parts)


def check_targets(world):
    """`sample` gives what one process gives for the whole logits, the same in every process, for any float type."""
    keys = {"seed": 3, "rows": torch.arange(N) // 8 + 2**33, "positions": torch.arange(N) % 8}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = example(dtype)
        for sampler, parameters in DRAWS if dtype == torch.float32 else DRAWS[1:4:2]:
            alone = skd.sample(logits, sampler, **keys, **parameters)
            shared = world.sample(logits, sampler, **keys, **parameters)
            same = torch.isclose(shared.densify(V), alone.densify(V), rtol=1e-5, atol=1e-7).all(-1)
            assert same.float().mean() >= 0.99, (sampler, parameters, dtype)  # one point in a million is near an end
            assert everywhere_the_same(world, shared.ids)
            assert everywhere_the_same(world, shared.weights)
            other = skd.sample(logits, sampler, **keys | {"seed": 4}, **parameters).densify(V)
            assert (shared.densify(V) == other).all(-1).float().mean() < 0.5


def check_points(world):
    """Each point's id is the whole head's but where it lies within 1e-6 of the end of an id's interval, by float64."""
    points = torch.rand(N, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sort(-1).values
    points[:, 0], points[:, -1] = 0, 1 - 2.0**-53
    for dtype, temperature in ((torch.float32, 1.0), (torch.bfloat16, 0.0), (torch.float32, 0.7), (torch.float64, 1.3)):
        logits = example(dtype)
        ids = drawn_at(world, logits, points, temperature)
        alone = ids_in(logits, tilted_masses(logits, temperature)[0], points, temperature)
        p = logits.double().softmax(-1)
        assert (p.gather(-1, ids) > 0).all()
        ends = p.pow(temperature).where(p > 0, 0).cumsum(-1)
        near = ((ends / ends[:, -1:]).gather(-1, torch.minimum(ids, alone)) - points).abs() < 1e-6
        assert (near | (ids == alone)).all()
        assert (ids != alone).float().mean() < 1e-3
        assert (ids.diff(dim=-1) >= 0).all()


def keys_of(count):
    return Keys(seed=0, rows=torch.zeros(count, dtype=torch.int64), positions=torch.arange(count))


def drawn_at(world, logits, points, temperature=1.0):
    own = logits[:, world.own(logits.shape[1])]
    split = agree(own, keys_of(len(logits)), world.shard(logits.shape[1]), "points")
    return ids_at_split(own, points, split, shares(own, split, (temperature,))[0], temperature)


def check_shares(world):
    """A process's share of q ∝ p^t is that of its ids, to 1e-7 of float64 sums over t z as float32 rounds it: coarsely
    for logits about 100."""
    logits = example() + 100
    own = logits[:, world.own()]
    split = agree(own, keys_of(N), world.shard(), "shares")
    for temperature in (1.0, 0.7):
        ends = shares(own, split, (temperature,))[0].ends
        sums = (logits * temperature).double().softmax(-1).cumsum(-1)
        truth = sums[:, torch.tensor([*CUTS[world.size], V]) - 1]
        assert (ends / ends[:, -1:] - truth).abs().max() < 1e-7


def check_law_on_a_grid(world):
    """On a grid of 2^18 points each id is hit in proportion to its float64 mass: cumulative laws to 1e-6 + a step."""
    for temperature in (1.0, 0.6):
        logits = 4 * torch.randn(1, 4113, generator=torch.Generator().manual_seed(2))
        hits = torch.bincount(drawn_at(world, logits, GRID[None], temperature)[0], minlength=4113).double() / 2**18
        truth = (temperature * logits[0].double()).softmax(-1)
        assert (hits.cumsum(0) - truth.cumsum(0)).abs().max() <= 1 / 2**18 + 1e-6


def check_importance_draws(world):
    """The whole head's ids and counts; log2 p, of ids that others hold too, and entropy as exact as one process's."""
    logits = example()
    settings = {"sampler": "systematic", "rounds": R, "temperature": 0.7}
    alone = sample_importance(logits, **settings)
    shared = sample_importance(logits[:, world.own()], shard=world.shard(), **settings)
    assert torch.equal(shared.ids, alone.ids)
    assert torch.equal(shared.counts, alone.counts)
    p, kept = logits.double().softmax(-1), shared.counts > 0
    torch.testing.assert_close(shared.log2_p[kept], p.gather(-1, shared.ids)[kept].log2(), atol=1e-5, rtol=0)
    entropy = p.pow(0.7).where(p > 0, 0).sum(-1).log2() / 0.3
    torch.testing.assert_close(shared.entropy, entropy, atol=2e-6 / 0.3, rtol=0)
    assert everywhere_the_same(world, shared.log2_p)


def check_top_k(world):
    """The ids and probabilities of the whole head's k largest, in the same order, ties but for the last place too."""
    for dtype, k in ((torch.float32, 12), (torch.bfloat16, 40), (torch.float32, V + 7)):
        logits = example(dtype)
        alone, shared = skd.sample(logits, "top_k", k=k), world.sample(logits, "top_k", k=k)
        torch.testing.assert_close(shared.weights, alone.weights, rtol=1e-6, atol=1e-30)
        sure = alone.weights > alone.weights[:, -1:]
        assert sure.float().mean() > 0.3
        assert torch.equal(shared.ids[sure], alone.ids[sure])
        assert everywhere_the_same(world, shared.ids)


def check_top_p(world):
    """The whole head's ids and probabilities, but where a sum is within 1e-6 of p."""
    for p, k in ((0.9, 40), (0.5, 300), (1.0, 12)):
        alone, shared = (draw(example(), "top_p", p=p, k=k).densify(V) for draw in (skd.sample, world.sample))
        assert torch.isclose(shared, alone, rtol=1e-6, atol=1e-30).all(-1).float().mean() >= 0.97
        assert ((alone > 0).sum(-1) < k).float().mean() > 0.2 or p == 1


def check_entropies(world):
    """Those of one process, to float32, in every process; an id far below all others counts, and a masked one not."""
    for logits in (example(), example(torch.bfloat16), example() * 20 + 3000):
        shared, truth = entropies_split(logits[:, world.own()], world.shard()), logits.double().softmax(-1)
        torch.testing.assert_close(shared, torch.special.entr(truth).sum(-1).float(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(shared, entropies(logits), rtol=1e-5, atol=1e-5)
        assert everywhere_the_same(world, shared)


def check_whole_logits(world):
    """All ids' logits in their order, of any float type; shares with a gap are refused in all."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = example(dtype)
        assert torch.equal(whole_logits(logits[:, world.own()], world.shard()), logits)
    gap = world.shard(start=world.own().start + 1) if world.place == 1 else world.shard()
    with pytest.raises(MismatchError, match="shares must follow each other"):
        whole_logits(example()[:, world.own()], gap)


class Sent(TorchDispatchMode):
    """Bytes that each collective takes from this process."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            own = args[1] if "allgather" in func.__name__ else args[0]
            self.bytes.append(sum(each.nbytes for each in own))
        return func(*args, **(kwargs or {}))


def check_bytes(world):
    """What travels, to the byte: the same for any vocabulary, so no tensor of N V numbers, nor of N V / 32."""
    for vocab_size in (V, 40_000):
        logits = example(vocab_size=vocab_size)[:40]
        with Sent() as sent:
            world.sample(logits, "systematic", rounds=R)
        assert sent.bytes == [48, 40 * 16, 40 * 4 * R]
        with Sent() as sent:
            drawn = world.sample(logits, "systematic", rounds=R, temperature=0.8)
        assert sent.bytes == [48, 40 * 24, 40 * 4 * R, 4 * drawn.ids.numel()]
        with Sent() as sent:
            world.sample(logits[:20], "top_k", k=12)
        assert sent.bytes == [48, 20 * 8, 20 * 4 * 12, 20 * 4 * 12, 20 * 8]


def check_many_parts(world):
    """More positions than one part takes: parts end at the same position in processes of unequal shares."""
    logits = torch.randn(1, 12_000, generator=torch.Generator().manual_seed(3)).expand(560, -1)
    with Sent() as sent:
        shared = world.sample(logits, "systematic", rounds=R)
    assert len(sent.bytes) > 3
    same = torch.isclose(shared.densify(12_000), skd.sample(logits, "systematic", rounds=R).densify(12_000)).all(-1)
    assert same.float().mean() > 0.99
    assert world.sample(logits[:0], "systematic", rounds=R).ids.shape[0] == 0


def check_bad_logits(world):
    """NaN or inf in one process, or a row that is impossible in all: every process says so, at once."""
    last = world.place == world.size - 1
    for bad, parameters in (
        (torch.nan, {}),
        (torch.inf, {}),
        (torch.nan, {"temperature": 0.0}),
        (torch.inf, {"temperature": 0.0}),
        (torch.nan, {"temperature": 0.7}),
    ):
        logits = example()
        logits[7:9, -1] = bad if last else 0
        with pytest.raises(ModelError, match=f"NaN or inf at 2 of {N} positions"):
            world.sample(logits, "systematic", **parameters)
    logits = example()
    logits[3] = -torch.inf
    for sampler in ("random_sampling", "top_k"):
        with pytest.raises(ModelError, match=f"NaN or inf at 1 of {N} positions"):
            world.sample(logits, sampler)


def check_refusals(world):
    """What one process does otherwise is refused in all, by what it is."""
    logits, own, first = example(), world.own(), int(world.rank == 0)
    gap = world.shard(start=own.start + 1) if world.place == 1 else world.shard()
    rows = torch.zeros(N, dtype=torch.int64)
    for words, shard, given, settings in [
        (r"hold the ids .*\[1044, 2501\)|hold the ids .*\[6, 1044\)", gap, logits[:, own], {}),
        (r"vocabulary of \[2500, 2501\]", world.shard(vocab_size=V + first), logits[:, own], {}),
        ("none empty", world.shard(), logits[:, own][:, : 0 if first else None], {}),
        (r"differ in number of positions: \[(95, 96|96, 95|95, 96, 96)", world.shard(), logits[first:, own], {}),
        ("differ in sampler, parameters, seed", world.shard(), logits[:, own], {"seed": first}),
        ("differ in sampler, parameters, seed", world.shard(), logits[:, own], {"rounds": 5 + first}),
        ("differ in rows or positions", world.shard(), logits[:, own], {"rows": rows + first}),
        ("differ in rows or positions", world.shard(), logits[:, own], {"positions": torch.arange(N).roll(first)}),
    ]:
        with pytest.raises(MismatchError, match=words):
            skd.sample(given, "systematic", shard=shard, **settings)
    with pytest.raises(RecipeError, match="full keeps all V probabilities; a split head has: random_sampling"):
        world.sample(logits, "full")


def check_an_order(world):
    """`order=` is refused; a head whose rows are split in that order draws over it, and the ids are turned back."""
    logits, order = example(), torch.randperm(V, generator=torch.Generator().manual_seed(4))
    for draw in (skd.sample, sample_importance):
        with pytest.raises(RecipeError, match="split the head's rows in that order"):
            draw(logits[:, world.own()], "systematic", rounds=R, temperature=0.9, shard=world.shard(), order=order)
    shared = in_vocabulary(world.sample(logits[:, order], "systematic", rounds=R), order)
    alone = skd.sample(logits, "systematic", rounds=R, order=order)
    assert (shared.densify(V) == alone.densify(V)).all(-1).float().mean() > 0.99


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


def process(rank, folder):
    """Each check for three processes, then for two; what it found is left as a file, "" where it holds."""
    torch.set_num_threads(1)
    meet, patience = f"file://{folder}/meet", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=3, timeout=patience)
    pair = dist.new_group([0, 2], timeout=patience)
    worlds = [World(None, 3)] + ([] if rank == 1 else [World(pair, 2)])
    for name, check in CHECKS.items():
        for world in worlds:
            try:
                check(world)
                found = ""
            except (AssertionError, RuntimeError, SparseKDError, pytest.fail.Exception):
                found = traceback.format_exc()
            (Path(folder) / f"{name}-{rank}-of-{world.size}").write_text(found)
            if found:  # the others may wait for what this process no longer sends
                return
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    mp.spawn(process, args=(str(folder),), nprocs=3)
    return folder


@pytest.mark.parametrize("size", [3, 2])
@pytest.mark.parametrize("check", CHECKS)
def test_a_split_head_is_sampled_as_the_whole_one(outcomes, check, size):
    """The law in each check's docstring, in every process."""
    found = [path.read_text() for path in outcomes.glob(f"{check}-*-of-{size}")]
    assert found == [""] * size, "\n".join(found)
