"""Reading tensors by name from a file or a folder of weights."""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxtrain.checkpoint import CheckpointError
from fxtrain.core import describe
from fxtrain.interop._torch_files import load_tensors

_STEMS = (
    *("model", "diffusion_pytorch_model", "open_clip_model", "adapter_model"),
    *("pytorch_model", "open_clip_pytorch_model"),
)
_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def read_weights(path: str | os.PathLike[str], *, entry: str | None = None) -> Mapping[str, object]:
    """Returns the tensors in a file or a folder of weights by name, on the CPU.

    Files of safetensors and ``torch.save`` are memory-mapped, so a tensor is read when it is used.

    Args:
        path: A ``.safetensors`` file; an index of shards; a ``torch.save`` file, read with ``weights_only=True``; or a
            folder with one of these, as ``save_pretrained`` writes it.
        entry: The entry of a ``torch.save`` file that contains the state dict, such as ``"state_dict"`` or ``"model"``.

    Raises:
        CheckpointError: If there are no weights, or they cannot be read.
        ValueError: If ``entry`` does not name a state dict.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": {"weight": torch.ones(2)}}, f"{folder}/last.pt")
        ...     contents = read_weights(f"{folder}/last.pt", entry="model")
        >>> contents
        {'weight': tensor([1., 1.])}
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = _weights_in(file)
    if not file.is_file():
        raise CheckpointError(
            f"expected a file or a folder of weights, got {file}, which does not exist. Check the path."
        )
    contents = _read_shards(file) if file.name.endswith(".index.json") else _read_file(file)
    return contents if entry is None else _entry(file, contents, entry)


def _weights_in(folder: pathlib.Path) -> pathlib.Path:
    for suffix in _SUFFIXES:
        for stem in _STEMS:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    if (folder / "manifest.jsonl").is_file():
        raise CheckpointError(
            f"expected a folder with weights, such as model.safetensors, got the checkpoint {folder}. Restore it: "
            "fxtrain.restore(path, like=state, where=['state.params', 'state.buffers'])."
        )
    there = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
    raise CheckpointError(
        f"expected a folder with weights, such as model.safetensors, got {folder} with {there}. Pass one file."
    )


def _read_shards(index: pathlib.Path) -> dict[str, object]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"expected an index of shards at {index}, got {error!r}.") from None
    found: dict[str, object] = {}
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise CheckpointError(f"expected shards in the folder of {index}, got {name!r}.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"expected all shards of {index}, got no file {name}.")
        found.update(_read_file(index.parent / name))
    lost = [name for name in places if name not in found]
    if lost:
        raise CheckpointError(f"expected {lost[0]!r} in {places[lost[0]]}, as listed in {index}, got no such tensor.")
    return found


def _read_safetensors(file: pathlib.Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"expected weights in {file}, got a file that cannot be read ({error}).") from error


def _read_file(file: pathlib.Path) -> Any:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    instead = "pass the state dict to fxtrain.load_state_dict"
    contents = load_tensors(file, what="weights", instead=instead, mmap=zipfile.is_zipfile(file))
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"expected a state dict in {file}, got {describe(contents)}.")
    return contents


def _entry(file: pathlib.Path, contents: Mapping[str, object], entry: str) -> Mapping[str, object]:
    found = contents.get(entry)
    if not isinstance(found, Mapping):
        raise ValueError(f"expected entry to name a state dict in {file}, got {entry!r}. {listed_entries(contents)}")
    return found


def listed_entries(contents: Mapping[str, object]) -> str:
    """Returns a sentence that lists the entries with tensors by name; empty if there are none."""
    found = [
        f"{key!r} ({len(value)} values)"
        for key, value in contents.items()
        if isinstance(value, Mapping) and any(isinstance(leaf, Tensor) for leaf in value.values())
    ]
    return f"Entries with tensors: {', '.join(found)}. Pass one as entry=." if found else ""
