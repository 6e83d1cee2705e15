"""One checkpointer for all ranks of a run: rank 0 writes and selects, and all ranks read what it selected."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Unpack

from fxtrain.checkpoint import Checkpointer, Committed, Restoration, Role, Save
from fxtrain.checkpoint._restore import ReadOptions, read
from fxtrain.core import TrainState, Tree, warn
from fxtrain.core._shard import shards_in
from fxtrain.distributed._shards import on_main, placed_like, template
from fxtrain.loop._ranks import Ranks, described


class SharedCheckpointer:
    """The part of a ``Checkpointer`` that the loop uses, with the same results on all ranks.

    Only rank 0 locks the folder, writes to it and deletes from it. A finished save becomes known at the next meeting of
    the ranks, so all emit ``Saved`` at the same step. Each rank reads checkpoints itself, from the path that rank 0
    selects.

    After a rank has failed, there are no more meetings: rank 0 saves alone, and the others save nothing.

    Args:
        checkpointer: That of this rank. Only rank 0's is used.
        ranks: The ranks of the session.
    """

    def __init__(self, checkpointer: Checkpointer, ranks: Ranks) -> None:
        self._own, self._ranks, self._is_main = checkpointer, ranks, ranks.mesh.is_main
        # Saves that are not known to have ended, on rank 0 each with that of its own checkpointer.
        self._pending: list[tuple[Save, Save | None]] = []
        self._committed: list[Committed] = []
        ranks.has_news, ranks.exchange_news = self._has_news, self._exchange_news

    @property
    def best_metric(self) -> str | None:
        """Name of the metric that selects the best checkpoint, or None."""
        return self._own.best_metric

    # Reading

    def has_any(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self._ranks.shared("the list of checkpoints", self._own.has_any)

    def snapshots(self) -> set[int]:
        """Returns the steps of all snapshots."""
        return self._ranks.shared("the list of snapshots", self._own.snapshots)

    def read(self, like: Tree, **options: Unpack[ReadOptions]) -> Restoration:
        """Restores the newest readable checkpoint."""
        found = self._read(lambda like: self._own.read(like, **options), like, options)
        assert found is not None
        return found

    def read_newest_until(
        self, step: int, like: Tree, *, newer_than: int = -1, **options: Unpack[ReadOptions]
    ) -> Restoration | None:
        """Restores the newest readable checkpoint that a rewind to ``step`` can return to."""
        own = self._own
        return self._read(
            lambda like: own.read_newest_until(step, like, newer_than=newer_than, **options), like, options
        )

    def read_snapshot(self, step: int, like: Tree, **options: Unpack[ReadOptions]) -> Restoration | None:
        """Restores the newest snapshot of a step."""
        return self._read(lambda like: self._own.read_snapshot(step, like, **options), like, options)

    def _read(
        self, select: Callable[[Tree], Restoration | None], like: Tree, options: ReadOptions
    ) -> Restoration | None:
        """Restores on all ranks the checkpoint that rank 0 selects and restores first.

        Shards are cut from the whole tensors of the checkpoint, which are read to the host.
        """
        found = self._read_whole(select, blank := template(like), options)
        return found if found is None else dataclasses.replace(found, state=placed_like(found.state, blank, like))

    def _read_whole(
        self, select: Callable[[Tree], Restoration | None], like: Tree, options: ReadOptions
    ) -> Restoration | None:
        reports: list[Restoration] = []

        def selected() -> pathlib.Path | None:
            report = select(like)
            if report is None:
                return None
            reports.append(report)
            return report.path

        path = self._ranks.shared("the selected checkpoint", selected)
        if path is None:
            return None
        error: Exception | None = None
        if not self._is_main:
            try:
                reports.append(read(path, like, **options))
            except Exception as raised:
                error = raised
        texts = self._ranks.mesh.gather(None if error is None else described(error), "errors of reading")
        self._ranks.raise_first(texts, error, f"the restore of {path}")
        return reports[0]

    # Writing

    def begin(self, state: TrainState, *, resume: bool) -> None:
        """Starts a session: locks the folder."""
        whole = on_main(state) if shards_in(state) else state
        self._ranks.shared("the state of the folder", lambda: self._own.begin(whole, resume=resume))

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float] | None = None,
        *,
        notes: Mapping[str, str] | None = None,
        role: Role = "trajectory",
    ) -> Save:
        """Saves on rank 0. The handle has the result after the meeting at which it becomes known."""
        save = Save(role)
        if shards_in(state):
            if self._ranks.is_over:
                save.ended = True
                if self._is_main:
                    warn(
                        "expected all ranks for a checkpoint of a sharded state, got a rank that has failed, so the "
                        "last state is not saved. Resume from the newest checkpoint.",
                        RuntimeWarning,
                    )
                return save
            state = on_main(state)
        own = self._own.save(state, metrics, notes=notes, role=role) if self._is_main else None
        if role != "snapshot" and (self._is_main or not self._ranks.is_over):
            self._pending.append((save, own))
        return save

    def retain_snapshots(self, steps: Iterable[int]) -> None:
        """Deletes the other snapshots."""
        if self._is_main:
            self._own.retain_snapshots(steps)

    @property
    def saving(self) -> bool:
        """Whether a save has not been reported, as far as all ranks know."""
        return bool(self._pending or self._committed)

    def wait(self) -> None:
        """Blocks until all saves are finished, on all ranks."""
        error: Exception | None = None
        if self._is_main:
            try:
                self._own.wait()
            except Exception as raised:
                error = raised
        if self._ranks.is_over:
            if error is not None:
                raise error
            self._settle(self._results())
            return
        if error is not None:
            raise error  # reported to the other ranks, which wait at the meeting below
        self._ranks.meet("the end of saves")
        if self._pending:
            self._exchange_news()

    def committed(self) -> list[Committed]:
        """Returns the checkpoints committed since the last call, as far as all ranks know."""
        committed, self._committed = self._committed, []
        return committed

    def close(self) -> None:
        """Waits for unfinished saves and unlocks the folder."""
        if self._is_main:
            self._own.close()

    def _has_news(self) -> bool:
        own = [each for _, each in self._pending if each is not None]
        return bool(own) and (not self._own.saving or any(each.ended or each.committed for each in own))

    def _exchange_news(self) -> None:
        """Makes known which saves have ended. Raises the error of one that failed."""
        error: Exception | None = None
        results: list[Committed | bool] = []
        if self._is_main:
            try:
                self._own.committed()  # raises or warns of failures
            except Exception as raised:
                error = raised
            results = self._results()
        text = None if error is None else described(error)
        mesh = self._ranks.mesh
        text, results = mesh.broadcast((text, results), "news of saves")
        self._settle(results)
        self._ranks.raise_first([text, *[None] * (mesh.size - 1)], error, "a save")

    def _results(self) -> list[Committed | bool]:
        """Returns for each pending save the checkpoint, or whether it is still under way."""
        busy = self._own.saving
        return [
            own.committed if own is not None and own.committed is not None else bool(own and not own.ended and busy)
            for _, own in self._pending
        ]

    def _settle(self, results: list[Committed | bool]) -> None:
        pending, self._pending = self._pending, []
        for each, result in zip(pending, results, strict=True):
            if result is True:
                self._pending.append(each)
            elif isinstance(result, Committed):
                each[0].committed = result
                self._committed.append(result)
            each[0].ended = result is not True


CheckpointStore = Checkpointer | SharedCheckpointer
"""What the loop saves to and restores from."""
