"""Checks made when a function first runs a model, so that later calls need none.

A step is a pure function, so the Python attributes of modules are restored after each call. A module that counts its
calls, or stores a hidden state as an attribute, would silently start from the same values at every step. A module that
builds a cache, sets a flag, or stores its last attention map for inspection is not affected. A second call that starts
from the attributes the first one left separates the two: a cache stays the same, and a counter advances.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain._torch_internals.modules import has_accumulation_hooks, own_parameters
from fxtrain._torch_internals.tracing import is_traced, unrecorded
from fxtrain.core import Tree, describe
from fxtrain.model._attribute_snapshots import are_alike
from fxtrain.model._closeness import are_close
from fxtrain.model._meta_modules import DELETED, MetaModules
from fxtrain.model._tensor_access import TensorReads

# Maximum number of attributes named in an error.
_MAX_NAMED = 3


class ValuesNeededError(RuntimeError):
    """A check needs tensor values, but the function is being traced. Run the step once uncompiled before tracing it.

    Example:
        >>> import torch, fxtrain as fx
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> cache = {}
        >>> def loss_fn(model, batch):
        ...     cache["mask"] = torch.ones(1)
        ...     return (model(batch) * cache["mask"]).mean()
        >>> state, step = fx.init(torch.nn.Linear(1, 1)), fx.eval_step(loss_fn)
        >>> try:
        ...     make_fx(lambda state, batch: step(state, batch).metrics)(state, torch.ones(1, 1))
        ... except ValuesNeededError as error:
        ...     print(error)
        expected loss_fn to change nothing outside the state while it is traced, got changes...
    """


def refuse_hidden_state(
    who: str,
    template: MetaModules,
    before: dict[str, object],
    output: Tree,
    again: Callable[[], Tree],
    *,
    compared: bool,
    buffers: Mapping[str, Tensor],
    changed_buffers: Mapping[str, Tensor],
) -> None:
    """Raises if a second call depends on Python attributes that the first one changed, or on buffers outside the state.

    Args:
        who: The function that runs the modules, for errors.
        template: The template, still entered, as the first call left it.
        before: Its ``leaves`` before that call.
        output: Output of that call.
        again: Makes the second call, and returns its output.
        compared: Whether the outputs of an earlier call were compared, so that a trace need not.
        buffers: The buffers that the modules were filled with.
        changed_buffers: Those of them that the first call reshaped, cast or removed, by path.

    Raises:
        RuntimeError: Names the attributes and their values.
        ValuesNeededError: While tracing, if only the outputs can show whether changed attributes matter.
    """

    def leaves() -> dict[str, object]:
        now = {template.path(name): value for name, value in template.changed_buffers(buffers).items()}
        return {**template.leaves(), **{path: value for path, value in now.items() if value is not DELETED}}

    refusal = functools.partial(_refusal, who, frozenset(map(template.path, template.changed_buffers(buffers))))
    before, first = {**before, **changed_buffers}, leaves()
    # A tensor in place of another may be state. Those on the meta device stand for parameters and buffers.
    replaceable = {id(value) for value in before.values() if isinstance(value, Tensor) and not value.is_meta}
    changed = _changed(before, first, replaceable)
    changed += [path for path in changed_buffers if path not in changed]
    if not changed:
        return
    watched = {id(value) for value in first.values() if isinstance(value, Tensor)}
    try:
        with unrecorded(), TensorReads(watched) as reads:
            repeated = again()
        second = leaves()
    except (torch.OutOfMemoryError, MemoryError):
        return
    except Exception as error:
        raise refusal(changed, (before, first), f"a second call then raises {error!r}") from error
    moved = _changed(first, second, reads.found)
    moved += [path for path, value in first.items() if id(value) in reads.written and path not in moved]
    if moved:
        raise refusal(moved, (before, first, second))
    if is_traced() and compared:
        return
    if is_traced():
        raise ValuesNeededError(
            f"expected tensors with values for the first call of {who}, whose modules write the attributes "
            f"{', '.join(changed[:_MAX_NAMED])}, got a trace. Call the step once uncompiled before tracing it."
        )
    if not are_close(output, repeated, unit=1.0, integers=False):
        raise refusal(changed, (before, first, second), "a second call then returns another result")


def refuse_new_parameters(who: str, template: MetaModules, tensors: dict[str, Tensor], names: Collection[str]) -> None:
    """Raises if a call added a parameter, replaced one, or added hooks to one.

    Args:
        who: The function that ran the modules, for errors.
        template: The template, still entered, as the call left it.
        tensors: The tensors that the modules were filled with, by name.
        names: The names of parameters among them.

    Raises:
        RuntimeError: If a parameter was added or replaced.
        NotImplementedError: If hooks were added.
    """
    for prefix, module in template.root.named_modules():
        for key, value in own_parameters(module).items():
            slot = f"{prefix}.{key}"
            name = template.slots.get(slot)
            if value is None or (name is not None and value is tensors[name]):
                continue
            if name is None:
                raise RuntimeError(
                    f"expected {who} to use the parameters from fxtrain.init, got a new one, {template.path(slot)}, "
                    "which the next call would lose. Create all parameters before fxtrain.init, for example by running "
                    "the module once."
                )
            raise RuntimeError(
                f"expected {who} to only read parameters, got a new tensor assigned to {template.path(slot)}, which "
                "the next call would lose. Compute the new value in the step, and pass it to "
                "state.replace(params=...). Keep an average of the weights, such as a momentum encoder, in buffers, or "
                "use fxtrain.callbacks.ema."
            )
    hooked = [template.path(name) for name in names if has_accumulation_hooks(tensors[name])]
    if hooked:
        raise hooks_error(hooked)


def hooks_error(paths: Iterable[str]) -> NotImplementedError:
    """Returns the error for parameters with hooks."""
    return NotImplementedError(
        f"expected parameters without hooks, got hooks on {', '.join(paths)} (register_hook or "
        "register_post_accumulate_grad_hook), which a step does not run. Remove them, and change gradients in the "
        "optimizer's chain or in a callback on fx.Gradients."
    )


def _changed(before: dict[str, object], after: dict[str, object], read: Collection[int] = ()) -> list[str]:
    return [
        path
        for path in dict.fromkeys((*before, *after))
        if not are_alike(after.get(path, _Missing), before.get(path, _Missing), read)
    ]


class _Missing:
    """Marks an attribute that does not exist."""


def _refusal(
    who: str, buffers: frozenset[str], paths: list[str], values: Sequence[dict[str, object]], also: str = ""
) -> RuntimeError:
    def change(path: str) -> str:
        shown = [_shown(each[path]) if path in each else "missing" for each in values]
        times = "before a call", "after it", "after a second one"
        return f"{path} ({', '.join(map(' '.join, zip(shown, times, strict=False)))})"

    named = "; ".join(map(change, paths[:_MAX_NAMED]))
    named += f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
    named += f": {also}" if also else ""
    if not buffers.isdisjoint(paths):
        return RuntimeError(
            f"expected a module whose buffers keep their names, shapes and dtypes, got {named}. {who} is part of a "
            "pure step, whose state has a fixed structure. Register the buffer in __init__ with its final shape and "
            "dtype, or run the module once on a batch before fxtrain.init, as quantization observers require."
        )
    return RuntimeError(
        f"expected a module whose Python attributes do not depend on earlier calls, got {named}. {who} is part of a "
        "pure step, which restores attributes after each call. Keep persistent values in a buffer, "
        "self.register_buffer(name, tensor), and assign to it in forward."
    )


def _shown(value: object) -> str:
    # The value of a container is its type.
    return f"a {value.__name__}" if isinstance(value, type) else describe(value)


@contextlib.contextmanager
def refusing_meta_reads(who: str, empty: Mapping[int, str]) -> Iterator[None]:
    """Raises on exit if an operation read a meta tensor, through a reference that no call fills.

    Args:
        who: The function that runs the modules, for errors.
        empty: Paths of the meta tensors, by id.

    Raises:
        RuntimeError: Names the tensor.
    """
    with TensorReads(empty) as reads:
        yield
    if reads.found:
        raise RuntimeError(
            f"expected {who} to read parameters and buffers from their modules, got {empty[min(reads.found)]} through "
            "another reference, which has no values. Read it as an attribute of its module."
        )


class CheckedFunctions:
    """Records which user functions have run a model, and whether they took random samples on the host.

    Functions that a step creates at each call are recognized by their code after a few calls.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Callable[[], Any], bool]] = {}
        self._codes: dict[Any, tuple[int, bool]] = {}

    def samples_on_host(self, function: Callable[..., object]) -> bool | None:
        """Returns whether calls sample from Python's or numpy's generator, or None before the first call."""
        key, part = _identity(function)
        alive, samples_on_host = self._seen.get(key, (None, False))
        if alive is not None and alive() is part:
            return samples_on_host
        count, samples_on_host = self._codes.get(_code(function), (0, False))
        return samples_on_host if count >= _MAX_CHECKED_PER_CODE else None

    def has_seen_like(self, function: Callable[..., object]) -> bool:
        """Returns whether a function with the same code has passed."""
        return _code(function) in self._codes

    def add(self, function: Callable[..., object], *, samples_on_host: bool = False) -> None:
        """Records that a call has passed.

        Args:
            function: The function that was called.
            samples_on_host: Whether it sampled from Python's or numpy's generator.
        """
        key, part = _identity(function)
        if len(self._seen) >= _MAX_ENTRIES:
            self._seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}
        self._seen[key] = _reference(part), samples_on_host
        count, sampled = self._codes.get(_code(function), (0, False))
        self._codes[_code(function)] = count + 1, sampled or samples_on_host


# Number of functions with the same code that are checked.
_MAX_CHECKED_PER_CODE = 8
# Number of entries at which those of deleted functions are dropped.
_MAX_ENTRIES = 64


def _reference(part: object) -> Callable[[], Any]:
    try:
        return weakref.ref(part)
    except TypeError:
        return lambda: part


def _identity(function: Callable[..., object]) -> tuple[Hashable, object]:
    """Returns a key, and the object whose lifetime limits it. Bound methods are recreated at each access."""
    if isinstance(function, types.MethodType):
        return (id(function.__self__), function.__func__), function.__self__
    return id(function), function


def _code(function: Callable[..., object]) -> Hashable:
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", type(function))
