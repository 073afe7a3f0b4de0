"""What a GPU is asked to do, on machines without one: tensors of a device "cuda" that have shapes and no values.

Under torch's FakeTensorMode an operator whose operands lie on two devices raises, and so does whatever would need a
value: `.item()`, `bool`, `nonzero`, indexing by a mask. `NothingWaits` adds copies that the host waits for. A host that
waits lets the GPU run dry: what runs once a chunk or a step must not, but where a number is wanted on the host
(`settled`, metrics). What kernels compute, in which order and how fast is not seen here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsekd as skd
from sparsekd import (
    alm,
    drawing,
    evaluate,
    fused_chunks,
    heads,
    inversion,
    losses,
    metrics,
    models,
    samplers,
    sketch,
    speculate,
    student,
    uld,
    variance,
)
from sparsekd.cache import CacheSpec
from sparsekd.codec import CODECS, codec_spec, default_codec
from sparsekd.divergences import DIVERGENCES, full_divergence, sparse_divergence
from sparsekd.generation import invert
from sparsekd.position_budget import LAWS, PositionLaw, law_settings
from sparsekd.residuals import RESIDUALS, hard_token_weights
from sparsekd.rng import Keys
from sparsekd.row_losses import HeadForm, LossOptions, prepare
from sparsekd.targets import SparseTargets
from sparsekd.vocabulary_order import _ranks

N, B, L, V, K = 6, 2, 16, 100, 5
WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class HostWaits(Exception):
    """A copy between host and device, or a mask's places, that the host waits for."""


class NothingWaits(TorchDispatchMode):
    """Raises where an operator's tensors lie on two devices, but for numbers, and for copies that nothing waits for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.name()
        out = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        copies = name in ("aten::_to_copy", "aten::copy_")
        kinds = {x.device.type for x in tensors if x.dim() or x.is_cuda or copies}
        unwaited = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        if len(kinds) > 1 and not unwaited:
            raise HostWaits(f"{name}: {[(tuple(x.shape), str(x.device)) for x in tensors]}")
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if "index_put" in name else []
        if masks and args[2].numel() != 1:
            raise HostWaits(f"{name} by a mask")
        return out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors may be made on "cuda"; kernels are not compiled, and pinned memory is any."""
    monkeypatch.setattr(inversion, "_kernel_on", lambda logits_NV: False)
    monkeypatch.setattr("sparsekd.fused_gpu.find_spec", lambda name: None)
    monkeypatch.setattr(fused_chunks, "adds_in_float32", lambda *_: False)  # torch 2.11's fake one takes no out_dtype
    monkeypatch.setattr(student, "check_rebuilt", lambda model: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    with cuda_guard(), FakeTensorMode():
        yield


@contextmanager
def cuda_guard() -> Iterator[None]:
    """Torch's builds with CUDA have a guard of current devices, which does nothing where there is no device; those
    without have none, and indexing fails: it is given the one of "meta", for as long."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        pytest.skip("this build of torch keeps its guards elsewhere")
    cuda, meta = 1, 14  # c10::DeviceType
    before = guards[cuda]
    guards[cuda] = before or guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long, device="cuda")


def targets(*shape: int) -> SparseTargets:
    return SparseTargets(ids=ids(*shape), weights=floats(*shape))


def logits(vocab: int = V) -> Tensor:
    return floats(N, vocab, dtype=torch.bfloat16)


def tiny_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    sizes = {"family": "tiny", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return models.new_student(sizes, vocab_size=V, seq_len=L)
    finally:
        torch.set_default_dtype(before)


# --- what is seen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.tensor([1, 2], device="cuda"),
        lambda x: x / torch.as_tensor(7, device=x.device),
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, x),
        lambda x: (x > 0).nonzero(),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_mixes_devices_or_waits_is_seen(gpu, wrong):
    with pytest.raises((HostWaits, RuntimeError, *WAITS)), NothingWaits():
        wrong(floats(3))


# --- drawing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [100, 1024])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_draws_wait_for_nothing_and_sample_for_them_once(gpu, name, vocab):
    """Whole blocks, and a last one that is cut off; the one wait of `sample` is `settled`'s."""
    with NothingWaits():
        drawn = samplers.draw(logits(vocab), name)
        assert drawn.ids.is_cuda
        assert drawn.weights.is_cuda
        if name in samplers.ORDERED:
            samplers.in_vocabulary(drawn, torch.arange(vocab, device="cuda"))
    with pytest.raises(WAITS) as seen:
        skd.sample(logits(vocab), name)
    assert "settled" in [entry.name for entry in seen.traceback]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", samplers.POINTS)
def test_importance_draws_wait_for_nothing(gpu, name, temperature):
    with NothingWaits():
        samplers.draw(logits(), name, temperature=temperature)
        samplers.draw_importance(logits(), name, rounds=7, temperature=temperature)


def capture_spec(name: str, law: dict[str, Any] | None = None, **parameters: Any) -> CacheSpec:
    sampler = drawing.sampler_parameters(name) | parameters | {"name": name, "seed": 0}
    if name in drawing.SKETCHES:
        codec = next(code for code, each in CODECS.items() if each.holds == "sorted curves")
        written = codec_spec(codec, rounds=None, logit_width=V, edges=sketch.curve_edges(V))
    else:
        weighing = {key: sampler[key] for key in ("temperature", "normalize") if key in sampler}
        written = default_codec(rounds=sampler.get("rounds"), logit_width=V, **weighing)
    capture = {"batch_size": B, "head_chunk": 10} | (law or {})
    described: dict[str, Any] = {"teacher": {}, "tokenizer": {}, "data": {}}
    return CacheSpec(
        rows=B, seq_len=L, shard_rows=B, logit_width=V, codec=written, sampler=sampler, capture=capture, **described
    )


LAW = law_settings(PositionLaw(by=next(iter(LAWS)), share=0.5, scale=1.0))


@pytest.mark.parametrize("law", [{}, LAW])
@pytest.mark.parametrize("name", samplers.SAMPLERS | drawing.SKETCHES)
def test_a_batch_passes_the_teacher_and_nothing_waits(gpu, name, law):
    """From the rows' arrays to draws on the device, positions by a law too: all that capture does before its queue."""
    settings = {"temperature": 0.8} if law and name in samplers.POINTS else {}
    model = tiny_model().eval()
    order = torch.arange(V, device="cuda") if name in samplers.ORDERED else None
    source = drawing.Teacher(
        model=model, head=heads.head_of(model), spec=capture_spec(name, law, **settings), order_V=order
    )
    supervised = np.ones((B, L), bool)
    supervised[0, 3:7] = False
    with NothingWaits():
        drawn = source.draw(np.zeros((B, L), np.uint32), supervised, 0)
    assert sum(len(tree_leaves(vars_of(part))[0]) for part in drawn.parts) == B * (L - 1) - 4
    assert len(drawn.levels) == (len(drawn.parts) if law else 0)


def vars_of(part: Any) -> list[Tensor]:
    return [x for name in part.__slots__ if isinstance(x := getattr(part, name), Tensor)]


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_what_a_sampler_costs_is_told_where_the_teacher_is(gpu, name):
    with NothingWaits():
        found = variance.fidelity(floats(N, V, dtype=torch.float64), name, **samplers.default_parameters(name))
        variance.head_noise(found.variance, floats(N, 32))


def test_parts_of_draws(gpu):
    with NothingWaits():
        Keys(seed=1, rows=ids(N), positions=ids(N)).coins()
        invert(logits(), floats(N, dtype=torch.float64))
        _ranks(floats(3, 64, 16))
        sketch.spread(sketch.sorted_curve(logits(1000)))


# --- losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ce_weight": 0.1, "z_loss": 1e-4}, {"ce_weight": 0.1, "temperature": 2.0}])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_sparse_losses_wait_for_nothing(gpu, residual, options):
    """Forward, and the hand-written backward, which no autograd engine runs here."""
    options = LossOptions(residual=residual, num_items_in_batch=torch.ones((), device="cuda"), **options)
    with NothingWaits():
        losses._sparse_loss(floats(B, L, V), targets(B, L, K), ids(B, L), options)
        rows = prepare(targets(N, K), ids(N), options, V, torch.float32)
        held = SimpleNamespace(saved_tensors=(floats(N, V, dtype=torch.bfloat16),), rows=rows, options=options)
        losses._SparseLoss.backward(held, floats(N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_fused_loss_and_its_gradients_wait_for_nothing(gpu, residual, dtype):
    """By torch's rows, in chunks, with every gradient; all rows, or the picked ones of more."""
    options = LossOptions(residual=residual, ce_weight=0.1, z_loss=1e-4, temperature=2.0)
    rows, wanted = (
        prepare(targets(N, K), ids(N), options, V, torch.float32),
        {"hidden": True, "head": True, "bias": True},
    )
    for picks in (None, torch.arange(N, device="cuda")):
        hidden, head, bias = floats(N if picks is None else 9, 32, dtype=dtype), floats(V, 32, dtype=dtype), floats(V)
        with NothingWaits():
            total, gradients = fused_chunks.loss_and_gradients(
                hidden,
                head,
                bias,
                rows,
                floats(N),
                picks=picks,
                form=HeadForm(softcap=30.0),
                options=options,
                wanted=fused_chunks.Wanted(**wanted),
                compute=dtype,
                chunk_rows=4,
            )
        assert total.is_cuda
        assert gradients.head is not None
        assert gradients.head.shape == head.shape


def test_other_losses_wait_for_nothing(gpu):
    labels, dense = ids(B, L), floats(B, L, V)
    with NothingWaits():
        losses.full_kl(dense, dense, labels=labels, ce_weight=0.1)
        for name in DIVERGENCES:
            full_divergence(dense, dense, name, labels=labels, num_items_in_batch=7)
        sparse_divergence(dense, targets(B, L, K), "mse", labels=labels)
        hard_token_weights(targets(B, L, K), labels, ratio=2.0)


def test_losses_across_vocabularies_wait_for_their_pairs_alone(gpu, monkeypatch):
    """What belongs together is found on the host (`Tokenized.on_host`); what follows waits for nothing."""
    pairs = uld.Pairs(rows=torch.zeros(N).long(), student=torch.zeros(N).long(), teacher=torch.zeros(N).long())
    chunks = alm.Chunks(student=torch.zeros(B, L).long(), teacher=torch.zeros(B, L + 2).long(), count=N)
    seen: list[bool] = []

    def found(answer: Any) -> Any:
        return lambda mine, other, **_: (seen.extend(x.labels.is_cuda for x in (mine, other)), answer)[1]

    monkeypatch.setitem(uld.PAIRINGS, "index", found(pairs))
    monkeypatch.setattr(alm, "shared_chunks", found(chunks))
    monkeypatch.setattr(uld.Tokenized, "on_host", lambda tokens: uld.Tokenized(labels=torch.zeros(1)))
    tokens, theirs = (uld.Tokenized(labels=ids(B, length)) for length in (L, L + 2))
    with NothingWaits():
        for teacher in (floats(B, L + 2, V + 20), sketch.sorted_curve(floats(B, L + 2, V + 20))):
            uld.uld(floats(B, L, V), teacher, tokens=tokens, teacher_tokens=theirs)
        alm.alm(floats(B, L, V), floats(B, L + 2), tokens=tokens, teacher_tokens=theirs, ce_weight=1.0)
    assert seen == [False] * 6


METHODS: list[dict[str, Any]] = [
    *({"residual": residual, "ce_weight": 0.1} for residual in RESIDUALS),
    {"hard_ratio": 2.0},
    {"divergence": "mse"},
]


@pytest.mark.parametrize("asked", METHODS, ids=str)
def test_a_student_steps_forward_and_nothing_waits(gpu, asked):
    """With a batch as the collator gives it, brought to the device; the fused loss is one operator here (above)."""
    model = skd.attach_sparse_kd(tiny_model(torch.float32), **asked).train()
    batch = {"input_ids": ids(B, L), "labels": ids(B, L), "kd_ids": ids(B, L - 1, K).int()}
    with NothingWaits():
        loss = model(**batch, kd_weights=floats(B, L - 1, K), num_items_in_batch=torch.ones((), device="cuda")).loss
    assert loss.is_cuda


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_full_distillation_waits_for_nothing(gpu, divergence):
    model = student.attach_full_kd(tiny_model(torch.float32), tiny_model(), divergence=divergence).train()
    with NothingWaits():
        model(input_ids=ids(B, L), labels=ids(B, L), num_items_in_batch=torch.ones((), device="cuda"))


# --- judging ----------------------------------------------------------------------------------------------


def test_evaluation_mixes_no_devices(gpu, monkeypatch):
    """It waits for each chunk, whose numbers are for the host, and for nothing whose size hangs on values."""
    monkeypatch.setattr(metrics, "_check_labels", lambda *_: None)
    batch = SimpleNamespace(input_ids=np.zeros((B, L), np.uint32), supervised=np.ones((B, L), bool), indices=range(B))
    model, teacher = tiny_model(), tiny_model()
    for logits_CV, teacher_CV, labels_C, rows_C in evaluate._chunks(model, teacher, batch):
        assert len(logits_CV) == len(labels_C) == len(rows_C) == B * (L - 1)
        metrics.top1(logits_CV, labels_C)
        metrics.token_losses(logits_CV, labels_C)
        evaluate._against_teacher(teacher_CV, logits_CV)
    assert speculate._acceptance(teacher, model, torch.zeros(L, dtype=torch.long))[0].device.type == "cpu"


# --- which GPU, and when ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "count", "device"), [("0", 1, "cuda:0"), ("3", 8, "cuda:3"), ("3", 1, "cuda:0")])
def test_a_process_takes_the_gpu_of_its_local_rank(monkeypatch, rank, count, device):
    """The only one, where a launcher shows each process its own alone."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert models.default_device() == device


def test_steps_are_timed_where_they_run(monkeypatch):
    """On a GPU by its own events, and none is waited for before the next step is under way."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock, control = student.pace(evaluates=False), SimpleNamespace(should_log=False, should_save=False)
    state = SimpleNamespace(global_step=1, max_steps=9)
    for kind, seconds in (("cuda", 0.25), ("cpu", 0.0)):
        clock.seconds, order[:] = [], []
        arguments = SimpleNamespace(device=torch.device(kind))
        for _ in range(2):
            clock.on_step_begin(arguments, state, control)
            clock.on_step_end(arguments, state, control)
        clock.on_train_end(arguments, state, control)
        assert clock.seconds == pytest.approx([seconds] * 2, abs=0.1)
        assert order == (["record"] * 4 + ["wait"] * 2 if kind == "cuda" else [])
