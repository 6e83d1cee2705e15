"""The ranks of a run write a checkpoint of a sharded state together, each the slices that it has.

Rank 0 creates the folder, writes its own slices and all whole leaves, and commits the folder once all ranks have
written their parts. The main threads of all ranks agree that they have copied their slices. Then their background
threads exchange the folder and what was written, over the process group of the background.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from fxtrain import tree
from fxtrain.checkpoint import CheckpointError, Role
from fxtrain.checkpoint._folder import write_part
from fxtrain.checkpoint._host_copy import Direct, HostCopy
from fxtrain.checkpoint._job_thread import JobThread
from fxtrain.checkpoint._leaf_table import Sliced, file_of
from fxtrain.checkpoint._parts import Layout, Written, leaves_of_part, sliced
from fxtrain.core import TrainState, Tree
from fxtrain.core._shard import is_shard
from fxtrain.distributed import LostRankError, Mesh

_COPIES = "copies of slices"
_FOLDER = "folder of a checkpoint"
_PARTS = "parts of a checkpoint"

Report = list[Written] | str
"""What a rank has written, or its error."""


class OtherRanks:
    """The other ranks, as seen from rank 0 during one save. An ``OtherParts``.

    Args:
        mesh: The ranks.
        layouts: What each rank has of each leaf.
    """

    def __init__(self, mesh: Mesh, layouts: Sequence[Layout]) -> None:
        self._mesh, self._layouts = mesh, layouts
        self._is_announced = self._are_waiting = self._are_writing = False

    def announce(self) -> None:
        """Waits until all ranks have copied their slices. See ``OtherParts``."""
        self._exchange(None)
        self._are_waiting = True

    def refuse(self, error: str) -> None:
        """Lets the other ranks know that rank 0 cannot save, unless they know that it does.

        Args:
            error: The reason.
        """
        if not self._is_announced:
            with contextlib.suppress(LostRankError, CheckpointError):
                self._exchange(error)

    def _exchange(self, error: str | None) -> None:
        self._is_announced = True
        _raise_first(self._mesh.gather(error, _COPIES), "copy its slices for a checkpoint")

    @contextlib.contextmanager
    def writing(self, folder: pathlib.Path) -> Iterator[None]:
        """A context during which the other ranks write to a folder. See ``OtherParts``."""
        self._are_waiting, self._are_writing = False, True
        # The ranks may have other working directories.
        self._mesh.broadcast(folder.absolute(), _FOLDER, group=self._mesh.background)
        try:
            yield
        finally:
            if self._are_writing:
                with contextlib.suppress(LostRankError):
                    self._reports([])

    def sliced(self, folder: pathlib.Path, own: Sequence[Written]) -> dict[int, Sliced]:
        """Waits for the other ranks, and returns the leaves in slices by index. See ``OtherParts``."""
        reports = self._reports([own[index] for index in leaves_of_part(self._layouts, 0)])
        _raise_first([each if isinstance(each, str) else None for each in reports], "write its part of a checkpoint")
        written = [each for each in reports if not isinstance(each, str)]
        for part, each in enumerate(written[1:], 1):
            if each and not (folder / file_of(part)).exists():
                raise CheckpointError(_no_file(folder / file_of(part), f"rank {part} has written"))
        return sliced(self._layouts, written)

    def close(self) -> None:
        """Lets the other ranks know that nothing is written, unless something was. See ``OtherParts``."""
        if self._are_waiting:
            self._are_waiting = False
            self._mesh.broadcast(None, _FOLDER, group=self._mesh.background)

    def _reports(self, own: Report) -> list[Report]:
        self._are_writing = False
        return self._mesh.gather(own, _PARTS, group=self._mesh.background)


class PartWriter:
    """Writes the slices of this rank, which is not rank 0, in a background thread.

    Args:
        mesh: The ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._thread, self._copy = JobThread(), HostCopy()
        self._lost: LostRankError | None = None

    def reserve(self, state: TrainState, layouts: Sequence[Layout]) -> None:
        """Allocates memory for a copy of the slices that this rank writes. See ``save``."""
        self._copy.reserve(_slices(state, layouts, self._mesh.world_rank))

    def save(self, state: TrainState, layouts: Sequence[Layout], role: Role) -> None:
        """Copies the slices of this rank, and writes the copy once rank 0 has created a folder.

        Args:
            state: The state of this rank. That of a snapshot is not copied.
            layouts: What each rank has of each leaf.
            role: The purpose of the checkpoint.
        """
        error, content = None, self._copy
        try:
            slices = _slices(state, layouts, self._mesh.world_rank)
            if role == "snapshot":
                content = Direct(slices)
            else:
                self.wait()
                content.take(slices)
        except LostRankError:
            raise
        except Exception as raised:  # rank 0 raises it, or warns
            error = f"{type(raised).__name__}: {raised}"
        if not any(self._mesh.gather(error, _COPIES)):
            self._thread.submit(lambda: self._run(content))

    def wait(self) -> None:
        """Blocks until this rank has written all parts, and rank 0 knows it.

        Raises:
            LostRankError: If another rank was lost meanwhile.
        """
        self._thread.wait()
        if self._lost is not None:
            lost, self._lost = self._lost, None
            try:
                raise lost
            finally:
                del lost  # its traceback references this frame

    def close(self) -> None:
        """Waits for unfinished parts, and frees the memory."""
        self._thread.wait()
        self._copy = HostCopy()

    # In the writer thread

    def _run(self, content: Direct | HostCopy) -> None:
        try:
            folder: pathlib.Path | None = self._mesh.broadcast(None, _FOLDER, group=self._mesh.background)
            if folder is not None:
                self._mesh.gather(self._written(folder, content), _PARTS, group=self._mesh.background)
        except LostRankError as error:
            self._lost = error

    def _written(self, folder: pathlib.Path, content: Direct | HostCopy) -> Report:
        """Writes the part of this rank, if it has any. Returns what was written, or the error."""
        try:
            content.wait()
            if not folder.is_dir():
                raise CheckpointError(_no_file(folder, "rank 0 has created"))
            return write_part(folder, self._mesh.world_rank, content) if content.places else []
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _slices(state: TrainState, layouts: Sequence[Layout], rank: int) -> Tree:
    leaves = tree.leaves(state, is_leaf=is_shard)
    return tuple(leaves[index].local for index in leaves_of_part(layouts, rank))


def _no_file(path: pathlib.Path, which: str) -> str:
    return (
        f"expected to find {path}, which {which}, got no such path. Save to a folder on a file system that all ranks "
        "share."
    )


def _raise_first(errors: Sequence[str | None], task: str) -> None:
    for rank, error in enumerate(errors):
        if error is not None:
            raise CheckpointError(
                f"expected each rank to {task}, got an error on rank {rank}: {error.rstrip('.')}. Earlier checkpoints "
                "are unchanged."
            )
