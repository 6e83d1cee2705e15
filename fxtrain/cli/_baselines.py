"""Baselines for a trained byte-level model: the bits per byte of simpler models on the same text."""

from __future__ import annotations

import lzma
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def unigram_bits(train: Tensor, validation: Tensor) -> float:
    """Returns the bits per byte of the validation text under the byte frequencies of the training text.

        p(c) = (count(c) + 1) / (bytes + 256)

    Args:
        train: uint8 [bytes].
        validation: uint8 [bytes], at least one.

    Example:
        >>> import torch
        >>> uniform = torch.arange(256, dtype=torch.uint8)
        >>> unigram_bits(uniform, uniform)
        8.0
    """
    counts = np.bincount(train.numpy(), minlength=256)
    return _bits((counts[validation.numpy()] + 1) / (len(train) + 256))


def trigram_bits(train: Tensor, validation: Tensor) -> float:
    """Returns the bits per byte of the validation text when each byte is predicted from the two before it.

    The model is a trigram model with interpolated modified Kneser-Ney smoothing:

        p(c | context) = (count(context, c) - d + mass(context) * p(c | shorter context)) / count(context)

    where d is one of three discounts, for counts of 1, 2, and 3 or more, estimated from the training text, and mass is
    the sum of the discounts in the context. In shorter contexts, count is the number of distinct longer contexts that
    the byte follows. The shortest context falls back to 1/256. The first two bytes are predicted from shorter contexts.

    Uses a table of 2**24 counts and about 0.4 GB of memory.

    Args:
        train: uint8 [bytes].
        validation: uint8 [bytes], at least one.

    References:
        Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling".
    """
    counts = _trigram_counts(train.numpy())
    continuations = np.count_nonzero(counts, axis=0)
    unigram = _kneser_ney(np.count_nonzero(continuations, axis=0), np.float32(1 / 256))
    bigram = _kneser_ney(continuations, unigram)
    trigram = _kneser_ney(counts, bigram)
    c = validation.numpy()
    return _bits(np.concatenate([unigram[c[:1]], bigram[c[:1], c[1:2]], trigram[c[:-2], c[1:-1], c[2:]]]))


def xz_bits(text: Tensor) -> float:
    """Returns the bits per byte of the text compressed by ``xz -9``, which adapts to it without training text.

    Args:
        text: uint8 [bytes], at least one.
    """
    return 8 * len(lzma.compress(text.numpy().tobytes(), preset=9)) / len(text)


def _trigram_counts(text: Array) -> Array:
    counts = np.zeros(1 << 24, dtype=np.int32)
    chunk = 1 << 24  # limits the memory of the codes, which is a multiple of the text's
    for start in range(0, len(text) - 2, chunk):
        c = text[start : start + chunk + 2].astype(np.int32)
        counts += np.bincount(c[:-2] << 16 | c[1:-1] << 8 | c[2:], minlength=1 << 24).astype(np.int32)
    return counts.reshape(256, 256, 256)


def _kneser_ney(counts: Array, lower: Array | np.float32) -> Array:
    """Returns float32 probabilities shaped like ``counts``. The last axis is the predicted byte."""
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    total = counts.sum(-1, keepdims=True)
    mass = discounts.sum(-1, keepdims=True)
    smoothed = (counts - discounts + mass * lower) / np.maximum(total, 1).astype(np.float32)
    return np.where(total > 0, smoothed, lower)


def _discounts(counts: Array) -> Array:
    """Returns the discounts of counts of 0, 1, 2, and 3 or more: float32 [4]."""
    n1, n2, n3, n4 = (np.count_nonzero(counts == k) for k in (1, 2, 3, 4))
    if not n1 * n2 * n3:  # too little text for an estimate; these are typical of long texts
        return np.array([0, 0.5, 1, 1.5], dtype=np.float32)
    y = n1 / (n1 + 2 * n2)
    estimated = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Estimates can be zero or negative on unusual texts, but unseen bytes need some probability.
    return np.concatenate([[0], np.maximum(estimated, 0.1)]).astype(np.float32)


def _bits(probabilities: Array) -> float:
    return float(-np.log2(probabilities, dtype=np.float64).mean())
