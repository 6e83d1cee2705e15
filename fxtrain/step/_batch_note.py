"""A note with the paths, dtypes and shapes of the batch on errors raised by a loss function."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, describe, did_you_mean, dtype_name
from fxtrain.core._tracebacks import reaches_users
from fxtrain.step._check_function import ContractError

_MAX_LEAVES = 8
_START = "The batch has "


@contextlib.contextmanager
def noting_batch(batch: Batch, device: torch.device) -> Iterator[None]:
    """Adds a note with the contents of the batch to an error that a function of the user raises.

    Args:
        batch: The batch that the function receives.
        device: The device of the state.
    """
    try:
        yield
    except Exception as error:
        if torch.compiler.is_dynamo_compiling() or isinstance(error, ContractError):
            raise
        # An error about dtypes replaces that of torch, which is its cause.
        if not reaches_users(error.__cause__ or error):
            raise
        # A function that is tried again, by another way of differentiation, gets one note.
        if not any(note.startswith(_START) for note in getattr(error, "__notes__", ())):
            error.add_note(_note(error, batch, device))
        raise


def _note(error: Exception, batch: Batch, device: torch.device) -> str:
    paths, leaves = tree.paths(batch, "batch"), tree.leaves(batch)
    rows = [f"{path}: {_described(leaf, device)}" for path, leaf in zip(paths, leaves, strict=True)]
    listed = ", ".join(rows[:_MAX_LEAVES]) or "no leaves"
    if len(rows) > _MAX_LEAVES:
        listed += f" and {len(rows) - _MAX_LEAVES} more"
    return f"{_START}{listed}.{_remedy(error, batch, leaves, device)}"


def _described(leaf: object, device: torch.device) -> str:
    if not isinstance(leaf, Tensor):
        return describe(leaf)
    where = f" on {leaf.device}" if leaf.device != device else ""
    return f"{dtype_name(leaf.dtype)} {list(leaf.shape)}{where}"


def _remedy(error: Exception, batch: Batch, leaves: list[object], device: torch.device) -> str:
    if any(isinstance(leaf, Tensor) and leaf.device != device for leaf in leaves):
        return f" The state is on {device}. Move the batch there, as fit does."
    if isinstance(error, KeyError) and isinstance(batch, dict) and error.args and error.args[0] not in batch:
        return did_you_mean(error.args[0], batch)
    if isinstance(error, TypeError) and isinstance(batch, list | tuple) and "indices must be" in str(error):
        return f" It is a {type(batch).__name__}, so unpack it: {', '.join('xyzuvw'[: len(batch)])} = batch."
    return ""
