"""Compiled steps: the objects that ``compile`` returns."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxtrain.compiler._background import BackgroundGraphs
from fxtrain.compiler._compile_times import CompileTime, CompileWatcher, watched
from fxtrain.compiler._rare_collection import collecting_rarely
from fxtrain.compiler._recompiles import OnRecompile, Recompiles, described_in_order
from fxtrain.compiler.call._graph import Found, Graph, refuse_sparse
from fxtrain.compiler.call._memory import keep_freed_memory
from fxtrain.compiler.check._mismatch import MiscompiledError
from fxtrain.compiler.lowering._executable import Executable, Run
from fxtrain.compiler.lowering._routes import Routes
from fxtrain.core import Batch, Callback, StepOutput, TrainState, warn
from fxtrain.core._collective_errors import is_of_collective
from fxtrain.core._shard import holds_shards
from fxtrain.core._short_tracebacks import shorten_traceback
from fxtrain.core._tracebacks import reaches_users
from fxtrain.data import for_step
from fxtrain.fold import Composed
from fxtrain.step import EvalFunction, ManySteps, Step, take_steps
from fxtrain.step._callbacks import identity

if TYPE_CHECKING:
    from pathlib import Path

    from fxtrain.compiler.passes._memory_policy import Memory

_log = logging.getLogger(__name__)

_UNRELATED = (torch.OutOfMemoryError, MemoryError, MiscompiledError)
"""Errors of a call that do not come from an operation of the step."""
_MAX_OTHERS = 4
"""How many steps with other callbacks a compiled step keeps, each with its graphs."""


class Compiled:
    """A compiled step, created by ``compile``. It is called like the step itself.

    Attributes:
        step: The uncompiled step.
        donates: Whether it donates the old state.
        steps_per_call: How many steps ``fit`` takes per dispatch.
        background: Whether graphs are compiled while steps run uncompiled.
        memory: Which activations are kept for the backward pass.
        artefacts: The folder of compiled graphs that the user has named.
        watchers: Those that see when it compiles in the foreground. ``fit`` adds its observers for the session.
    """

    def __init__(
        self,
        step: Step | EvalFunction,
        *,
        routes: Routes,
        on_recompile: OnRecompile,
        steps_per_call: int,
        background: bool,
        remake: Callable[..., Compiled],
        memory: Memory = "save",
        artefacts: Path | None = None,
        **options: bool,
    ) -> None:
        self.step = step
        self.donates = options["donate"]
        self.steps_per_call = steps_per_call
        self.background = background
        self.memory: Memory = memory
        self.artefacts = artefacts
        self.watchers: list[CompileWatcher] = []
        self._compiler: Callable[..., Executable] = routes
        self._routes, self._options = routes, options
        self._recompiles = Recompiles(step, on_recompile)
        self._graphs: list[Graph] = []  # most recently used first
        self._seconds = 0.0
        self._pending = BackgroundGraphs(step, routes, options)
        self._donating: Compiled | None = None
        self._several: Compiled | None = None
        self._of_members: Compiled | None = None
        self._remake = remake
        self._others: dict[tuple[object, ...], Compiled] = {}  # most recently used last
        functools.update_wrapper(self, step, updated=())

    @property
    def route(self) -> str:
        """The backend and the route that make the graphs, as text.

        The first call decides the route. Bitwise guarantees hold within one route.
        """
        return self.possible_routes[0]

    @property
    def possible_routes(self) -> tuple[str, ...]:
        """All values that ``route`` may take: several before the first call, one afterwards."""
        names = self._routes.names
        if not self.background or not self._routes.has_trace:
            return names
        return (f"{names[0]}, in the background", *names[1:])

    @property
    def callbacks(self) -> Composed | tuple[()]:
        """The callbacks that the step folds."""
        return getattr(self.step, "callbacks", ())

    @property
    def fires(self) -> frozenset[type[Any]]:
        """The traced events that the step fires."""
        return getattr(self.step, "fires", frozenset())

    @property
    def settings(self) -> dict[str, str]:
        """The settings that affect the bits of the result, as text by name."""
        settings: dict[str, str] = getattr(self.step, "settings", {})
        return {**settings, "uncompiled steps": str(self.uncompiled_steps)} if self.background else settings

    @property
    def description(self) -> dict[str, str]:
        """The description of the step, with ``compiled`` (its route) and ``donation``, as text by name."""
        described: dict[str, str] = getattr(self.step, "description", {})
        return {
            **described,
            **self.settings,
            **described,
            "compiled": self.route,
            "donation": "yes" if self.donates else "no",
        }

    @property
    def graphs(self) -> int:
        """The number of compiled graphs."""
        return len(self._graphs) - len(self._pending) + (self._several.graphs if self._several else 0)

    @property
    def pending(self) -> int:
        """The number of graphs that are not compiled yet. Steps that need them run uncompiled."""
        return len(self._pending) + (self._several.pending if self._several else 0)

    @property
    def uncompiled_steps(self) -> int:
        """The number of steps that ran uncompiled because their graph was pending."""
        several = self._several.uncompiled_steps * self.steps_per_call if self._several else 0
        return self._pending.calls + several

    @property
    def seconds(self) -> float:
        """The time spent on tracing and compiling, in seconds, in the background too."""
        return self._seconds + self._pending.seconds + (self._several.seconds if self._several else 0.0)

    def with_donation(self) -> Compiled:
        """Returns the same step with ``donate=True``. ``fit`` uses it, because it owns its state."""
        if self.donates or not isinstance(self.step, Step):
            return self
        if self._donating is None:
            self._donating = self._remake(self.step, routes=self._routes, donate=True)
        return self._donating

    def with_callbacks(self, callbacks: Callback | Iterable[Callback]) -> Compiled:
        """Returns this step with the traced callbacks among ``callbacks`` folded after its own.

        ``fit`` calls this with its callbacks. The same callbacks give the same step, so they are compiled once. If
        there are none to add, the step itself is returned.

        Args:
            callbacks: Callbacks for any events.

        Raises:
            ValueError: If the step is hand-written and a callback has to be added.
        """
        if not isinstance(self.step, Step):
            return self
        step = self.step.with_callbacks(callbacks)
        if step is self.step:
            return self
        # The steps reference their callbacks, so no id in a key is reused.
        key = tuple(map(identity, step.callbacks.handlers))
        self._others[key] = self._others.pop(key, None) or self._remake(step, donate=self.donates)
        if len(self._others) > _MAX_OTHERS:
            del self._others[next(iter(self._others))]
        return self._others[key]

    def over_members(self, *lift: Any) -> Compiled:
        """Returns the compiled step of a batch of runs, made from this step of one. ``fit`` uses it."""
        if self._of_members is None:
            self._of_members = self._remake(self.step.over_members(*lift), donate=self.donates)
        return self._of_members

    def expect_shapes(self, kinds: int | None) -> None:
        """Declares how many more batch shapes to expect. Each compiles a graph without a warning or an error.

        ``fit`` and ``evaluate`` call this with the number that their data source declares.

        Args:
            kinds: The number of batch shapes. 1 and None (unknown) declare nothing.
        """
        self._recompiles.expect_shapes(kinds)
        if self._several:
            self._several.expect_shapes(kinds)

    def multi_step(self, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Sequence[StepOutput]]:
        """Takes ``steps_per_call`` steps in one graph.

        Args:
            state: The state before the first step.
            batches: ``steps_per_call`` batches of the same structure, shapes and dtypes.

        Returns:
            The state after the last step, and the outputs of all steps. If a traced callback stops at one of them,
            later ones are not taken. The state's ``step`` counts those that were.

        Raises:
            ValueError: The number of batches is not ``steps_per_call``.
        """
        if len(batches) != self.steps_per_call:
            raise ValueError(f"expected {self.steps_per_call} batches (steps_per_call), got {len(batches)}.")
        if self.steps_per_call == 1:
            return take_steps(self, state, batches)
        if self._several is None:
            assert isinstance(self.step, Step)
            self._several = copy.copy(self)
            self._several.step = ManySteps(self.step, self.steps_per_call)
            self._several._graphs, self._several._seconds = [], 0.0
            self._several._recompiles = self._recompiles.fresh(self._several.step)
            self._several._pending = BackgroundGraphs(self._several.step, self._routes, self._options)
        return self._several(state, tuple(batches))

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        try:
            if self.background and self._pending:
                for graph in self._pending.advance(state):
                    self._graphs.remove(graph)
            found = self._found(state, batch)
            if found is None:
                # Converted only now, because most batches contain only tensors and are found faster unconverted.
                batch = for_step(batch)
                found = self._found(state, batch)
            if found is None and isinstance(self.step, Step):
                state = self.step.attached(state)
                found = self._found(state, batch)
            if found is None:
                check: Callable[[TrainState], None] | None = getattr(self.step, "check_state", None)
                with collecting_rarely():
                    if check is not None:
                        check(state)
                    self._make(state, batch)
                found = self._found(state, batch)
                assert found is not None
            graph = self._graphs[0]
            if self.background and self._pending:
                self._pending.count(graph)
            try:
                return graph(state, *found)
            except Exception as error:
                if not isinstance(error, _UNRELATED) and not reaches_users(error) and not is_of_collective(error):
                    graph.raise_uncompiled(found, batch)
                raise
        except Exception as error:
            shorten_traceback(error)
            raise

    def fresh(self, wrap: Callable[[Run], Run] = lambda run: run) -> Compiled:
        """Returns a copy of this step without graphs, which compiles in the foreground, never warns and is not checked.

        Args:
            wrap: Wraps the ``run`` function of each executable.

        Example:
            >>> import fxtrain as fx
            >>> step = fx.compile(fx.eval_step(lambda model, batch: {"mean": batch.mean()}), backend="eager")
            >>> _ = step(fx.init(torch.nn.ReLU()), torch.ones(2))
            >>> step.graphs, step.fresh().graphs
            (1, 0)
        """
        made = copy.copy(self)
        # Copied, because the copy may choose another route.
        compiler = made._routes = copy.copy(self._routes)

        def compile_and_wrap(*args: Any, **options: Any) -> Executable:
            executable = compiler(*args, **options)
            return executable._replace(run=wrap(executable.run))

        made._compiler = compile_and_wrap
        made._graphs, made._donating, made._several, made._others = [], None, None, {}
        made.watchers = []
        made._options = {**self._options, "check": False}
        made.background, made._pending = False, BackgroundGraphs(self.step, made._routes, made._options)
        made._recompiles = self._recompiles.fresh(self.step, "allow")
        return made

    def _found(self, state: TrainState, batch: Batch) -> Found | None:
        """Returns the inputs of the first graph that accepts state and batch, and moves it to the front."""
        for index, graph in enumerate(self._graphs):
            found = graph.find(state, batch)
            if found is not None:
                if index:
                    self._graphs.insert(0, self._graphs.pop(index))
                return found
        return None

    def _make(self, state: TrainState, batch: Batch) -> None:
        entered = self.step.enter(state)
        refuse_sparse(batch)
        if "traced" not in self.route and holds_shards(state.params):
            raise ValueError(
                f"expected a step compiled without backend and dynamic for a sharded state, got one compiled by "
                f"{self.route}, which cannot trace DTensors. Leave these options out."
            )
        kinds = described_in_order(entered, batch)
        is_again = self._pending.is_refused(kinds)
        if self._graphs and not is_again:
            broken = (graph.broken(batch) for graph in self._graphs)
            self._recompiles.check(kinds, next((found for found in broken if found is not None), None))
        if state.step.device.type == "cpu":
            keep_freed_memory()
        is_in_background = self.background and not is_again
        recalled = self._routes.recall(self.step, entered, batch, in_place=self.donates) if is_in_background else None
        if recalled is not None:
            graph = Graph(self.step, state, batch, recalled, **self._options)
        elif is_in_background and self._routes.has_trace:
            graph = self._pending.add(state, entered, batch, kinds)
        else:
            name = "eval_step" if isinstance(self.step, EvalFunction) else "train_step"
            number = len(self._graphs) + 1
            kept = CompileTime(self.route, self.description, kinds)
            last_seconds = kept.read()
            before = "" if last_seconds is None else f" It took {last_seconds:.1f} s the last time."
            _log.info("Compiling %r, graph %d.%s", self.step, number, before)
            began = time.perf_counter()
            with watched(self.watchers, name if number == 1 else f"{name}, graph {number}", last_seconds):
                executable = self._compiler(self.step, entered, batch, in_place=self.donates)
            seconds = time.perf_counter() - began
            self._seconds += seconds
            kept.write(seconds)
            _log.info("%r is ready after %.1f s.", self.step, seconds)
            if "traced" not in self.route and number == 1:
                self._warn_of_options_without_effect()
            options = self._options
            if self._graphs and self.step.mesh is not None:
                # Other ranks may not need this graph, and would not take part in its check.
                options = {**options, "check": False}
            graph = Graph(self.step, state, batch, executable, **options)
        self._graphs.insert(0, graph)
        if not is_again:
            self._recompiles.known.append(kinds)

    def _warn_of_options_without_effect(self) -> None:
        reason = f"because it is compiled by the route {self.route!r}, not as one traced graph"
        if self.memory != "save":
            warn(
                f"{self.step!r} keeps all activations despite memory={self.memory!r}, {reason}. Use fxtrain.remat "
                "inside the model.",
                UserWarning,
            )
        if self.artefacts is not None:
            warn(f"{self.step!r} cannot be saved in {self.artefacts}, {reason}. Each process compiles it.", UserWarning)

    def __repr__(self) -> str:
        return f"<compiled {self.step!r}>"
