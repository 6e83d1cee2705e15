"""Panels: which curves are drawn together, in which section, and by how many points."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from fxtrain.core import by_number
from fxtrain.report._kept import evenly, thinned
from fxtrain.report._run import Heights, Run

_POINTS = 1000  # of a curve
_LINES = 8  # of a panel: there are so many colors
_COLUMNS = 100  # of a heat map
_ROWS = 40  # of a heat map whose steps had different edges
_MAX_ROWS = 1000  # of a heat map; a canvas has a limit, and an eye a lower one

FIRST = "Curves"

# A curve is in the first section that has a prefix of its name; what belongs to none is in the first of all.
_SECTIONS = (
    (FIRST, ()),
    ("Gradients and weights", ("grad_", "update_ratio", "weights/", "train/activations/")),
    ("Guards", ("nan_guard/", "spike_guard/", "early_stopping/", "reduce_on_plateau/")),
    ("Speed and machine", ("throughput/", "memory/", "system/")),
)

# Names that differ in one part and are of one unit share a panel. The first group of the pattern is what a curve is
# called there. A name is tried as it is, and as "<its last part> of <the rest>".
_TOGETHER = tuple(
    (re.compile(pattern), title)
    for pattern, title in (
        (r"train/activations/(.+)/([^/]+)", r"activations: \2"),
        (r"train/activations/([^/]+)", "activations"),
        (r"(train|eval)/(.+)", r"\2"),
        (r"weights/(.+)/([^/]+)", r"weights: \2"),
        (r"(healthy|damping|amplifying|vanishing|exploding) of (.+)", r"\2: layers"),
        (r"(min|mean|max|total) of (grad_norm|grad_flow/gain|update_ratio)", r"\2"),
        (r"(?!frozen)(.+) of (grad_norm|grad_flow/gain|update_ratio)", r"\2 by layer"),
        (r"(auc|average_precision) of (.+)", r"\2"),
    )
)


def sections(run: Run) -> list[dict[str, Any]]:
    """The panels of a run by section: the loss first, then what the evaluations measure."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {title: {} for title, _ in _SECTIONS}
    for name in sorted(run.curves, key=_order):
        if name.endswith("/improved_by"):
            continue  # it is a mark
        title = next((t for t, starts in _SECTIONS if any(name.startswith(s) for s in starts)), FIRST)
        panel, label = _placed(name)
        steps, values = thinned(run.curves[name], _POINTS)
        found[title].setdefault(panel, []).append(
            {"name": label, "steps": steps, "values": [_short(value) for value in values]}
        )
    return [
        {"title": title, "panels": [part for panel, series in panels.items() for part in _parts(panel, series)]}
        for title, panels in found.items()
        if panels
    ]


def _order(name: str) -> tuple[Any, ...]:
    """Losses, other metrics, those that the training alone has, and last the rest; the training's before the other."""
    prefix, _, metric = name.partition("/")
    measured = prefix in ("train", "eval")
    return not measured, "loss" not in name, "" if measured else prefix, by_number(metric), prefix != "train"


def _placed(name: str) -> tuple[str, str]:
    """The panel that a curve is in, and what it is called there."""
    parent, _, last = name.rpartition("/")
    if last.startswith("gain_"):
        parent, last = f"{parent}/gain", last.removeprefix("gain_")
    for pattern, title in _TOGETHER:
        for written in (name, f"{last} of {parent}"):
            if fits := pattern.fullmatch(written):
                return fits.expand(title), fits[1]
    return name, name


def _parts(title: str, series: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(series) <= _LINES:
        return [{"title": title, "series": series}]
    count = math.ceil(len(series) / _LINES)
    each = math.ceil(len(series) / count)
    return [
        {"title": f"{title}, {index + 1} of {count}", "series": series[index * each : (index + 1) * each]}
        for index in range(count)
    ]


def _short(value: float) -> float | int | None:
    """As many digits as can be seen, as each is a byte of the page; None is a gap in the line."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def heat(found: list[tuple[int, Heights]]) -> dict[str, Any]:
    """Histograms as a heat map: one column a step, from the lowest bucket that anything is in to the highest."""
    columns = evenly(found, _COLUMNS)
    edges = columns[-1][1].edges
    if len(edges) > _MAX_ROWS or not all(np.array_equal(each.edges, edges) for _, each in columns):
        low, high = min(each.edges[0] for _, each in columns), max(each.edges[-1] for _, each in columns)
        edges = np.linspace(low, high, _ROWS + 1)
    counts = np.stack([_counted_between(edges, each) for _, each in columns])
    used = np.flatnonzero(counts.sum(0))
    first, last = (int(used[0]), int(used[-1])) if used.size else (0, len(edges) - 2)
    return {
        "steps": [step for step, _ in columns],
        "counts": [[_short(count) for count in row] for row in counts[:, first : last + 1].tolist()],
        "edges": [_short(edge) for edge in edges[first : last + 2].tolist()],
    }


def _counted_between(edges: np.ndarray, found: Heights) -> np.ndarray:
    """The counts between other edges than their own, as if each bucket were evenly filled."""
    if np.array_equal(edges, found.edges):
        return found.counts
    return np.diff(np.interp(edges, found.edges, np.concatenate([[0.0], np.cumsum(found.counts)])))
