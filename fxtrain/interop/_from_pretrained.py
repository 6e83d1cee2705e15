"""Weights of pretrained folders, converted by ``from_pretrained`` of the module's class."""

from __future__ import annotations

import copy
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxtrain.checkpoint import CheckpointError

_CONFIG = "config.json"


def is_pretrained(module: nn.Module, folder: pathlib.Path) -> bool:
    """Whether the module's class, of transformers or diffusers, can load the folder and report missing names."""
    of_transformers = hasattr(module, "base_model_prefix") and hasattr(module, "config")
    of_diffusers = hasattr(module, "load_config") and hasattr(module, "config_name")
    return (of_transformers or of_diffusers) and hasattr(module, "from_pretrained") and (folder / _CONFIG).is_file()


def as_loaded(module: nn.Module, folder: pathlib.Path, contents: Mapping[str, object]) -> dict[str, object]:
    """Returns the values that ``from_pretrained`` loads, by the module's names.

    It renames, merges and splits tensors of older or different layouts, such as those of mixture-of-experts models.
    Names that it does not use are returned as in the files. A name whose shape differs gets a meta tensor of the shape
    in the files.

    Args:
        module: Of a class with ``from_pretrained``.
        folder: A folder that ``save_pretrained`` of the class wrote.
        contents: The folder's tensors by name.

    Raises:
        CheckpointError: If ``from_pretrained`` fails.
    """
    dtypes = {value.dtype for value in contents.values() if isinstance(value, Tensor) and value.is_floating_point()}
    plain = [dtype for dtype in dtypes if dtype.itemsize > 1]  # torch does not promote 8-bit floats
    widest = functools.reduce(torch.promote_types, plain) if plain else torch.float32
    options: dict[str, object] = {"torch_dtype": widest}
    if hasattr(module, "base_model_prefix"):
        options = {"dtype": widest, "config": copy.deepcopy(module.config)}
    try:
        with torch.random.fork_rng(devices=[]):
            made, info = cast(Any, type(module)).from_pretrained(
                str(folder), output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, **options
            )
    except Exception as error:
        name = type(module).__name__
        raise CheckpointError(
            f"expected a folder that {name}.from_pretrained can load, got {folder} ({error})."
        ) from error
    shapes = {name: torch.Size(there) for name, there, _ in info["mismatched_keys"]}
    absent = {*info["missing_keys"], *shapes}
    values: dict[str, object] = {name: value for name, value in made.state_dict().items() if name not in absent}
    for name, value in values.items():
        raw = contents.get(name)
        if isinstance(raw, Tensor) and isinstance(value, Tensor) and raw.dtype != value.dtype:
            values[name] = value.to(raw.dtype)  # reverts the widening
    values.update({name: torch.empty(shape, dtype=widest, device="meta") for name, shape in shapes.items()})
    values.update({name: contents[name] for name in info["unexpected_keys"] if name in contents})
    return values
