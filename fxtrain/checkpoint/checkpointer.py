"""Checkpointer: the checkpoints of a run, in one folder, written while the run goes on."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import shutil
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from fxtrain.checkpoint import folder as folders
from fxtrain.checkpoint import retention
from fxtrain.checkpoint.contents import Snapshot
from fxtrain.checkpoint.errors import CheckpointError, DamagedError
from fxtrain.checkpoint.lock import FolderLock
from fxtrain.checkpoint.retention import Entry, Policy
from fxtrain.checkpoint.selection import Where
from fxtrain.checkpoint.single import Extra, Restoration, device_of, facts, read
from fxtrain.core import TrainState

Tree = TypeVar("Tree")

_GONE = ".deleted-"


class Committed(NamedTuple):
    """A checkpoint that has reached the disk."""

    step: int
    path: pathlib.Path
    metrics: dict[str, float]


class Checkpointer:
    """The checkpoints of a run; made by ``checkpointer``.

    ``save`` returns when the state is copied, and a thread writes the copy. Everything else that asks about the folder
    waits for that thread first, so it sees every save that was made before.
    """

    def __init__(self, folder: pathlib.Path, policy: Policy, *, background: bool, on_error: str) -> None:
        self.folder = folder
        self._policy, self._background, self._on_error = policy, background, on_error
        self._lock = FolderLock(folder)
        self._snapshot = Snapshot()
        self._writer: concurrent.futures.Executor | None = None
        self._writing: list[concurrent.futures.Future[Committed | None]] = []
        self._committed: list[Committed] = []
        self._metrics: dict[str, dict[str, float]] = {}  # by folder name, of those that were read or written

    # Writing

    def reserve(self, state: TrainState) -> None:
        """Finds out whether the folder can be written to, and makes room in memory for a copy of ``state``.

        Without it the first ``save`` does so, and takes longer than the others.

        Raises:
            CheckpointError: If it cannot, or another writer is there.
        """
        self._lock.take()
        self._snapshot.reserve(state)
        self._start_writer().submit(int).result()  # a thread's first task costs more than the others

    def save(
        self, state: TrainState, metrics: Mapping[str, float] | None = None, *, notes: Mapping[str, str] | None = None
    ) -> None:
        """Copies ``state``, commits the copy in the background, and then deletes what the policy does not keep.

        A save that is still under way is waited for. The first save takes the folder for this process, until
        ``close``.

        Args:
            state: Any state. When this returns it may be changed in place or donated. A step that is there already is
                saved anew, and the newer one counts.
            metrics: Numbers to choose the best by.
            notes: What else must be equal for a resumed run to be bitwise equal, as text by name; ``read`` compares it.

        Raises:
            CheckpointError: If this save, or the one before, could not be written; one in the background tells the
                next call of any method.
        """
        if not isinstance(state, TrainState):
            raise TypeError(f"A {type(state).__name__} came, and a state is wanted: fxtrain.save takes any tree.")
        self.wait()
        try:
            self._lock.take()
            self._snapshot.take(state)
        except CheckpointError as error:
            self._failed(error)
            return
        writer = self._start_writer()
        said = {"threads": torch.get_num_threads(), **(notes or {})}  # the writer's thread has its own count
        self._writing = [
            writer.submit(self._commit, dict(metrics or {}), said, device_of(state)),
            writer.submit(self._delete_old),
        ]
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            CheckpointError: If one that was could not be written. With ``on_error="warn"`` that is a warning.
        """
        concurrent.futures.wait(self._writing)
        done, self._writing = self._writing, []
        self._committed += [
            committed for future in done if future.exception() is None and (committed := future.result()) is not None
        ]
        for error in [error for future in done if (error := future.exception()) is not None]:
            if not isinstance(error, CheckpointError):
                raise error
            self._failed(error)

    def committed(self) -> list[Committed]:
        """What has been committed since this was last called. It does not wait.

        Raises:
            CheckpointError: As ``wait``.
        """
        if all(future.done() for future in self._writing):
            self.wait()
        committed, self._committed = self._committed, []
        return committed

    @property
    def saving(self) -> bool:
        """Whether a save is under way, or there is news of one."""
        return bool(self._writing or self._committed)

    def close(self) -> None:
        """Waits for what is under way, frees the memory, and lets others write. A later ``save`` begins anew.

        Raises:
            CheckpointError: As ``wait``.
        """
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
            self._writer, self._snapshot = None, Snapshot()
            self._lock.release()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Reading

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        return sorted({entry.step for entry in self._entries()})

    def latest(self) -> int | None:
        """The step of the newest checkpoint: the last one saved, which after a rewind is not the largest step."""
        entries = self._entries()
        return entries[-1].step if entries else None

    def best(self) -> int | None:
        """The step of the checkpoint with the best metric, or None where none has it."""
        entry = self._policy.best_of(self._entries(), self._metrics_of)
        return None if entry is None else entry.step

    def newest_until(self, step: int) -> int | None:
        """The newest step, of at most so many, on the way that led to the latest; None where there is none."""
        return next((entry.step for entry in retention.line(self._entries()) if entry.step <= step), None)

    def restore(
        self,
        like: Tree,
        *,
        step: int | None = None,
        where: Where = None,
        extra: Extra = "keep",
        device: torch.device | str | None = None,
    ) -> Tree:
        """The state of ``step``, by default of the newest checkpoint; see ``fxtrain.restore``."""
        report = self.read(like, step=step, where=where, extra=extra, device=device)
        report.warn(stacklevel=2)
        return report.state

    def read(self, like: Any, *, step: int | None = None, **options: Any) -> Restoration:
        """``restore``, with a report of slots that were missing or are extra, and of what is different now.

        A newest checkpoint that is damaged is set aside: renamed to ``unreadable-...``, with a warning, and the next
        older one is taken. One that was asked for by its step is not replaced by another.

        Raises:
            CheckpointError: If there is no checkpoint, none can be read, or it does not fit ``like``.
        """
        entries = self._entries()
        if step is not None:
            chosen = [entry for entry in entries if entry.step == step]
            if not chosen:
                raise CheckpointError(
                    f"There is no step {step} in {self.folder}; the steps there are: {_shown(entries)}."
                )
            return read(chosen[-1].path, like, **options)
        damaged: list[tuple[Entry, DamagedError]] = []
        for entry in reversed(entries):
            try:
                report = read(entry.path, like, **options)
            except DamagedError as error:
                if entry.path.exists():  # else another process has deleted it meanwhile
                    damaged.append((entry, error))
            else:
                # Only now: had none been readable, all would keep their names.
                self._set_aside(damaged, entry)
                return report
        self._refuse_fresh_start(damaged)
        raise CheckpointError(f"There is no checkpoint in {self.folder}.")

    def __repr__(self) -> str:
        return f"Checkpointer({str(self.folder)!r}, steps {_shown(retention.entries(self.folder))})"

    def has_any(self) -> bool:
        """Whether there is anything to resume from.

        Raises:
            CheckpointError: If there only is what was set aside as unreadable: to begin anew would be no resume.
        """
        if self._entries():
            return True
        self._refuse_fresh_start([])
        return False

    # How it is done

    def _entries(self) -> list[Entry]:
        self.wait()
        return retention.entries(self.folder)

    def _start_writer(self) -> concurrent.futures.Executor:
        if self._writer is None:
            self._writer = concurrent.futures.ThreadPoolExecutor(1, "fxtrain-checkpoint")
        return self._writer

    def _commit(self, metrics: dict[str, float], notes: dict[str, Any], device: torch.device) -> Committed:
        """In the writer's thread."""
        # Nobody else writes here, so what is half written or half deleted is nobody's.
        for pattern in (f"{folders.UNFINISHED}*-step-*", f"{_GONE}*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        self._snapshot.wait()
        said = facts(self._snapshot, device, metrics)
        said["environment"].update(notes)
        entries = retention.entries(self.folder)
        aside = [int(path.name.removeprefix(retention.UNREADABLE)[:8]) for path in retention.unreadable(self.folder)]
        sequence = 1 + max([entry.sequence for entry in entries] + aside, default=-1)
        path = self.folder / retention.name(sequence, said["step"])
        folders.write(path, self._snapshot, {**said, "sequence": sequence})
        self._metrics[path.name] = said["metrics"]
        return Committed(said["step"], path, said["metrics"])

    def _delete_old(self) -> None:
        try:
            for entry in self._policy.to_delete(retention.entries(self.folder), self._metrics_of):
                # Renamed first: a deletion that is cut short must not leave half a checkpoint under its name.
                gone = entry.path.with_name(f"{_GONE}{entry.path.name}")
                entry.path.rename(gone)
                folders.sync_folder(self.folder)
                self._metrics.pop(entry.path.name, None)
                shutil.rmtree(gone)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint was saved, and an older one in {self.folder} could not be deleted: {error}."
            ) from error

    def _metrics_of(self, entry: Entry) -> dict[str, float]:
        if entry.path.name not in self._metrics:
            try:
                self._metrics[entry.path.name] = folders.read_manifest(entry.path)["metrics"]
            except CheckpointError:  # it will be found when it is read; the best it is not
                self._metrics[entry.path.name] = {}
        return self._metrics[entry.path.name]

    def _failed(self, error: CheckpointError) -> None:
        if self._on_error == "raise":
            raise error
        warnings.warn(f"{error} Training goes on.", RuntimeWarning, stacklevel=4)

    def _set_aside(self, damaged: list[tuple[Entry, DamagedError]], taken: Entry) -> None:
        for entry, error in damaged:
            aside = entry.path.with_name(f"{retention.UNREADABLE}{entry.path.name}")
            try:
                entry.path.rename(aside)
                folders.sync_folder(self.folder)
                where = f"It is kept as {aside.name}"
            except OSError as problem:
                where = f"It could not be renamed ({problem})"
            warnings.warn(f"{error} {where}, and step {taken.step} is restored.", UserWarning, stacklevel=4)

    def _refuse_fresh_start(self, damaged: list[tuple[Entry, DamagedError]]) -> None:
        said = [str(error) for _, error in damaged]
        said += [f"{path} was set aside before as unreadable." for path in retention.unreadable(self.folder)]
        if said:
            lines = "\n".join(f"  {line}" for line in said)
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be read:\n{lines}\nNothing was changed. To begin anew, give "
                "another folder or move these away."
            )


def checkpointer(
    folder: str | os.PathLike[str],
    *,
    keep: int | None = 3,
    keep_every: int | None = None,
    best: str | None = None,
    mode: str = "min",
    background: bool = True,
    on_error: str = "raise",
) -> Checkpointer:
    """The checkpoints of a run, in ``folder``.

    Args:
        folder: Where they are; made at the first save.
        keep: How many of the newest are kept; None keeps all.
        keep_every: Beside them, those whose step is a multiple of this.
        best: Beside them, the one with the best evaluation metric of this name.
        mode: ``"min"`` or ``"max"``: which is best.
        background: Whether ``save`` returns when the state is copied. Costs the memory of one copy; False costs the
            time of writing.
        on_error: ``"raise"``, or ``"warn"`` and go on when a save fails: a full disk, a vanished mount.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder, fx.checkpointer(folder, keep=1) as checkpoints:
        ...     for step in (1, 2):
        ...         checkpoints.save(state.replace(step=torch.tensor(step)))
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
    return Checkpointer(path, Policy(keep, keep_every, best, mode), background=background, on_error=on_error)


def _shown(entries: list[Entry]) -> str:
    return ", ".join(map(str, sorted({entry.step for entry in entries}))) or "none"
