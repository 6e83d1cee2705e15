"""The metrics of a step by name: lifted from tensors, merged over batches, and computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from fxtrain.core import Tree, describe, wide_dtype
from fxtrain.metrics._metric import Metric
from fxtrain.metrics._statistics import Average, WideAverage


def lift(metrics: Mapping[str, Tensor | Metric], weight: Tensor | float) -> dict[str, Metric]:
    """Makes the metrics of a batch mergeable: a tensor becomes an ``Average``, a metric is kept.

    Args:
        metrics: Tensors of shape [], or metrics, by name.
        weight: The weight of the batch in averages, such as its number of examples. A batch of weight 0 does not count,
            even if it measured nan.

    Raises:
        TypeError: If a value is neither.

    Example:
        >>> first = lift({"loss": torch.tensor(1.0)}, weight=3)
        >>> compute(merge(first, lift({"loss": torch.tensor(5.0)}, weight=1)))
        {'loss': tensor(2.)}
    """
    return {
        name: value if isinstance(value, Metric) else _weighted(_scalar(name, value), weight)
        for name, value in metrics.items()
    }


def merge(first: Mapping[str, Metric], second: Mapping[str, Metric]) -> dict[str, Metric]:
    """Merges metrics by name.

    Args:
        first: Metrics by name.
        second: Metrics of the same names and classes.

    Raises:
        ValueError: If a name is on one side only, or its metrics have different classes.

    Example:
        >>> first, second = (lift({"loss": torch.tensor(loss)}, weight=1) for loss in (1.0, 2.0))
        >>> compute(merge(first, second))
        {'loss': tensor(1.5000)}
    """
    for name in (*first, *second):
        kinds = [type(side[name]).__name__ if name in side else "absent" for side in (first, second)]
        if name not in first or name not in second or type(first[name]) is not type(second[name]):
            raise ValueError(
                f"expected the metric {name!r} to have the same class in both arguments, got {kinds[0]} and "
                f"{kinds[1]}. Merge batches that measure the same metrics."
            )
    return {name: metric.merge(second[name]) for name, metric in first.items()}


def compute(metrics: Mapping[str, Tensor | Metric]) -> dict[str, Tensor]:
    """Computes the value of each metric, a tensor of shape []. Tensors are returned as they are.

    A metric that computes a dict, such as a collection, gives several values, with names joined by ``/``. The value of
    an empty key has the name of the metric.

    Raises:
        TypeError: If a value does not have the shape [].
        ValueError: If two values have the same name.

    Example:
        >>> from fxtrain.metrics import Collection, Std
        >>> Errors = Collection.create(mean=Average, std=Std)
        >>> compute({"error": Errors.from_model_output(values=torch.tensor([1.0, 3.0]))})
        {'error/mean': tensor(2.), 'error/std': tensor(1.)}
    """
    values: dict[str, Tensor] = {}
    for name, value in metrics.items():
        _flatten(name, value.compute() if isinstance(value, Metric) else value, values)
    return values


def _flatten(name: str, value: Tree, into: dict[str, Tensor]) -> None:
    if isinstance(value, Mapping):
        for key, part in cast("Mapping[str, Tree]", value).items():
            _flatten(f"{name}/{key}" if key else name, part, into)
    elif name in into:
        raise ValueError(f"expected distinct metric names, got {name!r} twice. Rename one of them.")
    else:
        into[name] = _scalar(name, value)


def _scalar(name: str, value: Tree) -> Tensor:
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return value
    raise TypeError(
        f"expected the metric {name!r} to be a tensor of shape [] or one of fxtrain.metrics, got {describe(value)}. "
        "Reduce a tensor with .mean(), take the real part of a complex one, or convert a Python scalar with "
        "torch.tensor."
    )


def _weighted(value: Tensor, weight: Tensor | float) -> Average:
    kind = WideAverage if value.dtype == torch.float64 else Average
    value = value.detach().to(wide_dtype(value.device))
    count = torch.ones_like(value) * weight  # a new tensor, because leaves must not share storage
    return kind(torch.where(count > 0, value * count, 0), count)
