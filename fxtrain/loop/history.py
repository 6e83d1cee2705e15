"""History: every number that a run published, as arrays by step."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Series(NamedTuple):
    """One curve."""

    steps: np.ndarray  # int64 [n], increasing
    values: np.ndarray  # float64 [n]


class History(Mapping[str, Series]):
    """A mapping from names to curves, recorded by ``fit``. A rewind takes back what it abandons.

    Example:
        >>> history = History()
        >>> history.add(10, {"eval/loss": 0.5})
        >>> history["eval/loss"].values.tolist()
        [0.5]
    """

    def __init__(self) -> None:
        self._points: dict[str, tuple[list[int], list[float]]] = {}

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the numbers among what was published at a step."""
        for name, value in values.items():
            if isinstance(value, int | float):
                points = self._points.get(name)
                if points is None:
                    points = self._points[name] = ([], [])
                points[0].append(step)
                points[1].append(value)

    def forget_after(self, last: int) -> None:
        """Takes back what was published at later steps."""
        for steps, values in self._points.values():
            kept = sum(step <= last for step in steps)
            del steps[kept:], values[kept:]

    def __getitem__(self, name: str) -> Series:
        if name not in self._points:
            raise KeyError(f"{name!r} was not published; there are {', '.join(map(repr, self)) or 'no curves'}.")
        steps, values = self._points[name]
        return Series(np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._points))

    def __len__(self) -> int:
        return len(self._points)

    def plot(self, *patterns: str) -> Any:
        """Draws the curves; in a notebook, what the cell returns is shown.

        ``train/loss`` and ``eval/loss`` share a panel, as do others that differ in that alone.

        Args:
            patterns: Of the names to draw, ``"*/loss"`` say; by default all.

        Returns:
            A ``matplotlib.figure.Figure``.

        Raises:
            ImportError: If matplotlib is not there.
            KeyError: If a pattern matches no curve.

        Example:
            >>> history = History()
            >>> for step in (1, 2, 3):
            ...     history.add(step, {"train/loss": 1 / step, "eval/loss": 2 / step})
            >>> [axes.get_title() for axes in history.plot("*loss").axes]
            ['loss']
        """
        try:
            import matplotlib.pyplot as plt  # which tells a notebook how to show figures
        except ImportError as error:
            raise ImportError("plot draws with matplotlib, which is not there: pip install 'fxtrain[plot]'.") from error
        panels: dict[str, list[str]] = {}
        for pattern in patterns or ("*",):
            matching = fnmatch.filter(self, pattern)
            if not matching:
                raise KeyError(f"No curve is called {pattern!r}; there are {', '.join(map(repr, self)) or 'none'}.")
            for name in matching:
                names = panels.setdefault(name.removeprefix("train/").removeprefix("eval/"), [])
                if name not in names:
                    names.append(name)
        columns = min(len(panels), 3)
        rows = -(-len(panels) // columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(4.5 * columns, 3 * rows), squeeze=False, layout="constrained"
        )
        plt.close(figure)  # else a notebook shows it twice
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
            for name in names:
                few = len(self[name].steps) < 50
                axes.plot(*self[name], marker="." if few else "", label=name)
            axes.set(title=title, xlabel="step")
            if len(names) > 1:
                axes.legend()
        return figure

    def __repr__(self) -> str:
        rows = [f"  {name}: {len(self[name].steps)} points, last {self[name].values[-1]:.6g}" for name in self]
        return "\n".join([f"History of {len(self)} curves", *rows])
