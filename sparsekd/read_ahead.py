"""Reading ahead: while a step runs, one thread reads the rows that the next one will probably ask for.

A thread and not worker processes: decoding is numpy's, which lets other threads run, while rows that cross between
processes are pickled and copied, which costs more than reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Read = Callable[[Sequence[int]], Sequence[Any]]


class ReadAhead:
    """`read(indices)`, with the batch after it read in the background.

    The guess: the next batch is as far from this one as this one was from the last, which holds for a sequential
    sampler in one process and for batches dealt to several. What a wrong guess costs is the reading of one batch; the
    rows are those of `read(indices)` always, and so are its errors.
    """

    def __init__(self) -> None:
        self._last: Sequence[int] = ()
        self._guess: tuple[Any, Future[Sequence[Any]]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, read: Read, indices: Sequence[int], *, size: int, epoch: int) -> Sequence[Any]:
        """The rows `indices` of an order of `size` rows; an epoch's guess is never taken for another's."""
        asked, guess = (epoch, tuple(indices)), self._guess
        rows = guess[1].result() if guess is not None and guess[0] == asked else None
        following = self._following(indices, size)
        self._last, self._guess = indices, None
        if following:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="sparsekd-read-ahead")
            self._guess = ((epoch, tuple(following)), self._thread.submit(read, following))
        return read(indices) if rows is None else rows

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
