"""Restores one checkpoint, with a report of differences."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from types import EllipsisType
from typing import Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._leaf_files import LeafFiles
from fxtrain.checkpoint._leaf_table import Leaf
from fxtrain.checkpoint._manifest import MANIFEST, Manifest, read_manifest
from fxtrain.checkpoint._match import Elements, Fresh, Where, match
from fxtrain.checkpoint._orphaned_slots import rebuild
from fxtrain.checkpoint._parts import rows_of
from fxtrain.checkpoint._save import device_of, environment, of_batch
from fxtrain.core import (
    CHANGED_AT_END,
    LOOP,
    Record,
    Tree,
    check_choice,
    check_device,
    check_path,
    describe,
    first_names,
    pluralize,
    warn,
)
from fxtrain.core._shard import Shard, is_dtensor, is_shard, refuse_shards
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.model._freezing import refuse_shared_counts

_MIN_THREADED_BYTES = 2**20  # reading smaller leaves in a thread does not pay

T = TypeVar("T")
Extra = Literal["keep", "drop"]


class ReadOptions(TypedDict, total=False):
    """The options of ``read`` that ``Checkpointer.read`` passes on."""

    where: Where
    fresh: Fresh
    extra: Extra
    device: torch.device | str | None
    notes: Mapping[str, str | tuple[str, ...]] | None


class SelectOptions(ReadOptions, total=False):
    """The options of ``Checkpointer.read``.

    ``together`` reads a checkpoint on all ranks, given its path and a function that reads it on this rank. It raises a
    ``DamagedError`` if the checkpoint is damaged for any rank.
    """

    together: Callable[[pathlib.Path, Callable[[], Restoration]], Restoration]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Restoration(Record):
    """A restored state, with a report of differences between the checkpoint, ``like`` and this process.

    Args:
        state: A tree like ``like``, with the values of the checkpoint.
        path: The checkpoint's folder.
        missing: Slots that only ``like`` has. They keep their values.
        extra: Slots that only the checkpoint has, except outdated ones. They were kept or dropped, as requested.
        outdated: Slots that only the checkpoint has, with values of fresh parameters. They were dropped.
        shared: Restored slots with values of fresh parameters and a count shared by all parameters.
        different: One line for each entry of ``environment`` that differs now.
        environment: The conditions of bitwise equality at the time of the save, by name.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder, fx.checkpointer(folder) as checkpoints:
        ...     _ = checkpoints.save(state)
        ...     restoration = checkpoints.read(state)
        >>> restoration.missing, restoration.different
        ([], [])
    """

    state: Tree
    path: pathlib.Path
    missing: list[str]
    extra: list[str]
    outdated: list[str]
    shared: list[str]
    different: list[str]
    environment: Mapping[str, str | int]

    def warn(self) -> None:
        """Warns about slots and environment values that differ, if there are any."""
        lines = [f"the slot {name!r} is not in the checkpoint and is initialized" for name in self.missing]
        kept = [name for name in self.extra if name in self.state.slots]
        lines += [f"the slot {name!r} is only in the checkpoint and is kept" for name in kept]
        lines += [
            f"the slot {name!r} is only in the checkpoint, holds values of fresh parameters, and is dropped (attach "
            "its callback to `like` to restore its other values)"
            for name in self.outdated
        ]
        lines += [
            f"the slot {name!r} is restored with counts that fresh parameters share (to reset it, leave it out of "
            "`like` and use extra='drop')"
            for name in self.shared
        ]
        lines += [f"the resumed run may differ in the last bits ({line})" for line in self.different]
        if lines:
            warn(f"{self.path}: {'; '.join(lines)}.", UserWarning)


@with_short_traceback
def restore(
    path: str | os.PathLike[str],
    like: T,
    *,
    where: Where = None,
    fresh: Fresh = None,
    extra: Extra = "keep",
    device: torch.device | str | None = None,
) -> T:
    """Returns the verified state in the folder ``path``, with the structure and on the devices of ``like``.

    Warns about slots that only one side has, and about differences of the environment that may change the last bits of
    a resumed run.

    Args:
        path: A folder written by ``save`` or a checkpointer.
        like: A state of the same model and optimizer, or a tree like the saved one. Its structure, shapes and dtypes
            must match. Its values are used only for leaves that are not restored, so a ``like`` on the meta device,
            which needs no memory, is enough to restore everything. Of a sharded state, each rank reads its slices,
            however the checkpoint was saved.
        where: The paths to restore, by default all. One path as in error messages (``"state.params"``), several paths,
            or a mapping from paths in ``like`` to paths in the checkpoint
            (``{"state.params": "state.slots['average']"}``). A path with ``*`` or ``?`` is a pattern:
            ``"state.*['encoder.*']"`` selects the encoder with its optimizer state and update counts. Both sides must
            have the same leaves at these paths.
        fresh: Shell patterns (``"head.*"``) of parameters and buffers that keep their values from ``like``, together
            with their optimizer state, update counts, and averages in slots. Their shapes may differ, and they may
            exist on one side only.
        extra: ``"keep"`` or ``"drop"`` for slots that ``like`` lacks. Kept slots are restored when their callback is
            attached again.
        device: The device of leaves that are on the meta device in ``like``, by default the CPU.

    Raises:
        CheckpointError: If the checkpoint is damaged, or a leaf has another shape or dtype or exists on one side only.
            The message lists these paths with the shapes and dtypes of both sides.
        ValueError: If a pattern of ``fresh`` matches no name, or the optimizer has one update count for all
            parameters, which fresh parameters would share with restored ones.

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
    report = read(_checkpoint_at(path), like, where=where, fresh=fresh, extra=extra, device=device)
    report.warn()
    return report.state


def _checkpoint_at(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of one checkpoint.

    Raises:
        TypeError: If it is not a path.
        CheckpointError: If it is another kind of file or folder. The message says what it contains.
    """
    if isinstance(path, int):
        remedy = f"To restore a step of a run, call fxtrain.checkpointer(folder).restore(like, step={path})."
    else:
        remedy = "Give the arguments in this order: restore(path, like)."
    check_path("path", path, remedy)
    folder = pathlib.Path(path)
    expected = f"expected a checkpoint at {folder}, got"
    try:
        is_checkpoint = MANIFEST in os.listdir(folder)
    except (FileNotFoundError, ValueError):
        inside = [each.name for each in _checkpoints_in(folder.parent)]
        found = f" {folder.parent} has the checkpoints {first_names(inside)}." if inside else ""
        raise CheckpointError(f"{expected} no such folder. Check the path.{found}") from None
    except NotADirectoryError:
        raise CheckpointError(
            f"{expected} a file. Give a folder written by fxtrain.save, or load weights with fxtrain.load_weights."
        ) from None
    except OSError:
        return folder  # of which the manifest may be readable; reading it raises otherwise
    inside = [] if is_checkpoint else _checkpoints_in(folder)
    if not inside:
        return folder  # without a manifest, reading it raises
    raise CheckpointError(
        f"{expected} a folder of {pluralize(len(inside), 'checkpoint')}. Restore the newest with "
        f"fxtrain.checkpointer(folder).restore(like), or give the path of one, such as {inside[-1].name}."
    )


def _checkpoints_in(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(manifest.parent for manifest in folder.glob(f"*/{MANIFEST}"))


def read(
    path: pathlib.Path,
    like: Tree,
    *,
    where: Where = None,
    fresh: Fresh = None,
    extra: Extra = "keep",
    device: torch.device | str | None = None,
    notes: Mapping[str, str | tuple[str, ...]] | None = None,
    manifest: Manifest | None = None,
) -> Restoration:
    """Restores a checkpoint and returns the state with a report of differences.

    Args:
        path: As for ``restore``. So are ``like``, ``where``, ``fresh``, ``extra`` and ``device``.
        like: The tree to restore. A stacked state restores the batch state that its runs were saved as.
        where: What to restore.
        fresh: Parameters and buffers that are not restored.
        extra: What happens to slots that ``like`` lacks.
        device: The device for leaves that are on the meta device in ``like``.
        notes: Values to compare with the ``notes`` of ``Checkpointer.save``. A tuple matches any of its values.
        manifest: The manifest, if the caller has read it already.
    """
    check_choice("extra", extra, ("keep", "drop"))
    check_device("device", device)
    if any(map(is_dtensor, tree.leaves(like))):
        refuse_shards(like, "restore(path, like)")
    for leaf in tree.leaves(like):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"expected like to be a tree of tensors, got {describe(leaf)} in it. Make a state of the same model "
                "and optimizer: fxtrain.init(module, tx)."
            )
    given, like = like, of_batch(like)
    manifest = read_manifest(path) if manifest is None else manifest
    stored: dict[str, Leaf] = {row["path"]: row for row in manifest["leaves"]}
    matched = match(path, tree.map(_whole_shape, like, is_leaf=is_shard), stored, where, fresh)
    leaves, structure = tree.flatten(like, is_leaf=is_shard)
    with contextlib.closing(LeafFiles(path, manifest)) as files:
        found = _read_leaves(files, leaves, matched.sources, torch.device(device or "cpu"))
        state = tree.unflatten(structure, found)
        if fresh is not None:
            sourced = zip(found, matched.sources, strict=True)
            kept = {id(leaf.local if is_shard(leaf) else leaf) for leaf, source in sourced if source is None}
            remedy = "restore only the parameters, with where='state.params'"
            refuse_shared_counts(state.opt_state, kept, f"fresh={fresh!r}", remedy)
        if extra == "keep" and matched.extra:
            home = device_of(state)
            slots = {
                name: rebuild([(row["entries"][2:], files.read(row).to(home)) for row in own])
                for name, own in matched.extra.items()
            }
            state = state.replace(slots={**state.slots, **slots})
        if CHANGED_AT_END in matched.missing:  # `like` is the result of a run, and the checkpoint is not
            state = state.replace(slots={name: slot for name, slot in state.slots.items() if name != CHANGED_AT_END})
    if like is not given:
        from fxtrain.core._members import stacked_state  # keeps the import of fxtrain fast

        state = stacked_state(state)
    now = {**environment(device_of(state)), **(notes or {})}
    different = _differences(manifest["environment"], now)
    slots = map(_callback_slots, (matched.missing, matched.extra, matched.outdated, matched.shared))
    return Restoration(state, path, *slots, different=different, environment=manifest["environment"])


def _differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Returns one line for each name whose value differs. A tuple in ``now`` matches any of its values."""
    possible = {name: value if isinstance(value, tuple) else (value,) for name, value in now.items()}
    return [
        f"{name}: {then[name]} at the save, {values[0]} now"
        for name, values in possible.items()
        if name in then and then[name] not in values
    ]


def _callback_slots(slots: Iterable[str]) -> list[str]:
    return [name for name in slots if not name.startswith(LOOP)]


def _whole_shape(leaf: Tensor | Shard) -> Tensor:
    """Returns a tensor without memory in place of a shard, with the shape of the whole tensor."""
    if isinstance(leaf, Tensor):
        return leaf
    if leaf.device.type == "meta":
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return torch.zeros((), dtype=leaf.dtype, device="cpu").expand(leaf.shape)


def _read_leaves(
    files: LeafFiles, like: list[Tensor | Shard], sources: list[Leaf | Elements | None], target: torch.device
) -> list[Tensor | Shard]:
    """Returns the leaves, each read from its source or unchanged. Of a shard, the rows of this rank are read.

    Large leaves are read by several threads, because one does not saturate the memory bandwidth. Their memory is
    allocated in this thread, because the allocator of a new thread has no pages to reuse, and first use of a page costs
    more than reading.
    """
    own: list[Tensor] = [leaf if isinstance(leaf, Tensor) else leaf.local for leaf in like]
    found = own.copy()
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        futures: list[concurrent.futures.Future[None]] = []
        for index, source in enumerate(sources):
            leaf = like[index]
            if isinstance(source, Elements):
                found[index] = _read_elements(files, leaf, source)
            elif source is not None:
                found[index], fill = files.prepare(source, rows_of(leaf) if is_shard(leaf) else None)
                if found[index].nbytes < _MIN_THREADED_BYTES:
                    fill()
                else:
                    futures.append(pool.submit(fill))
        for future in futures:
            future.result()
    moved = [
        read if read is local else read.to(target if local.is_meta else local.device)
        for read, local in zip(found, own, strict=True)
    ]
    return [leaf.with_local(read) if is_shard(leaf) else read for leaf, read in zip(like, moved, strict=True)]


def _read_elements(files: LeafFiles, leaf: Tensor | Shard, elements: Elements) -> Tensor:
    like, begin = (leaf, 0) if isinstance(leaf, Tensor) else (leaf.local, rows_of(leaf).start)
    device = like.device if not like.is_meta else torch.device("cpu")
    read = {row["path"]: files.read(row).to(device) for _, row, _ in elements.sources}
    found = torch.zeros_like(like, device="cpu") if like.is_meta else like.clone()
    for here, row, there in elements.sources:
        own = None if here is None else here - begin
        if own is None or 0 <= own < found.shape[-1]:
            found[_at(own)] = read[row["path"]][_at(there)]
    return found


def _at(element: int | None) -> tuple[EllipsisType] | tuple[EllipsisType, int]:
    """Returns the index of an element on the last axis, or of the whole leaf. A leading axis is that of members."""
    return (...,) if element is None else (..., element)
