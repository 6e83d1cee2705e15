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
        if not isinstance(leaf, Tensor):
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
