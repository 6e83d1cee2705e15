"""Modules and the hooks of their parameters."""

from __future__ import annotations

from torch import Tensor, nn

from fxtrain._torch_internals.interface import Interface

BATCH_NORM = Interface("torch.nn.modules.batchnorm._BatchNorm", "recomputing the statistics of batch norms")
HOOKS = Interface("torch.Tensor._backward_hooks", "refusing parameters with hooks, which functional calls would skip")
ACCUMULATED = Interface(
    "torch.Tensor._post_accumulate_grad_hooks", "refusing parameters with hooks, which functional calls would skip"
)

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
