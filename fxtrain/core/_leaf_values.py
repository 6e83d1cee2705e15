"""Values of small tensors as text, in as few transfers as possible, and of tensors that have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MOST = 4  # elements of a tensor whose values are shown


def is_freed(leaf: Tensor) -> bool:
    """Whether the memory of a tensor was freed, so that reading it would fail or crash."""
    try:
        return bool(leaf.numel()) and not leaf.is_meta and leaf.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # sparse tensors, and those of a transform, have no storage
        return False


def leaf_bytes(leaf: Tensor) -> int:
    """Returns the size of a tensor in bytes. Of a sparse tensor, that of its values, because torch states no other.

    Example:
        >>> leaf_bytes(torch.zeros(3)), leaf_bytes(torch.eye(3).to_sparse())
        (12, 12)
    """
    if leaf.layout == torch.strided:
        return leaf.nbytes
    return (leaf.coalesce() if leaf.layout == torch.sparse_coo else leaf).values().nbytes


def leaf_shape(leaf: Tensor) -> str:
    """Returns the shape of a tensor as text.

    Example:
        >>> leaf_shape(torch.zeros(3, 2))
        '[3, 2]'
    """
    return "nested" if leaf.is_nested else str(list(leaf.shape))


def leaf_values(leaves: Sequence[Any]) -> list[str]:
    """Returns the values of tensors with at most four elements as text, and an empty text for all others.

    Tensors on an accelerator are copied in one transfer for each dtype, which waits for the device.

    Example:
        >>> leaf_values([torch.tensor(3), torch.tensor([0.5, 2.0]), torch.zeros(100), torch.zeros((), device="meta")])
        ['3', '[0.5, 2]', '', 'no value on meta']
    """
    texts = [""] * len(leaves)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.is_nested or leaf.layout != torch.strided:
            continue
        if is_freed(leaf):
            texts[index] = "memory freed"
        elif leaf.is_meta:
            texts[index] = "no value on meta"
        elif leaf.ndim <= 1 and 0 < leaf.numel() <= _MOST:
            groups.setdefault((leaf.device, leaf.dtype), []).append(index)
    for members in groups.values():
        try:
            joined: Any = torch.cat([leaves[index].detach().reshape(-1) for index in members])
            values: list[Any] = joined.tolist()
        except Exception:  # a tensor of a transform, of another thread's mode, or of a broken device
            continue
        for index in members:
            own, values = values[: leaves[index].numel()], values[leaves[index].numel() :]
            shown = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in own]
            texts[index] = shown[0] if leaves[index].ndim == 0 else f"[{', '.join(shown)}]"
    return texts
