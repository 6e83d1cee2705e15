"""Tensors made from literals, whose values can be read while a step is traced.

Code such as ``torch.arange(2, x.ndim).tolist()`` computes a list of integers by way of a tensor. The tracer's tensors
have no values, although these depend only on the arguments.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdRef

from fxtrain._torch_internals.dispatch import without_dispatch_modes
from fxtrain._torch_internals.memory import write_count
from fxtrain.core import Tree

_FACTORIES = (torch.arange, torch.tensor)
_MAX_VALUES = 4096
_READS = ("tolist", "item")


class KnownLiterals(TorchFunctionMode):
    """A context in which ``tolist`` and ``item`` work on tensors that ``arange`` and ``tensor`` made from literals.

    Tensors modified in place afterwards are excluded.

    Example:
        >>> from fxtrain._torch_internals.tracing import new_fake_mode
        >>> with new_fake_mode(), KnownLiterals():
        ...     torch.arange(2, 5).tolist()
        [2, 3, 4]
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[WeakIdRef, tuple[int, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        kwargs = kwargs or {}
        name = func.__name__
        values = self._values_of(args[0]) if name in (*_READS, "unbind") and args else None
        if values is not None and name in _READS:
            with without_dispatch_modes():
                return getattr(values, name)(*args[1:], **kwargs)
        made = func(*args, **kwargs)
        if values is not None:
            # Outside of torch.func, the tracer's tolist unbinds the tensor and reads each element.
            with without_dispatch_modes():
                parts = values.unbind(*args[1:], **kwargs)
            for part, value in zip(made, parts, strict=True):
                self._add(part, value)
            return made
        if func in _FACTORIES and _is_literal((args, kwargs)) and made.numel() <= _MAX_VALUES:
            with without_dispatch_modes():
                self._add(made, func(*args, **{**kwargs, "device": "cpu"}))
        return made

    def _values_of(self, tensor: object) -> Tensor | None:
        if not isinstance(tensor, Tensor):
            return None
        version, values = self._known.get(WeakIdRef(tensor), (-1, None))
        return values if values is not None and version == write_count(tensor) else None

    def _add(self, tensor: Tensor, values: Tensor) -> None:
        self._known[WeakIdRef(tensor)] = write_count(tensor), values
        weakref.finalize(tensor, self._known.pop, WeakIdRef(tensor), None)


def _is_literal(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_literal, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout)
