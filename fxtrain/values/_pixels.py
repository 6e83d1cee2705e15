"""Images and videos, as arrays with named axes and a known range, and with captions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import check_choice, check_positive, check_positive_int, describe
from fxtrain.core._html import html_view
from fxtrain.values._nodes import on_host, register_value, set_tensor, within

ImageLayout = Literal["HWC", "CHW", "NHWC", "NCHW"]
VideoLayout = Literal["HWC", "CHW", "THWC", "TCHW", "CTHW", "NTHWC", "NTCHW", "NCTHW"]
_CHANNELS = {1: "gray", 3: "RGB", 4: "RGBA"}
_PADDING = 2  # pixels between the images of a grid

_Pixels = TypeVar("_Pixels", bound="Pixels")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pixels:
    """The common part of ``Image`` and ``Video``."""

    axes: ClassVar[str]  # of ``frames``
    layouts: ClassVar[tuple[str, ...]]

    pixels: Any  # a tensor after __post_init__
    layout: str
    limits: tuple[float, float] = (0.0, 1.0)
    caption: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        """Checks pixels, layout, limits and captions."""
        pixels, name = set_tensor(self, "pixels"), type(self).__name__
        object.__setattr__(self, "limits", tuple(map(float, self.limits)))
        check_choice("layout", self.layout, self.layouts)
        if not (pixels.is_floating_point() or pixels.dtype in (torch.uint8, torch.bool)):
            raise TypeError(
                f"expected {name} pixels of dtype uint8, bool or floating-point, got {pixels.dtype}. Convert them."
            )
        if not self.limits[0] < self.limits[1]:
            raise ValueError(f"expected limits to increase from black to white, got {self.limits}.")
        if not self._fits(self.layout):
            raise ValueError(
                f"expected {name} pixels of shape {self._shapes()} with 1, 3 or 4 channels, got {list(pixels.shape)}. "
                f"{self._remedy()}"
            )
        if not isinstance(self.caption, str):
            self._set_captions(self.caption)

    def _set_captions(self, captions: object) -> None:
        if not isinstance(captions, Sequence) or not all(isinstance(each, str) for each in captions):
            raise TypeError(f"expected caption to be a string or a sequence of strings, got {describe(captions)}.")
        if captions and len(captions) != self.count:
            raise ValueError(
                f"expected one caption for each of {self.count} {type(self).__name__.lower()}"
                f"{'s' * (self.count != 1)}, got {len(captions)}. Pass a string for all of them together."
            )
        object.__setattr__(self, "caption", tuple(captions))

    @property
    def captions(self) -> tuple[str, ...]:
        """One caption for each of the ``frames``, or none."""
        if isinstance(self.caption, str):
            return (self.caption,) * self.count
        return tuple(self.caption)

    @property
    def is_single(self) -> bool:
        """Whether the pixels have no axis N."""
        return "N" not in self.order

    @property
    def count(self) -> int:
        """The number N of images or videos."""
        return self.size("N")

    @property
    def order(self) -> str:
        """The axes of ``pixels``, one letter each."""
        return self._order(self.layout)

    def size(self, axis: str) -> int:
        """Returns the length of an axis: N, T, H, W or C. An axis that the pixels lack has length 1."""
        order = self.order
        return self.pixels.shape[order.index(axis)] if axis in order else 1

    def _order(self, layout: str) -> str:
        """Returns the axes of the pixels. Axes that a layout does not name come first, and N may be missing."""
        full = "".join(axis for axis in self.axes if axis not in layout) + layout
        return full[1:] if "N" not in layout and self.pixels.ndim < len(full) else full

    def _fits(self, layout: str) -> bool:
        order, shape = self._order(layout), self.pixels.shape
        return len(order) == len(shape) and 0 not in shape and shape[order.index("C")] in _CHANNELS

    def _shapes(self) -> str:
        full = "".join(axis for axis in self.axes if axis not in self.layout) + self.layout
        shapes = [full] if "N" in self.layout else [full[1:], full]
        return " or ".join(f"[{', '.join(shape)}]" for shape in shapes)

    def _remedy(self) -> str:
        """Returns what to do about a wrong shape: the layouts of the same axes that fit it."""
        named = [layout for layout in self.layouts if len(layout) == len(self.axes) - 1 and self._fits(layout)]
        return f"Pass layout={' or '.join(map(repr, named))}." if named else "Reshape them."

    @functools.cached_property
    def unpacked(self) -> np.ndarray:
        """The pixels on the host, uint8 with the axes of the class. Pixels slightly outside the limits are clipped.

        Raises:
            ValueError: A pixel is not finite, or outside the limits by more than a quarter of their range.
        """
        found = on_host(self._permuted())
        if self.pixels.is_floating_point():
            low, high = self.limits
            found = within(self, found, low, high, "pixels")
            found = np.round((found - low) / (high - low) * 255)
        elif self.pixels.dtype == torch.bool:
            found = found * 255
        return np.ascontiguousarray(found.astype(np.uint8))

    def bytes_tensor(self) -> Tensor:
        """Returns the pixels on their device, uint8 with the axes of the class. They are clipped to their limits."""
        found = self._permuted()
        if self.pixels.is_floating_point():
            low, high = self.limits
            found = ((found.float() - low) / (high - low)).nan_to_num().clamp(0, 1).mul(255).round()
        elif self.pixels.dtype == torch.bool:
            found = found * 255
        return found.to(torch.uint8).contiguous()

    def _permuted(self) -> Tensor:
        """Returns the pixels with the axes of the class."""
        order = self.order
        missing = [axis for axis in self.axes if axis not in order]
        full = "".join(missing) + order
        return self.pixels[(None,) * len(missing)].permute([full.index(axis) for axis in self.axes])

    def __repr__(self) -> str:
        count = "of " if self.is_single else f"{self.count} of "
        return f"{type(self).__name__} {count}{self.size('H')} x {self.size('W')}, {_CHANNELS[self.size('C')]}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Image(Pixels):
    """One or more images.

    Args:
        pixels: Tensor or array [H, W], [H, W, C] or [N, H, W, C], or with ``layout="CHW"`` [C, H, W] or [N, C, H, W]. C
            is 1 (gray), 3 (RGB) or 4 (RGBA). uint8 pixels range from 0 to 255, bool pixels are black or white, and
            floating-point pixels range over ``limits``.
        layout: ``"HWC"`` (channels last), or ``"CHW"`` as in torch's convolutions. With a leading ``N``, the pixels
            must have that axis.
        limits: The floating-point values of black and white.
        caption: A string for all images together, or one string for each.
        grid: Whether to join the images to one picture, or the number of its columns. By default it has about as many
            rows as columns. Captions are not drawn into the picture, because they would rarely fit below small images.
            They become its caption, with one line per row.

    Raises:
        TypeError: ``pixels`` is not a tensor or array of one of these dtypes, or ``caption`` is not of strings.
        ValueError: ``pixels`` has another shape, ``limits`` do not increase, or the number of captions is not N.

    Example:
        >>> Image(torch.zeros(3, 28, 28), layout="CHW", caption="a cat")
        Image of 28 x 28, RGB
        >>> Image(torch.zeros(16, 28, 28, 1), limits=(-1, 1)).frames.shape
        (16, 28, 28, 1)
        >>> picture = Image(torch.zeros(6, 28, 28, 1), caption=list("abcdef"), grid=3)
        >>> picture.frames.shape, picture.captions
        ((1, 62, 92, 1), ('a | b | c\\nd | e | f',))
    """

    axes = "NHWC"
    layouts = ("HWC", "CHW", "NHWC", "NCHW")

    layout: ImageLayout = "HWC"
    grid: bool | int = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is not False and self.grid is not True:
            check_positive_int("grid", self.grid)

    def _order(self, layout: str) -> str:
        return "HW" if self.pixels.ndim == 2 and "N" not in layout else super()._order(layout)

    def _fits(self, layout: str) -> bool:
        if self._order(layout) == "HW":
            return 0 not in self.pixels.shape
        return super()._fits(layout)

    @property
    def columns(self) -> int:
        """The number of columns of the grid, or 1 without one."""
        return min(math.ceil(math.sqrt(self.count)) if self.grid is True else self.grid or 1, self.count)

    @functools.cached_property
    def frames(self) -> np.ndarray:
        """The images on the host: uint8 [N, H, W, C], or [1, H, W, C] with a grid.

        Pixels outside the limits by at most a quarter of their range are clipped.

        Raises:
            ValueError: A pixel is not finite, or further outside the limits.
        """
        return _joined(self.unpacked, self.columns) if self.grid else self.unpacked

    @property
    def captions(self) -> tuple[str, ...]:
        """One caption for each of the ``frames``, or none."""
        found = super().captions
        if not self.grid or not found:
            return found
        if isinstance(self.caption, str):
            return (self.caption,)
        rows = [found[begin : begin + self.columns] for begin in range(0, len(found), self.columns)]
        return ("\n".join(map(" | ".join, rows)),)

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.values._views import image_view

        return image_view(self)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Video(Pixels):
    """One or more videos.

    Args:
        pixels: Tensor or array [T, H, W, C] or [N, T, H, W, C], or of another ``layout``. Otherwise as for ``Image``.
        layout: The order of the axes, such as ``"CTHW"`` for [C, T, H, W] or [N, C, T, H, W]. Axes that it does not
            name come first: ``"CHW"`` is ``"TCHW"``. With a leading ``N``, the pixels must have that axis.
        limits: The floating-point values of black and white.
        fps: Frames per second.
        caption: A string for all videos together, or one string for each.

    Raises:
        TypeError: As for ``Image``.
        ValueError: As for ``Image``, or ``fps`` is not above 0.

    Example:
        >>> Video(torch.zeros(3, 10, 28, 28), layout="CTHW", fps=5, caption="a digit")
        Video of 28 x 28, RGB, 10 frames
    """

    axes = "NTHWC"
    layouts = ("HWC", "CHW", "THWC", "TCHW", "CTHW", "NTHWC", "NTCHW", "NCTHW")

    layout: VideoLayout = "HWC"
    fps: float = dataclasses.field(default=8.0, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(fps=self.fps)
        super().__post_init__()

    @property
    def frames(self) -> np.ndarray:
        """The videos on the host: uint8 [N, T, H, W, C], clipped as for ``Image``.

        Raises:
            ValueError: A pixel is not finite, or further outside the limits.
        """
        return self.unpacked

    def __repr__(self) -> str:
        return f"{super().__repr__()}, {self.size('T')} frames"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.values._views import video_view

        return video_view(self)


def _joined(images: np.ndarray, columns: int) -> np.ndarray:
    """Returns one picture of images, uint8 [N, H, W, C], in rows, with black between them, as [1, H, W, C]."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    high, wide = height + _PADDING, width + _PADDING
    whole = np.zeros((rows * high + _PADDING, columns * wide + _PADDING, channels), np.uint8)
    if channels == 4:
        whole[..., 3] = 255
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * high + _PADDING, column * wide + _PADDING
        whole[top : top + height, left : left + width] = image
    return whole[None]


register_value(Image, "pixels")
register_value(Video, "pixels")
