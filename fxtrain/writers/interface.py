"""The shape of a writer: the verbs of clu's ``MetricWriter``, and what opening one has in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Writer(Protocol):
    """Keeps values by step and name. Names and arguments are those of clu, so a clu writer is one as well.

    Two verbs more are used where a writer has them. ``purge(step)`` drops all that lies beyond a step, when a run
    resumes or goes back; without it, points are doubled. ``write_event(event, values)`` takes all that an event
    published at once, in place of one verb for each kind.
    """

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers, or 0-d arrays or tensors, by name."""
        ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, in Markdown, by name."""
        ...

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes how the values of arrays are distributed.

        Args:
            step: Where.
            arrays: Real arrays or tensors by name. Our own writers take ``fxtrain.values.Histogram`` too.
            num_buckets: By name, how many buckets to sort the values into; 30 where nothing is said.
        """
        ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes what the run was configured with: strings, numbers and bools by name."""
        ...

    def flush(self) -> None:
        """Puts what was written on the disk."""
        ...

    def close(self) -> None:
        """Flushes, and lets go of the files. Our own writers open them again if more is written."""
        ...


def unwritable(writer: str, path: Path, error: OSError) -> OSError:
    """The error that says what cannot be written, why, and what to do."""
    return OSError(
        f"{writer} cannot write to {path} ({error.strerror or error}): give a path that you may write to, on a disk "
        "that has room."
    )
