"""Compile: a step as one graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fxtrain.core import TrainState
from fxtrain.fold import Composed
from fxtrain.step import EvalFunction, Step


class Compiled:
    """A compiled step; made by ``compile``. It is called as the step is."""

    def __init__(self, step: Step | EvalFunction, compiled: Callable[..., Any]) -> None:
        self.step = step
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
        return self.step.leave(state, self._compiled(self.step.enter(state), batch))

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
        torch._dynamo.exc.Unsupported: At the first call, if the step cannot be one graph.

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
    return Compiled(pure, torch.compile(pure, fullgraph=True, dynamic=dynamic, backend=backend, mode=mode))
