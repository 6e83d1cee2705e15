"""One checkpointer for all ranks of a run: rank 0 writes and selects, and all ranks read what it selected."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Unpack

from fxtrain import tree
from fxtrain.checkpoint import Checkpointer, CheckpointError, Committed, DamagedError, Restoration, Role, Save
from fxtrain.checkpoint._host_copy import host_bytes
from fxtrain.checkpoint._parts import Layout, layout_of, local_state
from fxtrain.checkpoint._restore import ReadOptions, SelectOptions, read
from fxtrain.core import TrainState, Tree, warn
from fxtrain.core._shard import shards_in
from fxtrain.distributed import FailedRankError, LostRankError
from fxtrain.loop._part_writer import OtherRanks, PartWriter
from fxtrain.loop._ranks import Ranks, described

_CHECKPOINT = "the next checkpoint to read"
_ERRORS = "errors of reading"


class SharedCheckpointer:
    """The part of a ``Checkpointer`` that the loop uses, with the same results on all ranks.

    Only rank 0 locks the folder, commits to it and deletes from it. Of a sharded state each rank writes its slices, of
    any other rank 0 writes all. A finished save becomes known at the next meeting of the ranks, so all emit ``Saved``
    at the same step. Each rank reads checkpoints itself, from the path that rank 0 selects.

    After a rank has failed, there are no more meetings: rank 0 saves alone, and the others save nothing.

    Args:
        checkpointer: That of this rank. Only rank 0's is used.
        ranks: The ranks of the session.
    """

    def __init__(self, checkpointer: Checkpointer, ranks: Ranks) -> None:
        self._own, self._ranks, self._is_main = checkpointer, ranks, ranks.mesh.is_main
        self._parts = None if self._is_main else PartWriter(ranks.mesh)
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
        found = self._read(lambda options: self._own.read(like, **options), like, options)
        assert found is not None
        return found

    def read_newest_until(
        self, step: int, like: Tree, *, newer_than: int = -1, **options: Unpack[ReadOptions]
    ) -> Restoration | None:
        """Restores the newest readable checkpoint that a rewind to ``step`` can return to."""
        own = self._own
        return self._read(
            lambda options: own.read_newest_until(step, like, newer_than=newer_than, **options), like, options
        )

    def read_snapshot(self, step: int, like: Tree, **options: Unpack[ReadOptions]) -> Restoration | None:
        """Restores the newest snapshot of a step."""
        return self._read(lambda options: self._own.read_snapshot(step, like, **options), like, options)

    def _read(
        self, select: Callable[[SelectOptions], Restoration | None], like: Tree, options: ReadOptions
    ) -> Restoration | None:
        """Restores the checkpoint that rank 0 selects among those that are undamaged for all ranks."""
        self._ranks.meet("the selection of a checkpoint")
        return self._select(select, options) if self._is_main else self._follow(like, options)

    def _select(
        self, select: Callable[[SelectOptions], Restoration | None], options: ReadOptions
    ) -> Restoration | None:
        found, error = None, None
        try:
            found = select({**options, "together": self._read_together})
        except LostRankError:
            raise
        except Exception as raised:
            error = raised
        self._end_of_reading(error, is_found=found is not None)
        return found

    def _read_together(self, path: pathlib.Path, alone: Callable[[], Restoration]) -> Restoration:
        """Reads a checkpoint while the other ranks do in ``_follow``."""
        mesh = self._ranks.mesh
        mesh.broadcast(path, _CHECKPOINT)
        report, error = _attempt(alone)
        outcomes = mesh.gather(_outcome(error), _ERRORS)
        if report is None:
            assert error is not None
            try:
                raise error
            finally:
                del error  # its traceback references this frame
        failed = {rank: each for rank, each in enumerate(outcomes) if each is not None}
        unlike_damage = {
            rank: f"the restore of {path}: {text}" for rank, (text, damage) in failed.items() if not damage
        }
        if unlike_damage:
            raise FailedRankError.from_reports(unlike_damage)
        for rank, (_, damage) in failed.items():
            raise DamagedError(f"{damage} Rank {rank} has read it.")
        return report

    def _follow(self, like: Tree, options: ReadOptions) -> Restoration | None:
        """Reads the checkpoints that rank 0 selects, until one is undamaged for all ranks."""
        mesh = self._ranks.mesh
        report, error = None, None
        while (path := mesh.broadcast(None, _CHECKPOINT)) is not None:
            report, error = _attempt(lambda path=path: read(path, like, **options))
            mesh.gather(_outcome(error), _ERRORS)
        return report if self._end_of_reading(error) else None

    def _end_of_reading(self, error: Exception | None, *, is_found: bool = False) -> bool:
        """Ends the reading of all ranks. Returns whether a checkpoint was read."""
        mesh = self._ranks.mesh
        if self._is_main:
            mesh.broadcast(None, _CHECKPOINT)
        text = None if error is None else described(error)
        text, is_found = mesh.broadcast((text, is_found), "the result of reading")
        self._ranks.raise_first([text, *[None] * (mesh.world_size - 1)], error, "the restore of a checkpoint")
        return is_found

    # Writing

    def begin(self, state: TrainState, *, resume: bool) -> None:
        """Starts a session: locks the folder."""
        if not shards_in(state):
            self._ranks.shared("the state of the folder", lambda: self._own.begin(state, resume=resume))
            return
        is_saved = not resume and self._is_saved(state)
        layouts = self._layouts(state)
        if self._parts is not None:
            self._parts.reserve(state, layouts)
        given = local_state(state)
        self._ranks.shared(
            "the state of the folder",
            lambda: self._own.begin(given, resume=resume, is_saved_as=lambda entry: is_saved),
        )

    def _is_saved(self, state: TrainState) -> bool:
        """Returns whether rank 0's last checkpoint has the step, the seed and the parameters of a sharded state."""
        step, last = int(state.step), self._own.last
        is_candidate = last is not None and last.step == step > 0
        path = self._ranks.shared("the last checkpoint", lambda: last.path if last and is_candidate else None)
        if path is None:
            return False
        is_equal = False
        with contextlib.suppress(CheckpointError):
            found = read(path, state, where=["state.seed", "state.params"]).state
            pairs = zip(*(tree.leaves((each.seed, each.params)) for each in (found, state)), strict=True)
            is_equal = all(host_bytes(one) == host_bytes(other) for one, other in pairs)
        return all(self._ranks.mesh.gather(is_equal, "comparisons with the last checkpoint"))

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float] | None = None,
        *,
        notes: Mapping[str, str] | None = None,
        role: Role = "trajectory",
    ) -> Save:
        """Saves on rank 0. The handle has the result after the meeting at which it becomes known."""
        save, own = Save(role), None
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
            layouts = self._layouts(state)
            if self._parts is not None:
                self._parts.save(state, layouts, role)
            else:
                others = OtherRanks(self._ranks.mesh, layouts)
                try:
                    own = self._own.save(local_state(state), metrics, notes=notes, role=role, others=others)
                finally:
                    others.refuse("rank 0 cannot save")
        elif self._is_main:
            own = self._own.save(state, metrics, notes=notes, role=role)
        if role != "snapshot" and (self._is_main or not self._ranks.is_over):
            self._pending.append((save, own))
        return save

    def _layouts(self, state: TrainState) -> list[Layout]:
        return self._ranks.mesh.gather(layout_of(state), "layouts of a sharded state")

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
        if self._parts is None:
            try:
                self._own.wait()
            except Exception as raised:
                error = raised
        elif not self._ranks.is_over:
            self._parts.wait()
        if error is not None:
            try:
                raise error  # reported to the other ranks, which wait at the meeting below
            finally:
                del error  # its traceback references this frame
        if self._ranks.is_over:
            self._settle(self._results())
            return
        self._ranks.meet("the end of saves")
        if self._pending:
            self._exchange_news()

    def committed(self) -> list[Committed]:
        """Returns the checkpoints committed since the last call, as far as all ranks know."""
        committed, self._committed = self._committed, []
        return committed

    def close(self) -> None:
        """Waits for unfinished saves and unlocks the folder."""
        if self._parts is None:
            self._own.close()
        else:
            self._parts.close()

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
        self._ranks.raise_first([text, *[None] * (mesh.world_size - 1)], error, "a save")

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


def _attempt(reading: Callable[[], Restoration]) -> tuple[Restoration | None, Exception | None]:
    try:
        return reading(), None
    except Exception as error:
        return None, error


def _outcome(error: Exception | None) -> tuple[str, str | None] | None:
    """Returns the text of an error, and that of a damage if it is one."""
    return None if error is None else (described(error), str(error) if isinstance(error, DamagedError) else None)


CheckpointStore = Checkpointer | SharedCheckpointer
"""What the loop saves to and restores from."""
