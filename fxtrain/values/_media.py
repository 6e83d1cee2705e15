"""Sounds and point clouds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch

from fxtrain.core import check_positive_int
from fxtrain.core._html import html_view
from fxtrain.values._nodes import on_host, register_value, set_tensor, within


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Audio:
    """One or more sounds.

    Args:
        samples: Floating-point tensor or array [T] (mono), [T, C] or [N, T, C], from -1 to 1. C is 1 or 2.
        rate: The sample rate in Hz.

    Raises:
        TypeError: ``samples`` are not floating-point, or ``rate`` is not an int.
        ValueError: ``samples`` have another shape, or ``rate`` is not positive.

    Example:
        >>> Audio(torch.sin(torch.arange(8000) * 0.3), rate=8000)
        Audio of 1.0 s
    """

    samples: Any  # a tensor after __post_init__
    rate: int

    def __post_init__(self) -> None:
        shape = list(set_tensor(self, "samples").shape)
        if not self.samples.is_floating_point():
            raise TypeError(
                f"expected Audio samples of a floating-point dtype, got {self.samples.dtype}. Scale them to -1 to 1."
            )
        check_positive_int("rate", self.rate)
        if len(shape) not in (1, 2, 3) or 0 in shape or (len(shape) > 1 and shape[-1] not in (1, 2)):
            raise ValueError(
                f"expected Audio samples of shape [T], [T, C] or [N, T, C] with 1 or 2 channels, got {shape}."
            )

    @functools.cached_property
    def waves(self) -> np.ndarray:
        """The sounds on the host: int16 [N, T, C]. Samples up to 0.5 beyond -1 and 1 are clipped.

        Raises:
            ValueError: A sample is not finite, or further out of range.
        """
        samples = self.samples if self.samples.ndim > 1 else self.samples[:, None]
        waves = np.round(within(self, on_host(samples), -1.0, 1.0, "samples") * 32767).astype(np.int16)
        return waves if waves.ndim == 3 else waves[None]

    def __repr__(self) -> str:
        return f"Audio of {self.samples.shape[0 if self.samples.ndim < 3 else 1] / self.rate:.1f} s"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.values._views import audio_view

        return audio_view(self)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
        points = set_tensor(self, "points")
        if not points.is_floating_point():
            raise TypeError(f"expected points of a floating-point dtype, got {points.dtype}. Convert them.")
        if points.ndim != 2 or points.shape[1] != 3 or not len(points):
            raise ValueError(f"expected points of shape [N, 3] with N above 0, got {list(points.shape)}. Reshape them.")
        if self.colors is None:
            return
        colors = set_tensor(self, "colors")
        if colors.dtype != torch.uint8:
            raise TypeError(f"expected colors of dtype uint8, from 0 to 255, got {colors.dtype}. Convert them.")
        if colors.shape != points.shape:
            raise ValueError(f"expected colors of shape {list(points.shape)}, one per point, got {list(colors.shape)}.")

    def __repr__(self) -> str:
        return f"PointCloud of {len(self.points)} points"


register_value(Audio, "samples")
register_value(PointCloud, "points", "colors")
