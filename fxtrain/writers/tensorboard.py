"""TensorBoard: event files, written by the protocol buffers and the record writer of tensorboardX.

tensorboardX's own ``SummaryWriter`` is not used: it hands records to a thread, so that a flush may come before what it
is to flush; it names files by the second, so that a run which goes back within one overwrites its own file; and one
record for each number, through a queue, costs four times as much as one record for each step.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxtrain.values import Histogram
from fxtrain.writers.interface import unwritable

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")
_BUCKETS = 30  # as in TensorFlow's summaries


def tensorboard(folder: str | os.PathLike[str]) -> TensorBoardWriter:
    """A writer of TensorBoard's event files. The folder is made if it is not there.

    Each opening begins a file of its own, and so does ``purge``: its first record tells TensorBoard to forget what
    older files have beyond the step. Nothing on the disk is deleted.

    Args:
        folder: One for each run.

    Raises:
        OSError: If the folder cannot be made or written to.

    Example:
        >>> import tempfile
        >>> writer = tensorboard(tempfile.mkdtemp())
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        >>> writer.close()
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise unwritable("tensorboard", path, error) from error
    return TensorBoardWriter(path)


class TensorBoardWriter:
    """Writes TensorBoard's event files; made by ``tensorboard``. Opens one when there is something to write."""

    def __init__(self, folder: Path) -> None:
        import tensorboardX
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2, summary_pb2

        self._open_records, self._summaries = tensorboardX.RecordWriter, summary
        self._event: Any = event_pb2  # their messages are made at run time, unseen by type checkers
        self._message: Any = summary_pb2
        self._folder = folder
        self._records: Any = None  # the open event file

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        value = self._message.Summary.Value
        # Kept as float32, which is what TensorBoard reads.
        self._write(step, [value(tag=name, simple_value=float(number)) for name, number in scalars.items()])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, markdown in texts.items():
            self._write(step, self._summaries.text(name, markdown).value)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        for name, array in arrays.items():
            given = array if isinstance(array, Histogram) else Histogram(torch.as_tensor(array))
            counts, edges = given.buckets((num_buckets or {}).get(name, _BUCKETS))
            if not counts.sum():
                warnings.warn(
                    f"The histogram {name!r} of step {step} has no finite value and is not written.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            middles = (edges[:-1] + edges[1:]) / 2
            summary = self._summaries.histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=counts.sum(),
                sum=(counts * middles).sum(),
                sum_squares=(counts * middles**2).sum(),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
            )
            self._write(step, summary.value)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        # The session alone: without the summary of the experiment TensorBoard collects the columns itself, from all
        # sessions, with every scalar as a metric.
        _, session, _ = self._summaries.hparams(dict(hparams), {})
        self._write(0, session.value)

    def purge(self, step: int) -> None:
        """Has TensorBoard forget what lies beyond a step. Costs one more file, unless nothing was ever written."""
        self.close()
        if self._older():
            self._open(first_step=step + 1)

    def flush(self) -> None:
        if self._records is not None:
            self._records.flush()

    def close(self) -> None:
        if self._records is not None:
            self._records.flush()
            self._records.close()
            self._records = None

    def _write(self, step: int, values: Any) -> None:
        if self._records is None:
            self._open()
        self._record(step=int(step), summary=self._message.Summary(value=values))

    def _record(self, **fields: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())

    def _open(self, first_step: int | None = None) -> None:
        # TensorBoard reads files in the order of their names, so the second in a name is later than those before it,
        # even where several are begun within one or the clock was set back.
        second = max([int(time.time()), *(before + 1 for before in self._older())])
        path = self._folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._records = self._open_records(str(path))
        except OSError as error:
            raise unwritable("tensorboard", self._folder, error) from error
        self._record(file_version="brain.Event:2")
        if first_step is not None:
            log = self._event.SessionLog
            self._record(step=first_step, session_log=log(status=log.START))

    def _older(self) -> list[int]:
        """The seconds in the names of the event files that are there."""
        return [int(found[1]) for path in self._folder.glob("*tfevents*") if (found := _NAME.match(path.name))]
