"""Recognizes the errors of collectives, of which torch.distributed has no common class."""

from __future__ import annotations

import torch.distributed as dist


def is_of_collective(error: BaseException) -> bool:
    """Whether a process group raised this error. gloo raises a plain ``RuntimeError``.

    Example:
        >>> is_of_collective(RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
        True
    """
    if not isinstance(error, RuntimeError):
        return False
    words = ("gloo", "timed out", "connection closed", "connection reset", "broken pipe", "nccl")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
