"""What crosses from the teacher's thread to the writer's."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sparsekd as skd
from sparsekd import drawing, samplers, shard_thread
from sparsekd.cache import CacheReader, CacheSpec, CacheWriter
from sparsekd.codec import codec_spec
from sparsekd.drawing import Drawn
from sparsekd.errors import MismatchError, ModelError
from sparsekd.shard_thread import QUEUE_BATCHES, HostCopy, ShardThread, host_copy
from sparsekd.sketch import teacher_sketch

L, V, ROUNDS = 9, 40, 5


def spec(batches: int) -> CacheSpec:
    codec = codec_spec("raw24", logit_width=V, rounds=ROUNDS)
    described = {"sampler": {}, "teacher": {}, "tokenizer": {}, "data": {}}
    return CacheSpec(rows=2 * batches, seq_len=L, shard_rows=2 * batches, logit_width=V, codec=codec, **described)


def batch(rounds: int = ROUNDS) -> tuple[SimpleNamespace, Drawn]:
    ones = np.ones((2, L), bool)
    targets = skd.sample(torch.randn(2 * (L - 1), V), "random_sampling", rounds=rounds)
    return SimpleNamespace(input_ids=np.ones((2, L), np.uint32), supervised=ones, starts=~ones), Drawn(parts=[targets])


def test_nothing_is_copied_on_the_host():
    """Draws that are on the CPU already are handed over as they are."""
    drawn = batch()[1]
    assert host_copy(drawn).arrived() is drawn
    assert host_copy(drawn).is_there()


def test_waiting_for_the_device_is_not_waiting_for_the_writer(tmp_path, monkeypatch):
    """A host that runs ahead of its GPU is held up by the queue: the event behind the newest batch says for whom."""
    for there, least, most in ((False, 0.0, 0.0), (True, 0.02, 5.0)):
        event = SimpleNamespace(query=lambda there=there: there, synchronize=lambda: time.sleep(0.02))
        monkeypatch.setattr(shard_thread, "host_copy", lambda drawn, event=event: HostCopy(drawn=drawn, finished=event))
        count = QUEUE_BATCHES + 4
        with ShardThread(CacheWriter(tmp_path / str(there), spec(count)), 0.0) as background:
            for index in range(count):
                background.put(0, range(2 * index, 2 * index + 2), *batch())
            assert least <= background.waited <= most


def test_every_tensor_of_every_kind_of_draws_is_copied():
    """What goes to pinned memory on an accelerator: all tensors, whatever the dataclass, and nothing else changes."""
    logits = torch.randn(6, V)
    for part in (skd.sample(logits, "top_k", k=3), samplers.sample_importance(logits, rounds=4, temperature=0.8)):
        drawn = Drawn(parts=[part, part])
        copied = shard_thread._mapped(drawn, torch.clone)
        assert type(copied.parts[1]) is type(part)
        before, after = shard_thread._tensors(drawn), shard_thread._tensors(copied)
        assert len(before) == 2 * sum(isinstance(getattr(part, name), torch.Tensor) for name in part.__slots__)
        assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(before, after, strict=True))
    assert copied.parts[0].temperature == 0.8


def test_a_teacher_that_is_faster_waits_and_says_so(tmp_path, monkeypatch):
    """With a slow writer, `waited` is the time beyond the queue's depth; with a quick one, next to nothing."""
    real, batches = shard_thread.to_records, QUEUE_BATCHES + 4
    for pause, least, most in ((0.05, 0.1, 5.0), (0.0, 0.0, 0.2)):
        monkeypatch.setattr(shard_thread, "to_records", lambda *args, p=pause: (time.sleep(p), real(*args))[1])
        with ShardThread(CacheWriter(tmp_path / str(pause), spec(batches)), 0.0) as background:
            for index in range(batches):
                background.put(0, range(2 * index, 2 * index + 2), *batch())
            assert least <= background.waited < most
        assert len(CacheReader(tmp_path / str(pause))) == 2 * batches


def test_a_failure_of_the_writer_stops_the_run(tmp_path):
    """Targets that the codec does not hold fail the run at a later batch or at the end, never silently."""
    writer = CacheWriter(tmp_path, spec(50))

    def run() -> None:
        with ShardThread(writer, 0.0) as background:
            for index in range(50):
                rounds = ROUNDS + 1 if index == 3 else ROUNDS
                background.put(0, range(2 * index, 2 * index + 2), *batch(rounds))

    with pytest.raises(MismatchError, match="sum to"):
        run()
    assert writer.missing() == [0]


def test_logits_that_are_not_finite_fail_the_run(tmp_path):
    """Nobody looked at them while they were drawn; the thread that reads them does, and nothing is stored."""
    rows, drawn = batch()
    drawn.parts[0].weights[3] = torch.nan
    with (
        pytest.raises(ModelError, match="NaN or inf at 1 of 16"),
        ShardThread(CacheWriter(tmp_path, spec(1)), 0.0) as run,
    ):
        run.put(0, range(2), rows, drawn)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_sketch_of_logits_that_are_not_finite_is_refused():
    logits = torch.zeros(4, V)
    logits[1, 2] = torch.nan
    with pytest.raises(ModelError, match="NaN or inf at 1 of 4"):
        drawing._flat(teacher_sketch(logits, torch.zeros(4, dtype=torch.long)), {})
