"""Remote: what writers to a service have in common, which takes nothing back."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import BinaryIO, ClassVar

from fxtrain.disk import replace_file
from fxtrain.values import try_all
from fxtrain.writers.interface import Backend, unwritable


class RemoteWriter(Backend):
    """Writes to a run of a service. The same folder is the same run: a small file in it has its identity.

    A writer says ``service`` and ``file``, and has ``_begin``, ``_end`` and ``put``, which calls ``_open`` first and
    ``_reached`` when it is done.
    """

    service: ClassVar[str]  # what a person calls it
    file: ClassVar[str]  # has the identity, and the last step written

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.service, folder, error) from error
        self._folder = folder
        self._identity, self._last = self._read()
        self._record: BinaryIO | None = None  # open while the run is

    def _begin(self, identity: str | None) -> str:
        """Goes on with a run, or begins one, and says its identity."""
        raise NotImplementedError

    def _end(self) -> None:
        """Ends the session of the run: all that was written is kept by then."""
        raise NotImplementedError

    def purge(self, step: int) -> None:
        """Says that points are there twice, if something lies beyond the step."""
        if self._last > step:
            warnings.warn(
                f"{self.service} takes nothing back: what it has of steps {step + 1} to {self._last} stays, and will "
                "be there twice.",
                RuntimeWarning,
                stacklevel=3,
            )
            self._last = step

    def flush(self) -> None:
        """Puts on the disk how far the run is. Its values the service has already, and keeps in its own time."""
        if self._record is not None:
            self._remember()
            os.fsync(self._record.fileno())

    def close(self) -> None:
        if self._record is not None:
            try:
                try_all(self.flush, self._end, self._record.close)
            finally:
                self._record = None

    def _open(self) -> None:
        if self._record is None:
            self._identity = self._begin(self._identity)
            path = self._folder / self.file
            try:
                replace_file(path, self._content())
                self._record = open(path, "rb+")  # noqa: SIM115 -- open until the writer is closed
            except OSError as error:
                raise unwritable(self.service, path, error) from error

    def _reached(self, step: int) -> None:
        """Remembers that a step was written, where the next session finds it even if this one is killed."""
        if step > self._last:
            self._last = step
            self._remember()

    def _remember(self) -> None:
        assert self._record is not None
        self._record.seek(0)
        self._record.write(self._content())
        self._record.flush()

    def _content(self) -> bytes:
        # Of one length, so that it is written over in place, at the cost of one system call a step.
        return f'{{"id": {json.dumps(self._identity)}, "step": {self._last:>15}}}\n'.encode()

    def _read(self) -> tuple[str | None, int]:
        path = self._folder / self.file
        if not path.exists():
            return None, 0
        try:
            known = json.loads(path.read_bytes())
            return str(known["id"]), int(known["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not say which run of {self.service} the folder is: give another folder, or remove the "
                "file to begin a new run."
            ) from error
