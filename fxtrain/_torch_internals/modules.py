"""Modules and the hooks of their parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxtrain._torch_internals.interface import Interface

BATCH_NORM = Interface("torch.nn.modules.batchnorm._BatchNorm", "recomputing the statistics of batch norms")
HOOKS = Interface("torch.Tensor._backward_hooks", "refusing parameters with hooks, which functional calls would skip")
ACCUMULATED = Interface(
    "torch.Tensor._post_accumulate_grad_hooks", "refusing parameters with hooks, which functional calls would skip"
)

Hooks = dict[int, Callable[..., Any]]
"""Hooks of a module by id."""

CALLS = frozenset(("_call_impl", "_wrapped_call_impl"))
"""The names of the functions through which torch calls a module's ``forward``."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns a module's own parameters by name, as the dictionary that the module reads."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Returns a module's own buffers by name, as the dictionary that the module reads."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns a module's children by name, as the dictionary that the module reads."""
    return module._modules


def add_idle_hook(module: nn.Module) -> Hooks:
    """Adds a hook without effect, so that Dynamo calls a ``forward`` set on the instance. Returns the hooks before.

    With torch 2.11, Dynamo otherwise looks for it among the attributes from before the trace.
    """
    before = module._forward_pre_hooks
    set_forward_pre_hooks(module, OrderedDict({**before, _IDLE: _no_change}))
    return before


def set_forward_pre_hooks(module: nn.Module, hooks: Hooks) -> None:
    """Replaces the hooks that run before ``forward``. Dynamo cannot trace changes of their dictionary."""
    module._forward_pre_hooks = hooks


_IDLE = -1  # an id that no other hook has


def _no_change(module: nn.Module, args: object) -> None:
    """Keeps the arguments of a module."""


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Returns the batch norms of all kinds among a module's parts.

    Example:
        >>> len(batch_norms(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
        1
    """
    kinds = BATCH_NORM.get() if BATCH_NORM.exists else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [part for part in module.modules() if isinstance(part, kinds)]


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether a tensor has hooks that run when its gradient is computed or accumulated."""
    return any(getattr(tensor, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))


def has_accumulation_hooks(tensor: Tensor) -> bool:
    """Whether a tensor has hooks that run after its gradient was accumulated."""
    return bool(getattr(tensor, "_post_accumulate_grad_hooks", None))
