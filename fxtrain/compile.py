"""Compile: a step as one graph."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from fxtrain.core import TrainState
from fxtrain.fold import Composed
from fxtrain.step import EvalFunction, Step


class Compiled:
    """A compiled step; made by ``compile``. It is called as the step is."""

    def __init__(self, step: Step | EvalFunction, compiled: Callable[..., Any], how: str) -> None:
        self.step = step
        self.how = how  # what made the graph: bitwise claims hold within one
        self._compiled = compiled
        functools.update_wrapper(self, step, updated=())

    @property
    def callbacks(self) -> Composed | tuple[()]:
        """The callbacks that the step folds."""
        return getattr(self.step, "callbacks", ())

    @property
    def fires(self) -> frozenset[type[Any]]:
        """The traced events that the step fires."""
        return getattr(self.step, "fires", frozenset())

    def __call__(self, state: TrainState, batch: Any) -> Any:
        entered = self.step.enter(state)
        try:
            result = self._compiled(entered, batch)
        except Exception as error:
            if type(error).__module__ != "torch._dynamo.exc":
                raise
            raise self._explained(error, entered, batch) from None
        return self.step.leave(state, result)

    def _explained(self, error: Exception, state: TrainState, batch: Any) -> Exception:
        """A mistake of the step's own in its own words; else what Dynamo said, with what to do."""
        try:
            self.step(state, batch)
        except Exception as mistake:
            return mistake
        if type(error).__name__ == "FailOnRecompileLimitHit":
            error.add_note(
                f"{self.step!r} has had as many graphs as torch allows, each for other shapes or another structure of "
                "state and batch: pad batches to few sizes, or compile with dynamic=True."
            )
        else:
            error.add_note(f"{self.step!r} works uncompiled, and cannot be one graph for the reason above.")
        return error

    def __repr__(self) -> str:
        return f"<compiled {self.step!r}>"


def compile(  # noqa: A001
    step: Callable[..., Any],
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool = False,
) -> Compiled:
    """``step`` as one graph: forward, backward, optimizer and traced callbacks, by ``torch.compile``.

    A graph is made at the first call and again whenever a shape, a dtype or the structure of state or batch
    changes. Values never make a new one: counters and rates are tensors. Slots that only the loop uses stay
    outside, so a callback of the loop can be added or removed without a new graph.

    Args:
        step: From ``train_step``, ``eval_step``, or any pure function ``(state, batch) -> (state, output)``.
        backend: As ``torch.compile`` takes it.
        mode: As ``torch.compile`` takes it.
        dynamic: Whether sizes are symbols: one slower graph for batches of many sizes, where the default makes
            a graph for each size.

    Raises:
        TypeError: If the step is compiled already.
        torch._dynamo.exc.Unsupported: At the first call, if the step cannot be one graph. A step that is wrong raises
            what it raises uncompiled.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).mean(), tx)
        >>> step = fx.compile(step, backend="aot_eager")
        >>> state, output = step(fx.init(torch.nn.Linear(2, 1), tx), torch.ones(4, 2))
        >>> int(state.step)
        1
    """
    if isinstance(step, Compiled):
        raise TypeError(f"{step!r} is compiled already.")
    pure = step if isinstance(step, Step | EvalFunction) else Step(step)
    compiled = torch.compile(_own_code(pure), fullgraph=True, dynamic=dynamic, backend=backend, mode=mode)
    named = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
    return Compiled(pure, compiled, named if mode is None else f"{named}, {mode}")


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    # Dynamo keeps its graphs, and counts them against its limit of 8, by code object; a callable object it calls
    # through one that all share. So the ninth step of a notebook would be refused.
    def run(state: TrainState, batch: Any) -> Any:
        return function(state, batch)

    return types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
