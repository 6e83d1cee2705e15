"""Folders of transformers, diffusers and peft, loaded as these libraries load them."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxtrain.checkpoint import CheckpointError
from fxtrain.model._named_tensors import NamedTensors

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # added to names in files by transformers' own adapters
_OUTPUT_SETTINGS = (  # settings, besides weights, that affect the outputs of an adapter
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
)


def as_its_library_loads(
    module: nn.Module, folder: pathlib.Path, contents: Mapping[str, object], where: str | Sequence[str] | None
) -> tuple[Mapping[str, object], str | Sequence[str] | None]:
    """Returns the contents by the module's names, and the names that they cover."""
    if is_adapted(module):
        contents, names = _named_as_in(module, folder, contents)
        return contents, [name.replace("[", "[[]") for name in names] if where is None else where
    if _is_pretrained(module, folder) and (
        hasattr(module, "base_model_prefix") or contents.keys() != NamedTensors(module).tensors.keys()
    ):
        return _as_loaded(module, folder, contents), where
    return contents, where


def is_adapted(module: nn.Module) -> bool:
    """Whether peft has adapted a module, which then saves and loads only its adapter."""
    return bool(getattr(module, "peft_config", None)) and hasattr(module, "active_adapters")


def _named_as_in(
    module: Any, folder: pathlib.Path, contents: Mapping[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Returns an adapter folder's contents by the names of the adapted module, and all names of its active adapter.

    Raises:
        ValueError: If the folder's configuration implies other outputs than the module's, or this kind of adapter
            learns prompts instead of weights.
    """
    peft = importlib.import_module("peft")  # by name, because type checks run without peft
    active = module.active_adapters
    if callable(active):  # in transformers models
        active = cast(Any, active())
    adapter = active[0]
    configuration = module.peft_config[adapter]
    _refuse_other_configuration(folder / CONFIG, configuration)
    if configuration.is_prompt_learning:  # the file contains prompts that peft computes from parameters
        raise ValueError(
            f"expected an adapter with weights, got a {type(configuration).__name__}. Load {folder} with "
            "peft.PeftModel.from_pretrained before fxtrain.init."
        )
    # peft returns the module's tensors under different names, so tensor identity maps one name to the other.
    own: dict[str, Any] = module.state_dict(keep_vars=True)
    places = {id(value): name for name, value in own.items()}
    given = peft.get_peft_model_state_dict(module, own, adapter_name=adapter, save_embedding_layers=False)
    names = {theirs: places[id(value)] for theirs, value in given.items() if id(value) in places}
    if not isinstance(module, peft.PeftModel):
        names = {_PREFIX + theirs: ours for theirs, ours in names.items()}
    return {names.get(name, name): value for name, value in contents.items()}, list(names.values())


def _refuse_other_configuration(file: pathlib.Path, here: object) -> None:
    if not file.is_file():
        return
    there = json.loads(file.read_text())
    for key in _OUTPUT_SETTINGS:
        mine = getattr(here, key, None)
        mine = getattr(mine, "value", mine)
        if key in there and hasattr(here, key) and there[key] != mine:
            raise ValueError(
                f"expected {key}={mine!r} in {file}, as in the module, got {there[key]!r}. Create the module with that "
                "configuration: peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))."
            )


def _is_pretrained(module: nn.Module, folder: pathlib.Path) -> bool:
    """Whether the module's class, of transformers or diffusers, can load the folder and report missing names."""
    of_transformers = hasattr(module, "base_model_prefix") and hasattr(module, "config")
    of_diffusers = hasattr(module, "load_config") and hasattr(module, "config_name")
    return (
        (of_transformers or of_diffusers) and hasattr(module, "from_pretrained") and (folder / "config.json").is_file()
    )


def _as_loaded(module: nn.Module, folder: pathlib.Path, contents: Mapping[str, object]) -> dict[str, object]:
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
