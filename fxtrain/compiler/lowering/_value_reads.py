"""Reads of tensor values while a step is traced, each with a check in the graph.

The tracer's tensors have no values. For a read, the graph so far is run on the tensors that are traced, and the
finished graph returns whether later inputs give the same value.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxtrain._torch_internals.dispatch import TorchDispatchMode, item_operator, without_dispatch_modes
from fxtrain._torch_internals.tracing import node_of, tracer
from fxtrain.core import Tree

aten = torch.ops.aten

_MAX_READS = 256
_MAX_LIST_LENGTH = 64


class UncheckedReadError(RuntimeError):
    """A step reads a value that a graph cannot be specialized for, because it changes with each batch."""


@dataclasses.dataclass
class Reads:
    """The values read by a trace.

    Args:
        values: The values, in order.
        numbers: The indices of those that are numbers, such as counters or the number of rows that a mask selects. The
            others are bools.
    """

    values: list[Any] = dataclasses.field(default_factory=list)
    numbers: set[int] = dataclasses.field(default_factory=set)


class CheckedReads(TorchDispatchMode):
    """A context within ``make_fx`` in which values can be read and sizes may depend on values.

    Conversions of tensors to Python values also need ``ElementReads``.

    Args:
        given: The tensors that are traced, one for each placeholder of the graph.

    Attributes:
        reads: The values read so far.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.reads = Reads()
        self._given = given
        self._same: list[Tensor] = []
        self._known: dict[Any, Any] = {}  # values of nodes of the graph

    def same(self, device: torch.device) -> Tensor:
        """Returns, as part of the graph, whether each read has its value again: a bool tensor [reads], in order."""
        if not self._same:
            return torch.ones(0, dtype=torch.bool, device=device)
        return torch.stack([each.to(device) for each in self._same])

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._known.clear()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        checked = _CHECKED.get(func)
        found = checked(self, *args, **(kwargs or {})) if checked is not None else NotImplemented
        return func(*args, **(kwargs or {})) if found is NotImplemented else found

    def read(self, tensor: Tensor) -> Any:
        """Returns the value of a one-element tensor, which later operations of the graph may rely on.

        NotImplemented if the tensor is not in the graph.
        """
        node = node_of(tensor)
        if node is None:
            return NotImplemented
        self._run()
        number = self._known[node].item()
        if isinstance(number, float | complex) and self._depends_on_inputs(tensor):
            raise UncheckedReadError("expected reads of integers or bools, got a read of a floating-point value.")
        if len(self.reads.values) >= _MAX_READS:
            raise UncheckedReadError(f"expected at most {_MAX_READS} reads of values, got more.")
        if not isinstance(number, bool):
            self.reads.numbers.add(len(self.reads.values))
        self.reads.values.append(number)
        self._same.append((tensor.reshape(()) == number).detach())
        return number

    def _run(self) -> None:
        """Runs the operations recorded since the last read, in order, including in-place writes."""
        from torch.fx.node import map_arg

        tracing, inputs = tracer(), iter(self._given)
        # The graph already contains the casts of autocast.
        uncast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
        with without_dispatch_modes(), torch.no_grad(), uncast[0], uncast[1]:
            for node in tracing.graph.nodes:
                tensor = next(inputs) if node.op == "placeholder" else None
                if node in self._known:
                    continue
                if node.op == "placeholder":
                    # Cloned, because a step may write into its arguments before it is refused.
                    self._known[node] = tensor.clone() if tensor is not None else None
                elif node.op == "get_attr":
                    self._known[node] = operator.attrgetter(node.target)(tracing.root)
                else:
                    args, kwargs = map_arg((node.args, node.kwargs), self._known.__getitem__)
                    self._known[node] = node.target(*args, **kwargs)

    def _depends_on_inputs(self, tensor: Tensor) -> bool:
        todo: list[Any] = [node_of(tensor)]
        seen = set[Any]()
        while todo:
            node = todo.pop()
            if node.op == "placeholder":
                return True
            if node not in seen:
                seen.add(node)
                todo += node.all_input_nodes
        return False


class ElementReads(TorchFunctionMode):
    """Converts tensors to Python values one element at a time, as ``CheckedReads`` reads them."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        if func is Tensor.tolist and args[0].numel() <= _MAX_LIST_LENGTH:
            return _listed(args[0])
        if func is Tensor.__bool__ and args[0].numel() == 1 and args[0].dtype != torch.bool:
            return bool(args[0] != 0)
        if func is Tensor.__int__ and args[0].numel() == 1 and args[0].is_floating_point():
            return int(args[0].trunc().to(torch.int64))
        return func(*args, **(kwargs or {}))


def _listed(tensor: Tensor) -> Any:
    return [_listed(part) for part in tensor.unbind()] if tensor.ndim else tensor.item()


# Each function below returns NotImplemented if the operator should be recorded unchanged.


def _equal(mode: CheckedReads, one: Tensor, two: Tensor) -> Any:
    return one.shape == two.shape and mode.read((one == two).all())


def _allclose(mode: CheckedReads, one: Tensor, two: Tensor, *args: float, equal_nan: bool = False) -> Any:
    return mode.read(torch.isclose(one, two, *args, equal_nan=equal_nan).all())


def _nonzero(mode: CheckedReads, tensor: Tensor) -> Any:
    count = mode.read(torch.count_nonzero(tensor))
    if count is NotImplemented:
        return count
    # Missing rows are filled with 0, a valid index, so a call with fewer rows fails its check without an error.
    return aten.nonzero_static.default(tensor, size=count, fill_value=0)


def _index(mode: CheckedReads, tensor: Tensor, indices: Sequence[Tensor | None]) -> Any:
    if all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in indices):
        return NotImplemented
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            numbers.append(index)
            continue
        rows = _nonzero(mode, index)
        if rows is NotImplemented:
            return rows
        numbers += rows.unbind(1)
    return aten.index.Tensor(tensor, numbers)


def _masked_select(mode: CheckedReads, tensor: Tensor, mask: Tensor) -> Any:
    tensor, mask = torch.broadcast_tensors(tensor, mask)
    rows = _nonzero(mode, mask)
    return rows if rows is NotImplemented else aten.index.Tensor(tensor, rows.unbind(1)) if mask.ndim else tensor[None]


def _repeat_interleave(mode: CheckedReads, repeats: Tensor, *, output_size: int | None = None) -> Any:
    if output_size is not None:
        return NotImplemented
    count = mode.read(repeats.sum())
    return count if count is NotImplemented else aten.repeat_interleave.Tensor(repeats, output_size=count)


_CHECKED: dict[Any, Callable[..., Any]] = {
    item_operator(): CheckedReads.read,
    aten.equal.default: _equal,
    aten.allclose.default: _allclose,
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index,
    aten.masked_select.default: _masked_select,
    aten.repeat_interleave.Tensor: _repeat_interleave,
}
