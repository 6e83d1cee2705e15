"""Calls of functions of a model, as pure functions of its parameters and buffers."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxtrain import rng, tree
from fxtrain._torch_internals.modules import own_buffers, own_modules
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import Tree, name_of
from fxtrain.core._shard import full_tensor, holds_shards, is_dtensor, refuse_shards
from fxtrain.model._captured_values import captured_tensors
from fxtrain.model._closures import refuse_captured_hooks
from fxtrain.model._first_call_checks import (
    CheckedFunctions,
    refuse_hidden_state,
    refuse_new_parameters,
    refusing_meta_reads,
)
from fxtrain.model._meta_modules import MetaModules
from fxtrain.model._outside_values import restoring_outside_values, without_repeated_changes
from fxtrain.model._parameter_trees import CallResult, ParameterTrees
from fxtrain.model._recomputed_regions import recomputing_regions
from fxtrain.model._tensor_access import CloneNeeded, WriteGuard, copies, versions
from fxtrain.model._types import Out
from fxtrain.model._unseeded_values import HostSeeding, captured_generators
from fxtrain.rng import _host_generators as host
from fxtrain.rng._functional import replayed
from fxtrain.tree import as_name, leaf_paths

Inside = Callable[[Mapping[str, nn.Module]], AbstractContextManager[None]]


class ModelCalls(ParameterTrees):
    """Runs functions of a model with the tensors of a state.

    Attributes:
        has_modules: Whether the model has modules, and not bare tensors only.
    """

    has_modules: bool
    _training: nn.Module
    _evaluating: nn.Module
    # Filled by a call: the modules in eval mode, and those in training mode.
    _templates: tuple[MetaModules, MetaModules]
    # Names of tensors by slot of a module.
    _slots: Mapping[str, str]
    # Names of trainable parameters.
    _trained: frozenset[str]
    # The user's objects whose methods are hooks of the modules.
    _hook_owners: tuple[weakref.ref[Any], ...]

    def _forget_calls(self) -> None:
        """Clears what is known from earlier calls."""
        # Names of frozen parameters that calls have written.
        self._written: frozenset[str] = frozenset()
        # Names of buffers that calls add, delete, reshape or cast. Each call makes them again.
        self._caches: frozenset[str] = frozenset()
        # Whether a function has written into its arguments.
        self._copies_arguments = False
        self._first: dict[Hashable, CheckedFunctions] = {}

    def call(
        self,
        params: Tree,
        buffers: Tree,
        function: Callable[..., Out],
        *args: object,
        train: bool,
        key: rng.Key | None = None,
        check: bool = False,
        finish: Callable[[Out], Tree] | None = None,
        inside: Inside | None = None,
    ) -> CallResult:
        """Calls ``function(model, *args)`` with these parameters and buffers.

        Inside the call, ``model`` is the module itself, so any method and any submodule can be called. Nothing outside
        changes: buffers are cloned first, and so are arguments and frozen parameters that calls write.

        Args:
            params: Parameters of this architecture. DTensors of a sharded state are gathered.
            buffers: Buffers of this architecture.
            function: Any function of the model.
            *args: Its other arguments.
            train: Whether the modules are in training mode.
            key: Key of the random samples. Without one, torch's functions sample from the global generator.
            check: Whether to check the first call of this function for side effects.
            finish: Applied to the function's output while the tensors are still in place, so that a backward pass can
                recompute parts of the forward pass.
            inside: Maps the filled modules by name to a context in which the function runs.

        Returns:
            The output, the buffers after the call, and the frozen parameters that calls write.

        Raises:
            RuntimeError: If the function writes into a trained parameter. A checked call also raises if the function
                writes into a captured tensor, takes random samples that do not depend on the key, adds parameters, or
                leaves attributes that change the next call.
            NotImplementedError: If a checked call adds hooks to parameters.
        """
        if torch.compiler.is_dynamo_compiling():
            output, buffers, written = self._call_in_dynamo(params, buffers, function, args, train, key, inside)
            return CallResult(output if finish is None else finish(output), buffers, written)
        if holds_shards(params):
            refuse_shards(params, "a call of the model")
        if any(map(is_dtensor, tree.leaves(params))):  # in a callback, which all ranks call
            params = tree.map(full_tensor, params)

        def call(seeding: Callable[[], AbstractContextManager[None]], *, examine: bool = False) -> CallResult:
            given = params, buffers, function, args, train, key, seeding, inside, finish, examine
            repeated = functools.partial(self._repeated, functools.partial(self._attempt, *given))
            modules = self._templates[train].root.modules()
            if not is_traced():
                return without_repeated_changes(repeated, function, modules)
            return restoring_outside_values(repeated, function, modules, self.checked_functions(("outside", train)))

        first = self.checked_functions(train)
        samples_on_host = first.samples_on_host(function) if check else None
        if key is None:
            return call(contextlib.nullcontext)
        if samples_on_host is False and not is_traced():
            # Seeding takes a process-wide lock that a data thread may hold, so functions without host sampling skip it.
            before = host.mark()
            result = call(contextlib.nullcontext)
            if before is None or not host.rewind_if_moved(before):
                return result
            # The function has begun to sample, so this call is repeated from the key, and later calls are seeded.
            samples_on_host = True
            first.add(function, samples_on_host=True)
        examine = check and samples_on_host is None
        generators = [*captured_generators(function), *self._templates[train].generators()] if examine else ()
        seeding = HostSeeding(key, function, compare=examine, generators=generators)
        result = call(seeding, examine=examine)
        if examine:
            first.add(function, samples_on_host=seeding.sampled)
        return result

    def checked_functions(self, kind: Hashable) -> CheckedFunctions:
        """Returns the record of functions that have passed the checks of one kind."""
        if kind not in self._first:
            self._first[kind] = CheckedFunctions()
        return self._first[kind]

    def _repeated(self, attempt: Callable[..., CallResult]) -> CallResult:
        """Runs the call, and repeats it with clones when it is about to write into inputs."""
        probing = False
        while True:
            try:
                return attempt(probing=probing)
            except CloneNeeded as noticed:
                # One attempt with all frozen parameters cloned finds every one that is written. An attempt for each
                # would be slow, because momentum encoders have hundreds.
                probing |= noticed.frozen
                self._copies_arguments |= not noticed.frozen

    def _attempt(
        self,
        params: Tree,
        buffers: Tree,
        function: Callable[..., Out],
        args: tuple[object, ...],
        train: bool,
        key: rng.Key | None,
        seeding: Callable[[], AbstractContextManager[None]],
        inside: Inside | None,
        finish: Callable[[Out], Tree] | None,
        examine: bool,
        *,
        probing: bool,
    ) -> CallResult:
        template = self._templates[train]
        flat_params, flat_buffers = self._flat(params), self._flat(buffers)
        if examine:
            refuse_captured_hooks(name_of(function), function, self._hook_owners)
        cloned = flat_params.keys() - self._trained if probing else self._written
        tensors: dict[str, Tensor] = {}
        who = name_of(function)
        watch = functools.partial(refusing_meta_reads, who, template.empty) if examine else contextlib.nullcontext
        writes: WriteGuard | None = None

        def run(finish: Callable[[Out], Tree] | None, changed: Mapping[str, Tree]) -> tuple[Out, Tree]:
            nonlocal writes
            clones = {name: flat_params[name].clone() for name in cloned}
            buffers = {name: value.clone() for name, value in flat_buffers.items()}
            tensors.update(flat_params | clones | buffers)
            template.fill(tensors)
            template.put_buffers(changed)
            modules = own_modules(template.root)
            model = tree.map(lambda number, leaf: modules[number] if number else leaf, self.template, params)
            given = copies(args) if self._copies_arguments else args
            writes = WriteGuard(
                who,
                trained=lambda: self._named_trained(params, flat_params),
                frozen=lambda: [flat_params[name] for name in flat_params.keys() - self._trained - cloned],
                clones=clones,
                buffers=buffers.values(),
                arguments=() if self._copies_arguments else tree.leaves(args),
                captured=lambda: [*template.tensors(), *(captured_tensors(function) if examine else ())],
            )
            with seeding(), _functional(key, writes, template.root), watch(), self._entered(inside, train):
                output = _wrapped(function)(model, *given)
                finished = output if finish is None else finish(output)
            return template.copy_containers(output), template.copy_containers(finished)

        tensor_arguments = [leaf for leaf in tree.leaves(args) if isinstance(leaf, Tensor)]
        before_arguments = versions(tensor_arguments)
        with template:
            before = template.leaves() if examine else {}
            output, finished = run(finish, {})
            assert writes is not None
            self._written |= writes.written
            frozen = flat_params.keys() - self._trained if examine else self._written
            replaced = {name: value for name in frozen if (value := template.parameter(name)) is not tensors[name]}
            self._written |= frozenset(replaced)
            tensors |= replaced
            # Read before the template is restored, because a module may assign a new buffer.
            after = template.buffers()
            written = {name: writes.in_own_storage(name, tensors[name].detach()) for name in self._written}
            changed = template.changed_buffers(flat_buffers)
            if changed:
                after = {name: value if name in changed else after[name] for name, value in flat_buffers.items()}
            if examine:
                refuse_new_parameters(who, template, tensors, flat_params)
            if examine or not changed.keys() <= self._caches:
                compared = self.checked_functions(train).has_seen_like(function)
                shapes = {template.path(name): value for name, value in flat_buffers.items() if name in changed}
                refuse_hidden_state(
                    *(who, template, before if examine else template.leaves()),
                    *(output, lambda: run(None, changed)[0]),
                    compared=compared and examine,
                    buffers=flat_buffers,
                    changed_buffers=shapes,
                )
                self._caches |= changed.keys()
        if versions(tensor_arguments) != before_arguments:
            raise RuntimeError(
                f"expected {who} to write into its arguments with torch functions only, got a write that bypassed "
                "them. Write into a clone."
            )
        return CallResult(finished, self._grouped(after), self._grouped(written))

    def _named_trained(self, params: Tree, flat: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters that no call may write, bare tensors included, with their paths for errors."""
        for name in self._trained:
            yield self._templates[True].path(name), flat[name]
        places = zip(tree.paths(self.template, "model"), tree.leaves(self.template), strict=True)
        yield from zip((path for path, number in places if not number), self._bare(params), strict=True)

    def _call_in_dynamo(
        self,
        params: Tree,
        buffers: Tree,
        function: Callable[..., Out],
        args: tuple[object, ...],
        train: bool,
        key: rng.Key | None,
        inside: Inside | None,
    ) -> tuple[Out, Tree, Tree]:
        with rng.functional(key) if key is not None else contextlib.nullcontext(), self._entered(inside, train):
            if self._copies_arguments:
                args = copies(args)
            if not self.has_modules:
                return function(params, *args), buffers, {}
            flat = self._flat(params)
            clones = {name: flat[name].clone() for name in self._written}
            old = self._flat(buffers)
            tensors = {**flat, **clones, **{name: value.clone() for name, value in old.items()}}
            filled = {slot: tensors[name] for slot, name in self._slots.items()}
            caller = self._training if train else self._evaluating
            # Every slot is named once, ties included. The tying of functional_call would fill a module with two names
            # twice, and leave the state's tensors in it.
            output, written = functional_call(
                caller, filled, (self.template, params, function, args), tie_weights=False
            )
        after = {name: _kept_shape(written.get(name), value) for name, value in old.items()}
        written_frozen = {name: value.detach() for name, value in clones.items()}
        return output, self._grouped(after), self._grouped(written_frozen)

    def _entered(self, inside: Inside | None, train: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if inside is None else inside(self.named_modules(train=train))

    def named_modules(self, *, train: bool) -> dict[str, nn.Module]:
        """Returns the modules by the names that patterns of parameters use. In a tree, names begin with its keys.

        Args:
            train: Whether to return the modules in training mode.
        """
        modules = own_modules(self._training if train else self._evaluating)
        return named_modules(tree.map(lambda number: modules[number] if number else None, self.template))


def named_modules(modules: Tree) -> dict[str, nn.Module]:
    """Returns the modules of a tree, submodules included, by names that begin with the keys of the tree."""
    named: dict[str, nn.Module] = {}
    for path, root in zip(leaf_paths(modules), tree.leaves(modules), strict=True):
        if isinstance(root, nn.Module):
            start = as_name(path)
            named |= {".".join(filter(None, (start, name))): module for name, module in root.named_modules()}
    return named


@contextlib.contextmanager
def _functional(key: rng.Key | None, writes: WriteGuard, root: nn.Module) -> Iterator[None]:
    if key is None:
        yield
        return
    is_wrapped = is_forward_wrapped()
    regions = (
        contextlib.nullcontext()
        if is_wrapped
        else recomputing_regions(lambda: [own_buffers(module) for module in root.modules()])
    )
    with rng.functional(key) as mode, replayed(), regions:
        # torch.compile would trace the checks.
        mode.watch = None if is_wrapped else writes
        yield


def _kept_shape(after: Tensor | None, before: Tensor) -> Tensor:
    """Returns the buffer after a call, or before it if the call changed its shape or dtype."""
    return before if after is None or after.shape != before.shape or after.dtype != before.dtype else after


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_wrap: ContextVar[Wrap | None] = ContextVar("wrap of the forward pass", default=None)


@contextlib.contextmanager
def forward_wrapped_by(wrap: Wrap | None) -> Generator[None]:
    """Makes ``Model.call`` run ``wrap(function)`` in place of ``function`` inside the context, in this thread only.

    Another compiler can compile the forward pass in this way.

    Args:
        wrap: Maps a function ``(model, *args)`` to one that computes the same. None leaves functions unwrapped.

    Example:
        >>> import fxtrain as fx
        >>> state = fx.init(__import__("torch").nn.ReLU())
        >>> with forward_wrapped_by(lambda function: lambda *args: "wrapped"):
        ...     state.model.call(state.params, state.buffers, lambda model: "plain", train=True)[0]
        'wrapped'
    """
    token = _wrap.set(wrap)
    try:
        yield
    finally:
        _wrap.reset(token)


def is_forward_wrapped() -> bool:
    """Returns whether this thread is inside ``forward_wrapped_by`` with a wrap."""
    return _wrap.get() is not None


def _wrapped(function: Callable[..., Out]) -> Callable[..., Out]:
    wrap = _wrap.get()
    return function if wrap is None else wrap(function)
