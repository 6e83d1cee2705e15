"""Loading: the weights in files put into a state."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from torch import Tensor, nn

from fxtrain.core import TrainState
from fxtrain.interop import _adapters as adapters
from fxtrain.interop import _pretrained as pretrained
from fxtrain.interop._read import listed_entries, read_weights
from fxtrain.model import load_state_dict, model_of
from fxtrain.model._loading import Loaded
from fxtrain.model._named import Named
from fxtrain.model._renaming import Rename


@overload
def load_weights(
    state: TrainState,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    part: str = "",
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
    report: Literal[False] = False,
) -> TrainState: ...


@overload
def load_weights(
    state: TrainState,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    part: str = "",
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
    report: Literal[True],
) -> Loaded: ...


def load_weights(
    state: TrainState,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    part: str = "",
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
    report: bool = False,
) -> TrainState | Loaded:
    """``state`` with the weights in a file or a folder. Everything else stays as it is, optimizer state included.

    A folder that the module's own library wrote is loaded as that library loads it: ``from_pretrained`` of transformers
    and diffusers converts layouts and names, and an adapter of peft is loaded into the module's active adapter alone.

    Args:
        state: From ``init``. It is left as it was.
        path: A ``.safetensors`` file, a file of ``torch.save``, or a folder with weights, as ``save_pretrained`` and
            ``save_weights`` write it.
        entry: As for ``fxtrain.interop.read_weights``: ``"state_dict"`` for checkpoints of Lightning and timm.
        part: The path of the submodule that the weights are of, ``"encoder"``. Its library loads it as a whole model.
        strict: As for ``load_state_dict``, and so are the other arguments.
        where: Shell patterns of names.
        rename: From old prefixes to new ones.
        ignore_mismatched_sizes: Whether tensors of another shape are skipped.
        cast: Whether tensors are cast to the dtypes of the state.
        report: Whether to return a ``Loaded`` in place of a warning, as ``load_state_dict`` does.

    Raises:
        CheckpointError: If the files cannot be read.
        ValueError: If names, shapes or dtypes differ, see ``load_state_dict``; or an adapter has another configuration.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": torch.nn.Linear(2, 1).state_dict()}, f"{folder}/last.ckpt")
        ...     state = fx.load_weights(fx.init(torch.nn.Linear(2, 1)), f"{folder}/last.ckpt", entry="state_dict")
    """
    contents: Any = read_weights(path, entry=entry)
    folder = pathlib.Path(path)
    # The template has the module's class, configuration and names, and no values.
    module = model_of(state).named_modules(train=False).get(part)
    if module is not None and folder.is_dir() and entry is None and rename is None:
        contents, where = _as_its_library_loads(module, folder, contents, where)
    try:
        found = load_state_dict(
            state,
            contents,
            part=part,
            strict=strict,
            where=where,
            rename=rename,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            cast=cast,
            report=True,
        )
    except ValueError as error:
        remedy = "" if any(isinstance(value, Tensor) for value in contents.values()) else listed_entries(contents)
        if (folder / adapters.CONFIG).is_file() and not (module is not None and adapters.is_adapted(module)):
            remedy = "The folder holds an adapter: give fxtrain.init a module that peft.get_peft_model has adapted."
        raise ValueError(f"{path}: {error}{' ' + remedy if remedy else ''}") from None
    if report:
        return found
    found.warn(stacklevel=2)
    return found.state


def _as_its_library_loads(
    module: nn.Module, folder: pathlib.Path, contents: Mapping[str, Any], where: str | Sequence[str] | None
) -> tuple[Mapping[str, Any], str | Sequence[str] | None]:
    """The contents by the module's names, and which names they are for."""
    if adapters.is_adapted(module):
        contents, names = adapters.named_as_in(module, folder, contents)
        return contents, [name.replace("[", "[[]") for name in names] if where is None else where
    if pretrained.is_pretrained(module, folder) and (
        hasattr(module, "base_model_prefix") or contents.keys() != Named(module).tensors.keys()
    ):
        return pretrained.as_loaded(module, folder, contents), where
    return contents, where
