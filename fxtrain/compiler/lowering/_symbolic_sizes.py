"""Traces a step once for batches of many sizes, with the conditions under which the graph holds.

The sizes of the batch are symbols, and those of the state are constants. Each comparison of a symbol in Python, such as
``if length > 512``, becomes a condition on later batches that is checked at each call. Sizes 0 and 1 stay constants,
because they broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxtrain._torch_internals.tracing import (
    decompositions,
    make_fx,
    new_fake_mode,
    new_shape_env,
    size_functions,
    with_symbolic_sizes,
)
from fxtrain.core import Tree


class SymbolicSizes:
    """Fake inputs of a trace in which the sizes of a batch are symbols.

    Sizes that are equal only in the first batch stay separate symbols.

    Args:
        leaves: The leaves of a state.
        inputs: The leaves of a batch.
    """

    def __init__(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._env = new_shape_env()
        self._mode = new_fake_mode(self._env)
        self._leaves = [self._mode.from_tensor(leaf, static_shapes=True) for leaf in leaves]
        self._inputs: list[Any] = [
            with_symbolic_sizes(self._mode, leaf.contiguous(), f"batch_{index}") for index, leaf in enumerate(inputs)
        ]

    def trace(self, function: Callable[..., Tree]) -> GraphModule:
        """Returns the graph of a function of all leaves, those of the state first."""
        # The C++ kernel of ``pad`` reads sizes as integers.
        table = decompositions([torch.ops.aten.constant_pad_nd])
        traced = make_fx(function, tracing_mode="real", decomposition_table=table)
        with self._mode:
            return traced(*self._leaves, *self._inputs)

    def conditions(self) -> Conditions:
        """Returns the conditions on batches. Call it after compiling, because compilers compare sizes too."""
        sizes = {(i, d): size for i, leaf in enumerate(self._inputs) for d, size in enumerate(leaf.shape)}
        symbols = {place: size for place, size in sizes.items() if isinstance(size, torch.SymInt)}
        text = self._env.produce_guards_expression(list(symbols.values()))
        return Conditions(text or "True", list(symbols), {place: sizes[place] for place in sizes.keys() - symbols})


class Conditions:
    """The conditions under which a graph of symbolic sizes holds.

    Args:
        text: A conjunction in Python, with symbols ``L['t0']``, ``L['t1']``, ...
        symbols: The leaf and the dimension of each symbol.
        numbers: The constant sizes, by leaf and dimension.
    """

    def __init__(self, text: str, symbols: Sequence[tuple[int, int]], numbers: dict[tuple[int, int], int]) -> None:
        self._parts = text.split(" and ")
        self._code = compile(text, "<conditions>", "eval")
        self._symbols, self._numbers = symbols, numbers

    def __call__(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the graph holds for the leaves of a batch."""
        if any(inputs[leaf].shape[dimension] != size for (leaf, dimension), size in self._numbers.items()):
            return False
        return bool(eval(self._code, size_functions(), self._values(inputs)))

    def broken(self, inputs: Sequence[Tensor], paths: Sequence[str]) -> list[str]:
        """Returns the conditions that a batch breaks, as code, except those about sizes 0 and 1.

        Args:
            inputs: The leaves of the batch.
            paths: Their paths in the batch.
        """
        values, found = self._values(inputs), list[str]()
        for part in self._parts:
            if part.startswith("2 <= ") or eval(part, size_functions(), values):
                continue
            for index, (leaf, dimension) in reversed(list(enumerate(self._symbols))):
                part = part.replace(f"L['t{index}']", f"{paths[leaf]}.shape[{dimension}]")
            found.append(part)
        return found

    def _values(self, inputs: Sequence[Tensor]) -> dict[str, dict[str, int]]:
        return {"L": {f"t{n}": inputs[leaf].shape[d] for n, (leaf, d) in enumerate(self._symbols)}}


def dense(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns contiguous inputs, which a graph of symbolic sizes assumes."""
    return [leaf.contiguous() for leaf in inputs]
