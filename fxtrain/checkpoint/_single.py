"""One checkpoint: ``save`` and ``restore``."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint._contents import Direct, bytes_of
from fxtrain.checkpoint._environment import differences, environment
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._folder import FILES, Leaves, write
from fxtrain.checkpoint._manifest import dtype_of, read_manifest
from fxtrain.checkpoint._orphaned_slots import rebuild
from fxtrain.checkpoint._selection import Elements, Fresh, Match, Where, match
from fxtrain.checkpoint._table import Leaf, root_of
from fxtrain.checkpoint._unfinished import clear_abandoned
from fxtrain.core import LOOP
from fxtrain.disk import make_folder
from fxtrain.model._freezing import refuse_shared_counts

_LARGE = 2**20  # bytes; below, a thread costs more than it brings

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
        outdated: Slots of the checkpoint that ``like`` did not have and that hold values of fresh parameters; they were
            dropped.
        shared: Slots that hold values of fresh and of other parameters, with counts for all of them.
        different: What is not as it was at the save, of all that bitwise equality needs: one line each.
        environment: All that bitwise equality needs, by name, as it was at the save.
    """

    state: Any
    path: pathlib.Path
    missing: list[str]
    extra: list[str]
    outdated: list[str]
    shared: list[str]
    different: list[str]
    environment: Mapping[str, Any]

    def warn(self, stacklevel: int) -> None:
        """Warns about everything that is not as it was at the save."""
        said = [f"the slot {name!r} is not in the checkpoint, and is initialized" for name in self.missing]
        kept = [name for name in self.extra if name in self.state.slots]
        said += [f"the slot {name!r} is in the checkpoint alone, and is kept" for name in kept]
        said += [
            f"the slot {name!r} is in the checkpoint alone, holds values of fresh parameters, and is dropped (attach "
            "its callback to `like` to restore the others)"
            for name in self.outdated
        ]
        said += [
            f"the slot {name!r} is restored with its counts, which fresh parameters share (leave it out of `like`, "
            "with extra='drop', to start it over)"
            for name in self.shared
        ]
        said += [f"the resumed run may differ in the last bits ({line})" for line in self.different]
        if said:
            warnings.warn(f"{self.path}: {'; '.join(said)}.", UserWarning, stacklevel=stacklevel + 1)


def save(path: str | os.PathLike[str], state: Any, *, metrics: Mapping[str, float] | None = None) -> pathlib.Path:
    """Writes ``state`` to the folder ``path``, which must not be there yet.

    The folder appears by one rename, after every file in it has reached the disk. Nothing is copied in memory. What
    killed saves have left beside it is deleted.

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
        make_folder(folder.parent)
        clear_abandoned(folder.parent, FILES)
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
    fresh: Fresh = None,
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
            ``{"state.params": "state.slots['average']"}``. A path with ``*`` or ``?`` is a pattern:
            ``"state.*['encoder.*']"`` is all that belongs to the encoder, its update counts in the optimizer too. Both
            sides must have the same there. By default everything.
        fresh: Shell patterns of names of parameters and buffers, ``"head.*"``, that stay as in ``like``, with all that
            belongs to them: optimizer state, update counts, averages in slots. They may have other shapes in the
            checkpoint, or be on one side alone.
        extra: Whether slots that ``like`` does not have are kept for a callback that comes back, or dropped.
        device: Where the leaves of a ``like`` on the meta device are to be; by default the CPU.

    Raises:
        CheckpointError: If the checkpoint is damaged, or a leaf has another shape or dtype, is missing or is too
            many. The message names every such path with both sides.
        ValueError: If a pattern of ``fresh`` matches no name, or the optimizer counts updates for all parameters
            together, so that fresh ones would share a count with older ones.

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
    report = read(pathlib.Path(path), like, where=where, fresh=fresh, extra=extra, device=device)
    report.warn(stacklevel=2)
    return report.state


def facts(contents: Any, device: torch.device, metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """The head of a manifest, as that of a checkpoint which belongs to no run."""
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
        "environment": environment(device),
    }


def read(
    path: pathlib.Path,
    like: Any,
    *,
    where: Where = None,
    fresh: Fresh = None,
    extra: Extra = "keep",
    device: torch.device | str | None = None,
    notes: Mapping[str, str | tuple[str, ...]] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Restoration:
    """``restore``, with a report. ``notes`` are compared with those that a checkpointer's ``save`` was given.

    A note that is a tuple holds all values that do not count as a difference.

    The manifest is read here unless the caller has done so.
    """
    if extra not in ("keep", "drop"):
        raise ValueError(f"extra={extra!r}: 'keep' or 'drop' is wanted.")
    manifest = read_manifest(path) if manifest is None else manifest
    stored: dict[str, Leaf] = {row["path"]: row for row in manifest["leaves"]}
    matched = match(path, like, stored, where, fresh)
    leaves, structure = tree.flatten(like)
    target = torch.device(device or "cpu")
    with contextlib.closing(Leaves(path, manifest)) as file:
        state = tree.unflatten(structure, _read_leaves(file, leaves, matched.sources, target))
        if fresh is not None:
            _refuse_shared_counts(state, matched, fresh)
        if extra == "keep" and matched.extra:
            home = device_of(state)
            kept = {
                name: rebuild([(row["entries"][2:], _read_leaf(file, row, home)) for row in own])
                for name, own in matched.extra.items()
            }
            state = state.replace(slots={**state.slots, **kept})
    now = {**environment(device_of(state)), **(notes or {})}
    different = differences(manifest["environment"], now)
    missing, added = _of_callbacks(matched.missing), _of_callbacks(matched.extra)
    outdated, shared = _of_callbacks(matched.outdated), _of_callbacks(matched.shared)
    return Restoration(state, path, missing, added, outdated, shared, different, manifest["environment"])


def _refuse_shared_counts(state: Any, matched: Match, fresh: Fresh) -> None:
    kept = {id(leaf) for leaf, source in zip(tree.leaves(state), matched.sources, strict=True) if source is None}
    refuse_shared_counts(
        state.opt_state,
        kept,
        f"fresh={fresh!r}",
        "restore the parameters alone, with where='state.params'",
    )


def _of_callbacks(slots: Iterable[str]) -> list[str]:
    return [name for name in slots if not name.startswith(LOOP)]


def device_of(state: Any) -> torch.device:
    """Where a state, or most likely another tree, lives."""
    return next((leaf.device for leaf in tree.leaves(state)), torch.device("cpu"))


def _read_leaves(
    file: Leaves, like: list[Tensor], sources: list[Leaf | Elements | None], target: torch.device
) -> list[Tensor]:
    """Each leaf from its source, or as it is.

    Large ones are read by a few threads, as one does not fill the memory's bandwidth. The memory comes from this
    thread: a new one's allocator has none that was used before, and pages that are new cost more than reading.
    """
    found = list(like)
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        under_way: list[concurrent.futures.Future[None]] = []
        for index, source in enumerate(sources):
            if source is None:
                continue
            if isinstance(source, Elements):
                found[index] = _read_elements(file, like[index], source)
                continue
            found[index], memory = _room(source)
            if source["bytes"] < _LARGE:
                file.read_into(memory, source)
            else:
                under_way.append(pool.submit(file.read_into, memory, source))
        for future in under_way:
            future.result()
    return [
        read if read is leaf else read.to(target if leaf.is_meta else leaf.device)
        for read, leaf in zip(found, like, strict=True)
    ]


def _read_elements(file: Leaves, like: Tensor, elements: Elements) -> Tensor:
    read = {
        row["path"]: _read_leaf(file, row, like.device if not like.is_meta else torch.device("cpu"))
        for _, row, _ in elements.sources
    }
    found = torch.zeros_like(like, device="cpu") if like.is_meta else like.clone()
    for here, row, there in elements.sources:
        found[here] = read[row["path"]][there]
    return found


def _read_leaf(file: Leaves, row: Leaf, device: torch.device) -> Tensor:
    leaf, memory = _room(row)
    file.read_into(memory, row)
    return leaf.to(device)


def _room(row: Leaf) -> tuple[Tensor, memoryview]:
    # Memory of its own for each leaf, because the kernels of the same operation differ with the alignment of their
    # inputs, to the bit.
    try:
        leaf = torch.empty(row["shape"], dtype=dtype_of(row["dtype"]), device="cpu")
        return leaf, bytes_of(leaf)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"expected memory for {row['path']}, {row['bytes']} bytes, got {error}.") from error
