"""Multi: several writers as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxtrain.values import KINDS, hand_over, share, take_back, try_all
from fxtrain.writers.interface import Backend


def multi(*writers: Any) -> MultiWriter:
    """One writer that hands everything to each of the given ones, in order.

    Args:
        writers: Our own writers, or clu's.

    Raises:
        ValueError: If none is given.

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
        raise ValueError("multi() has nothing to write to: give it at least one writer.")
    return MultiWriter(writers)


class MultiWriter(Backend):
    """Several writers as one; made by ``multi``. If one fails, those after it are not reached."""

    kinds = frozenset((float, *KINDS))

    def __init__(self, writers: tuple[Any, ...]) -> None:
        self._writers = writers
        share(writers)

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        for writer in self._writers:
            hand_over(writer, step, values, event)

    def purge(self, step: int) -> None:
        for writer in self._writers:
            take_back(writer, step)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes every one; then the first error is raised."""
        try_all(*(writer.close for writer in self._writers))
