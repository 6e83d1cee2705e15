"""Activation checkpoints of ``torch.utils.checkpoint`` inside a model, as regions that a graph recomputes."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fxtrain._torch_internals.checkpointing import can_replace_checkpoints, keeping_versions, replace_checkpoints
from fxtrain._torch_internals.dispatch import is_transformed, without_dispatch_modes
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core._graph_marks import Region, Saves, marking_region

_lock = threading.Lock()
_depth = 0
_real: Any = None

Owner = dict[str, Tensor | None]
"""The buffers of one module by name, which it writes in place or replaces."""

_owners: ContextVar[Callable[[], Sequence[Owner]] | None] = ContextVar("buffers of a model call", default=None)
_is_refused: ContextVar[bool] = ContextVar("whether torch.func leaves checkpoints to torch.autograd", default=False)
_saves: ContextVar[Saves | None] = ContextVar("values that the next region keeps", default=None)


class CheckpointReached(BaseException):
    """A function inside ``leaving_checkpoints_to_autograd`` has reached a region that torch.func cannot recompute.

    It is a BaseException, so that an ``except Exception`` in the function does not catch it.
    """


@contextlib.contextmanager
def leaving_checkpoints_to_autograd() -> Iterator[None]:
    """Raises ``CheckpointReached`` at the first checkpoint inside a transform, unless the function is traced."""
    token = _is_refused.set(True)
    try:
        yield
    finally:
        _is_refused.reset(token)


@contextlib.contextmanager
def recomputing_regions(owners: Callable[[], Sequence[Owner]]) -> Iterator[None]:
    """Makes the checkpoints of a model call work in traces and in transforms of ``torch.func``.

    A trace marks each as a region, and a transform runs it without recomputation. Under ``torch.autograd``, torch
    recomputes it, and buffers that the region writes are written once.

    Args:
        owners: Returns the buffers of the modules in the call.
    """
    global _depth, _real
    if "torch.utils.checkpoint" not in sys.modules or not can_replace_checkpoints():
        yield
        return
    token = _owners.set(owners)
    with _lock:
        _depth += 1
        if _depth == 1:
            _real = replace_checkpoints(_passes, _Reentrant)
    try:
        yield
    finally:
        _owners.reset(token)
        with _lock:
            _depth -= 1
            if not _depth:
                replace_checkpoints(*_real)


@contextlib.contextmanager
def keeping(saves: Saves | None) -> Iterator[None]:
    """Sets which values the next region keeps, if it is traced."""
    token = _saves.set(saves)
    try:
        yield
    finally:
        _saves.reset(token)


def _passes(
    function: Callable[..., Any], preserve: bool, context_fn: Callable[[], Any], *rest: Any, **kwargs: Any
) -> Generator[None]:
    """What ``checkpoint`` runs before and after its function."""
    owners = _owners.get()
    if owners is None:
        yield from _real[0](function, preserve, context_fn, *rest, **kwargs)
    elif is_traced() or is_transformed():
        if _is_refused.get() and not is_traced() and torch.is_grad_enabled():
            raise CheckpointReached
        with _user_context(context_fn) as saves, marking_region(Region(saves)):
            yield
    else:
        once = _WritesOnce(function, owners())
        # Always preserved, because samples replay by the site that the state of the generator carries.
        yield from _real[0](once, True, context_fn, *rest, **kwargs)
        once.end_first_pass()


@contextlib.contextmanager
def _user_context(context_fn: Callable[[], Any]) -> Iterator[Saves | None]:
    """Enters the context of a first pass. Yields which values it keeps.

    Selective checkpointing is a dispatch mode with a policy, whose cache a graph does not need.
    """
    saves = _saves.get()
    token = _saves.set(None)
    forward, _ = context_fn()
    policy = getattr(forward, "policy_fn", None)
    try:
        if policy is not None:
            yield saves or _by_policy(policy)
            return
        with forward:
            yield saves
    finally:
        _saves.reset(token)


def _by_policy(policy: Callable[..., Any]) -> Saves:
    """Returns the values kept by a policy of ``torch.utils.checkpoint.create_selective_checkpoint_contexts``."""
    from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

    context: Any = SelectiveCheckpointContext(is_recompute=False)

    def saves(node: Any) -> bool:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda other: other.meta.get("val"))
        found = policy(context, node.target, *args, **kwargs)
        if isinstance(found, bool):
            return found
        return found in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)

    return saves


class _WritesOnce:
    """A function that a backward pass repeats, with the buffers that the first pass read, and without new writes."""

    def __init__(self, function: Callable[..., Any], owners: Sequence[Owner]) -> None:
        self._function, self._owners = function, owners
        self._assigned = [dict(owner) for owner in owners]
        given = (buffer for owner in owners for buffer in owner.values() if buffer is not None)
        self._buffers = list({id(buffer): buffer for buffer in given}.values())
        self._before = [buffer.detach().clone() for buffer in self._buffers]

    def end_first_pass(self) -> None:
        """Keeps the earlier values of buffers that the first pass has written, or replaced."""
        pairs = zip(self._buffers, self._before, strict=True)
        changed = [(buffer, before) for buffer, before in pairs if not torch.equal(buffer, before)]
        self._buffers, self._before = [pair[0] for pair in changed], [pair[1] for pair in changed]
        both = zip(self._owners, self._assigned, strict=True)
        replaced = [(owner, before) for owner, before in both if _identities(owner) != _identities(before)]
        self._owners, self._assigned = [pair[0] for pair in replaced], [pair[1] for pair in replaced]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Selective checkpointing is a dispatch mode, which expects the operations of the first pass only.
        with without_dispatch_modes():
            after = [buffer.detach().clone() for buffer in self._buffers]
        assigned_after = [dict(owner) for owner in self._owners]
        self._assign(self._assigned)
        self._fill(self._before)
        try:
            return self._function(*args, **kwargs)
        finally:
            self._assign(assigned_after)
            self._fill(after)

    def _assign(self, values: Sequence[Owner]) -> None:
        for owner, assigned in zip(self._owners, values, strict=True):
            owner.clear()
            owner.update(assigned)

    def _fill(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad(), without_dispatch_modes(), keeping_versions(self._buffers):
            for buffer, value in zip(self._buffers, values, strict=True):
                buffer.copy_(value)


def _identities(owner: Owner) -> dict[str, int]:
    return {name: id(buffer) for name, buffer in owner.items()}


class _Reentrant:
    """Takes the place of the autograd function of reentrant checkpoints, which torch.func and ``grad`` refuse."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if _owners.get() is None:
            return _real[1].apply(function, preserve, *args)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)
