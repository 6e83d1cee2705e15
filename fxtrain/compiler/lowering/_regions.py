"""Compiles a step whose forward and backward passes stay outside of its graphs.

A step is cut where it calls a function from ``fxtrain.gradients``. The parts before, between and after these calls are
pure and traced. In ``train_step``, the optimizer, the traced callbacks and the bookkeeping are one graph. The gradients
are computed between the graphs by PyTorch, with the loss function uncompiled or compiled by ``torch.compile`` in as
many graphs as it needs.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.dispatch import is_transformed
from fxtrain._torch_internals.dynamo import can_show_to_modes, modes_work_below_compile
from fxtrain._torch_internals.kernels import shared_libraries
from fxtrain._torch_internals.tracing import new_fake_mode
from fxtrain.compiler.lowering._executable import Backend, Executable, Run, kinds, uncompiled
from fxtrain.compiler.lowering._muted_logs import without_torch_logs
from fxtrain.compiler.lowering._routes import NoGradientsError
from fxtrain.compiler.lowering._trace import compile_traced, copy_aliases
from fxtrain.core import Batch, TrainState, Tree, compiling
from fxtrain.model import forward_wrapped_by
from fxtrain.model._closeness import are_close
from fxtrain.step import EvalFunction, Step
from fxtrain.step._gradients import FindGradient, intercepted

_log = logging.getLogger(__name__)

_MAX_GRADIENT_KINDS = 8  # for further kinds, the rest of the step runs uncompiled


def compile_in_regions(
    step: Step | EvalFunction,
    state: TrainState,
    batch: Batch,
    *,
    backend: Backend | None,
    mode: str | None,
    in_place: bool,
    forward: str | None,
) -> Executable:
    """Compiles the step with its forward and backward passes between graphs.

    Args:
        step: The step. Of an evaluation step, only the parts compiled by ``forward`` are graphs.
        state: The part of a state that enters the step.
        batch: A batch.
        backend: The backend of the graphs, by default Inductor.
        mode: As in ``compile``.
        in_place: Whether to write the new state into the old state's buffers.
        forward: ``"compiled"`` compiles the loss function by ``torch.compile``, in as many graphs as it needs. None
            leaves it uncompiled.

    Raises:
        NoGradientsError: The step calls no function from ``fxtrain.gradients``.
        Exception: The rest of the step cannot be traced.
    """
    wrap = CompileWithGraphBreaks(backend, mode) if forward == "compiled" else None
    if isinstance(step, EvalFunction):
        executable = uncompiled(step, state, batch, in_place=False, wrap=wrap)
        if wrap is not None:
            _, output = executable.run(tree.leaves(state), tree.leaves(batch))
            _check_close(output, step(state, batch))
        return executable
    compiler = functools.partial(compile_traced, mode=mode, backend=backend)
    regions = _Regions(step, state, batch, compiler, wrap, in_place=in_place)
    if regions.segment((), tree.leaves(state), tree.leaves(batch), []) is None:
        raise NoGradientsError(f"expected a step that calls a function from fxtrain.gradients, got {step!r}.")
    # Runs on copies, so that errors of the compiler are raised here.
    regions(*(tree.leaves(tree.clone(part)) for part in (state, batch)))
    regions.is_checked = True
    return Executable(regions, range(len(tree.leaves(state))) if in_place else None)


class _Regions:
    """The graphs of a step, by the kinds of the gradients before each."""

    def __init__(
        self,
        step: Step,
        state: TrainState,
        batch: Batch,
        compiler: Callable[..., Executable],
        wrap: CompileWithGraphBreaks | None,
        *,
        in_place: bool,
    ) -> None:
        self._step, self._compiler, self._wrap, self._in_place = step, compiler, wrap, in_place
        self._state, self._batch = tree.structure(state), tree.structure(batch)
        self.is_checked = wrap is None  # whether compiled gradients have been compared with uncompiled ones
        self._segments: dict[Any, _Cut | None] = {}
        self._rests: dict[Any, Run] = {}

    def __call__(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tree]:
        found: list[Any] = []
        key: tuple[Any, ...] = ()
        while (cut := self.segment(key, leaves, inputs, found)) is not None:
            find, state, batch, index = cut(leaves, inputs, found)
            # The uncompiled pass comes first, because it detects what the loss function writes. Compiled ones then get
            # copies.
            plain = None if self.is_checked else find(state, batch, index)
            with forward_wrapped_by(self._wrap):
                gradient = find(state, batch, index)
            if plain is not None:
                _check_close(gradient, plain)
            # The rest may overwrite leaves in place before it reads the gradients, so the two must not share memory.
            own, structure = tree.flatten(gradient)
            own = copy_aliases(own, (*leaves, *inputs))
            found.append(tree.unflatten(structure, own))
            key = (*key, (structure, *kinds(own)))
        if key not in self._rests:
            self._rests[key] = self._rest(leaves, inputs, found)
        return self._rests[key](leaves, [*inputs, *tree.leaves(found)])

    def segment(
        self, key: tuple[Hashable, ...], leaves: Sequence[Tensor], inputs: Sequence[Tensor], found: Sequence[Tree]
    ) -> _Cut | None:
        """Returns the next call for gradients after these, or None if there is none."""
        if key not in self._segments:
            cut = _Cut(self._step, self._compiler, self._state, self._batch)
            self._segments[key] = cut if cut.compile(leaves, inputs, found) else None
        return self._segments[key]

    def _rest(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor], found: Sequence[Tree]) -> Run:
        rest = _Rest(self._step)
        state, batch = tree.unflatten(self._state, leaves), tree.unflatten(self._batch, inputs)
        if len(self._rests) >= _MAX_GRADIENT_KINDS:
            # As in a mixture of experts in which some get no tokens: each set of unused parameters needs another graph.
            _log.info(
                "%r has more than %d kinds of gradients. The rest of the step runs uncompiled for others.",
                self._step,
                _MAX_GRADIENT_KINDS,
            )
            return uncompiled(rest, state, (batch, found), in_place=self._in_place).run
        return self._compiler(rest, state, (batch, found), in_place=self._in_place).run


def _check_close(compiled: Tree, plain: Tree) -> None:
    """Raises if the compiled loss function's result differs from the uncompiled one by more than rounding."""
    if tree.structure(compiled) != tree.structure(plain):
        raise RuntimeError("expected gradients for the parameters of the uncompiled loss function, got others.")
    if not are_close(compiled, plain):
        raise RuntimeError("expected the values and gradients of the uncompiled loss function, got different ones.")


class _Reached(BaseException):
    """The call for gradients at which a step is cut, with its arguments (find, state, batch, index).

    It is a BaseException, so that an ``except Exception`` in the step does not catch it.
    """


class _Rest(Step):
    """A step that takes already computed gradients together with its batch.

    Raises:
        _Reached: The step calls for more gradients than it was given.
    """

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        batch, found = batch
        given = iter(found)

        def handler(find: FindGradient, state: TrainState, batch: Batch, index: int) -> Any:
            for gradient in given:
                return gradient
            raise _Reached(find, state, batch, index)

        with intercepted(handler):
            return self.step(state, batch)

    def __repr__(self) -> str:
        return repr(self.step)


class _Cut:
    """Computes the arguments of the next call for gradients from the step's inputs and its gradients so far."""

    def __init__(self, step: Step, compiler: Callable[..., Executable], state: PyTreeSpec, batch: PyTreeSpec) -> None:
        self._rest, self._compiler, self._state, self._batch = _Rest(step), compiler, state, batch
        self._find: Any = None
        self._index = 0
        self._structure: Any = None
        self._sources: list[int | None] = []
        self._run: Run | None = None

    def compile(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor], found: Sequence[Tree]) -> bool:
        """Compiles the graph if one is needed. Returns False if the step calls for no further gradients."""
        state, batch = tree.unflatten(self._state, leaves), (tree.unflatten(self._batch, inputs), list(found))
        mode = new_fake_mode()
        # Detached, because the tracer would merge a tensor that occurs twice into one input.
        fakes = tree.map(
            lambda leaf: mode.from_tensor(leaf.detach()) if isinstance(leaf, Tensor) else leaf, (state, batch)
        )
        with mode, compiling():
            if self._fresh(*fakes) is None:
                return False
        if None in self._sources:
            self._run = self._compiler(self._fresh, state, batch, in_place=False).run
        return True

    def __call__(
        self, leaves: Sequence[Tensor], inputs: Sequence[Tensor], found: Sequence[Tree]
    ) -> tuple[FindGradient, Any, Any, int]:
        given = [*leaves, *inputs, *tree.leaves(found)]
        made = iter(self._run(leaves, given[len(leaves) :])[1]) if self._run is not None else iter(())
        values = [next(made) if source is None else given[source] for source in self._sources]
        return self._find, *tree.unflatten(self._structure, values), self._index

    def _fresh(self, state: TrainState, batch: Batch) -> list[Tensor] | None:
        """Returns the arguments of the call that are not inputs of the step, or None if there is no call."""
        try:
            self._rest(state, batch)
        except _Reached as reached:
            self._find, *arguments, self._index = reached.args
        else:
            return None
        if is_transformed():
            raise NoGradientsError("expected a call for gradients outside of torch.func.vmap, got one inside it.")
        values, self._structure = tree.flatten(tuple(arguments))
        places = {id(leaf): place for place, leaf in reversed(list(enumerate(tree.leaves((state, batch)))))}
        self._sources = [places.get(id(value)) for value in values]
        return [value for value, source in zip(values, self._sources, strict=True) if source is None]


class CompileWithGraphBreaks:
    """Compiles functions by ``torch.compile``, in as many graphs as each needs.

    Raises:
        RuntimeError: With this torch, code between the graphs would get wrong values.
    """

    def __init__(self, backend: Backend | None, mode: str | None) -> None:
        if not (modes_work_below_compile() and can_show_to_modes()):
            raise RuntimeError(
                f"expected a torch whose compiler can leave single functions uncompiled, got {torch.__version__}."
            )
        self._options: dict[str, Any] = {"backend": backend or "inductor", "mode": mode, "dynamic": False}
        self._made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __call__(self, function: Callable[..., Tree]) -> Callable[..., Tree]:
        try:
            made = self._made.get(function)
            if made is None:
                made = self._made[function] = self._compiled(function)
        except TypeError:
            # The function does not support weak references.
            made = self._compiled(function)
        return made

    def _compiled(self, function: Callable[..., Tree]) -> Callable[..., Tree]:
        compiled = torch.compile(function, **self._options)

        def call(*args: Tree) -> Tree:
            with without_torch_logs():
                # Dynamo may recompile in later steps, and logs its limits then.
                return compiled(*args)

        return shared_libraries()(call) if self._options["backend"] == "inductor" else call
