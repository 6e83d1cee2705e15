"""The states of a metric of torchmetrics as values: of one batch, merged, and computed."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxtrain import tree
from fxtrain._torch_internals.dispatch import outside_of_traces
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import Tree, describe

States = dict[str, Any]
"""The states of a metric by name: tensors, and tuples of tensors for states that grow with the data."""

_WITH_OWN_VALUES = ("BootStrapper", "MetricTracker", "MinMaxMetric", "Running")


class _Place(NamedTuple):
    """A state of a metric, or of a metric inside it.

    Args:
        owner: The metric that reads and writes it.
        name: Its attribute.
        default: The tensor before the first update, or an empty list.
        reduce: The function given as ``dist_reduce_fx``, or None.
    """

    owner: Any
    name: str
    default: Tensor | list[Tensor]
    reduce: Callable[[Any], Any] | None

    @property
    def is_tuple(self) -> bool:
        """Whether the values of each part are kept: a list state, or a tensor without a reduction."""
        return isinstance(self.default, list) or self.reduce is None

    def value(self) -> Tensor | tuple[Tensor, ...]:
        """Returns the current value. Lists may hold tensors of the batch, so their elements are cloned."""
        value = getattr(self.owner, self.name)
        if not self.is_tuple:
            return value.detach()
        return tuple(each.detach().clone() for each in (value if isinstance(value, list) else [value]))


class MetricStates:
    """Runs ``update`` and ``compute`` of a metric on given states, and merges states.

    Args:
        metric: A metric or a collection. It is copied.

    Raises:
        TypeError: If it is not a metric of torchmetrics.
        ValueError: If it keeps values that are not states.

    Attributes:
        name: The name of the metric's class.
        growing: The names of the states that grow with the data.
        arguments: The arguments of ``update`` by name, or None if it takes any.
    """

    def __init__(self, metric: object) -> None:
        import torchmetrics
        from torchmetrics.utilities import dim_zero_cat

        kinds = (torchmetrics.Metric, torchmetrics.MetricCollection)
        if not isinstance(metric, kinds):
            is_class = isinstance(metric, type) and issubclass(metric, kinds)
            remedy = "Call it." if is_class else "Metrics of fxtrain.metrics need no adapter."
            raise TypeError(
                "expected metric to be a metric or a MetricCollection of torchmetrics, got "
                f"{describe(metric)}. {remedy}"
            )
        self.name = type(metric).__name__
        self._metric: Any = copy.deepcopy(metric)
        self._places: dict[str, _Place] = {}
        self._parts: list[Any] = []
        for path, part in self._metric.named_modules():
            if isinstance(part, torchmetrics.MetricCollection):
                # Groups share states, and are found by comparing values, which a compiled step cannot do.
                part._enable_compute_groups, part._groups_checked = False, False
            if not isinstance(part, torchmetrics.Metric):
                continue
            if any(base.__name__ in _WITH_OWN_VALUES for base in type(part).__mro__):
                raise ValueError(
                    f"expected a metric whose values are all states, got {describe(part)}, which keeps others between "
                    "updates, so two of them do not merge. Give the metric inside it."
                )
            part.reset()
            part.sync_on_compute = part._to_sync = False
            self._parts.append(part)
            reductions = cast(Mapping[str, Any], part._reductions)
            for name, default in part._defaults.items():
                self._places[f"{path}.{name}".strip(".")] = _Place(part, name, default, reductions[name])
        self._cat = dim_zero_cat
        self.growing = [name for name, place in self._places.items() if place.is_tuple or place.reduce is dim_zero_cat]
        self.arguments = self._arguments()
        self._lock = threading.RLock()

    def _arguments(self) -> dict[str, inspect.Parameter] | None:
        """Returns the arguments of ``update``, of the metric or of those inside it; None if it takes any."""
        found: dict[str, inspect.Parameter] = {}
        for part in self._parts:
            parameters = inspect.signature(part.update).parameters.values()
            if part._defaults and any(each.kind is each.VAR_KEYWORD for each in parameters):
                return None
            found |= {each.name: each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
        return found

    def defaults(self, device: torch.device) -> States:
        """Returns the states before the first update."""
        return {
            name: () if isinstance(default, list) or place.is_tuple else default.detach().clone().to(device)
            for name, place in self._places.items()
            for default in [place.default]
        }

    def measured(self, args: Sequence[Tree], outputs: Mapping[str, Tree]) -> tuple[States, torch.device]:
        """Returns the states of one batch, and their device.

        Args:
            args: Positional arguments of ``update``.
            outputs: Its keyword arguments, and others, which are ignored.
        """
        taken = self.arguments
        kwargs = {name: value for name, value in outputs.items() if taken is None or name in taken}
        where = next((leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)), torch.empty(())).device
        with self._at(where):
            for place in self._places.values():
                default = place.owner._defaults[place.name]  # on the device
                setattr(place.owner, place.name, [] if isinstance(default, list) else default.detach().clone())
            self._metric.update(*args, **kwargs)
            return {name: place.value() for name, place in self._places.items()}, where

    def merged(self, first: States, first_updates: Tensor, second: States, second_updates: Tensor) -> States:
        """Returns the states of both, each reduced as torchmetrics reduces it."""
        from torchmetrics.utilities import dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

        merged: States = {}
        for name, place in self._places.items():
            a, b = first[name], second[name]
            if place.is_tuple:
                merged[name] = (*a, *b)
            elif place.reduce is dim_zero_sum:
                merged[name] = a + b
            elif place.reduce is dim_zero_max:
                merged[name] = torch.max(a, b)
            elif place.reduce is dim_zero_min:
                merged[name] = torch.min(a, b)
            elif place.reduce is dim_zero_mean:
                count = (first_updates + second_updates).clamp(min=1)
                merged[name] = (first_updates * a + second_updates * b).float() / count
            elif place.reduce is self._cat:
                merged[name] = torch.cat([a, b])
            else:
                assert place.reduce is not None
                # An arbitrary function need not have the default as its unit.
                both = place.reduce(torch.stack([a, b]))
                merged[name] = torch.where(first_updates == 0, b, torch.where(second_updates == 0, a, both))
        return merged

    def computed(self, states: States, updates: Tensor) -> Any:
        """Returns the result of ``compute`` for the given states."""
        with self._at(updates.device):
            for name, place in self._places.items():
                setattr(place.owner, place.name, self._loaded(place, states[name], updates.device))
            for part in self._parts:
                part._update_count = 1  # compute warns of a metric without updates
            return self._metric.compute()

    @staticmethod
    def _loaded(place: _Place, value: Any, device: torch.device) -> Any:
        if isinstance(place.default, list):
            return list(value)
        if not place.is_tuple:
            return value
        if not value:
            return place.default.to(device)
        return value[0] if len(value) == 1 else torch.stack(value)

    @contextmanager
    def _at(self, device: torch.device) -> Iterator[None]:
        """Gives exclusive use of the metric on a device, and resets it afterwards."""
        # Checks of values cannot be traced.
        checking = [part for part in self._parts if is_traced() and getattr(part, "validate_args", False)]
        with self._lock:
            try:
                if any(part.device != device for part in self._parts):
                    with outside_of_traces():
                        self._metric.to(device)
                for part in checking:
                    part.validate_args = False
                with _FixedBincounts() if is_traced() else nullcontext():
                    yield
            finally:
                for part in checking:
                    part.validate_args = True
                with outside_of_traces():  # a trace would leave tensors without values in the metric
                    for part in self._parts:
                        part.reset()


class _FixedBincounts(TorchFunctionMode):
    """Computes ``torch.bincount(x, minlength=n)`` with the shape [n], because shapes in a graph are fixed.

    Metrics count valid classes, which are smaller than n.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.bincount and len(args) == 1 and kwargs.keys() == {"minlength"}:
            (values,) = args
            return torch.zeros(kwargs["minlength"], dtype=torch.int64, device=values.device).index_add(
                0, values, torch.ones_like(values, dtype=torch.int64)
            )
        return func(*args, **kwargs)
