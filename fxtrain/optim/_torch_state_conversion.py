"""Conversion of optimizer state from and to ``torch.optim``, by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree
from fxtrain.optim._accumulated_squares import (
    ScaleByAdaDeltaState,
    ScaleByRmsState,
    ScaleByRssState,
    ScaleByStddevState,
)
from fxtrain.optim._adafactor import FactoredState
from fxtrain.optim._adam import ScaleByAdamState, ScaleByAmsgradState
from fxtrain.optim._adam_variants import ScaleByAdamaxState, ScaleByNadamState
from fxtrain.optim._from_torch import AsgdState, StepSizeState
from fxtrain.optim._hyperparams import InjectHyperparamsState, Scheduled
from fxtrain.optim._masking import ActiveWhenState
from fxtrain.optim._momentum import DampenedTraceState, ScaleByLionState, TraceState
from fxtrain.optim._muon import ScaleByMuonState
from fxtrain.optim._rprop import ScaleByRpropState
from fxtrain.optim._scaling import ScaleByScheduleState, WeightDecaySchedule
from fxtrain.optim._state import PerParameter
from fxtrain.optim._wrappers import ApplyIfFiniteState, EveryKState, LookaheadState
from fxtrain.tree import Path, as_name, children, leaf_paths, rebuilt

Entry = Mapping[str, Tensor | float | None]
"""The state of a torch optimizer for one parameter, such as ``{"step": ..., "exp_avg": ...}``."""


class TorchState(NamedTuple):
    """The state of a torch optimizer, by parameter name."""

    entries: Mapping[str, Entry]  # parameters without state are missing
    options: Mapping[str, Mapping[str, Any]]  # by parameter name, the options of its group
    step: int | None  # updates of the whole optimizer, read by schedules; None if unknown


_MOMENTS: dict[type, dict[str, str]] = {
    ScaleByAdamState: {"count": "step", "mu": "exp_avg", "nu": "exp_avg_sq"},
    ScaleByAdamaxState: {"count": "step", "mu": "exp_avg", "nu": "exp_inf"},
    ScaleByAmsgradState: {"count": "step", "mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"},
    ScaleByNadamState: {"count": "step", "momentum_product": "mu_product", "mu": "exp_avg", "nu": "exp_avg_sq"},
    TraceState: {"trace": "momentum_buffer"},
    DampenedTraceState: {"count": "", "trace": "momentum_buffer"},
    ScaleByMuonState: {"count": "", "mu": "momentum_buffer"},
    ScaleByLionState: {"mu": "exp_avg"},
    ScaleByRmsState: {"nu": "square_avg"},
    ScaleByStddevState: {"mu": "grad_avg", "nu": "square_avg"},
    ScaleByRssState: {"sum_of_squares": "sum"},
    ScaleByAdaDeltaState: {"e_g": "square_avg", "e_x": "acc_delta"},
    ScaleByRpropState: {"step_sizes": "step_size", "previous_sign": "prev"},
    FactoredState: {"count": "step", "v_row": "row_var", "v_col": "col_var", "v": "variance"},
    AsgdState: {"count": "step", "eta": "eta", "ax": "ax"},
    StepSizeState: {"count": "step"},
}
"""By type: the torch key of each field, or "" for counts that torch does not keep."""

_STEPS: dict[type, str] = {
    ScaleByScheduleState: "count",
    WeightDecaySchedule: "count",
    InjectHyperparamsState: "count",
    AsgdState: "step",
    StepSizeState: "step",
}
"""By type: the field that counts updates of the whole optimizer."""

_WRAPPERS = (EveryKState, ApplyIfFiniteState, ActiveWhenState, LookaheadState)
"""Wrappers whose own fields have no counterpart in torch and stay unchanged."""

_ADDED_DIMENSIONS = {"row_var": -1, "col_var": -2}

_DERIVED = {"step", "mu"}
"""Keys that are not moments: the count, and ASGD's averaging coefficient, which follows from it."""

_OPTIONS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "learning_rate": lambda group: group.get("lr"),
    "lr": lambda group: group.get("lr"),
    "b1": lambda group: group["betas"][0] if "betas" in group else None,
    "b2": lambda group: group["betas"][1] if "betas" in group else None,
    "momentum": lambda group: group.get("momentum"),
    "weight_decay": lambda group: group.get("weight_decay"),
    "eps": lambda group: group.get("eps"),
    "decay": lambda group: group.get("alpha"),
    "rho": lambda group: group.get("rho"),
}
"""By the name of an injected hyperparameter: a function that reads its value from a parameter group."""


def with_torch_state(opt_state: Tree, given: TorchState, prefix: str = "") -> Tree:
    """Returns the optimizer state with the moments, counts and injected hyperparameters of a torch optimizer.

    Args:
        opt_state: The state of a transformation. It is not modified.
        given: The state of the torch optimizer.
        prefix: Prepended to the names in ``opt_state`` to get those in ``given``.

    Raises:
        ValueError: If the two have different moments, or moments of different shapes. The message names the parameter.
            Also if a schedule needs ``given.step`` and it is None.
    """
    reader = _Reader(given, prefix)
    result = reader.read(opt_state)
    reader.refuse_unread()
    return result


class _Reader:
    def __init__(self, given: TorchState, prefix: str) -> None:
        self._given, self._prefix = given, prefix
        self._read: dict[str, set[str]] = {}

    def read(self, node: Tree) -> Tree:
        kind = cast(Any, type(node))
        if kind in _MOMENTS:
            fields = {name: self._field(getattr(node, name), key) for name, key in _MOMENTS[kind].items()}
            return self._stepped(node._replace(**fields))
        if isinstance(node, InjectHyperparamsState):
            inner = self.read(node.inner_state)
            names = [self._prefix + as_name(path) for path in _parameters(node.inner_state)]
            kept = {name: self._option(name, value, names) for name, value in node.hyperparams.items()}
            return self._stepped(node._replace(hyperparams=kept, inner_state=inner))
        if kind in _STEPS:
            return self._stepped(node)
        _refuse_momentum_of_steps(node)
        if isinstance(node, _WRAPPERS):
            return node._replace(inner_state=self.read(node.inner_state))
        inner = children(node)
        if inner is None:
            raise ValueError(
                "expected optimizer state with a counterpart in torch.optim, got a tensor of a transformation without "
                "one. Leave this transformation out of tx, or start from fresh optimizer state."
            )
        if inner and hasattr(node, "_fields") and kind.__name__ not in _CONTAINERS:
            raise ValueError(
                f"expected optimizer state with a counterpart in torch.optim, got {kind.__name__}, which has none. "
                "Build tx with the expression in the error of fx.init(module, optimizer)."
            )
        return rebuilt(node, [self.read(child) for _, child in inner])

    def refuse_unread(self) -> None:
        """Raises if moments of the torch optimizer were not used."""
        for name, entry in self._given.entries.items():
            if not name.startswith(self._prefix):
                continue
            read = self._read.get(name, set())
            extra = sorted(key for key, value in entry.items() if value is not None and key not in read | _DERIVED)
            if extra:
                raise ValueError(
                    f"expected the optimizer state of {name!r} to have {_listed(read - _DERIVED)}, got "
                    f"{', '.join(extra)} as well. Build tx with the expression in the error of fx.init(module, "
                    "optimizer)."
                )

    def _stepped(self, node: Tree) -> Tree:
        field = _STEPS.get(cast(Any, type(node)))
        if field is None:
            return node
        if self._given.step is None:
            raise ValueError("expected the number of updates so far, which schedules read, got none. Pass it as step=.")
        return node._replace(**{field: torch.full_like(getattr(node, field), self._given.step)})

    def _field(self, own: Tree | PerParameter, key: str) -> Tree:
        if isinstance(own, PerParameter):
            values = [self._number(self._prefix + as_name(path), key, was) for path, was in own.by_path().items()]
            return own.replace(torch.stack(values)) if values else own
        pairs = zip(leaf_paths(own), tree.leaves(own), strict=True)
        moments = [self._moment(self._prefix + as_name(path), key, leaf) for path, leaf in pairs]
        return tree.unflatten(tree.structure(own), moments)

    def _number(self, name: str, key: str, was: Tensor) -> Tensor:
        entry = self._given.entries.get(name)
        if entry is None:
            return was
        if not key:
            return torch.full_like(was, 1 if entry.get("momentum_buffer") is not None else 0)
        return torch.full_like(was, float(self._value(name, key)))

    def _moment(self, name: str, key: str, was: Tensor) -> Tensor:
        entry = self._given.entries.get(name)
        if entry is None or (key == "momentum_buffer" and key in entry and entry[key] is None):
            self._read.setdefault(name, set()).add(key)
            return was
        value = torch.as_tensor(self._value(name, key))
        value = torch.view_as_real(value) if value.is_complex() and not was.is_complex() else value
        value = value.squeeze(_ADDED_DIMENSIONS[key]) if key in _ADDED_DIMENSIONS else value
        if value.shape != was.shape or value.is_complex() != was.is_complex():
            raise ValueError(
                f"expected {key} of {name!r} to have shape {list(was.shape)}, got {list(value.shape)}. Pass the names "
                "of the optimizer's parameters in their order as names=, if they are not those of the model."
            )
        value = torch.sign(value) if key == "prev" else value
        return value.detach().to(device=was.device, dtype=was.dtype, copy=True)

    def _value(self, name: str, key: str) -> Any:
        entry = self._given.entries[name]
        self._read.setdefault(name, set()).add(key)
        if key not in entry:
            raise ValueError(
                f"expected {key} in the optimizer state of {name!r}, got {_listed(entry)}. Build tx with the "
                "expression in the error of fx.init(module, optimizer)."
            )
        return entry[key]

    def _option(self, name: str, was: Tensor | Scheduled, params: list[str]) -> Tensor | Scheduled:
        find = _OPTIONS.get(name)
        if isinstance(was, Scheduled) or find is None:
            return was
        found = {float(value) for param in params if (value := find(self._given.options.get(param, {}))) is not None}
        if len(found) > 1:
            raise ValueError(
                f"expected one {name} for all parameters, got {sorted(found)} in the parameter groups. Give each group "
                "its own transformation with fx.optim.partition."
            )
        return torch.full_like(was, found.pop()) if found else was


def as_torch_state(opt_state: Tree, prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """Returns the state that a torch optimizer would have, by parameter name. Parameters without updates are omitted.

    Args:
        opt_state: The state of a transformation.
        prefix: Prepended to the names in ``opt_state``.

    Raises:
        ValueError: If the state has no counterpart in torch.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unused: set[str] = set()

    def visit(node: Tree) -> None:
        kind = cast(Any, type(node))
        _refuse_momentum_of_steps(node)
        for field, key in _MOMENTS.get(kind, {}).items():
            for path, value in _by_path(getattr(node, field)).items():
                name = prefix + as_name(path)
                if field == "count" and int(value) == 0:
                    unused.add(name)
                if key:
                    wide = value.unsqueeze(_ADDED_DIMENSIONS[key]) if key in _ADDED_DIMENSIONS else value
                    found.setdefault(name, {})[key] = wide.detach().clone()
        if kind in _MOMENTS:
            return
        known = kind in _STEPS or isinstance(node, _WRAPPERS) or kind.__name__ in _CONTAINERS
        if hasattr(node, "_fields") and children(node) and not known:
            raise ValueError(f"expected optimizer state with a counterpart in torch.optim, got {kind.__name__}.")
        for _, child in children(node) or []:
            visit(child)

    visit(opt_state)
    return {name: entry for name, entry in found.items() if name not in unused}


_CONTAINERS = ("MaskedState", "PartitionState")


def _parameters(opt_state: Tree) -> list[Path]:
    """Returns the paths of the parameters that a state belongs to."""
    if type(opt_state) in _MOMENTS:
        fields = [getattr(opt_state, name) for name in _MOMENTS[cast(Any, type(opt_state))]]
        return [path for own in fields for path in _by_path(own)]
    return [path for _, child in children(opt_state) or [] for path in _parameters(child)]


def _by_path(own: Tree | PerParameter) -> dict[Path, Tensor]:
    if isinstance(own, PerParameter):
        return own.by_path()
    return dict(zip(leaf_paths(own), tree.leaves(own), strict=True))


def _refuse_momentum_of_steps(node: Tree) -> None:
    """Raises if momentum is applied after the learning rate, because torch applies it before."""
    parts = cast(tuple[Tree, ...], node) if isinstance(node, tuple) else ()
    kinds: list[type] = [type(part) for part in parts]
    for index, kind in enumerate(kinds):
        if kind in (ScaleByRmsState, ScaleByStddevState) and TraceState in kinds[index + 2 :]:
            raise ValueError(
                "expected momentum before the learning rate, got fx.optim.rmsprop, which applies it after. Use "
                "fx.optim.from_torch(torch.optim.RMSprop, ...)."
            )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"
