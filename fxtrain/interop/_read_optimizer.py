"""Reading the state of a torch optimizer from an object, a file or a checkpoint folder."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeGuard, cast

import torch
from torch import Tensor

from fxtrain.checkpoint import CheckpointError
from fxtrain.core import describe
from fxtrain.interop._torch_files import load_tensors


class StateDict(TypedDict):
    """The ``state_dict()`` of a torch optimizer."""

    state: dict[Any, dict[str, Tensor]]  # by index, or by name
    param_groups: list[dict[str, Any]]


class TorchOptimizer(NamedTuple):
    """What a checkpoint holds of a torch optimizer."""

    optimizer: StateDict
    step: int | None = None  # of a scheduler or a trainer
    scaler: Mapping[str, float] | None = None  # of torch.amp.GradScaler


def read_optimizer(source: object, entry: str | None) -> TorchOptimizer:
    """Reads a torch optimizer, its state dict, or a file or folder that contains it.

    Args:
        source: The optimizer, the state dict, or the path.
        entry: The entry of a file that contains the state dict, if there are several candidates.
    """
    if isinstance(source, torch.optim.Optimizer):
        return TorchOptimizer(cast(StateDict, source.state_dict()))
    if isinstance(source, str | os.PathLike):
        return _file(pathlib.Path(source), entry)
    return _find(source, entry, "source")


def _file(path: pathlib.Path, entry: str | None) -> TorchOptimizer:
    if not path.is_dir():
        return _find(_read(path), entry, str(path))
    if not (path / "optimizer.pt").is_file():
        raise CheckpointError(f"expected optimizer.pt in {path}, as Trainer writes it, got none. Pass a file.")
    found = _find(_read(path / "optimizer.pt"), entry, str(path / "optimizer.pt"))
    if (path / "scaler.pt").is_file():
        found = found._replace(scaler=_read(path / "scaler.pt"))
    if (path / "scheduler.pt").is_file():
        return found._replace(step=_last_epoch(_read(path / "scheduler.pt")))
    if (path / "trainer_state.json").is_file():
        return found._replace(step=int(json.loads((path / "trainer_state.json").read_text())["global_step"]))
    return found


def _read(path: pathlib.Path) -> Any:
    return load_tensors(path, what="a checkpoint", instead="pass the optimizer's state dict")


def _find(contents: object, entry: str | None, where: str) -> TorchOptimizer:
    """Finds the optimizer's state dict in a checkpoint, and the step of a scheduler and the loss scale next to it."""
    if entry is None and _is_optimizer(contents):
        return TorchOptimizer(contents)
    if not isinstance(contents, Mapping):
        raise ValueError(f"expected the state dict of a torch optimizer in {where}, got {describe(contents)}.")
    values = cast(Mapping[str, object], contents)
    flat = {key: value[0] if _is_single(value) else value for key, value in values.items()}
    found = {key: value for key, value in flat.items() if _is_optimizer(value)}
    if entry is not None:
        found = {key: value for key, value in found.items() if key == entry}
    if len(found) != 1:
        raise ValueError(
            f"expected one optimizer state dict in {where}, got {', '.join(map(repr, found)) or 'none'} among the "
            f"entries {', '.join(map(repr, list(values)[:12]))}. Pass its entry as entry=."
        )
    steps = {step for value in flat.values() if (step := _last_epoch(value)) is not None}
    step = steps.pop() if len(steps) == 1 else values.get("global_step")
    scaler = next((value for value in flat.values() if is_scaler(value)), None)
    return TorchOptimizer(next(iter(found.values())), step if isinstance(step, int) else None, scaler)


def _is_single(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple) and len(value) == 1


def _is_optimizer(value: object) -> TypeGuard[StateDict]:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def is_scaler(value: object) -> TypeGuard[Mapping[str, float]]:
    """Whether a value is the state of a ``torch.amp.GradScaler``."""
    return isinstance(value, Mapping) and {"scale", "_growth_tracker"} <= value.keys()


def _last_epoch(value: object) -> int | None:
    found = value.get("last_epoch") if isinstance(value, Mapping) else None
    return found if isinstance(found, int) and found >= 0 else None
