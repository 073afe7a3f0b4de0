"""One thread beside the teacher that codes batches and writes finished shards."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from typing import Any

from sparsekd.cache import CacheWriter
from sparsekd.drawing import Drawn, to_records
from sparsekd.manifest import shard_name

QUEUE_BATCHES = 4


class ShardThread:
    """One thread that codes batches and writes finished shards; its failure fails the run at the next batch."""

    def __init__(self, writer: CacheWriter, estimate: float) -> None:
        self._writer, self._estimate = writer, estimate
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=QUEUE_BATCHES)
        self._failure: BaseException | None = None
        self._bytes = self._tokens = 0
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
        self._put((shard, batch, rows, drawn))

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
            shard, batch, rows, drawn = item
            records += to_records(rows, drawn, spec.codec)
            if batch.stop == spec.shard_range(shard).stop:
                self._writer.write(shard, records)
                self._tokens += len(records) * spec.seq_len
                self._bytes += (self._writer.path / shard_name(shard)).stat().st_size
                records = []
