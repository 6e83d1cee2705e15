"""State dicts: the names and shapes in which torch's users pass weights on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import TrainState
from fxtrain.model.architecture import model_of


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
        ValueError: If a name is missing or too many, or a shape or a dtype differs. The message names all of them.

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

    def load(modules: Any) -> None:
        parts, structure = tree.flatten(modules)
        dicts = structure.flatten_up_to(state_dict)
        for part, given in zip(parts, dicts, strict=True):
            if not isinstance(part, nn.Module):
                _refuse_dtypes({"": part}, {"": given})
                part.copy_(given)
                continue
            _refuse_dtypes(part.state_dict(), given)
            try:
                part.load_state_dict(given, strict=strict)
            except RuntimeError as error:
                raise ValueError(str(error)) from None

    _, buffers = model_of(state).call(params, state.buffers, load, train=False)
    return state.replace(params=params, buffers=buffers)


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
