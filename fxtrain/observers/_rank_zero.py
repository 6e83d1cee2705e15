"""Observers that act only in the process of rank 0."""

from __future__ import annotations

import os

import torch.distributed as dist

from fxtrain.core import Control, FitEnd, Observer, TrainState


def rank_zero(observer: Observer) -> Observer:
    """Returns ``observer`` in the process of rank 0, and an observer that does nothing in all others.

    The others copy no metrics to the host. The rank is read when this is called: from torch.distributed if it is
    initialized, otherwise from the environment variable ``RANK``, otherwise it is 0.

    Callbacks must not be restricted to one rank, because all processes must make the same decisions. ``progress`` and
    ``summary`` already act on rank 0 only.

    Args:
        observer: A function ``(state, event, control) -> None``. It is not modified.

    Example:
        >>> from fxtrain import observers, writers
        >>> write = rank_zero(observers.write(writers.console()))
    """
    return observer if rank() == 0 else _do_nothing


def rank() -> int:
    """Returns the rank of this process: from torch.distributed if initialized, else from ``RANK``, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)


def _do_nothing(state: TrainState, event: FitEnd, control: Control) -> None:
    """Does nothing. It subscribes to ``FitEnd`` alone, so it costs nothing during training."""
