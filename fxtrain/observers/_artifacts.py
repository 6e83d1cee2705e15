"""Hands the files of a run to writers: checkpoints, and what other observers write."""

from __future__ import annotations

from collections.abc import Sequence

from fxtrain.core import Control, FitBegin, LoopEvent, Saved, TrainState, describe, did_you_mean
from fxtrain.core._rank import rank
from fxtrain.values import Artifact, Value
from fxtrain.writers import Writer
from fxtrain.writers._multi import MultiWriter


class ArtifactLog:
    """Passes artifacts to writers, with the facts of the run, because the first value begins a run of a service.

    Args:
        owner: The function that the writers were passed to, for errors.
        writers: The writers. Without any, nothing happens.
    """

    def __init__(self, owner: str, writers: Sequence[Writer]) -> None:
        self._log = MultiWriter(owner, writers) if writers else None
        self._facts: dict[str, Value] = {}

    def begin(self, event: FitBegin) -> None:
        """Keeps the facts of the run for the first artifact."""
        if event.run is not None and event.run.given():
            self._facts = {"run": event.run}

    def add(self, event: LoopEvent, step: int, name: str, artifact: Artifact) -> None:
        """Passes an artifact of a step to the writers, after the points that observers hold back."""
        if self._log is not None:
            self._log.flush_deferred()
            self._log.put(step, {**self._facts, name: artifact}, event)
            self._facts = {}

    def take_failure(self) -> Exception | None:
        """Returns the first error of a writer since the last call."""
        return None if self._log is None else self._log.take_failure()

    def flush(self) -> None:
        """Flushes the writers."""
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Closes the writers."""
        if self._log is not None:
            self._log.close()


def best_step(state: TrainState, slot: str) -> int:
    """Returns the step of the best evaluation so far, or -1.

    Args:
        state: The state after the fold.
        slot: The slot of ``save_best``, ``restore_best`` or ``early_stopping``.

    Raises:
        ValueError: There is no such slot.
    """
    # Imported here, because a run without these callbacks never gets here.
    from fxtrain.callbacks._early_stopping import EarlyStoppingState
    from fxtrain.callbacks._restore_best import RestoreBestState
    from fxtrain.callbacks._watched_metric import Best

    found = state.slots.get(slot)
    if isinstance(found, Best | RestoreBestState):
        return int(found.step)
    if isinstance(found, EarlyStoppingState):
        return int(found.best_step)
    raise ValueError(
        f"expected best to be the slot of save_best, restore_best or early_stopping, got {describe(slot)}."
        f"{did_you_mean(slot, state.slots)} Add fxtrain.callbacks.save_best(metric) to the callbacks, or name its slot."
    )


def write_checkpoints(*writers: Writer, best: str | None = None) -> WriteCheckpoints:
    """Passes each committed checkpoint to writers as the artifact ``checkpoint``, with the alias ``latest``.

    Weights & Biases and MLflow store a version of it. Other writers ignore it. The upload takes place in the writer's
    thread, from hard links, so that the checkpointer may delete the folder meanwhile. On close, a service has 20
    seconds for what is left. To upload the best checkpoints only, request saves with ``callbacks.save_best`` alone.

    Args:
        writers: Writers from ``fxtrain.writers``.
        best: The slot of ``save_best``, ``restore_best`` or ``early_stopping``, whose best checkpoint has the alias
            ``best``.

    Raises:
        ValueError: There is no writer. At run time, if there is no slot ``best``.

    Example:
        >>> import fxtrain as fx
        >>> writer = fx.writers.console()
        >>> observers = [fx.observers.write(writer), write_checkpoints(writer, best="save_best")]
    """
    return WriteCheckpoints(writers, best)


class WriteCheckpoints:
    """Passes checkpoints to writers. Created by ``write_checkpoints``."""

    def __init__(self, writers: Sequence[Writer], best: str | None) -> None:
        if not writers:
            raise ValueError(
                "expected at least one writer for write_checkpoints(), got none. Pass one, such as "
                "fxtrain.writers.wandb(folder)."
            )
        self._log, self._best = ArtifactLog("write_checkpoints", writers), best
        self.take_failure, self.flush, self.close = self._log.take_failure, self._log.flush, self._log.close

    def __call__(self, state: TrainState, event: FitBegin | Saved, control: Control) -> None:
        if rank() != 0:
            return
        if isinstance(event, FitBegin):
            self._log.begin(event)
            if self._best is not None:
                best_step(state, self._best)  # raises before the first step
            return
        is_best = self._best is not None and best_step(state, self._best) == event.step
        aliases = ("latest", "best") if is_best else ("latest",)
        self._log.add(event, event.step, "checkpoint", Artifact(event.path, "checkpoint", aliases))
