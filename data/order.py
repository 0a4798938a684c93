"""Which window is sample number g? A pure function of (g, blend, seed): nothing stored or built, O(1) at any g.

The blend runs in cycles of 4096 samples. In each cycle every source gets an exact whole number of samples, so shares
never drift. The order inside a cycle, and inside each epoch of a source, is a permutation computed per element: a keyed
Feistel network over the next power of two, walked until it lands inside the range (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002).
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from data.errors import DataError

CYCLE = 4096  # samples per cycle of the blend: the finest share is 1/4096
ROUNDS = 4  # even, so that the two halves of a Feistel word end where they began
MASK = (1 << 64) - 1


class Place(NamedTuple):
    """Where a sample comes from."""

    source: int  # index into the blend
    epoch: int  # how many times the source has been read completely before
    window: int  # index of the window in the source's token stream


class SampleOrder:
    """The sequence of windows of a blend: `order[g]` for g = 0, 1, 2, … without end."""

    def __init__(self, windows: Sequence[int], weights: Sequence[float], seed: int):
        """`windows[i]` counts the windows in one epoch of source i, `weights[i]` is its share (on any scale)."""
        self.windows = tuple(windows)
        self.quotas = quotas(weights)
        self.seed = int(seed)  # its repr is part of the key: 5 and numpy's 5 are one seed
        self._bounds = (0, *accumulate(self.quotas))

    def __getitem__(self, g: int) -> Place:
        cycle, position = divmod(g, CYCLE)
        slot = permute(position, CYCLE, (self.seed, "blend", cycle))
        source = bisect_right(self._bounds, slot) - 1
        drawn = cycle * self.quotas[source] + slot - self._bounds[source]  # every count 0, 1, 2, … once per source
        epoch, turn = divmod(drawn, self.windows[source])
        return Place(source, epoch, permute(turn, self.windows[source], (self.seed, "epoch", source, epoch)))


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples per cycle of each source: CYCLE by weight, the rest to the largest fractions (ties: lower index)."""
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"source weights must be positive numbers, got {list(weights)}; to drop a source, leave it out"
            )
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) * CYCLE / total for weight in weights]
    whole = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in by_remainder[: CYCLE - sum(whole)]:
        whole[i] += 1
    if 0 in whole:
        weight = weights[whole.index(0)]
        raise DataError(
            f"source weight {weight} of {float(total):g} in total is less than one sample in {CYCLE}; "
            f"raise it to at least {float(total / CYCLE):.3g} or leave the source out"
        )
    return tuple(whole)


def permute(index: int, size: int, key: tuple) -> int:
    """The image of `index` under the permutation of range(size) that `key` names."""
    bits = max(2, (size - 1).bit_length())
    low_bits = bits // 2
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    round_keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 8 * ROUNDS, 8)]
    while True:
        index = _feistel(index, bits - low_bits, low_bits, round_keys)
        if index < size:
            return index


def _feistel(word: int, high_bits: int, low_bits: int, round_keys: list[int]) -> int:
    """A bijection of the words of high_bits + low_bits bits; unequal halves trade places each round."""
    high, low = word >> low_bits, word & ((1 << low_bits) - 1)
    for round_key in round_keys:
        high, low = low, high ^ (_mix(low ^ round_key) & ((1 << high_bits) - 1))
        high_bits, low_bits = low_bits, high_bits
    return high << low_bits | low


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: every output bit depends on every input bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)
