"""All scalars that a run published, as arrays by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fxtrain.core._checks import did_you_mean
from fxtrain.core._formats import pluralize, printable
from fxtrain.core._html import html_view, view
from fxtrain.core._plots import XAxis, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame  # pyright: ignore

_MAX_SHOWN = 50  # curves in a repr

_Points = Mapping[str, tuple[Sequence[int], Sequence[float]]]


class Series(NamedTuple):
    """The published values of one name.

    Args:
        steps: int64 [n], strictly increasing.
        values: float64 [n].

    Example:
        >>> History({"eval/loss": ([10], [0.5])})["eval/loss"]
        Series(steps=array([10]), values=array([0.5]))
    """

    steps: np.ndarray
    values: np.ndarray


class History(Mapping[str, Series]):
    """All scalars that a session of a run has published: a read-only mapping from names to ``Series``.

    A rewind removes the points of abandoned steps. That of an event, such as ``FitBegin.history``, is live: each read
    has the values of all events so far. On an accelerator, a read waits for the latest of them.

    Args:
        points: Steps and values by name, in the order of the steps.
        refresh: Called before each read, to bring ``points`` up to date.
        clock: Maps steps, int64 [n], to ``{"epoch": float64 [n], "time": float64 [n]}``, with NaN where unknown.

    Example:
        >>> history = History({"train/loss": ([1, 2], [0.5, 0.25])})
        >>> float(history["train/loss"].values[-1])
        0.25
    """

    def __init__(
        self,
        points: _Points | None = None,
        refresh: Callable[[], object] | None = None,
        clock: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        self._points: _Points = {} if points is None else points
        self._refresh, self._clock = refresh, clock

    def _refreshed(self) -> _Points:
        if self._refresh is not None:
            self._refresh()
        return self._points

    def __getitem__(self, name: str) -> Series:
        points = self._refreshed()
        if name not in points:
            raise KeyError(
                f"expected a published name, got {name!r}.{did_you_mean(name, self)} Published: {self._published()}."
            )
        steps, values = points[name]
        return Series(np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._refreshed()))

    def __len__(self) -> int:
        return len(self._refreshed())

    def frame(self) -> DataFrame:  # pyright: ignore -- optional
        """Returns all points as a pandas DataFrame, with one row for each step at which something was published.

        Returns:
            The columns ``step`` (int64), ``epoch`` (fractional), ``time`` (seconds since the session began), and one
            for each name. A value that was not published at a step is NaN, and so is an epoch of unknown length.

        Raises:
            ImportError: If pandas is not installed.

        Example:
            >>> history = History({"train/loss": ([1, 2], [0.5, 0.25]), "eval/loss": ([2], [0.75])})
            >>> print(history.frame().to_string(index=False))
             step  epoch  time  eval/loss  train/loss
                1    NaN   NaN        NaN        0.50
                2    NaN   NaN       0.75        0.25
        """
        try:
            import pandas  # pyright: ignore
        except ImportError as error:
            raise ImportError("frame requires pandas. Install it: pip install 'fxtrain[frame]'.") from error
        series = {name: self[name] for name in self}
        steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.steps for each in series.values())]))
        columns = {"step": steps, **{axis: self.coordinates(steps, axis) for axis in ("epoch", "time")}}
        for name, (at, values) in series.items():
            columns[name] = np.full(len(steps), np.nan)
            columns[name][np.searchsorted(steps, at)] = values
        return pandas.DataFrame(columns)  # pyright: ignore

    def coordinates(self, steps: np.ndarray, axis: XAxis) -> np.ndarray:
        """Returns where steps are on an axis of a plot.

        Args:
            steps: int64 [n].
            axis: ``"step"``, ``"epoch"`` (fractional) or ``"time"`` (seconds since the session began).

        Returns:
            float64 [n], or the steps themselves. NaN where it is unknown.
        """
        if axis == "step":
            return steps
        return np.full(len(steps), np.nan) if self._clock is None else self._clock(steps)[axis]

    def plot(self, *patterns: str, log: bool = False, x: XAxis = "step") -> Figure:
        """Plots curves. In a notebook, return the figure from a cell to show it. ``fxtrain.plot`` compares runs.

        Names that differ only in the prefix ``train/`` or ``eval/`` share a panel. Such panels come first. Values that
        are not finite leave a gap.

        Args:
            patterns: Shell patterns of the names to plot, such as ``"*/loss"``. By default all, except those of each
                member of a batch of runs, as ``"*/member_*"``.
            log: Whether values are on a logarithmic scale. Those of 0 and below leave a gap.
            x: The horizontal axis: ``"step"``, ``"epoch"`` or ``"time"``, the seconds since the session began.

        Returns:
            A ``matplotlib.figure.Figure``.

        Raises:
            ImportError: If matplotlib is not installed.
            KeyError: If a pattern matches no name.
            ValueError: If ``x`` is unknown or was not recorded.

        Example:
            >>> history = History({"train/loss": ([1, 2], [0.5, 0.25]), "eval/loss": ([2], [0.5])})
            >>> [axes.get_title(loc="left") for axes in history.plot("*loss").axes]
            ['loss']
        """
        return draw({"": self}, patterns, log=log, x=x)

    def _published(self) -> str:
        return ", ".join(map(repr, self)) or "nothing"

    def __repr__(self) -> str:
        rows = [
            f"  {printable(name)}: {len(self[name].steps)} points, last {self[name].values[-1]:.6g}"
            for name in itertools.islice(self, _MAX_SHOWN)
        ]
        more = [f"  and {len(self) - _MAX_SHOWN} more"] if len(self) > _MAX_SHOWN else []
        return "\n".join([f"History of {len(self)} curves", *rows, *more])

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.core._history_view import history_table  # loaded only in notebooks

        return view("History", history_table(self), note=pluralize(len(self), "curve"))
