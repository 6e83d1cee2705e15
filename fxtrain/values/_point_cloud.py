"""Point clouds with optional colors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fxtrain.values._nodes import as_tensor, register_value


@dataclasses.dataclass(frozen=True, eq=False)
class PointCloud:
    """Points in space, optionally colored.

    Args:
        points: Floating-point tensor or array [N, 3]: x, y and z.
        colors: uint8 tensor or array [N, 3]: red, green and blue.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: An argument has another shape.

    Example:
        >>> PointCloud(torch.zeros(100, 3))
        PointCloud of 100 points
    """

    points: Any  # tensors after __post_init__
    colors: Any = None

    def __post_init__(self) -> None:
        points = as_tensor("PointCloud", self.points)
        object.__setattr__(self, "points", points)
        if not points.is_floating_point():
            raise TypeError(f"expected points of a floating-point dtype, got {points.dtype}. Convert them.")
        if points.ndim != 2 or points.shape[1] != 3 or not len(points):
            raise ValueError(f"expected points of shape [N, 3] with N above 0, got {list(points.shape)}.")
        if self.colors is None:
            return
        colors = as_tensor("PointCloud", self.colors)
        object.__setattr__(self, "colors", colors)
        if colors.dtype != torch.uint8:
            raise TypeError(f"expected colors of dtype uint8, from 0 to 255, got {colors.dtype}. Convert them.")
        if colors.shape != points.shape:
            raise ValueError(f"expected colors of shape {list(points.shape)}, one per point, got {list(colors.shape)}.")

    def __repr__(self) -> str:
        return f"PointCloud of {len(self.points)} points"


register_value(PointCloud, "points", "colors")
