"""Modules on the meta device, which a call fills with the tensors of a state and restores afterwards."""

from __future__ import annotations

import collections
import copy
import threading
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from fxtrain._torch_internals.memory import write_count
from fxtrain._torch_internals.modules import own_buffers, own_modules, own_parameters
from fxtrain.core import Tree
from fxtrain.model._attribute_snapshots import AttributeSnapshot, leaves
from fxtrain.model._closures import bind_closures, hook_owners, refuse_other_references
from fxtrain.rng._host_generators import global_generators

# Marks a buffer that a call deleted.
DELETED = object()


class MetaModules:
    """Modules on the meta device that are filled and used inside ``with template:``, and restored on exit.

    Contexts nest, and each starts from the original modules. Other threads wait.

    Args:
        root: A module whose children are the modules.
        owned: Ids of the objects that belong to these modules only.
        paths: Path of each child, for errors.

    Attributes:
        root: The root module.
        slots: Maps each slot of a module to the name of its tensor.
        empty: Paths of the meta tensors, by id. No operation may read them.
    """

    def __init__(self, root: nn.Module, owned: frozenset[int], paths: Mapping[str, str]) -> None:
        self.root = root
        self._modules = {paths[name]: module for name, module in own_modules(root).items() if module is not None}
        self._owned, self._paths = owned, dict(paths)
        self._lock = threading.RLock()
        # Snapshots that nested contexts restore on exit, the innermost last.
        self._outer: list[AttributeSnapshot | None] = []
        self._contents = AttributeSnapshot(self._modules, owned)
        names = {id(value): name for named in (root.named_buffers, root.named_parameters) for name, value in named()}
        self._places = [
            (container, key, names[id(value)])
            for container in self._contents.containers
            for key, value in _entries(container)
            if id(value) in names
        ]
        self._tuples = [
            (container, key, value, [names.get(id(part)) for part in value])
            for container in self._contents.containers
            for key, value in _entries(container)
            if type(value) is tuple and any(id(part) in names for part in value)
        ]
        self.empty = {number: self.path(name) for number, name in names.items()}
        # torch does not count writes to inference tensors.
        self._tensors = [
            (path, tensor, write_count(tensor))
            for path, tensor in self._contents.tensors
            if id(tensor) not in names and not tensor.is_inference()
        ]
        self._parameters = {
            names[id(value)]: (own_parameters(module), key)
            for module in root.modules()
            for key, value in own_parameters(module).items()
            if value is not None
        }
        self._buffers = [(name, own_buffers(module)) for name, module in root.named_modules()]
        # One entry for each slot. functional_call's own tying would fill a module with two names twice.
        self.slots = {
            f"{prefix}.{key}": names[id(value)]
            for prefix, module in root.named_modules()
            for named in (own_parameters(module), own_buffers(module))
            for key, value in named.items()
            if value is not None
        }

    def __enter__(self) -> MetaModules:
        self._lock.acquire()
        nested = bool(self._outer)
        self._outer.append(AttributeSnapshot(self._modules, self._owned) if nested else None)
        if nested:
            self._contents.restore()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self._contents.restore()
            outer = self._outer.pop()
            if outer is not None:
                outer.restore()
            if error is None:
                self._refuse_writes()
        finally:
            self._lock.release()

    def restore(self) -> bool:
        """Restores what code outside the context changed. Returns whether there were changes."""
        with self._lock:
            changed = not self._contents.is_intact()
            if changed:
                self._contents.restore()
            return changed

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the tensors of a state into their slots, ties included."""
        for container, key, name in self._places:
            container[key] = tensors[name]
        for container, key, values, names in self._tuples:
            container[key] = tuple(
                value if name is None else tensors[name] for value, name in zip(values, names, strict=True)
            )

    def buffers(self) -> dict[str, Tensor]:
        """Returns the current buffers by name, including those that a module has replaced."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for prefix, named in self._buffers:
            for key, value in named.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    found[f"{prefix}.{key}"] = value.detach()
        return found

    def changed_buffers(self, tensors: Mapping[str, Tensor]) -> dict[str, Tree]:
        """Returns the buffers that a call added, reshaped, cast, set to None or deleted (``DELETED``), by name.

        Args:
            tensors: The buffers that the modules were filled with, by name.
        """
        found: dict[str, Any] = {}
        missing = set(tensors)
        for prefix, module in self.root.named_modules():
            for key, value in own_buffers(module).items():
                slot = f"{prefix}.{key}"
                name = self.slots.get(slot)
                missing.discard(name or "")
                if name is None:
                    found |= {} if value is None else {slot: value}
                elif name in tensors:
                    old = tensors[name]
                    if value is None or value.shape != old.shape or value.dtype != old.dtype:
                        found[name] = value
        return found | dict.fromkeys(missing, DELETED)

    def put_buffers(self, buffers: Mapping[str, Tree]) -> None:
        """Puts buffers from ``changed_buffers`` into their slots."""
        for prefix, named in self._buffers if buffers else ():
            for key in list(named):
                name = self.slots.get(f"{prefix}.{key}", "")
                if buffers.get(name) is DELETED:
                    del named[key]
                elif name in buffers:
                    named[key] = buffers[name]

    def parameter(self, name: str) -> Tensor | None:
        """Returns the current value in a parameter's slot."""
        named, key = self._parameters[name]
        return named.get(key)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Returns the plain tensors among the attributes, with their paths."""
        return [(path, tensor) for path, tensor, _ in self._tensors]

    def leaves(self) -> dict[str, object]:
        """Returns the values of all Python attributes, by path."""
        return leaves(self._modules, self._owned)

    def generators(self) -> list[tuple[str, object]]:
        """Returns the generator objects of Python and numpy among the attributes, with their paths."""
        return [(path, generator) for path, generator, _ in self._contents.generators]

    def path(self, name: str) -> str:
        """Returns the path of a parameter, buffer or module, for errors."""
        number, _, rest = name.partition(".")
        return f"{self._paths[number]}.{rest}" if rest else self._paths[number]

    def copy_containers(self, output: Tree) -> Tree:
        """Returns the output with containers of the modules copied, because the originals are restored on exit."""
        if type(output) is tuple:
            return tuple(map(self.copy_containers, output))
        if id(output) in self._contents.ids:
            output = copy.copy(output)
        if type(output) is list:
            return list(map(self.copy_containers, output))
        if type(output) is dict:
            return {key: self.copy_containers(value) for key, value in output.items()}
        return output

    def _refuse_writes(self) -> None:
        for path, tensor, version in self._tensors:
            if write_count(tensor) != version:
                raise RuntimeError(
                    f"expected a call to leave tensors outside the state unchanged, got an in-place write to {path}. "
                    "Register it as a buffer, which is part of the state."
                )

    def __deepcopy__(self, memo: dict[int, object]) -> MetaModules:
        root = copy.deepcopy(self.root, memo)
        bind_closures(root, memo)
        return MetaModules(root, frozenset(id(memo[part]) for part in self._owned if part in memo), self._paths)

    def __reduce__(self) -> tuple[type[MetaModules], tuple[nn.Module, frozenset[int], dict[str, str]]]:
        return MetaModules, (self.root, frozenset(), self._paths)


def on_meta_device(root: nn.Module) -> tuple[nn.Module, frozenset[int]]:
    """Returns a copy on the meta device, ties included, and the ids of all copied objects.

    Raises:
        TypeError: If the module cannot be copied.
        ValueError: If one of its functions reaches a part of it in a way that the copy cannot.
    """
    replacements: dict[int, Tensor] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in root.parameters()
    }
    replacements |= {id(buffer): buffer.detach().to("meta") for buffer in root.buffers()}
    return copied_with(root, replacements)


def copied_with(root: nn.Module, replacements: Mapping[int, Tensor]) -> tuple[nn.Module, frozenset[int]]:
    """Returns a copy with other tensors in place of parameters and buffers, and the ids of all copied objects.

    Args:
        root: The module.
        replacements: The new tensors, by the ids of those in ``root``, which are not copied.

    Raises:
        TypeError: If the module cannot be copied.
        ValueError: If one of its functions reaches a part of it in a way that the copy cannot.
    """
    # Tensors in deepcopy's memo take the place of the weights, also in other attributes that refer to them.
    memo: dict[int, Any] = {**replacements}
    searched = [id(owner()) for owner in hook_owners(root)]
    for _, tensor in AttributeSnapshot({"model": root}, searched).tensors:
        # deepcopy refuses tensors with a graph, such as those that torch.nn.utils.weight_norm stores. Each call
        # recomputes them.
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        copied = _copied(root, memo)
    except Exception as error:
        raise TypeError(
            f"expected modules that copy.deepcopy can copy, got the error: {str(error).rstrip('.')}. Remove locks, "
            "open files and hooks that close over them from the modules."
        ) from error
    refuse_other_references(root, memo)
    return copied


def in_eval_mode(root: nn.Module) -> tuple[nn.Module, frozenset[int]]:
    """Returns a copy in eval mode, and the ids of all copied objects."""
    module, owned = _copied(root, {})
    return module.eval(), owned


def _copied(root: nn.Module, memo: dict[int, object]) -> tuple[nn.Module, frozenset[int]]:
    # Global generators are shared with the copy, because a copied one would not be seeded.
    memo |= {id(generator): generator for generator in global_generators()}
    made = copy.deepcopy(root, memo)
    bind_closures(made, memo)
    # Loggers and enum members copy to themselves, so the copy does not own them.
    return made, frozenset(id(value) for key, value in memo.items() if key not in (id(value), id(memo)))


def _entries(container: object) -> list[tuple[Hashable, object]]:
    if isinstance(container, dict):
        return list(container.items())
    return list(enumerate(container)) if isinstance(container, list | collections.deque) else []
