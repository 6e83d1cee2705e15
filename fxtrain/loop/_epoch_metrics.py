"""Means of the training metrics over an epoch, summed on the host without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fxtrain import metrics, tree
from fxtrain.core import EPOCH_METRICS, Metrics, StepOutput, TrainState, wide_dtype
from fxtrain.loop._transfer import start_copy
from fxtrain.metrics._members import MemberValues

_STEPS_PER_TRANSFER = 64
_NUMBERS = (int, float)

_Row = tuple[Metrics, Tensor | None]
"""The metrics of a step, and the weight of those that are tensors."""


class _Stored(NamedTuple):
    """A merged metric of a checkpoint, which stores no class."""

    leaves: list[Tensor]
    values: dict[str, Tensor]
    is_mean: bool  # the mean of each member of a batch of runs


class EpochMetrics:
    """The metrics of an epoch so far.

    Steps are summed in order, one by one and in float64, so a mean does not depend on where sessions begin and end.
    Weights are those of ``fxtrain.metrics.lift``: 1, or the weight that ``fxtrain.weighted`` gives the loss of a step.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # weighted total and weight of each tensor
        self._merged: dict[str, metrics.Metric | _Stored] = {}
        self._unread: list[_Row] = []
        self._sent: list[_Row] = []
        self._arrived: Callable[[], list[object]] | None = None  # returns the values of the rows in `_sent`

    def copy(self) -> Self:
        """Returns a copy, which later steps do not change. Nothing is read from the device."""
        copied = type(self)()
        copied.__dict__.update(self.__dict__)
        copied._sums, copied._merged, copied._unread = dict(self._sums), dict(self._merged), list(self._unread)
        return copied

    def add(self, outputs: Iterable[StepOutput]) -> None:
        """Adds steps. Their values are copied to the host in groups, and summed when the next group is copied."""
        for output in outputs:
            self._unread.append((output.metrics, output.weight))
        if len(self._unread) >= _STEPS_PER_TRANSFER:
            self._send()

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the means by name: float64 [], or what a metric computes. Waits for the device.

        A metric without weight, such as one of an epoch whose steps all have weight 0, is left out.
        """
        self._read()
        dtype = wide_dtype(device)
        means = {name: torch.tensor(total / count, dtype=dtype) for name, (total, count) in self._sums.items()}
        for name, metric in self._merged.items():
            means |= metric.values if isinstance(metric, _Stored) else metrics.compute({name: metric})
        # Sorted, because a checkpoint does not store the order.
        return {name: means[name].to(device) for name in sorted(means)}

    def added_to(self, state: TrainState) -> TrainState:
        """Returns the state with the sums in a slot, unless there are none. Waits for the device."""
        self._read()
        device = state.step.device
        slot: dict[str, Any] = {}
        if self._sums:
            slot["sums"] = {name: torch.tensor(pair, dtype=wide_dtype(device)) for name, pair in self._sums.items()}
        for name, metric in self._merged.items():
            stored = metric if isinstance(metric, _Stored) else _stored(name, metric)
            kind = slot.setdefault("means" if stored.is_mean else "merged", {})
            kind[name] = {"leaves": stored.leaves, "values": stored.values}
        copied = tree.map(lambda leaf: leaf.to(device, non_blocking=True, copy=True), slot)
        return state.with_slot(EPOCH_METRICS, copied) if slot else state

    @classmethod
    def from_slot(cls, slot: Mapping[str, Any] | None) -> Self:
        """Returns the sums of a slot, or those of no steps."""
        found, slot = cls(), slot or {}
        found._sums = {name: tuple(pair.tolist()) for name, pair in slot.get("sums", {}).items()}
        found._merged = {
            name: _Stored([leaf.cpu() for leaf in stored["leaves"]], stored["values"], is_mean=kind == "means")
            for kind in ("means", "merged")
            for name, stored in slot.get(kind, {}).items()
        }
        return found

    def _send(self) -> None:
        """Sums the values that were sent, and starts copying the others to the host."""
        if self._arrived is not None:
            self._sum(self._sent, iter(self._arrived()))
        values: list[object] = []
        for measured, weight in self._unread:
            values.append(1.0 if weight is None else weight)
            for value in measured.values():
                if isinstance(value, metrics.Metric):
                    values += tree.leaves(value)
                else:
                    values.append(value)
        self._sent, self._unread, self._arrived = self._unread, [], start_copy(values)

    def _read(self) -> None:
        self._send()
        self._send()

    def _sum(self, rows: list[_Row], values: Iterator[Any]) -> None:
        sums, none = self._sums, (0.0, 0.0)
        for measured, _ in rows:
            weight = next(values)
            for name, value in measured.items():
                if isinstance(value, metrics.Metric):
                    leaves = [_on_host(next(values), leaf.dtype) for leaf in tree.leaves(value)]
                    self._merge(name, tree.unflatten(tree.structure(value), leaves))
                    continue
                scalar = next(values)
                if weight > 0 and isinstance(scalar, _NUMBERS):
                    total, count = sums.get(name, none)
                    sums[name] = (total + scalar * weight, count + weight)

    def _merge(self, name: str, metric: metrics.Metric) -> None:
        before = self._merged.get(name)
        if isinstance(before, _Stored):
            before = tree.unflatten(tree.structure(metric), before.leaves)
        self._merged[name] = metric if before is None else before.merge(metric)


def _stored(name: str, metric: metrics.Metric) -> _Stored:
    return _Stored(tree.leaves(metric), metrics.compute({name: metric}), isinstance(metric, MemberValues))


def _on_host(value: Any, dtype: torch.dtype) -> Tensor:
    """Returns a leaf of a metric on the host, of which only scalars were copied in a group."""
    return value.cpu() if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
