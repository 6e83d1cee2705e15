"""The delivery of values to one writer, with its failures contained and retried."""

from __future__ import annotations

import time
import traceback
import weakref
from collections.abc import Callable, Mapping

from fxtrain.core import LoopEvent, printable, printable_lines, warn
from fxtrain.values import Audio, Histogram, HParams, Image, Kind, PointCloud, Text, Value, Video, kind_of
from fxtrain.writers._backlog import MOST_BYTES, MOST_POINTS, Backlog, Lost, PendingCall, pending_call
from fxtrain.writers._interface import Backend, Selection, Writer

_RETRY_SECONDS = 1.0

_METHODS: Mapping[Kind, str] = {
    float: "write_scalars",
    Text: "write_texts",
    Image: "write_images",
    Video: "write_videos",
    Audio: "write_audios",
    Histogram: "write_histograms",
    PointCloud: "write_pointcloud",
    HParams: "write_hparams",
}


class Channel:
    """Passes values to one writer, and contains its failures.

    After an ``OSError``, points that the writer missed are queued, up to ``MOST_POINTS`` and ``MOST_BYTES``. They are
    written in order once it works again. It is retried at the next write after a second, at each flush, and on close.
    After any other error, the points of that call are lost, and later ones are written. Each outage, recovery and loss
    causes a warning.

    Args:
        writer: A writer of ``fxtrain.writers``, or clu's.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._name = type(writer).__name__
        self._backlog = Backlog()
        self._deferred: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._fails = False  # since the last success
        self._has_refused = False
        self._retry_at = 0.0
        self._failure: Exception | None = None
        if isinstance(writer, Backend):
            self.selection = writer.selection
        else:
            kinds = frozenset(kind for kind, method in _METHODS.items() if hasattr(writer, method))
            self.selection = Selection(self._name, getattr(writer, "kinds", kinds))

    @property
    def keeps(self) -> frozenset[Kind]:
        """The kinds that the writer keeps."""
        return self._writer.keeps if isinstance(self._writer, Backend) else self.selection.kinds

    def write(self, step: int, values: Mapping[str, Value], event: LoopEvent | None = None) -> None:
        """Writes values, in one call of ``write`` if the writer has that, otherwise by clu's method for each kind.

        Args:
            step: The step of the values.
            values: Values by name.
            event: The event that published them, or None.
        """
        write = getattr(self._writer, "write", None)
        if write is not None:
            write(step, values, event)
            return
        by_kind: dict[Kind, dict[str, Value]] = {}
        for name, value in self.selection.select(step, values).items():
            by_kind.setdefault(kind_of(value), {})[name] = value
        for kind, named in by_kind.items():
            _write_kind(getattr(self._writer, _METHODS[kind]), step, named)

    def purge(self, step: int) -> None:
        """Makes the writer abandon everything after a step. Warns if it cannot, because points will be duplicated."""
        purge = getattr(self._writer, "purge", None)
        if purge is not None:
            purge(step)
        elif step > 0:
            _warn(
                f"{self._name} has no purge(step), so points after step {step} stay and will be duplicated.",
            )

    def submit(self, step: int, values: Mapping[str, Value], event: LoopEvent | None = None) -> None:
        """Writes values, or queues them while the writer fails.

        Args:
            step: The step of the values.
            values: Values by name.
            event: The event that published them, or None.
        """
        if not values:
            return
        if self._backlog and time.monotonic() >= self._retry_at:
            self._deliver()
        if self._backlog:
            self._backlog.add(pending_call(step, values, event))
            return
        try:
            self.write(step, values, event)
        except OSError as error:
            self._backlog.add(pending_call(step, values, event))
            self._failed(step, error)
        except Exception as error:
            self._refused(PendingCall(step, values), error)

    def defer(self, write: Callable[[], None]) -> None:
        """Registers a bound method that submits deferred points. It is weakly referenced."""
        self._deferred.append(weakref.WeakMethod(write))

    def flush_deferred(self) -> None:
        """Submits the deferred points of all owners."""
        for each in self._deferred:
            write = each()
            if write is not None:
                write()

    def truncate_after(self, step: int) -> None:
        """Makes the writer abandon everything after a step, or queues that while it fails."""
        self._backlog.truncate_after(step)
        self._backlog.add(PendingCall(step, None))
        self._deliver()

    def flush(self) -> None:
        """Retries pending calls, and flushes the writer."""
        delivered = self._delivered()
        try:
            self._writer.flush()
        except Exception as error:
            self._failed(None, error)
        else:
            if delivered:
                self._recovered()

    def close(self) -> None:
        """Retries pending calls, warns about lost points, and closes the writer, whose error is raised."""
        self._deliver()
        try:
            self._writer.close()
        finally:
            self._backlog.lose_all()
            if self._backlog.lost:
                _warn(f"{self._name}: {self._backlog.lost} could not be written and were lost.")
            self._backlog, self._fails, self._has_refused = Backlog(), False, False

    def take_failure(self) -> Exception | None:
        """Returns the first error contained since the last call, for runs that require the writer."""
        inner = self._writer.take_failure() if isinstance(self._writer, Backend) else None
        failure, self._failure = self._failure or inner, None
        return failure

    def _deliver(self) -> None:
        if self._delivered():
            self._recovered()

    def _delivered(self) -> bool:
        """Writes pending calls until the writer fails. Returns whether none is left."""
        while self._backlog:
            call = self._backlog.first
            try:
                if call.values is None:
                    self.purge(call.step)
                else:
                    self.write(call.step, call.values, call.event)
            except OSError as error:
                self._failed(call.step, error)
                return False
            except Exception as error:
                self._refused(call, error)
            self._backlog.pop()
        return True

    def _recovered(self) -> None:
        if self._fails:
            lost = f", but {self._backlog.lost} were lost" if self._backlog.lost else ""
            self._fails, self._backlog.lost = False, Lost()
            _warn(f"{self._name} works again. Queued points were written{lost}.")

    def _failed(self, step: int | None, error: Exception) -> None:
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        if not self._fails:
            # Recorded once per outage, so that a run stopped by it can still save its last state.
            self._fails, self._failure = True, self._failure or error
            at = "a flush" if step is None else f"step {step}"
            _warn(
                f"{self._name} failed at {at} and will be retried. Up to {MOST_POINTS} points and "
                f"{MOST_BYTES // 2**20} MiB are queued for it. Training and other writers continue. "
                f"{type(error).__name__}: {printable(str(error))}"
            )

    def _refused(self, call: PendingCall, error: Exception) -> None:
        self._failure = self._failure or error
        self._backlog.lost.add(call.step, call.points)
        if not self._has_refused:
            self._has_refused = True
            lines = printable_lines("".join(traceback.format_exception(error)))
            _warn(
                f"{self._name} failed at step {call.step}, whose points are lost. Further losses are counted and "
                "reported at the end. Training and other writers continue.\n" + "\n".join(lines)
            )


def _write_kind(write: Callable[..., None], step: int, named: Mapping[str, Value]) -> None:
    """Writes values of one kind by clu's method for it."""
    plain: dict[str, object] = {}
    for name, value in named.items():
        match value:
            case Audio():  # one call each, because sample rates may differ
                write(step, {name: value.waves / 32767}, sample_rate=value.rate)
            case PointCloud():
                colors = None if value.colors is None else {name: value.colors.cpu().numpy()[None]}
                write(step, {name: value.points.float().cpu().numpy()[None]}, point_colors=colors)
            case HParams():
                write(value.scalars())
            case Text():
                plain[name] = value.markdown
            case Image() | Video():
                plain[name] = value.frames
            case Histogram():
                # A histogram of counts has no values, so values with the same distribution are written.
                plain[name] = value.spread()
            case _:
                plain[name] = value
    if plain:
        write(step, plain)


def _warn(message: str) -> None:
    warn(message, RuntimeWarning)
