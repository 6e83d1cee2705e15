"""What a trace notes on the nodes of its graph for the passes: derivatives, regions to recompute, and transfers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from fxtrain._torch_internals.tracing import current_recorder, marking_nodes

_PASS, _REGIONS, _TRANSFERS = "fxtrain_pass", "fxtrain_regions", "fxtrain_transfers"

Saves = Callable[[Any], bool]
"""Whether the value of a graph node is kept for the backward pass."""


class Pass(NamedTuple):
    """The forward or the backward pass of one derivative.

    Args:
        derivative: The identity of the derivative, of which a step may take several.
        is_backward: Whether it is the backward pass.
    """

    derivative: object
    is_backward: bool


class Region:
    """A part of a forward pass that is recomputed in the backward pass.

    Args:
        saves: Which values are kept all the same. None keeps none.
    """

    def __init__(self, saves: Saves | None = None) -> None:
        self.saves: Saves = saves or _never


class Transfers:
    """Collectives of tensors that may be started in any order and in buckets.

    Args:
        is_gather: Whether they gather whole tensors from parts. Otherwise, they sum whole tensors into parts.
    """

    def __init__(self, *, is_gather: bool) -> None:
        self.is_gather = is_gather


def _never(node: Any) -> bool:
    return False


@contextlib.contextmanager
def marking_pass(derivative: object, *, is_backward: bool) -> Generator[None]:
    """Marks the nodes that a trace adds inside the context. An inner context takes precedence."""

    def mark(node: Any) -> None:
        node.meta.setdefault(_PASS, Pass(derivative, is_backward))

    with marking_nodes(mark):
        yield


@contextlib.contextmanager
def marking_region(region: Region) -> Generator[None]:
    """Marks the nodes that a trace adds inside the context as a region. Regions nest."""

    def mark(node: Any) -> None:
        set_regions(node, (region, *regions_of(node)))

    recorder = current_recorder()
    if recorder is not None:
        recorder.refuse("regions to recompute")
    with marking_nodes(mark):
        yield


@contextlib.contextmanager
def marking_transfers(transfers: Transfers) -> Generator[None]:
    """Marks the nodes that a trace adds inside the context: collectives of one tensor each, and what they need."""

    def mark(node: Any) -> None:
        node.meta[_TRANSFERS] = transfers

    with marking_nodes(mark):
        yield


def transfers_of(node: Any) -> Transfers | None:
    """Returns the transfers that a node is part of."""
    return node.meta.get(_TRANSFERS)


def pass_of(node: Any) -> Pass | None:
    """Returns the pass that a node belongs to, or None outside of derivatives."""
    return node.meta.get(_PASS)


def set_backward(node: Any) -> None:
    """Makes a node of a forward pass part of the backward pass of the same derivative."""
    node.meta[_PASS] = node.meta[_PASS]._replace(is_backward=True)


def join_pass(node: Any, other: Any) -> None:
    """Makes a node part of the pass of another one, and of no transfers."""
    node.meta[_PASS] = pass_of(other)
    node.meta.pop(_TRANSFERS, None)


def regions_of(node: Any) -> tuple[Region, ...]:
    """Returns the regions around a node, the outermost first."""
    return node.meta.get(_REGIONS, ())


def set_regions(node: Any, regions: tuple[Region, ...]) -> None:
    """Replaces the regions around a node."""
    node.meta[_REGIONS] = regions
