"""Loading weights from files into a state."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from fxtrain.core import TrainState, args_from, check_path, check_train_state
from fxtrain.interop._library_folders import CONFIG, as_its_library_loads, is_adapted
from fxtrain.interop._read_weights import listed_entries, read_weights
from fxtrain.model import load_state_dict, model_of
from fxtrain.model._named_tensors import Rename
from fxtrain.model._state_dict import LoadOptions, LoadReport


@overload
def load_weights(
    state: TrainState,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    report: Literal[False] = False,
    **options: Unpack[LoadOptions],
) -> TrainState: ...


@overload
def load_weights(
    state: TrainState,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    report: Literal[True],
    **options: Unpack[LoadOptions],
) -> LoadReport: ...


@args_from(load_state_dict)
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
) -> TrainState | LoadReport:
    """Returns ``state`` with the weights from a file or a folder, and with everything else unchanged.

    A folder written by the module's own library is loaded as that library loads it: ``from_pretrained`` of transformers
    and diffusers converts layouts and names, and a peft adapter is loaded into the module's active adapter only.

    Args:
        path: A ``.safetensors`` file, a ``torch.save`` file, or a folder with weights, as written by
            ``save_pretrained`` and ``save_weights``.
        entry: The entry of a ``torch.save`` file that contains the state dict, such as ``"state_dict"`` in checkpoints
            of Lightning and timm.

    Returns:
        The state, or a ``LoadReport`` with the state and the lists of names if ``report=True``.

    Raises:
        CheckpointError: If the files cannot be read.
        ValueError: If names, shapes or dtypes differ, see ``load_state_dict``; or if an adapter's configuration
            differs.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": torch.nn.Linear(2, 1).state_dict()}, f"{folder}/last.ckpt")
        ...     state = fx.load_weights(fx.init(torch.nn.Linear(2, 1)), f"{folder}/last.ckpt", entry="state_dict")
    """
    check_train_state(state, "load_weights(state, path)")
    check_path("path", path)
    contents: Any = read_weights(path, entry=entry)
    folder = pathlib.Path(path)
    # The template has the module's class, configuration and names, but no values.
    module = model_of(state).named_modules(train=False).get(part)
    if module is not None and folder.is_dir() and entry is None and rename is None:
        contents, where = as_its_library_loads(module, folder, contents, where)
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
        if (folder / CONFIG).is_file() and not (module is not None and is_adapted(module)):
            remedy = "The folder contains an adapter. Pass a module adapted by peft.get_peft_model to fxtrain.init."
        raise ValueError(f"{path}: {error}{' ' + remedy if remedy else ''}") from None
    if report:
        return found
    found.warn()
    return found.state
