"""Reads tensors from files of ``torch.save``."""

from __future__ import annotations

import pathlib
import pickle
import re
from typing import Any

import torch

from fxtrain.checkpoint import CheckpointError

_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")


def load_tensors(path: pathlib.Path, *, what: str, instead: str, mmap: bool = False) -> Any:
    """Returns the contents of a file, with all tensors on the CPU.

    Args:
        path: The file.
        what: What it should have, for errors.
        instead: What to do with a state dict that the user has read, for errors.
        mmap: Whether to map tensors to memory.

    Raises:
        CheckpointError: If the file cannot be read, or has objects that could run code when they are read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        # Its advice is to read the file in a way that may run code, whatever the file is.
        is_of_unpickler = isinstance(error, pickle.UnpicklingError)
        refused = _REFUSED.search(str(error)) if is_of_unpickler else None
        if refused is not None:
            raise CheckpointError(
                f"expected tensors in {path}, got other Python objects ({refused[1]}). If you trust the file, read it "
                f"with torch.load(weights_only=False), and {instead}."
            ) from None
        about = "" if is_of_unpickler else f" ({type(error).__name__}: {error})"
        raise CheckpointError(
            f"expected {what} in {path}, got a file that cannot be read{about}. Write it with torch.save or as "
            "safetensors."
        ) from (None if is_of_unpickler else error)
