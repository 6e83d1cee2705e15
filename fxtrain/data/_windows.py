"""Windows of a token sequence, for next-token prediction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import check_positive_int
from fxtrain.data._as_tensors import as_tensors
from fxtrain.data._epoch_order import mix
from fxtrain.data._indexed import DropLast, IndexedBatches, take_rows
from fxtrain.data._source import Source


def windows(
    tokens: Tensor | np.ndarray,
    length: int,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: DropLast = True,
) -> Source:
    """Returns batches of windows of a token sequence, for next-token prediction.

    An epoch cuts the sequence into windows that do not overlap. With shuffling, the first window of an epoch starts at
    an offset below ``length``, which is a function of (seed, epoch).

    Args:
        tokens: The sequence, [n], of any integer dtype. It may be memory-mapped.
        length: Tokens per window.
        batch_size: Windows per batch.
        seed: Any int.
        shuffle: Whether to shuffle the windows. Otherwise they come in order, starting at the first token.
        drop_last: As for ``batches``.

    Returns:
        Batches ``{"x": int64 [batch_size, length], "y": int64 [batch_size, length]}``, where ``y`` is ``x`` shifted by
        one token.

    Raises:
        ValueError: If there are too few tokens for a batch.

    Example:
        >>> windows(torch.arange(100), 3, 2, shuffle=False)[1]
        {'x': tensor([[ 6,  7,  8], [ 9, 10, 11]]), 'y': tensor([[ 7,  8,  9], [10, 11, 12]])}
    """
    check_positive_int("length", length)
    head = as_tensors(tokens[:0]) if len(tokens.shape) == 1 else None
    if head is None or head.dtype == torch.bool or head.is_floating_point() or head.is_complex():
        raise ValueError(f"expected tokens to be integers of shape [n], got {tokens.dtype} {list(tokens.shape)}.")
    total = len(tokens)
    # Shuffling uses one window less, which leaves room for any offset.
    size = max((total - length) // length if shuffle else (total - 1) // length, 0)
    steps = np.arange(length)

    def take(items: np.ndarray, position: int) -> dict[str, Tensor]:
        offset = mix(seed, position // data.epoch_length, 1) % length if shuffle else 0
        at = ((items * length + offset)[:, None] + steps).ravel()
        x, y = (take_rows(tokens, index).to(torch.int64).reshape(-1, length) for index in (at, at + 1))
        return {"x": x, "y": y}

    data = IndexedBatches(
        take,
        size,
        batch_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        what=f"{size} windows of length={length} from {total} tokens",
    )
    return data
