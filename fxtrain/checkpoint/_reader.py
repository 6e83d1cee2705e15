"""Lists, selects and restores the checkpoints of one run."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from typing import TypeVar, Unpack, cast

import torch

from fxtrain.checkpoint import _retention as retention
from fxtrain.checkpoint._errors import CheckpointError, DamagedError
from fxtrain.checkpoint._manifest import read_entry
from fxtrain.checkpoint._match import Fresh, Where
from fxtrain.checkpoint._ownership import Ownership, contents, newest_run, shown
from fxtrain.checkpoint._restore import Extra, ReadOptions, Restoration, SelectOptions, read
from fxtrain.checkpoint._retention import Entry, RetentionPolicy
from fxtrain.core import Tree, warn
from fxtrain.core._html import html_view
from fxtrain.core._shard import refuse_shards
from fxtrain.disk import sync_folder

T = TypeVar("T")


class Reader:
    """The read-only part of a checkpointer. By default it reads the run that wrote the newest checkpoint.

    Args:
        folder: The folder of the checkpoints.
        policy: The retention policy, which defines the best checkpoint.
        ownership: Receives the checkpoints that are read.
    """

    def __init__(self, folder: pathlib.Path, policy: RetentionPolicy, ownership: Ownership) -> None:
        self.folder = folder
        self._policy, self._ownership = policy, ownership
        self._run: str | None = None  # set while this object may write: the folder is locked and belongs to this run
        self._metrics: dict[str, dict[str, float]] = {}  # by folder name, of checkpoints read or written so far

    def wait(self) -> None:
        """Blocks until all saves are finished."""

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in ascending order."""
        return sorted({entry.step for entry in self._listed()})

    def latest(self) -> int | None:
        """Returns the step of the checkpoint saved last, which after a rewind may not be the largest, or None."""
        entries = self._listed()
        return entries[-1].step if entries else None

    def best(self) -> int | None:
        """Returns the step of the checkpoint with the best metric, of those that callbacks requested, or None."""
        entry = self._policy.best_of(self._listed(), self._metrics_of)
        return None if entry is None else entry.step

    def newest_until(self, step: int) -> int | None:
        """Returns the newest step, at most ``step``, that a rewind can return to, or None."""
        return next((entry.step for entry in self._targets(step)), None)

    def has_any(self) -> bool:
        """Returns whether there is a checkpoint to resume from.

        Raises:
            CheckpointError: If all checkpoints were set aside as unreadable. Returning False would silently start over.
        """
        if self._listed():
            return True
        self._refuse_fresh_start([])
        return False

    def restore(
        self,
        like: T,
        *,
        step: int | None = None,
        where: Where = None,
        fresh: Fresh = None,
        extra: Extra = "keep",
        device: torch.device | str | None = None,
    ) -> T:
        """Returns the state of a checkpoint and warns about differences.

        Args:
            like: As for ``fxtrain.restore``. So are ``where``, ``fresh``, ``extra`` and ``device``.
            step: The checkpoint's step. By default the newest checkpoint that can be read is restored.
            where: What to restore.
            fresh: Parameters and buffers that are not restored.
            extra: What happens to slots that ``like`` lacks.
            device: The device for leaves that are on the meta device in ``like``.

        Raises:
            CheckpointError: If there is no checkpoint, none can be read, or it does not fit ``like``.
        """
        report = self.read(like, step=step, where=where, fresh=fresh, extra=extra, device=device)
        report.warn()
        return report.state

    def read(self, like: Tree, *, step: int | None = None, **options: Unpack[SelectOptions]) -> Restoration:
        """Restores a checkpoint and reports missing slots, extra slots and differences of the environment.

        Without ``step``, damaged checkpoints are renamed to ``unreadable-...`` with a warning, and the newest one that
        can be read is restored. With ``step``, a damaged checkpoint is an error.

        Args:
            like: As for ``fxtrain.restore``.
            step: The checkpoint's step, by default the newest.
            options: The other options of ``fxtrain.restore``, and ``notes`` to compare with those of ``save``.

        Raises:
            CheckpointError: If there is no checkpoint, none can be read, or it does not fit ``like``.
        """
        entries = self._listed()
        if step is not None:
            chosen = [entry for entry in entries if entry.step == step]
            if not chosen:
                there = f"steps {shown(entries)}" if entries else "none"
                raise CheckpointError(f"expected a checkpoint of step {step} in {self.folder}, got {there}.")
            report = _read(chosen[-1], like, options)
            self._has_read(chosen[-1])
            return report
        found = self._first_readable(reversed(entries), like, options)
        if isinstance(found, Restoration):
            return found
        self._refuse_fresh_start(found)
        raise CheckpointError(f"expected a checkpoint in {self.folder}, got none.")

    def read_newest_until(
        self, step: int, like: Tree, *, newer_than: int = -1, **options: Unpack[SelectOptions]
    ) -> Restoration | None:
        """Restores the newest readable checkpoint that a rewind to ``step`` can return to.

        Damaged checkpoints are set aside, as in ``read``.

        Args:
            step: The largest step to restore.
            like: As for ``read``.
            newer_than: Only checkpoints after this step are considered.
            options: As for ``read``.

        Returns:
            The restoration, or None if no such checkpoint can be read.

        Raises:
            CheckpointError: If the checkpoint does not fit ``like``, or the disk fails.
        """
        targets = [entry for entry in self._targets(step) if entry.step > newer_than]
        return self._first_readable_or_none(targets, like, options)

    def snapshots(self) -> set[int]:
        """Returns the steps of all snapshots."""
        return {entry.step for entry in self._snapshots()}

    def read_snapshot(self, step: int, like: Tree, **options: Unpack[SelectOptions]) -> Restoration | None:
        """Restores the newest snapshot of a step. A damaged snapshot is set aside, as in ``read``.

        Args:
            step: The snapshot's step.
            like: As for ``read``.
            options: As for ``read``.

        Returns:
            The restoration, or None if there is no snapshot of this step or it is damaged.

        Raises:
            CheckpointError: If the snapshot does not fit ``like``, or the disk fails.
        """
        chosen = [entry for entry in self._snapshots() if entry.step == step][-1:]
        return self._first_readable_or_none(chosen, like, options)

    def __repr__(self) -> str:
        try:
            steps = f"steps {shown(retention.listed(self._own()))}"
        except CheckpointError:  # the folder cannot be listed
            steps = "unreadable"
        return f"{type(self).__name__}({str(self.folder)!r}, {steps})"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.checkpoint._view import checkpoints_view  # loaded only in notebooks

        # Without waiting for unfinished saves.
        return checkpoints_view(f"{type(self).__name__} in {self.folder}", self._own(), self._policy)

    # Helpers

    def _own(self, prefix: str = "") -> list[Entry]:
        """Returns the checkpoints of this run, as ``retention.entries``."""
        run = newest_run(contents(self.folder)) if self._run is None else self._run
        return [entry for entry in retention.entries(self.folder, prefix) if entry.run == run]

    def _listed(self) -> list[Entry]:
        self.wait()
        return retention.listed(self._own())

    def _has_read(self, entry: Entry) -> None:
        if self._run is None:
            self._ownership.has_read(entry, contents(self.folder))

    def _targets(self, step: int) -> list[Entry]:
        """Returns the checkpoints that a rewind can return to, newest first.

        Session checkpoints are excluded, because a run must not depend on where it was interrupted.
        """
        led = retention.timeline(self._listed())
        return [entry for entry in led if entry.step <= step and entry.role == "trajectory"]

    def _snapshots(self) -> list[Entry]:
        self.wait()
        return [entry for entry in self._own() if entry.role == "snapshot"]

    def _metrics_of(self, entry: Entry) -> dict[str, float]:
        if entry.path.name not in self._metrics:
            try:
                self._metrics[entry.path.name] = read_entry(entry)["metrics"]
            except DamagedError:  # a restore reports the damage
                self._metrics[entry.path.name] = {}
        return self._metrics[entry.path.name]

    def _first_readable(
        self, entries: Iterable[Entry], like: Tree, options: SelectOptions
    ) -> Restoration | list[tuple[Entry, DamagedError]]:
        """Reads the first undamaged checkpoint and sets aside the damaged ones before it.

        Returns:
            The restoration. If all checkpoints are damaged, their entries and errors, without setting them aside.
        """
        damaged: list[tuple[Entry, DamagedError]] = []
        for entry in entries:
            try:
                report = _read(entry, like, options)
            except DamagedError as error:
                if os.path.lexists(entry.path):  # otherwise another process has deleted it
                    damaged.append((entry, error))
            else:
                self._set_aside(damaged, f", and step {entry.step} is restored")
                self._has_read(entry)
                return report
        return damaged

    def _first_readable_or_none(
        self, entries: Iterable[Entry], like: Tree, options: SelectOptions
    ) -> Restoration | None:
        found = self._first_readable(entries, like, options)
        if isinstance(found, Restoration):
            return found
        self._set_aside(found, "")
        return None

    def _set_aside(self, damaged: list[tuple[Entry, DamagedError]], instead: str) -> None:
        for entry, error in damaged:
            aside = entry.path.with_name(f"{retention.UNREADABLE}{entry.path.name}")
            try:
                entry.path.rename(aside)
                sync_folder(self.folder)
                where = f"It is kept as {aside.name}"
            except OSError as problem:
                where = f"It could not be renamed ({problem})"
            warn(f"{error} {where}{instead}.", UserWarning)

    def _refuse_fresh_start(self, damaged: list[tuple[Entry, DamagedError]]) -> None:
        lines = [str(error) for _, error in damaged]
        lines += [f"{entry.path} was set aside earlier as unreadable." for entry in self._own(retention.UNREADABLE)]
        if lines:
            listing = "\n".join(f"  {line}" for line in lines)
            raise CheckpointError(
                f"expected a readable checkpoint in {self.folder}, got:\n{listing}\nNothing was changed. To start "
                "over, use another folder or move these away."
            )


def _read(entry: Entry, like: Tree, options: SelectOptions) -> Restoration:
    """Reads a checkpoint, on all ranks if ``options`` say so."""
    together = options.get("together")
    given = cast(ReadOptions, {name: value for name, value in options.items() if name != "together"})
    if together is None:
        # Ranks that read by themselves might select different checkpoints, because a part may be damaged.
        refuse_shards(like, "checkpointer.restore(like)")

    def alone() -> Restoration:
        return read(entry.path, like, manifest=read_entry(entry), **given)

    return alone() if together is None else together(entry.path, alone)
