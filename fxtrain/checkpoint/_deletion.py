"""Deletion: checkpoints that are not kept any longer, and what writers that were killed have left."""

from __future__ import annotations

import collections
import pathlib
import shutil
from collections.abc import Iterable

from fxtrain.checkpoint._retention import Entry
from fxtrain.checkpoint._unfinished import UNFINISHED
from fxtrain.disk import sync_folder

_GONE = ".deleted-"


class Deletion:
    """Deletes checkpoints of a folder. A failure costs disk space only, so it is a warning, once for each path.

    Args:
        folder: The folder.
        warnings: Where the texts of warnings go.
    """

    def __init__(self, folder: pathlib.Path, warnings: collections.deque[str]) -> None:
        self._folder, self._warnings = folder, warnings
        self._told: set[pathlib.Path] = set()

    def delete(self, entries: Iterable[Entry]) -> None:
        """Deletes these."""
        for entry in entries:
            # Renamed first: a deletion that is cut short must not leave half a checkpoint under its name.
            gone = entry.path.with_name(f"{_GONE}{entry.path.name}")
            try:
                if entry.path.is_symlink():
                    raise OSError("it is a symbolic link")
                entry.path.rename(gone)
                sync_folder(self._folder)
                shutil.rmtree(gone)
            except OSError as error:
                self.warn_once(entry.path, f"The old checkpoint {entry.path} could not be deleted: {error}.")

    def warn_once(self, path: pathlib.Path, text: str) -> None:
        """Warns, unless a warning was given for the same path."""
        if path not in self._told:
            self._told.add(path)
            self._warnings.append(text)

    def clear(self) -> None:
        """Deletes half written and half deleted checkpoints. The folder is locked, so their writers have ended."""
        for pattern in (f"{UNFINISHED}*-step-*", f"{_GONE}*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
