"""State dicts: the weights of a state by name, as PyTorch programs exchange them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import TrainState
from fxtrain.model._architecture import model_of
from fxtrain.model._loading import Loaded, load
from fxtrain.model._renaming import Rename


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


@overload
def load_state_dict(
    state: TrainState,
    state_dict: Any,
    *,
    part: str = "",
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
    report: Literal[False] = False,
) -> TrainState: ...


@overload
def load_state_dict(
    state: TrainState,
    state_dict: Any,
    *,
    part: str = "",
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
    report: Literal[True],
) -> Loaded: ...


def load_state_dict(
    state: TrainState,
    state_dict: Any,
    *,
    part: str = "",
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
    report: bool = False,
) -> TrainState | Loaded:
    """``state`` with the weights of a state dict. Everything else stays as it is, optimizer state included.

    Of names that the model ties, one is enough. What is skipped by choice is summed up in a warning.

    Args:
        state: From ``init``. It is left as it was.
        state_dict: From ``module.state_dict()`` or ``torch.load``: a mapping from name to tensor. For a tree of
            modules a tree of them, or one mapping whose names begin with the path of the module,
            ``"generator.layers.0.weight"``. ``fxtrain.load_weights`` reads files.
        part: The path of the submodule that the state dict is of, ``"encoder"``. Other names are then relative to it.
        strict: Whether every name must be on both sides.
        where: Shell patterns of names of the model, ``"encoder.*"``. Only these are loaded and compared.
        rename: From prefixes of names in the state dict to those in the model: ``{"module.": ""}`` for a module that
            was wrapped by DDP, ``{"": "encoder."}`` for weights of a submodule, ``{"head.": None}`` to leave names out.
            Or a function of the name.
        ignore_mismatched_sizes: Whether tensors of another shape are skipped, such as a head for other classes.
        cast: Whether tensors of another dtype are cast to that of the state.
        report: Whether to return a ``Loaded`` with full lists of what was loaded and what was not, in place of a
            warning. The state is its field ``state``.

    Raises:
        ValueError: If a name is missing or unexpected, a shape or a dtype differs, or tied names have different values.
            The message names them, and the argument that allows it or makes it fit. A state dict of which no name fits
            is refused always.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> wrapped = {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}
        >>> state = fx.load_state_dict(state, wrapped, rename={"module.": ""})
        >>> state.params["weight"]
        tensor([[1., 1.]])
        >>> found = fx.load_state_dict(state, {"weight": torch.zeros(1, 2)}, strict=False, report=True)
        >>> found.loaded, found.missing
        (['weight'], ['bias'])
    """
    loaded = load(
        state,
        state_dict,
        part=part,
        strict=strict,
        where=where,
        rename=rename,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        cast=cast,
    )
    if report:
        return loaded
    loaded.warn(stacklevel=2)
    return loaded.state


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
