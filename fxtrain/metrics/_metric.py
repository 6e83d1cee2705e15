"""The base class of metrics, and subclasses of a metric that measure one model output or a function of them."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fxtrain.core import Tree, did_you_mean, register_node, wide_dtype


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

    def __init_subclass__(cls, **keywords: object) -> None:
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


# Pytree classes cannot be unregistered, so each is created once.


@functools.cache
def _from_output(base: type[Metric], name: str) -> Any:
    def from_model_output(cls: type[Metric], **outputs: Tree) -> Metric:
        if name not in outputs:
            raise KeyError(
                f"expected the model output {name!r}, got {', '.join(outputs) or 'none'}.{did_you_mean(name, outputs)}"
            )
        return above(cls, outputs[name], mask=_mask_for(outputs[name], outputs))

    above = base.from_model_output.__func__
    return _subclass(base, f"from_output({name!r})", from_model_output)


@functools.cache
def _from_fun(base: type[Metric], function: Callable[..., Tensor | Mapping[str, Tree]]) -> Any:
    def from_model_output(cls: type[Metric], **outputs: Tree) -> Metric:
        result = function(**outputs)
        if isinstance(result, Mapping):
            return above(cls, **{"mask": _mask_for(next(iter(result.values())), outputs), **result})
        return above(cls, result, mask=_mask_for(result, outputs))

    above = base.from_model_output.__func__
    return _subclass(base, f"from_fun({getattr(function, '__name__', repr(function))})", from_model_output)


def _mask_for(value: Tensor, outputs: Mapping[str, Tree]) -> Tensor | None:
    return outputs.get("mask") if value.ndim else None  # a value of the whole batch cannot be masked


def _subclass(base: type[Metric], made: str, from_model_output: Callable[..., Metric]) -> type[Metric]:
    space = {"from_model_output": classmethod(from_model_output), "__module__": base.__module__}
    return types.new_class(f"{base.__name__}.{made}", (base,), exec_body=lambda names: names.update(space))
