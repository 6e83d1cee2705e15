"""Data parallel training: one process per device, on ``torch.distributed``."""

from fxtrain.distributed._averaged import averaged
from fxtrain.distributed._mesh import LostRankError, Mesh, mesh
from fxtrain.distributed._rank_rows import rows

__all__ = ["LostRankError", "Mesh", "averaged", "mesh", "rows"]
