"""Checks that a step carries on the frozen parameters that its forward passes wrote."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree


class _Here(threading.local):
    old: list[tuple[str, Tensor]] | None = None


_here = _Here()


def note(paths: list[str], leaves: list[Tensor]) -> None:
    """Notes leaves of a state that a forward pass replaces, with their paths."""
    if _here.old is not None:
        _here.old += zip(paths, leaves, strict=True)


@contextlib.contextmanager
def noting() -> Generator[list[tuple[str, Tensor]]]:
    """Collects what is noted inside, in this thread alone."""
    before, _here.old = _here.old, []
    try:
        yield _here.old
    finally:
        _here.old = before


def noted() -> contextlib.AbstractContextManager[list[tuple[str, Tensor]]]:
    """``noting``; inside Dynamo, which knows no such contexts, a context that collects nothing."""
    return contextlib.nullcontext([]) if torch.compiler.is_dynamo_compiling() else noting()


def refuse_lost(who: str, old: list[tuple[str, Tensor]], params: Any) -> None:
    """Raises if the parameters of a new state are those from before a forward pass that wrote them.

    Raises:
        RuntimeError: Naming the parameter.
    """
    if not old:
        return
    kept = set(map(id, tree.leaves(params)))
    lost = next((path for path, leaf in old if id(leaf) in kept), None)
    if lost is not None:
        raise RuntimeError(
            f"expected {who} to return a state with the frozen parameters that its forward pass wrote, got {lost} from "
            "before it. Carry on what it wrote: state = found.carried(state), where found is what fxtrain.gradients "
            "returned."
        )
