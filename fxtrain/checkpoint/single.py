"""One checkpoint: a folder that holds one state. It is there whole, or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import shutil
import time
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from fxtrain import tree
from fxtrain.checkpoint import arenas
from fxtrain.checkpoint.pack import CheckpointError, Leaf, pack, rebuild, unpack
from fxtrain.core import TrainState

MANIFEST = "manifest.json"
_ARENAS = "arenas"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Restoration:
    """What was restored, and what of it needs to be known.

    Args:
        state: As ``like``, with the values of the checkpoint.
        path: The checkpoint's folder.
        missing: Slots of ``like`` that the checkpoint did not have; they are as in ``like``.
        extra: Slots of the checkpoint that ``like`` did not have; they are kept.
        different: What is not as it was at the save, of all that bitwise equality needs: one line each.
    """

    state: TrainState
    path: pathlib.Path
    missing: list[str]
    extra: list[str]
    different: list[str]


def save(
    path: str | os.PathLike[str], state: TrainState, *, metrics: Mapping[str, float] | None = None
) -> pathlib.Path:
    """Writes ``state`` to the folder ``path``, which must not be there yet.

    The folder appears by one rename, after every file in it has reached the disk.

    Args:
        path: The folder to make. Folders above it are made as needed.
        state: Any state.
        metrics: Numbers to remember beside it.

    Raises:
        CheckpointError: If the folder is there already, or if it cannot be written.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1), seed=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = fx.save(f"{folder}/first", state)
        ...     restored = fx.restore(path, like=fx.init(torch.nn.Linear(2, 1)))
        >>> int(restored.seed), bool((restored.params["weight"] == state.params["weight"]).all())
        (3, True)
    """
    return write(pathlib.Path(path), state, {"metrics": dict(metrics or {})})


def restore(path: str | os.PathLike[str], like: TrainState) -> TrainState:
    """The state in the folder ``path``, verified, with the structure and on the devices of ``like``.

    Slots that the checkpoint does not have stay as in ``like``; those that ``like`` does not have are kept.

    Args:
        path: A folder that ``save`` made.
        like: A state of the same model and optimizer; only its structure, shapes and dtypes matter.

    Raises:
        CheckpointError: If the checkpoint is damaged, or a leaf has another shape or dtype, is missing or is too
            many. The message names every such path with both sides.
    """
    return read(pathlib.Path(path), like).state


def write(path: pathlib.Path, state: TrainState, facts: Mapping[str, Any]) -> pathlib.Path:
    """``save``, with facts for the manifest beside the table of the leaves."""
    if path.exists():
        raise CheckpointError(f"{path} is there already, and a checkpoint is never overwritten: choose another name.")
    buffers, table = pack(state)
    manifest = {
        "format": _FORMAT,
        "step": int(state.step),
        "time": time.time(),
        "environment": environment(state),
        "leaves": table,
        **facts,
    }
    text = json.dumps(manifest, sort_keys=True)
    unfinished = path.with_name(f".unfinished-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        arenas.write(unfinished / _ARENAS, buffers)
        (unfinished / MANIFEST).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "manifest": manifest}))
        sync_tree(unfinished)
        unfinished.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error}). Nothing that was saved before is touched: make "
            "room or give another folder."
        ) from error
    return path


def read(path: pathlib.Path, like: TrainState) -> Restoration:
    """``restore``, with a report."""
    manifest = read_manifest(path)
    rows: dict[str, Leaf] = {row["path"]: row for row in manifest["leaves"]}
    wanted = dict(zip(tree.paths(like, "state"), tree.leaves(like), strict=True))
    missing = sorted({slot for path_ in wanted if path_ not in rows and (slot := _slot(path_)) is not None})
    missing = [slot for slot in missing if not any(_slot(path_) == slot for path_ in rows)]
    extra = sorted({slot for path_ in rows if (slot := _slot(path_)) is not None and slot not in like.slots})
    _refuse_differences(path, wanted, rows, set(missing), set(extra))
    buffers = arenas.read(path / _ARENAS)

    leaves, structure = tree.flatten(like)
    found = [
        unpack(rows[path_], buffers).to(leaf.device) if path_ in rows else leaf
        for path_, leaf in zip(wanted, leaves, strict=True)
    ]
    state: TrainState = tree.unflatten(structure, found)
    kept = {name: _extra_slot(name, rows.values(), buffers, like) for name in extra}
    state = state.replace(slots={**state.slots, **kept})
    return Restoration(state, path, missing, extra, _different(manifest["environment"], environment(state)))


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """What the checkpoint says of itself.

    Raises:
        CheckpointError: If it is not a checkpoint, or its manifest is damaged.
    """
    try:
        outer = json.loads((path / MANIFEST).read_text())
        manifest = outer["manifest"]
        whole = outer["crc32"] == zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: there is no {MANIFEST} in it.") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}.") from None
    if not whole:
        raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum is not that of its content.")
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has the format {manifest['format']}, and this version of fxtrain reads {_FORMAT}."
        )
    return manifest


def environment(state: TrainState) -> dict[str, Any]:
    """What must be equal for a resumed run to be bitwise equal to an uninterrupted one."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": state.step.device.type,
        "threads": torch.get_num_threads(),
    }


def sync_tree(folder: pathlib.Path) -> None:
    """Brings every file and folder below ``folder`` to the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(pathlib.Path(root))


def sync_folder(folder: pathlib.Path) -> None:
    """Brings the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_SLOTS = "state.slots["


def _slot(path: str) -> str | None:
    """The slot that a leaf lies in."""
    if not path.startswith(_SLOTS):
        return None
    quote = path[len(_SLOTS)]
    return path[len(_SLOTS) + 1 : path.index(f"{quote}]", len(_SLOTS) + 1)]


def _extra_slot(name: str, rows: Any, buffers: Any, like: TrainState) -> Any:
    device = like.step.device
    mine = [row for row in rows if _slot(row["path"]) == name]
    return rebuild([(row["entries"][2:], unpack(row, buffers).to(device)) for row in mine])


def _refuse_differences(
    path: pathlib.Path, wanted: Mapping[str, Any], rows: Mapping[str, Leaf], missing: set[str], extra: set[str]
) -> None:
    problems: list[str] = []
    for leaf_path, leaf in wanted.items():
        row = rows.get(leaf_path)
        dtype = str(leaf.dtype).removeprefix("torch.")
        if row is None:
            if _slot(leaf_path) not in missing:
                problems.append(f"  {leaf_path}: wanted {dtype}{list(leaf.shape)}, and the checkpoint has none")
        elif (row["dtype"], row["shape"]) != (dtype, list(leaf.shape)):
            problems.append(
                f"  {leaf_path}: wanted {dtype}{list(leaf.shape)}, and the checkpoint has {row['dtype']}{row['shape']}"
            )
    for leaf_path, row in rows.items():
        if leaf_path not in wanted and _slot(leaf_path) not in extra:
            problems.append(f"  {leaf_path}: the checkpoint has {row['dtype']}{row['shape']}, and nothing is wanted")
    if problems:
        shown = "\n".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(
            f"{path} does not fit the state it is to be restored like:\n{shown}\n"
            "Make `like` with the model and the optimizer that the checkpoint was made with."
        )


def _different(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {then.get(name)} at the save, {now[name]} now" for name in now if then.get(name) != now[name]]
