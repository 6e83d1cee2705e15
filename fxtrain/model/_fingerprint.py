"""Hashable descriptions of modules: modules with equal ones compute the same function of parameters and buffers."""

from __future__ import annotations

import types
from collections.abc import Hashable, Mapping

import torch
from torch import nn

_IGNORED_ATTRIBUTES = ("_parameters", "_buffers", "_modules")
_COMPARED_BY_VALUE = (
    *(bool, int, float, complex, str, bytes, type(None), type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(types.FunctionType, types.BuiltinFunctionType),
)


def fingerprint(root: nn.Module) -> Hashable:
    """Returns the types, names, ties, shapes and settings of all modules below ``root``.

    Settings that cannot be compared by value equal only themselves.
    """
    # Index of the first occurrence of each tensor, by id. Tied tensors share it.
    first_seen: dict[int, int] = {}
    tensors = [
        (name, tuple(value.shape), value.dtype, first_seen.setdefault(id(value), len(first_seen)))
        for named in (root.named_parameters, root.named_buffers)
        for name, value in named(remove_duplicate=False)
    ]
    modules = [
        (name, type(module), _settings(vars(module))) for name, module in root.named_modules(remove_duplicate=False)
    ]
    return tuple(tensors), tuple(modules)


class _Itself:
    """Equal only to itself."""


def _settings(attributes: Mapping[str, object]) -> Hashable:
    return tuple(
        (name, _comparable(value)) for name, value in sorted(attributes.items()) if name not in _IGNORED_ATTRIBUTES
    )


def _comparable(value: object) -> Hashable:
    if isinstance(value, _COMPARED_BY_VALUE):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_comparable, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_comparable, value))
    if isinstance(value, Mapping):
        return type(value), tuple((_comparable(key), _comparable(inner)) for key, inner in value.items())
    return _Itself()
