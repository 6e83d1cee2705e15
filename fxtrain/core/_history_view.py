"""HTML of a history: a row with a small curve for each name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxtrain.core._formats import format_number
from fxtrain.core._html import Html, Number, left_out, table
from fxtrain.core._patterns import by_number

if TYPE_CHECKING:
    from fxtrain.core._history import History, Series

_MAX_SHOWN = 40  # curves
_MAX_POINTS = 120  # of a drawn curve
_WIDTH, _HEIGHT = 120, 22  # pixels of a drawn curve


def history_table(history: History) -> Html:
    """Returns a table of the curves of a history, those of evaluations first."""
    names = sorted(history, key=lambda name: (not name.startswith("eval/"), *by_number(name)))
    rows = [_row(name, history[name]) for name in names[:_MAX_SHOWN]]
    heads = ("name", "curve", "first", "last", "min", "max", "points")
    return Html((table(heads, rows) if rows else "") + left_out(len(names) - _MAX_SHOWN, "curve"))


def _row(name: str, series: Series) -> tuple[object, ...]:
    known = series.values[~np.isnan(series.values)]
    ends = (series.values[0], series.values[-1], *((known.min(), known.max()) if len(known) else (np.nan, np.nan)))
    return (name, _curve(series), *(Number(format_number(float(value))) for value in ends), len(series.values))


def _curve(series: Series) -> Html:
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if len(values) < 2:
        return Html()
    chosen = np.unique(np.linspace(0, len(values) - 1, _MAX_POINTS).astype(int))
    steps, values = steps[chosen], values[chosen]
    low, high = values.min() / 2, values.max() / 2  # halved, because the range of floats is wider than a float
    across = (steps - steps[0]) / (steps[-1] - steps[0]) * _WIDTH
    down = (
        (1 - (values / 2 - low) / (high - low)) * (_HEIGHT - 2) + 1 if high > low else np.full(len(values), _HEIGHT / 2)
    )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return Html(f'<svg role="img" {size}><polyline points="{points}" fill="none" stroke-width="1.5"/></svg>')
