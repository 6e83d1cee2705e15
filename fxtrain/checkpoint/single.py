"""One checkpoint: ``save`` and ``restore``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint.contents import Direct, bytes_of
from fxtrain.checkpoint.environment import differences, environment
from fxtrain.checkpoint.errors import CheckpointError
from fxtrain.checkpoint.folder import Leaves, read_manifest, write
from fxtrain.checkpoint.selection import Where, refuse_differences, sources
from fxtrain.checkpoint.table import Leaf, name_of, root_of
from fxtrain.checkpoint.unclaimed import rebuild
from fxtrain.core import TrainState

Tree = TypeVar("Tree")
Extra = Literal["keep", "drop"]


@dataclasses.dataclass(frozen=True)
class Restoration:
    """What was restored, and what of it needs to be known.

    Args:
        state: As ``like``, with the values of the checkpoint.
        path: The checkpoint's folder.
        missing: Slots of ``like`` that the checkpoint did not have; they are as in ``like``.
        extra: Slots of the checkpoint that ``like`` did not have; they were kept or dropped, as was asked.
        different: What is not as it was at the save, of all that bitwise equality needs: one line each.
    """

    state: Any
    path: pathlib.Path
    missing: list[str]
    extra: list[str]
    different: list[str]

    def warn(self, stacklevel: int) -> None:
        """Tells whoever asked for the state alone."""
        said = [f"the slot {name!r} is not in the checkpoint, and stays as in `like`" for name in self.missing]
        kept = [name for name in self.extra if name in self.state.slots]
        said += [f"the slot {name!r} is in the checkpoint alone, and is kept" for name in kept]
        said += [f"the resumed run may differ in the last bits ({line})" for line in self.different]
        if said:
            warnings.warn(f"{self.path}: {'; '.join(said)}.", UserWarning, stacklevel=stacklevel + 1)


def save(path: str | os.PathLike[str], state: Any, *, metrics: Mapping[str, float] | None = None) -> pathlib.Path:
    """Writes ``state`` to the folder ``path``, which must not be there yet.

    The folder appears by one rename, after every file in it has reached the disk. Nothing is copied in memory.

    Args:
        path: The folder to make. Folders above it are made as needed.
        state: A state, or any pytree of tensors.
        metrics: Numbers to remember beside it.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder is there already, it cannot be written, or a leaf is no dense tensor.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1), seed=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = fx.save(f"{folder}/first", state)
        ...     restored = fx.restore(path, like=fx.init(torch.nn.Linear(2, 1)))
        >>> int(restored.seed), bool((restored.params["weight"] == state.params["weight"]).all())
        (3, True)
    """
    folder = pathlib.Path(path)
    contents = Direct(state)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {folder} could not be written ({error}): give another folder."
        ) from error
    write(folder, contents, facts(contents, device_of(state), metrics))
    return folder


def restore(
    path: str | os.PathLike[str],
    like: Tree,
    *,
    where: Where = None,
    extra: Extra = "keep",
    device: torch.device | str | None = None,
) -> Tree:
    """The state in the folder ``path``, verified, with the structure and on the devices of ``like``.

    Slots that the checkpoint does not have stay as in ``like``. That, slots that ``like`` does not have, and an
    environment that may change the last bits of a resumed run are told by a warning.

    Args:
        path: A folder that ``save`` or a checkpointer made.
        like: A state of the same model and optimizer, or the kind of tree that was saved. Only its structure, shapes
            and dtypes matter, so it may be on the meta device, and costs no memory there.
        where: What to restore; the rest stays as in ``like``. A path as errors show it, ``"state.params"``, several of
            them, or a mapping from paths in ``like`` to paths in the checkpoint,
            ``{"state.params": "state.slots['average']"}``. By default everything.
        extra: Whether slots that ``like`` does not have are kept for a callback that comes back, or dropped.
        device: Where the leaves of a ``like`` on the meta device are to be; by default the CPU.

    Raises:
        CheckpointError: If the checkpoint is damaged, or a leaf has another shape or dtype, is missing or is too
            many. The message names every such path with both sides.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1), fx.optim.adam(0.1), seed=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = fx.save(f"{folder}/first", state)
        ...     tuned = fx.restore(path, like=fx.init(torch.nn.Linear(2, 1), fx.optim.sgd(0.1)), where="state.params")
        ...     with torch.device("meta"):
        ...         abstract = fx.init(torch.nn.Linear(2, 1), fx.optim.adam(0.1))
        ...     whole = fx.restore(path, like=abstract)
        >>> int(tuned.seed), int(whole.seed)
        (0, 3)
    """
    report = read(pathlib.Path(path), like, where=where, extra=extra, device=device)
    report.warn(stacklevel=2)
    return report.state


def facts(contents: Any, device: torch.device, metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """What a manifest says beside the table of the leaves."""
    return {
        "step": contents.scalar(0) if root_of(contents.structure) == "state" else None,  # a state's first leaf
        "time": time.time(),
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        "environment": environment(device),
    }


def read(
    path: pathlib.Path,
    like: Any,
    *,
    where: Where = None,
    extra: Extra = "keep",
    device: torch.device | str | None = None,
    notes: Mapping[str, str] | None = None,
) -> Restoration:
    """``restore``, with a report. ``notes`` are compared with those that a checkpointer's ``save`` was given."""
    if extra not in ("keep", "drop"):
        raise ValueError(f"extra={extra!r}: 'keep' or 'drop' is wanted.")
    manifest = read_manifest(path)
    stored: dict[str, Leaf] = {row["path"]: row for row in manifest["leaves"]}
    leaves, structure = tree.flatten(like)
    wanted = dict(zip(tree.paths(like, root_of(structure)), leaves, strict=True))
    chosen = sources(where, wanted, stored)

    slots_there = {name for row in stored.values() if (name := _slot(row)) is not None}
    slots_here = set(like.slots) if isinstance(like, TrainState) else set()
    slot_of = _slots_by_path(like) if where is None else {}
    missing = sorted({slot for path_ in chosen if (slot := slot_of.get(path_)) is not None} - slots_there)
    others = sorted(slots_there - slots_here) if where is None and isinstance(like, TrainState) else []
    chosen = {path_: source for path_, source in chosen.items() if slot_of.get(path_) not in missing}
    left_over = (
        [] if where is not None else [p for p, row in stored.items() if p not in wanted and _slot(row) not in others]
    )
    refuse_differences(
        path,
        chosen,
        {path_: _described(name_of(leaf.dtype), leaf.shape) for path_, leaf in wanted.items()},
        {path_: _described(row["dtype"], row["shape"]) for path_, row in stored.items()},
        left_over,
    )
    _refuse_abstract_rest(path, wanted, chosen)

    target = torch.device(device or "cpu")
    with contextlib.closing(Leaves(path, manifest)) as file:

        def value(path_: str, leaf: Tensor) -> Tensor:
            if path_ not in chosen:
                return leaf
            return _read_leaf(file, stored[chosen[path_]], target if leaf.is_meta else leaf.device)

        state = tree.unflatten(structure, [value(path_, leaf) for path_, leaf in wanted.items()])
        if extra == "keep" and others:
            home = device_of(state)
            kept = {
                name: rebuild(
                    [(row["entries"][2:], _read_leaf(file, row, home)) for row in stored.values() if _slot(row) == name]
                )
                for name in others
            }
            state = state.replace(slots={**state.slots, **kept})
    now = {**environment(device_of(state)), **(notes or {})}
    different = differences(manifest["environment"], now)
    return Restoration(state, path, missing, others, different)


def device_of(state: Any) -> torch.device:
    """Where a state, or most likely another tree, lives."""
    return next((leaf.device for leaf in tree.leaves(state)), torch.device("cpu"))


def _read_leaf(file: Leaves, row: Leaf, device: torch.device) -> Tensor:
    # In memory of its own, because the kernels of the same operation differ with the alignment of their inputs, to
    # the bit.
    leaf = torch.empty(row["shape"], dtype=getattr(torch, row["dtype"]), device="cpu")
    file.read_into(bytes_of(leaf), row)
    return leaf.to(device)


def _described(dtype: str, shape: Any) -> str:
    return f"{dtype}{list(shape)}"


def _slot(row: Leaf) -> str | None:
    """The slot that a leaf of a checkpoint lies in."""
    entries = row["entries"]
    in_slot = row["path"].startswith("state.") and len(entries) > 1 and entries[0] == ["attribute", "slots"]
    return entries[1][1] if in_slot else None


def _slots_by_path(like: Any) -> dict[str, str]:
    if not isinstance(like, TrainState):
        return {}
    return {path: name for name, memory in like.slots.items() for path in tree.paths(memory, f"state.slots[{name!r}]")}


def _refuse_abstract_rest(path: pathlib.Path, wanted: Mapping[str, Tensor], chosen: Mapping[str, str]) -> None:
    empty = [path_ for path_, leaf in wanted.items() if leaf.is_meta and path_ not in chosen]
    if empty:
        raise CheckpointError(
            f"{', '.join(empty[:6])}{' and more' if len(empty) > 6 else ''} would stay as in `like`, and has no value "
            f"there, because it is on the meta device; {path} has none for it either. Give a `like` with values."
        )
