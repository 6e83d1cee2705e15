"""Exchange with JAX: trees as Orbax checkpoints, there and back.

Orbax starts a JAX backend even for numpy arrays, and JAX takes threads and most of a GPU. So it runs in a process of
its own (``orbax_worker``), which gets and gives the leaves as one of our checkpoints.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, TypeVar

import torch

from fxtrain import tree
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._manifest import read_manifest
from fxtrain.checkpoint._selection import Where
from fxtrain.checkpoint._single import read, save
from fxtrain.checkpoint._table import entry_of, keys_of, root_of

Tree = TypeVar("Tree")


def to_orbax(path: str | os.PathLike[str], tree: Any) -> pathlib.Path:
    """Writes ``tree`` as an Orbax checkpoint, which JAX and Flax programs read with ``StandardCheckpointer``.

    Fields and keys become keys of dictionaries, lists and tuples become lists. Runs in a process of its own; costs the
    writing of a checkpoint of ours beside it.

    Args:
        path: The folder to make.
        tree: A state, or any pytree of tensors.

    Raises:
        CheckpointError: If the folder is there already, or Orbax cannot hold the tree: it has no place for empty
            trees and tensors without elements, and stores ``{"a.b": x, "a": {"b": y}}`` as one array.

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
        _work("write", ours, pathlib.Path(path))
    return pathlib.Path(path)


def from_orbax(
    path: str | os.PathLike[str], like: Tree, *, where: Where = None, device: torch.device | str | None = None
) -> Tree:
    """The tree in an Orbax checkpoint, with the structure of ``like``.

    Args:
        path: A folder that Orbax wrote: of one tree, or a step of its ``CheckpointManager``.
        like: What it is to become; only its structure, shapes and dtypes matter.
        where: As for ``restore``; paths in the checkpoint read ``tree['params']['kernel']``.
        device: As for ``restore``.

    Raises:
        CheckpointError: If Orbax cannot read it, or it does not fit ``like``.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours = pathlib.Path(folder) / "tree"
        _work("read", ours, pathlib.Path(path))
        return read(ours, like, where=_same_keys(ours, like) if where is None else where, device=device).state


def _same_keys(path: pathlib.Path, like: Any) -> dict[str, str]:
    """From the paths of ``like`` to those of the checkpoint that go by the same keys, whatever holds them."""
    stored = {keys_of(row["entries"]): row["path"] for row in read_manifest(path)["leaves"]}
    structure = tree.structure(like)
    root = root_of(structure)
    return {
        accessor.codify(root): stored.get(keys, "tree" + "".join(f"[{key!r}]" for key in keys))
        for accessor in structure.accessors()
        for keys in [keys_of([entry_of(entry) for entry in accessor])]
    }


def _work(verb: str, ours: pathlib.Path, theirs: pathlib.Path) -> None:
    worker = pathlib.Path(__file__).with_name("orbax_worker.py")
    command = [sys.executable, "-P", str(worker), verb, str(ours), str(theirs.absolute())]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise CheckpointError(f"Orbax could not {verb} {theirs}: {reason}")
