"""Converts between states and PyTorch state dicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, overload

from torch import Tensor, nn
from typing_extensions import Unpack

from fxtrain import tree
from fxtrain.core import TrainState, Tree
from fxtrain.model._loading import LoadReport, load
from fxtrain.model._model import model_of
from fxtrain.model._renaming import Rename
from fxtrain.model._types import StateDict


def state_dict(state: TrainState) -> Tree:
    """Returns the ``state_dict()`` of the state's module, with copied tensors.

    Tied parameters appear under each of their names. Non-persistent buffers are left out. State dict hooks of the
    modules run.

    Args:
        state: A state from ``init``. If ``init`` was given a tree of modules, the result is a tree of state dicts.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> module = torch.nn.Linear(2, 1)
        >>> module.load_state_dict(fx.state_dict(state))
        <All keys matched successfully>
    """

    def read(modules: Tree) -> Tree:
        return tree.map(
            lambda part: (
                {name: _cloned(value) for name, value in part.state_dict().items()}
                if isinstance(part, nn.Module)
                else part.clone()
            ),
            modules,
        )

    return model_of(state).call(state.params, state.buffers, read, train=False)[0]


class LoadOptions(TypedDict, total=False):
    """The options of ``load_state_dict``, which documents them."""

    part: str
    strict: bool
    where: str | Sequence[str] | None
    rename: Rename
    ignore_mismatched_sizes: bool
    cast: bool


@overload
def load_state_dict(
    state: TrainState,
    state_dict: StateDict,
    *,
    report: Literal[False] = False,
    **options: Unpack[LoadOptions],
) -> TrainState: ...


@overload
def load_state_dict(
    state: TrainState,
    state_dict: StateDict,
    *,
    report: Literal[True],
    **options: Unpack[LoadOptions],
) -> LoadReport: ...


def load_state_dict(
    state: TrainState,
    state_dict: StateDict,
    *,
    part: str = "",
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
    report: bool = False,
) -> TrainState | LoadReport:
    """Returns ``state`` with the weights of a state dict. All else is unchanged, including the optimizer state.

    One of several tied names is enough. A warning summarizes the names that were skipped.

    Args:
        state: A state from ``init``. It is not modified.
        state_dict: A mapping from name to tensor, from ``module.state_dict()`` or ``torch.load``. For a tree of
            modules: a tree of such mappings, or one mapping whose names begin with the path of the module, such as
            ``"generator.layers.0.weight"``. ``fxtrain.load_weights`` reads files.
        part: Path of the submodule that the state dict belongs to, such as ``"encoder"``. All names are then relative
            to it.
        strict: Whether the model and the state dict must have the same names.
        where: Shell-style patterns of names of the model, such as ``"encoder.*"``. Other names are ignored.
        rename: A mapping from prefixes of names in the state dict to those in the model: ``{"module.": ""}`` for a
            module that was wrapped by DDP, ``{"": "encoder."}`` for weights of a submodule, ``{"head.": None}`` to
            leave names out. Or a function of the name.
        ignore_mismatched_sizes: Whether to skip tensors of another shape, such as a head for other classes.
        cast: Whether to cast tensors of another dtype to that of the state.
        report: Whether to return a ``LoadReport``, which lists the names that were and were not loaded, instead of
            warning. Its field ``state`` is the new state.

    Returns:
        The new state, or a ``LoadReport`` that holds it.

    Raises:
        ValueError: If a name is missing or unexpected, a shape or a dtype differs, or tied names have different values.
            The message names them, and the argument that allows or fixes the difference. A state dict in which no name
            matches always raises.

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


def _cloned(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
