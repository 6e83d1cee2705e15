"""Matplotlib figures, rendered to pixels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fxtrain.core import describe
from fxtrain.values._media import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


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
