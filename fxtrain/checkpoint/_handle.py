"""The handle of a save in progress, and the checkpoint that it commits."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from fxtrain.checkpoint._retention import Role


class Committed(NamedTuple):
    """A checkpoint that is committed to disk.

    Args:
        step: The state's step.
        path: The checkpoint's folder.
        metrics: The metrics it was saved with.
    """

    step: int
    path: pathlib.Path
    metrics: dict[str, float]


class Save:
    """The handle returned by ``Checkpointer.save``. ``committed`` is None until the checkpoint is on disk."""

    def __init__(self, role: Role) -> None:
        self.role: Role = role
        self.committed: Committed | None = None
        self.ended = False  # whether the writer is done with it, committed or failed
