"""One thread beside the teacher that codes batches and writes finished shards."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from sparsekd.cache import CacheWriter
from sparsekd.drawing import Drawn, to_records
from sparsekd.manifest import shard_name

QUEUE_BATCHES = 4


class ShardThread:
    """One thread that codes batches and writes finished shards; its failure fails the run at the next batch.

    A thread and a queue of batches, not the ring buffers of the paper's D.2: what crosses is a few dozen bytes a token,
    and the coding is numpy's, which lets the teacher's thread run.

    Attributes:
        waited: seconds that `put` has waited for this thread while the device had nothing left to do: when they grow,
            coding is slower than the teacher. (A host that runs ahead of its GPU is held up as well, and rightly.)
    """

    def __init__(self, writer: CacheWriter, estimate: float) -> None:
        self._writer, self._estimate = writer, estimate
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=QUEUE_BATCHES)
        self._failure: BaseException | None = None
        self._bytes = self._tokens = 0
        self.waited = 0.0
        self._thread = threading.Thread(target=self._run, name="sparsekd-shards", daemon=True)

    def __enter__(self) -> ShardThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._put(None if kind is None else "stop")
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def put(self, shard: int, batch: range, rows: Any, drawn: Drawn) -> None:
        """Hand over a batch; waits while QUEUE_BATCHES are pending."""
        begin, copy = time.perf_counter(), host_copy(drawn)
        self._put((shard, batch, rows, copy))
        if copy.is_there():
            self.waited += time.perf_counter() - begin

    def bytes_per_token(self) -> float:
        """Of the shards written so far, input ids and index included; the preflight's estimate before the first."""
        return self._bytes / self._tokens if self._tokens else self._estimate

    def _put(self, item: Any) -> None:
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return
        if self._failure is not None and item not in (None, "stop"):
            raise self._failure

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure = error

    def _work(self) -> None:
        spec, records = self._writer.spec, []
        while isinstance(item := self._queue.get(), tuple):
            shard, batch, rows, copy = item
            records += to_records(rows, copy.arrived(), spec.codec)
            if batch.stop == spec.shard_range(shard).stop:
                self._writer.write(shard, records)
                self._tokens += len(records) * spec.seq_len
                self._bytes += (self._writer.path / shard_name(shard)).stat().st_size
                records = []


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCopy:
    """A batch's draws on their way to the host, and the event that comes behind them (None: they were there)."""

    drawn: Drawn
    finished: Any = None

    def is_there(self) -> bool:
        """Whether nothing has to be waited for."""
        return self.finished is None or bool(self.finished.query())

    def arrived(self) -> Drawn:
        """The draws, when they are there; on whichever thread."""
        if self.finished is not None:
            self.finished.synchronize()
        return self.drawn


def host_copy(drawn: Drawn) -> HostCopy:
    """Starts the copy of a batch's draws to the host.

    On an accelerator the copies run on a stream of their own into pinned memory, behind what made the draws and beside
    the next batch; a plain `.cpu()` later would queue behind that batch. On the host nothing is copied.
    """
    devices = {each.device for each in _tensors(drawn) if each.is_cuda}
    if not devices:
        return HostCopy(drawn=drawn)
    device = devices.pop()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        copied = _mapped(drawn, _to_pinned)
    for each in _tensors(drawn):
        each.record_stream(side)  # its memory is not given away before the copy is through
    finished = side.record_event(torch.cuda.Event(blocking=True))  # else waiting for it would keep a core busy
    return HostCopy(drawn=copied, finished=finished)


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same lists and dataclasses with `function` of each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list):
        return [_mapped(each, function) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _mapped(getattr(value, each.name), function) for each in fields(value)})
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _mapped(value, note)
    return found
