"""Optimizer states from and for plain PyTorch loops, Hugging Face Trainer and Lightning."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState, Tree, describe
from fxtrain.model import model_of
from fxtrain.precision._loss_scale import SLOT, LossScaleState

if TYPE_CHECKING:
    from fxtrain.interop._read_optimizer import StateDict

Result = TypeVar("Result")

_SCALAR_ENTRIES = ("step", "mu", "eta", "mu_product")

# Names of parameters that Trainer does not decay.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def load_optimizer_state(
    state: TrainState,
    source: torch.optim.Optimizer | Mapping[str, object] | str | os.PathLike[str],
    *,
    entry: str | None = None,
    names: Sequence[str] | None = None,
    step: int | None = None,
) -> TrainState:
    """Returns ``state`` with the optimizer state of a torch optimizer. Weights and everything else are unchanged.

    The loss scale is loaded too if the file also contains the state of a ``torch.amp.GradScaler``.

    Moments, per-parameter counts, and hyperparameters stored by ``inject_hyperparams`` are loaded, so further steps
    match those of the torch optimizer. The optimizer of the state must be its equivalent: the error of
    ``fx.init(module, optimizer)`` contains the expression. Moments are cast to the dtypes of the state, which stores
    second moments of half-precision parameters in float32, whereas torch rounds them at each step.

    Args:
        state: From ``init``. It is not modified.
        source: A torch optimizer or its ``state_dict()``; or the path of a ``torch.save`` file with such a dict, of a
            Lightning checkpoint, or of a checkpoint folder of Hugging Face's Trainer.
        entry: The entry of a file that contains the state dict, if there are several candidates.
        names: Names of the optimizer's parameters in order. By default those in the state dict, or the order of
            ``module.parameters()``, with or without frozen parameters. For parameter groups without names, Trainer's
            order (weights before biases and norms) is also tried.
        step: Number of updates so far, which schedules read. By default the count of a scheduler or trainer in the same
            checkpoint, or else the largest per-parameter count. ``state.step`` is unchanged.

    Returns:
        The state with the loaded optimizer state.

    Raises:
        CheckpointError: If a file cannot be read.
        ValueError: If parameters or moments do not match. The message names them.

    Example:
        >>> import torch, fxtrain as fx
        >>> module = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        >>> module(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> state = fx.init(module, fx.optim.adamw(0.1, weight_decay=0.01))
        >>> state = fx.load_optimizer_state(state, optimizer)
        >>> state.opt_state[0].count["weight"]
        tensor(1)
    """
    # Imported here, like that of the inverse below, because few programs convert optimizer states.
    from fxtrain.interop._read_optimizer import is_scaler, read_optimizer
    from fxtrain.optim._torch_state_conversion import TorchState, with_torch_state

    found = read_optimizer(source, entry)
    groups = found.optimizer["param_groups"]
    named = _parameter_names(state, found.optimizer, names)
    entries = {
        named[index]: value
        for index, value in found.optimizer["state"].items()
        # Adagrad creates the state of all parameters before their first update.
        if value and index in named and ("step" not in value or int(value["step"]) > 0)
    }
    options = {named[index]: group for group in groups for index in group["params"] if index in named}
    trained = set(_tensors_by_name(model_of(state).split(state.params)))
    for frozen in sorted(entries.keys() - trained):
        raise ValueError(
            f"expected optimizer state for trainable parameters only, got state for {frozen!r}, which is frozen or not "
            "in the model. Unfreeze it with fx.with_trainable(state, ...), or remove its entry from the state dict."
        )
    for lost in sorted(trained - options.keys()):
        raise ValueError(
            f"expected all trainable parameters in the optimizer, got none named {lost!r}. Freeze it with "
            "fx.with_trainable(state, ...), or pass names=."
        )
    if step is None:
        step = found.step
    if step is None:
        counts = [int(value["step"]) for value in entries.values() if "step" in value]
        step = max(counts, default=None if entries else 0)
    torch_state = TorchState(entries, options, step)
    state = state.replace(
        opt_state=_map_optimizers(state, lambda part, prefix: with_torch_state(part, torch_state, prefix))
    )
    if not is_scaler(found.scaler):
        return state
    scale = torch.tensor(float(found.scaler["scale"]), device=state.step.device)
    good_steps = torch.tensor(int(found.scaler["_growth_tracker"]), device=state.step.device)
    return state.with_slot(SLOT, LossScaleState(scale, good_steps))


def optimizer_state_dict(
    state: TrainState, optimizer: torch.optim.Optimizer, *, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Returns a dict for ``optimizer.load_state_dict``, with which a torch optimizer continues from ``state``.

    Args:
        state: Its optimizer must be the equivalent of the torch optimizer.
        optimizer: A torch optimizer of the module's parameters. It is not modified.
        names: As for ``load_optimizer_state``.

    Raises:
        ValueError: If the optimizer state has no counterpart in torch. The message names it.

    Example:
        >>> import torch, fxtrain as fx
        >>> module = torch.nn.Linear(2, 1)
        >>> state = fx.init(module, fx.optim.adamw(0.1, weight_decay=0.01))
        >>> optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        >>> optimizer.load_state_dict(fx.optimizer_state_dict(state, optimizer))
    """
    if not isinstance(optimizer, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected optimizer to be a torch optimizer, got {describe(optimizer)}. Make the one to load the state "
            "into, such as torch.optim.AdamW(module.parameters())."
        )
    own = optimizer.state_dict()
    groups = own["param_groups"]
    named = _parameter_names(state, {"state": {}, "param_groups": groups}, names, shapes=optimizer.param_groups)
    entries: dict[str, dict[str, Tensor]] = {}
    from fxtrain.optim._torch_state_conversion import as_torch_state

    _map_optimizers(state, lambda part, prefix: entries.update(as_torch_state(part, prefix)))
    leaves = _tensors_by_name(state.params)
    found: dict[int, dict[str, Tensor]] = {}
    for group in groups:
        for index in group["params"]:
            kept = entries.get(named.get(index, ""))
            if kept is None and index in own["state"] and int(own["state"][index].get("step", 1)) == 0:
                found[index] = own["state"][index]
            elif kept is not None:
                found[index] = _completed(kept, group, leaves[named[index]], type(optimizer), int(state.step))
    return {"state": found, "param_groups": groups}


def _completed(
    kept: dict[str, Tensor], group: Mapping[str, float], param: Tensor, kind: type, step: int
) -> dict[str, Tensor]:
    """Returns the entry with torch's additional values, in torch's formats."""
    if param.is_complex():
        moments = {key: value for key, value in kept.items() if value.ndim == param.ndim + 1}
        kept = {**kept, **{key: torch.view_as_complex(value.contiguous()) for key, value in moments.items()}}
    if kind not in (torch.optim.SGD, torch.optim.Muon):
        count = kept.get("step", torch.tensor(step))
        kept = {**kept, "step": count.to(torch.get_default_dtype()).cpu()}
    if kind is torch.optim.ASGD:
        kept = {**kept, "mu": 1 / (kept["step"] - group["t0"]).clamp(min=1)}
    return kept


def _map_optimizers(state: TrainState, read: Callable[[Tree, str], Result]) -> Result | dict[str, Result]:
    """Returns ``read(opt_state, prefix)`` for the optimizer, or for each optimizer of a dict."""
    if isinstance(state.opt_state, dict):
        parts = cast("dict[str, Tree]", state.opt_state)
        return {name: read(part, f"{name}.") for name, part in parts.items()}
    return read(state.opt_state, "")


def _tensors_by_name(params: Tree) -> dict[str, Tensor]:
    """Returns tensors by name, in the order of ``module.parameters()``."""
    if isinstance(params, Tensor):
        return {"": params}
    if not isinstance(params, Mapping):
        return {name.strip("[]'\""): leaf for name, leaf in zip(tree.paths(params), tree.leaves(params), strict=True)}
    found: dict[str, Tensor] = {}
    for key, part in params.items():
        found |= {f"{key}.{name}" if name else str(key): leaf for name, leaf in _tensors_by_name(part).items()}
    return found


def _parameter_names(
    state: TrainState,
    optimizer: StateDict,
    names: Sequence[str] | None,
    shapes: Iterable[Mapping[str, Sequence[Tensor]]] = (),
) -> dict[Any, str]:
    """Returns the names of the optimizer's parameters, by their keys in its state dict."""
    groups = optimizer["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    every = _tensors_by_name(state.params)
    if all(isinstance(key, str) for key in keys):
        return {key: key for key in keys}
    if names is not None:
        if len(names) != len(keys):
            raise ValueError(f"expected names of {len(keys)} parameters, got {len(names)}.")
        return dict(zip(keys, names, strict=True))
    if all("param_names" in group for group in groups):
        given = [name for group in groups for name in group["param_names"]]
        return dict(zip(keys, given, strict=True))
    trained = _tensors_by_name(model_of(state).split(state.params))
    known: dict[Any, tuple[torch.Size, ...]] = {
        key: (param.shape,)
        for group, given in zip(groups, shapes, strict=False)
        for key, param in zip(group["params"], given["params"], strict=True)
    } or {key: like for key, value in optimizer["state"].items() if (like := _shapes(value))}
    orders = [
        order
        for candidates in (every, trained)
        for order in _orders(candidates, [len(group["params"]) for group in groups])
        if len(order) == len(keys)
        and all(
            every[name].shape in known.get(key, (every[name].shape,)) for key, name in zip(keys, order, strict=True)
        )
    ]
    if not orders:
        raise ValueError(
            f"expected the {len(every)} parameters of the model, or its {len(trained)} trainable ones, in the order of "
            f"module.parameters(), got an optimizer of {len(keys)} parameters that differ in number or shape. Pass "
            "their names, in the optimizer's order, as names=."
        )
    if any(order != orders[0] for order in orders):
        one, other = orders[0], next(order for order in orders if order != orders[0])
        differing = next(pair for pair in zip(one, other, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"expected one parameter order that fits the optimizer's groups, got several: a parameter may be "
            f"{differing[0]!r} or {differing[1]!r}. Pass their names, in the optimizer's order, as names=."
        )
    return dict(zip(keys, orders[0], strict=True))


def _shapes(value: Mapping[str, object]) -> tuple[torch.Size, ...]:
    """Returns the possible shapes of the parameter of an entry, derived from its moments."""
    moments = {key: moment for key, moment in value.items() if isinstance(moment, Tensor)}
    if "row_var" in moments and "col_var" in moments:
        return (torch.Size((*moments["row_var"].shape[:-1], moments["col_var"].shape[-1])),)
    return tuple({moment.shape for key, moment in moments.items() if key not in _SCALAR_ENTRIES})[:1]


def _orders(params: Mapping[str, Tensor], sizes: list[int]) -> list[list[str]]:
    """Returns the parameter orders that optimizers use: the module's, or for two groups, decayed parameters first.

    The module's order is left out if groups could swap parameters of equal shape unnoticed.
    """
    names = list(params)
    if len(sizes) == 1:
        return [names]
    found: list[list[str]] = []
    if len(sizes) == 2:
        for is_decayed in (
            lambda name: params[name].ndim > 1,
            lambda name: not _UNDECAYED.search(name.lower()) and params[name].ndim > 1,
        ):
            decayed = [name for name in names if is_decayed(name)]
            if len(decayed) == sizes[0]:
                found.append([*decayed, *(name for name in names if not is_decayed(name))])
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    shapes = [{params[name].shape for name in names[end - size : end]} for size, end in zip(sizes, ends, strict=True)]
    if sum(map(len, shapes)) == len(set().union(*shapes)):
        found.append(names)
    return found
