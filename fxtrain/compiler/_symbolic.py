"""Symbolic sizes: a step traced once for batches of many sizes, with the conditions under which the graph holds.

The sizes of the batch are symbols while the step is traced; those of the state are numbers. Each comparison of a symbol
that Python makes on the way, as in ``if length > 512``, is a condition on later batches, checked at each call. Sizes 0
and 1 stay numbers, because they broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class SymbolicSizes:
    """Inputs of a trace, in which the sizes of a batch are symbols.

    Args:
        leaves: The leaves of a state.
        inputs: The leaves of a batch.
    """

    def __init__(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        # Imported when used: they are a third of what importing torch takes.
        from torch._dynamo.source import ConstantSource
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        # Two sizes that are equal by chance in the first batch stay two symbols.
        self._env = ShapeEnv(duck_shape=False)
        self._mode: Any = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._leaves = [self._mode.from_tensor(leaf, static_shapes=True) for leaf in leaves]
        self._inputs: list[Any] = [
            self._mode.from_tensor(
                leaf.contiguous(),
                source=ConstantSource(f"batch_{index}"),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * leaf.ndim),
            )
            for index, leaf in enumerate(inputs)
        ]

    def trace(self, function: Callable[..., Any]) -> Any:
        """The graph of a function of all leaves, those of the state first."""
        from torch.fx.experimental.proxy_tensor import make_fx

        traced = make_fx(
            function, tracing_mode="real", decomposition_table=_decompositions(), _allow_non_fake_inputs=True
        )
        with self._mode:
            return traced(*self._leaves, *self._inputs)

    def conditions(self) -> Conditions:
        """The conditions on batches; complete once the graph is compiled, because compilers compare sizes too."""
        sizes = {(i, d): size for i, leaf in enumerate(self._inputs) for d, size in enumerate(leaf.shape)}
        symbols = {place: size for place, size in sizes.items() if isinstance(size, torch.SymInt)}
        text = self._env.produce_guards_expression(list(symbols.values()))
        return Conditions(text or "True", list(symbols), {place: sizes[place] for place in sizes.keys() - symbols})


class Conditions:
    """For which batches a graph of symbolic sizes holds.

    Args:
        text: A conjunction in Python, with symbols ``L['t0']``, ``L['t1']``, ...
        symbols: The leaf and the dimension that each symbol is the size of.
        numbers: The sizes that are no symbols, by leaf and dimension.
    """

    def __init__(self, text: str, symbols: Sequence[tuple[int, int]], numbers: dict[tuple[int, int], int]) -> None:
        self._parts = text.split(" and ")
        self._code = compile(text, "<conditions>", "eval")
        self._symbols, self._numbers = symbols, numbers

    def __call__(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the graph holds for the leaves of a batch."""
        if any(inputs[leaf].shape[dimension] != size for (leaf, dimension), size in self._numbers.items()):
            return False
        return bool(eval(self._code, _functions(), self._values(inputs)))

    def broken(self, inputs: Sequence[Tensor], paths: Sequence[str]) -> list[str]:
        """The conditions that the leaves of a batch break, apart from those about sizes 0 and 1, as code.

        Args:
            inputs: The leaves.
            paths: Their paths in the batch.
        """
        values, found = self._values(inputs), list[str]()
        for part in self._parts:
            if part.startswith("2 <= ") or eval(part, _functions(), values):
                continue
            for index, (leaf, dimension) in reversed(list(enumerate(self._symbols))):
                part = part.replace(f"L['t{index}']", f"{paths[leaf]}.shape[{dimension}]")
            found.append(part)
        return found

    def _values(self, inputs: Sequence[Tensor]) -> dict[str, dict[str, int]]:
        return {"L": {f"t{n}": inputs[leaf].shape[d] for n, (leaf, d) in enumerate(self._symbols)}}


def dense(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs in the layout for which a graph of symbolic sizes is made."""
    return [leaf.contiguous() for leaf in inputs]


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Python in place of the kernel of ``pad`` in C++, which reads sizes as integers."""
    from torch._decomp import get_decompositions

    return get_decompositions([torch.ops.aten.constant_pad_nd])


def _functions() -> dict[str, Any]:
    """What the conditions call."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    return SYMPY_INTERP
