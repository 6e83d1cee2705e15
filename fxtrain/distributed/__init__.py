"""Data parallel training: one process per device, on ``torch.distributed``."""

from fxtrain.distributed._averaged import averaged
from fxtrain.distributed._failed_rank import FailedRankError
from fxtrain.distributed._mesh import LostRankError, Mesh, mesh
from fxtrain.distributed._rank_rows import rows
from fxtrain.distributed._replicated import replicated
from fxtrain.distributed._sync_batch_norm import sync_batch_norm

__all__ = [
    "FailedRankError",
    "LostRankError",
    "Mesh",
    "averaged",
    "mesh",
    "replicated",
    "rows",
    "sync_batch_norm",
]
