"""Reading ahead: while a step runs, one thread reads the rows that the next one will probably ask for.

A thread and not worker processes: decoding is numpy's, which lets other threads run, while rows that cross between
processes are pickled and copied, which costs more than reading them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

Read = Callable[[Sequence[int]], Sequence[Any]]
Asked = SimpleQueue[tuple[Read, Sequence[int], SimpleQueue[Any]] | None]


class ReadAhead:
    """`read(indices)`, with the batch after it read in the background.

    The guess: the next batch is as far from this one as this one was from the last, which holds for a sequential
    sampler in one process and for batches dealt to several. What a wrong guess costs is the reading of one batch; the
    rows are those of `read(indices)` always, and so are its errors.
    """

    def __init__(self) -> None:
        self._last: Sequence[int] = ()
        self._guess: tuple[Any, SimpleQueue[Any]] | None = None
        self._asked: Asked | None = None

    def __call__(self, read: Read, indices: Sequence[int], *, size: int, epoch: int) -> Sequence[Any]:
        """The rows `indices` of an order of `size` rows; an epoch's guess is never taken for another's."""
        asked, guess = (epoch, tuple(indices)), self._guess
        found = guess[1].get() if guess is not None and guess[0] == asked else None
        following = self._following(indices, size)
        self._last, self._guess = indices, None
        if following:
            # Queues, for they are C code: the locks of a thread pool's Future cost a step five times as much.
            answer: SimpleQueue[Any] = SimpleQueue()
            self._guess = ((epoch, tuple(following)), answer)
            self._thread().put((read, following, answer))
        if isinstance(found, BaseException):
            raise found
        return read(indices) if found is None else found

    def _thread(self) -> Asked:
        """What the thread waits at; it ends with this object, and before the interpreter does."""
        if self._asked is None:
            self._asked = SimpleQueue()
            thread = threading.Thread(target=_serve, args=(self._asked,), name="sparsekd-read-ahead", daemon=True)
            thread.start()
            weakref.finalize(self, _stop, self._asked, thread)
        return self._asked

    def _following(self, indices: Sequence[int], size: int) -> list[int]:
        """The next batch as far as it lies below `size`."""
        same = len(self._last) == len(indices) and len(indices) > 0
        stride = indices[0] - self._last[0] if same else len(indices)
        stride = stride if stride > 0 else len(indices)
        return [index + stride for index in indices if index + stride < size]

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def _serve(asked: Asked) -> None:
    while (job := asked.get()) is not None:
        read, indices, answer = job
        try:
            answer.put(read(indices))
        except BaseException as error:  # the batch's own, for the step that asks for it
            answer.put(error)
        del job, read, answer  # while it waits, nothing that it has read, nor the rows, stay open for it


def _stop(asked: Asked, thread: threading.Thread) -> None:
    asked.put(None)
    if thread is not threading.current_thread():
        thread.join()
