"""The rank of this process among those of torch.distributed."""

from __future__ import annotations

import os

import torch.distributed as dist


def rank() -> int:
    """Returns the rank of this process: from torch.distributed if initialized, else from ``RANK``, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)
