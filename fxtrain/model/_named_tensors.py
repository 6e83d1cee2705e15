"""Names in state dicts: the tensors of a tree of modules by name, and renamings of a state dict's names."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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


Rename = Mapping[str, str | None] | Callable[[str], str | None] | None

# Parts of names added by wrappers: torch.compile, DDP and DataParallel, FSDP, activation checkpointing.
_WRAPPER_PARTS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def renamed(names: Iterable[str], rename: Rename) -> dict[str, str]:
    """Returns the new name of each name. Names that are renamed to None are left out.

    Args:
        names: Names in a state dict.
        rename: A mapping from old prefixes to new ones, of which the longest match applies, or a function of the name.

    Raises:
        ValueError: If a prefix of the mapping matches no name, or two names get the same new name.

    Example:
        >>> renamed(["module.head.bias", "module.body.bias"], {"module.": "", "module.head.": None})
        {'module.body.bias': 'body.bias'}
    """
    names = list(names)
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, Mapping):
        for prefix in rename:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(
                    f"expected rename to have prefixes of names in the state dict, got {prefix!r}. The names are "
                    f"{first_names(names)}."
                )
    changed = {name: rename(name) if callable(rename) else _replaced(name, rename) for name in names}
    found = {old: new for old, new in changed.items() if new is not None}
    twice = [new for new, count in Counter(found.values()).items() if count > 1]
    if twice:
        both = [old for old, new in found.items() if new == twice[0]]
        raise ValueError(
            f"expected rename to give distinct names, got {twice[0]!r} for each of {first_names(both)}. Rename all but "
            "one of them to None, which leaves them out."
        )
    return found


def proposed(names: Collection[str], given: Collection[str]) -> tuple[str, int] | None:
    """Finds the renaming with which the most names match.

    Args:
        names: Names of the model.
        given: Names in the state dict.

    Returns:
        The renaming as code, and the number of model names that match. None if no renaming matches more names than
        match without one.

    Example:
        >>> proposed(["weight", "bias"], ["module.weight", "module.bias"])
        ("rename={'module.': ''}", 2)
    """
    wanted = set(names)
    candidates: list[tuple[str, list[str]]] = []
    # Names are paired by their longest common suffix, as in "module.layers.0.bias" and "net.layers.0.bias". A suffix of
    # two names maps to None.
    by_suffix: dict[str, str | None] = {}
    for name in wanted:
        for end in _suffixes(name):
            by_suffix[end] = None if end in by_suffix else name
    by_suffix.update({name: name for name in wanted})
    prefixes: Counter[tuple[str, str]] = Counter()
    for name in given:
        for end in _suffixes(name):
            match = by_suffix.get(end)
            if match is not None:
                prefixes[name[: len(name) - len(end)], match[: len(match) - len(end)]] += 1
                break
    for (old, new), _ in prefixes.most_common(4):
        if old != new:
            candidates.append((f"rename={{{old!r}: {new!r}}}", [_replaced(name, {old: new}) or "" for name in given]))
    for part in _WRAPPER_PARTS:
        if any(f".{part}" in name for name in given):
            code = f"rename=lambda name: name.replace({part!r}, '')"
            candidates.append((code, [name.replace(part, "") for name in given]))
    fitting = [(code, len(wanted.intersection(new))) for code, new in candidates if len(set(new)) == len(new)]
    best = max(fitting, key=lambda candidate: candidate[1], default=None)
    return best if best is not None and best[1] > len(wanted.intersection(given)) else None


def _replaced(name: str, prefixes: Mapping[str, str | None]) -> str | None:
    longest = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
    if longest is None:
        return name
    new = prefixes[longest]
    return None if new is None else new + name[len(longest) :]


def _suffixes(name: str) -> list[str]:
    """Returns the suffixes of a name that start at a part of it, the longest (the name) first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
