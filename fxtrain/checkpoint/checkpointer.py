"""Checkpointer: the checkpoints of a run, in one folder, and which of them are kept."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from fxtrain.checkpoint.pack import CheckpointError
from fxtrain.checkpoint.single import Restoration, read, read_manifest, sync_folder, write
from fxtrain.core import TrainState

_NAME = re.compile(r"(\d{8})-step-(\d{9,})")
_GONE = ".deleted-"


class Entry(NamedTuple):
    """A committed checkpoint. The sequence number orders them: after a rewind a later one has a smaller step."""

    sequence: int
    step: int
    path: pathlib.Path


class Checkpointer:
    """The checkpoints of a run; made by ``checkpointer``."""

    def __init__(
        self, folder: pathlib.Path, *, keep: int | None, keep_every: int | None, best: str | None, mode: str
    ) -> None:
        self.folder = folder
        self._keep, self._keep_every, self._best, self._mode = keep, keep_every, best, mode

    def save(self, state: TrainState, *, metrics: Mapping[str, float] | None = None) -> pathlib.Path:
        """Commits ``state``, then deletes what the policy does not keep.

        Args:
            state: Any state. A step that is there already is saved anew, and the newer one counts.
            metrics: Numbers to choose the best by.

        Returns:
            The folder of the new checkpoint.
        """
        entries = self._entries()
        sequence = entries[-1].sequence + 1 if entries else 0
        name = f"{sequence:08d}-step-{int(state.step):09d}"
        path = write(self.folder / name, state, {"metrics": dict(metrics or {}), "sequence": sequence})
        self._delete_old()
        return path

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        return sorted({entry.step for entry in self._entries()})

    def latest(self) -> int | None:
        """The step of the newest checkpoint: the last one saved, which after a rewind is not the largest step."""
        entries = self._entries()
        return entries[-1].step if entries else None

    def best(self) -> int | None:
        """The step of the checkpoint with the best metric, or None where none has it."""
        entry = self._best_entry(self._entries())
        return None if entry is None else entry.step

    def restore(self, like: TrainState, *, step: int | None = None) -> TrainState:
        """The state of ``step``, by default of the newest checkpoint; see ``fxtrain.restore``."""
        return self.read(like, step=step).state

    def read(self, like: TrainState, *, step: int | None = None) -> Restoration:
        """``restore``, with a report of slots that were missing or are extra, and of what is different now."""
        entries = self._entries()
        chosen = [entry for entry in entries if step is None or entry.step == step]
        if not chosen:
            there = ", ".join(map(str, sorted({entry.step for entry in entries}))) or "none"
            wanted = "checkpoint" if step is None else f"step {step}"
            raise CheckpointError(f"There is no {wanted} in {self.folder}; the steps there are: {there}.")
        report = read(chosen[-1].path, like)
        for line in report.different:
            warnings.warn(f"The resumed run may differ in the last bits: {line}.", UserWarning, stacklevel=3)
        return report

    def _entries(self) -> list[Entry]:
        """What is committed, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(match, path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return sorted(Entry(int(match[1]), int(match[2]), path) for match, path in found)

    def _best_entry(self, entries: list[Entry]) -> Entry | None:
        if self._best is None:
            return None
        sign = 1 if self._mode == "min" else -1
        scored = []
        for entry in entries:
            value = read_manifest(entry.path)["metrics"].get(self._best)
            if value is not None and value == value:  # a NaN is never the best
                scored.append((sign * value, entry))
        return min(scored, default=(0, None), key=lambda pair: pair[0])[1]

    def _delete_old(self) -> None:
        entries = self._entries()
        newest = {entry.step: entry for entry in entries}
        kept = set(entries if self._keep is None else entries[-self._keep :])
        if self._keep_every is not None:
            kept |= {entry for entry in newest.values() if entry.step % self._keep_every == 0}
        best = self._best_entry(entries)
        kept |= set() if best is None else {best}
        for entry in entries:
            # Of one step the newer save counts, whatever the policy keeps.
            if entry not in kept or newest[entry.step] is not entry:
                # Renamed first: a deletion that is cut short must not leave half a checkpoint under its name.
                gone = entry.path.with_name(f"{_GONE}{entry.path.name}")
                entry.path.rename(gone)
                sync_folder(self.folder)
                shutil.rmtree(gone, ignore_errors=True)
        for path in self.folder.glob(f"{_GONE}*"):
            shutil.rmtree(path, ignore_errors=True)

    def __repr__(self) -> str:
        steps: Any = self.steps()
        return f"Checkpointer({str(self.folder)!r}, steps {steps})"


def checkpointer(
    folder: str | os.PathLike[str],
    *,
    keep: int | None = 3,
    keep_every: int | None = None,
    best: str | None = None,
    mode: str = "min",
) -> Checkpointer:
    """The checkpoints of a run, in ``folder``.

    Args:
        folder: Where they are; made at the first save.
        keep: How many of the newest are kept; None keeps all.
        keep_every: Beside them, those whose step is a multiple of this.
        best: Beside them, the one with the best evaluation metric of this name.
        mode: ``"min"`` or ``"max"``: which is best.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = fx.checkpointer(folder, keep=1)
        ...     for step in (1, 2):
        ...         path = checkpoints.save(state.replace(step=torch.tensor(step)))
        ...     checkpoints.steps()
        [2]
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep!r}: at least 1, or None to keep all.")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every={keep_every!r}: a number of steps, 1 or more, is wanted.")
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r}: 'min' or 'max' is wanted.")
    path = pathlib.Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and checkpoints need a folder.")
    return Checkpointer(path, keep=keep, keep_every=keep_every, best=best, mode=mode)
