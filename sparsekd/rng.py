"""Counter-based randomness: the same (seed, row, position, draw) gives the same number in any batch, on any worker.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer torch ops, so that it
runs where the logits are and gives the same integers on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The part behind the slash counts the ways in which uniforms became ids (`inversion.ids_at` is the second; with the
# third, draws from q ∝ p^t go by it too): a cache begun with another is not gone on with.
ALGORITHM = "philox4x32-10/3"

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) for four counter words (int64, broadcastable) and a 64-bit seed."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    even, odd = torch.stack([c2, c0]), torch.stack([c1, c3])
    # Filled in on the device: a list is copied there, and the host waits for all that the device has to do before.
    factors = torch.cat([torch.full((1,), each, device=even.device) for each in _MULTIPLIERS[::-1]])
    factors = factors.view(2, *[1] * c0.dim())
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # Both multiplications at once; int64 wraps at 2^64, which leaves both halves of a 32 x 32 bit product right.
        product = even * factors
        low = product & _MASK
        high = product.bitwise_right_shift_(32).bitwise_and_(_MASK).bitwise_xor_(odd)
        high[0].bitwise_xor_(key0)
        high[1].bitwise_xor_(key1)
        # The next even words come in the order that meets their factors: word 2 first.
        even, odd = high.flip(0), low
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return even[1], odd[0], even[0], odd[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """What the randomness of N positions hangs on, and on nothing else.

    Attributes:
        seed: any integer in [0, 2^64).
        rows: [N] int64, the row of each position.
        positions: [N] int64, the position within its row, below 2^32.
    """

    seed: int
    rows: Tensor
    positions: Tensor

    def uniforms(self, count: int) -> Tensor:
        """[N, count] float64 in [0, 1) with 53 random bits each; draw j depends on (seed, row, position, j) only."""
        draws = torch.arange((count + 1) // 2, device=self.rows.device)
        rows, positions = self.rows[:, None], self.positions[:, None]
        words = philox((draws[None], positions & _MASK, rows & _MASK, (rows >> 32) & _MASK), self.seed)
        pairs = torch.stack([_to_unit(words[0], words[1]), _to_unit(words[2], words[3])], dim=-1)
        return pairs.flatten(1)[:, :count]

    def coins(self) -> Tensor:
        """[N] float64 in [0, 1), one a position, from a counter that no draw uses."""
        rows, positions = self.rows, self.positions
        last = torch.full_like(positions, _MASK)
        words = philox((last, positions & _MASK, rows & _MASK, (rows >> 32) & _MASK), self.seed)
        return _to_unit(words[0], words[1])

    def __getitem__(self, index: slice) -> Keys:
        return Keys(seed=self.seed, rows=self.rows[index], positions=self.positions[index])


def _to_unit(high: Tensor, low: Tensor) -> Tensor:
    return ((high << 21) | (low >> 11)).double() * 2.0**-53
