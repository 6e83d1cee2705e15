"""The module that callbacks of transformers see: it holds the tensors of a state while a callback runs."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxtrain._torch_internals.dynamo import inlined_only
from fxtrain.core import TrainState, describe
from fxtrain.model import to_module
from fxtrain.model._tensor_access import memory_of, written_by

_SETTINGS = (type(None), bool, int, float, str)
_TABLES = ("_parameters", "_buffers", "_modules")
_NO_SETTINGS: dict[str, object] = {}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ShownModule:
    """A module that holds the tensors of a state, without a copy, while a callback runs. In between it holds none.

    Writes of a callback are detected. They are applied to a new state where the event allows it, and refused
    elsewhere. The state that was shown is not modified.

    Args:
        state: A state of one module, which decides the architecture.

    Raises:
        ValueError: If the state is that of several modules.
    """

    def __init__(self, state: TrainState) -> None:
        if not isinstance(made := to_module(state, train=True), nn.Module):
            raise ValueError(
                f"expected a state of one module for callbacks of transformers, got one of {describe(made)}. They take "
                "a single model. Write a callback of fxtrain for a state of several."
            )
        self.module = made
        self._params, self._buffers = dict(made.named_parameters()), dict(made.named_buffers())
        self._model, self._device = state.model, state.step.device
        self._settings, self._contents = self._read_settings(), self._read_contents()
        self._release()

    def fits(self, state: TrainState) -> bool:
        """Whether the module has the architecture, the trainable selection and the device of the state."""
        return self._model == state.model and self._device == state.step.device

    def show(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], grads: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fills the module.

        Args:
            params: Parameters by name.
            buffers: Buffers by name.
            grads: Gradients by the names of the trained parameters; None for no gradients.
        """
        self._shown: dict[str, Tensor] = {**params, **buffers}
        for name, target in (*self._params.items(), *self._buffers.items()):
            target.data = self._shown[name]
        for name, target in self._params.items():
            target.grad = None if grads is None else grads.get(name)

    def hide(self) -> None:
        """Empties the module, because a step copies a state whose memory something else references."""
        self._shown = {}
        self._release()

    def watch(self, who: str, *, refuse: str | None) -> _Writes:
        """Returns a context in which writes are detected.

        Args:
            who: The callback and its method, for errors.
            refuse: Why the callback must not write now; None if it may.
        """
        return _Writes(self, who, refuse)

    def _release(self) -> None:
        for target in (*self._params.values(), *self._buffers.values()):
            target.data = torch.empty(0, dtype=target.dtype, device=target.device)
        for target in self._params.values():
            target.grad = None

    def _read_contents(self) -> list[object]:
        """Returns everything that the modules and their configurations contain. Faster to compare than settings."""
        containers: list[dict[str, object]] = []
        for module in self.module.modules():
            attributes = vars(module)
            containers += [attributes, *(attributes[name] for name in (*_TABLES, *_HOOKS))]
            containers.append(getattr(attributes.get("config"), "__dict__", _NO_SETTINGS))
        trained = [value.requires_grad for value in self._params.values()]
        return [*itertools.chain.from_iterable(map(dict.values, containers)), *trained]

    def _read_settings(self) -> dict[str, object]:
        """Returns all that callbacks can change besides values: settings, hooks, structure and trainable parameters."""
        found: dict[str, object] = {}
        for path, module in self.module.named_modules():
            dot = f"{path}." if path else ""
            attributes = vars(module)
            for name, value in attributes.items():
                if type(value) in _SETTINGS and name != "training":
                    found[f"{dot}{name}"] = value
            found[f"{dot}hooks"] = sum(len(attributes[name]) for name in _HOOKS)
            for name, value in attributes["_parameters"].items():
                found[f"{dot}{name}"] = id(value), getattr(value, "requires_grad", None)
            for name in ("_modules", "_buffers"):
                found.update((f"{dot}{key}", id(value)) for key, value in attributes[name].items())
            config = attributes.get("config")
            for name, value in getattr(config, "__dict__", {}).items():
                if type(value) in _SETTINGS:
                    found[f"{dot}config.{name}"] = value
        return found

    def refuse_other_settings(self, who: str) -> None:
        """Raises if a callback changed more than values, which a state cannot hold. The changes are not undone."""
        before, self._contents = self._contents, self._read_contents()
        if len(before) == len(self._contents) and all(map(operator.is_, before, self._contents)):
            return
        if (now := self._read_settings()) == self._settings:  # in another mode, for example
            return
        names = [*self._settings, *(name for name in now if name not in self._settings)]
        name = next(name for name in names if self._settings.get(name, _MISSING) != now.get(name, _MISSING))
        self._settings = now
        raise RuntimeError(
            f"expected {who} to change values of the model at most, got another {name}, which the compiled step would "
            "not see. Freeze parameters with fxtrain.with_trainable between two calls of fit, watch activations with "
            "fxtrain.tap, and change other settings before fxtrain.init."
        )

    def values(self, written: Collection[int]) -> dict[str, Tensor]:
        """Returns copies of the tensors that were written or replaced, by name."""
        return {
            name: target.detach().clone()
            for name, target in (*self._params.items(), *self._buffers.items())
            if _place(target) != _place(self._shown[name]) or (written and memory_of(target) in written)
        }

    def shown_memory(self) -> dict[int, list[tuple[str, Tensor]]]:
        """Returns the tensors of the state by the memory that they are in, with their names."""
        found: dict[int, list[tuple[str, Tensor]]] = {}
        for name, value in self._shown.items():
            found.setdefault(memory_of(value), []).append((name, value))
        return found


_MISSING = object()


def _place(value: Tensor) -> tuple[object, ...]:
    return value.data_ptr(), value.shape, value.stride()


@inlined_only
class _Writes(TorchFunctionMode):
    """Detects writes to the shown tensors before they happen: keeps the values from before them, or refuses.

    Attributes:
        values: New values by name, once the context has ended.
    """

    def __init__(self, shown: ShownModule, who: str, refuse: str | None) -> None:
        super().__init__()
        self._model, self._who, self._refuse = shown, who, refuse
        self._memory: dict[int, list[tuple[str, Tensor]]] | None = None
        self._before: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.values: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for target in written_by(func.__name__, args, kwargs or {}):
            self._notice(func.__name__, memory_of(target))
        return func(*args, **(kwargs or {}))

    def _notice(self, operation: str, memory: int) -> None:
        if self._memory is None:
            self._memory = self._model.shown_memory()
        if memory not in self._memory or memory in self._before:
            return
        if self._refuse is not None:
            self._raise(f"an in-place write ({operation}) to {self._memory[memory][0][0]}")
        self._before[memory] = [(value, value.clone()) for _, value in self._memory[memory]]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.values = self._model.values(self._before)
        for pairs in self._before.values():
            for value, before in pairs:
                value.copy_(before)
        if error[0] is not None:
            return
        if self.values and self._refuse is not None:
            self._raise(f"an assignment to {next(iter(self.values))}")
        self._model.refuse_other_settings(self._who)

    def _raise(self, what: str) -> None:
        raise RuntimeError(f"expected {self._who} to leave the model as it is, got {what}. {self._refuse}")
