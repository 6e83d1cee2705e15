"""The choice of the route by which a step is compiled: the first one that works."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from fxtrain._torch_internals.dispatch import dispatch_keys_kept
from fxtrain._torch_internals.interface import Feature, UnsupportedError, supports
from fxtrain.compiler.lowering._dynamo import fails
from fxtrain.compiler.lowering._executable import Executable
from fxtrain.compiler.lowering._graph_breaks import NO_COMPILER, Break, break_from_error
from fxtrain.compiler.lowering._muted_logs import without_torch_messages
from fxtrain.core import Batch, TrainState, warn
from fxtrain.core._tracebacks import is_raised_by_users
from fxtrain.model import CapturedStateError, UnseededError, ValuesNeededError
from fxtrain.step import EvalFunction, Step

if TYPE_CHECKING:
    # Only for annotations, because the import loads the compiler's passes.
    from fxtrain.compiler.lowering._recall import Recall

R = TypeVar("R")

_log = logging.getLogger(__name__)


_VALUES_CHANGE = Break("Python reads tensor values that differ from batch to batch.")


class GraphBreakError(RuntimeError):
    """A step compiled with ``fullgraph=True`` cannot be one graph."""


class NoGradientsError(RuntimeError):
    """A step calls no function from ``fxtrain.gradients``, so there is no place to cut it."""


class Route(NamedTuple):
    """One way to compile a step.

    Args:
        name: The backend and the route, for records and explanations.
        compile: ``(step, state, batch, in_place=...) -> Executable``. It raises if the route does not work for a step.
        outcome: What is compiled, as a clause.
        is_whole: Whether it makes one graph of the whole step.
        has_otherwise: Whether ``compile`` also takes ``otherwise=``, a function ``(state, batch) -> Executable`` that
            tries later routes, for calls that its graphs do not hold for.
        trace: The part of ``compile`` that must run in the calling thread. It returns a function that makes the
            executable in any thread.
        needs: The parts of the compiler that use private interfaces of torch. Without them the route is not tried.
        recall: Finds what an earlier process has compiled by it. None if it leaves nothing to find.
    """

    name: str
    compile: Callable[..., Executable]
    outcome: str
    is_whole: bool
    has_otherwise: bool = False
    trace: Callable[..., Callable[[], Executable]] | None = None
    needs: Feature = Feature(0)
    recall: Recall | None = None


class Choice(NamedTuple):
    """The route of a step.

    Args:
        route: The route, or None if none works.
        found: What rules out the routes before it, or None for the first one.
    """

    route: Route | None
    found: Break | None


class Routes:
    """The routes for one step. The first one that works is kept for all later graphs, so that they agree bitwise.

    Args:
        routes: The routes, in the order in which they are tried.
        fullgraph: Whether to try only routes that make one graph of the step.
        rehearsal: Makes the same routes without compilation. None for such routes themselves.

    Raises:
        GraphBreakError: When called: ``fullgraph`` is set and no route makes one graph.
        Exception: When called: the step raises it uncompiled.
    """

    def __init__(
        self, routes: Sequence[Route], *, fullgraph: bool, rehearsal: Callable[[], Routes] | None = None
    ) -> None:
        self._routes = [route for route in routes if route.is_whole or not fullgraph]
        self._rehearsal = rehearsal
        self._chosen = 0
        self._is_chosen = False
        self._found: Break | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all routes that may still be taken: one after the first call."""
        routes = [self._routes[self._chosen]] if self._is_chosen else self._routes
        return tuple(route.name for route in routes)

    @property
    def choice(self) -> Choice:
        """The route in use, or the first one before the first call."""
        return Choice(self._routes[self._chosen], self._found)

    def choose(self, step: Step | EvalFunction, state: TrainState, batch: Batch) -> Choice:
        """Returns the route in use, or a prediction of it before the first call.

        The prediction is wrong if the compiler itself fails. Nothing is compiled, no warning is issued, and these
        routes do not change. Raises what the first call would raise.
        """
        if self._is_chosen or self._rehearsal is None:
            return self.choice
        rehearsed = self._rehearsal()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rehearsed(step, state, batch, in_place=False)
        return rehearsed.choice

    def __call__(self, step: Step | EvalFunction, state: TrainState, batch: Batch, *, in_place: bool) -> Executable:
        """Compiles an executable by the first route that works, with one warning if others failed before it."""
        recalled = self.recall(step, state, batch, in_place=in_place)
        if recalled is not None:
            return recalled
        # Inductor takes seconds to import, and graphs from files do not need it. A route that does raises.
        self._drop_unsupported(Feature.TRACED | Feature.SYMBOLIC)
        return self._compile(step, state, batch, None, self._chosen, in_place=in_place)

    def recall(
        self, step: Step | EvalFunction, state: TrainState, batch: Batch, *, in_place: bool
    ) -> Executable | None:
        """Returns what an earlier process has compiled by the route in use, found without a trace, or None."""
        recall = self._routes[self._chosen].recall
        recalled = None if recall is None else _tried(recall.find, step, state, batch, in_place=in_place)
        self._is_chosen = self._is_chosen or recalled is not None
        return recalled

    @property
    def has_trace(self) -> bool:
        """Whether the route in use can compile in another thread."""
        self._drop_unsupported(Feature.TRACED | Feature.SYMBOLIC)  # the rest takes seconds to import, which a job does
        return self._routes[self._chosen].trace is not None

    def _drop_unsupported(self, checked: Feature) -> None:
        """Drops the routes that the installed torch does not support. Checks only some of the features they need."""
        routes = [route for route in self._routes if supports(route.needs & checked)]
        if len(routes) < len(self._routes):
            self._routes, self._chosen = routes, 0

    def trace(
        self, step: Step | EvalFunction, state: TrainState, batch: Batch, *, in_place: bool
    ) -> Callable[[], Executable]:
        """Traces the step by the route in use. Returns a function that compiles it in any thread.

        Raises:
            Exception: The step cannot be traced. Later routes are tried by calling this object.
        """
        trace = self._routes[self._chosen].trace
        assert trace is not None
        compile_graph = trace(step, state, batch, in_place=in_place)
        self._is_chosen = True
        return compile_graph

    def _compile(
        self,
        step: Step | EvalFunction,
        state: TrainState,
        batch: Batch,
        found: Break | None,
        first: int,
        *,
        in_place: bool,
    ) -> Executable:
        with contextlib.ExitStack() as after_failure:
            for index in range(first, len(self._routes)):
                route = self._routes[index]
                attempt = functools.partial(_compiled, route, step, state, batch)
                if route.has_otherwise:
                    # Compiles an executable for all values, if those that the step reads keep changing. Later graphs
                    # use its route too.
                    known = found or _VALUES_CHANGE
                    later = functools.partial(self._compile, step, found=known, first=index + 1, in_place=False)
                    attempt = functools.partial(attempt, otherwise=later)
                try:
                    with without_torch_messages():
                        executable = attempt(in_place=in_place)
                except UnsupportedError:
                    self._drop_unsupported(~Feature(0))
                    return self._compile(step, state, batch, found, self._chosen, in_place=in_place)
                except (CapturedStateError, UnseededError, torch.OutOfMemoryError, MemoryError):
                    raise
                except NoGradientsError as error:
                    _log.debug("%s: %s", route.name, error)
                    continue
                except Exception as error:
                    after_failure.enter_context(_garbage_kept())
                    _log.debug("%r cannot be compiled by %s.", step, route.name, exc_info=error)
                    if found is None:
                        # Raises the step's own error, if it has one.
                        step(state, batch)
                        if is_raised_by_users(error):
                            with without_torch_messages():
                                if not fails(functools.partial(attempt, in_place=False)):
                                    raise
                        found = break_from_error(error)
                    continue
                self._chosen, self._is_chosen, self._found = index, True, found or self._found
                if route.recall is not None and executable.origin is not None:
                    _tried(route.recall.keep, step, state, batch, executable.origin, in_place=in_place)
                if found is not None:
                    warn(_fallback(step, found, route), UserWarning)
                return executable
            assert found is not None
            raise GraphBreakError(_refused(step, found)) from None


@contextlib.contextmanager
def _garbage_kept() -> Generator[None]:
    """Delays garbage collection to the end of the block.

    Frames of a failed compilation may hold guards that reset the state of torch's dispatcher when they are collected.
    In the middle of another call this breaks it, as it did forward-mode derivatives.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            with dispatch_keys_kept() as is_kept:
                if is_kept:  # otherwise the garbage is left to the next automatic collection
                    gc.collect()
            gc.enable()


def _tried(function: Callable[..., R], *args: Any, **options: Any) -> R | None:
    """Calls a function that only saves time. If it fails, the step is compiled without it."""
    try:
        return function(*args, **options)
    except Exception as error:
        _log.debug("%s failed.", function, exc_info=error)
        return None


def _compiled(route: Route, step: Step | EvalFunction, state: TrainState, batch: Batch, **options: Any) -> Executable:
    try:
        return route.compile(step, state, batch, **options)
    except ValuesNeededError:
        step(state, batch)
        return route.compile(step, state, batch, **options)


def _fallback(step: Step | EvalFunction, found: Break, route: Route) -> str:
    if found.reason == NO_COMPILER:
        return f"{step!r} cannot be compiled:\n{_lines(found)}Compiled instead: {route.outcome}. Results are the same."
    return (
        f"{step!r} cannot be traced as one graph:\n{_lines(found)}"
        f"Compiled instead: {route.outcome}. Results are the same. fx.explain(step, state, batch) lists all such "
        "places. fx.compile(step, fullgraph=True) makes this an error."
    )


def _refused(step: Step | EvalFunction, found: Break) -> str:
    if found.reason == NO_COMPILER:
        return f"expected {step!r} to be compiled (fullgraph=True), got no compiler:\n{_lines(found)}".rstrip()
    return (
        f"expected a step that is one graph (fullgraph=True), got {step!r}:\n{_lines(found)}"
        "fx.explain(step, state, batch) lists all such places. Change them, or leave out fullgraph=True to compile "
        "only part of the step."
    )


def _lines(found: Break) -> str:
    """Returns the place, its source and the reason, one per line."""
    lines = (found.where and f"{found.where}: {found.code}", found.within, found.reason)
    return "".join(f"  {line}\n" for line in lines if line)
