"""What a model is compared by: the modules, their names and their settings, without the values of parameters."""

from __future__ import annotations

import functools
import hashlib
import types
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxtrain.core._bits import as_bytes


def fingerprint(root: nn.Module) -> Hashable:
    """Returns the types, names, ties, shapes and settings of all modules below ``root``.

    Modules with equal fingerprints compute the same function of parameters and buffers. Other tensors are compared by
    value, and functions by their code and their variables. Settings that cannot be compared by value equal only
    themselves.
    """
    # Index of the first occurrence of each tensor, module, container among the attributes, and function, by id. Tied
    # tensors share it.
    first_seen: dict[int, int] = {}
    tensors = [
        (name, tuple(value.shape), value.dtype, first_seen.setdefault(id(value), len(first_seen)))
        for named in (root.named_parameters, root.named_buffers)
        for name, value in named(remove_duplicate=False)
    ]
    for module in root.modules():
        for part in (module, *vars(module).values()):
            if isinstance(part, nn.Module | _CONTAINERS):
                first_seen.setdefault(id(part), len(first_seen))
    modules = [
        (name, _class_of(module), first_seen[id(module)], _settings(vars(module), first_seen))
        for name, module in root.named_modules(remove_duplicate=False)
    ]
    return tuple(tensors), tuple(modules)


def _class_of(module: nn.Module) -> Hashable:
    # Each parametrized module has a class of its own. The parametrizations are submodules.
    is_parametrized = parametrize.is_parametrized(module)
    return parametrize.type_before_parametrizations(module) if is_parametrized else type(module), is_parametrized


class _Itself:
    """Equal only to itself."""


class _Same:
    """Equal to that of the same object."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __deepcopy__(self, memo: dict[int, object]) -> _Same:
        return self


def _settings(attributes: Mapping[str, object], indices: dict[int, int]) -> Hashable:
    return tuple(
        (name, _comparable(value, indices))
        for name, value in sorted(attributes.items())
        if name not in _IGNORED_ATTRIBUTES
    )


def _comparable(value: object, indices: dict[int, int]) -> Hashable:
    """Returns what equals that of equal values.

    Args:
        value: A setting.
        indices: Numbers of the parts of the model by id, as in ``fingerprint``. New functions are added.
    """
    if isinstance(value, _COMPARED_BY_VALUE):
        return type(value), value
    if isinstance(value, Tensor):
        return indices[id(value)] if id(value) in indices else _comparable_tensor(value)
    if isinstance(value, nn.Module) and id(value) in indices:
        return nn.Module, indices[id(value)]
    if isinstance(value, types.FunctionType):
        return _comparable_function(value, indices)
    if isinstance(value, types.MethodType):
        return "method", _comparable(value.__func__, indices), _comparable(value.__self__, indices)
    if isinstance(value, functools.partial):
        parts = value.func, value.args, value.keywords
        return type(value), *(_comparable(part, indices) for part in parts)
    if isinstance(value, weakref.ref):
        # Recurrent layers have some to parameters, by which they notice that these have been replaced.
        target: Any = value()
        return weakref.ref, None if isinstance(target, nn.Parameter) else _comparable(target, indices)
    if isinstance(value, list | tuple):
        return type(value), tuple(_comparable(inner, indices) for inner in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_comparable(inner, indices) for inner in value)
    if isinstance(value, Mapping):
        items = ((_comparable(key, indices), _comparable(inner, indices)) for key, inner in value.items())
        return type(value), tuple(items)
    return _Itself()


def _comparable_function(function: types.FunctionType, indices: dict[int, int]) -> Hashable:
    if not function.__closure__ and "<" not in function.__qualname__:
        return function  # of a Python module. It can be pickled, and code cannot.
    if id(function) in indices:
        return "function", indices[id(function)]
    indices[id(function)] = len(indices)
    cells = [_Same(cell) if cell == types.CellType() else cell.cell_contents for cell in function.__closure__ or ()]
    named = {**(function.__kwdefaults__ or {}), **vars(function)}
    variables = (*cells, *(function.__defaults__ or ()), *named.values())
    return (
        *("function", function.__code__, _Same(function.__globals__), *named),
        *(_comparable_variable(variable, indices) for variable in variables),
    )


def _comparable_variable(value: object, indices: dict[int, int]) -> Hashable:
    """As ``_comparable`` for a variable of a function, whose later changes the function sees."""
    if isinstance(value, _CONTAINERS) and id(value) in indices:
        return type(value), indices[id(value)]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, _CONTAINERS) else None
    is_outside = isinstance(value, Tensor) and id(value) not in indices
    if is_outside or (parts is not None and not any(id(part) in indices for part in parts)):
        return _Same(value)
    found = value if isinstance(value, _Same) else _comparable(value, indices)
    return _Same(value) if isinstance(found, _Itself) else found


def _comparable_tensor(value: Tensor) -> Hashable:
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        return _Itself()
    properties = type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if value.is_meta:
        return properties
    row_major = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    try:
        return properties, hashlib.sha256(as_bytes(row_major).numpy().data).digest()
    except RuntimeError:  # transforms of torch.func hide the values of their tensors
        return _Itself()


_CONTAINERS = dict | list | set
_IGNORED_ATTRIBUTES = (
    *("_parameters", "_buffers", "_modules"),
    # These run when weights are saved and loaded.
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_COMPARED_BY_VALUE = (
    *(bool, int, float, complex, str, bytes, type(None), type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    types.BuiltinFunctionType,
)
