"""State dicts: the names and shapes in which torch's users pass weights on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import TrainState
from fxtrain.model.architecture import model_of

_SHOWN = 4  # names in a message


def state_dict(state: TrainState) -> Any:
    """What ``module.state_dict()`` gives for the state's module, in memory of its own.

    Tied parameters appear under each of their names, buffers that are not persistent do not appear, and modules'
    hooks are run.

    Args:
        state: From ``init``. If that was given a tree of modules, the result is such a tree of dicts.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> module = torch.nn.Linear(2, 1)
        >>> module.load_state_dict(fx.state_dict(state))
        <All keys matched successfully>
    """

    def read(modules: Any) -> Any:
        return tree.map(
            lambda part: (
                {name: _cloned(value) for name, value in part.state_dict().items()}
                if isinstance(part, nn.Module)
                else part.clone()
            ),
            modules,
        )

    return model_of(state).call(state.params, state.buffers, read, train=False)[0]


def load_state_dict(state: TrainState, state_dict: Any, *, strict: bool = True) -> TrainState:
    """``state`` with the weights of a state dict; all else stays as it is, the optimizer's memory among it.

    Args:
        state: From ``init``. It is left as it was.
        state_dict: From ``module.state_dict()``, ``torch.load`` or safetensors; a tree of them for a tree of modules.
        strict: Whether every name must be on both sides.

    Raises:
        ValueError: If a name is missing or unexpected, or a shape or a dtype differs. The message names all of them.
            With ``strict=False`` names may differ, which is a warning that counts them, unless none fits.

    Example:
        >>> import torch, fxtrain as fx
        >>> module = torch.nn.Linear(2, 1)
        >>> state = load_state_dict(fx.init(torch.nn.Linear(2, 1)), module.state_dict())
        >>> bool((state.params["weight"] == module.weight).all())
        True
    """
    if any(leaf.is_meta for leaf in tree.leaves((state.params, state.buffers))):
        raise ValueError("The state is on the meta device, and has no memory to load into: make it on another device.")
    params = tree.clone(state.params)
    fits = _Fits()

    def load(modules: Any) -> None:
        parts, structure = tree.flatten(modules)
        dicts = structure.flatten_up_to(state_dict)
        for part, given, path in zip(parts, dicts, tree.paths(modules), strict=True):
            if not isinstance(part, nn.Module):
                _refuse_dtypes({"": part}, {"": given})
                part.copy_(given)
                fits.loaded += 1
                continue
            names = part.state_dict()
            _refuse_dtypes(names, given)
            try:
                missing, unexpected = part.load_state_dict(given, strict=strict)
            except RuntimeError as error:
                raise ValueError(str(error)) from None
            fits.loaded += len(names) - len(missing)
            fits.missing += [f"{path} {name}".lstrip() for name in missing]
            fits.unexpected += [f"{path} {name}".lstrip() for name in unexpected]

    _, buffers = model_of(state).call(params, state.buffers, load, train=False)
    fits.refuse_nothing()
    fits.warn()
    return state.replace(params=params, buffers=buffers)


class _Fits:
    """What of a state dict fits a state."""

    def __init__(self) -> None:
        self.loaded = 0
        self.missing: list[str] = []
        self.unexpected: list[str] = []

    def refuse_nothing(self) -> None:
        if not self.loaded and (self.missing or self.unexpected):
            raise ValueError(
                f"expected a state dict with names of the model, such as {_named(self.missing)}, got one with "
                f"{_named(self.unexpected)}: no name fits, so nothing would be loaded. Rename the keys, for example by "
                "removing a prefix."
            )

    def warn(self) -> None:
        if self.missing or self.unexpected:
            warnings.warn(
                f"load_state_dict loaded {self.loaded} of {self.loaded + len(self.missing)} names of the model. "
                f"Not in the state dict ({len(self.missing)}): {_named(self.missing)}. "
                f"Not in the model ({len(self.unexpected)}): {_named(self.unexpected)}.",
                UserWarning,
                stacklevel=3,
            )


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _refuse_dtypes(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """torch casts without a word."""
    problems = [
        f"  {name or 'the tensor'}: wanted {wanted[name].dtype}, and {value.dtype} is given"
        for name, value in given.items()
        if isinstance(value, Tensor) and isinstance(wanted.get(name), Tensor) and value.dtype != wanted[name].dtype
    ]
    if problems:
        raise ValueError(
            "The state dict has other dtypes than the state:\n"
            + "\n".join(problems)
            + "\nCast its values, or make the state in their dtype."
        )
