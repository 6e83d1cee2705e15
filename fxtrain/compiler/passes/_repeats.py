"""Finds equal parts of a sequence that follow each other."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_MIN_SAVED = 64  # operations; a graph of its own takes as long to compile as some of them
MAX_CALLS = 32
"""The most parts of a run."""
_MAX_PERIODS = 32


class Run(NamedTuple):
    """Equal parts of a sequence that follow each other.

    Args:
        start: The index of the first part.
        period: The length of a part.
        repeats: The number of parts.
        slack: How many elements later the first part may start as well.
    """

    start: int
    period: int
    repeats: int
    slack: int


def runs(sequence: Sequence[int], operations: Sequence[int], work: Sequence[int], min_work: int) -> list[Run]:
    """Returns runs of a sequence that do not overlap, those with most operations first.

    Args:
        sequence: Numbers that are equal for equal elements.
        operations: The number of operations of each element.
        work: The work of each element.
        min_work: The least work of a part. Elements with less are taken together.
    """
    found: list[Run] = []
    todo = [(0, len(sequence))]
    while todo:
        start, stop = todo.pop()
        best, most = None, _MIN_SAVED
        for run in _all_runs(sequence, start, stop):
            part = slice(run.start, run.start + run.period)
            together = max(-(-min_work // max(sum(work[part]), 1)), -(-run.repeats // MAX_CALLS))
            repeats, left = divmod(run.repeats, together)
            saved = (repeats - 1) * together * sum(operations[part])
            if saved > most:
                slack = run.slack + left * run.period
                best, most = Run(run.start, run.period * together, repeats, slack), saved
        if best is not None:
            found.append(best)
            todo += [(start, best.start), (best.start + best.period * best.repeats + best.slack, stop)]
    return found


def _all_runs(sequence: Sequence[int], start: int, stop: int) -> Iterator[Run]:
    """Yields the runs in a range of a sequence, with the periods at which most elements repeat."""
    places: dict[int, list[int]] = {}
    for index in range(start, stop):
        places.setdefault(sequence[index], []).append(index)
    distances = Counter(
        later - earlier
        for some in places.values()
        for lag in (1, 2, 3)
        for earlier, later in zip(some, some[lag:], strict=False)
    )
    for period, _ in distances.most_common(_MAX_PERIODS):
        equal = (sequence[index] == sequence[index + period] for index in range(start, stop - period))
        at = start
        for is_equal, group in itertools.groupby(equal):
            length = sum(1 for _ in group)
            if is_equal and length >= period:
                yield Run(at, period, length // period + 1, length % period)
            at += length
