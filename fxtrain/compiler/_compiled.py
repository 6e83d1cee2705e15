"""Compiled steps: the function ``compile`` and the object that it returns."""

from __future__ import annotations

import copy
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from fxtrain import tree
from fxtrain.compiler._graph import Found, Graph
from fxtrain.compiler._heap import keep_freed_memory
from fxtrain.compiler._pending import Pending
from fxtrain.compiler._recompile_reasons import advice, batches_of, changes, described, is_other_batch
from fxtrain.compiler._routes import Routes, routes_to
from fxtrain.compiler._trace import AHEAD, Artefact
from fxtrain.core import Callback, StepOutput, TrainState, check_choice, check_positive_int, describe
from fxtrain.core._frames import reaches_users
from fxtrain.data import for_step
from fxtrain.fold import Composed
from fxtrain.step import EvalFunction, ManySteps, Step
from fxtrain.step._callbacks import identity

_log = logging.getLogger(__name__)

_MAX_OTHERS = 4
"""How many steps with other callbacks a compiled step keeps, each with its graphs."""

OnRecompile = Literal["warn", "error", "allow"]


class RecompileError(RuntimeError):
    """A compiled step would have to recompile, which ``on_recompile="error"`` forbids."""


class Compiled:
    """A compiled step, created by ``compile``. It is called like the step itself."""

    def __init__(
        self,
        step: Step | EvalFunction,
        *,
        routes: Routes,
        on_recompile: OnRecompile,
        steps_per_call: int,
        background: bool,
        remake: Callable[..., Compiled],
        **options: bool,
    ) -> None:
        self.step = step
        self.donates = options["donate"]
        self.steps_per_call = steps_per_call
        self._compiler: Callable[..., Artefact] = routes
        self._routes, self._on_recompile, self._options = routes, on_recompile, options
        self._graphs: list[Graph] = []  # most recently used first
        self._known: list[dict[str, str]] = []
        self._seconds = 0.0
        self._pending = Pending(step, routes, options) if background else None
        self._declared = 1  # the number of batch shapes up to which a new graph raises no warning
        self._has_warned_of_batches = False
        self._donating: Compiled | None = None
        self._several: Compiled | None = None
        self._remake = remake
        self._others: dict[tuple[object, ...], Compiled] = {}  # most recently used last
        functools.update_wrapper(self, step, updated=())

    @property
    def route(self) -> str:
        """The backend and the route that make the graphs, as text.

        The first call decides the route. Bitwise guarantees hold within one route.
        """
        return self.possible[0]

    @property
    def possible(self) -> tuple[str, ...]:
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
    def background(self) -> bool:
        """Whether graphs are compiled while steps run uncompiled."""
        return self._pending is not None

    @property
    def graphs(self) -> int:
        """The number of compiled graphs."""
        own = len(self._graphs) - len(self._pending or ())
        return own + (self._several.graphs if self._several is not None else 0)

    @property
    def pending(self) -> int:
        """The number of graphs that are not compiled yet. Steps that need them run uncompiled."""
        return len(self._pending or ()) + (self._several.pending if self._several is not None else 0)

    @property
    def uncompiled_steps(self) -> int:
        """The number of steps that ran uncompiled because their graph was pending."""
        calls = self._pending.calls if self._pending is not None else 0
        several = self._several
        return calls + (several.uncompiled_steps * several.steps_per_call if several is not None else 0)

    @property
    def seconds(self) -> float:
        """The time spent on tracing and compiling, in seconds, in the background too."""
        own = self._seconds + (self._pending.seconds if self._pending is not None else 0.0)
        return own + (self._several.seconds if self._several is not None else 0.0)

    def donating(self) -> Compiled:
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
        found = self._others.pop(key, None)
        self._others[key] = self._remake(step, donate=self.donates) if found is None else found
        if len(self._others) > _MAX_OTHERS:
            del self._others[next(iter(self._others))]
        return self._others[key]

    def expect(self, kinds: int | None) -> None:
        """Declares how many more batch shapes to expect. Each compiles a graph without a warning or an error.

        ``fit`` and ``evaluate`` call this with the number that their data source declares.

        Args:
            kinds: The number of batch shapes. 1 and None (unknown) declare nothing.
        """
        self._declared = batches_of(self._known) + kinds if kinds is not None and kinds > 1 else 1
        if self._declared > 1:
            _log.info("%r takes batches of %d shapes and compiles a graph for each.", self.step, kinds)
        if self._several is not None:
            self._several.expect(kinds)

    def many(self, state: TrainState, batches: Sequence[Any]) -> tuple[TrainState, Sequence[StepOutput]]:
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
            state, output = self(state, batches[0])
            return state, (output,)
        if self._several is None:
            assert isinstance(self.step, Step)
            self._several = copy.copy(self)
            self._several.step = ManySteps(self.step, self.steps_per_call)
            self._several._graphs, self._several._known, self._several._seconds = [], [], 0.0
            if self.background:
                self._several._pending = Pending(self._several.step, self._routes, self._options)
        return self._several(state, tuple(batches))

    def __call__(self, state: TrainState, batch: Any) -> Any:
        if self._pending:
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
            self._make(state, batch)
            found = self._found(state, batch)
            assert found is not None
        graph = self._graphs[0]
        if self._pending:
            self._pending.count(graph)
        try:
            return graph(state, *found)
        except Exception as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not reaches_users(error):
                graph.raise_uncompiled(found, batch)
            raise

    def _found(self, state: TrainState, batch: Any) -> Found | None:
        """Returns the inputs of the first graph that accepts state and batch, and moves it to the front."""
        for index, graph in enumerate(self._graphs):
            found = graph.find(state, batch)
            if found is not None:
                if index:
                    self._graphs.insert(0, self._graphs.pop(index))
                return found
        return None

    def _make(self, state: TrainState, batch: Any) -> None:
        entered = self.step.enter(state)
        _refuse_sparse(batch)
        kinds = described(entered, batch)
        is_again = self._pending is not None and self._pending.is_refused(kinds)
        if not is_again:
            self._refuse_or_warn(kinds, batch)
        if state.step.device.type == "cpu":
            keep_freed_memory()
        if self._pending is not None and not is_again and self._routes.has_trace:
            self._graphs.insert(0, self._pending.add(state, entered, batch, kinds))
            self._known.append(kinds)
            return
        _log.info("Compiling %r, graph %d.", self.step, len(self._graphs) + 1)
        began = time.perf_counter()
        artefact = self._compiler(self.step, entered, batch, in_place=self.donates)
        seconds = time.perf_counter() - began
        self._seconds += seconds
        _log.info("Compiled %r in %.1f s.", self.step, seconds)
        self._graphs.insert(0, Graph(self.step, state, batch, artefact, **self._options))
        if not is_again:
            self._known.append(kinds)

    def _refuse_or_warn(self, kinds: dict[str, str], batch: Any) -> None:
        """Applies ``on_recompile`` if another graph is needed that no data source has declared."""
        is_batch = is_other_batch(kinds, self._known)
        is_declared = is_batch and batches_of([*self._known, kinds]) <= self._declared
        broken = next((found for graph in self._graphs if (found := graph.broken(batch)) is not None), None)
        # Sizes 0 and 1 are never symbolic, so one more graph for them is expected.
        is_declared |= broken is not None and not broken
        if self._graphs and self._on_recompile != "allow" and not is_declared:
            remedy = advice(kinds, self._known, broken)
            found = changes(kinds, self._known)
            if self._on_recompile == "error":
                raise RecompileError(
                    f"expected inputs for which {self.step!r} is compiled, got others: {found}. {remedy} "
                    "on_recompile='allow' compiles another graph."
                )
            # One warning is enough for batches of many sizes.
            if not (is_batch and self._has_warned_of_batches):
                warnings.warn(
                    f"{self.step!r} recompiles: {found}. {remedy} on_recompile='allow' silences this warning.",
                    UserWarning,
                    stacklevel=4,
                )
            self._has_warned_of_batches |= is_batch

    def __repr__(self) -> str:
        return f"<compiled {self.step!r}>"


def compile(  # noqa: A001
    step: Callable[..., Any],
    *,
    donate: bool = False,
    backend: str | Callable[..., Any] | None = None,
    mode: str | None = None,
    dynamic: bool = False,
    fullgraph: bool = False,
    steps_per_call: int = 1,
    on_recompile: OnRecompile = "warn",
    background: bool = False,
) -> Compiled:
    """Compiles a step into one graph: forward, backward, optimizer and traced callbacks.

    The first call traces and compiles the step. Changed values never recompile it, because counters and learning rates
    are tensors. Slots that only the loop uses stay outside the graph, so callbacks of the loop can be added or removed
    without recompiling. Everything else that the step reads besides its arguments (modules, closures, globals,
    environment variables) is a constant of the graph and keeps its value from the time of the trace. Random samples
    from Python and numpy, clocks and files are either read at each call or refused.

    A step whose Python code needs the value of a tensor, as in ``if loss > 1``, ``.item()`` or a mask as an index, has
    no such graph. The first of these routes that works is taken instead, with one warning that names the line:

    1. One graph for the values that were read. Each call checks that they are the same, and a few other values get
       graphs of their own.
    2. One graph by Dynamo.
    3. The loss function in several graphs, differentiated by ``torch.autograd``, and the optimizer and the traced
       callbacks as one graph.
    4. The forward and backward passes uncompiled, and the rest as one graph.

    All routes compute the same result.

    The first call takes from ten seconds to minutes. torch caches compiled code on disk (``TORCHINDUCTOR_CACHE_DIR``),
    so that a later process starts in a few seconds. The logger ``fxtrain.compiler`` reports at level INFO what is
    compiled and how long it took.

    On the CPU, glibc is set to keep up to 2 GiB of freed memory for the next step instead of returning it to the
    system. Settings such as ``MALLOC_TRIM_THRESHOLD_`` and other allocators are left alone.

    Args:
        step: From ``train_step`` or ``eval_step``, or any pure function ``(state, batch) -> (state, output)``.
        donate: Whether the new state reuses the buffers of the old one in place, which saves the memory and the time of
            a second state. Any later access to the old state raises ``DonatedError``. Leaves that are referenced
            elsewhere (a parameter, a view, a dict of them) are copied first and stay valid.
        backend: A backend of ``torch.compile``, by name or as a function. It is called through Dynamo, which checks its
            assumptions about Python at each call, so dispatch overhead is higher. By default, the step is traced and
            compiled by Inductor.
        mode: As in ``torch.compile``. ``"reduce-overhead"`` replays CUDA graphs. ``"ahead-of-time"`` builds a shared
            library that runs without Python between its kernels. It takes about twice as long to build, makes small
            steps faster, and is cached with torch's other compiled code.
        dynamic: Whether batch sizes are symbolic: one graph for all sizes, slower than a graph for each. Dropout masks
            and other random samples are those of the uncompiled step at every size. Sizes 0 and 1 are never symbolic,
            so a batch of one example compiles another graph. Code that reads a size as a number, such as ``len(x)`` or
            torch's recurrent layers, compiles a graph for each size, and the warning names the sizes. Use
            ``x.shape[0]``, or pad to few sizes.
        fullgraph: Whether a step that cannot be one graph is an error.
        steps_per_call: How many steps ``fit`` takes per dispatch, in one graph. Useful if calling a graph takes longer
            than computing it. Traced callbacks are folded at each step. Callbacks of the loop are folded after all of
            them, so their requests take effect up to this many steps later. Compile time grows in proportion. Steps
            left over at the end of an epoch are taken one by one.
        on_recompile: What to do if the structure, a shape or a dtype of state or batch changes: ``"warn"`` compiles
            another graph and says what changed, ``"error"`` raises ``RecompileError``, and ``"allow"`` compiles
            silently. Batches that vary in size cause one warning. Sizes declared by a data source, such as
            ``fxtrain.data.bucketed``, compile a graph each without a warning or an error.
        background: Whether to compile in a worker thread while steps run uncompiled. The second call traces the step,
            which takes seconds, and hands the graph to the worker. Calls switch to the graph as soon as it is ready.
            The worker compiles one graph at a time, in the order in which sizes first appeared. Uncompiled steps are
            slower while it works. Results agree within the tolerance of compiled steps, but are not bitwise
            reproducible, because timing decides at which step the switch happens. A resume warns about this. A step
            that cannot be traced, or that Inductor refuses, is compiled in the foreground by the routes above.
            ``pending`` and ``uncompiled_steps`` of the compiled step count graphs and steps. Pending graphs are
            discarded when the process ends. Requires a single process, and excludes ``backend``, ``mode`` and
            ``dynamic``.

    Returns:
        The compiled step, called like ``step``.

    Raises:
        TypeError: ``step`` is already compiled.
        ValueError: An argument is out of range, or two exclude each other. At the first call: ``background`` is set and
            ``torch.distributed`` runs several processes.
        GraphBreakError: At the first call: ``fullgraph`` is set and the step cannot be one graph.
        Exception: At the first call: the step raises it uncompiled.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).mean(), tx)
        >>> step = fx.compile(step, backend="aot_eager", donate=True)
        >>> old = fx.init(torch.nn.Linear(2, 1), tx)
        >>> state, output = step(old, torch.ones(4, 2))
        >>> int(state.step)
        1
        >>> old.params  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ...
        DonatedError: ...
    """
    if isinstance(step, Compiled):
        raise TypeError(f"expected a step that is not compiled, got {step!r}. Compile its .step for other options.")
    check_choice("on_recompile", on_recompile, ("warn", "error", "allow"))
    check_positive_int("steps_per_call", steps_per_call)
    pure = step if isinstance(step, Step | EvalFunction) else Step(step)
    if steps_per_call > 1 and isinstance(pure, EvalFunction):
        raise ValueError(
            f"expected steps_per_call=1 for an evaluation step, got {steps_per_call}. It is called batch by batch."
        )
    if mode == AHEAD and (backend is not None or dynamic):
        raise ValueError(
            f"expected mode={AHEAD!r} without backend and dynamic, got backend={describe(backend)}, {dynamic=}. Leave "
            "these options out, or choose another mode."
        )
    if background and (backend is not None or mode is not None or dynamic):
        raise ValueError(
            f"expected background=True without backend, mode and dynamic, got backend={describe(backend)}, {mode=}, "
            f"{dynamic=}. Only Inductor's graphs for fixed sizes are compiled in the background. Leave these options "
            "out, or compile in the foreground."
        )

    def made(step: Step | EvalFunction, *, donate: bool, routes: Routes | None = None) -> Compiled:
        return Compiled(
            step,
            routes=routes or routes_to(backend, mode, dynamic=dynamic, fullgraph=fullgraph),
            on_recompile=on_recompile,
            steps_per_call=steps_per_call,
            background=background,
            remake=made,
            donate=donate,
            dynamic=dynamic,
        )

    return made(pure, donate=donate and isinstance(pure, Step))


def _refuse_sparse(batch: Any) -> None:
    for path, leaf in zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True):
        if leaf.layout != torch.strided:
            raise ValueError(
                f"expected dense tensors in the batch of a compiled step, got {path} with the layout "
                f"{str(leaf.layout).removeprefix('torch.')}. Pass its indices and values as tensors, make it dense, or "
                "leave the step uncompiled."
            )
