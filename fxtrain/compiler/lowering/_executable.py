"""The result of lowering: a compiled function of the leaves of a state and of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.fx import GraphModule

from fxtrain.compiler.lowering._symbolic_sizes import Conditions
from fxtrain.core import Tree

Backend = str | Callable[[GraphModule, Sequence[Tensor]], Callable[..., object]]
"""A backend of ``torch.compile``: its name, or a function from a graph and example inputs to a compiled function."""

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Tree]]
"""Maps the leaves of a state and of a batch to the leaves of the new state, if there is one, and the output."""


class Executable(NamedTuple):
    """A compiled step, without the checks of its inputs.

    Args:
        run: The function.
        written: Indices of the state leaves that it updates in place; None if it returns new ones.
        conditions: Conditions on the sizes of batches, if they are symbolic.
    """

    run: Run
    written: Sequence[int] | None
    conditions: Conditions | None = None
