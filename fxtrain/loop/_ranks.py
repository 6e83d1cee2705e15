"""Agreement of all ranks of a run on the facts that differ between processes.

A signal, the clock, the end of the data, an error and a finished save are facts of one process. If they reached the
control of a run directly, one rank would stop, save or rewind while the others wait for it in a collective. So each is
exchanged first, in one small all-reduce before each dispatch of a step or an evaluation step.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import xxhash

from fxtrain import tree
from fxtrain.checkpoint._host_copy import host_bytes
from fxtrain.core import TrainState
from fxtrain.core._shard import Shard, is_shard
from fxtrain.data import Source
from fxtrain.distributed import FailedRankError, LostRankError, Mesh
from fxtrain.distributed._rank_rows import split
from fxtrain.loop._interrupts import Interrupts

T = TypeVar("T")
D = TypeVar("D", Source, Source | None)

_NOTHING = torch.iinfo(torch.int64).min  # the neutral element of a maximum


class Ranks:
    """The ranks of one session, as seen from one of them.

    All ranks must call ``meet`` equally often and for the same purpose, because their calls are one collective.

    Args:
        mesh: The ranks.
        interrupts: The signals of this process. They take effect at a meeting, on all ranks.
        clock: Returns the time in seconds. Rank 0's is used.

    Attributes:
        data_wait: Seconds that rank 0 waited for the batches before the latest meeting.
        duration: Seconds per step of rank 0's latest dispatch before the latest meeting.
        is_over: Whether a rank has failed, so that there are no more meetings.
    """

    def __init__(self, mesh: Mesh, interrupts: Interrupts, clock: Callable[[], float]) -> None:
        self.mesh, self._interrupts, self._clock = mesh, interrupts, clock
        self._began, self._time = clock(), 0.0
        self.data_wait = self.duration = 0.0
        self._measured = 0.0  # duration of this rank's latest dispatch
        self._step = 0  # of the latest meeting
        self._is_dispatching = self.is_over = False
        # Set by the checkpointer: whether rank 0 has news of saves, and their exchange between all ranks.
        self.has_news: Callable[[], bool] = bool
        self.exchange_news: Callable[[], None] = lambda: None

    def time(self) -> float:
        """Returns rank 0's seconds since the session began, at the latest meeting."""
        return self._time

    def meet(self, purpose: str | None, step: int | None = None, position: int = 0, *, data_wait: float = 0.0) -> None:
        """Waits for all ranks, and adopts the signals of all and the clock of rank 0.

        Args:
            purpose: What follows, for errors. None for a rank that has left the usual order because of a signal.
            step: The number of the step. Defaults to that of the latest meeting.
            position: The data position, or the index of a batch. It must be the same on all ranks, as must ``purpose``
                and ``step``.
            data_wait: Seconds that this rank has waited for its batches.

        Raises:
            FailedRankError: If another rank has failed.
            LostRankError: If another rank does not arrive in time.
            RuntimeError: If the ranks are at different points of the run.
        """
        self._step = self._step if step is None else step
        point = None if purpose is None else f"{purpose} at step {self._step}, position {position}"
        if self._meet(point, data_wait=data_wait):
            self.exchange_news()

    def fail(self, error: Exception, step: int) -> None:
        """Reports an error of this rank to the others, which raise ``FailedRankError`` at their next meeting.

        An error inside a step is not reported, because the other ranks may be waiting in the collectives of that step.
        They raise ``LostRankError`` when this process ends.

        Args:
            error: The error.
            step: The current step.
        """
        is_reported = isinstance(error, FailedRankError | LostRankError)
        if not (is_reported or self.is_over or self._is_dispatching):
            with contextlib.suppress(LostRankError):
                self._meet(f"step {step}", error=error)
        self.is_over = True

    def _meet(self, point: str | None, *, error: Exception | None = None, data_wait: float = 0.0) -> bool:
        """Exchanges the facts. Returns whether rank 0 has news of saves."""
        mesh, signal = self.mesh, self._interrupts.noted
        place, negated = _NOTHING, _NOTHING
        if point is not None:
            place = zlib.crc32(point.encode())
            negated = -place
        of_main = [_NOTHING] * 4
        if mesh.is_main:
            times = (self._clock() - self._began, data_wait, self._measured)
            of_main = [*map(_bits, times), int(error is None and self.has_news())]
        facts = [int(error is not None), place, negated, signal or 0, *of_main]
        try:
            found = mesh.maximum(torch.tensor(facts, device="cpu"), "agreement of ranks", step=self._step)
            agreed: list[int] = found.tolist()
            failed, place, negated, signal, *times, news = agreed
            if failed or (place != -negated and place != _NOTHING):
                self.is_over = True
                self._raise_for(point, error)
                return False
        except LostRankError:
            self.is_over = True
            raise
        self._time, self.data_wait, self.duration = map(_float, times)
        if signal:
            self._interrupts.adopt(signal)
        return bool(news)

    def _raise_for(self, point: str | None, error: Exception | None) -> None:
        """Raises for the failure of another rank, or for ranks that have parted."""
        text = None if error is None else f"{point}: {described(error)}"
        points = self.mesh.gather((point, text), "errors", step=self._step)
        failed = {rank: text for rank, (_, text) in enumerate(points) if text is not None}
        if error is not None:
            return
        if failed:
            raise FailedRankError.from_reports(failed)
        raise RuntimeError(
            "expected all ranks to be at the same point of the run, got "
            + ", ".join(f"rank {rank} before {point}" for rank, (point, _) in enumerate(points))
            + ". Give all ranks the same data and callbacks, and let no callback depend on its process."
        )

    @contextlib.contextmanager
    def dispatch(self, what: str, step: int, count: int = 1) -> Iterator[None]:
        """A context manager for code whose collectives all ranks must join.

        Args:
            what: The collectives, as a noun for errors.
            step: The number of the step, for errors.
            count: Number of steps taken.
        """
        self._is_dispatching, began = True, self._clock()
        with self.mesh.collective(what, step=step):
            yield
        self._is_dispatching, self._measured = False, (self._clock() - began) / count

    def shared(self, what: str, function: Callable[[], T]) -> T:
        """Returns rank 0's result of a function on all ranks, or raises its error on all.

        Args:
            what: The result, as a noun for errors.
            function: Called on rank 0 only. The result can be pickled.
        """
        self.meet(f"the exchange of {what}")
        error: Exception | None = None
        result: T | None = None
        if self.mesh.is_main:
            try:
                result = function()
            except Exception as raised:
                error = raised
        text = None if error is None else described(error)
        text, result = self.mesh.broadcast((text, result), what, step=self._step)
        self.raise_first([text, *[None] * (self.mesh.world_size - 1)], error, what)
        return result  # pyright: ignore[reportReturnType] -- it is rank 0's

    def raise_first(self, texts: list[str | None], own: Exception | None, what: str) -> None:
        """Raises this rank's error, or one for the errors of others.

        Args:
            texts: The errors of all ranks, None where there is none.
            own: The error of this rank, if any.
            what: The point of the run, as a noun.
        """
        failed = {rank: f"{what} (step {self._step}): {text}" for rank, text in enumerate(texts) if text is not None}
        if failed:
            self.is_over = True
            raise own or FailedRankError.from_reports(failed)

    def digest(self, value: int, what: str) -> int:
        """Returns a signed 64-bit hash of the values of all ranks, the same on each.

        Args:
            value: The value of this rank.
            what: The values, as a noun for errors.
        """
        self.meet(f"the exchange of {what}")
        values = self.mesh.gather(value, what, step=self._step)
        return xxhash.xxh3_64_intdigest(repr(values).encode()) - 2**63

    def rows(self, source: D) -> D | Source:
        """Returns the rows of this rank, unless the source is None or split already."""
        return source if source is None else split(source, self.mesh)

    def check_equal(self, state: TrainState, when: str, remedy: str) -> None:
        """Raises unless all ranks have the same state.

        Args:
            state: The state of this rank.
            when: The point of the run, for the error.
            remedy: A sentence for the error.

        Raises:
            ValueError: The message names the first leaf that differs, and the ranks that have another one than rank 0.
        """
        self.meet(f"the comparison of states {when}")
        paths = tree.paths(state, "state", is_leaf=is_shard)
        digests = [_digest(leaf) for leaf in tree.leaves(state, is_leaf=is_shard)]
        whole = xxhash.xxh3_64(repr((paths, digests)).encode()).hexdigest()
        found = self.mesh.gather(whole, "digests of states", step=self._step)
        if len(set(found)) == 1:
            return
        self.is_over = True
        tables = self.mesh.gather(dict(zip(paths, digests, strict=True)), "digests of leaves", step=self._step)
        names = dict.fromkeys(path for table in tables for path in table)
        path = next(path for path in names if len({table.get(path) for table in tables}) > 1)
        others = [str(rank) for rank, table in enumerate(tables) if table.get(path) != tables[0].get(path)]
        raise ValueError(
            f"expected the same state on all ranks {when}, got another {path} on rank{'s' * (len(others) > 1)} "
            f"{', '.join(others)} than on rank 0. {remedy}"
        )


def described(error: Exception) -> str:
    """Returns the type and the message of an error."""
    return f"{type(error).__name__}: {error}"


def _digest(leaf: torch.Tensor | Shard) -> str:
    if isinstance(leaf, Shard):  # of which each rank has another part
        return f"{leaf.dtype} {tuple(leaf.shape)} split along axis {leaf.axis}"
    has_bytes = leaf.layout is torch.strided and not leaf.is_nested
    content = xxhash.xxh3_64(host_bytes(leaf)).hexdigest() if has_bytes else ""
    return f"{leaf.dtype} {tuple(leaf.shape)} {content}"


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]
