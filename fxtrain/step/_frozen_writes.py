"""Checks that a step returns the frozen parameters that its forward passes wrote."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree


class _Here(threading.local):
    old: list[tuple[str, Tensor]] | None = None


_here = _Here()


def record(paths: list[str], leaves: list[Tensor]) -> None:
    """Records leaves of a state that a forward pass replaces, with their paths."""
    if _here.old is not None:
        _here.old += zip(paths, leaves, strict=True)


def recording() -> contextlib.AbstractContextManager[list[tuple[str, Tensor]]]:
    """Collects the leaves recorded inside the context, in this thread only. Collects nothing inside Dynamo."""
    return contextlib.nullcontext([]) if torch.compiler.is_dynamo_compiling() else _recording()


@contextlib.contextmanager
def _recording() -> Generator[list[tuple[str, Tensor]]]:
    before, _here.old = _here.old, []
    try:
        yield _here.old
    finally:
        _here.old = before


def refuse_lost(who: str, old: list[tuple[str, Tensor]], params: Tree) -> None:
    """Raises if a new state still has parameters from before a forward pass that wrote them.

    Args:
        who: Name of the step, for errors.
        old: The leaves that forward passes replaced, with their paths.
        params: Parameters of the new state.

    Raises:
        RuntimeError: Names the parameter.
    """
    if not old:
        return
    kept = set(map(id, tree.leaves(params)))
    lost = next((path for path, leaf in old if id(leaf) in kept), None)
    if lost is not None:
        raise RuntimeError(
            f"expected {who} to return a state with the frozen parameters that its forward pass wrote, got {lost} from "
            "before it. Use state = found.carried(state), where found is the result of fxtrain.gradients."
        )
