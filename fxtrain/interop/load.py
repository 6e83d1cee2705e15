"""Loading: the weights in files put into a state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxtrain.core import TrainState
from fxtrain.interop.read import listed_entries, read_weights
from fxtrain.model import load_state_dict
from fxtrain.model.renaming import Rename


def load_weights(
    state: TrainState,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    strict: bool = True,
    where: str | Sequence[str] | None = None,
    rename: Rename = None,
    ignore_mismatched_sizes: bool = False,
    cast: bool = False,
) -> TrainState:
    """``state`` with the weights in a file or a folder. Everything else stays as it is, optimizer state included.

    Args:
        state: From ``init``. It is left as it was.
        path: A ``.safetensors`` file, a file of ``torch.save``, or a folder with weights, as ``save_pretrained`` and
            ``save_weights`` write it.
        entry: As for ``fxtrain.interop.read_weights``: ``"state_dict"`` for checkpoints of Lightning and timm.
        strict: As for ``load_state_dict``, and so are the other arguments.
        where: Shell patterns of names.
        rename: From old prefixes to new ones.
        ignore_mismatched_sizes: Whether tensors of another shape are skipped.
        cast: Whether tensors are cast to the dtypes of the state.

    Raises:
        CheckpointError: If the files cannot be read.
        ValueError: If names, shapes or dtypes differ; see ``load_state_dict``.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": torch.nn.Linear(2, 1).state_dict()}, f"{folder}/last.ckpt")
        ...     state = fx.load_weights(fx.init(torch.nn.Linear(2, 1)), f"{folder}/last.ckpt", entry="state_dict")
    """
    contents: Any = read_weights(path, entry=entry)
    try:
        found = load_state_dict(
            state,
            contents,
            strict=strict,
            where=where,
            rename=rename,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            cast=cast,
            report=True,
        )
    except ValueError as error:
        entries = "" if any(isinstance(value, Tensor) for value in contents.values()) else listed_entries(contents)
        raise ValueError(f"{path}: {error}{' ' + entries if entries else ''}") from None
    found.warn(stacklevel=2)
    return found.state
