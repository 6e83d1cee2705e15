"""Mergeable metrics as pytrees, in the manner of clu.

A metric holds sufficient statistics: merging the metrics of two batches gives the metric of both. Its leaves are 0-d
tensors, so a metric works inside a compiled step, under ``vmap``, and in a state. Leaves are float64, so that sums over
hundreds of millions of values do not lose precision; devices without float64 (MPS) use float32. ``compute`` returns
torch's default dtype, or float32 if that is wider. Averages that ``lift`` makes of float64 values stay float64.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import describe, did_you_mean, register_node, wide_dtype


@typing.dataclass_transform(frozen_default=True, eq_default=False)
class Metric:
    """Base class of metrics. A subclass defines ``from_model_output``, ``merge`` and ``compute``, all pure functions.

    A subclass automatically becomes a frozen dataclass and a pytree node with its fields as leaves. ``merge`` must be
    associative, with ``empty()`` as its unit. By default ``empty`` sets all fields to zero: override it if that is not
    the unit. An average over no values computes nan and does not raise.

    Example:
        >>> class Perplexity(Average):
        ...     def compute(self):
        ...         return super().compute().exp()
        >>> Perplexity.from_model_output(torch.zeros(3)).compute()
        tensor(1.)
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = tuple(field.name for field in dataclasses.fields(cls))  # pyright: ignore[reportArgumentType]
        register_node(
            cls,
            lambda metric: ([getattr(metric, name) for name in names], None),
            lambda _, children: cls(*children),
            fields=names,
        )

    @classmethod
    def empty(cls, *, device: torch.device | str | None = None) -> Self:
        """Returns the metric of no data, the unit of ``merge``."""
        names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
        where = torch.empty((), device=device).device
        return cls(*(torch.zeros((), dtype=wide_dtype(where), device=where) for _ in names))

    @classmethod
    def from_model_output(cls, *args: Any, **outputs: Any) -> Self:
        """Returns the metric of one batch. A metric takes the outputs that it uses and ignores all others."""
        raise NotImplementedError(f"expected {cls.__name__} to define from_model_output. Add the method.")

    def update(self, *args: Any, **outputs: Any) -> Self:
        """Returns this metric merged with that of one more batch."""
        return self.merge(type(self).from_model_output(*args, **outputs))

    def merge(self, other: Any) -> Self:
        """Returns the metric of the data of both. ``other`` has the same class."""
        raise NotImplementedError(f"expected {type(self).__name__} to define merge. Add the method.")

    def compute(self) -> Any:
        """Returns the value: a tensor of shape [], or a dict of such tensors."""
        raise NotImplementedError(f"expected {type(self).__name__} to define compute. Add the method.")

    @classmethod
    def from_output(cls, name: str) -> type[Self]:
        """Returns a subclass that measures the model output ``name``, masked by the output ``mask`` if there is one.

        The mask does not apply to an output of shape [], which is a value for the whole batch.

        Example:
            >>> Average.from_output("loss").from_model_output(loss=torch.tensor([1.0, 3.0]), other=None).compute()
            tensor(2.)
        """
        return _from_output(cls, name)

    @classmethod
    def from_fun(cls, function: Callable[..., Any]) -> type[Self]:
        """Returns a subclass that measures ``function(**outputs)``, a tensor or a mapping of keyword arguments.

        The output ``mask`` is applied as in ``from_output``, unless the mapping has its own ``mask`` (None to disable).

        Example:
            >>> def error(prediction, target, **_):
            ...     return (prediction - target).abs()
            >>> metric = Average.from_fun(error)
            >>> metric.from_model_output(prediction=torch.zeros(2), target=torch.ones(2)).compute()
            tensor(1.)
        """
        return _from_fun(cls, function)


class Average(Metric):
    """The mean of values of any shape. Values whose mask is false do not count.

        sum_i w_i x_i / sum_i w_i

    Args:
        total: float64 []. The weighted sum.
        count: float64 []. The sum of the weights.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def from_model_output(cls, values: Tensor, mask: Tensor | None = None, **_: Any) -> Self:
        """Returns the average of one batch.

        Args:
            values: Any shape and dtype.
            mask: The shape of ``values`` or of its leading dimensions. False, or 0, excludes a value.
        """
        values, kept = _masked(values, mask)
        return cls(values.sum(), kept.sum())

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total, self.count + other.count)

    def compute(self) -> Tensor:
        return _narrow(self.total / self.count)


class Accuracy(Average):
    """The fraction of examples whose largest logit is at their label."""

    @classmethod
    def from_model_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, *, logits: Tensor, labels: Tensor, mask: Tensor | None = None, **_: Any
    ) -> Self:
        """Returns the accuracy of one batch.

        Args:
            logits: float [..., classes].
            labels: Any integer dtype, [...]. Class indices.
            mask: The shape of ``labels`` or of its leading dimensions. False, or 0, excludes an example.
        """
        if logits.shape[:-1] != labels.shape or logits.ndim == 0:
            raise ValueError(
                "expected logits of shape [..., classes] and labels of shape [...], got logits of shape "
                f"{list(logits.shape)} and labels of shape {list(labels.shape)}. Convert one-hot labels with "
                ".argmax(-1)."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"expected labels to be class indices of an integer dtype, got {describe(labels)}.")
        return super().from_model_output(logits.argmax(-1) == labels, mask)


class LastValue(Average):
    """The mean over the last batch that had any value. Its ``merge`` is associative but not commutative."""

    def merge(self, other: Any) -> Self:
        return tree.where(other.count > 0, other, self)


class Sum(Metric):
    """The sum of values of any shape. Values whose mask is false do not count. The sum of no values is 0.

    Args:
        total: float64 []. Integers are exact up to 2^53.
    """

    total: Tensor

    @classmethod
    def from_model_output(cls, values: Tensor, mask: Tensor | None = None, **_: Any) -> Self:
        """Returns the sum of one batch.

        Args:
            values: Any shape and dtype.
            mask: The shape of ``values`` or of its leading dimensions. False, or 0, excludes a value.
        """
        values, _kept = _masked(values, mask)
        return cls(values.sum())

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total)

    def compute(self) -> Tensor:
        return _narrow(self.total)


class Std(Metric):
    """The population standard deviation (divided by n) of values of any shape.

        m2_ab = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b)

    Squared deviations from the mean are accumulated, because a difference of large sums of squares would cancel
    catastrophically if the mean is large.

    Args:
        mean: float64 [].
        m2: float64 []. The sum of squared deviations from the mean.
        count: float64 [].

    References:
        Chan et al., Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """

    mean: Tensor
    m2: Tensor
    count: Tensor

    @classmethod
    def from_model_output(cls, values: Tensor, mask: Tensor | None = None, **_: Any) -> Self:
        """Returns the statistics of one batch.

        Args:
            values: Any shape and dtype.
            mask: The shape of ``values`` or of its leading dimensions. False, or 0, excludes a value.
        """
        values, kept = _masked(values, mask)
        count = kept.sum()
        some = count.clamp(min=1)
        mean = values.sum() / some
        return cls(mean, torch.where(kept > 0, values - mean, 0).square().sum(), count)

    def merge(self, other: Self) -> Self:
        count = self.count + other.count
        some = torch.where(count > 0, count, 1)
        mean = (self.count * self.mean + other.count * other.mean) / some
        between = (other.mean - self.mean).square() * (self.count * other.count / some)
        return type(self)(mean, self.m2 + other.m2 + between, count)

    def compute(self) -> Tensor:
        return _narrow((self.m2 / self.count).sqrt())


class Collection(Metric):
    """Several named metrics of the same model outputs, as one metric. Create a class with ``Collection.create``.

    Example:
        >>> Metrics = Collection.create(loss=Average.from_output("loss"), accuracy=Accuracy)
        >>> metrics = Metrics.empty()
        >>> for loss in (1.0, 2.0):
        ...     logits, labels = torch.eye(2), torch.tensor([0, 0])
        ...     batch = Metrics.single_from_model_output(loss=torch.tensor(loss), logits=logits, labels=labels)
        ...     metrics = metrics.merge(batch)
        >>> metrics.compute()
        {'loss': tensor(1.5000), 'accuracy': tensor(0.5000)}
        >>> metrics.loss
        Average.from_output('loss')(total=tensor(3., dtype=torch.float64), count=tensor(2., dtype=torch.float64))
    """

    classes: ClassVar[Mapping[str, type[Metric]]] = {}
    """The classes of the metrics by name."""

    @staticmethod
    def create(**classes: type[Metric]) -> type[Collection]:
        """Returns the collection class of the given metrics. Equal arguments give the same class.

        Args:
            classes: Metric classes by name. They may be collections.
        """
        return _collection(tuple(classes.items()))

    @classmethod
    def empty(cls, *, device: torch.device | str | None = None) -> Self:
        return cls(*(metric.empty(device=device) for metric in cls.classes.values()))

    @classmethod
    def from_model_output(cls, **outputs: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cls(*(metric.from_model_output(**outputs) for metric in cls.classes.values()))

    @classmethod
    def single_from_model_output(cls, **outputs: Any) -> Self:
        """Alias of ``from_model_output``, for compatibility with clu."""
        return cls.from_model_output(**outputs)

    def merge(self, other: Self) -> Self:
        return type(self)(*(getattr(self, name).merge(getattr(other, name)) for name in self.classes))

    def compute(self) -> dict[str, Any]:
        return {name: getattr(self, name).compute() for name in self.classes}

    if typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


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

    A metric that computes a dict, such as a collection, gives several values, with names joined by ``/``.

    Raises:
        TypeError: If a value does not have the shape [].
        ValueError: If two values have the same name.

    Example:
        >>> Errors = Collection.create(mean=Average, std=Std)
        >>> compute({"error": Errors.from_model_output(values=torch.tensor([1.0, 3.0]))})
        {'error/mean': tensor(2.), 'error/std': tensor(1.)}
    """
    values: dict[str, Tensor] = {}
    for name, value in metrics.items():
        _flatten(name, value.compute() if isinstance(value, Metric) else value, values)
    return values


def _flatten(name: str, value: Any, into: dict[str, Tensor]) -> None:
    if isinstance(value, Mapping):
        for key, part in cast(Mapping[str, Any], value).items():
            _flatten(f"{name}/{key}", part, into)
    elif name in into:
        raise ValueError(f"expected distinct metric names, got {name!r} twice. Rename one of them.")
    else:
        into[name] = _scalar(name, value)


def _scalar(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    raise TypeError(
        f"expected the metric {name!r} to be a tensor of shape [] or one of fxtrain.metrics, got {describe(value)}. "
        "Reduce a tensor with .mean(), or convert a Python scalar with torch.tensor."
    )


class _DoubleAverage(Average):
    """An average that stays in float64."""

    def compute(self) -> Tensor:
        return self.total / self.count


def _weighted(value: Tensor, weight: Tensor | float) -> Average:
    kind = _DoubleAverage if value.dtype == torch.float64 else Average
    value = value.detach().to(wide_dtype(value.device))
    count = torch.ones_like(value) * weight  # a new tensor, because leaves must not share storage
    return kind(torch.where(count > 0, value * count, 0), count)


def _masked(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the values with masked ones set to zero, and the mask as ones and zeros, both in the wide dtype."""
    values = values.detach()  # otherwise the autograd graph of a whole evaluation would stay alive
    values = values.to(wide_dtype(values.device))
    if mask is None:
        return values, torch.ones_like(values)
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(
            f"expected a mask with the shape or the leading dimensions of the values, {list(values.shape)}, got shape "
            f"{list(mask.shape)}."
        )
    kept = (mask != 0).reshape(*mask.shape, *([1] * (values.ndim - mask.ndim))).expand(values.shape)
    return torch.where(kept, values, 0), kept.to(values.dtype)


def _narrow(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(torch.get_default_dtype(), torch.float32))


# Pytree classes cannot be unregistered, so each is created once.


@functools.cache
def _from_output(base: Any, name: str) -> Any:
    def from_model_output(cls: Any, **outputs: Any) -> Any:
        if name not in outputs:
            raise KeyError(
                f"expected the model output {name!r}, got {', '.join(outputs) or 'none'}.{did_you_mean(name, outputs)}"
            )
        return above(cls, outputs[name], mask=_mask_for(outputs[name], outputs))

    above = base.from_model_output.__func__
    return _subclass(base, f"from_output({name!r})", from_model_output)


@functools.cache
def _from_fun(base: Any, function: Callable[..., Any]) -> Any:
    def from_model_output(cls: Any, **outputs: Any) -> Any:
        result = function(**outputs)
        if isinstance(result, Mapping):
            arguments = cast(Mapping[str, Any], result)
            return above(cls, **{"mask": _mask_for(next(iter(arguments.values())), outputs), **arguments})
        return above(cls, result, mask=_mask_for(result, outputs))

    above = base.from_model_output.__func__
    return _subclass(base, f"from_fun({getattr(function, '__name__', repr(function))})", from_model_output)


def _mask_for(value: Tensor, outputs: Mapping[str, Any]) -> Tensor | None:
    return outputs.get("mask") if value.ndim else None  # a value of the whole batch cannot be masked


def _subclass(base: Any, made: str, from_model_output: Callable[..., Any]) -> Any:
    space = {"from_model_output": classmethod(from_model_output), "__module__": base.__module__}
    return type(base)(f"{base.__name__}.{made}", (base,), space)


@functools.cache
def _collection(classes: tuple[tuple[str, type[Metric]], ...]) -> type[Collection]:
    if not classes:
        raise ValueError("expected at least one metric, got none. Name one, as in Collection.create(loss=Average).")
    for name, metric in classes:
        if hasattr(Collection, name):
            raise ValueError(
                f"expected a metric name that is not an attribute of Collection, got {name!r}. Rename the metric."
            )
        if not (isinstance(metric, type) and issubclass(metric, Metric)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"expected {name} to be a subclass of Metric, got {describe(metric)}. Use a class such as "
                f"Average.from_output({name!r})."
            )
    space = {"__annotations__": dict(classes), "__module__": __name__, "classes": dict(classes)}
    return type(f"Collection({', '.join(name for name, _ in classes)})", (Collection,), space)
