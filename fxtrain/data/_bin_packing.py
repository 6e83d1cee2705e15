"""Best-fit-decreasing packing of documents into rows of fixed capacity."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import numpy as np


class Bins:
    """A packing of all documents into rows of one capacity, by best-fit decreasing.

    Documents of equal length are interchangeable, so rows are grouped into kinds by the lengths that they contain. Time
    and memory grow with the number of distinct lengths, not with the number of documents.

    Args:
        counts: Number of documents of each length.
        capacity: Row length, at least that of the longest document.

    References:
        Krell et al., "Efficient sequence packing without cross-contamination", 2021.

    Example:
        >>> bins = Bins({5: 2, 3: 3, 2: 1}, 8)
        >>> bins.count, bins.slots(0), bins.slots(2)
        (3, [(5, 0), (3, 0)], [(3, 2), (2, 0)])
    """

    def __init__(self, counts: Mapping[int, int], capacity: int) -> None:
        kinds = _best_fit_decreasing(counts, capacity)
        self._contents = [tuple(contents.items()) for contents, _ in kinds]
        self._ends = np.cumsum([rows for _, rows in kinds])
        self.count = int(self._ends[-1]) if kinds else 0
        """Number of rows."""
        self._first: list[dict[int, int]] = []  # per kind and length, the first document's index
        used: dict[int, int] = {}
        for contents, rows in kinds:
            self._first.append({length: used.get(length, 0) for length in contents})
            for length, held in contents.items():
                used[length] = used.get(length, 0) + held * rows

    def slots(self, row: int) -> list[tuple[int, int]]:
        """Returns a row's documents, as pairs of the length and the index among the documents of that length."""
        kind = int(np.searchsorted(self._ends, row, side="right"))
        nth = row - (int(self._ends[kind - 1]) if kind else 0)
        return [
            (length, self._first[kind][length] + nth * held + each)
            for length, held in self._contents[kind]
            for each in range(held)
        ]


def _best_fit_decreasing(counts: Mapping[int, int], capacity: int) -> list[tuple[dict[int, int], int]]:
    """Returns the kinds of rows: the number of documents of each length in a row, and the number of such rows."""
    by_space: dict[int, list[tuple[dict[int, int], int]]] = {}
    spaces: list[int] = []  # the keys of by_space, ascending

    def insert(space: int, contents: dict[int, int], rows: int) -> None:
        if space not in by_space:
            bisect.insort(spaces, space)
        by_space.setdefault(space, []).append((contents, rows))

    for length in sorted(counts, reverse=True):
        left = counts[length]
        while left:
            at = bisect.bisect_left(spaces, length)  # the smallest space that fits
            if at == len(spaces):
                held = min(capacity // length, left)
                rows = left // held
                insert(capacity - held * length, {length: held}, rows)
                left -= rows * held
                continue
            space = spaces[at]
            contents, there = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
            held = min(space // length, left)
            rows = min(left // held, there)
            insert(space - held * length, {**contents, length: held}, rows)
            if rows < there:
                insert(space, contents, there - rows)
            left -= rows * held
    return [kind for space in spaces for kind in by_space[space]]
