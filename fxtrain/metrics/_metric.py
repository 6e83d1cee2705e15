"""The base class of metrics, metrics of one model output or of a function of them, and collections of metrics."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fxtrain.core import Tree, describe, did_you_mean, register_node, wide_dtype
from fxtrain.equivalents import advice_on_metric


@typing.dataclass_transform(frozen_default=True, eq_default=False)
class Metric:
    """Base class of metrics. A subclass defines ``from_model_output``, ``merge`` and ``compute``, all pure functions.

    A subclass automatically becomes a frozen dataclass and a pytree node with its fields as leaves. ``merge`` must be
    associative, with ``empty()`` as its unit. By default ``empty`` sets all fields to zero: override it if that is not
    the unit. An average over no values computes nan and does not raise.

    Example:
        >>> from fxtrain.metrics import Average
        >>> class Perplexity(Average):
        ...     def compute(self):
        ...         return super().compute().exp()
        >>> Perplexity.from_model_output(torch.zeros(3)).compute()
        tensor(1.)
    """

    growing: ClassVar[Sequence[str]] = ()
    """Names of fields or states that grow with the data. Only evaluations accept such metrics."""

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        if inspect.get_annotations(cls):  # without fields of its own, a class inherits the methods too
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
        where = torch.empty((), device=device).device
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        return cls(*(torch.zeros((), dtype=wide_dtype(where), device=where) for _ in fields))

    @classmethod
    def from_model_output(cls, *args: Tree, **outputs: Tree) -> Self:
        """Returns the metric of one batch. A metric takes the outputs that it uses and ignores all others."""
        raise NotImplementedError(f"expected {cls.__name__} to define from_model_output. Add the method.")

    def update(self, *args: Tree, **outputs: Tree) -> Self:
        """Returns this metric merged with that of one more batch."""
        return self.merge(type(self).from_model_output(*args, **outputs))

    def merge(self, other: Any) -> Self:
        """Returns the metric of the data of both. ``other`` has the same class."""
        raise NotImplementedError(f"expected {type(self).__name__} to define merge. Add the method.")

    def compute(self) -> Tensor | dict[str, Tree]:
        """Returns the value: a tensor of shape [], or a dict of such tensors."""
        raise NotImplementedError(f"expected {type(self).__name__} to define compute. Add the method.")

    @classmethod
    def from_output(cls, name: str) -> type[Self]:
        """Returns a subclass that measures the model output ``name``, masked by the output ``mask`` if there is one.

        The mask does not apply to an output of shape [], which is a value for the whole batch.

        Example:
            >>> from fxtrain.metrics import Average
            >>> Average.from_output("loss").from_model_output(loss=torch.tensor([1.0, 3.0]), other=None).compute()
            tensor(2.)
        """
        return _from_output(cls, name)

    @classmethod
    def from_fun(cls, function: Callable[..., Tensor | Mapping[str, Tree]]) -> type[Self]:
        """Returns a subclass that measures ``function(**outputs)``, a tensor or a mapping of keyword arguments.

        The output ``mask`` is applied as in ``from_output``, unless the mapping has its own ``mask`` (None to disable).

        Example:
            >>> from fxtrain.metrics import Average
            >>> def error(prediction, target, **_):
            ...     return (prediction - target).abs()
            >>> metric = Average.from_fun(error)
            >>> metric.from_model_output(prediction=torch.zeros(2), target=torch.ones(2)).compute()
            tensor(1.)
        """
        return _from_fun(cls, function)


class Collection(Metric):
    """Several named metrics of the same model outputs, as one metric. Create a class with ``Collection.create``.

    Example:
        >>> from fxtrain.metrics import Accuracy, Average
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
    def from_model_output(cls, **outputs: Tree) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cls(*(metric.from_model_output(**outputs) for metric in cls.classes.values()))

    @classmethod
    def single_from_model_output(cls, **outputs: Tree) -> Self:
        """Alias of ``from_model_output``, for compatibility with clu."""
        return cls.from_model_output(**outputs)

    def merge(self, other: Self) -> Self:
        return type(self)(*(getattr(self, name).merge(getattr(other, name)) for name in self.classes))

    def compute(self) -> dict[str, Tree]:
        return {name: getattr(self, name).compute() for name in self.classes}

    if typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


# Pytree classes cannot be unregistered, so each is created once.


@functools.cache
def _from_output(base: type[Metric], name: str) -> Any:
    def select(**outputs: Tree) -> Tree:
        if name not in outputs:
            raise KeyError(
                f"expected the model output {name!r}, got {', '.join(outputs) or 'none'}.{did_you_mean(name, outputs)}"
            )
        return outputs[name]

    return _subclass(base, f"from_output({name!r})", select)


@functools.cache
def _from_fun(base: type[Metric], function: Callable[..., Tensor | Mapping[str, Tree]]) -> Any:
    return _subclass(base, f"from_fun({getattr(function, '__name__', repr(function))})", function)


def _subclass(base: type[Metric], made: str, function: Callable[..., Tensor | Mapping[str, Tree]]) -> type[Metric]:
    def from_model_output(cls: type[Metric], **outputs: Tree) -> Metric:
        result = function(**outputs)
        first = next(iter(result.values())) if isinstance(result, Mapping) else result
        mask = outputs.get("mask") if first.ndim else None  # a value of the whole batch cannot be masked
        return above(cls, **{"mask": mask, **result}) if isinstance(result, Mapping) else above(cls, result, mask=mask)

    above = base.from_model_output.__func__
    space = {"from_model_output": classmethod(from_model_output), "__module__": base.__module__}
    return types.new_class(f"{base.__name__}.{made}", (base,), exec_body=lambda names: names.update(space))


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
                f"expected {name} to be a subclass of Metric, got {describe(metric)}. "
                + (advice_on_metric(metric) or f"Use a class such as Average.from_output({name!r}).")
            )
    growing = tuple(f"{name}.{state}" for name, metric in classes for state in metric.growing)
    space = {
        "__annotations__": dict(classes),
        "__module__": "fxtrain.metrics",
        "classes": dict(classes),
        "growing": growing,
    }
    return type(f"Collection({', '.join(name for name, _ in classes)})", (Collection,), space)
