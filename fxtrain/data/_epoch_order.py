"""Keyed permutations for the order of an epoch. Any slice is computed without the rest.

They use only the 64-bit integer arithmetic in this file, so an order is the same on every machine and with every
version of torch and numpy.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio; odd, so its multiples are distinct modulo 2^64
_WORD = 2**64 - 1
_BLOCK = 2**14  # items that are computed and cached together: 128 KiB
_ROUNDS = 8

Word = TypeVar("Word", int, np.ndarray)


def mix(*numbers: int) -> int:
    """Returns a 64-bit hash of the numbers, which depends on each of their bits and on their order.

    Example:
        >>> mix(0, 1) != mix(1, 0)
        True
    """
    word = 0
    for number in numbers:
        word = _finish((word + _GOLDEN & _WORD) ^ (number & _WORD))
    return word


class Order:
    """A permutation of ``range(size)`` for each epoch, as a pure function of (seed, epoch, index).

    Up to 2^14 items are sorted by random keys, so each permutation is equally likely. Larger orders use a Feistel
    network over the next power of two, with cycle walking to stay below ``size``. Their cost per item is O(1) in time
    and memory at any index.

    Args:
        size: Number of items.
        seed: Any int.
        shuffle: Whether to permute. Otherwise each epoch has the items in order.

    References:
        Luby, Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988.
        Black, Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """

    def __init__(self, size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None  # a cache of the last block

    def items(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns the items from index ``start`` to ``stop - 1`` of an epoch, int64 [stop - start].

        Example:
            >>> Order(5, seed=1).items(0, 0, 5).tolist()
            [2, 0, 4, 3, 1]
        """
        if not self.shuffle:
            return np.arange(start, stop)
        return np.concatenate(
            [
                self._block(epoch, number)[max(start - number * _BLOCK, 0) : stop - number * _BLOCK]
                for number in range(start // _BLOCK, -(-stop // _BLOCK))
            ]
        )

    def at(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """Returns the items at the given indices (int64 [n]) of an epoch, int64 [n].

        Example:
            >>> Order(5, seed=1).at(0, np.array([4, 0])).tolist()
            [1, 2]
        """
        if not self.shuffle or self.size <= _BLOCK:
            return self.items(epoch, 0, self.size)[indices]
        return permuted(indices.astype(np.uint64), self.size, mix(self.seed, epoch)).astype(np.int64)

    def _block(self, epoch: int, number: int) -> np.ndarray:
        kept = self._kept
        if kept is None or kept[0] != (epoch, number):
            key = mix(self.seed, epoch)
            if self.size <= _BLOCK:
                # The keys are distinct, so the order does not depend on the sorting algorithm.
                items = np.argsort(_finish(_counted(0, self.size, key)))
            else:
                first = number * _BLOCK
                items = permuted(np.arange(first, min(first + _BLOCK, self.size), dtype=np.uint64), self.size, key)
            self._kept = kept = ((epoch, number), items.astype(np.int64))
        return kept[1]


def permuted(items: np.ndarray, size: int, key: int) -> np.ndarray:
    """Applies the permutation of ``range(size)`` given by ``key`` to items (uint64 [n])."""
    bits = max((size - 1).bit_length(), 2)
    keys = _finish(_counted(1, 1 + _ROUNDS, key))
    result = _network(items, bits, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _network(result[outside], bits, keys)
        outside = outside[result[outside] >= size]
    return result


def _network(items: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permutes ``bits``-bit integers with a Feistel network, which XORs each half in turn with a hash of the other."""
    low_bits = bits // 2
    high, low = items >> low_bits, items & 2**low_bits - 1
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (_finish(high ^ key) >> 64 - low_bits)
        else:
            high = high ^ (_finish(low ^ key) >> 64 - (bits - low_bits))
    return (high << low_bits) | low


def _counted(start: int, stop: int, key: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.uint64) * _GOLDEN + key


def _finish(word: Word) -> Word:
    """The SplitMix64 finalizer, a bijection of 64-bit words, for an int or a uint64 array."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)
