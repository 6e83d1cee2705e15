"""Groups curves into panels and sections, and converts curves and histograms to JSON data for the page."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from fxtrain.core import by_number
from fxtrain.report._downsampling import Curve, evenly, thinned
from fxtrain.report._run import Heights, Run

_MAX_CURVE_POINTS, _MIN_CURVE_POINTS = 2000, 100
_MAX_PAGE_POINTS = 2**18  # in all curves of a page; a point takes about 15 bytes
_MAX_CLOCK_POINTS = 500
_MAX_PANEL_CURVES = 8  # of one run, each with its own color
_MAX_HEATMAP_COLUMNS = 100
_REBINNED_HEATMAP_ROWS = 40  # where histograms have different edges
_MAX_HEATMAP_ROWS = 1000  # a canvas has a size limit

FIRST = "Curves"

# A curve belongs to the first section with a prefix of its name, or to FIRST if there is none.
_SECTION_PREFIXES = (
    (FIRST, ()),
    ("Gradients and weights", ("grad_", "update_ratio", "weights/", "train/activations/")),
    ("Guards", ("nan_guard/", "spike_guard/", "early_stopping/", "reduce_on_plateau/")),
    ("Speed and machine", ("throughput/", "memory/", "system/")),
)

# Curves of one unit whose names differ in one part share a panel. The first group of the pattern is the curve's label.
# Patterns are matched against the name, and against "<last part> of <the rest>". In a comparison of runs, colors are
# runs, and only the patterns of _COMPARED_PANELS apply.
_TRAIN_AND_EVAL = (r"(train|eval)/(.+)", r"\2")
_COMPARED_PANELS = ((re.compile(_TRAIN_AND_EVAL[0]), _TRAIN_AND_EVAL[1]),)
_SHARED_PANELS = tuple(
    (re.compile(pattern), title)
    for pattern, title in (
        (r"train/activations/(.+)/([^/]+)", r"activations: \2"),
        (r"train/activations/([^/]+)", "activations"),
        (r"train/learning_rate/(.+)", "learning_rate"),
        _TRAIN_AND_EVAL,
        (r"(\d+) of eval_batch/(.+)", r"\2 by evaluation batch"),
        (r"weights/(.+)/([^/]+)", r"weights: \2"),
        (r"(healthy|damping|amplifying|vanishing|exploding) of (.+)", r"\2: layers"),
        (r"(min|mean|max|total) of (grad_norm|grad_flow/gain|update_ratio)", r"\2"),
        (r"(?!frozen)(.+) of (grad_norm|grad_flow/gain|update_ratio)", r"\2 by layer"),
        (r"(auc|average_precision) of (.+)", r"\2"),
    )
)


def sections(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Returns the sections of all runs with their panels, losses first and then other metrics."""
    found: dict[str, dict[str, list[dict[str, object]]]] = {title: {} for title, _ in _SECTION_PREFIXES}
    patterns = _SHARED_PANELS if len(runs) == 1 else _COMPARED_PANELS
    count = max(1, sum(len(run.curves) for run in runs))
    most = min(_MAX_CURVE_POINTS, max(_MIN_CURVE_POINTS, _MAX_PAGE_POINTS // count))
    for name in sorted({name for run in runs for name in run.curves}, key=_order):
        if name.endswith("/improved_by"):
            continue  # shown as marks
        title = next((t for t, starts in _SECTION_PREFIXES if any(name.startswith(s) for s in starts)), FIRST)
        panel, label = _panel_and_label(name, patterns)
        for index, run in enumerate(runs):
            if name in run.curves:
                steps, values = thinned(run.curves[name], most)
                found[title].setdefault(panel, []).append(
                    {"run": index, "name": label, "steps": steps, "values": [_rounded(value) for value in values]}
                )
    most_curves = _MAX_PANEL_CURVES if len(runs) == 1 else 2 * len(runs)
    return [
        {
            "title": title,
            "panels": [part for panel, series in panels.items() for part in _split(panel, series, most_curves)],
        }
        for title, panels in found.items()
        if panels
    ]


def clocks(run: Run) -> dict[str, Curve]:
    """Returns the epoch and the time in seconds at selected steps, which the page interpolates for other steps."""
    found: dict[str, Curve] = {}
    for name, (steps, values) in run.clocks.items():
        finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if finite:
            steps, values = thinned(([step for step, _ in finite], [value for _, value in finite]), _MAX_CLOCK_POINTS)
            # Never decreases, although the clock of a machine may be set back.
            found[name] = steps, [float(f"{value:.9g}") for value in itertools.accumulate(values, max)]
    return found


def _order(name: str) -> tuple[object, ...]:
    """Returns the sort key of a curve: losses, then other metrics of training and evaluation, then all others.

    Of two curves for the same metric, the one of training comes first.
    """
    prefix, _, metric = name.partition("/")
    measured = prefix in ("train", "eval")
    return not measured, "loss" not in name, "" if measured else prefix, by_number(metric), prefix != "train"


def _panel_and_label(name: str, patterns: Sequence[tuple[re.Pattern[str], str]]) -> tuple[str, str]:
    """Returns the title of a curve's panel and the curve's label."""
    parent, _, last = name.rpartition("/")
    if last.startswith("gain_"):
        parent, last = f"{parent}/gain", last.removeprefix("gain_")
    for pattern, title in patterns:
        for written in (name, f"{last} of {parent}"):
            if fits := pattern.fullmatch(written):
                return fits.expand(title), fits[1]
    return name, name


def _split(title: str, series: list[dict[str, object]], most: int) -> list[dict[str, object]]:
    if len(series) <= most:
        return [{"title": title, "series": series}]
    count = math.ceil(len(series) / most)
    each = math.ceil(len(series) / count)
    return [
        {"title": f"{title}, {index + 1} of {count}", "series": series[index * each : (index + 1) * each]}
        for index in range(count)
    ]


def _rounded(value: float) -> float | int | None:
    """Rounds a value to visible precision, because each digit is a byte of the page. Returns None if not finite."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def heat(found: list[tuple[int, Heights]]) -> dict[str, object]:
    """Converts histograms to a heat map with one column per step, without empty buckets at both ends."""
    columns = evenly(found, _MAX_HEATMAP_COLUMNS)
    edges = columns[-1][1].edges
    if len(edges) > _MAX_HEATMAP_ROWS or not all(np.array_equal(each.edges, edges) for _, each in columns):
        low, high = min(each.edges[0] for _, each in columns), max(each.edges[-1] for _, each in columns)
        edges = np.linspace(low, high, _REBINNED_HEATMAP_ROWS + 1)
    counts = np.stack([_rebinned(edges, each) for _, each in columns])
    used = np.flatnonzero(counts.sum(0))
    first, last = (int(used[0]), int(used[-1])) if used.size else (0, len(edges) - 2)
    return {
        "steps": [step for step, _ in columns],
        "counts": [[_rounded(count) for count in row] for row in counts[:, first : last + 1].tolist()],
        "edges": [_rounded(edge) for edge in edges[first : last + 2].tolist()],
    }


def _rebinned(edges: np.ndarray, found: Heights) -> np.ndarray:
    """Returns the counts rebinned to other edges, assuming uniform density within each bucket."""
    if np.array_equal(edges, found.edges):
        return found.counts
    return np.diff(np.interp(edges, found.edges, np.concatenate([[0.0], np.cumsum(found.counts)])))
