"""All scalars that a run published, as arrays by step."""

from __future__ import annotations

import bisect
import fnmatch
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fxtrain.core import by_number, did_you_mean, printable, truncate_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCALARS = (int, float)
_MAX_TITLE = 46  # characters of a panel's title


class Series(NamedTuple):
    """The published values of one name.

    Args:
        steps: int64 [n], strictly increasing.
        values: float64 [n].

    Example:
        >>> history = History()
        >>> history.add(10, {"eval/loss": 0.5})
        >>> history["eval/loss"]
        Series(steps=array([10]), values=array([0.5]))
    """

    steps: np.ndarray
    values: np.ndarray


class History(Mapping[str, Series]):
    """A mapping from names to ``Series``, recorded by ``fit``. A rewind removes the points of abandoned steps.

    Example:
        >>> history = History()
        >>> history.add(10, {"eval/loss": 0.5})
        >>> history["eval/loss"].values.tolist()
        [0.5]
    """

    def __init__(self) -> None:
        self._points: dict[str, tuple[list[int], list[float]]] = {}

    def add(self, step: int, values: Mapping[str, object]) -> None:
        """Adds the scalars among published values. A later value of the same name and step replaces the earlier one.

        Args:
            step: Step of the values.
            values: Published values by name. Values that are not ints or floats are ignored.
        """
        for name, value in values.items():
            if isinstance(value, _SCALARS):
                points = self._points.get(name)
                if points is None:
                    points = self._points[name] = ([], [])
                steps, recorded = points
                if not steps or step > steps[-1]:
                    steps.append(step)
                    recorded.append(value)
                    continue
                # Steps can repeat or arrive out of order: a second evaluation, or a save reported later.
                index = bisect.bisect_left(steps, step)
                if steps[index] != step:
                    steps.insert(index, step)
                    recorded.insert(index, value)
                recorded[index] = value

    def forget_after(self, last: int) -> None:
        """Removes the points of later steps."""
        for steps, values in self._points.values():
            kept = sum(step <= last for step in steps)
            del steps[kept:], values[kept:]

    def __getitem__(self, name: str) -> Series:
        if name not in self._points:
            raise KeyError(
                f"expected a published name, got {name!r}.{did_you_mean(name, self)} Published: {self._published()}."
            )
        steps, values = self._points[name]
        return Series(np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._points))

    def __len__(self) -> int:
        return len(self._points)

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
            >>> history = History()
            >>> for step in (1, 2, 3):
            ...     history.add(step, {"train/loss": 1 / step, "eval/loss": 2 / step})
            >>> [axes.get_title(loc="left") for axes in history.plot("*loss").axes]
            ['loss']
        """
        try:
            import matplotlib.pyplot as plt  # pyplot, because it registers how notebooks display figures
        except ImportError as error:
            raise ImportError("plot requires matplotlib. Install it: pip install 'fxtrain[plot]'.") from error
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

    def _draw(self, axes: Axes, names: list[str], *, lowest: bool) -> None:
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


def _shared(name: str) -> str:
    return name.removeprefix("train/").removeprefix("eval/")
