"""The base class of writers to a service, which block for a bounded time at most."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, ClassVar

from fxtrain.core import LoopEvent, RunInfo, warn
from fxtrain.disk import make_folder, replace_file, set_aside
from fxtrain.values import Artifact, Value, plain_number
from fxtrain.writers._backlog import PendingCall, pending_call
from fxtrain.writers._interface import Backend, explain_failure
from fxtrain.writers._outbox import Outbox, Session
from fxtrain.writers._staging import Staging


class RemoteWriter(Backend):
    """Writes to a run of a service from a thread. A small file in the folder has the run's identity.

    A subclass defines ``service``, ``file`` and ``_session``, whose methods run in the thread. Its ``begin`` must call
    ``identified``, and its ``send`` must call ``reached`` when it is done.
    """

    service: ClassVar[str]  # the name in messages
    file: ClassVar[str]  # the file of the run's identity and the last step written

    def __init__(self, folder: Path) -> None:
        with explain_failure(self.service, folder):
            make_folder(folder)
        self._folder = folder
        self.identity, self._last = self._read()
        """The service's identifier of the run, or None if there is no run yet, and the last step written."""
        self.run = RunInfo()
        """The facts of the run, with which a session begins."""
        self._staging = Staging(folder / ".artifacts")
        self._uploaded = set[str | os.PathLike[str]]()
        self._record: BinaryIO | None = None  # open during a session
        self._outbox: Outbox | None = None
        self._current: Session | None = None  # an abandoned session may still run in its thread, and is ignored

    def _session(self) -> Session:
        """Returns the calls of a new session."""
        raise NotImplementedError

    def check(self, values: Mapping[str, Value]) -> None:
        """Raises if the service cannot accept a name."""

    def write(self, step: int, values: Mapping[str, Value], event: LoopEvent | None = None) -> None:
        """Queues values for the thread. Never waits for the service."""
        kept = self._staged(self.selection.select(step, values))
        if not kept:
            return
        self.check(kept)
        self.run = next((value for value in kept.values() if isinstance(value, RunInfo)), self.run)
        self._opened().add(pending_call(step, {name: plain_number(value) for name, value in kept.items()}, event))
        self._warn_notes()

    def purge(self, step: int) -> None:
        """Drops unsent points after a step. Warns if points after it were sent, because they will be duplicated."""
        last = self._last
        if self._outbox is not None:
            last = max(last, self._outbox.truncate_after(step))
        if last > step:
            warn(
                f"{self.service} cannot delete points, so those of steps {step + 1} to {last} stay and will be "
                "duplicated.",
                RuntimeWarning,
            )
            self._last = step

    def flush(self) -> None:
        """Waits a few seconds at most for values to be sent, and not while the service does not answer."""
        if self._outbox is not None:
            self._outbox.flush()
            self._sync_record()
            self._warn_notes()

    def close(self) -> None:
        """Ends the session within a bounded time. Unsent points are lost, and counted in a warning."""
        if self._outbox is None:
            return
        outbox = self._outbox
        atexit.unregister(self.close)
        outbox.close()
        self._outbox = self._current = None
        self._staging.close()
        self._sync_record()
        if self._record is not None:
            self._record.close()
            self._record = None
        self._warn_notes(outbox)

    def take_failure(self) -> Exception | None:
        """Returns the first error of an outage or a refusal, once, for runs that require the writer."""
        return None if self._outbox is None else self._outbox.take_failure()

    def _staged(self, values: dict[str, Value]) -> dict[str, Value]:
        """Returns values with artifacts copied, without those that cannot be."""
        staged: dict[str, Value] = {}
        for name, value in values.items():
            try:
                staged[name] = self._staging.add(value) if isinstance(value, Artifact) else value
            except OSError as error:
                warn(
                    f"{self.service} does not get the artifact {name!r}, because it cannot be copied: {error}.",
                    RuntimeWarning,
                )
        return staged

    def _opened(self) -> Outbox:
        if self._outbox is None:
            self._current = self._session()
            self._outbox = Outbox(self.service, self._current)
            atexit.register(self.close)
        return self._outbox

    def _warn_notes(self, outbox: Outbox | None = None) -> None:
        outbox = outbox or self._outbox
        for note in outbox.notes() if outbox is not None else ():
            warn(note, RuntimeWarning)

    # Called by the thread.

    def upload(self, name: str, artifact: Artifact, upload: Callable[[Path], None]) -> None:
        """Uploads an artifact that waited, and deletes its copy."""
        if artifact.path in self._uploaded:  # a batch is sent again if a part of it fails
            return
        if not os.path.exists(artifact.path):
            self.tell(f"{self.service} was too slow for a version of the artifact {name!r}, which newer ones replace.")
            return
        upload(Path(artifact.path))
        self._uploaded.add(artifact.path)
        self._staging.discard(artifact)

    def tell(self, note: str) -> None:
        """Makes the next call of a method warn."""
        outbox = self._outbox
        if outbox is not None:
            outbox.tell(note)

    def identified(self, session: Session, identity: str) -> None:
        """Stores the identity of the run."""
        if session is not self._current:
            return
        self.identity = identity
        path = self._folder / self.file
        with explain_failure(self.service, path):
            replace_file(path, self._content())
            self._record = open(path, "rb+", buffering=0)  # noqa: SIM115 -- open until the writer is closed
        # Registered again, to run before the exit handlers that the service's package has registered by now.
        atexit.unregister(self.close)
        atexit.register(self.close)

    def reached(self, session: Session, calls: list[PendingCall]) -> None:
        """Stores the last step sent, where the next session finds it even if this one is killed."""
        if session is not self._current:
            return
        self._last = max(self._last, *(call.step for call in calls))
        with contextlib.suppress(OSError):
            self._store_record()

    def _store_record(self) -> None:
        if self._record is not None:
            self._record.seek(0)
            self._record.write(self._content())

    def _sync_record(self) -> None:
        with contextlib.suppress(OSError):
            self._store_record()
            if self._record is not None:
                os.fsync(self._record.fileno())

    def _content(self) -> bytes:
        # Of constant length, so that it can be overwritten in place.
        return f'{{"id": {json.dumps(self.identity)}, "step": {self._last:>15}}}\n'.encode()

    def _read(self) -> tuple[str | None, int]:
        path = self._folder / self.file
        if not path.exists():
            return None, 0
        with explain_failure(self.service, path):
            try:
                known = json.loads(path.read_bytes())
                return str(known["id"]), int(known.get("step", 0))
            except (ValueError, KeyError, TypeError, AttributeError):
                set_aside(path, f"does not identify a run of {self.service}, so a new run begins")
                path.unlink()
        return None, 0
