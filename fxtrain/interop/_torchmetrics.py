"""Metrics of torchmetrics as mergeable metrics."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from fxtrain.core import Tree, check_callable, describe, did_you_mean
from fxtrain.metrics import Metric

if TYPE_CHECKING:
    import torchmetrics

    from fxtrain.interop._torchmetrics_states import MetricStates

_MAX_VALUES = 1024


def torchmetric(
    metric: torchmetrics.Metric | torchmetrics.MetricCollection,
    *,
    convert: Callable[[Any], Tensor | Mapping[str, Tree]] | None = None,
    **outputs: str,
) -> type[TorchMetric]:
    """Returns the class of a metric of torchmetrics, for loss functions, evaluation functions and collections.

    Its states are leaves, which merge as torchmetrics merges them, by ``dist_reduce_fx``. A mean is weighted by the
    number of updates. List states, such as those of an exact AUROC, grow with the data. Evaluations merge these on the
    host, and training steps refuse them, because callback state has a fixed size: bin them, as ``thresholds=100`` does.

    A compiled step needs an update that can be traced, and skips the checks that ``validate_args`` makes. Updates that
    write into a state in place, as most do, do not run under ``vmap``.

    Args:
        metric: A metric, a collection, a composition such as ``2 * metric``, or a wrapper that adds no state. It
            is copied, so its own state is neither read nor changed.
        convert: Maps the result of ``metric.compute()`` to a tensor of shape [] or a dict of them. By default, other
            tensors give one value for each entry, named by its index, such as ``confusion/0/1``.
        outputs: Names of model outputs by the argument of ``metric.update`` that takes them. By default, the names are
            equal. Used by ``from_model_output`` with keyword arguments.

    Returns:
        A subclass of ``fxtrain.metrics.Metric``. Make it once, outside of the step, because metrics of two classes do
        not merge.

    Raises:
        ModuleNotFoundError: If torchmetrics is not installed.
        TypeError: If ``metric`` is a class, or not from torchmetrics, or ``convert`` is not a function.
        ValueError: If ``metric`` keeps values that are not states, or its ``update`` has no argument of a given name.

    Example:
        >>> import torch, torchmetrics, fxtrain as fx
        >>> Accuracy = fx.interop.torchmetric(torchmetrics.Accuracy("multiclass", num_classes=2), preds="logits")
        >>> def measure(model, batch):
        ...     return {"accuracy": Accuracy.from_model_output(logits=model(batch["x"]), target=batch["y"])}
        >>> data = [{"x": torch.eye(2), "y": torch.tensor([0, 0])}, {"x": torch.eye(2)[:1], "y": torch.tensor([0])}]
        >>> round(fx.evaluate(fx.init(torch.nn.Identity()), fx.eval_step(measure), data)["accuracy"], 3)
        0.667
    """
    from fxtrain.interop._torchmetrics_states import MetricStates

    try:
        wrapped = MetricStates(metric)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "interop.torchmetric requires torchmetrics. Install it: pip install 'fxtrain[torchmetrics]'."
        ) from error
    if convert is not None:
        check_callable("convert", convert, "(result) -> tensor or dict of tensors")
    taken = wrapped.arguments
    for name in outputs:
        if taken is not None and name not in taken:
            raise ValueError(
                f"expected an argument of {wrapped.name}.update ({', '.join(taken)}), got {name!r}."
                f"{did_you_mean(name, taken)}"
            )
    space = {
        "__module__": __name__,
        "__doc__": f"``{wrapped.name}`` of torchmetrics.",
        "wrapped": wrapped,
        "convert": staticmethod(convert or _scalars),
        "outputs": outputs,
        "growing": tuple(wrapped.growing),
    }
    return types.new_class(wrapped.name, (TorchMetric,), exec_body=lambda names: names.update(space))


class TorchMetric(Metric):
    """Base class of the metrics that ``torchmetric`` returns.

    Args:
        states: The states by name. Each is a tensor, or a tuple of tensors that grows with the data.
        updates: int64 []. The number of updates.

    Example:
        >>> import torchmetrics, fxtrain as fx
        >>> Mean = fx.interop.torchmetric(torchmetrics.MeanMetric())
        >>> first, second = (Mean.from_model_output(torch.tensor(value)) for value in (1.0, 3.0))
        >>> first.merge(second).compute(), sorted(first.states)
        (tensor(2.), ['mean_value', 'weight'])
    """

    states: dict[str, Any]
    updates: Tensor

    wrapped: ClassVar[MetricStates]
    outputs: ClassVar[Mapping[str, str]]
    convert: ClassVar[Callable[[Any], Tree]]

    @classmethod
    def empty(cls, *, device: torch.device | str | None = None) -> Self:
        where = torch.empty((), device=device).device
        return cls(cls.wrapped.defaults(where), torch.zeros((), dtype=torch.int64, device=where))

    @classmethod
    def from_model_output(cls, *args: Tree, **outputs: Tree) -> Self:
        """Returns the metric of one batch.

        Args:
            args: The arguments of the metric's ``update``.
            outputs: Model outputs by name, of which the metric takes its own.

        Raises:
            TypeError: If there is a mask, which torchmetrics does not have.
            KeyError: If an output of a given name is missing.
        """
        if outputs.get("mask") is not None and "mask" not in cls.outputs.values():
            raise TypeError(
                f"{cls.__name__}: expected no mask, which metrics of torchmetrics do not take, got "
                f"{describe(outputs['mask'])}. Set masked targets to the metric's ignore_index, or pass selected "
                "examples, as in preds[mask]."
            )
        for argument, parameter in (cls.wrapped.arguments or {}).items() if not args else ():
            name = cls.outputs.get(argument, argument)
            if parameter.default is parameter.empty and name not in outputs:
                raise KeyError(
                    f"{cls.__name__}: expected the model output {name!r}, got {', '.join(outputs) or 'none'}. Name the "
                    f"output: fxtrain.interop.torchmetric(metric, {argument}=...).{did_you_mean(name, outputs)}"
                )
        renamed = {argument: outputs[name] for argument, name in cls.outputs.items() if name in outputs}
        states, device = cls.wrapped.measured(args, {**outputs, **renamed})
        return cls(states, torch.ones((), dtype=torch.int64, device=device))

    def merge(self, other: Self) -> Self:
        """Returns the metric of the data of both, as torchmetrics reduces states.

        Args:
            other: A metric of the same class.
        """
        merged = self.wrapped.merged(self.states, self.updates, other.states, other.updates)
        return type(self)(merged, self.updates + other.updates)

    def compute(self) -> Tensor | dict[str, Tree]:
        return type(self).convert(self.wrapped.computed(self.states, self.updates))


def _scalars(result: Any, name: str = "") -> Any:
    """Returns the result of a metric with each entry of a tensor as a separate value, named by its index.

    Raises:
        TypeError: If it contains anything but numbers, or too many.
    """
    if isinstance(result, Mapping):
        return {key: _scalars(value, key) for key, value in result.items()}
    if isinstance(result, int | float):
        return torch.tensor(result)
    if isinstance(result, Tensor) and result.ndim == 0:
        return result
    if isinstance(result, Tensor) and result.numel() <= _MAX_VALUES:
        return {str(index): _scalars(entry) for index, entry in enumerate(result)}
    where = f" of {name!r}" if name else ""
    raise TypeError(
        f"expected a metric{where} that computes at most {_MAX_VALUES} numbers, got {describe(result)}. Choose the "
        "numbers to publish: fxtrain.interop.torchmetric(metric, convert=lambda result: ...)."
    )
