"""Deletes expired checkpoints and the leftovers of killed writers."""

from __future__ import annotations

import collections
import pathlib
import shutil
from collections.abc import Iterable

from fxtrain.checkpoint._retention import Entry
from fxtrain.checkpoint._temporary_folder import UNFINISHED
from fxtrain.disk import sync_folder

_DELETED = ".deleted-"


class Deletion:
    """Deletes checkpoints from a folder.

    A failed deletion only wastes disk space, so it is reported as a warning, once for each path.

    Args:
        folder: The folder of the checkpoints.
        warnings: A queue that receives the texts of warnings.
    """

    def __init__(self, folder: pathlib.Path, warnings: collections.deque[str]) -> None:
        self._folder, self._warnings = folder, warnings
        self._warned: set[pathlib.Path] = set()

    def delete(self, entries: Iterable[Entry]) -> None:
        """Deletes the checkpoints in ``entries``."""
        for entry in entries:
            # Renamed first, because an interrupted deletion must not leave a partial checkpoint under a valid name.
            renamed = entry.path.with_name(f"{_DELETED}{entry.path.name}")
            try:
                if entry.path.is_symlink():
                    raise OSError("a symbolic link")
                entry.path.rename(renamed)
                sync_folder(self._folder)
                shutil.rmtree(renamed)
            except OSError as error:
                self.warn_once(
                    entry.path,
                    f"expected to delete the expired checkpoint {entry.path}, got {error}. It still takes disk space.",
                )

    def warn_once(self, path: pathlib.Path, text: str) -> None:
        """Queues the warning ``text``, unless there was one for the same path."""
        if path not in self._warned:
            self._warned.add(path)
            self._warnings.append(text)

    def clear(self) -> None:
        """Deletes partly written and partly deleted checkpoints. Requires the folder lock, so no writer is active."""
        for pattern in (f"{UNFINISHED}*-step-*", f"{_DELETED}*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
