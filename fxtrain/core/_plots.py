"""Plots of the histories of one or several runs, with Matplotlib."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import numpy as np

from fxtrain.core._checks import check_choice, describe
from fxtrain.core._formats import truncate_middle
from fxtrain.core._patterns import by_number, is_of_member

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fxtrain.core._history import History

XAxis = Literal["step", "epoch", "time"]

_LABELS = {"step": "step", "epoch": "epoch", "time": "time (s)"}
_MAX_TITLE = 46  # characters of a panel's title
_MAX_DOTS = 50  # points of a curve that are marked


class HasHistory(Protocol):
    """The result of a run."""

    @property
    def history(self) -> History: ...


class _Curve(NamedTuple):
    """A curve of a run.

    Args:
        run: The index of the run, which selects the color.
        label: The text in the legend.
        is_eval: Whether it is a metric of evaluations, which are few.
        x: float64 [n].
        y: float64 [n]. Values that are not finite leave a gap.
    """

    run: int
    label: str
    is_eval: bool
    x: np.ndarray
    y: np.ndarray


def plot(runs: Mapping[str, History | HasHistory], *patterns: str, log: bool = False, x: XAxis = "step") -> Figure:
    """Plots the curves of several runs, those of the same metric in one panel. In a notebook, return the figure.

    Each run has a color. Metrics of evaluations are drawn thick, with a mark at each point. Names that differ only in
    the prefix ``train/`` or ``eval/`` share a panel, and such panels come first.

    Args:
        runs: Results of ``fit`` or histories, by the name of the run in the legend.
        patterns: Shell patterns of the names to plot, such as ``"*/loss"``. By default all, except those of each member
            of a batch of runs, as ``"*/member_*"``.
        log: Whether values are on a logarithmic scale. Those of 0 and below leave a gap.
        x: The horizontal axis: ``"step"``, ``"epoch"`` or ``"time"``, the seconds since the session began.

    Returns:
        A ``matplotlib.figure.Figure``. Change its ``axes`` before it is shown.

    Raises:
        ImportError: If matplotlib is not installed.
        KeyError: If a pattern matches no name in any run.
        TypeError: If ``runs`` is not a mapping from names to results or histories.
        ValueError: If there are no runs, or ``x`` is unknown or was not recorded.

    Example:
        >>> import fxtrain as fx
        >>> runs = {
        ...     "adam": fx.History({"train/loss": ([1, 2], [0.5, 0.25])}),
        ...     "sgd": fx.History({"train/loss": ([1, 2], [0.5, 0.4])}),
        ... }
        >>> [axes.get_title(loc="left") for axes in fx.plot(runs, "*loss", log=True).axes]
        ['train/loss']
    """
    if not isinstance(runs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected runs to be a mapping from names to results, got {describe(runs)}. Pass a dict such as "
            '{"adam": result}, or use result.history.plot().'
        )
    if not runs:
        raise ValueError("expected at least one run to plot, got none.")
    histories = {str(name): _history_of(name, run) for name, run in runs.items()}
    return draw(histories, patterns, log=log, x=x)


def draw(histories: Mapping[str, History], patterns: Sequence[str], *, log: bool, x: XAxis) -> Figure:
    """Plots histories by the name of the run, which labels a curve if there are several."""
    check_choice("x", x, tuple(_LABELS))
    panels = _panels(histories, patterns)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, grid = new_figure(rows, columns, width=4.5 * columns, height=2.8 * rows)
    for index, axes in enumerate(grid.flat):
        if index < len(panels):
            _draw_panel(axes, histories, panels[index], log=log, x=x, is_lowest=index + columns >= len(panels))
        else:
            axes.remove()
    return figure


def new_figure(rows: int = 1, columns: int = 1, *, width: float, height: float) -> tuple[Any, Any]:
    """Returns a figure that a notebook shows once, and its axes as an array [rows, columns].

    Args:
        rows: The number of rows.
        columns: The number of columns.
        width: In inches. So is ``height``.
        height: In inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot  # because it registers how notebooks display figures
    except ImportError as error:
        raise ImportError("plot requires matplotlib. Install it: pip install 'fxtrain[plot]'.") from error
    plt: Any = pyplot  # its types are partly unknown
    figure, grid = plt.subplots(
        rows, columns, figsize=(width, height), squeeze=False, sharex=True, layout="constrained"
    )
    plt.close(figure)  # otherwise a notebook shows it twice
    return figure, grid


def style(axes: Any) -> None:
    """Gives axes the look of all plots: a light grid, no frame at the top and the right, and small numbers."""
    axes.grid(color="0.5", alpha=0.2, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="small")


def _history_of(name: str, run: object) -> History:
    history = getattr(run, "history", run)
    if not hasattr(history, "coordinates"):
        raise TypeError(
            f"expected a result or a history as run {name!r}, got {describe(run)}. Pass the result of fit, or its "
            "history."
        )
    return cast("History", history)


def _panels(histories: Mapping[str, History], patterns: Sequence[str]) -> list[list[str]]:
    """Returns the names of each panel's curves."""
    published = list(dict.fromkeys(name for history in histories.values() for name in history))
    panels: dict[str, list[str]] = {}
    by_default = [name for name in published if not is_of_member(name)]
    for pattern in patterns or ("*",):
        matching = fnmatch.filter(published if patterns else by_default, pattern)
        if not matching:
            raise KeyError(
                f"expected a pattern of published names, got {pattern!r}, which matches none. Published: "
                f"{', '.join(map(repr, sorted(published))) or 'nothing'}."
            )
        for name in sorted(matching, key=by_number):
            names = panels.setdefault(_shared(name), [])
            if name not in names:
                names.append(name)
    return sorted(panels.values(), key=lambda names: len(names) == 1)


def _draw_panel(
    axes: Any, histories: Mapping[str, History], names: list[str], *, log: bool, x: XAxis, is_lowest: bool
) -> None:
    curves = _curves(histories, names, x)
    # Evaluations have few points, so draw them last, on top.
    for curve in sorted(curves, key=lambda curve: curve.is_eval):
        shown = np.isfinite(curve.y) & ((curve.y > 0) | (not log))
        few = len(curve.y) < _MAX_DOTS
        axes.plot(
            curve.x,
            np.where(shown, curve.y, np.nan),
            # Of a single run, the color tells training from evaluation.
            color=f"C{curve.run}" if len(histories) > 1 else "tab:orange" if curve.is_eval else "tab:blue",
            linewidth=2.0 if curve.is_eval else 1.0,
            alpha=0.6 if len(histories) > 1 and len(names) > 1 and not curve.is_eval else 1.0,
            marker="o" if curve.is_eval and few else "." if few else "",
            markersize=5,
            label=curve.label,
        )
    title = truncate_middle(_shared(names[0]) if len(names) > 1 else names[0], _MAX_TITLE)
    both = len(names) > 1 and len(histories) > 1
    axes.set_title(f"{title} (thick: eval)" if both else title, loc="left", fontsize="medium")
    style(axes)
    if any((curve.y[np.isfinite(curve.y)] > 0).any() for curve in curves) and log:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    if x == "step":
        axes.locator_params(axis="x", integer=True)
    axes.tick_params(labelbottom=is_lowest)
    if is_lowest:
        axes.set_xlabel(_LABELS[x], fontsize="small")
    if len(curves) > 1 or len(histories) > 1:
        handles = {line.get_label(): line for line in axes.get_lines()}
        if len(histories) > 1:  # each run once, by its thickest curve
            handles = {run: handles[label] for run, label in _last_labels(histories, curves).items()}
        axes.legend(handles.values(), handles, fontsize="small", frameon=False)
    if not any(np.isfinite(curve.y).any() for curve in curves):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")


def _curves(histories: Mapping[str, History], names: list[str], x: XAxis) -> list[_Curve]:
    curves: list[_Curve] = []
    for index, (run, history) in enumerate(histories.items()):
        for name in names:
            if name in history:
                steps, values = history[name]
                at = history.coordinates(steps, x)
                if not np.isfinite(at).any():
                    raise ValueError(
                        f"expected a history with the {x} of its steps, got none for {run or 'the run'!r}. Plot it by "
                        "another x."
                    )
                label = name if len(histories) == 1 else run if len(names) == 1 else f"{run}: {name}"
                curves.append(_Curve(index, label, name.startswith("eval/"), at, values))
    return curves


def _last_labels(histories: Mapping[str, History], curves: list[_Curve]) -> dict[str, str]:
    """Returns the label of a curve of each run, that of an evaluation if there is one."""
    runs = list(histories)
    return {runs[curve.run]: curve.label for curve in sorted(curves, key=lambda curve: (curve.run, curve.is_eval))}


def _shared(name: str) -> str:
    return name.removeprefix("train/").removeprefix("eval/")
