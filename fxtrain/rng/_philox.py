"""Philox4x32 random words in tensor operations, and the keys and streams that select them."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fxtrain.core import describe, register_node

MASK = 0xFFFFFFFF

Word = int | Tensor
"""A 32-bit word."""

Words = tuple[Any, Any, Any, Any]
"""Four 32-bit words: int64 tensors that broadcast, or Python integers."""


def philox4x32(counter: Words, key: tuple[Word, Word], *, rounds: int = 7) -> Words:
    """Returns four random words for a counter of four words and a key of two.

    Each round multiplies two words and swaps the halves of the results. The key is incremented between rounds:

        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = high(q) ^ c[1] ^ k[0],  low(q),  high(p) ^ c[3] ^ k[1],  low(p)

    For a fixed key this is a bijection of the counters. Seven rounds are the fewest that pass BigCrush. The authors
    recommend ten as a safety margin.

    Args:
        counter: int64 tensors that broadcast, or integers, each in [0, 2^32).
        key: Two words of the same kind.
        rounds: The number of rounds.

    Returns:
        Four int64 tensors or integers, in [0, 2^32).

    Example:
        >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
        ['5f6fb709', '0d893f64', '4f121f81', '4f730a48']

    References:
        Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for index in range(rounds):
        if index:
            k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
        # The product of two words may overflow int64, but its 64 bits are right, and only bits are used. Only words
        # that are multiplied next must be masked, so a round needs two masks instead of four.
        p, q = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((q >> 32) ^ c1 ^ k0) & MASK, q, ((p >> 32) ^ c3 ^ k1) & MASK, p
    return c0, c1 & MASK, c2, c3 & MASK


class Stream(enum.IntEnum):
    """The purpose of random samples. Streams are independent. Values 16 to 255 are free for user code."""

    TRAIN = 0
    EVAL = 1
    INIT = 2
    DATA = 3
    SAMPLE = 4
    BATCH = 5


class Rows(NamedTuple):
    """The examples of this rank, among those of all ranks: ``rank``, ``rank + ranks``, ``rank + 2 * ranks``, ...

    Args:
        rank: int64 []. The first example.
        ranks: Number of ranks.
        count: Number of examples of this rank.
    """

    rank: Tensor
    ranks: int
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """A position in a run, from which samples are computed. A pytree, created by ``key``.

    Under ``torch.func.vmap`` each of the three tensors may be batched, and each member gets the samples that it would
    get alone. If none is batched, all members get the same samples.

    Args:
        seed: int64 []. All 64 bits count.
        step: int64 []. All 64 bits count.
        microbatch: int64 []. The lower 32 bits count.
        stream: The purpose of the samples, 0 to 255. Static: part of the tree structure, not a leaf.
        rows: The examples of this rank, in data parallel training. Samples whose first dimension is that of the batch
            are those that one process would take for the same examples of the whole batch. All other samples are equal
            on all ranks. Not a leaf, and lost by transformations of the tree.
    """

    seed: Tensor
    step: Tensor
    microbatch: Tensor
    stream: int = Stream.TRAIN
    rows: Rows | None = None

    def replace(self, **changes: Any) -> Self:
        """Returns the key with some fields changed. Accepts integers in place of tensors."""
        rows = changes.pop("rows", self.rows)
        made = key(**{field: getattr(self, field) for field in (*_TENSORS, "stream")} | changes)
        return made if rows is None else dataclasses.replace(made, rows=rows)  # pyright: ignore[reportReturnType]


_TENSORS = ("seed", "step", "microbatch")

register_node(
    Key,
    lambda key: ([getattr(key, name) for name in _TENSORS], key.stream),
    lambda stream, children: Key(*children, stream=stream),
    fields=_TENSORS,
)


def key(seed: int | Tensor, *, stream: int = Stream.TRAIN, step: int | Tensor = 0, microbatch: int | Tensor = 0) -> Key:
    """Returns the position in a run from which ``functional`` and the samplers compute their samples.

    No two combinations of (seed, stream, step, microbatch, site, index) share a counter and a key, as long as each
    value fits its range of 64, 8, 32, 32, 24 and 34 bits. The upper half of a step is folded into the key.

    Args:
        seed: An integer, or an integer tensor of shape [].
        stream: A ``Stream``, or an integer from 16 to 255 for a stream of user code.
        step: The training step: an integer, or an integer tensor of shape [].
        microbatch: The index of the gradient accumulation substep or evaluation batch, of the same types.

    Raises:
        TypeError: ``seed``, ``step`` or ``microbatch`` is neither an integer nor a 0-d integer tensor.
        ValueError: ``stream`` is out of range.

    Example:
        >>> from fxtrain import rng
        >>> place = rng.key(seed=0, step=torch.tensor(3))
        >>> rng.uniform(place, [2])
        tensor([0.0505, 0.5906])
        >>> rng.uniform(place.replace(step=4), [2])
        tensor([0.3516, 0.0014])
    """
    stream = int(stream)  # in torch 2.11, Dynamo can convert an enum member but not compare it
    if not 0 <= stream < 256:
        raise ValueError(
            f"expected stream to be an int from 0 to 255, got {stream}. Use a member of rng.Stream, or 16 to 255."
        )
    seed = _scalar("seed", seed, None)
    return Key(seed, _scalar("step", step, seed), _scalar("microbatch", microbatch, seed), stream)


def _scalar(name: str, value: int | Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected {name} to be an int or an integer tensor of shape [], got {describe(value)}.")
        # Not `torch.tensor`, which copies a constant to the GPU at each call of compiled code.
        return torch.full((), value, dtype=torch.int64, device=None if like is None else like.device)
    if value.ndim or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"expected {name} to be an int or an integer tensor of shape [], got {describe(value)}. For several runs "
            "in one call, use torch.func.vmap over a tensor of seeds."
        )
    return value.to(torch.int64)


def blocks(key: Key, index: Tensor, count: int, *, site: int) -> Words:
    """Returns blocks of four random words of a site: int64 in the shape of ``index`` each, in [0, 2^32).

    Args:
        key: The position in the run.
        index: int64. Which blocks.
        count: A number that all indices are below.
        site: The sampling call.
    """
    if not 0 <= site < 1 << 24:
        raise ValueError(f"expected site to be an int from 0 to 2^24 - 1, got {site}.")
    if count > 1 << 32:
        raise ValueError(f"expected at most 2^34 random words from one site, got {4 * count}. Use several sites.")
    position = (part.to(index.device) for part in (key.seed, key.step, key.microbatch))
    return words(index, site, key.stream, *position)


def words(index: Word, site: int, stream: int, seed: Word, step: Word, microbatch: Word) -> Words:
    """Returns the four random words of the blocks with this index, of a site and a position in a run."""
    # The index is below 2^32. For GPUs, Inductor computes multiples of ``arange`` in 32 bits, but not of other values.
    counter = index & MASK, stream << 24 | site, step & MASK, microbatch & MASK
    return philox4x32(counter, (seed & MASK, (seed >> 32 ^ (step >> 32) * 0x9E3779B9) & MASK))
