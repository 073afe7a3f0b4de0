"""A cache as batches for a stock training loop: rows in a shuffled order that is computed, and their tensors.

    data = CacheDataset("cache/", seed=0)
    Trainer(model, args, train_dataset=data, data_collator=SparseKDCollator())     # of an `attach_sparse_kd` model

Shapes: B rows, L tokens, K kept ids.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekd.cache import CacheReader
from sparsekd.errors import MismatchError
from sparsekd.files import is_url
from sparsekd.order import permute, permute_near
from sparsekd.padded import pad_rows
from sparsekd.read_ahead import ReadAhead

# `benchmarks/reading.py CACHE`: 16 rows of 128 tokens take 0.8 to 1.2 ms of CPU without worker processes; with two 1.3
# to 1.6 ms in the one that trains, and 3.7 ms in them.
_WORKERS = (
    "a cache on a local disk is read by worker processes: it costs several times as much to bring a batch from one "
    "process to another as to read it; with num_workers=0 (Trainer: dataloader_num_workers=0) a thread reads ahead"
)


class CacheDataset(torch.utils.data.Dataset):
    """A cache (or rows) as a map-style dataset in a stateless shuffled order.

    Item i of an epoch is row `permute(i, len, seed, epoch)`: the order hangs on (seed, epoch) alone, so the state of a
    run is one integer. Use it with a sequential sampler; `set_epoch` is called by Trainer and accelerate, in a loop of
    your own by you (worker processes that stay hear of it too). Item i of another epoch is another row: to split a
    cache (`random_split`, `Subset`) give `shuffle=False`, and let the data loader shuffle.

    `rows` may be a cache's path. `limit` keeps the first rows only. `multiple_of` (the rows of one optimizer step) ends
    each epoch with a whole step: the rows left over are others in every epoch, and an epoch has as many steps for any
    split of a step into batches and processes.

    A data loader without worker processes finds the next batch read already (`read_ahead`): give it none (a local cache
    warns of them; for a remote one, whose reading is waiting, and for rows that take work they are right). Once a
    SparseKDCollator has asked for a batch, the next ones are made for it there, codec `split`'s rows decoded together.
    """

    def __init__(
        self,
        rows: CacheReader | Any | str | Path,
        *,
        seed: int = 0,
        shuffle: bool = True,
        limit: int | None = None,
        multiple_of: int = 1,
    ) -> None:
        self.rows = CacheReader(rows) if isinstance(rows, str | Path) else rows
        self.seed = seed
        self.shuffle = shuffle
        self.size = len(self.rows) if limit is None else min(limit, len(self.rows))
        self.multiple_of = multiple_of
        # Shared memory: else persistent workers would read the first epoch's order for ever.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.collator: SparseKDCollator | None = None  # that asked for a batch, last
        self._read_ahead = ReadAhead()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __repr__(self) -> str:
        order = f"seed={self.seed}, epoch={self.epoch}" if self.shuffle else "in order"
        return f"CacheDataset({len(self):,} rows, {order}, of {self.rows!r})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def __len__(self) -> int:
        return self.size - self.size % self.multiple_of

    def row_number(self, index: int) -> int:
        """Which row of the cache item `index` of this epoch is."""
        return int(permute(index, self.size, self.seed, self.epoch)) if self.shuffle else index

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.row_number(index)]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]:
        """The items of a batch, as torch's data loader asks for them."""
        if (worker := torch.utils.data.get_worker_info()) is not None:
            if worker.id == 0 and isinstance(self.rows, CacheReader) and not is_url(self.rows.path):
                warnings.warn(_WORKERS, stacklevel=2)
            return self._items(self.epoch, indices)
        return self._read_ahead(partial(self._items, self.epoch), indices, size=len(self), epoch=self.epoch)

    def _items(self, epoch: int, indices: Sequence[int]) -> RowBatch:
        numbers = permute_near(indices, self.size, self.seed, epoch) if self.shuffle else list(indices)
        return RowBatch(self, numbers)


class RowBatch(Sequence[Any]):
    """The rows of a batch: read, or already the tensors that the dataset's collator will ask for; a row that is looked
    at beside those is read again. Pickled, it is the list of its rows."""

    def __init__(self, dataset: CacheDataset, numbers: Sequence[int]) -> None:
        self.dataset, self.numbers, self.collator = dataset, numbers, dataset.collator
        self._rows: list[Any] | None = None
        if isinstance(dataset.rows, CacheReader):
            dataset.rows.fetch(numbers)
        if self.collator is None:
            self._rows = [dataset.rows[number] for number in numbers]
        else:
            self._made = self.collator.of_numbers(dataset.rows, numbers)

    def collated(self, collator: SparseKDCollator) -> dict[str, Tensor]:
        """`collator(list(self))`; the dataset's next batches are made for this collator."""
        self.dataset.collator = collator
        alike = type(collator) is SparseKDCollator and collator == self.collator  # a subclass may have more to it
        return self._made if alike or collator is self.collator else collator.of_rows(list(self))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[each] for each in range(len(self))[at]]
        return self.dataset.rows[self.numbers[at]] if self._rows is None else self._rows[at]

    def __reduce__(self) -> Any:
        return list, (list(self),)


# The share of a batch's weight that may be drawn for ids that are no tokens: a teacher hardly believes in its padding.
_MOST_PADDING = 0.01


@dataclass(frozen=True, kw_only=True)
class SparseKDCollator:
    """Rows -> a batch of `input_ids`, `labels` (-100 where unsupervised), and for cached rows `kd_ids`, `kd_weights`.

    The first token of a row follows nothing, so it is never a label: `num_items_in_batch` is then the same whether
    Trainer knows that the model shifts labels or not.

    `with_targets=False` leaves the targets out (plain training on a cache's rows). `vocab_size`, the student's number
    of logits, leaves out the draws of ids from it on, which the padding of a wider teacher's head had.
    """

    with_targets: bool = True
    vocab_size: int | None = None

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Tensors [B, L], [B, L] and twice [B, L-1, K]; targets are padded with weight 0 to the batch's largest K."""
        return rows.collated(self) if isinstance(rows, RowBatch) else self.of_rows(rows)

    def of_numbers(self, rows: CacheReader | Any, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The batch of rows by number, read together where the cache has a way."""
        together = rows.padded(numbers) if isinstance(rows, CacheReader) and self.with_targets else None
        if together is None:
            return self.of_rows([rows[number] for number in numbers])
        return _inputs(together.input_ids, together.supervised) | self._targets(together.ids, together.weights)

    def of_rows(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of rows read one by one."""
        supervised = np.stack([row.supervised for row in rows])
        batch = _inputs(np.stack([row.input_ids for row in rows]), supervised)
        if not self.with_targets or not hasattr(rows[0], "flat"):
            return batch
        if rows[0].flat.curve is not None:
            raise MismatchError(
                "these targets are sorted curves, which say nothing about ids: train with method=uld or alm, or "
                "capture with a sampler"
            )
        return batch | self._targets(*pad_rows([row.flat for row in rows], supervised[:, 1:]))

    def _targets(self, ids: NDArray[Any], weights: NDArray[Any]) -> dict[str, Tensor]:
        if self.vocab_size is not None:
            ids, weights = _without_padding(ids, weights, self.vocab_size)
        return {"kd_ids": torch.from_numpy(ids), "kd_weights": torch.from_numpy(weights)}


def _inputs(input_ids_BL: NDArray[Any], supervised_BL: NDArray[Any]) -> dict[str, Tensor]:
    ids = input_ids_BL.astype(np.int64)
    labels = np.where(supervised_BL, ids, -100)
    labels[:, 0] = -100
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _without_padding(ids: NDArray[Any], weights: NDArray[Any], vocab_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    beyond = ids >= vocab_size
    lost, whole = weights[beyond].sum(), weights.sum()
    if lost > _MOST_PADDING * whole:
        raise MismatchError(
            f"{lost / whole:.1%} of a batch's weight is on ids from {vocab_size} on, which the student lacks; take a "
            "student of the same tokenizer"
        )
    return np.where(beyond, 0, ids), np.where(beyond, 0, weights)
