"""Access to the tensors of a tree of modules by their names in state dicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import Tree, dtype_name, first_names
from fxtrain.model._types import Modules, StateDict
from fxtrain.tree import Path

# torch's state dict key for what a module's get_extra_state returns.
EXTRA_STATE = "_extra_state"


class NamedTensors:
    """The tensors of a tree of modules, by their names in state dicts.

    In a tree, names begin with the path of the module, joined by dots: ``generator.layers.0.weight``.

    Args:
        modules: A module, or a pytree of modules and tensors.
        part: Path of a submodule or entry, joined by dots. Names are relative to it.

    Raises:
        ValueError: If two tensors have the same name, or ``part`` does not exist.

    Attributes:
        tensors: The values of ``module.state_dict()`` by name. Tensors are not copied.
        ties: Groups of names that share one tensor.
    """

    def __init__(self, modules: Modules, part: str = "") -> None:
        self._part = part
        modules = at(modules, part)
        paths = [tuple(accessor.path) for accessor in tree.accessors(modules)]
        self._parts = dict(zip(paths, tree.leaves(modules), strict=True))
        self._versions: dict[tuple[Any, ...], Any] = {}
        self.tensors: dict[str, Any] = {}
        groups: dict[int, list[str]] = {}
        for path, leaf in self._parts.items():
            for name, value in _values(path, leaf).items():
                if name in self.tensors:
                    raise ValueError(f"expected one tensor for each name, got two for {name!r}. Rename a key.")
                self.tensors[name] = value
                if isinstance(value, Tensor):
                    groups.setdefault(id(value), []).append(name)
        self.ties = [group for group in groups.values() if len(group) > 1]

    def whole(self, names: Iterable[str]) -> list[str]:
        """Returns names of the part as names of the whole tree."""
        return [f"{self._part}.{name}".strip(".") for name in names]

    def flat(self, given: StateDict) -> dict[str, Any]:
        """Returns the values by name of a state dict, or of a tree of state dicts like the modules.

        Raises:
            ValueError: If two values have the same name.
        """
        found: dict[str, Any] = {}
        for path, value in self._walk((), given):
            name = ".".join(map(str, path))
            if name in found:
                raise ValueError(
                    f"expected one value for each name, got two for {name!r} in the state dict. Rename a key."
                )
            found[name] = value
        return found

    def load(self, values: Mapping[str, Tree], *, cast: bool, with_versions: bool) -> tuple[list[str], list[str]]:
        """Copies values into the tensors of the same names, with the modules' own ``load_state_dict``.

        Args:
            values: Values by name.
            cast: Whether values under names of older module versions, which modules convert, may have other dtypes.
            with_versions: Whether modules see the version metadata of the state dict that was given to ``flat``.

        Returns:
            The missing names, and the names of ``values`` that were not used.

        Raises:
            ValueError: If a module rejects its part of the values, or a dtype differs without ``cast``.
        """
        missing: list[str] = []
        unused = dict(values)
        for path, part in self._parts.items():
            if not isinstance(part, nn.Module):
                name = _prefix(path)[:-1]
                if name in unused:
                    part.copy_(unused.pop(name))
                else:
                    missing.append(name)
                continue
            prefix = _prefix(path)
            mine = OrderedDict(
                (name[len(prefix) :], unused.pop(name)) for name in list(unused) if name.startswith(prefix)
            )
            if with_versions and self._versions.get(path) is not None:
                mine._metadata = self._versions[path]  # pyright: ignore[reportAttributeAccessIssue]
            try:
                absent, unexpected = part.load_state_dict(mine, strict=False)
            except RuntimeError as error:
                raise ValueError(str(error)) from None
            missing += [prefix + name for name in absent]
            unused |= {prefix + name: None for name in unexpected}
            if not cast:
                _refuse_hidden_casts(part.state_dict(keep_vars=True), mine, {*absent, *unexpected})
        return missing, list(unused)

    def _walk(self, path: Path, node: object) -> Iterator[tuple[Path, Any]]:
        entries = node.items() if isinstance(node, Mapping) else enumerate(node) if _is_sequence(node) else None
        if isinstance(node, Mapping) and isinstance(self._parts.get(path), nn.Module):
            self._versions[path] = getattr(node, "_metadata", None)
            yield from (((*path, name), value) for name, value in node.items())
        elif entries is not None and any(part[: len(path)] == path for part in self._parts):
            for key, value in entries:
                yield from self._walk((*path, key), value)
        else:
            yield path, node


def at(modules: Modules, part: str) -> Modules:
    """Returns the submodule or tree entry at a path joined by dots.

    Raises:
        ValueError: If the path does not exist.
    """
    found, rest = modules, part
    while rest:
        children = _children(found)
        fitting = [key for key in children if rest == key or rest.startswith(f"{key}.")]
        if not fitting:
            raise ValueError(
                f"expected part to be the path of a submodule, got {part!r}. Choose from "
                f"{first_names(list(children), 8)}."
            )
        # Dict keys may contain dots.
        key = max(fitting, key=len)
        found, rest = children[key], rest[len(key) + 1 :]
    return found


def _children(node: object) -> dict[str, Modules]:
    if isinstance(node, nn.Module):
        return dict(node.named_children())
    if isinstance(node, Mapping):
        return {str(key): child for key, child in node.items()}
    return {str(index): child for index, child in enumerate(node)} if _is_sequence(node) else {}


def _values(path: Path, part: nn.Module | Tensor) -> dict[str, Any]:
    prefix = _prefix(path)
    if isinstance(part, nn.Module):
        return {prefix + name: value for name, value in part.state_dict(keep_vars=True).items()}
    return {prefix[:-1]: part}


def _prefix(path: Path) -> str:
    return "".join(f"{key}." for key in path)


def _is_sequence(node: object) -> TypeGuard[Sequence[Tree]]:
    return isinstance(node, list | tuple)


def _refuse_hidden_casts(here: Mapping[str, object], values: Mapping[str, object], without: set[str]) -> None:
    """Raises for dtypes that differ under names of older module versions, which have no counterpart in the model."""
    old_names = values.keys() - here.keys() - without
    old = _dtypes_of(values[name] for name in old_names)
    new = _dtypes_of(here[name] for name in here.keys() - values.keys() - without)
    if not old <= new:
        names = [name for name in values if name in old_names]
        raise ValueError(
            f"expected {_dtypes(new)} for {first_names(names)}, got {_dtypes(old - new)}. Pass cast=True, or make the "
            "state in their dtype with fxtrain.init(..., dtype=)."
        )


def _dtypes_of(values: Iterable[object]) -> set[torch.dtype]:
    return {value.dtype for value in values if isinstance(value, Tensor)}


def _dtypes(dtypes: set[torch.dtype]) -> str:
    return " or ".join(sorted(dtype_name(dtype) for dtype in dtypes)) or "no tensor"
