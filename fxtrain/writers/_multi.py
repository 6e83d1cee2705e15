"""Several writers combined into one, which keeps the order of values and contains the failures of each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

from fxtrain.core import LoopEvent, try_all
from fxtrain.values import KINDS, Kind, Value, is_kept
from fxtrain.writers._channel import Channel
from fxtrain.writers._interface import Backend, Writer, check_writer

# MultiWriters that share a writer share its channel, so that its values keep their order. A channel references its
# writer, so an id is not used again while its channel exists.
_channels: weakref.WeakValueDictionary[int, Channel] = weakref.WeakValueDictionary()


def multi(*writers: Writer) -> MultiWriter:
    """A writer that passes everything to each of the given writers, in order.

    A failure affects only its writer, as in ``observers.write``: points that a writer misses after an ``OSError`` are
    queued up to a bound and written later. Each outage and loss causes a warning.

    Args:
        writers: Writers of ``fxtrain.writers``, or clu's.

    Raises:
        ValueError: No writer is given.

    Example:
        >>> import tempfile, pathlib
        >>> from fxtrain.writers import jsonl
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> writer = multi(jsonl(folder / "a.jsonl"), jsonl(folder / "b.jsonl", clock=None))
        >>> writer.write_scalars(1, {"loss": 0.5})
        >>> writer.close()
        >>> (folder / "b.jsonl").read_text()
        '{"step": 1, "metrics": {"loss": 0.5}}\\n'
    """
    return MultiWriter("multi", writers)


class MultiWriter(Backend):
    """Passes values to several writers in the order of their steps. A failing writer does not affect the others.

    Kinds of values that a writer cannot keep are left out, with a warning if no other writer keeps them. Created by
    ``multi``, and by observers with writers.

    Args:
        owner: The function that the writers were passed to, for the error.
        writers: Writers of ``fxtrain.writers``, or clu's.

    Raises:
        TypeError: One is not a writer, such as a logger of another library.
        ValueError: There is no writer.
    """

    kinds = frozenset((float, *KINDS))

    def __init__(self, owner: str, writers: Sequence[Writer]) -> None:
        if not writers:
            raise ValueError(
                f"expected at least one writer for {owner}(), got none. Pass one, such as "
                "fxtrain.writers.tensorboard(folder)."
            )
        for writer in writers:
            check_writer(owner, writer)
        self._channels = [_channel_of(writer) for writer in writers]
        selections = [channel.selection for channel in self._channels]
        for selection in selections:
            others = [other.kinds for other in selections if other is not selection]
            missing = {kind for kind in self.kinds if not is_kept(kind, selection.kinds)}
            selection.silence(kind for kind in missing if any(is_kept(kind, kinds) for kinds in others))

    @property
    def keeps(self) -> frozenset[Kind]:
        return frozenset[Kind]().union(*(channel.keeps for channel in self._channels))

    def put(self, step: int, values: Mapping[str, Value], event: LoopEvent | None) -> None:
        """Writes values, or queues them for writers that fail."""
        for channel in self._channels:
            channel.submit(step, values, event)

    def defer(self, write: Callable[[], None]) -> None:
        """Registers a bound method that submits points held back by its object, for ``flush_deferred``."""
        for channel in self._channels:
            channel.defer(write)

    def flush_deferred(self) -> None:
        """Submits points held back by any observer with one of these writers, so that later points follow them."""
        for channel in self._channels:
            channel.flush_deferred()

    def purge(self, step: int) -> None:
        """Abandons everything after a step, because the run rewound or resumed."""
        for channel in self._channels:
            channel.truncate_after(step)

    def flush(self) -> None:
        """Retries queued values, and flushes every writer."""
        for channel in self._channels:
            channel.flush()

    def close(self) -> None:
        """Closes every writer, then raises the first error."""
        try_all(*(channel.close for channel in self._channels))

    def take_failure(self) -> Exception | None:
        """Returns the first error of a writer since the last call, for runs that require the writers."""
        failures = [channel.take_failure() for channel in self._channels]
        return next((failure for failure in failures if failure is not None), None)


def _channel_of(writer: Writer) -> Channel:
    channel = _channels.get(id(writer))
    if channel is None:
        channel = _channels[id(writer)] = Channel(writer)
        if isinstance(writer, Backend):
            # A writer that raises errors at a later call must contain them, or the wrong points would be retried.
            writer.contain_failures()
    return channel
