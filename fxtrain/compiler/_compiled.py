"""Compile: a step as one graph."""

from __future__ import annotations

import copy
import functools
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from fxtrain import tree
from fxtrain.compiler._graph import Found, Graph
from fxtrain.compiler._heap import keep_freed_memory
from fxtrain.compiler._pending import Pending
from fxtrain.compiler._recompile_reasons import advice, batches_of, changes, described, is_other_batch
from fxtrain.compiler._routes import Routes, routes_to
from fxtrain.compiler._trace import AHEAD, Artefact
from fxtrain.core import StepOutput, TrainState, check_positive_int
from fxtrain.core._frames import reaches_users
from fxtrain.data import for_step
from fxtrain.fold import Composed
from fxtrain.step import EvalFunction, Several, Step

_log = logging.getLogger(__name__)

OnRecompile = Literal["warn", "error", "allow"]


class RecompileError(RuntimeError):
    """A compiled step was called with what its graph was not made for, and may not make another."""


class Compiled:
    """A compiled step; made by ``compile``. It is called as the step is."""

    def __init__(
        self,
        step: Step | EvalFunction,
        *,
        routes: Routes,
        on_recompile: OnRecompile,
        steps_per_call: int,
        background: bool,
        twin: Callable[[], Compiled],
        **options: bool,
    ) -> None:
        self.step = step
        self.donates = options["donate"]
        self.steps_per_call = steps_per_call
        self._compiler: Callable[..., Artefact] = routes
        self._routes, self._on_recompile, self._options = routes, on_recompile, options
        self._graphs: list[Graph] = []  # the one that was used last is first
        self._known: list[dict[str, str]] = []
        self._seconds = 0.0
        self._pending = Pending(step, routes, options) if background else None
        self._declared = 1  # how many kinds of batches come by declaration
        self._has_warned_of_batches = False
        self._donating: Compiled | None = None
        self._several: Compiled | None = None
        self._twin = twin
        functools.update_wrapper(self, step, updated=())

    @property
    def how(self) -> str:
        """The compiler of the graphs, and the route to it. The first call decides. Bitwise claims hold within one."""
        return self.possible[0]

    @property
    def possible(self) -> tuple[str, ...]:
        """All that ``how`` can be: several routes before the first call, and one afterwards."""
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
        """What decides the bits of the result, as text by name."""
        settings: dict[str, str] = getattr(self.step, "settings", {})
        return {**settings, "uncompiled steps": str(self.uncompiled_steps)} if self.background else settings

    @property
    def background(self) -> bool:
        """Whether graphs are compiled while steps run uncompiled."""
        return self._pending is not None

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        own = len(self._graphs) - len(self._pending or ())
        return own + (self._several.graphs if self._several is not None else 0)

    @property
    def pending(self) -> int:
        """How many graphs are not compiled yet. Steps that need them run uncompiled."""
        return len(self._pending or ()) + (self._several.pending if self._several is not None else 0)

    @property
    def uncompiled_steps(self) -> int:
        """How many steps ran uncompiled because their graph was pending."""
        calls = self._pending.calls if self._pending is not None else 0
        several = self._several
        return calls + (several.uncompiled_steps * several.steps_per_call if several is not None else 0)

    @property
    def seconds(self) -> float:
        """How long making the graphs took, in the background too."""
        own = self._seconds + (self._pending.seconds if self._pending is not None else 0.0)
        return own + (self._several.seconds if self._several is not None else 0.0)

    def donating(self) -> Compiled:
        """The same, writing the new state over the old one: what ``fit`` uses, as it owns its state."""
        if self.donates or not isinstance(self.step, Step):
            return self
        if self._donating is None:
            self._donating = self._twin()
        return self._donating

    def expect(self, kinds: int | None) -> None:
        """Declares that batches have so many shapes from here on: each compiles a graph without a warning or an error.

        ``fit`` and ``evaluate`` call this with what their data source declares.

        Args:
            kinds: How many shapes batches have. Nothing is declared by 1, or None where it is unknown.
        """
        self._declared = batches_of(self._known) + kinds if kinds is not None and kinds > 1 else 1
        if self._declared > 1:
            _log.info("%r takes batches of %d shapes and compiles a graph for each.", self.step, kinds)
        if self._several is not None:
            self._several.expect(kinds)

    def many(self, state: TrainState, batches: Sequence[Any]) -> tuple[TrainState, Sequence[StepOutput]]:
        """``steps_per_call`` steps, in one graph.

        Args:
            state: As for a call.
            batches: So many, alike.

        Returns:
            The state after the last step, and the outputs of all. Where a traced callback stopped at one of them, those
            after it were not taken: the state's ``step`` tells.

        Raises:
            ValueError: If there are more batches or fewer.
        """
        if len(batches) != self.steps_per_call:
            raise ValueError(f"{len(batches)} batches came, and this was compiled for {self.steps_per_call} at a time.")
        if self.steps_per_call == 1:
            state, output = self(state, batches[0])
            return state, (output,)
        if self._several is None:
            assert isinstance(self.step, Step)
            self._several = copy.copy(self)
            self._several.step = Several(self.step, self.steps_per_call)
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
            batch = for_step(batch)  # most batches are tensors alone, which the walk finds out faster
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
        """What to call the first graph with, which is then the one for this state and batch."""
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
        """Does what ``on_recompile`` says where a graph beside others is to be made that no source has declared."""
        is_batch = is_other_batch(kinds, self._known)
        is_declared = is_batch and batches_of([*self._known, kinds]) <= self._declared
        broken = next((found for graph in self._graphs if (found := graph.broken(batch)) is not None), None)
        # Sizes 0 and 1 are never symbols: the one more graph for them is expected.
        is_declared |= broken is not None and not broken
        if self._graphs and self._on_recompile != "allow" and not is_declared:
            remedy = advice(kinds, self._known, broken)
            why = f"{self.step!r} is to be compiled again: {changes(kinds, self._known)}. {remedy}"
            if self._on_recompile == "error":
                raise RecompileError(f"{why} on_recompile='allow' makes a graph for each.")
            if not (is_batch and self._has_warned_of_batches):  # one hint is enough for batches of many sizes
                warnings.warn(f"{why} on_recompile='allow' is silent.", UserWarning, stacklevel=4)
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
    """``step`` as one graph: forward, backward, optimizer and traced callbacks.

    A graph is made at the first call. Values never make a new one: counters and rates are tensors. Slots that only
    the loop uses stay outside, so a callback of the loop can be added or removed without a new graph. What the step
    reads beside its arguments, of modules, closures, globals or environment variables, stays as it was when the graph
    was made. Random numbers of Python and numpy, clocks and files are read at each call, or refused.

    Where Python needs the value of a tensor, as in ``if loss > 1``, ``.item()`` or a mask as an index, there is no such
    graph. Then the first of these routes that leads is taken, with one warning that names the line: one graph for the
    values that were read, which checks at each call that they are the same, and further graphs for a few other values;
    one graph by Dynamo; the loss function in several graphs, differentiated by ``torch.autograd``, and the optimizer
    and the callbacks of the step as one; forward and backward pass uncompiled, and the rest as one graph. All compute
    the same.

    That first call takes from ten seconds to minutes. What torch compiled stays on the disk, where
    ``TORCHINDUCTOR_CACHE_DIR`` says, so that a later process has it in a few seconds. The logger ``fxtrain.compiler``
    says at INFO what is compiled, and how long it took.

    On the CPU the process keeps what a step frees for the next one, up to 2 GiB, where glibc would give it back and map
    it anew each time; variables like ``MALLOC_TRIM_THRESHOLD_`` and other allocators are left as they are.

    Args:
        step: From ``train_step``, ``eval_step``, or any pure function ``(state, batch) -> (state, output)``.
        donate: Whether the new state is written over the old one, which costs the memory and the time of one state
            less. The old state must not be read afterwards, and raises ``DonatedError`` if it is. What somebody else
            holds of it, a parameter, a view, a dict of them, is copied first and stays as it is.
        backend: By default the step is traced, and compiled by Inductor. A backend of ``torch.compile``, by name or
            as a function, goes through Dynamo, which checks at each call what it assumed of Python: the tiny MLP's
            step takes three times as long.
        mode: As ``torch.compile`` takes it; ``"reduce-overhead"`` replays CUDA graphs. Or ``"ahead-of-time"``: the
            graph becomes a library, which is called without any Python between its kernels. To build it takes about
            twice as long, the tiny MLP's step three quarters of the time; it is kept where torch keeps compiled code.
        dynamic: Whether the sizes of batches are symbols: one graph for all, slower than one for each. Dropout masks
            and other random numbers are those of the uncompiled step at every size. Sizes 0 and 1 stay numbers, so a
            batch of one example makes another graph. Code that reads a size as a number, as ``len(x)`` and recurrent
            layers of torch do, makes one for each, and the warning names the sizes: take ``x.shape[0]``, or few sizes.
        fullgraph: Whether a step that cannot be one graph is an error.
        steps_per_call: How many steps ``fit`` takes at a time, in one graph, where calling a graph takes longer than
            computing it. Callbacks of the step are folded at each; those of the loop after all of them, so what these
            ask for comes up to so many steps later. It is compiled in proportion to their number. What is left at the
            end of an epoch is taken step by step.
        on_recompile: What to do when a shape, a dtype or the structure of state or batch changes: make another graph
            with a warning that says what changed, refuse with ``RecompileError``, or make it silently. Of batches that
            change their sizes it warns once. Sizes that a data source declares, as ``fxtrain.data.bucketed`` does,
            make a graph each without a warning or an error.
        background: Whether to compile in a worker thread while steps run uncompiled. The second call traces the step,
            which takes seconds, and hands the graph to the worker. Calls switch to the graph once it is ready. The
            worker compiles one graph at a time, in the order in which sizes first came. Uncompiled steps are slower
            while it works. Results are equal within the tolerance of compiled steps, but not bitwise reproducible,
            because the step of the switch depends on timing; a resume warns of that. A step that cannot be traced,
            or that Inductor refuses, is compiled in the foreground by the routes above. ``pending`` and
            ``uncompiled_steps`` of the compiled step count graphs and steps. The end of the process discards pending
            graphs. Needs a single process, and excludes ``backend``, ``mode`` and ``dynamic``.

    Raises:
        TypeError: If the step is compiled already.
        ValueError: If an argument is out of its range. At the first call, if ``background`` is set and
            ``torch.distributed`` runs several processes.
        GraphBreakError: At the first call, if ``fullgraph`` is set and the step cannot be one graph.
        Exception: At the first call of a step that is wrong, what it raises uncompiled.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).mean(), tx)
        >>> step = fx.compile(step, backend="aot_eager", donate=True)
        >>> old = fx.init(torch.nn.Linear(2, 1), tx)
        >>> state, output = step(old, torch.ones(4, 2))
        >>> int(state.step)
        1
        >>> old.params
        Traceback (most recent call last):
        ...
        fxtrain.core.donated.DonatedError: This state was donated to <step train_step(<lambda>), ...
    """
    if isinstance(step, Compiled):
        raise TypeError(f"{step!r} is compiled already.")
    if on_recompile not in ("warn", "error", "allow"):
        raise ValueError(f"on_recompile={on_recompile!r}: 'warn', 'error' or 'allow' is wanted.")
    check_positive_int("steps_per_call", steps_per_call)
    pure = step if isinstance(step, Step | EvalFunction) else Step(step)
    if steps_per_call > 1 and isinstance(pure, EvalFunction):
        raise ValueError("steps_per_call is for steps that train: an evaluation step is called batch by batch.")
    if mode == AHEAD and (backend is not None or dynamic):
        raise ValueError(
            f"mode={AHEAD!r} goes another way than a backend or dynamic=True, which go through Dynamo: choose one."
        )
    if background and (backend is not None or mode is not None or dynamic):
        raise ValueError(
            "expected background=True without backend, mode and dynamic, got "
            f"{backend=}, {mode=}, {dynamic=}. Only graphs of Inductor for one size each are compiled in the "
            "background: leave these options out, or compile in the foreground."
        )
    routes = routes_to(backend, mode, dynamic=dynamic, fullgraph=fullgraph)

    def made(donate: bool) -> Compiled:
        return Compiled(
            pure,
            routes=routes,
            on_recompile=on_recompile,
            steps_per_call=steps_per_call,
            background=background,
            twin=lambda: made(donate=True),
            donate=donate,
            dynamic=dynamic,
        )

    return made(donate and isinstance(pure, Step))


def _refuse_sparse(batch: Any) -> None:
    for path, leaf in zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True):
        if leaf.layout != torch.strided:
            raise ValueError(
                f"expected dense tensors in the batch of a compiled step, got {path} with the layout "
                f"{str(leaf.layout).removeprefix('torch.')}. Give its indices and values as tensors, make it dense, or "
                "leave the step uncompiled."
            )
