"""Multi: several writers as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxtrain.values import hand_over, take_back, try_all


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


class MultiWriter:
    """Several writers as one; made by ``multi``. If one fails, those after it are not reached."""

    def __init__(self, writers: tuple[Any, ...]) -> None:
        self._writers = writers

    def write_event(self, event: Any, values: Mapping[str, Any]) -> None:
        for writer in self._writers:
            hand_over(writer, event, values)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        for writer in self._writers:
            writer.write_histograms(step, arrays, num_buckets)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_hparams(hparams)

    def purge(self, step: int) -> None:
        for writer in self._writers:
            take_back(writer, step)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes every one; then the first error is raised."""
        try_all(*(writer.close for writer in self._writers))
