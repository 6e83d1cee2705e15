"""Several named metrics as one."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from fxtrain.core import Tree, describe
from fxtrain.metrics._metric import Metric


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
    space = {"__annotations__": dict(classes), "__module__": "fxtrain.metrics", "classes": dict(classes)}
    return type(f"Collection({', '.join(name for name, _ in classes)})", (Collection,), space)
