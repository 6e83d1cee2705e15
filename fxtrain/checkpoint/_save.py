"""Saves one checkpoint: its facts, and the handle of a save in the background."""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import time
import typing
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

import torch

from fxtrain import tree
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._folder import is_file, write
from fxtrain.checkpoint._host_copy import Direct, HostCopy
from fxtrain.checkpoint._leaf_table import root_of
from fxtrain.checkpoint._manifest import Facts
from fxtrain.checkpoint._retention import Role
from fxtrain.checkpoint._temporary_folder import clear_abandoned
from fxtrain.core import TrainState, Tree, check_path, describe, device_name
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.disk import make_folder


class Committed(NamedTuple):
    """A checkpoint that is committed to disk.

    Args:
        step: The state's step.
        path: The checkpoint's folder.
        metrics: The metrics it was saved with.
    """

    step: int
    path: pathlib.Path
    metrics: dict[str, float]


class Save:
    """The handle returned by ``Checkpointer.save``. ``committed`` is None until the checkpoint is on disk."""

    def __init__(self, role: Role) -> None:
        self.role: Role = role
        self.committed: Committed | None = None
        self.ended = False  # whether the writer is done with it, committed or failed


@with_short_traceback
def save(path: str | os.PathLike[str], state: Tree, *, metrics: Mapping[str, float] | None = None) -> pathlib.Path:
    """Writes ``state`` to the new folder ``path``.

    The folder is created atomically, by a rename after all files are on disk. Contiguous CPU tensors are written
    without a copy. Leftovers of killed saves in the parent folder are deleted.

    Args:
        path: The folder to create. Missing parent folders are created too.
        state: A state, a stacked state of several runs, or any pytree of tensors.
        metrics: Scalars to store with the checkpoint, by name.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder exists or cannot be written, or a leaf is not a dense tensor.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1), seed=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = fx.save(f"{folder}/first", state)
        ...     restored = fx.restore(path, like=fx.init(torch.nn.Linear(2, 1)))
        >>> int(restored.seed), bool((restored.params["weight"] == state.params["weight"]).all())
        (3, True)
    """
    check_path("path", path, "Give the arguments in this order: save(path, state).")
    check_metrics(metrics)
    folder = pathlib.Path(path)
    contents = Direct(of_batch(state))
    try:
        make_folder(folder.parent)
        clear_abandoned(folder.parent, is_file)
    except OSError as error:
        raise CheckpointError(
            f"expected a writable folder for the checkpoint {folder}, got {error}. Use another folder."
        ) from error
    write(folder, contents, facts(contents, metrics, environment(device_of(state))))
    return folder


def of_batch(state: Tree) -> Tree:
    """Returns a stacked state of several runs as a batch state, which is what checkpoints store of them."""
    if not isinstance(state, TrainState) or state.step.ndim == 0:
        return state
    from fxtrain.core._members import batch_state  # keeps the import of fxtrain fast

    return batch_state(state)


def check_metrics(metrics: object) -> None:
    """Raises TypeError unless ``metrics`` is None or a mapping from names to scalars."""
    if metrics is None:
        return
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"expected metrics to be a mapping from names to scalars, got {describe(metrics)}. Pass a dict, as in "
            'save(path, state, metrics={"loss": 0.5}).'
        )
    for name, value in typing.cast("Mapping[object, object]", metrics).items():
        if getattr(value, "ndim", 0) != 0:
            raise TypeError(f"expected metrics[{name!r}] to be a scalar, got {describe(value)}. Reduce it first.")


def facts(contents: Direct | HostCopy, metrics: Mapping[str, float] | None, conditions: dict[str, str | int]) -> Facts:
    """Returns the head of a manifest for a checkpoint without a run.

    Args:
        contents: The leaves.
        metrics: Scalars by name.
        conditions: The conditions of bitwise equality, as from ``environment``.

    Raises:
        CheckpointError: If the state's step is negative.
    """
    step = contents.scalar(0) if root_of(contents.structure) == "state" else None  # a state's first leaf
    if step is not None and step < 0:
        raise CheckpointError(f"expected a state of step 0 or more, got step {step}.")
    return {
        "run": None,
        "role": None,
        "sequence": None,
        "step": step,
        "time": time.time(),
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        "environment": conditions,
    }


def device_of(state: object) -> torch.device:
    """Returns the device of the first leaf, or the CPU for a tree without leaves."""
    return tree.device_of(state) or torch.device("cpu")


_version = functools.cache(metadata.version)  # reads files


def environment(device: torch.device) -> dict[str, str | int]:
    """Returns the conditions of bitwise equality in this process, for computations on ``device``, by name."""
    return {
        "fxtrain": _version("fxtrain"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),  # the vector width determines the order of summation
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }
