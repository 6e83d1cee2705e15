"""All scalars that a run published, as arrays by step."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fxtrain.core._checks import did_you_mean
from fxtrain.core._formats import pluralize, printable, truncate_middle
from fxtrain.core._history_view import history_table
from fxtrain.core._html import html_view, view
from fxtrain.core._patterns import by_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_TITLE = 46  # characters of a panel's title


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
    """All scalars that a run has published: a read-only mapping from names to ``Series``.

    A rewind removes the points of abandoned steps. That of an event, such as ``FitBegin.history``, is live: each read
    has the values of all events so far. On an accelerator, a read waits for the latest of them.

    Args:
        points: Steps and values by name, in the order of the steps.
        refresh: Called before each read, to bring ``points`` up to date.

    Example:
        >>> history = History({"train/loss": ([1, 2], [0.5, 0.25])})
        >>> float(history["train/loss"].values[-1])
        0.25
    """

    def __init__(
        self,
        points: _Points | None = None,
        refresh: Callable[[], object] | None = None,
    ) -> None:
        self._points: _Points = {} if points is None else points
        self._refresh = refresh

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

    def plot(self, *patterns: str) -> Figure:
        """Plots curves. In a notebook, return the figure from a cell to show it.

        Names that differ only in the prefix ``train/`` or ``eval/`` share a panel. Such panels come first. Values that
        are not finite leave a gap.

        Args:
            patterns: Shell patterns of the names to plot, such as ``"*/loss"``; all by default.

        Returns:
            A ``matplotlib.figure.Figure``.

        Raises:
            ImportError: If matplotlib is not installed.
            KeyError: If a pattern matches no name.

        Example:
            >>> history = History({"train/loss": ([1, 2], [0.5, 0.25]), "eval/loss": ([2], [0.5])})
            >>> [axes.get_title(loc="left") for axes in history.plot("*loss").axes]
            ['loss']
        """
        try:
            from matplotlib import pyplot  # because it registers how notebooks display figures
        except ImportError as error:
            raise ImportError("plot requires matplotlib. Install it: pip install 'fxtrain[plot]'.") from error
        plt: Any = pyplot  # its types are partly unknown
        panels = self._panels(patterns)
        columns = min(len(panels), 3)
        rows = -(-len(panels) // columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(4.5 * columns, 2.8 * rows), squeeze=False, sharex=True, layout="constrained"
        )
        plt.close(figure)  # otherwise a notebook shows it twice
        for index, axes in enumerate(grid.flat):
            if index < len(panels):
                self._draw(axes, panels[index], lowest=index + columns >= len(panels))
            else:
                axes.remove()
        return figure

    def _panels(self, patterns: tuple[str, ...]) -> list[list[str]]:
        """Returns the names of each panel's curves."""
        panels: dict[str, list[str]] = {}
        for pattern in patterns or ("*",):
            matching = fnmatch.filter(self, pattern)
            if not matching:
                raise KeyError(
                    f"expected a pattern of published names, got {pattern!r}, which matches none. Published: "
                    f"{self._published()}."
                )
            for name in sorted(matching, key=by_number):
                names = panels.setdefault(_shared(name), [])
                if name not in names:
                    names.append(name)
        return sorted(panels.values(), key=lambda names: len(names) == 1)

    def _published(self) -> str:
        return ", ".join(map(repr, self)) or "nothing"

    def _draw(self, axes: Any, names: list[str], *, lowest: bool) -> None:
        # Evaluations have few points, so draw them last, on top.
        for name in sorted(names, key=lambda name: name.startswith("eval/")):
            steps, values = self[name]
            evaluated = name.startswith("eval/")
            axes.plot(
                steps,
                np.where(np.isfinite(values), values, np.nan),
                color="tab:orange" if evaluated else "tab:blue",
                linewidth=2.0 if evaluated else 1.0,
                marker="o" if evaluated and len(steps) < 50 else "." if len(steps) < 50 else "",
                markersize=5,
                label=name,
            )
        title = _shared(names[0]) if len(names) > 1 else names[0]
        axes.set_title(truncate_middle(title, _MAX_TITLE), loc="left", fontsize="medium")
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.locator_params(axis="x", integer=True)
        axes.tick_params(colors="0.3", labelsize="small", labelbottom=lowest)
        if lowest:
            axes.set_xlabel("step", fontsize="small")
        if len(names) > 1:
            axes.legend(fontsize="small", frameon=False)
        if not any(np.isfinite(self[name].values).any() for name in names):
            axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color="0.3")

    def __repr__(self) -> str:
        rows = [
            f"  {printable(name)}: {len(self[name].steps)} points, last {self[name].values[-1]:.6g}" for name in self
        ]
        return "\n".join([f"History of {len(self)} curves", *rows])

    @html_view
    def _repr_html_(self) -> str:
        return view("History", history_table(self), note=pluralize(len(self), "curve"))


def _shared(name: str) -> str:
    return name.removeprefix("train/").removeprefix("eval/")
