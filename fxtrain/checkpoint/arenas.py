"""Arenas on disk, through Orbax. The one module that speaks to it."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fxtrain.checkpoint.pack import CheckpointError
from fxtrain.foreign import import_on_cpu


def write(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, uncompressed: the bytes of weights do not compress, and trying costs memory."""
    orbax = _orbax()
    with _checkpointer(orbax) as checkpointer:
        checkpointer.save(folder.absolute(), args=orbax.args.PyTreeSave(dict(arrays)))


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays.

    Raises:
        CheckpointError: If Orbax cannot read them.
    """
    orbax = _orbax()
    try:
        with _checkpointer(orbax) as checkpointer:
            return checkpointer.restore(folder.absolute())
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _checkpointer(orbax: Any) -> Any:
    return orbax.Checkpointer(orbax.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))


def _orbax() -> Any:
    orbax = import_on_cpu("orbax.checkpoint")
    # Orbax warns at each save of what does not concern a checkpoint of one process.
    logging.getLogger("absl").addFilter(_not_about_merging)
    return orbax


def _not_about_merging(record: logging.LogRecord) -> bool:
    return "OCDBT" not in record.getMessage()
