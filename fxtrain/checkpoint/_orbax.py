"""Reads and writes Orbax checkpoints, to exchange trees with JAX programs.

Orbax starts a JAX backend even for numpy arrays, and JAX claims threads and most of a GPU's memory. So Orbax runs in a
subprocess (``_orbax_worker``), which exchanges the leaves with this process as an fxtrain checkpoint.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from typing import TypeVar

import torch

from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._leaf_table import keys_of, rows_of
from fxtrain.checkpoint._manifest import read_manifest
from fxtrain.checkpoint._match import Where
from fxtrain.checkpoint._restore import read
from fxtrain.checkpoint._save import save
from fxtrain.core import Tree

T = TypeVar("T")


def to_orbax(path: str | os.PathLike[str], tree: Tree) -> pathlib.Path:
    """Writes ``tree`` as an Orbax checkpoint, which JAX and Flax programs read with ``StandardCheckpointer``.

    Dataclasses and named tuples become dictionaries, and lists and tuples become lists. Orbax runs in a subprocess,
    and the tree is written to a temporary fxtrain checkpoint first.

    Args:
        path: The folder to create.
        tree: A state, or any pytree of tensors.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder exists, or Orbax cannot represent the tree. It cannot store empty trees, tensors
            without elements, or two leaves whose keys joined by dots are equal: ``{"a.b": x, "a": {"b": y}}``.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = fx.checkpoint.to_orbax(f"{folder}/jax", state.params)
        ...     params = fx.checkpoint.from_orbax(path, like=state.params)
        >>> bool((params["weight"] == state.params["weight"]).all())
        True
    """
    with tempfile.TemporaryDirectory() as folder:
        ours = save(pathlib.Path(folder) / "tree", tree)
        _run_worker("write", ours, pathlib.Path(path))
    return pathlib.Path(path)


def from_orbax(
    path: str | os.PathLike[str], like: T, *, where: Where = None, device: torch.device | str | None = None
) -> T:
    """Returns the tree in an Orbax checkpoint, with the structure of ``like``.

    Args:
        path: A folder that Orbax wrote: one tree, or a step of a ``CheckpointManager``.
        like: A tree with the structure, shapes and dtypes to restore. Its values are ignored.
        where: As for ``restore``. A path in the checkpoint looks like ``tree['params']['kernel']``.
        device: As for ``restore``.

    Raises:
        CheckpointError: If Orbax cannot read the checkpoint, or it does not fit ``like``.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours = pathlib.Path(folder) / "tree"
        _run_worker("read", ours, pathlib.Path(path))
        return read(ours, like, where=_same_keys(ours, like) if where is None else where, device=device).state


def _same_keys(path: pathlib.Path, like: Tree) -> dict[str, str]:
    """Maps the paths of ``like`` to those of the checkpoint with the same keys, ignoring the types of containers."""
    stored = {keys_of(row["entries"]): row["path"] for row in read_manifest(path)["leaves"]}
    wanted = {row["path"]: keys_of(row["entries"]) for row in rows_of(like)}
    return {path: stored.get(keys, "tree" + "".join(f"[{key!r}]" for key in keys)) for path, keys in wanted.items()}


def _run_worker(verb: str, ours: pathlib.Path, theirs: pathlib.Path) -> None:
    worker = pathlib.Path(__file__).with_name("_orbax_worker.py")
    command = [sys.executable, "-P", str(worker), verb, str(ours), str(theirs.absolute())]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise CheckpointError(f"expected Orbax to {verb} {theirs}, got an error: {reason}")
