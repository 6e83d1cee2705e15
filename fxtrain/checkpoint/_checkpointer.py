"""Saves the checkpoints of a run to one folder, in a background thread."""

from __future__ import annotations

import collections
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping

from fxtrain.checkpoint import _folder as folders
from fxtrain.checkpoint import _ownership as ownership
from fxtrain.checkpoint import _retention as retention
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._host_copy import Direct, HostCopy
from fxtrain.checkpoint._job_thread import JobThread
from fxtrain.checkpoint._lock import FolderLock
from fxtrain.checkpoint._ownership import Ownership
from fxtrain.checkpoint._parts import OtherParts
from fxtrain.checkpoint._reader import Reader
from fxtrain.checkpoint._retention import Deletion, Entry, RetentionPolicy, Role
from fxtrain.checkpoint._save import Committed, Save, device_of, environment, facts, of_batch
from fxtrain.core import TrainState, check_choice, check_new_path, check_positive_int, describe, did_you_mean, warn
from fxtrain.equivalents import with_known_arguments


class Checkpointer(Reader):
    """Saves, lists and restores the checkpoints of one run. Created by ``checkpointer``.

    ``save`` returns when the state is copied, and a thread writes the copy. All other methods that read the folder
    wait for that thread first, so they see every earlier save.

    A folder belongs to one run. A run gets a random id when it begins, adopts the id of the checkpoint it resumes
    from, and stores its id with each checkpoint. Checkpoints of other runs are not listed, restored or deleted.

    Args:
        folder: The folder of the checkpoints.
        policy: The checkpoints to keep.
        background: Whether a thread writes them.
        on_error: ``"raise"`` or ``"warn"`` if a save fails.
        overwrite: Whether checkpoints of other runs may be deleted.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> with tempfile.TemporaryDirectory() as folder, fx.checkpointer(folder) as checkpoints:
        ...     handle = checkpoints.save(fx.init(torch.nn.Linear(2, 1)))
        ...     checkpoints.wait()
        ...     handle.committed.step
        0
    """

    def __init__(
        self, folder: pathlib.Path, policy: RetentionPolicy, *, background: bool, on_error: str, overwrite: bool
    ) -> None:
        super().__init__(folder, policy, Ownership(folder, overwrite=overwrite))
        self._background, self._on_error, self._overwrite = background, on_error, overwrite
        self._lock = FolderLock(folder)
        self._snapshot = HostCopy()
        self._in_snapshot: Save | None = None  # the save whose copy the snapshot holds
        self._thread = JobThread()
        # The writer thread appends to these. The methods of a deque are atomic.
        self._committed: collections.deque[Committed] = collections.deque()
        self._errors: collections.deque[BaseException] = collections.deque()
        self._warnings: collections.deque[str] = collections.deque()
        self._deletion = Deletion(folder, self._warnings)

    @property
    def last(self) -> Entry | None:
        """The checkpoint that this object wrote or read last, or None."""
        return self._ownership.last

    def begin(self, state: TrainState, *, resume: bool, is_saved_as: Callable[[Entry], bool] | None = None) -> None:
        """Starts a session: determines the run that its checkpoints belong to, locks the folder, reserves memory.

        A resumed session continues the run of the newest checkpoint. So does a session whose first state is the one
        that this object last wrote or read. Any other session begins a new run.

        Args:
            state: The session's first state.
            resume: Whether the session continues from the checkpoint that ``read`` returned, if there was one.
            is_saved_as: Whether a checkpoint has ``state``. Compares the parameters by default.

        Raises:
            CheckpointError: If the folder has checkpoints of another run, cannot be written to, or is locked by
                another writer. In the first case nothing is written.
        """
        self.wait()
        found = None
        compare = is_saved_as or functools.partial(ownership.is_saved_as, state)
        try:
            # Lists again with the lock held, because another writer may have saved between the listing and the lock.
            while found != (found := ownership.contents(self.folder)):
                run = self._ownership.run_of_session(compare, found, resume=resume)
                self._lock.take()
            self._snapshot.reserve(state)
        except BaseException:
            self._release()
            raise
        self._run = run

    def reserve(self, state: TrainState) -> None:
        """Locks the folder and allocates memory for a copy of ``state``.

        Without this call the first ``save`` does both, and takes longer than later saves.

        Raises:
            CheckpointError: If the folder cannot be written to or is locked by another writer.
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
        others: OtherParts | None = None,
    ) -> Save:
        """Copies ``state``, commits the copy in the background, and deletes checkpoints that have expired.

        Waits for an unfinished earlier save, unless that is a snapshot. The first save locks the folder for this
        process until ``close``.

        Args:
            state: The state to save: that of a run, or a stacked one of several. It may be changed in place or donated
                once this method returns. A step that is saved twice keeps its newer checkpoint.
            metrics: Scalars by name, from which ``best`` selects.
            notes: Other conditions of bitwise equality, as text by name. ``read`` compares them.
            role: The purpose of the checkpoint. Rewinds do not return to a ``"session"`` checkpoint. A ``"snapshot"``
                is read by ``read_snapshot`` only and deleted by ``retain_snapshots``. Its state is not copied, so it
                must not change until ``wait`` returns.
            others: The other ranks, if ``state`` has the slices of rank 0 of a sharded state. Given by ``fit``.

        Returns:
            A handle, whose ``committed`` is set once the checkpoint is on disk.

        Raises:
            TypeError: If ``state`` is not a ``TrainState``.
            KeyError: If ``metrics`` lacks the metric that selects the best checkpoint.
            CheckpointError: If the folder has checkpoints of a run that this object has not read from, or if this
                save or the previous one failed. An error in the background is raised by the next method call.
        """
        if not isinstance(state, TrainState):
            raise TypeError(f"expected state to be a TrainState, got {describe(state)}. fxtrain.save takes any tree.")
        check_choice("role", role, retention.ROLES)
        state = of_batch(state)
        best = self.best_metric
        if metrics and best is not None and best not in metrics:
            raise KeyError(
                f"expected the metric {best!r} for checkpointer(best=...), got {', '.join(map(repr, metrics))}."
                f"{did_you_mean(best, metrics)}"
            )
        if role == "snapshot" or self._in_snapshot is None or self._in_snapshot.ended:
            self._report()
        else:
            self.wait()
        save = Save(role)
        try:
            self._lock.take()
        except CheckpointError as error:
            if self._on_error == "raise":
                raise
            self._warn(error)
            return save
        if self._run is None:
            self._run = self._ownership.run_of_save(ownership.contents(self.folder))
        try:
            if role == "snapshot":
                content = Direct(state)
            else:
                self._in_snapshot, content = save, self._snapshot
                content.take(state)
            if others is not None:
                others.announce()
        except CheckpointError as error:
            if self._on_error == "raise":
                raise
            self._warn(error)
            return save
        # The environment is read here, because the writer thread has another thread count.
        conditions = environment(device_of(state)) | {name: str(text) for name, text in (notes or {}).items()}
        commit = functools.partial(self._commit, save, self._run, content, dict(metrics or {}), conditions, others)
        self._submit(commit)
        if not self._background:
            self.wait()
        return save

    def retain_snapshots(self, steps: Iterable[int]) -> None:
        """Deletes the run's snapshots, except those of ``steps``, in the background after all earlier saves.

        Args:
            steps: The steps whose snapshots are kept.

        Raises:
            CheckpointError: If neither ``begin`` nor ``save`` was called before.
        """
        if self._run is None:
            raise CheckpointError(
                f"expected a session that saves to {self.folder}, got none. Call begin or save first."
            )
        self._submit(functools.partial(self._delete_snapshots, self._run, frozenset(steps)))

    def wait(self) -> None:
        """Blocks until all saves are finished.

        Raises:
            CheckpointError: If a save failed. With ``on_error="warn"`` a failure is a warning.
        """
        self._thread.wait()
        self._report()

    def _report(self) -> None:
        while self._warnings:
            warn(self._warnings.popleft(), RuntimeWarning)
        while self._errors:
            error = self._errors.popleft()
            try:
                if self._on_error == "raise" or not isinstance(error, CheckpointError):
                    raise error
                self._warn(error)
            finally:
                del error  # its traceback references this frame

    def committed(self) -> list[Committed]:
        """Returns the checkpoints committed since the last call, except snapshots, without waiting for others.

        Raises:
            CheckpointError: As ``wait``.
        """
        if not self._thread.busy:
            self.wait()
        return [self._committed.popleft() for _ in range(len(self._committed))]

    @property
    def best_metric(self) -> str | None:
        """Name of the metric that selects the best checkpoint, or None."""
        return self._policy.best

    @property
    def saving(self) -> bool:
        """Whether a save is unfinished or its outcome has not been reported."""
        return self._thread.busy or bool(self._committed or self._errors or self._warnings)

    def close(self) -> None:
        """Waits for unfinished saves, frees the memory and unlocks the folder. A later ``save`` locks it again.

        Raises:
            CheckpointError: As ``wait``.
        """
        try:
            self.wait()
        finally:
            self._snapshot = HostCopy()
            self._release()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Helpers

    def _release(self) -> None:
        """Unlocks the folder, after any writes that are still pending because a wait was interrupted."""
        self._run = None
        if self._thread.busy:
            self._submit(self._lock.release)
        else:
            self._lock.release()

    def _warn(self, error: CheckpointError) -> None:
        warn(f"{error} Training continues without this checkpoint.", RuntimeWarning)

    def _submit(self, job: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                job()
            except BaseException as error:
                self._errors.append(error)

        self._thread.submit(guarded)

    # In the writer thread

    def _commit(
        self,
        save: Save,
        run: str,
        content: Direct | HostCopy,
        metrics: dict[str, float],
        conditions: dict[str, str | int],
        others: OtherParts | None,
    ) -> None:
        try:
            self._deletion.clear()
            content.wait()
            head = facts(content, metrics, conditions)
            found = ownership.contents(self.folder)
            sequence = found[-1].sequence + 1 if found else 0
            step, metrics = head["step"], head["metrics"]
            assert step is not None
            path = self.folder / retention.name(sequence, step, run, save.role)
            folders.write(path, content, {**head, "run": run, "role": save.role, "sequence": sequence}, others)
            self._metrics[path.name] = metrics
            save.committed = Committed(step, path, metrics)
            if save.role != "snapshot":
                self._ownership.wrote(Entry(sequence, step, run, save.role, path))
                self._committed.append(save.committed)
        finally:
            try:
                if others is not None:
                    others.close()
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
        except CheckpointError as error:  # an unreadable metric may be the best
            self._deletion.warn_once(
                self.folder,
                f"expected readable metrics in {self.folder}, got an error, so nothing was deleted: {error}",
            )

    def _delete_snapshots(self, run: str, kept: frozenset[int]) -> None:
        snapshots = [entry for entry in retention.entries(self.folder) if (entry.run, entry.role) == (run, "snapshot")]
        self._deletion.delete(entry for entry in snapshots if entry.step not in kept)


@with_known_arguments
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
    """Returns a checkpointer, which saves and restores the checkpoints of one run in ``folder``.

    A folder belongs to one run. Beginning another run in it raises ``CheckpointError`` unless ``overwrite`` is set.

    Args:
        folder: The folder of the checkpoints, created at the first save.
        keep: The number of newest checkpoints to keep, or None to keep all.
        keep_every: Also keeps checkpoints whose step is a multiple of this.
        best: The name of an evaluation metric. Also keeps the checkpoint with its best value, of those that callbacks
            such as ``save`` and ``save_best`` request. The one at the end of a session does not count, because the best
            must not depend on where a run was interrupted. For a batch of runs, ``"loss"`` is the mean of the members,
            and the others are ``"loss/min"``, ``"loss/max"`` and ``"loss/member_0"``.
        mode: Whether the smallest (``"min"``) or largest (``"max"``) value of the metric is best.
        background: Whether ``save`` returns once the state is copied, at the cost of memory for one copy. If False,
            ``save`` blocks until the checkpoint is on disk.
        on_error: Whether a failed save, such as one to a full disk, raises (``"raise"``) or warns (``"warn"``).
        overwrite: Whether a run replaces other runs in the folder. Their checkpoints are deleted after its first
            commit.

    Raises:
        TypeError: If ``keep`` or ``keep_every`` is not an int.
        ValueError: If an argument is out of range, or ``folder`` is a file.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder, fx.checkpointer(folder, keep=1) as checkpoints:
        ...     for step in (1, 2):
        ...         _ = checkpoints.save(state.replace(step=torch.tensor(step)))
        ...     checkpoints.steps()
        [2]
    """
    check_new_path("folder", folder)
    if keep is not None:
        check_positive_int("keep", keep)
    if keep_every is not None:
        check_positive_int("keep_every", keep_every)
    check_choice("mode", mode, ("min", "max"))
    check_choice("on_error", on_error, ("raise", "warn"))
    path = pathlib.Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected folder to be a directory, got the file {path}. Choose another path.")
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"expected folder to be a directory, got a link to {path.readlink()}, which does not exist. Create that "
            "folder, or choose another path."
        )
    policy = RetentionPolicy(keep, keep_every, best, mode)
    return Checkpointer(path, policy, background=background, on_error=on_error, overwrite=overwrite)
