"""Capture: what a cache holds, its refusals, and that no interruption or number of workers changes a byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SEQ_LEN, folder_bytes, write_corpus

import sparsekd as skd
from sparsekd import capture as capture_module
from sparsekd import drawing, heads, models
from sparsekd.capture import capture
from sparsekd.errors import MismatchError, ModelError, RecipeError, StorageError
from sparsekd.packed import RowsReader
from sparsekd.recompute import recompute
from sparsekd.vocabulary_order import vocabulary_order

SAMPLER = {"name": "random_sampling", "rounds": 20}


def run(world, out, **settings):
    defaults = {"rows": world.rows, "teacher": world.teacher, "out": out, "shard_rows": 40, "device": "cpu"}
    return capture(**{**defaults, "sampler": SAMPLER, **settings})


def teacher_logits(world, row):
    model = models.open_model(world.teacher, device="cpu")
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]


def test_a_cache_holds_the_rows_and_what_the_sampler_draws(world):
    """Row by row: ids are the packed rows', targets are `sample` of the teacher's logits at (seed, row, position)."""
    reader, rows = skd.CacheReader(world.cache), RowsReader(world.rows)
    assert len(reader) == len(rows)
    for index in (0, 1, len(rows) - 1):
        row = reader[index]
        assert np.array_equal(row.input_ids, rows[index].input_ids)
        keys = {"rows": torch.full((SEQ_LEN - 1,), index), "positions": torch.arange(SEQ_LEN - 1)}
        drawn = skd.sample(teacher_logits(world, row)[:-1], "random_sampling", rounds=20, **keys)
        supervised = torch.from_numpy(row.supervised[1:].astype(np.float32))[:, None]
        stored = skd.SparseTargets.of(row.targets).densify(300)
        # The same logits from a batch of another shape differ in their last bits: at most a draw may move.
        assert (stored - drawn.densify(300) * supervised).abs().sum() <= 0.2
        assert torch.equal(stored.sum(-1, keepdim=True).round(decimals=5), supervised)


def test_targets_are_aligned_with_the_next_token(world):
    """Position p holds the distribution of token p + 1: the stored weight follows the teacher's probability of it."""
    reader = skd.CacheReader(world.cache)
    stored, expected = [], []
    for index in range(20):
        row = reader[index]
        keep = row.supervised[1:]
        dense = skd.SparseTargets.of(row.targets).densify(300).numpy()[keep]
        nexts = row.input_ids[1:][keep].astype(np.int64)
        stored.append(dense[np.arange(len(nexts)), nexts])
        expected.append(teacher_logits(world, row).softmax(-1).numpy()[:-1][keep][np.arange(len(nexts)), nexts])
    stored, expected = np.concatenate(stored), np.concatenate(expected)
    error = np.sqrt((expected * (1 - expected) / 20).sum()) / len(expected)
    assert abs(stored.mean() - expected.mean()) < 5 * error
    assert np.corrcoef(stored, expected)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("sampler", "codec"),
    [
        ({"name": "top_k", "k": 12}, None),
        ({"name": "top_k", "k": 12}, "prob24"),
        ({"name": "top_p", "p": 0.9, "k": 20}, None),
        ({"name": "random_sampling", "rounds": 20}, "paper24"),
        ({"name": "random_sampling", "rounds": 500}, None),
        ({"name": "random_sampling", "rounds": 200}, None),
        ({"name": "random_sampling", "rounds": 1000}, None),
        ({"name": "random_sampling", "rounds": 30, "temperature": 0.8}, None),
        ({"name": "random_sampling", "rounds": 30, "temperature": 0.8}, "prob40"),
        ({"name": "random_sampling", "rounds": 30, "temperature": 2, "normalize": False}, "ratio48"),
        ({"name": "random_sampling", "rounds": 100, "temperature": 0.0, "normalize": False}, None),
        ("random_sampling", None),
        ("systematic", None),
        ({"name": "systematic", "rounds": 100}, "raw40"),
        ({"name": "systematic", "rounds": 30, "temperature": 0.8}, None),
        ({"name": "systematic", "rounds": 30, "order": "ids"}, None),
    ],
)
def test_every_sampler_can_be_cached(world, tmp_path, sampler, codec):
    """What comes back is what was drawn, to the codec's stated precision; unsupervised positions hold nothing."""
    run(world, tmp_path / "c", sampler=sampler, codec=codec, limit_rows=16)
    reader = skd.CacheReader(tmp_path / "c")
    row = reader[3]
    settings = {"name": sampler} if isinstance(sampler, str) else dict(sampler)
    if settings["name"] == "systematic" and settings.pop("order", "head") == "head":
        settings["order"] = vocabulary_order(models.open_model(world.teacher, device="cpu").lm_head.weight)
    keys = {"rows": torch.full((SEQ_LEN - 1,), 3), "positions": torch.arange(SEQ_LEN - 1)}
    drawn = skd.sample(teacher_logits(world, row)[:-1], settings.pop("name"), **keys, **settings).densify(300)
    stored = skd.SparseTargets.of(row.targets).densify(300)
    ratio = "temperature" in settings and codec != "prob40"
    tolerance = 0.1 if ratio else {None: 1e-3, "prob24": 0.08, "prob40": 1e-3, "paper24": 1e-6, "raw40": 1e-6}[codec]
    difference = (stored - drawn)[torch.from_numpy(row.supervised[1:])].abs()
    assert (difference <= tolerance * drawn[torch.from_numpy(row.supervised[1:])] + 1e-5).float().mean() > 0.995
    unbiased = "rounds" in settings or isinstance(sampler, str)
    unbiased &= "temperature" not in settings or not reader.spec.sampler["normalize"]
    assert reader.spec.sampler["unbiased"] is unbiased


def test_prompts_cost_nothing(world, tmp_path):
    """Only supervised positions are sampled and stored: prompt tokens leave no pairs."""
    from sparsekd.rows import pack

    with (tmp_path / "sft.jsonl").open("w") as file:
        for index in range(40):
            file.write(json.dumps({"prompt": f"The cat sees the dog {index}", "response": " and counts 1 2 3."}) + "\n")
    pack(
        source=str(tmp_path / "sft.jsonl"),
        tokenizer=world.rows + "/tokenizer",
        seq_len=SEQ_LEN,
        heldout=0.1,
        out=tmp_path / "rows",
        progress=False,
    )
    run(world, tmp_path / "c", rows=tmp_path / "rows")
    with skd.CacheReader(tmp_path / "c") as reader:
        supervised = sum(int(reader[i].supervised[1:].sum()) for i in range(len(reader)))
        assert reader.stats["positions"] == supervised < 0.7 * reader.stats["tokens"]
        for i in range(len(reader)):
            row = reader[i]
            assert (row.targets.weights[~row.supervised[1:]] == 0).all()


def test_a_share_of_the_positions_is_kept_at_random(world, tmp_path):
    """About 40 % of the supervised positions, the same for any batches, each with the targets it has in a whole cache;
    on average over seeds the kept ones are spread evenly."""
    run(world, tmp_path / "all", limit_rows=48)
    run(world, tmp_path / "some", limit_rows=48, positions=0.4)
    run(world, tmp_path / "again", limit_rows=48, positions=0.4, batch_size=4)
    whole, some, again = (skd.CacheReader(tmp_path / name) for name in ("all", "some", "again"))
    kept = np.stack([some[i].supervised for i in range(48)])
    supervised = np.stack([whole[i].supervised for i in range(48)])
    assert (kept <= supervised).all()
    assert (kept == np.stack([again[i].supervised for i in range(48)])).all()
    total = supervised[:, 1:].sum()
    assert abs(kept[:, 1:].sum() / total - 0.4) < 5 * np.sqrt(0.24 / total)
    for index in (0, 17, 47):
        row, full = some[index], whole[index]
        chosen = row.supervised[1:]
        assert 0 < chosen.sum() < SEQ_LEN - 1
        assert (dense_of(row.targets)[chosen] == dense_of(full.targets)[chosen]).all()
        assert (row.targets.weights[~chosen] == 0).all()
    assert recompute(some, world.teacher, rows=4, device="cpu")["differing"] == 0
    other = run(world, tmp_path / "other", limit_rows=48, positions=0.4, seed=3) and skd.CacheReader(tmp_path / "other")
    overlap = (np.stack([other[i].supervised for i in range(48)]) & kept)[:, 1:].sum() / total
    assert abs(overlap - 0.16) < 5 * np.sqrt(0.16 * 0.84 / total)
    with pytest.raises(RecipeError, match="positions=0 is a share"):
        run(world, tmp_path / "none", positions=0)


def dense_of(targets):
    return skd.SparseTargets.of(targets).densify(300).numpy()


def test_recompute_is_bit_identical_and_refuses_another_teacher(world, tmp_path):
    """Random rows drawn again from the teacher equal the cache bit for bit; other weights are refused by hash."""
    with skd.CacheReader(world.cache) as reader:
        found = recompute(reader, world.teacher, rows=7, device="cpu")
        assert found["identical"] == found["rows"] == 7
        assert found["differing"] == 0
        model = models.open_model(world.teacher, device="cpu")
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-3
        model.save_pretrained(tmp_path / "other")
        with pytest.raises(MismatchError, match="teacher differs: the cache was captured from"):
            recompute(reader, str(tmp_path / "other"), rows=1, device="cpu")


def test_changing_a_drawn_target_shows_as_drift(world, monkeypatch):
    """recompute can fail: with another seed of the draws nearly all positions differ."""
    real = drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda *a, **settings: real(*a, **settings | {"seed": 1}))
    with skd.CacheReader(world.cache) as reader:
        found = recompute(reader, world.teacher, rows=3, device="cpu")
    assert found["identical"] == 0
    assert found["drift"] > 0.05


def test_batches_never_materialise_all_logits(world, monkeypatch):
    """The head is applied to `head_chunk` positions at a time, whatever the batch, in the same memory."""
    assert drawing.head_chunk(128_256, "cpu") == 512
    monkeypatch.setitem(drawing.HEAD_BYTES, "cpu", 4 * 300 * 5)
    monkeypatch.setitem(drawing.HEAD_ROWS, "cpu", 1)
    seen, places = [], set()
    original = heads.Head.write_logits

    def write_logits(self, hidden, out):
        seen.append(len(hidden))
        places.add(out.data_ptr())
        return original(self, hidden, out)

    monkeypatch.setattr(heads.Head, "write_logits", write_logits)
    reader = RowsReader(world.rows)
    model = models.open_model(world.teacher, device="cpu")
    draws = {**SAMPLER, "temperature": 1.0, "normalize": True, "seed": 0}
    spec = capture_module._make_spec(reader, model, world.teacher, draws, None, 8, 40, 8)
    source = drawing.Teacher(model=model, head=heads.head_of(model), spec=spec)
    batch = reader.batch(range(8))
    seen.clear()
    source.draw(batch.input_ids, batch.supervised, 0)
    assert len(places) == 1
    assert max(seen) == 5
    assert sum(seen) == batch.supervised[:, 1:].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [{}, {"bias": True}, {"scale": 0.3}, {"bias": True, "scale": 0.3, "softcap": 4.0}])
def test_logits_written_into_memory_are_the_same_to_the_bit(form, dtype):
    """`write_logits` is `logits`, of whole chunks and of a last small one; caches begun before it go on unchanged."""
    numbers = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(size, 48, generator=numbers).to(dtype) for size in (1000, 64))
    bias = {"bias": torch.randn(1000, generator=numbers).to(dtype)} if "bias" in form else {}
    head, out = heads.Head(weight_VH=weight, **form | bias), torch.full((64, 1000), torch.nan, dtype=dtype)
    for count in (64, 63, 7, 1):
        found = head.write_logits(hidden[:count], out[:count])
        assert found.data_ptr() == out.data_ptr()
        assert torch.equal(found, head.logits(hidden[:count]))


def test_shard_ranges_and_ranks_share_the_work(world, tmp_path, monkeypatch):
    """Independent --shard-range jobs and ranks of a torchrun each make their part; together, the same bytes."""
    want = folder_bytes(world.cache)
    assert run(world, tmp_path / "ranges", shard_range="0:2") is None
    assert len(list((tmp_path / "ranges").glob("shard-*"))) == 2
    assert run(world, tmp_path / "ranges", shard_range="2:") is not None
    assert folder_bytes(tmp_path / "ranges") == want
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        manifest = run(world, tmp_path / "ranks")
    assert manifest is not None
    assert folder_bytes(tmp_path / "ranks") == want


_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_a_whole_number_is_the_float_it_stands_for(world, tmp_path):
    """temperature=1 on one worker and 1.0, the default, on another: one cache, byte for byte."""
    for name, given in (("one", {"temperature": 1}), ("other", {})):
        run(world, tmp_path / name, sampler=SAMPLER | given, limit_rows=8)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "other")


def test_torchrun_makes_the_same_bytes(world, tmp_path):
    """Two real processes under torchrun write the cache that one process writes."""
    words = ["capture", f"rows={world.rows}", f"teacher={world.teacher}", f"out={tmp_path / 'c'}", "shard_rows=40"]
    words += ["sampler=random_sampling", "sampler.rounds=20", "device=cpu"]
    subprocess.run([*_TORCHRUN, "-m", "sparsekd", *words], check=True, capture_output=True, timeout=300)
    assert folder_bytes(tmp_path / "c") == folder_bytes(world.cache)


def test_killed_at_random_moments_and_resumed_byte_identical(world, tmp_path):
    """20 captures, of 1, 2 and 3 workers, killed with SIGKILL at random moments, resume to the same bytes."""
    harness = Path(__file__).parent / "kill_harness.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(harness), world.rows, world.teacher, str(tmp_path), "20"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["identical"] == 20
    assert report["killed_midway"] >= 5  # else the moments were badly chosen and nothing was shown


def test_resuming_with_other_settings_names_both_values(world, tmp_path):
    """A folder with shards of one spec refuses a capture of another."""
    shutil.copytree(world.cache, tmp_path / "c")
    with pytest.raises(MismatchError, match=r"sampler\.seed.*\b0\b.*\b1\b"):
        run(world, tmp_path / "c", seed=1)
    with pytest.raises(MismatchError, match=r"sampler\.rounds=20, this capture has sampler\.rounds=10"):
        run(world, tmp_path / "c", sampler={"name": "random_sampling", "rounds": 10})
    with pytest.raises(MismatchError, match=r"capture\.threads.*\b1\b.*\b2\b"):
        run(world, tmp_path / "c", threads=2)


def test_a_teacher_that_has_moved_is_the_same_teacher(world, tmp_path):
    """The same weights under another path go on with a cache to the same bytes; other weights are refused."""
    shutil.copytree(world.cache, tmp_path / "c")
    (tmp_path / "c" / "shard-00001.safetensors").unlink()
    moved = shutil.copytree(world.teacher, tmp_path / "moved")
    run(world, tmp_path / "c", teacher=str(moved))
    assert folder_bytes(tmp_path / "c") == folder_bytes(world.cache)
    other = models.open_model(str(moved))
    other.get_input_embeddings().weight.data[0] += 1
    other.save_pretrained(moved)
    with pytest.raises(MismatchError, match=r"teacher\.id|teacher\.weights"):
        run(world, tmp_path / "c", teacher=str(moved))


def test_repacked_rows_are_refused(world, tmp_path):
    """Rows packed otherwise do not go into an existing cache: both seq_len are named."""
    from sparsekd.rows import pack

    pack(
        source=world.corpus,
        tokenizer=world.rows + "/tokenizer",
        seq_len=2 * SEQ_LEN,
        heldout=0.1,
        out=tmp_path / "rows",
        progress=False,
    )
    shutil.copytree(world.cache, tmp_path / "c")
    with pytest.raises(MismatchError, match=r"was captured with seq_len=32, this capture has seq_len=64"):
        run(world, tmp_path / "c", rows=tmp_path / "rows")


def test_a_teacher_that_does_not_fit_is_refused(world, tmp_path):
    """Too few logits, another tokenizer (an adapter's base's too), a short context, no model: named, before any row."""
    torch.manual_seed(0)
    models.new_student("tiny", vocab_size=200, seq_len=SEQ_LEN).save_pretrained(tmp_path / "narrow")
    with pytest.raises(MismatchError, match=r"tokenizer has 300 tokens, teacher .* makes 200 logits"):
        run(world, tmp_path / "c", teacher=str(tmp_path / "narrow"))
    short = models.new_student({"family": "tiny", "max_position_embeddings": 16}, vocab_size=300, seq_len=16)
    short.save_pretrained(tmp_path / "short")
    with pytest.raises(MismatchError, match="seq_len=32 is beyond the teacher's context of 16"):
        run(world, tmp_path / "c", teacher=str(tmp_path / "short"))
    from sparsekd.vocab import train_tokenizer

    shutil.copytree(world.teacher, tmp_path / "foreign")
    train_tokenizer(["Quick zebras jump over vexing walls. " * 50], 300).save_pretrained(tmp_path / "foreign")
    with pytest.raises(MismatchError, match=r"tokenizer differs: the rows were made with .* comes with"):
        run(world, tmp_path / "c", teacher=str(tmp_path / "foreign"))
    import peft

    base = models.open_model(str(tmp_path / "foreign"))
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MismatchError, match=r"tokenizer differs: .* teacher .*adapter over .*foreign comes with"):
        run(world, tmp_path / "c", teacher=str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="the folder does not exist"):
        run(world, tmp_path / "c", teacher=str(tmp_path / "nowhere"))


def test_a_disk_too_small_is_refused_before_the_work(world, tmp_path, monkeypatch):
    """The preflight multiplies measured bytes by what is to come; force goes on."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"need about .* GB .* 0\.00 GB free; .*--force"):
        run(world, tmp_path / "c")
    assert not list((tmp_path / "c").glob("shard-*"))
    assert run(world, tmp_path / "c", force=True) is not None


def test_a_disk_that_fills_up_keeps_what_is_written(world, tmp_path, monkeypatch):
    """ENOSPC in the writer thread fails the run by name; finished shards stay, and the capture resumes."""
    from sparsekd import cache as cache_module

    real, calls = cache_module.write_shard, []

    def failing(path, *rest):
        calls.append(path)
        if len(calls) == 3:
            raise StorageError(f"{path}: the disk is full")
        return real(path, *rest)

    monkeypatch.setattr(cache_module, "write_shard", failing)
    with pytest.raises(StorageError, match="the disk is full"):
        run(world, tmp_path / "c")
    assert len(list((tmp_path / "c").glob("shard-*"))) == 2
    monkeypatch.setattr(cache_module, "write_shard", real)
    assert run(world, tmp_path / "c") is not None
    assert folder_bytes(tmp_path / "c") == folder_bytes(world.cache)


@pytest.mark.parametrize("text", ["3:1", "x:y", "5", "0:99", "-1:2"])
def test_a_bad_shard_range_says_how_many_there_are(world, tmp_path, text):
    with pytest.raises(RecipeError, match=r"is not a:b with 0 <= a < b <= \d+ \(the cache has"):
        run(world, tmp_path / "c", shard_range=text)


def test_a_corpus_growing_changes_the_fingerprint(world, tmp_path):
    """The manifest's data fingerprint is the rows': another corpus gives another one."""
    from sparsekd.rows import pack

    corpus = write_corpus(tmp_path / "other.jsonl", seed=1)
    manifest = pack(
        source=corpus,
        tokenizer=world.rows + "/tokenizer",
        seq_len=SEQ_LEN,
        heldout=0.1,
        out=tmp_path / "rows",
        progress=False,
    )
    with skd.CacheReader(world.cache) as reader:
        assert reader.spec.data["fingerprint"] == RowsReader(world.rows).fingerprint
        assert reader.spec.data["fingerprint"] != manifest["splits"]["train"]["fingerprint"]


def test_draws_of_many_rounds_wait_without_their_padding(world):
    """1,000 rounds of 300 ids: what is kept of a batch is as wide as its draws, not as its rounds."""
    with skd.CacheReader(world.cache) as reader:
        source = drawing.open_teacher(models.open_model(world.teacher, device="cpu"), reader.spec)
        source = replace(source, spec=replace(reader.spec, sampler=reader.spec.sampler | {"rounds": 1000}))
        row = reader[0]
    (part,) = source.draw(row.input_ids[None], row.supervised[None], 0).parts
    assert part.ids.shape[1] <= 300
    assert part.weights.untyped_storage().nbytes() == part.weights.nbytes


def test_a_gpu_that_gives_other_bits_a_second_time_is_told_of(world):
    """Hidden states are compared, where a last bit shows; a CPU is not asked."""
    model = models.open_model(world.teacher, device="cpu")
    with skd.CacheReader(world.cache) as reader:
        source, row = drawing.open_teacher(model, reader.spec), reader[0]
    batch = row.input_ids[None], row.supervised[None]
    assert source.repeats(*batch)
    body, factors = heads.body_of(model), iter([1.0, 1.0 + 1e-6])
    body.register_forward_hook(
        lambda part, given, out: out.__setattr__("last_hidden_state", out.last_hidden_state * next(factors))
    )
    assert not source.repeats(*batch)
    asked = SimpleNamespace(input_ids=batch[0], supervised=batch[1])
    capture_module._check_repeats(source, asked)
    unsteady = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda")), repeats=lambda *_: False)
    with pytest.warns(UserWarning, match="other bits for the same rows a second time"):
        capture_module._check_repeats(unsteady, asked)
