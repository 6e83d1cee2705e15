"""Data parallel training: one process per device, on ``torch.distributed``."""

from fxtrain.distributed._averaged import averaged
from fxtrain.distributed._mesh import LostRankError, Mesh, mesh

__all__ = ["LostRankError", "Mesh", "averaged", "mesh"]
