"""Figures of Matplotlib and plotly, and charts of Weights & Biases."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from fxtrain.core import describe, name_of, register_node
from fxtrain.core._html import html_view
from fxtrain.values._pixels import Image


class PlotlyFigure:
    """The kind of a ``Figure`` of plotly."""


class WandbChart:
    """The kind of a ``Figure`` with an object of Weights & Biases."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Figure:
    """A figure of Matplotlib or plotly, or a chart of Weights & Biases.

    A Matplotlib figure is rendered on construction, and a plotly figure is copied, so they may be changed afterwards.
    Weights & Biases, MLflow and media files keep plotly figures interactive. Writers of images, such as TensorBoard,
    get a picture, which needs the package kaleido and Chrome, and takes seconds. Pass such a writer to
    ``fxtrain.writers.asynchronous``, so that training does not wait for it. The pages load plotly's script from the
    internet.

    Args:
        figure: A ``matplotlib.figure.Figure``, a ``plotly.graph_objects.Figure``, or an object that ``wandb.log``
            accepts, such as ``wandb.plot.line(...)``, which only the writer of Weights & Biases shows.
        dpi: Dots per inch of a Matplotlib figure. Defaults to the figure's own.

    Raises:
        TypeError: ``figure`` is not a figure.

    Example:
        >>> from matplotlib.figure import Figure as Canvas
        >>> canvas = Canvas(figsize=(2, 1))
        >>> _ = canvas.subplots().plot([1, 4, 9])
        >>> Figure(canvas, dpi=100)
        Figure of 100 x 200
    """

    figure: dataclasses.InitVar[Any]
    dpi: dataclasses.InitVar[float | None] = None
    pixels: np.ndarray = dataclasses.field(init=False)  # uint8 [H, W, 4], empty unless of Matplotlib
    kind: type[object] = dataclasses.field(init=False)
    source: Any = dataclasses.field(init=False, default=None)  # plotly's JSON, or the object of Weights & Biases

    def __post_init__(self, figure: Any, dpi: float | None) -> None:
        if hasattr(figure, "to_plotly_json") and hasattr(figure, "to_json"):
            kind, pixels, source = PlotlyFigure, np.zeros((0, 0, 4), np.uint8), figure.to_json()
        elif type(figure).__module__.partition(".")[0] == "wandb":
            kind, pixels, source = WandbChart, np.zeros((0, 0, 4), np.uint8), figure
        elif hasattr(figure, "savefig") and hasattr(figure, "dpi"):
            kind, pixels, source = Figure, _rendered(figure, dpi), None
        else:
            remedy = " Use its .figure." if hasattr(figure, "figure") else ""
            raise TypeError(f"expected a figure of Matplotlib or plotly, got {describe(figure)}.{remedy}")
        for name, value in (("kind", kind), ("pixels", pixels), ("source", source)):
            object.__setattr__(self, name, value)

    @classmethod
    def drawn(cls, draw: Callable[..., Any], *values: Tensor) -> Figure:
        """Returns a Matplotlib figure of values that may be on a device, which is drawn only if a writer takes it.

        Args:
            draw: ``draw(*arrays)`` returns the figure. It may run in the thread of a writer, so it makes its own
                ``matplotlib.figure.Figure`` instead of using ``pyplot``.
            values: Tensors, passed to ``draw`` as NumPy arrays. They must not be tensors of the state itself, whose
                buffers may be reused before the figure is drawn.

        Example:
            >>> import torch
            >>> from matplotlib.figure import Figure as Canvas
            >>> def draw(losses):
            ...     canvas = Canvas(figsize=(2, 1), dpi=100)
            ...     canvas.subplots().plot(losses)
            ...     return canvas
            >>> Figure.drawn(draw, torch.tensor([1.0, 4.0, 9.0])).image()
            Image of 100 x 200, RGBA
        """
        return _unflattened((draw,), values)

    def __getattr__(self, name: str) -> np.ndarray:
        # Called only while the field is not set, as the figure is not drawn yet.
        if name != "pixels" or "_draw" not in vars(self):
            raise AttributeError(f"expected an attribute of Figure, got {name!r}. Its picture is .image().")
        arrays = [
            value.detach().cpu().numpy() if isinstance(value, Tensor) else value for value in vars(self)["_values"]
        ]
        object.__setattr__(self, "pixels", _rendered(vars(self)["_draw"](*arrays), None))
        return self.pixels

    def plotly(self) -> Any:
        """Returns the copy of a plotly figure."""
        import plotly.io  # pyright: ignore[reportMissingImports] -- optional

        return plotly.io.from_json(self.source)

    def html(self) -> str:
        """Returns a page with the plotly figure, which loads plotly's script from the internet."""
        return self.plotly().to_html(include_plotlyjs="cdn", div_id="figure")

    def image(self) -> Image:
        """Returns the figure as a picture.

        Raises:
            ValueError: A plotly figure cannot be drawn, because kaleido or Chrome is missing.
        """
        if self.kind is not PlotlyFigure:
            return Image(self.pixels)
        import PIL.Image

        try:
            content = self.plotly().to_image("png")
        except Exception as error:  # kaleido has several, also for a missing browser
            raise ValueError(
                f"expected kaleido and Chrome, which draw a plotly figure as a picture, got {describe(error)}. Install "
                "them with pip install 'fxtrain[plotly]' and plotly_get_chrome, or add "
                "fxtrain.writers.media or another writer of interactive figures."
            ) from error
        return Image(np.array(PIL.Image.open(io.BytesIO(content)).convert("RGBA")))

    def __repr__(self) -> str:
        if "pixels" not in vars(self):
            return f"Figure by {name_of(vars(self)['_draw'])}"
        if self.kind is Figure:
            return f"Figure of {self.pixels.shape[0]} x {self.pixels.shape[1]}"
        return "Figure of plotly" if self.kind is PlotlyFigure else f"Figure of {type(self.source).__name__}"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.values._views import figure_view

        return figure_view(self)


def _rendered(figure: Any, dpi: float | None) -> np.ndarray:
    """Returns the pixels of a Matplotlib figure, uint8 [H, W, 4]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    before, canvas = figure.dpi, figure.canvas
    try:
        figure.set_dpi(dpi or before)
        drawn = FigureCanvasAgg(figure)
        drawn.draw()
        return np.array(drawn.buffer_rgba())
    finally:
        figure.set_dpi(before)
        figure.set_canvas(canvas)


def _flattened(figure: Figure) -> tuple[tuple[Any, ...], tuple[object]]:
    """Returns the values of a figure, and the function that draws it or the figure itself."""
    known = vars(figure)
    return (known["_values"], (known["_draw"],)) if "_draw" in known else ((), (figure,))


def _unflattened(context: Any, values: Any) -> Figure:
    if isinstance(context[0], Figure):
        return context[0]
    figure = object.__new__(Figure)
    fields = {"kind": Figure, "source": None, "_draw": context[0], "_values": tuple(values)}
    for name, value in fields.items():
        object.__setattr__(figure, name, value)
    return figure


register_node(Figure, _flattened, _unflattened)
