"""Several writers combined into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxtrain.values import KINDS, outlet_of, share, try_all
from fxtrain.writers._interface import Backend


def multi(*writers: Any) -> MultiWriter:
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
    if not writers:
        raise ValueError("expected at least one writer, got none. Pass writers to multi.")
    return MultiWriter(writers)


class MultiWriter(Backend):
    """Several writers combined into one. Created by ``multi``."""

    kinds = frozenset((float, *KINDS))

    def __init__(self, writers: tuple[Any, ...]) -> None:
        share(writers)
        self._outlets = [outlet_of(writer) for writer in writers]

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        for outlet in self._outlets:
            outlet.hand_over(step, values, event)

    def purge(self, step: int) -> None:
        for outlet in self._outlets:
            outlet.take_back(step)

    def flush(self) -> None:
        for outlet in self._outlets:
            outlet.flush()

    def close(self) -> None:
        """Closes all writers, then raises the first error."""
        try_all(*(outlet.close for outlet in self._outlets))

    def take_failure(self) -> Exception | None:
        failures = [outlet.take_failure() for outlet in self._outlets]
        return next((failure for failure in failures if failure is not None), None)
