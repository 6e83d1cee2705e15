"""Checkpointer: the checkpoints of a run, in one folder, written in the background."""

from __future__ import annotations

import collections
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fxtrain.checkpoint import _folder as folders
from fxtrain.checkpoint import _ownership as ownership
from fxtrain.checkpoint import _retention as retention
from fxtrain.checkpoint._contents import Direct, Snapshot
from fxtrain.checkpoint._deletion import Deletion
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._lock import FolderLock
from fxtrain.checkpoint._ownership import Ownership
from fxtrain.checkpoint._reader import Reader
from fxtrain.checkpoint._retention import Entry, Policy, Role
from fxtrain.checkpoint._single import device_of, facts
from fxtrain.checkpoint._writer import Writer
from fxtrain.core import TrainState
from fxtrain.core._checks import check_choice


class Committed(NamedTuple):
    """A checkpoint that has reached the disk."""

    step: int
    path: pathlib.Path
    metrics: dict[str, float]


class Save:
    """One call of ``Checkpointer.save``. ``committed`` is None until the checkpoint has reached the disk."""

    def __init__(self, role: Role) -> None:
        self.role: Role = role
        self.committed: Committed | None = None
        self.ended = False  # whether the writer has finished with it, committed or not


class Checkpointer(Reader):
    """The checkpoints of a run; made by ``checkpointer``.

    ``save`` returns when the state is copied, and a thread writes the copy. Every other method that reads the folder
    first waits for that thread, so it sees every earlier save.

    A folder belongs to one run. The id of the run is drawn when it begins, adopted from the checkpoint that is read,
    and stored with each checkpoint. Checkpoints of other runs are not listed, not restored and not deleted.
    """

    def __init__(
        self, folder: pathlib.Path, policy: Policy, *, background: bool, on_error: str, overwrite: bool
    ) -> None:
        super().__init__(folder, policy)
        self._background, self._on_error, self._overwrite = background, on_error, overwrite
        self._lock = FolderLock(folder)
        self._ownership = Ownership(folder, overwrite=overwrite)
        self._run: str | None = None  # while this object may write: the folder is locked and belongs to this run
        self._snapshot = Snapshot()
        self._in_snapshot: Save | None = None  # the save whose copy is there
        self._writer = Writer()
        # Filled by the writer's thread. Each method of a deque is atomic.
        self._committed: collections.deque[Committed] = collections.deque()
        self._errors: collections.deque[BaseException] = collections.deque()
        self._warnings: collections.deque[str] = collections.deque()
        self._deletion = Deletion(folder, self._warnings)

    def begin(self, state: TrainState, *, resume: bool) -> None:
        """Starts a session that saves here: decides which run its checkpoints belong to, and reserves memory.

        A resumed session continues the run of the newest checkpoint. So does a session that begins with the state
        which this object has written or read last. Any other session begins a new run.

        Args:
            state: What the session begins with.
            resume: Whether it continues what ``read`` has returned, if there was anything to read.

        Raises:
            CheckpointError: If the folder has checkpoints of another run, cannot be written to, or another writer
                is there. In the first case nothing is written.
        """
        self.wait()
        found = None
        try:
            # The second round is for a writer that has ended between the listing and the lock.
            while found != (found := ownership.contents(self.folder)):
                run = self._ownership.run_of_session(state, found, resume=resume)
                self._lock.take()
            self._snapshot.reserve(state)
        except BaseException:
            self._release()
            raise
        self._run = run

    def reserve(self, state: TrainState) -> None:
        """Locks the folder, and makes room in memory for a copy of ``state``.

        Without it the first ``save`` does so, and takes longer than the others.

        Raises:
            CheckpointError: If the folder cannot be written to, or another writer is there.
        """
        self.wait()
        self._lock.take()
        self._snapshot.reserve(state)

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float] | None = None,
        *,
        notes: Mapping[str, str] | None = None,
        role: Role = "trajectory",
    ) -> Save:
        """Copies ``state``, commits the copy in the background, and then deletes what the policy does not keep.

        A save that is still under way is waited for, unless it is a snapshot. The first save locks the folder for this
        process, until ``close``.

        Args:
            state: Any state. When this returns it may be changed in place or donated. If its step has a checkpoint
                already, the newer one counts.
            metrics: Numbers to choose the best by.
            notes: What else must be equal for a resumed run to be bitwise equal, as text by name; ``read`` compares it.
            role: Why it is saved. A ``"session"`` checkpoint is no target of rewinds. A ``"snapshot"`` is read by
                ``read_snapshot`` alone and deleted by ``retain_snapshots``. Its state is not copied, so it must stay
                as it is until ``wait`` returns.

        Returns:
            The save, which is ``committed`` once it has reached the disk.

        Raises:
            CheckpointError: If the folder has checkpoints of a run that this object has not read from, or if this save
                or the one before could not be written. The next call of any method raises an error of the background.
        """
        if not isinstance(state, TrainState):
            raise TypeError(f"expected a TrainState, got {type(state).__name__}. fxtrain.save takes any tree.")
        check_choice("role", role, retention.ROLES)
        if role == "snapshot" or self._in_snapshot is None or self._in_snapshot.ended:
            self._report()
        else:
            self.wait()
        save = Save(role)
        try:
            self._lock.take()
        except CheckpointError as error:
            self._failed(error)
            return save
        if self._run is None:
            self._run = self._ownership.run_of_save(ownership.contents(self.folder))
        try:
            content = self._content(state, save)
        except CheckpointError as error:
            self._failed(error)
            return save
        texts = {name: str(text) for name, text in (notes or {}).items()}
        measured = {"threads": torch.get_num_threads(), **texts}  # the writer's thread has its own count
        self._submit(self._commit, save, self._run, content, dict(metrics or {}), measured, device_of(state))
        if not self._background:
            self.wait()
        return save

    def retain_snapshots(self, steps: Iterable[int]) -> None:
        """Deletes the run's snapshots of all other steps, in the background and after the saves before this call.

        Raises:
            CheckpointError: If neither ``begin`` nor ``save`` was called before.
        """
        if self._run is None:
            raise CheckpointError(
                f"expected a session that saves to {self.folder}, got none. Call begin or save first."
            )
        self._submit(self._delete_snapshots, self._run, frozenset(steps))

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            CheckpointError: If one that was could not be written. With ``on_error="warn"`` that is a warning.
        """
        self._writer.wait()
        self._report()

    def _report(self) -> None:
        while self._warnings:
            warnings.warn(self._warnings.popleft(), RuntimeWarning, stacklevel=3)
        while self._errors:
            error = self._errors.popleft()
            if not isinstance(error, CheckpointError):
                raise error
            self._failed(error)

    def committed(self) -> list[Committed]:
        """The checkpoints committed since the last call, except snapshots. It does not wait.

        Raises:
            CheckpointError: As ``wait``.
        """
        if not self._writer.busy:
            self.wait()
        return [self._committed.popleft() for _ in range(len(self._committed))]

    @property
    def saving(self) -> bool:
        """Whether a save is under way, or has an outcome that was not reported yet."""
        return self._writer.busy or bool(self._committed or self._errors or self._warnings)

    def close(self) -> None:
        """Waits for what is under way, frees the memory, and lets others write. A later ``save`` starts over.

        Raises:
            CheckpointError: As ``wait``.
        """
        try:
            self.wait()
        finally:
            self._snapshot = Snapshot()
            self._release()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # For the reading half

    def _run_to_read(self) -> str | None:
        return super()._run_to_read() if self._run is None else self._run

    def _has_read(self, entry: Entry) -> None:
        if self._run is None:
            self._ownership.has_read(entry, ownership.contents(self.folder))

    # How it is done

    def _content(self, state: TrainState, save: Save) -> Direct | Snapshot:
        if save.role == "snapshot":
            return Direct(state)
        self._in_snapshot = save
        self._snapshot.take(state)
        return self._snapshot

    def _release(self) -> None:
        """Unlocks the folder, after the writes that an interrupted wait has left under way."""
        self._run = None
        if self._writer.busy:
            self._submit(self._lock.release)
        else:
            self._lock.release()

    def _failed(self, error: CheckpointError) -> None:
        if self._on_error == "raise":
            raise error
        warnings.warn(f"{error} Training goes on.", RuntimeWarning, stacklevel=4)

    def _submit(self, job: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            try:
                job(*arguments)
            except BaseException as error:
                self._errors.append(error)

        self._writer.submit(guarded)

    # In the writer's thread

    def _commit(
        self,
        save: Save,
        run: str,
        content: Direct | Snapshot,
        metrics: dict[str, float],
        notes: dict[str, Any],
        device: torch.device,
    ) -> None:
        try:
            self._deletion.clear()
            content.wait()
            head = facts(content, device, metrics)
            head["environment"].update(notes)
            found = ownership.contents(self.folder)
            sequence = found[-1].sequence + 1 if found else 0
            step, metrics = head["step"], head["metrics"]
            path = self.folder / retention.name(sequence, step, run, save.role)
            folders.write(path, content, {**head, "run": run, "role": save.role, "sequence": sequence})
            self._metrics[path.name] = metrics
            save.committed = Committed(step, path, metrics)
            if save.role != "snapshot":
                self._ownership.wrote(Entry(sequence, step, run, save.role, path))
                self._committed.append(save.committed)
        finally:
            save.ended = True
        self._delete_old(run)

    def _delete_old(self, run: str) -> None:
        try:
            found = retention.entries(self.folder)
            own = [entry for entry in found if entry.run == run]
            self._deletion.delete(self._policy.to_delete(own, self._metrics_of))
            if self._overwrite:
                self._deletion.delete(entry for entry in ownership.contents(self.folder) if entry.run != run)
        except CheckpointError as error:  # a metric cannot be read now: what may be the best is not deleted
            self._deletion.warn_once(self.folder, f"Nothing was deleted from {self.folder}: {error}")

    def _delete_snapshots(self, run: str, kept: frozenset[int]) -> None:
        snapshots = [entry for entry in retention.entries(self.folder) if (entry.run, entry.role) == (run, "snapshot")]
        self._deletion.delete(entry for entry in snapshots if entry.step not in kept)


def checkpointer(
    folder: str | os.PathLike[str],
    *,
    keep: int | None = 3,
    keep_every: int | None = None,
    best: str | None = None,
    mode: str = "min",
    background: bool = True,
    on_error: str = "raise",
    overwrite: bool = False,
) -> Checkpointer:
    """The checkpoints of a run, in ``folder``.

    A folder belongs to one run: to begin another one in it is an error.

    Args:
        folder: Where they are; made at the first save.
        keep: How many of the newest are kept; None keeps all.
        keep_every: Beside them, those whose step is a multiple of this.
        best: Beside them, the one with the best evaluation metric of this name.
        mode: ``"min"`` or ``"max"``: which is best.
        background: Whether ``save`` returns when the state is copied. Costs the memory of one copy; False costs the
            time of writing.
        on_error: ``"raise"``, or ``"warn"`` and go on when a save fails: a full disk, a vanished mount.
        overwrite: Whether a new run replaces the runs in the folder. Their checkpoints are deleted once the new run
            has committed its first. A resumed run replaces those of all others.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder, fx.checkpointer(folder, keep=1) as checkpoints:
        ...     for step in (1, 2):
        ...         _ = checkpoints.save(state.replace(step=torch.tensor(step)))
        ...     checkpoints.steps()
        [2]
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep!r}: at least 1, or None to keep all.")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every={keep_every!r}: a number of steps, 1 or more, is wanted.")
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r}: 'min' or 'max' is wanted.")
    if on_error not in ("raise", "warn"):
        raise ValueError(f"on_error={on_error!r}: 'raise' or 'warn' is wanted.")
    path = pathlib.Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and checkpoints need a folder.")
    return Checkpointer(
        path, Policy(keep, keep_every, best, mode), background=background, on_error=on_error, overwrite=overwrite
    )
