"""Reader: the checkpoints of one run in a folder, listed, chosen and restored."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from fxtrain.checkpoint import _ownership as ownership
from fxtrain.checkpoint import _retention as retention
from fxtrain.checkpoint._errors import CheckpointError, DamagedError
from fxtrain.checkpoint._manifest import read_entry
from fxtrain.checkpoint._retention import Entry, Policy
from fxtrain.checkpoint._selection import Fresh, Where
from fxtrain.checkpoint._single import Extra, Restoration, read
from fxtrain.disk import sync_folder

Tree = TypeVar("Tree")


class Reader:
    """The reading half of a checkpointer. It sees the run that wrote the newest checkpoint."""

    def __init__(self, folder: pathlib.Path, policy: Policy) -> None:
        self.folder = folder
        self._policy = policy
        self._metrics: dict[str, dict[str, float]] = {}  # by folder name, of those that were read or written

    def wait(self) -> None:
        """Returns when no save is under way."""

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        return sorted({entry.step for entry in self._listed()})

    def latest(self) -> int | None:
        """The step of the newest checkpoint: the last one saved, which after a rewind is not the largest step."""
        entries = self._listed()
        return entries[-1].step if entries else None

    def best(self) -> int | None:
        """The step of the checkpoint with the best metric, or None where none has it."""
        entry = self._policy.best_of(self._listed(), self._metrics_of)
        return None if entry is None else entry.step

    def newest_until(self, step: int) -> int | None:
        """The newest step that a rewind to ``step`` or before can return to; None where there is none."""
        return next((entry.step for entry in self._targets(step)), None)

    def has_any(self) -> bool:
        """Whether there is anything to resume from.

        Raises:
            CheckpointError: If there only is what was set aside as unreadable: a fresh start would be no resume.
        """
        if self._listed():
            return True
        self._refuse_fresh_start([])
        return False

    def restore(
        self,
        like: Tree,
        *,
        step: int | None = None,
        where: Where = None,
        fresh: Fresh = None,
        extra: Extra = "keep",
        device: torch.device | str | None = None,
    ) -> Tree:
        """The state of ``step``, by default of the newest checkpoint; see ``fxtrain.restore``."""
        report = self.read(like, step=step, where=where, fresh=fresh, extra=extra, device=device)
        report.warn(stacklevel=2)
        return report.state

    def read(self, like: Any, *, step: int | None = None, **options: Any) -> Restoration:
        """``restore``, with a report of slots that were missing or are extra, and of what is different now.

        A newest checkpoint that is damaged is set aside: renamed to ``unreadable-...``, with a warning, and the next
        older one is taken. One that was asked for by its step is not replaced by another.

        Raises:
            CheckpointError: If there is no checkpoint, none can be read, or it does not fit ``like``.
        """
        entries = self._listed()
        if step is not None:
            chosen = [entry for entry in entries if entry.step == step]
            if not chosen:
                raise CheckpointError(
                    f"There is no step {step} in {self.folder}; the steps there are: {_shown(entries)}."
                )
            report = read(chosen[-1].path, like, manifest=read_entry(chosen[-1]), **options)
            self._has_read(chosen[-1])
            return report
        found = self._first_readable(reversed(entries), like, options)
        if isinstance(found, Restoration):
            return found
        self._refuse_fresh_start(found)
        raise CheckpointError(f"There is no checkpoint in {self.folder}.")

    def read_newest_until(self, step: int, like: Any, *, newer_than: int = -1, **options: Any) -> Restoration | None:
        """``read`` of the checkpoint that ``newest_until`` names, or of the next older one if that is damaged.

        Damaged ones are set aside as ``read`` does.

        Args:
            step: As for ``newest_until``.
            like: As for ``read``. So are the options.
            newer_than: Checkpoints of this step or before are not read, because the caller has such a state already.

        Returns:
            None if there is none that can be read.

        Raises:
            CheckpointError: If it does not fit ``like``, or the disk fails.
        """
        targets = [entry for entry in self._targets(step) if entry.step > newer_than]
        found = self._first_readable(targets, like, options)
        if isinstance(found, Restoration):
            return found
        self._set_aside(found, "")
        return None

    def snapshots(self) -> set[int]:
        """The steps that there are snapshots of."""
        return {entry.step for entry in self._snapshots()}

    def read_snapshot(self, step: int, like: Any, **options: Any) -> Restoration | None:
        """``read`` of the newest snapshot of a step; None if there is none, or it is damaged and set aside.

        Raises:
            CheckpointError: If it does not fit ``like``, or the disk fails.
        """
        chosen = [entry for entry in self._snapshots() if entry.step == step][-1:]
        found = self._first_readable(chosen, like, options)
        if isinstance(found, Restoration):
            return found
        self._set_aside(found, "")
        return None

    def __repr__(self) -> str:
        entries = retention.listed(self._own(retention.entries(self.folder)))
        return f"{type(self).__name__}({str(self.folder)!r}, steps {_shown(entries)})"

    # For the writing half

    def _run_to_read(self) -> str | None:
        return ownership.newest_run(ownership.contents(self.folder))

    def _has_read(self, entry: Entry) -> None:
        """Called after each restore."""

    # How it is done

    def _own(self, entries: list[Entry]) -> list[Entry]:
        run = self._run_to_read()
        return [entry for entry in entries if entry.run == run]

    def _listed(self) -> list[Entry]:
        self.wait()
        return retention.listed(self._own(retention.entries(self.folder)))

    def _targets(self, step: int) -> list[Entry]:
        """What a rewind can return to, newest first. Session saves are none: a run must not depend on interruptions."""
        led = retention.line(self._listed())
        return [entry for entry in led if entry.step <= step and entry.role == "trajectory"]

    def _snapshots(self) -> list[Entry]:
        self.wait()
        return [entry for entry in self._own(retention.entries(self.folder)) if entry.role == "snapshot"]

    def _metrics_of(self, entry: Entry) -> dict[str, float]:
        if entry.path.name not in self._metrics:
            try:
                self._metrics[entry.path.name] = read_entry(entry)["metrics"]
            except DamagedError:  # a restore will report it; it cannot be the best
                self._metrics[entry.path.name] = {}
        return self._metrics[entry.path.name]

    def _first_readable(
        self, entries: Iterable[Entry], like: Any, options: Mapping[str, Any]
    ) -> Restoration | list[tuple[Entry, DamagedError]]:
        """Reads the first that is not damaged, and sets aside those before it.

        Returns:
            The restoration; or all of them with their errors. These keep their names.
        """
        damaged: list[tuple[Entry, DamagedError]] = []
        for entry in entries:
            try:
                report = read(entry.path, like, manifest=read_entry(entry), **options)
            except DamagedError as error:
                if os.path.lexists(entry.path):  # else another process has deleted it meanwhile
                    damaged.append((entry, error))
            else:
                self._set_aside(damaged, f", and step {entry.step} is restored")
                self._has_read(entry)
                return report
        return damaged

    def _set_aside(self, damaged: list[tuple[Entry, DamagedError]], instead: str) -> None:
        for entry, error in damaged:
            aside = entry.path.with_name(f"{retention.UNREADABLE}{entry.path.name}")
            try:
                entry.path.rename(aside)
                sync_folder(self.folder)
                where = f"It is kept as {aside.name}"
            except OSError as problem:
                where = f"It could not be renamed ({problem})"
            warnings.warn(f"{error} {where}{instead}.", UserWarning, stacklevel=5)

    def _refuse_fresh_start(self, damaged: list[tuple[Entry, DamagedError]]) -> None:
        lines = [str(error) for _, error in damaged]
        aside = self._own(retention.unreadable(self.folder))
        lines += [f"{entry.path} was set aside before as unreadable." for entry in aside]
        if lines:
            listing = "\n".join(f"  {line}" for line in lines)
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be read:\n{listing}\nNothing was changed. To start over, give "
                "another folder or move these away."
            )


def _shown(entries: Iterable[Entry]) -> str:
    return ownership.shown({entry.step for entry in entries})
