"""The architecture: the code of modules, as a function of their memory."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxtrain import rng, tree
from fxtrain.core import TrainState
from fxtrain.fold._subscription import name_of
from fxtrain.model._captured import tensors_in
from fxtrain.model._fingerprint import fingerprint
from fxtrain.model._first_calls import (
    FirstCalls,
    empty_refused,
    hooks_refused,
    refuse_new_parameters,
    refuse_state,
)
from fxtrain.model._following import Following, generators_in
from fxtrain.model._forward import forward_of, is_forward_wrapped
from fxtrain.model._layout import Called, Caller, Layout
from fxtrain.model._outside import traced_apart
from fxtrain.model._purity import versions
from fxtrain.model._template import Template, evaluating, without_memory
from fxtrain.model._writes import WriteNoticed, Writes, copies
from fxtrain.optim._nodes import as_name, leaf_paths
from fxtrain.rng import _host as host
from fxtrain.rng._replay import replayed
from fxtrain.rng._tracing import is_traced

Inside = Callable[[Mapping[str, nn.Module]], AbstractContextManager[None]]


class Model(Layout):
    """The architecture of a state: its modules, without memory. Static; two are equal where they compute the same.

    The modules are copied once, onto the meta device, with their ties; the user's own are left as they were.

    Args:
        modules: A module, or a pytree of modules and tensors.
    """

    def __init__(self, modules: Any) -> None:
        leaves, structure = tree.flatten(modules)
        found = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
        names = iter(map(str, range(len(found))))
        self.template = tree.unflatten(structure, [next(names) if isinstance(x, nn.Module) else "" for x in leaves])
        self.has_modules = bool(found)
        original = Caller(found)
        self.trainable = self._grouped(
            {name: _is_trainable(value) for name, value in original.named_parameters()},
            [_is_trainable(leaf) for leaf in leaves if isinstance(leaf, Tensor)],
        )
        found_at = zip(tree.paths(modules, "model"), leaves, strict=True)
        paths = dict(
            zip(map(str, range(len(found))), (p for p, x in found_at if isinstance(x, nn.Module)), strict=True)
        )
        self._training, owned = without_memory(original)
        for module in self._training.children():
            # A module that is in eval mode as a whole was loaded or used, not configured; single parts that are
            # in eval mode, such as frozen batch norms, are meant.
            if not module.training:
                module.train()
        self._evaluating, owned_evaluating = evaluating(self._training)
        self._templates = (
            Template(self._evaluating, owned_evaluating, paths),
            Template(self._training, owned, paths),
        )
        self._slots = self._templates[True].slots
        self._hooked = self._grouped(
            {name: _has_hooks(value) for name, value in original.named_parameters()},
            [_has_hooks(leaf) for leaf in leaves if isinstance(leaf, Tensor)],
        )
        self._fingerprint = fingerprint(self._training)
        self._choose(self.trainable)

    def training_only(self, trainable: Any) -> Model:
        """The same architecture, of which these parameters are trained: a pytree of bools like them."""
        other = copy.copy(self)
        other._choose(trainable)
        return other

    def _choose(self, trainable: Any) -> None:
        masks, structure = tree.flatten(trainable)
        self.trainable = trainable
        hooked = map(operator.and_, masks, tree.leaves(self._hooked))
        self._hooks_at = tuple(itertools.compress(tree.paths(trainable, "state.params"), hooked))
        self._trained = frozenset(name for name, mask in self._flat(trainable).items() if mask)
        self._written: frozenset[str] = frozenset()  # frozen parameters that calls have written
        self._caches: frozenset[str] = frozenset()  # buffers of other shapes or places, which each call makes again
        self._copies_arguments = False  # whether a function has written into its arguments
        self._first: dict[Hashable, FirstCalls] = {}
        self._key = self._fingerprint, self._hooks_at, tuple(masks), structure, str(self.template)

    def call(
        self,
        params: Any,
        buffers: Any,
        function: Callable[..., Any],
        *args: Any,
        train: bool,
        key: rng.Key | None = None,
        check: bool = False,
        finish: Callable[[Any], Any] | None = None,
        inside: Inside | None = None,
    ) -> Called:
        """``function(model, *args)``, where ``model`` has these parameters and buffers, and what it wrote.

        Inside, ``model`` is the module itself, so any method and any submodule can be called. Nothing outside
        changes: buffers are cloned first, and so are arguments and frozen parameters that calls write.

        Args:
            params: Of this architecture.
            buffers: Of this architecture.
            function: Any function of the model.
            *args: Its other arguments.
            train: Whether the modules are in training mode.
            key: Where random numbers come from; without one, torch's functions draw as usual.
            check: Whether the first call of this function is checked.
            finish: Applied to what the function returns while the memory is still in place, for a backward pass that
                computes parts of the forward pass again.
            inside: From the modules by name, once they are filled, to a context that the function runs in.

        Raises:
            RuntimeError: If the function writes into a trained parameter. At a checked call also if it writes into a
                captured tensor, draws numbers that the key does not decide, adds parameters, or leaves attributes that
                change the next call.
            NotImplementedError: At a checked call, if the function adds hooks to parameters.
        """
        if torch.compiler.is_dynamo_compiling():
            output, buffers, written = self._call_in_dynamo(params, buffers, function, args, train, key, inside)
            return Called(output if finish is None else finish(output), buffers, written)
        call = functools.partial(self._call, params, buffers, function, args, train, key, inside=inside, finish=finish)
        first = self.first_calls(train)
        draws = first.draws(function) if check else None
        if key is None:
            return call(contextlib.nullcontext)
        if draws is False and not is_traced():
            # Seeding would wait for a thread that makes batches, so what draws nothing is run without it.
            before = host.mark()
            result = call(contextlib.nullcontext)
            if before is None or not host.rewind_if_moved(before):
                return result
            draws = True  # it has begun to: this call is repeated from the key, and the next ones start there
            first.add(function, draws=True)
        examine = check and draws is None
        generators = [*generators_in(function), *self._templates[train].generators()] if examine else ()
        draw = Following(key, function, compare=examine, generators=generators)
        result = call(draw, examine=examine)
        if examine:
            first.add(function, draws=draw.moved)
        return result

    def first_calls(self, kind: Hashable) -> FirstCalls:
        """The functions that have passed the checks of one kind."""
        if kind not in self._first:
            self._first[kind] = FirstCalls()
        return self._first[kind]

    def _call(
        self,
        params: Any,
        buffers: Any,
        function: Callable[..., Any],
        args: Any,
        train: bool,
        *rest: Any,
        **options: Any,
    ) -> Called:
        """A call that, if it is traced, changes nothing outside."""
        call = functools.partial(self._repeated, params, buffers, function, args, train, *rest, **options)
        if not is_traced():
            return call()
        modules = self._templates[train].root.modules()
        return traced_apart(call, function, modules, self.first_calls(("outside", train)))

    def _repeated(self, *args: Any, **options: Any) -> Called:
        """A call that is repeated with clones of what it is about to write."""
        probing = False
        while True:
            try:
                return self._attempt(*args, probing=probing, **options)
            except WriteNoticed as noticed:
                # The next attempt finds all that is written: momentum encoders have hundreds of parameters.
                probing |= noticed.frozen
                self._copies_arguments |= not noticed.frozen

    def _attempt(
        self,
        params: Any,
        buffers: Any,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        train: bool,
        key: rng.Key | None,
        draw: Callable[[], AbstractContextManager[None]],
        *,
        inside: Inside | None,
        finish: Callable[[Any], Any] | None,
        examine: bool = False,
        probing: bool,
    ) -> Called:
        finish = finish or (lambda output: output)
        template = self._templates[train]
        flat_params, flat_buffers = self._flat(params), self._flat(buffers)
        cloned = flat_params.keys() - self._trained if probing else self._written
        tensors: dict[str, Tensor] = {}
        who = name_of(function)
        watch = functools.partial(empty_refused, who, template.empty) if examine else contextlib.nullcontext
        writes: Writes | None = None

        def run(finish: Callable[[Any], Any], odd: Mapping[str, Any]) -> tuple[Any, Any]:
            nonlocal writes
            clones = {name: flat_params[name].clone() for name in cloned}
            buffers = {name: value.clone() for name, value in flat_buffers.items()}
            tensors.update(flat_params | clones | buffers)
            template.fill(tensors)
            template.place(odd)
            modules = template.root._modules
            model = tree.map(lambda number, leaf: modules[number] if number else leaf, self.template, params)
            given = copies(args) if self._copies_arguments else args
            writes = Writes(
                who,
                trained=lambda: self._named_trained(params, flat_params),
                frozen=lambda: [flat_params[name] for name in flat_params.keys() - self._trained - cloned],
                clones=clones,
                buffers=buffers.values(),
                arguments=() if self._copies_arguments else tree.leaves(args),
                captured=lambda: [*template.tensors(), *(tensors_in(function) if examine else ())],
            )
            with draw(), _functional(key, writes), watch(), self._entered(inside, train):
                output = forward_of(function)(model, *given)
                finished = finish(output)
            return template.apart(output), template.apart(finished)

        tensor_arguments = [leaf for leaf in tree.leaves(args) if isinstance(leaf, Tensor)]
        before_arguments = versions(tensor_arguments)
        with template:
            before = template.leaves() if examine else {}
            output, finished = run(finish, {})
            assert writes is not None
            self._written |= writes.written
            frozen = flat_params.keys() - self._trained if examine else self._written
            replaced = {name: value for name in frozen if (value := template.parameter(name)) is not tensors[name]}
            self._written |= replaced.keys()
            tensors |= replaced
            # Read while they are in place: a module may write a buffer or put another in its place.
            after = template.buffers()
            written = {name: writes.apart(name, tensors[name].detach()) for name in self._written}
            odd = template.odd_buffers(flat_buffers)
            if odd:
                after = {name: value if name in odd else after[name] for name, value in flat_buffers.items()}
            if examine:
                refuse_new_parameters(who, template, tensors, flat_params)
            if examine or not odd.keys() <= self._caches:
                compared = self.first_calls(train).has_seen_like(function)
                again = functools.partial(run, lambda output: output, odd)
                shapes = {template.path(name): value for name, value in flat_buffers.items() if name in odd}
                refuse_state(
                    *(who, template, before if examine else template.leaves()),
                    *(output, lambda: again()[0]),
                    compared=compared and examine,
                    buffers=flat_buffers,
                    odd=shapes,
                )
                self._caches |= odd.keys()
        if versions(tensor_arguments) != before_arguments:
            raise RuntimeError(
                f"expected {who} to write into its arguments by functions of torch, got a write that was not seen "
                "before it happened. Write into a clone."
            )
        return Called(
            finished, self._grouped(after, itertools.repeat({})), self._grouped(written, itertools.repeat({}))
        )

    def _named_trained(self, params: Any, flat: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The parameters that no call may write, by what errors call them; bare tensors are among them."""
        for name in self._trained:
            yield self._templates[True].path(name), flat[name]
        places = zip(tree.paths(self.template, "model"), tree.leaves(self.template), strict=True)
        yield from zip((path for path, number in places if not number), self._bare(params), strict=True)

    def _call_in_dynamo(
        self,
        params: Any,
        buffers: Any,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        train: bool,
        key: Any,
        inside: Inside | None,
    ) -> tuple[Any, Any, Any]:
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
            # Each place is named once, ties among them: left to functional_call, a module under two names would be
            # filled twice, and keep the state's tensors.
            output, written = functional_call(
                caller, filled, (self.template, params, function, args), tie_weights=False
            )
        after = {name: _kept_shape(written.get(name), value) for name, value in old.items()}
        written_frozen = {name: value.detach() for name, value in clones.items()}
        none = itertools.repeat({})
        return output, self._grouped(after, none), self._grouped(written_frozen, none)

    def _entered(self, inside: Inside | None, train: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if inside is None else inside(self.named_modules(train=train))

    def named_modules(self, *, train: bool) -> dict[str, nn.Module]:
        """The modules by name, as patterns of parameters have it; the names of a tree begin with its keys."""
        roots = [as_name(path) for path in leaf_paths(self.template)]
        prefixes = {number: name for number, name in zip(tree.leaves(self.template), roots, strict=True) if number}
        named: dict[str, nn.Module] = {}
        for number, root in (self._training if train else self._evaluating).named_children():
            for name, module in root.named_modules():
                named[".".join(filter(None, (prefixes[number], name)))] = module
        return named

    def restore(self) -> bool:
        """Puts back the modules after code that Dynamo compiled, which writes their attributes by itself.

        Returns:
            Whether it had written any.
        """
        written = [template.restore() for template in self._templates]
        return any(written)

    def refuse_hooks(self) -> None:
        """Raises if a trainable parameter has hooks, which would not run.

        Raises:
            NotImplementedError: Naming the parameters.
        """
        if self._hooks_at:
            raise hooks_refused(self._hooks_at)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_first": {}}  # functions have no place in a copy or a file

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Model) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Model({', '.join(type(module).__name__ for module in self._training.children())})"


def model_of(state: TrainState) -> Model:
    """The state's architecture.

    Raises:
        ValueError: If it has none.
    """
    if state.model is None:
        raise ValueError("This state has no model: make it with fxtrain.init(module, tx).")
    return state.model


@contextlib.contextmanager
def _functional(key: rng.Key | None, writes: Writes) -> Iterator[None]:
    if key is None:
        yield
        return
    with rng.functional(key) as mode, replayed():
        # torch.compile would trace what it looks at.
        mode.watch = None if is_forward_wrapped() else writes
        yield


def _kept_shape(after: Tensor | None, before: Tensor) -> Tensor:
    """The buffer after a call; before it, where the call made a cache of another shape of it."""
    return before if after is None or after.shape != before.shape or after.dtype != before.dtype else after


def _has_hooks(parameter: Tensor) -> bool:
    # No public interface lists the hooks of a tensor.
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _is_trainable(value: Tensor) -> bool:
    frozen = isinstance(value, nn.Parameter) and not value.requires_grad
    return (value.is_floating_point() or value.is_complex()) and not frozen
