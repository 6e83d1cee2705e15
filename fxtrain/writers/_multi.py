"""Several writers combined into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxtrain.core import LoopEvent
from fxtrain.values import KINDS, Value
from fxtrain.writers._interface import Backend, Writer
from fxtrain.writers._log import Log


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
        >>> writer = multi(jsonl(folder / "a.jsonl"), jsonl(folder / "b.jsonl"))
        >>> writer.write_scalars(1, {"loss": 0.5})
        >>> writer.close()
        >>> (folder / "b.jsonl").read_text()
        '{"step": 1, "metrics": {"loss": 0.5}}\\n'
    """
    return MultiWriter(writers)


class MultiWriter(Backend):
    """Several writers combined into one. Created by ``multi``."""

    kinds = frozenset((float, *KINDS))

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._log = Log("multi", writers)

    def put(self, step: int, values: Mapping[str, Value], event: LoopEvent | None) -> None:
        self._log.submit(step, values, event)

    def purge(self, step: int) -> None:
        self._log.truncate_after(step)

    def flush(self) -> None:
        self._log.flush()

    def close(self) -> None:
        """Closes all writers, then raises the first error."""
        self._log.close()

    def take_failure(self) -> Exception | None:
        return self._log.take_failure()
