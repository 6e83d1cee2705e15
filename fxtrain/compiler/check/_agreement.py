"""Decisions that all ranks of a data parallel run make alike, because each of them leads to collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh

_ABANDONED = 2


class AbandonedError(RuntimeError):
    """Another rank cannot continue."""


class Agreement:
    """Decisions of all ranks, or of the only process.

    Args:
        mesh: The ranks. None for one process.

    Example:
        >>> Agreement(None).any(True)
        True
    """

    def __init__(self, mesh: Mesh | None) -> None:
        self._mesh = mesh

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank.

        Raises:
            AbandonedError: Another rank called ``abandon``.
        """
        found = int(flag) if self._mesh is None else self._maximum(int(flag))
        if found == _ABANDONED:
            raise AbandonedError("another rank cannot run the step once more")
        return bool(found)

    def abandon(self) -> None:
        """Takes part in the next decision of the other ranks, and ends it by an error there."""
        if self._mesh is not None:
            self._maximum(_ABANDONED)

    def _maximum(self, number: int) -> int:
        assert self._mesh is not None
        return int(self._mesh.maximum(torch.tensor(number, device="cpu"), "the check of a compiled step"))
