"""Values: what can be logged beside numbers, and what an event publishes.

A number or a 0-d tensor is logged as it is. Anything else is wrapped in one of the classes here, which say what kind
of thing it is; a writer has a verb for each kind.
"""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fxtrain.core import Control, EvalEnd, Logged, StepEnd, register_node

Scalar = bool | int | float


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, in Markdown.

    Raises:
        TypeError: If it is not a string.

    Example:
        >>> Text("**greedy**: a cat sat on the mat")
        Text(markdown='**greedy**: a cat sat on the mat')
    """

    markdown: str

    def __post_init__(self) -> None:
        if not isinstance(self.markdown, str):
            raise TypeError(f"Text takes a string, and a {type(self.markdown).__name__} came: write Text(str(it)).")


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """How values are distributed: the values themselves, or how many there are between edges.

    Counting on the device, and logging counts and edges, spares copying every value to the host.

    Args:
        values: Real tensor of any shape.
        counts: Real tensor [n], in place of ``values``: how many values lie in each bucket.
        edges: Real tensor [n + 1], increasing: where the buckets begin and end.

    Raises:
        TypeError: If one of them is not a tensor of real numbers.
        ValueError: If there are neither values nor counts with edges, or if the shapes do not fit.

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
            came = " and ".join(given) or "nothing"
            raise ValueError(f"Histogram takes either values, or counts with edges, and {came} came.")
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.is_complex():
                came = f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise TypeError(f"Histogram({name}=...) takes a tensor of real numbers, and {came} came.")
        if self.counts is not None and self.edges is not None:
            counts, edges = list(self.counts.shape), list(self.edges.shape)
            if len(counts) != 1 or edges != [counts[0] + 1]:
                raise ValueError(
                    f"n buckets have n counts and n + 1 edges, and counts of shape {counts} came with edges of shape "
                    f"{edges}."
                )

    def buckets(self, num: int = 30) -> tuple[np.ndarray, np.ndarray]:
        """The counts (float64 [n]) and the edges (float64 [n + 1]), on the host.

        Args:
            num: How many buckets to sort ``values`` into. Those that are not finite fall into none.

        Raises:
            ValueError: If the edges do not increase.
        """
        if self.values is not None:
            values = _on_host(self.values).reshape(-1)
            values = values[np.isfinite(values)]
            counts, edges = np.histogram(values, bins=num, range=_range(values, num))
            return counts.astype(np.float64), edges
        counts, edges = _on_host(self.counts), _on_host(self.edges)
        if not (np.diff(edges) > 0).all():
            raise ValueError(f"The edges of a histogram increase, and these do not: {edges.tolist()}.")
        return counts, edges

    def __repr__(self) -> str:
        if self.values is not None:
            return f"Histogram of values of shape {list(self.values.shape)}"
        return f"Histogram of {len(self.counts) if self.counts is not None else 0} buckets"


_HISTOGRAM = ("values", "counts", "edges")


def _range(values: np.ndarray, num: int) -> tuple[float, float]:
    """From the least to the largest value; wider where there would not be numbers enough for the edges between."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if high - low > 1e-12 * num * largest:
        return low, high
    room = max(0.5, 1e-6 * num * largest)
    return low - room, high + room


def _on_host(tensor: Any) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _unflatten_histogram(names: tuple[str, ...], children: Any) -> Histogram:
    # Past __init__ and its checks: transforms put other things in the place of tensors.
    histogram = object.__new__(Histogram)
    for name in _HISTOGRAM:
        object.__setattr__(histogram, name, None)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(histogram, name, child)
    return histogram


def _flatten_histogram(histogram: Histogram) -> tuple[list[Any], tuple[str, ...]]:
    names = tuple(name for name in _HISTOGRAM if getattr(histogram, name) is not None)
    return [getattr(histogram, name) for name in names], names


register_node(Histogram, _flatten_histogram, _unflatten_histogram)


@dataclasses.dataclass(frozen=True)
class HParams:
    """What a run was configured with: a nested mapping with strings, numbers and bools at its leaves.

    Raises:
        TypeError: If a key is not a string, or a leaf is something else.
        ValueError: If two leaves have one name.

    Example:
        >>> HParams({"batch": 32, "optim": {"name": "adamw", "lr": 3e-4}}).flat()
        {'batch': 32, 'optim/name': 'adamw', 'optim/lr': 0.0003}
    """

    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.flat()

    def flat(self) -> dict[str, str | Scalar]:
        """One mapping, whose names are the keys along the way, joined by ``/``."""
        leaves: dict[str, str | Scalar] = {}

        def collect(prefix: str, value: Any) -> None:
            if isinstance(value, Mapping):
                for key, inner in value.items():
                    if not isinstance(key, str):
                        raise TypeError(f"{prefix or 'HParams'} has the key {key!r}: the keys are strings.")
                    collect(f"{prefix}/{key}" if prefix else key, inner)
            elif not isinstance(value, str | bool | int | float):
                raise TypeError(
                    f"{prefix or 'HParams'} is {value!r}, and a configuration has strings, numbers and bools at its "
                    "leaves: write it as a string, or leave it out."
                )
            elif prefix in leaves:
                raise ValueError(f"Two leaves of the configuration are called {prefix!r}: rename one.")
            else:
                leaves[prefix] = value

        if not isinstance(self.values, Mapping):
            raise TypeError(f"HParams takes a mapping, and a {type(self.values).__name__} came.")
        collect("", self.values)
        return leaves


def published(event: Any, control: Control) -> dict[str, Any]:
    """What is to be written at an event, by name.

    The metrics of ``StepEnd`` are called ``train/<name>``, those of ``EvalEnd`` ``eval/<name>``; what was logged keeps
    its name.

    Args:
        event: Any event of the loop, with numbers for metrics.
        control: What was asked at it.

    Returns:
        Numbers, and values of this module.

    Raises:
        TypeError: If something else was logged.
        ValueError: If something was logged under the name of a metric.

    Example:
        >>> published(StepEnd(step=3, metrics={"loss": 0.5}), Control(log={"learning rate": 0.1}))
        {'train/loss': 0.5, 'learning rate': 0.1}
    """
    kind = type(event)
    named = named_after(kind, event.metrics) if kind in _PREFIXES else {}
    for name, entry in control.log.items():
        if name in named:
            raise ValueError(
                f"{entry.owner or 'A callback'} logged {name!r}, and that is the name of a metric of "
                f"{kind.__name__}: log it under another name."
            )
        named[name] = _loggable(name, entry)
    return named


_PREFIXES = {StepEnd: "train", EvalEnd: "eval"}


def named_after(kind: type[Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a ``StepEnd`` or an ``EvalEnd``, under the names that they are published under."""
    prefix = _PREFIXES[kind]
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _loggable(name: str, entry: Logged) -> Any:
    value = entry.value
    if isinstance(value, bool | int | float | Text | Histogram | HParams):
        return value
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0):
        return float(value)
    if isinstance(value, Tensor):
        remedy = "reduce it to a number, or log Histogram(it)."
    elif isinstance(value, str):
        remedy = "log Text(it)."
    else:
        remedy = "log a number, or one of fxtrain.values: Text, Histogram, HParams."
    came = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TypeError(f"{entry.owner or 'A callback'} logged {name!r}, which is {came}: {remedy}")


# What connects events with writers


def hand_over(writer: Any, event: Any, values: Mapping[str, Any]) -> None:
    """Hands what an event published to a writer: whole to ``write_event`` where it has that, else kind by kind.

    Args:
        writer: A ``fxtrain.writers.Writer``, or a clu writer.
        event: The event.
        values: As ``published`` names them.
    """
    if not values:
        return
    if hasattr(writer, "write_event"):
        writer.write_event(event, values)
        return
    kinds = by_kind(values)
    if kinds.scalars:
        writer.write_scalars(event.step, kinds.scalars)
    if kinds.texts:
        writer.write_texts(event.step, kinds.texts)
    if kinds.histograms:
        arrays = {k: h if h.values is None else _on_host(h.values) for k, h in kinds.histograms.items()}
        writer.write_histograms(event.step, arrays)
    if kinds.hparams:
        writer.write_hparams(kinds.hparams)


def take_back(writer: Any, step: int) -> None:
    """Has a writer drop all that lies beyond a step. One that cannot says so in a warning, and doubles points."""
    if hasattr(writer, "purge"):
        writer.purge(step)
    elif step > 0:
        warnings.warn(
            f"{type(writer).__name__} has no purge(step), so what it wrote beyond step {step} stays, and will be there "
            "twice.",
            RuntimeWarning,
            stacklevel=3,
        )


def try_all(*actions: Callable[[], Any]) -> None:
    """Does every one, and raises the first error only then: what can be closed or flushed is."""
    errors: list[Exception] = []
    for act in actions:
        try:
            act()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


@dataclasses.dataclass(frozen=True)
class ByKind:
    """Published values, sorted by the verb that writes them."""

    scalars: dict[str, Scalar]
    texts: dict[str, str]
    histograms: dict[str, Histogram]
    hparams: dict[str, str | Scalar]


def by_kind(values: Mapping[str, Any]) -> ByKind:
    """The values, sorted by the verb that writes them."""
    kinds = ByKind({}, {}, {}, {})
    for name, value in values.items():
        match value:
            case Text(markdown):
                kinds.texts[name] = markdown
            case Histogram():
                kinds.histograms[name] = value
            case HParams():
                kinds.hparams.update(value.flat())
            case _:
                kinds.scalars[name] = value
    return kinds
