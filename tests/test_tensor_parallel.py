"""A teacher in two parts, two gloo processes: the cache is that of one process, but for what the last bits move."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SEQ_LEN, folder_bytes

import sparsekd as skd
from sparsekd import heads, tensor_parallel
from sparsekd.capture import capture
from sparsekd.errors import MismatchError, ModelError, RecipeError
from sparsekd.manifest import shard_name
from sparsekd.recompute import recompute

# cache -> which teacher, and how it is drawn from; systematic goes by the order of the head.
CASES = {
    "systematic": ("llama", {}),
    "random": ("llama", {"sampler": {"name": "random_sampling", "rounds": 20}}),
    "importance": ("llama", {"sampler": {"name": "systematic", "rounds": 20, "temperature": 0.8}, "codec": "prob40"}),
    "top_k": ("llama", {"sampler": {"name": "top_k", "k": 12}}),
    "top_p": ("llama", {"sampler": {"name": "top_p", "p": 0.9, "k": 40}}),
    "entropy": ("llama", {"positions": 0.5, "positions_by": "entropy"}),
    "certainty": ("llama", {"positions": 0.5, "positions_by": "certainty", "sampler": {"name": "top_k", "k": 12}}),
    "curve": ("llama", {"sampler": "sorted_curve"}),
    "softcap": ("gemma2", {}),
}


def dense_of(targets):
    """[P, 300], or of curves [P, C]: without targets 0."""
    return skd.SparseTargets.of(targets).densify(300) if targets.curve is None else torch.from_numpy(targets.curve)


def settings_of(case, folder, rows, teacher):
    family, settings = CASES[case]
    teachers = {"llama": teacher, "gemma2": f"{folder}/gemma2"}
    common = {"rows": rows, "shard_rows": 16, "limit_rows": 48, "device": "cpu"}
    return {**common, "teacher": teachers[family], **settings}


def save_gemma2(folder, **changes):
    """Another family: tied, a soft-cap on its logits, two attention heads and one of keys."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=300, pad_token_id=None, **sizes | heads | changes))
    with torch.no_grad():
        model.get_output_embeddings().weight *= 20
    model.save_pretrained(folder)


def process(rank, folder, rows, teacher):
    """Every case; one of them again with a shard gone; what cannot be split."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=patience)
    for case in CASES:
        settings = settings_of(case, folder, rows, teacher) | {"out": f"{folder}/two/{case}"}
        manifest = capture(**settings, tensor_parallel_size=2)
        assert manifest["spec"]["capture"]["tensor_parallel_size"] == 2
    out, made = Path(folder, "two/softcap"), folder_bytes(f"{folder}/two/softcap")
    dist.barrier()
    if rank == 0:
        (out / shard_name(1)).unlink()
    dist.barrier()
    assert capture(**settings, tensor_parallel_size=2) == manifest
    assert folder_bytes(out) == made
    for case in ("importance", "entropy", "curve"):
        with skd.CacheReader(f"{folder}/two/{case}") as reader:
            assert recompute(reader, teacher, rows=5, device="cpu")["identical"] == 5
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM has num_key_value_heads=1, no multiple of tensor_par"):
        capture(**settings | {"teacher": f"{folder}/narrow", "out": f"{folder}/no"}, tensor_parallel_size=2)
    with pytest.raises(
        ModelError, match=r"no tensor-parallel plan for GPT2LMHeadModel|GPT2LMHeadModel` has no `tp_plan`"
    ):
        capture(**settings | {"teacher": f"{folder}/gpt2", "out": f"{folder}/no"}, tensor_parallel_size=2)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("parts")
    save_gemma2(folder / "gemma2")
    save_gemma2(folder / "narrow", num_key_value_heads=1)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder / "gpt2")
    mp.spawn(process, args=(str(folder), str(world.rows), str(world.teacher)), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_cache_is_that_of_one_process(world, folder, case):
    """The same rows, positions and targets, but for one in some hundred entries; the size is all the spec adds."""
    settings = settings_of(case, folder, world.rows, world.teacher)
    capture(**settings, out=folder / "one" / case)
    one, two = skd.CacheReader(folder / "one" / case), skd.CacheReader(folder / "two" / case)
    scale = {key: two.spec.capture[key] for key in ("positions_scale",) if key in one.spec.capture}
    assert two.spec.capture == one.spec.capture | {"tensor_parallel_size": 2} | scale
    assert all(abs(value / one.spec.capture[key] - 1) < 1e-5 for key, value in scale.items())
    assert (two.spec.teacher, two.spec.sampler, two.spec.codec) == (one.spec.teacher, one.spec.sampler, one.spec.codec)
    moved, entries, unlike = 0, 0, 0
    for index in range(48):
        mine, theirs = one[index], two[index]
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        unlike += int((mine.supervised != theirs.supervised).sum())
        dense = [dense_of(row.targets) for row in (mine, theirs)]
        moved += int((~torch.isclose(*dense, rtol=2e-3, atol=1e-6)).sum())
        entries += int((dense[0] > 0).sum())
    assert entries > 48 * (SEQ_LEN - 1)
    assert moved <= 0.005 * entries
    assert unlike <= 2  # a law's coin next to the teacher's entropy
    with pytest.raises(MismatchError, match=r"tensor_parallel_size"):
        capture(**settings, out=folder / "two" / case)


def test_shares_are_the_head_in_order(monkeypatch):
    """The parts' logits side by side are the whole head's in the order of the draws, bias and soft-cap included."""
    numbers = torch.Generator().manual_seed(0)
    weight, bias, hidden = torch.randn(300, 8, generator=numbers), torch.randn(300, generator=numbers), torch.ones(2, 8)
    order = torch.randperm(300, generator=numbers)
    head = heads.Head(weight_VH=weight, bias=bias, scale=0.5, softcap=3.0)
    starts, logits = [], []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        part, shard = tensor_parallel.own_rows(head, order, 3)
        starts.append(shard.start)
        logits.append(part.logits(hidden))
    assert starts == [0, 96, 192]
    torch.testing.assert_close(torch.cat(logits, -1), head.logits(hidden)[:, order])
    with pytest.raises(ModelError, match="cannot be read, so it cannot be split"):
        tensor_parallel.own_rows(heads.Head(weight_VH=None), None, 2)


def test_what_parts_cannot_do_is_refused_before_the_teacher_is_opened(world, tmp_path, monkeypatch):
    settings = {"rows": world.rows, "teacher": "nowhere", "out": tmp_path / "c", "tensor_parallel_size": 2}
    with pytest.raises(RecipeError, match="takes 2 processes, here are 1; start them with torchrun --nproc_per_node 2"):
        capture(**settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="full keeps all V probabilities; a split head has: random_sampling"):
        capture(**settings, sampler="full")
    with pytest.raises(RecipeError, match="tensor_parallel_size=0 is too small"):
        capture(**settings | {"tensor_parallel_size": 0})
