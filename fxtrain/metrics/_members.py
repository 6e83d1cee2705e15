"""Metrics of many runs that are trained as one: one value for each member, published with a summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxtrain.core import Tree, wide_dtype
from fxtrain.core._members import summary_of
from fxtrain.metrics._by_name import lift
from fxtrain.metrics._metric import Metric

_vmap: Any = torch.func.vmap


class MemberValues(Metric):
    """A 0-d metric of each member's step, and its mean over steps.

    It computes the mean, ``min`` and ``max`` over the members whose value is finite, and ``member_<index>`` for each.

    Args:
        values: [members]. The values of the last step.
        total: float64 [members]. The weighted sum over steps.
        weight: float64 [members]. The sum of the weights; 0 for a member that has not trained.

    Example:
        >>> first = MemberValues.of(torch.tensor([1.0, 2.0]), torch.tensor([True, True]), 1.0)
        >>> later = first.merge(MemberValues.of(torch.tensor([3.0, 9.0]), torch.tensor([True, False]), 1.0))
        >>> {name: float(value) for name, value in later.compute().items()}
        {'': 2.0, 'min': 2.0, 'max': 2.0, 'member_0': 2.0, 'member_1': 2.0}
    """

    values: Tensor
    total: Tensor
    weight: Tensor

    @classmethod
    def of(cls, values: Tensor, live: Tensor, weight: Tensor | float) -> MemberValues:
        """Returns the metric of one step.

        Args:
            values: [members].
            live: bool [members]. Members that took the step.
            weight: Weight of the step in means, [] or [members].
        """
        values = values.detach()
        wide = values.to(wide_dtype(values.device))
        weights = torch.where(live, torch.ones_like(wide) * weight, 0)
        return cls(values.clone(), torch.where(weights > 0, wide * weights, 0), weights)

    def merge(self, other: MemberValues) -> MemberValues:
        return type(self)(other.values, self.total + other.total, self.weight + other.weight)

    def compute(self) -> dict[str, Tree]:
        return summary_of(self.total / self.weight)


class MemberMetrics(Metric):
    """A mergeable metric of each member.

    It computes what the metric does, with a summary over the members as ``MemberValues``.

    Args:
        each: A metric whose leaves have a leading axis of members.
    """

    each: Metric

    def merge(self, other: MemberMetrics) -> MemberMetrics:
        return type(self)(_vmap(_merged)(self.each, other.each))

    def compute(self) -> dict[str, Tree]:
        return _summaries(self.computed())

    def computed(self) -> Tree:
        """Returns the values of the members: a tensor [members], or a dict of such tensors."""
        return _vmap(_computed)(self.each)


def lift_members(measured: Mapping[str, Any], weight: Tensor | float) -> dict[str, Metric]:
    """As ``fxtrain.metrics.lift``, for the metrics of members.

    Args:
        measured: Tensors [members], or metrics whose leaves have a leading axis of members, by name.
        weight: The weight of the batch, [] or [members].
    """
    lifted: dict[str, Metric] = {}
    for name, value in measured.items():
        if not isinstance(value, Metric):
            weights = torch.ones_like(value, dtype=wide_dtype(value.device)) * weight
            value = _vmap(_lifted)(value, weights)
        lifted[name] = MemberMetrics(value)
    return lifted


def _merged(one: Metric, other: Metric) -> Metric:
    return one.merge(other)


def _computed(one: Metric) -> Tree:
    return one.compute()


def _lifted(value: Tensor, weight: Tensor) -> Metric:
    return lift({"value": value}, weight)["value"]


def _summaries(values: Tree) -> dict[str, Tree]:
    if isinstance(values, Tensor):
        return summary_of(values)
    return {name: _summaries(part) for name, part in values.items()}
