"""The toys measure what they say, and a claim that does not hold is reported as such."""

from __future__ import annotations

import itertools
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sparsekd as skd
from sparsekd import laws, toy_images, toy_tasks, toys, unique_tokens
from sparsekd.errors import FormatError, SourceError
from sparsekd.reproduction import Settings
from sparsekd.targets import SparseTargets
from sparsekd.toy_tasks import CE, FULL, RS, TOPK

QUIET = Settings(seeds=2, say=lambda line: None)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# -- figure 2a


@pytest.fixture
def small(monkeypatch):
    """Figure 2a at V = 60, K = 4, 6 draws, 500 rounds."""
    for name, value in {"VOCAB": 60, "TOP_K": 4, "DRAWS": 6, "ROUNDS": 500, "SHOWN": 10}.items():
        monkeypatch.setattr(toys, name, value)
    return toys.zipf(60)


def test_zipf_halves_at_the_second_id():
    """Probabilities fall as 1/i and sum to 1."""
    t = toys.zipf(1000)
    assert float(t.sum()) == pytest.approx(1, abs=1e-12)
    assert float(t[0] / t[9]) == pytest.approx(10, abs=1e-12)


def test_the_exponent_has_the_wanted_entropy():
    """Bisection finds the Zipf law of 2 nats."""
    p = toys.zipf(5000, unique_tokens.exponent_of(2.0, 5000))
    assert float(-(p * p.log()).sum()) == pytest.approx(2.0, abs=1e-6)


def test_l1_needs_no_dense_target(small):
    """The distance from ids and weights equals the dense one, with padding and repeated ids."""
    target = SparseTargets(ids=torch.tensor([3, 0, 3, 7]), weights=torch.tensor([0.25, 0.5, 0.25, 0.0]))
    assert float(toys._l1_sparse(target, small)) == pytest.approx(
        toys._l1(target.densify(60).double(), small), abs=1e-7
    )


def test_the_biases_are_those_of_many_drawn_targets(small, monkeypatch):
    """The closed forms agree with the mean of 40,000 targets, within their noise."""
    monkeypatch.setattr(toys, "ROUNDS", 40_000)
    biases = toys._biases(small)
    for name, targets in toys._targets(small, 0).items():
        flat = torch.zeros_like(small).scatter_add_(0, targets.ids.flatten(), targets.weights.double().flatten())
        assert toys._l1(flat / len(targets), small) == pytest.approx(biases[name], abs=0.015), name


def test_fig2a_counts_unique_ids(small):
    """Top-K keeps K ids; draws keep Σ 1 - (1 - t)^n of them on average."""
    result = toys.fig2a(Path(), QUIET)
    kept = {name: cells[-1] for name, cells in result.ours.rows.items()}
    assert kept[toys._TOPK].mean == 4
    expected = float((1 - (1 - small) ** 6).sum())
    assert kept[toys._RS].mean == pytest.approx(expected, abs=0.1)


def test_fig2a_judges_each_claim(small):
    """On this smaller Zipf law all claims hold but one: 6 draws do not keep 4 unique ids."""
    found = toys.fig2a(Path(), QUIET).findings
    assert [f.holds for f in found if f.holds is not None] == [True, True, True, False, True]


# -- appendix A


def test_all_laws_hold():
    """Each law of appendix A, in float64, for another seed than the page's."""
    result = laws.laws(Path(), Settings(seeds=1))
    assert [f.text for f in result.findings if f.holds is False] == []
    assert sum(f.holds is True for f in result.findings) == len(laws.LAWS)


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ({"sparse_kl": lambda z, t, **k: 1.01 * skd.sparse_kl(z, t, **k)}, ["Eq. 4", "A.2", "A.5", "A.6, enumerated"]),
        ({"sparse_kl": lambda z, t, **k: skd.sparse_kl(z, _whole(t), **k)}, ["Eq. 4", "A.4, loss", "A.5"]),
        ({"sample": lambda z, s, *, rounds, **k: skd.sample(z, "top_k", k=rounds)}, ["A.6, sampled", "3.4, t = 0.5"]),
    ],
)
def test_a_broken_law_is_told(monkeypatch, broken, names):
    """A loss off by 1 %, targets made to sum to 1, a biased sampler: the laws they break do not hold."""
    parts = {name: getattr(skd, name) for name in ("sparse_kl", "sparse_ce", "full_kl", "sample")}
    monkeypatch.setattr(laws, "skd", SimpleNamespace(**parts | broken))
    for name in names:
        assert laws.LAWS[name].check(0)[0] > laws.LAWS[name].allowed, name


def _whole(targets):
    return SparseTargets(ids=targets.ids, weights=targets.weights / targets.mass()[:, None])


# -- figures 2b and 2c


def tiny_task(steps=3):
    size = toy_tasks.Gaussians(classes=12, dimensions=4, sigma=1.0, batch=32, steps=steps, heldout=4)
    return toy_tasks.gaussian_task(size)


def test_equal_seeds_make_equal_students():
    """Students of one seed start alike and see the same batches; another seed differs."""
    task = tiny_task()
    teacher = toy_tasks.fit_teacher(task)
    a, b, c = (toy_tasks.fit_student(task, seed, RS, teacher) for seed in (0, 0, 1))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(next(a.parameters()), next(c.parameters()))


def test_the_methods_differ_only_in_their_loss():
    """After one step from the same start the four students differ pairwise, for their targets do."""
    task = tiny_task(steps=1)
    teacher = toy_tasks.fit_teacher(task)
    weights = [next(toy_tasks.fit_student(task, 0, name, teacher).parameters()) for name in toy_tasks.METHODS]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


def test_a_perfect_classifier_is_judged_perfect():
    """Labels that the logits name with certainty: accuracy 100 %, ECE 0, loss 0, nothing beyond the top 7."""
    inputs = torch.eye(12)[torch.arange(24) % 12] * 1000
    task = toy_tasks.Task(
        classes=12,
        stream=lambda generator: iter(()),
        heldout=lambda generator: iter([(inputs, inputs.argmax(-1))]),
        network=lambda width: torch.nn.Identity(),
        teacher_width=1,
        student_width=1,
        teacher_steps=1,
        steps=1,
    )
    found = toy_tasks.judge(task, torch.nn.Identity(), torch.nn.Identity(), 0)
    assert (found["accuracy"], found["ece"], found["loss"]) == (100, 0, 0)
    assert found["beyond"] == pytest.approx(0, abs=1e-4)
    assert found["kept"] == pytest.approx(1, abs=1e-4)


def judged(ece, surplus):
    """What `judge` might say of three seeds."""
    bins = [
        {"count": 10, "confidence": 0.5, "accuracy": 0.5 - surplus / 100},
        {"count": 0, "confidence": None, "accuracy": None},
    ]
    base = {"accuracy": 60.0, "loss": 1.5, "beyond": 20.0, "kept": 9.0, "bins": bins}
    return [base | {"ece": ece + 0.1 * seed, "over": surplus + 0.1 * seed} for seed in range(3)]


def test_claims_are_judged_from_the_numbers():
    """Top-K over-confident: all four claims hold. Top-K calibrated like the others: none of its claims does."""
    calm = {name: judged(1.0, 0.1) for name in ("Teacher", CE, FULL, RS)}
    holds = [f.holds for f in toy_tasks.result_of(calm | {TOPK: judged(9.0, 8.5)}, "").findings if f.holds is not None]
    assert holds == [True, True, True, True]
    fails = [f.holds for f in toy_tasks.result_of(calm | {TOPK: judged(1.0, 0.1)}, "").findings if f.holds is not None]
    assert fails == [False, False, False, False]


def test_pooled_bins_weigh_examples_alike():
    """30 examples at accuracy 0.4 and 10 at 0.8 pool to 40 at 0.5; empty bins stay empty."""
    runs = [
        [{"count": 30, "confidence": 0.5, "accuracy": 0.4}, {"count": 0, "confidence": None, "accuracy": None}],
        [{"count": 10, "confidence": 0.5, "accuracy": 0.8}, {"count": 0, "confidence": None, "accuracy": None}],
    ]
    full, empty = toy_tasks._pool(runs)
    assert full == pytest.approx({"count": 40, "confidence": 0.5, "accuracy": 0.5})
    assert empty == {"count": 0, "confidence": None, "accuracy": None}


def test_the_whole_of_fig2b_runs_small(monkeypatch):
    """Every method has its row, with an error over the two seeds, and the plot draws."""
    size = toy_tasks.Gaussians(classes=12, dimensions=4, sigma=1.0, batch=32, steps=4, heldout=4)
    monkeypatch.setitem(toy_tasks.SIZES_2B, "quick", size)
    result = toy_tasks.fig2b(Path(), QUIET)
    assert list(result.ours.rows) == ["Teacher", CE, FULL, TOPK, RS]
    assert result.ours.rows[CE][2].standard_error > 0
    assert "12 classes in 4 dimensions" in result.scale
    assert len(toy_tasks.plot_panels(result).axes) == 5


def test_striped_images_are_drawn_from_their_key():
    """Equal generators give equal images; without noise each class has its own."""
    labels = torch.arange(toy_images.STRIPED)
    a, b = (toy_images.striped(labels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (100, 1, 16, 16)
    means = torch.stack([toy_images.striped(labels, torch.Generator().manual_seed(s)) for s in range(300)]).mean(0)
    gaps = torch.pdist(means.flatten(1))
    noise = toy_images.NOISE * math.sqrt(2 * 256 / 300)
    assert float(gaps.min()) > 1.1 * noise


# -- CIFAR-100's files


def write_pickles(folder: Path, changes: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    for split, count in (("train", 6), ("test", 4)):
        pixels = np.arange(count * 3072, dtype=np.int64).reshape(count, 3072) % 256
        content = {b"data": pixels.astype(np.uint8), b"fine_labels": [i % 3 for i in range(count)]} | (changes or {})
        (folder / split).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def test_cifars_python_files_are_read(tmp_path):
    """Pixels as [N, 3, 32, 32], fine labels, from the folder or the one that holds it."""
    write_pickles(tmp_path / "cifar-100-python")
    for folder in (tmp_path, tmp_path / "cifar-100-python"):
        images = toy_images.read_cifar(folder)
        assert images["train"].pixels.shape == (6, 3, 32, 32)
        assert images["train"].pixels[0, 1, 0, :3].tolist() == [0, 1, 2]  # 1024 % 256: green starts at 1024
        assert images["test"].labels.tolist() == [0, 1, 2, 0]


def test_folders_of_images_are_read(tmp_path):
    """train/CLASS/*.png: classes in the order of their names."""
    from PIL import Image

    for split, name, colour in [("train", "cat", 200), ("train", "ant", 20), ("test", "ant", 20), ("test", "cat", 200)]:
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (colour, 0, 0)).save(tmp_path / split / name / "1.png")
    images = toy_images.read_cifar(tmp_path)
    assert images["train"].labels.tolist() == [0, 1]
    assert images["train"].pixels[:, 0, 0, 0].tolist() == [20, 200]


def test_a_pickle_cannot_run_code(tmp_path):
    """A file that asks for a function is refused before the function is called."""
    folder = write_pickles(tmp_path / "c")
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    (folder / "test").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FormatError, match=r"test is not a file of CIFAR-100's python version: it asks for"):
        toy_images.read_cifar(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({b"fine_labels": [0, 1]}, "6 images of torch.uint8 and 2 labels"),
        ({b"fine_labels": [0, 1, 2, 3, 4, 100]}, r"6 labels \(0 to 100\)"),
        ({b"data": np.zeros((6, 3072))}, "6 images of torch.float64"),
        ({b"data": np.zeros((6, 5), dtype=np.uint8)}, "shape"),
    ],
)
def test_foreign_pickles_are_refused(tmp_path, changes, words):
    """Wrong counts, labels, types and sizes are told, not guessed."""
    with pytest.raises(FormatError, match=words):
        toy_images.read_cifar(write_pickles(tmp_path / "c", changes))


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"hello", b"\x80\x02]q\x00."])
def test_damaged_files_are_refused(tmp_path, content):
    """Empty, cut off, no pickle at all, a list."""
    folder = write_pickles(tmp_path / "c")
    (folder / "train").write_bytes(content)
    with pytest.raises(FormatError, match="train is not a file"):
        toy_images.read_cifar(folder)


def test_a_folder_without_images_says_what_it_needs(tmp_path):
    """The message names both layouts, and that images of our own need no data."""
    with pytest.raises(SourceError, match=r"files train and test, or folders.*without data="):
        toy_images.read_cifar(tmp_path)


def test_the_page_says_which_images_were_used(tmp_path, monkeypatch):
    """With data= it is the user's CIFAR-100, without it the striped shapes."""
    sizes = toy_images.Sizes(batch=8, steps=2, heldout=2, teacher_width=2, student_width=2)
    monkeypatch.setitem(toy_images.SIZES, "quick", sizes)
    own = toy_images.fig2c(Path(), QUIET)
    theirs = toy_images.fig2c(Path(), Settings(seeds=1, data=str(write_pickles(tmp_path / "c")), say=lambda line: None))
    assert "NOT CIFAR-100" in own.scale
    assert "the user's 6 training images of CIFAR-100" in theirs.scale
