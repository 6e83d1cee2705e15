"""Rows of tensors, numpy arrays and arrays on disk."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxtrain.data._as_tensors import as_tensors
from fxtrain.data._types import LazyArray


def take_rows(leaf: Tensor | np.ndarray | LazyArray, index: np.ndarray) -> Tensor:
    if not isinstance(leaf, Tensor | np.ndarray):
        # h5py requires ascending indices without repeats.
        rows, places = np.unique(index, return_inverse=True)
        return as_tensors(np.asarray(getattr(leaf, "oindex", leaf)[rows])[places])
    if isinstance(leaf, np.ndarray):
        return as_tensors(np.asarray(leaf[index]))  # reads only these rows of a memory-mapped file
    at = torch.from_numpy(index).to(leaf.device)
    # index_select is faster, but lacks the unsigned dtypes in which tokens are often stored.
    return leaf[at] if leaf.dtype in (torch.uint16, torch.uint32, torch.uint64) else leaf.index_select(0, at)
