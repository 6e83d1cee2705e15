"""Rank zero: an observer that acts in one process of many."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from fxtrain.core import FitEnd


def rank_zero(observer: Callable[..., None]) -> Callable[..., None]:
    """``observer``, in the process of rank 0 alone; in the others nothing, and nothing is copied to the host for it.

    The rank is torch.distributed's where that is initialised, else the variable ``RANK``, else 0. It is asked once,
    here. A callback is not marked: it decides, and what all processes hold has to be decided in all of them.
    ``progress`` and ``summary`` need no mark: they show in the process of rank 0 alone by themselves.

    Args:
        observer: ``(state, event, control) -> None``. It stays as it is.

    Example:
        >>> from fxtrain import observers, writers
        >>> write = rank_zero(observers.write(writers.console()))
    """
    return observer if rank() == 0 else _nothing


def rank() -> int:
    """Of this process: torch.distributed's where that is initialised, else the variable ``RANK``, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)


def _nothing(state: Any, event: FitEnd, control: Any) -> None:
    """What the other processes do."""
