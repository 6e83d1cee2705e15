"""The template: modules on the meta device. A call fills them with the tensors of a state, and restores them."""

from __future__ import annotations

import collections
import copy
import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxtrain.model._contents import Contents, leaves
from fxtrain.rng._host import global_generators

DELETED = object()  # stands for a buffer that a call deleted


class Template:
    """Modules on the meta device, which can be filled and used inside ``with template:``, and are restored at its end.

    Contexts nest, and each starts from the original modules. Other threads wait.

    Args:
        root: A module whose children are the modules.
        owned: The ids of the objects that belong to them alone.
        paths: How an error names each child.

    Attributes:
        root: As given.
        slots: The name of the tensor for each place in a module.
        empty: The path of each tensor on the meta device, by its id: no operator may see it.
    """

    def __init__(self, root: nn.Module, owned: frozenset[int], paths: Mapping[str, str]) -> None:
        self.root = root
        self._modules = {paths[name]: module for name, module in root._modules.items() if module is not None}
        self._owned, self._paths = owned, dict(paths)
        self._lock = threading.RLock()
        self._outer: list[Contents | None] = []  # what nested contexts put back, the innermost last
        self._contents = Contents(self._modules, owned)
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
        self._tensors = [
            (path, tensor, tensor._version)
            for path, tensor in self._contents.tensors
            if id(tensor) not in names and not tensor.is_inference()  # whose writes torch does not count
        ]
        self._parameters = {
            names[id(value)]: (module._parameters, key)
            for module in root.modules()
            for key, value in module._parameters.items()
            if value is not None
        }
        self._buffers = [(name, module._buffers) for name, module in root.named_modules()]
        # One name for each place in a module: torch would visit a module under two names twice.
        self.slots = {
            f"{prefix}.{key}" if prefix else key: names[id(value)]
            for prefix, module in root.named_modules()
            for named in (module._parameters, module._buffers)
            for key, value in named.items()
            if value is not None
        }

    def __enter__(self) -> Template:
        self._lock.acquire()
        nested = bool(self._outer)
        self._outer.append(Contents(self._modules, self._owned) if nested else None)
        if nested:
            self._contents.put_back()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self._contents.put_back()
            outer = self._outer.pop()
            if outer is not None:
                outer.put_back()
            if error is None:
                self._refuse_writes()
        finally:
            self._lock.release()

    def restore(self) -> bool:
        """Puts back what code outside the context has changed; returns whether there was anything."""
        with self._lock:
            changed = not self._contents.is_intact()
            if changed:
                self._contents.put_back()
            return changed

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the tensors of a state in their places, ties included."""
        for container, key, name in self._places:
            container[key] = tensors[name]
        for container, key, values, names in self._tuples:
            container[key] = tuple(
                value if name is None else tensors[name] for value, name in zip(values, names, strict=True)
            )

    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name: a module may write one or put another in its place."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for prefix, named in self._buffers:
            for key, value in named.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    found[f"{prefix}.{key}"] = value.detach()
        return found

    def odd_buffers(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The buffers that a call added, reshaped, cast, set to None or deleted (``DELETED``).

        Args:
            tensors: The buffers that the modules were filled with.
        """
        found: dict[str, Any] = {}
        missing = set(tensors)
        for prefix, module in self.root.named_modules():
            for key, value in module._buffers.items():
                slot = f"{prefix}.{key}"
                name = self.slots.get(slot)
                missing.discard(name or "")
                if name is None:
                    found |= {} if value is None else {slot: value}
                elif name in tensors:  # else it is a parameter
                    old = tensors[name]
                    if value is None or value.shape != old.shape or value.dtype != old.dtype:
                        found[name] = value
        return found | dict.fromkeys(missing, DELETED)

    def place(self, buffers: Mapping[str, Any]) -> None:
        """Puts what ``odd_buffers`` found in its places."""
        for prefix, named in self._buffers if buffers else ():
            for key in list(named):
                name = self.slots.get(f"{prefix}.{key}", "")
                if buffers.get(name) is DELETED:
                    del named[key]
                elif name in buffers:
                    named[key] = buffers[name]

    def parameter(self, name: str) -> Tensor | None:
        """What a module has in the place of a parameter."""
        named, key = self._parameters[name]
        return named.get(key)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The plain tensors among the attributes, by path."""
        return [(path, tensor) for path, tensor, _ in self._tensors]

    def leaves(self) -> dict[str, Any]:
        """The values of all Python attributes, by path."""
        return leaves(self._modules, self._owned)

    def generators(self) -> list[tuple[str, Any]]:
        """The generator objects of Python and numpy among the attributes, by path."""
        return [(path, generator) for path, generator, _ in self._contents.generators]

    def path(self, name: str) -> str:
        """How an error names a parameter, a buffer or a module of the root."""
        number, _, rest = name.partition(".")
        return f"{self._paths[number]}.{rest}" if rest else self._paths[number]

    def apart(self, output: Any) -> Any:
        """The output, in which containers of the modules are replaced by copies: the originals are put back."""
        if type(output) is tuple:
            return tuple(map(self.apart, output))
        if id(output) in self._contents.ids:
            output = copy.copy(output)
        if type(output) is list:
            return list(map(self.apart, output))
        if type(output) is dict:
            return {key: self.apart(value) for key, value in output.items()}
        return output

    def _refuse_writes(self) -> None:
        for path, tensor, version in self._tensors:
            if tensor._version != version:
                raise RuntimeError(
                    f"expected a call to leave tensors outside the state as they are, got a write in place to {path}. "
                    "Register it as a buffer: what a call writes into a buffer is part of the next state."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Template:
        root = copy.deepcopy(self.root, memo)
        return Template(root, frozenset(id(memo[part]) for part in self._owned if part in memo), self._paths)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.root, self._paths

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        root, paths = state
        self.__init__(root, frozenset(), paths)


def without_memory(root: nn.Module) -> tuple[nn.Module, frozenset[int]]:
    """A copy on the meta device with its ties, and the ids of all objects that were copied."""
    # Meta twins in deepcopy's memo copy the code without copying the weights.
    memo: dict[int, Any] = {}
    for parameter in root.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in root.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    for _, tensor in Contents({"model": root}, ()).tensors:
        # What a module computed from its parameters and keeps, as torch.nn.utils.weight_norm does, is computed again
        # in each call; deepcopy refuses it.
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        return _copied(root, memo)
    except Exception as error:
        raise TypeError(
            f"The module cannot be copied ({error}), and init copies its code to leave yours as it was: "
            "remove locks, open files and hooks that close over them from it."
        ) from error


def evaluating(root: nn.Module) -> tuple[nn.Module, frozenset[int]]:
    """A copy in eval mode, and the ids of all objects that were copied."""
    module, owned = _copied(root, {})
    return module.eval(), owned


def _copied(root: nn.Module, memo: dict[int, Any]) -> tuple[nn.Module, frozenset[int]]:
    memo |= {
        id(generator): generator for generator in global_generators()
    }  # a copy would no longer be the one that is seeded
    made = copy.deepcopy(root, memo)
    # A logger or a member of an enum is its own copy.
    return made, frozenset(id(value) for key, value in memo.items() if key not in (id(value), id(memo)))


def _entries(container: Any) -> list[tuple[Any, Any]]:
    if isinstance(container, dict):
        return list(container.items())
    return list(enumerate(container)) if isinstance(container, list | collections.deque) else []
