"""Weights of peft adapter folders, mapped to the names in the adapted module."""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from torch import nn

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # added to names in files by transformers' own adapters
_OUTPUT_SETTINGS = (  # settings, besides weights, that affect the outputs of an adapter
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
)


class Adapted(Protocol):
    """A module that peft has adapted."""

    peft_config: Mapping[str, Any]
    active_adapters: Sequence[str] | Callable[[], Sequence[str]]

    def state_dict(self, *, keep_vars: bool) -> dict[str, Any]: ...


def is_adapted(module: nn.Module) -> TypeGuard[Adapted]:
    """Whether peft has adapted a module, which then saves and loads only its adapter."""
    return bool(getattr(module, "peft_config", None)) and hasattr(module, "active_adapters")


def named_as_in(
    module: Adapted, folder: pathlib.Path, contents: Mapping[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Returns an adapter folder's contents by the names of the adapted module, and all names of its active adapter.

    Raises:
        ValueError: If the folder's configuration implies other outputs than the module's, or this kind of adapter
            learns prompts instead of weights.
    """
    peft = importlib.import_module("peft")  # by name, because type checks run without peft
    adapter = _active(module)
    configuration = module.peft_config[adapter]
    _refuse_other_configuration(folder / CONFIG, configuration)
    if configuration.is_prompt_learning:  # the file contains prompts that peft computes from parameters
        raise ValueError(
            f"expected an adapter with weights, got a {type(configuration).__name__}. Load {folder} with "
            "peft.PeftModel.from_pretrained before fxtrain.init."
        )
    # peft returns the module's tensors under different names, so tensor identity maps one name to the other.
    own = module.state_dict(keep_vars=True)
    places = {id(value): name for name, value in own.items()}
    given = peft.get_peft_model_state_dict(module, own, adapter_name=adapter, save_embedding_layers=False)
    names = {theirs: places[id(value)] for theirs, value in given.items() if id(value) in places}
    if not isinstance(module, peft.PeftModel):
        names = {_PREFIX + theirs: ours for theirs, ours in names.items()}
    return {names.get(name, name): value for name, value in contents.items()}, list(names.values())


def _active(module: Adapted) -> str:
    """Returns the name of the active adapter. In transformers models, ``active_adapters`` is a method."""
    active = module.active_adapters
    names = active() if callable(active) else active
    return names[0]


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
