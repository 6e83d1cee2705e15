"""Files that a run hands to its writers."""

from __future__ import annotations

import dataclasses
import os

from fxtrain.core import Record, describe


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Artifact(Record):
    """A file or folder that belongs to a run, such as a checkpoint. Writers to services store a version of it.

    Each version written under one name is newer than the ones before. Writers that store no files ignore it.

    Args:
        path: The file or folder. It may be changed or deleted once it is written.
        kind: Its kind, such as ``"model"``, ``"checkpoint"`` or ``"code"``.
        aliases: Names of this version, such as ``"latest"`` and ``"best"``. Each moves here from an earlier version.

    Raises:
        TypeError: ``path`` is not a path, or ``kind`` or an alias is not a string.

    Example:
        >>> Artifact("runs/1/best", "model", aliases=["best"])
        Artifact(path='runs/1/best', kind='model', aliases=('best',))
    """

    path: str | os.PathLike[str]
    kind: str = "model"
    aliases: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise TypeError(
                f"expected path to be a path, got {describe(self.path)}. Pass the name of a file or folder."
            )
        if not isinstance(self.kind, str):
            raise TypeError(f"expected kind to be a string, got {describe(self.kind)}. Pass one such as 'model'.")
        if isinstance(self.aliases, str) or not all(isinstance(alias, str) for alias in self.aliases):
            raise TypeError(f"expected aliases to be a list of strings, got {describe(self.aliases)}. Pass ['best'].")
        object.__setattr__(self, "path", os.fspath(self.path))
        object.__setattr__(self, "aliases", tuple(self.aliases))
