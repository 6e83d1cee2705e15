"""Saving the weights of a state as files for other programs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fxtrain import tree
from fxtrain.checkpoint import CheckpointError
from fxtrain.checkpoint._temporary_folder import clear_abandoned, unfinished_folder
from fxtrain.core import TrainState, check_choice, check_path, check_train_state, describe
from fxtrain.disk import make_folder, sync_file, sync_folder
from fxtrain.model import model_of, refuse_in_place_writes, to_module, versions
from fxtrain.model._named_tensors import NamedTensors
from fxtrain.model._tensor_access import copies
from fxtrain.model._types import Modules

Format = Literal["auto", "safetensors", "state_dict", "save_pretrained"]

_FILE = "model.safetensors"
_STATE_DICT = "pytorch_model.bin"


def save_weights(
    path: str | os.PathLike[str],
    state: TrainState,
    *,
    convert: Callable[[Any], Modules] | None = None,
    format: Format = "auto",  # noqa: A002 -- the word of the field
) -> pathlib.Path:
    """Writes the weights of ``state`` to a folder with ``model.safetensors``, which appears atomically.

    A module with ``save_pretrained`` writes its files and configuration itself: ``from_pretrained`` of its class loads
    the folder, and peft writes only the adapter. Tied tensors are saved once. Non-persistent buffers and optimizer
    state are not saved.

    Args:
        path: The folder to create.
        state: From ``init``. For a tree of modules, names start with the path of the module.
        convert: Maps a copy of the module, with the weights of the state, to the module that is written: ``lambda
            model: model.merge_and_unload()`` for merged peft weights, ``lambda model: model.encoder`` for a submodule.
        format: ``"safetensors"``, or ``"state_dict"`` for ``pytorch_model.bin``, written by ``torch.save``. Neither
            calls ``save_pretrained``. ``"save_pretrained"`` requires it, and ``"auto"`` calls it if the module has it.

    Returns:
        The folder's path.

    Raises:
        CheckpointError: If the folder exists or cannot be written, or safetensors cannot store a value.
        TypeError: If ``convert`` does not return a module, or ``format`` is ``"save_pretrained"`` and the module has no
            such method.
        ValueError: If ``format`` is unknown.

    Example:
        Averaged weights are saved through a view: ``fx.save_weights(path, fx.callbacks.averaged(state, "ema"))``.

        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = fx.save_weights(f"{folder}/weights", state)
        ...     loaded = fx.load_weights(fx.init(torch.nn.Linear(2, 1)), path)
        >>> bool((loaded.params["weight"] == state.params["weight"]).all())
        True
    """
    check_path("path", path, "Give the arguments in this order: save_weights(path, state).")
    check_train_state(state, "save_weights(path, state)")
    check_choice("format", format, get_args(Format))
    folder = pathlib.Path(path)
    if folder.exists():
        raise CheckpointError(f"expected a new folder, got {folder}, which exists. Choose another name.")
    model, before = model_of(state), versions(state.params)
    try:
        make_folder(folder.parent)
        clear_abandoned(folder.parent, (_FILE, _STATE_DICT).__contains__)
        with unfinished_folder(folder) as unfinished:
            if convert is None:
                model.call(
                    state.params, state.buffers, lambda modules: _write(modules, unfinished, format), train=False
                )
            else:
                _write(_converted(convert, to_module(state)), unfinished, format)
            refuse_in_place_writes("save_pretrained", state.params, before, "state.params")
            for file in unfinished.rglob("*"):
                if file.is_dir():
                    sync_folder(file)
                else:
                    sync_file(file)
            sync_folder(unfinished)
            unfinished.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"expected a folder that can be written, got {folder} ({error}). Free disk space, or choose another folder."
        ) from error
    return folder


def _converted(convert: Callable[[Any], Modules], copied: Modules) -> Modules:
    found = convert(copied)
    leaves = tree.leaves(found)
    if not leaves or not all(isinstance(leaf, nn.Module | Tensor) for leaf in leaves):
        raise TypeError(f"expected convert to return a module, got {describe(found)}. Return the module to write.")
    return found


def _write(modules: Modules, folder: pathlib.Path, form: Format) -> None:
    has_method = isinstance(modules, nn.Module) and hasattr(modules, "save_pretrained")
    if form == "save_pretrained" and not has_method:
        raise TypeError(
            f"expected a module with save_pretrained, got {describe(modules)}. Pass format='safetensors', or a "
            "model of transformers, diffusers or peft."
        )
    if has_method and form in ("auto", "save_pretrained"):
        cast(Any, modules).save_pretrained(str(folder))
        return
    named = NamedTensors(modules)
    if form == "state_dict":
        torch.save({name: copies(value) for name, value in named.tensors.items()}, folder / _STATE_DICT)
        return
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    for first, *others in named.ties:
        metadata.update(dict.fromkeys(others, first))
    tensors: dict[str, Tensor] = {}
    for name, value in named.tensors.items():
        if not isinstance(value, Tensor) or value.dtype == torch.complex128:
            kind = str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise CheckpointError(
                f"expected tensors that safetensors can store, got {kind} at {name}. Save them with "
                "torch.save(fxtrain.state_dict(state), path)."
            )
        if name not in metadata:
            tensors[name] = value.detach().contiguous()
    save_file(tensors, folder / _FILE, metadata=metadata)
