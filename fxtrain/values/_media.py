"""Images, videos, sounds, Matplotlib figures and point clouds, as arrays with known axes and ranges."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import check_choice, check_positive, check_positive_int, describe
from fxtrain.values._nodes import on_host, register_value, set_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

Layout = Literal["HWC", "CHW"]
_NOTE = "_clipped"
_CHANNELS = {1: "gray", 3: "RGB", 4: "RGBA"}
_ROUNDING = 1e-3  # share of the range by which a pixel or sample may exceed it without a warning
_OVERSHOOT = 0.25  # share up to which it is clipped with a warning; beyond it, the value is rejected


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One or more images.

    Args:
        pixels: Tensor or array [H, W], [H, W, C] or [N, H, W, C], or with ``layout="CHW"`` [C, H, W] or [N, C, H, W]. C
            is 1 (gray), 3 (RGB) or 4 (RGBA). uint8 pixels range from 0 to 255, bool pixels are black or white, and
            floating-point pixels range over ``limits``.
        layout: ``"HWC"`` (channels last), or ``"CHW"`` as in torch's convolutions.
        limits: The floating-point values of black and white.

    Raises:
        TypeError: ``pixels`` is not a tensor or array of one of these dtypes.
        ValueError: ``pixels`` has another shape, or ``limits`` do not increase.

    Example:
        >>> Image(torch.zeros(3, 28, 28), layout="CHW")
        Image of 28 x 28, RGB
        >>> Image(torch.zeros(16, 28, 28, 1), limits=(-1, 1)).frames.shape
        (16, 28, 28, 1)
    """

    pixels: Any  # a tensor after __post_init__
    layout: Layout = "HWC"
    limits: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_pixels(self, "Image", inner=2 if getattr(self.pixels, "ndim", 0) == 2 else 3)

    @functools.cached_property
    def frames(self) -> np.ndarray:
        """The images on the host: uint8 [N, H, W, C].

        Pixels outside the limits by at most a quarter of their range are clipped.

        Raises:
            ValueError: A pixel is not finite, or further outside the limits.
        """
        return _frames(self)

    def __repr__(self) -> str:
        return _described(self, "Image")


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """One or more videos.

    Args:
        pixels: Tensor or array [T, H, W, C] or [N, T, H, W, C], or with ``layout="CHW"`` [T, C, H, W] or [N, T, C, H,
            W]. Otherwise as for ``Image``.
        layout: ``"HWC"`` (channels last), or ``"CHW"`` as in torch's convolutions.
        limits: The floating-point values of black and white.
        fps: Frames per second.

    Raises:
        TypeError: As for ``Image``.
        ValueError: As for ``Image``, or ``fps`` is not above 0.

    Example:
        >>> Video(torch.zeros(10, 3, 28, 28), layout="CHW", fps=5)
        Video of 28 x 28, RGB, 10 frames
    """

    pixels: Any  # a tensor after __post_init__
    layout: Layout = "HWC"
    limits: tuple[float, float] = (0.0, 1.0)
    fps: float = 8.0

    def __post_init__(self) -> None:
        check_positive(fps=self.fps)
        _check_pixels(self, "Video", inner=4)

    @functools.cached_property
    def frames(self) -> np.ndarray:
        """The videos on the host: uint8 [N, T, H, W, C], clipped as for ``Image``.

        Raises:
            ValueError: A pixel is not finite, or further outside the limits.
        """
        return _frames(self)

    def __repr__(self) -> str:
        axis = -4  # in both layouts
        return f"{_described(self, 'Video')}, {self.pixels.shape[axis]} frames"


@dataclasses.dataclass(frozen=True, eq=False)
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
        waves = np.round(_within(self, on_host(samples), -1.0, 1.0, "samples") * 32767).astype(np.int16)
        return waves if waves.ndim == 3 else waves[None]

    def __repr__(self) -> str:
        return f"Audio of {self.samples.shape[0 if self.samples.ndim < 3 else 1] / self.rate:.1f} s"


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """A Matplotlib figure. It is rendered on construction, so it may be changed or closed afterwards.

    Args:
        figure: A ``matplotlib.figure.Figure``.
        dpi: Dots per inch. Defaults to the figure's own.

    Raises:
        TypeError: ``figure`` is not a figure.

    Example:
        >>> from matplotlib.figure import Figure as Canvas
        >>> canvas = Canvas(figsize=(2, 1))
        >>> _ = canvas.subplots().plot([1, 4, 9])
        >>> Figure(canvas, dpi=100)
        Figure of 100 x 200
    """

    figure: dataclasses.InitVar[MatplotlibFigure]
    dpi: dataclasses.InitVar[float | None] = None
    pixels: np.ndarray = dataclasses.field(init=False)  # uint8 [H, W, 4]

    def __post_init__(self, figure: MatplotlibFigure, dpi: float | None) -> None:
        if not (hasattr(figure, "savefig") and hasattr(figure, "dpi")):
            remedy = " Use its .figure." if hasattr(figure, "figure") else ""
            raise TypeError(f"expected a Matplotlib figure, got {describe(figure)}.{remedy}")
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        before, canvas = figure.dpi, figure.canvas
        try:
            figure.set_dpi(dpi or before)
            drawn = FigureCanvasAgg(figure)
            drawn.draw()
            object.__setattr__(self, "pixels", np.array(drawn.buffer_rgba()))
        finally:
            figure.set_dpi(before)
            figure.set_canvas(canvas)

    def image(self) -> Image:
        """Returns the rendered figure."""
        return Image(self.pixels)

    def __repr__(self) -> str:
        return f"Figure of {self.pixels.shape[0]} x {self.pixels.shape[1]}"


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
        points = set_tensor(self, "points")
        if not points.is_floating_point():
            raise TypeError(f"expected points of a floating-point dtype, got {points.dtype}. Convert them.")
        if points.ndim != 2 or points.shape[1] != 3 or not len(points):
            raise ValueError(f"expected points of shape [N, 3] with N above 0, got {list(points.shape)}.")
        if self.colors is None:
            return
        colors = set_tensor(self, "colors")
        if colors.dtype != torch.uint8:
            raise TypeError(f"expected colors of dtype uint8, from 0 to 255, got {colors.dtype}. Convert them.")
        if colors.shape != points.shape:
            raise ValueError(f"expected colors of shape {list(points.shape)}, one per point, got {list(colors.shape)}.")

    def __repr__(self) -> str:
        return f"PointCloud of {len(self.points)} points"


def _check_pixels(value: Image | Video, name: str, *, inner: int) -> None:
    """Checks pixels, layout and limits. ``inner`` is the number of axes of one image or video."""
    pixels = set_tensor(value, "pixels")
    object.__setattr__(value, "limits", tuple(map(float, value.limits)))
    shape = list(pixels.shape)
    check_choice("layout", value.layout, ("HWC", "CHW"))
    if not (pixels.is_floating_point() or pixels.dtype in (torch.uint8, torch.bool)):
        raise TypeError(
            f"expected {name} pixels of dtype uint8, bool or floating-point, got {pixels.dtype}. Convert them."
        )
    if not value.limits[0] < value.limits[1]:
        raise ValueError(f"expected limits to increase from black to white, got {value.limits}.")
    frame = "" if inner < 4 else "T, "
    axes = f"{frame}H, W, C" if value.layout == "HWC" else f"{frame}C, H, W"
    if 0 in shape or len(shape) not in (inner, inner + 1) or (inner > 2 and _channels(value) not in _CHANNELS):
        other = "CHW" if value.layout == "HWC" else "HWC"
        axis = -3 if other == "CHW" else -1
        fits = len(shape) in (inner, inner + 1) and len(shape) > 2 and shape[axis] in _CHANNELS
        remedy = f"Pass layout={other!r}." if fits else "Reshape them."
        raise ValueError(
            f"expected {name} pixels of shape [{axes}] or [N, {axes}] with 1, 3 or 4 channels, got {shape}. {remedy}"
        )


def _channels(value: Image | Video) -> int:
    return value.pixels.shape[-1 if value.layout == "HWC" else -3] if value.pixels.ndim > 2 else 1


def _frames(value: Image | Video) -> np.ndarray:
    pixels: Tensor = value.pixels
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif value.layout == "CHW":
        pixels = pixels.movedim(-3, -1)
    whole = pixels.ndim == (5 if isinstance(value, Video) else 4)
    found = on_host(pixels if whole else pixels[None])
    if pixels.is_floating_point():
        low, high = value.limits
        found = _within(value, found, low, high, "pixels")
        found = np.round((found - low) / (high - low) * 255)
    elif pixels.dtype == torch.bool:
        found = found * 255
    return np.ascontiguousarray(found.astype(np.uint8))


def _within(value: Image | Video | Audio, data: np.ndarray, low: float, high: float, what: str) -> np.ndarray:
    """Clips values that are slightly out of range, and leaves a note for ``note_of_clipping`` on ``value``."""
    name, least, most = type(value).__name__, float(data.min()), float(data.max())
    beyond = max(low - least, most - high) / (high - low)  # NaN compares as false below
    if not beyond <= _OVERSHOOT:
        remedy = "Set limits= to the values of black and white." if what == "pixels" else "Scale them."
        raise ValueError(f"expected {name} {what} from {low:g} to {high:g}, got {least:g} to {most:g}. {remedy}")
    if beyond > _ROUNDING:
        value.__dict__[_NOTE] = f"{name} {what} from {least:g} to {most:g} are clipped to {low:g} to {high:g}."
    return data.clip(low, high)


def note_of_clipping(value: object) -> str | None:
    """Returns a description of the clipping on the host, once, or None if nothing was clipped."""
    return vars(value).pop(_NOTE, None)


def _described(value: Image | Video, name: str) -> str:
    shape = value.pixels.shape
    inner = 3 if isinstance(value, Image) else 4
    rows, columns = (-2, -1) if value.layout == "CHW" or value.pixels.ndim == 2 else (-3, -2)
    count = f"{shape[0]} of " if value.pixels.ndim > inner else "of "
    return f"{name} {count}{shape[rows]} x {shape[columns]}, {_CHANNELS[_channels(value)]}"


register_value(Image, "pixels")
register_value(Video, "pixels")
register_value(Audio, "samples")
register_value(PointCloud, "points", "colors")
