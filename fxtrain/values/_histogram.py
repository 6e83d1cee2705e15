"""Distributions of values, given by the values or by counts."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from fxtrain.core import describe
from fxtrain.core._html import html_view
from fxtrain.values._nodes import on_host, register_value


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Histogram:
    """A distribution of values, given by the values themselves or by the number of values between edges.

    Counting on the device and logging counts and edges avoids copying every value to the host.

    Args:
        values: Real tensor of any shape.
        counts: Real tensor [n], in place of ``values``: the number of values in each bucket.
        edges: Real tensor [n + 1], increasing: the boundaries of the buckets.

    Raises:
        TypeError: An argument is not a real tensor.
        ValueError: The arguments are neither ``values`` nor ``counts`` with ``edges``, or shapes do not match.

    Example:
        >>> import torch
        >>> Histogram(counts=torch.tensor([1, 3]), edges=torch.tensor([0.0, 0.5, 1.0]))
        Histogram of 2 buckets
    """

    values: Tensor | None = None
    counts: Tensor | None = dataclasses.field(default=None, kw_only=True)
    edges: Tensor | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        given = {name: value for name in _HISTOGRAM if (value := getattr(self, name)) is not None}
        if tuple(given) not in (("values",), ("counts", "edges")):
            names = " and ".join(given) or "nothing"
            raise ValueError(
                f"expected Histogram of values, or of counts and edges, got {names}. Pass the values: "
                "Histogram(values)."
            )
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.is_complex():
                raise TypeError(f"expected {name} of Histogram to be a real tensor, got {describe(value)}.")
        if self.counts is not None and self.edges is not None:
            counts, edges = list(self.counts.shape), list(self.edges.shape)
            if len(counts) != 1 or edges != [counts[0] + 1]:
                raise ValueError(f"expected counts of shape [n] and edges of shape [n + 1], got {counts} and {edges}.")

    def buckets(self, num: int = 30) -> tuple[np.ndarray, np.ndarray]:
        """Returns the counts (float64 [n]) and the edges (float64 [n + 1]) on the host.

        Args:
            num: The number of buckets for ``values``. Non-finite values are not counted.

        Raises:
            ValueError: The edges do not increase.
        """
        # Computed once for all writers.
        known: dict[int, tuple[np.ndarray, np.ndarray]] = vars(self).setdefault("_known", {})
        if num not in known:
            known[num] = self._counted(num)
        return known[num]

    def _counted(self, num: int) -> tuple[np.ndarray, np.ndarray]:
        if self.values is not None:
            values = on_host(self.values).reshape(-1)
            values = values[np.isfinite(values)]
            counts, edges = np.histogram(values, bins=num, range=_range(values, num))
            return counts.astype(np.float64), edges
        assert self.counts is not None
        assert self.edges is not None
        counts, edges = on_host(self.counts).astype(np.float64), on_host(self.edges).astype(np.float64)
        if not (np.diff(edges) > 0).all():
            raise ValueError(f"expected edges to increase, got {np.array2string(edges, threshold=8)}.")
        return counts, edges

    def spread(self, most: int = 1000) -> np.ndarray:
        """Returns values with this distribution, on the host: float64 [n].

        Args:
            most: The approximate maximum of n if only counts are known. Values are spaced evenly within a bucket.
        """
        if self.values is not None:
            return on_host(self.values).reshape(-1).astype(np.float64)
        counts, edges = self.buckets()
        shares = np.round(counts * min(1.0, most / max(counts.sum(), 1.0))).astype(int)
        parts = [
            np.linspace(low, high, 2 * share + 1)[1::2]
            for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True)
            if share
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def __repr__(self) -> str:
        if self.values is not None:
            return f"Histogram of values of shape {list(self.values.shape)}"
        return f"Histogram of {len(self.counts) if self.counts is not None else 0} buckets"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.values._views import histogram_view

        return histogram_view(self)


_HISTOGRAM = ("values", "counts", "edges")


def _range(values: np.ndarray, num: int) -> tuple[float, float]:
    """Returns the range of the values, widened where floating-point precision cannot separate the edges."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if high - low > 1e-12 * num * largest:
        return low, high
    room = max(0.5, 1e-6 * num * largest)
    return low - room, high + room


register_value(Histogram, *_HISTOGRAM)
