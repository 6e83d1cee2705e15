"""Copies of artifacts that wait for their upload, because the originals may be replaced or deleted meanwhile."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from fxtrain.values import Artifact

_MAX_STAGED = 4  # more would fill the disk while a service does not answer


class Staging:
    """Holds copies of artifacts, made of hard links where the file system has them. Keeps the 4 newest.

    Args:
        folder: The folder of the copies. What a killed session left in it is deleted at the first copy.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._copies: list[Path] | None = None

    def add(self, artifact: Artifact) -> Artifact:
        """Returns an artifact whose path is a copy. After an ``OSError`` there is none."""
        if self._copies is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._copies = []
        source = Path(artifact.path)
        copy = self._folder / os.urandom(8).hex()
        copy.mkdir(parents=True)
        target = copy / source.name
        try:
            if source.is_dir():
                shutil.copytree(source, target, copy_function=_link)
            else:
                _link(os.fspath(source), os.fspath(target))
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        self._copies.append(copy)
        while len(self._copies) > _MAX_STAGED:
            shutil.rmtree(self._copies.pop(0), ignore_errors=True)
        return dataclasses.replace(artifact, path=target)

    def discard(self, artifact: Artifact) -> None:
        """Deletes the copy of an artifact that was uploaded."""
        shutil.rmtree(Path(artifact.path).parent, ignore_errors=True)

    def close(self) -> None:
        """Deletes all copies."""
        if self._copies is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._copies = None


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
    return target
