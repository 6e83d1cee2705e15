"""The options of a run: one dataclass, from which ``fit`` and ``steps`` take their keyword arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, ParamSpec, Protocol, TypeVar

from fxtrain.checkpoint import Checkpointer
from fxtrain.core import (
    Callback,
    Observer,
    RunInfo,
    StepFn,
    TrainState,
    check_choice,
    check_int,
    check_positive_int,
    describe,
)
from fxtrain.core._short_tracebacks import shorten_traceback
from fxtrain.data import SourceLike
from fxtrain.equivalents import refuse_foreign_callback, unknown_argument
from fxtrain.fold import When, as_trigger
from fxtrain.loop._checks import check_checkpointer, check_eval_step, check_mesh
from fxtrain.loop._types import EvalFn
from fxtrain.values import HParams

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Plan:
    """The options of a run. ``fit`` documents each.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If there is no limit, or an option lacks the one that it depends on.
    """

    callbacks: Callback | Iterable[Callback] = ()
    eval_step: EvalFn | None = None
    eval_data: SourceLike | None = None
    eval_when: When | None = None
    eval_view: Callable[[TrainState], TrainState] | None = None
    epochs: int | None = None
    steps: int | None = None
    observers: Observer | Iterable[Observer] = ()
    progress: bool | None = None
    checkpointer: Checkpointer | None = None
    resume: bool = False
    snapshot_every: int | None = None
    snapshots: int = 2
    snapshots_on_host: bool = False
    rewind_limit: int = 3
    lag: Literal[0, 1] | None = None
    clock: Callable[[], float] = time.monotonic
    run: RunInfo | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            raise ValueError("expected epochs, steps or both, got neither. Give the length of the run.")
        for name, limit in (("epochs", self.epochs), ("steps", self.steps)):
            if limit is not None:
                check_int(name, limit, minimum=0)
        if self.snapshot_every is not None:
            check_positive_int("snapshot_every", self.snapshot_every)
        check_positive_int("snapshots", self.snapshots)
        check_int("rewind_limit", self.rewind_limit, minimum=0)
        check_choice("lag", self.lag, (None, 0, 1))
        self._check_evaluation()
        check_checkpointer(self.checkpointer)
        check_choice("resume", self.resume, (True, False))
        check_choice("progress", self.progress, (None, True, False))
        if self.run is not None and not isinstance(self.run, RunInfo):
            raise TypeError(
                f"expected run to be an fxtrain.RunInfo, got {describe(self.run)}. Make one: "
                "fxtrain.RunInfo(name=..., config=...)."
            )
        check_mesh(self.mesh)
        if self.run is not None:
            HParams(self.run.config)  # raises for two values of one flattened name
        if self.resume and self.checkpointer is None:
            raise ValueError("expected a checkpointer with resume=True, got None. Give fxtrain.checkpointer(folder).")

    def _check_evaluation(self) -> None:
        if (self.eval_step is None) != (self.eval_data is None):
            missing = "eval_data" if self.eval_data is None else "eval_step"
            raise ValueError(f"expected eval_step and eval_data together, got no {missing}. Give both or neither.")
        for name, option in (("eval_when", self.eval_when), ("eval_view", self.eval_view)):
            if option is not None and self.eval_step is None:
                raise ValueError(
                    f"expected eval_step and eval_data with {name}, got neither. Give both, or omit {name}."
                )
        if self.eval_step is not None:
            check_eval_step(self.eval_step)
        if self.eval_when is not None:
            as_trigger(self.eval_when, "eval_when")

    @property
    def length(self) -> str:
        """The length of the run in words."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.epochs} epochs"


def with_progress(plan: Plan, *, by_default: bool) -> Plan:
    """Returns the plan with an observer that shows progress, if it asks for one and has none.

    Args:
        plan: The options of a run.
        by_default: Whether to show progress if ``plan.progress`` is None.
    """
    if not (by_default if plan.progress is None else plan.progress):
        return plan
    if plan.mesh is not None and not plan.mesh.is_main:
        return plan
    from fxtrain.observers._progress import Progress, progress  # keeps the import of fxtrain fast

    given = list(plan.observers) if isinstance(plan.observers, Iterable) else [plan.observers]
    if any(isinstance(inspect.unwrap(observer), Progress) for observer in given):
        return dataclasses.replace(plan, observers=given)
    return dataclasses.replace(plan, observers=[*given, progress()])


Options = ParamSpec("Options")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class _Runs(Protocol[Options, R_co]):
    """A function of a state, a step and data, with the options of a run as keyword arguments."""

    def __call__(
        self, state: TrainState, step: StepFn, data: SourceLike, *args: Options.args, **kwargs: Options.kwargs
    ) -> R_co: ...


def with_options(
    plan: Callable[Options, Plan],
) -> Callable[[Callable[[TrainState, StepFn, SourceLike, Plan], R]], _Runs[Options, R]]:
    """Returns a decorator that replaces the last parameter, a ``Plan``, by the plan's fields as keyword arguments.

    Args:
        plan: The class ``Plan``. Its fields appear in the signature of the decorated function.

    Example:
        >>> @with_options(Plan)
        ... def length(state, step, data, plan):
        ...     return plan.length
        >>> length(None, None, None, steps=5), "steps" in inspect.signature(length).parameters
        ('5 steps', True)
    """
    options = inspect.signature(plan).parameters

    def decorate(function: Callable[[TrainState, StepFn, SourceLike, Plan], R]) -> _Runs[Options, R]:
        @functools.wraps(function)
        def run(state: TrainState, step: StepFn, data: SourceLike, *others: Options.args, **given: Options.kwargs) -> R:
            try:
                unknown = next((name for name in given if name not in options), None)
                if unknown is not None:
                    raise unknown_argument(function, unknown, options)
                for other in others:
                    refuse_foreign_callback(function.__name__, "options by name", other)
                if others:
                    raise TypeError(
                        f"{function.__name__}: expected three positional arguments, got {3 + len(others)}. Give the "
                        "options by name, such as steps=100."
                    )
                return function(state, step, data, plan(*others, **given))
            except Exception as error:
                shorten_traceback(error)
                raise

        own = inspect.signature(function)
        parameters = [*list(own.parameters.values())[:-1], *options.values()]
        vars(run)["__signature__"] = own.replace(parameters=parameters)
        return run

    return decorate
