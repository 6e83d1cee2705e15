"""Runs each call of a step inside a context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from fxtrain.core import Batch, Callback, StepOutput, TrainState, describe
from fxtrain.step._callbacks import shared

R = TypeVar("R")


class WrappedStep(Generic[R]):
    """A step whose calls run inside a context. Made by ``wrap_step``. All other attributes are those of the step.

    Args:
        step: A training or evaluation step, compiled or not.
        context: Makes a context for each call.

    Example:
        >>> import contextlib, fxtrain as fx
        >>> step = fx.train_step(lambda model, batch: model(batch).sum(), fx.optim.sgd(0.1))
        >>> WrappedStep(step, contextlib.nullcontext).settings == step.settings
        True
    """

    def __init__(
        self, step: Callable[[TrainState, Batch], R], context: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._step, self._context = step, context

    def __call__(self, state: TrainState, batch: Batch) -> R:
        with self._context():
            return self._step(state, batch)

    def multi_step(self, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Sequence[StepOutput]]:
        """Takes several steps in one call of the wrapped step, inside one context.

        Args:
            state: The state before the first step.
            batches: One batch for each step.
        """
        with self._context():
            return self.__getattr__("multi_step")(state, batches)

    def with_donation(self) -> WrappedStep[R]:
        """Returns the same step for a caller that owns its state, such as ``fit``."""
        if not hasattr(self._step, "with_donation"):
            return self
        return WrappedStep(self.__getattr__("with_donation")(), self._context)

    def with_callbacks(self, callbacks: Callback | Iterable[Callback]) -> WrappedStep[R]:
        """Returns the step that also folds the traced callbacks among ``callbacks``, as ``Step.with_callbacks``."""
        step, _ = shared(self._step, callbacks)
        return self if step is self._step else WrappedStep(step, self._context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __repr__(self) -> str:
        return f"<wrapped {self._step!r}>"


def wrap_step(
    step: Callable[[TrainState, Batch], R], context: Callable[[], AbstractContextManager[object]]
) -> WrappedStep[R]:
    """Returns a step that runs each call inside a context, such as a profiler region, a stream or a lock.

    The context is outside the compiled graph, and cannot change what the step computes.

    Args:
        step: A training or evaluation step, compiled or not.
        context: Makes a context for each call.

    Raises:
        TypeError: If ``step`` or ``context`` is not callable. A context manager is usually not callable itself.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).sum(), tx)
        >>> step = fx.wrap_step(step, lambda: torch.profiler.record_function("train step"))
        >>> state, output = step(fx.init(torch.nn.Linear(1, 1), tx), torch.ones(1, 1))
        >>> int(state.step)
        1
    """
    if not callable(step):
        raise TypeError(
            f"expected a step, got {describe(step)}. Give the result of train_step, eval_step or fxtrain.compile."
        )
    if not callable(context):
        raise TypeError(
            f"expected context to be a function that makes a context, got {describe(context)}. Give "
            "lambda: context(...)."
        )
    return WrappedStep(step, context)
