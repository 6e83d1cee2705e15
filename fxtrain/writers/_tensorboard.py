"""TensorBoard: event files, made of the protocol buffers of tensorboardX.

tensorboardX's own ``SummaryWriter`` is not used: it hands records to a thread, so that a flush may come before what it
is to flush; it names files by the second, so that a run which goes back within one overwrites its own file; and one
record for each number, through a queue, costs four times as much as one record for each step. Its record writer
buffers, and after a failed write would write the same bytes again.
"""

from __future__ import annotations

import math
import os
import re
import socket
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fxtrain.disk import make_folder
from fxtrain.values import Audio, Histogram, HParams, Image, PointCloud, Text, Video
from fxtrain.writers._encoding import gif, numbered, png, wav
from fxtrain.writers._interface import unwritable
from fxtrain.writers._one_file import Appendable, OneFile

_LENGTH_BYTES = 8  # at the beginning of a record, and not zero
_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")


def tensorboard(folder: str | os.PathLike[str]) -> TensorBoardWriter:
    """A writer of TensorBoard's event files. The folder is made if it is not there.

    Each opening begins a file of its own, and so does ``purge``: its first record tells TensorBoard to forget what
    older files have beyond the step. Nothing on the disk is deleted. Several images of one name become ``name/0``,
    ``name/1`` and so on; a video is a GIF among them, and tables are texts.

    Start TensorBoard on the folder above those of the runs, ``tensorboard --logdir runs``: its tab of hyper-parameters
    shows a run's last metrics only where the run has a name.

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
        make_folder(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise unwritable("tensorboard", path, error) from error
    return TensorBoardWriter(path)


class TensorBoardWriter(OneFile):
    """Writes TensorBoard's event files; made by ``tensorboard``. Opens one when there is something to write."""

    kinds = frozenset((float, Text, Histogram, Image, Video, Audio, PointCloud, HParams))

    def __init__(self, folder: Path) -> None:
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._checksum, self._summaries = masked_crc32c, summary
        self._event: Any = event_pb2  # their messages are made at run time, unseen by type checkers
        self._message: Any = summary_pb2
        self._folder = folder
        self._began = math.inf  # when the session's clock was at 0, in seconds since 1970

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        summaries: list[Any] = []
        for name, value in values.items():
            summaries += self._summaries_of(step, name, value)
        if self._file is None:
            self._open()
        assert self._file is not None
        summary = self._message.Summary(value=summaries)
        self._file.append(self._record(wall_time=self._when(event), step=step, summary=summary))

    def _when(self, event: Any) -> float:
        """When something happened: points come after it, several at once, and never before."""
        now = time.time()
        if event is None:
            return now
        self._began = min(self._began, now - event.time)
        return self._began + event.time

    def _summaries_of(self, step: int, name: str, value: Any) -> Any:
        message, summaries = self._message.Summary, self._summaries
        match value:
            case Text(markdown):
                (text,) = summaries.text(name, markdown).value
                text.tag = name  # without the ending that tensorboardX adds, so that a text is called as it was logged
                return [text]
            case Histogram():
                return self._histogram(step, name, value)
            case Image():
                frames = value.frames
                return [
                    self._image(numbered(name, i, len(frames)), frame, png(frame)) for i, frame in enumerate(frames)
                ]
            case Video():
                videos = value.frames
                return [
                    self._image(numbered(name, i, len(videos)), frames[0], gif(frames, value.fps))
                    for i, frames in enumerate(videos)
                ]
            case Audio():
                return [
                    message.Value(
                        tag=numbered(name, index, len(value.waves)),
                        audio=message.Audio(
                            sample_rate=value.rate,
                            num_channels=waves.shape[1],
                            length_frames=waves.shape[0],
                            encoded_audio_string=wav(waves, value.rate),
                            content_type="audio/wav",
                        ),
                    )
                    for index, waves in enumerate(value.waves)
                ]
            case PointCloud():
                colors = None if value.colors is None else value.colors.cpu().numpy()[None]
                return summaries.mesh(name, value.points.float().cpu().numpy()[None], colors, None).value
            case HParams():
                # The session alone: without the summary of the experiment TensorBoard collects the columns itself,
                # from all runs, with every scalar's last value as a metric. With it, it would show the columns of
                # whichever run it finds first, and as they were when that began.
                _, session, _ = summaries.hparams(value.flat(), {})
                return session.value
            case _:
                # Kept as float32, which is what TensorBoard reads.
                return [message.Value(tag=name, simple_value=float(value))]

    def _image(self, tag: str, frame: np.ndarray, encoded: bytes) -> Any:
        height, width, channels = frame.shape
        image = self._message.Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=encoded
        )
        return self._message.Summary.Value(tag=tag, image=image)

    def _histogram(self, step: int, name: str, histogram: Histogram) -> Any:
        counts, edges = histogram.buckets()
        if not counts.sum():
            warnings.warn(
                f"The histogram {name!r} of step {step} has no finite value and is not written.",
                RuntimeWarning,
                stacklevel=5,
            )
            return []
        # Without the empty buckets at both ends: TensorBoard draws all that lies between the outermost edges.
        used = np.flatnonzero(counts)
        counts, edges = counts[used[0] : used[-1] + 1], edges[used[0] : used[-1] + 2]
        middles = (edges[:-1] + edges[1:]) / 2
        return self._summaries.histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * middles).sum(),
            sum_squares=(counts * middles**2).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
        ).value

    def purge(self, step: int) -> None:
        """Has TensorBoard forget what lies beyond a step. Costs one more file, unless nothing was ever written."""
        self.close()
        self._began = math.inf
        if self._older():
            self._open(first_step=step + 1)

    def _record(self, wall_time: float | None = None, **fields: Any) -> bytes:
        event = self._event.Event(wall_time=time.time() if wall_time is None else wall_time, **fields)
        return _framed(event.SerializeToString(), self._checksum)

    def _open(self, first_step: int | None = None) -> None:
        # TensorBoard reads files in the order of their names, so the second in a name is later than those before it,
        # even where several are begun within one or the clock was set back.
        second = max([int(time.time()), *(before + 1 for before in self._older())])
        path = self._folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
        head = [self._record(file_version="brain.Event:2")]
        if first_step is not None:
            # Twice: TensorBoard takes the first that it sees of a run for its beginning, and forgets nothing then.
            log = self._event.SessionLog
            head += 2 * [self._record(step=first_step, session_log=log(status=log.START))]
        try:
            make_folder(self._folder)
            self._set_damaged_aside()
            file = Appendable(path)
            try:
                file.append(b"".join(head))
            except BaseException:
                file.close()
                path.unlink()
                raise
        except OSError as error:
            raise unwritable("tensorboard", self._folder, error) from error
        self._file = file

    def _set_damaged_aside(self) -> None:
        """Renames event files that begin with zeros, or with nothing, as after a power cut: none can be read."""
        for path in self._folder.glob("*tfevents*"):
            with open(path, "rb") as file:
                begin = file.read(_LENGTH_BYTES)
            if len(begin) < _LENGTH_BYTES or not any(begin):
                target = path.with_name(f"damaged.{path.name.replace('tfevents.', '')}")  # not TensorBoard's any more
                os.replace(path, target)
                warnings.warn(
                    f"{path} has no record, as after a crash; it is called {target.name} now.",
                    RuntimeWarning,
                    stacklevel=5,
                )

    def _older(self) -> list[int]:
        """The seconds in the names of the event files that are there."""
        return [int(found[1]) for path in self._folder.glob("*tfevents*") if (found := _NAME.match(path.name))]


def _framed(record: bytes, checksum: Callable[[bytes], int]) -> bytes:
    """A record as TFRecord files have it: its length and its bytes, each followed by a checksum."""
    length = struct.pack("<Q", len(record))
    return b"".join((length, struct.pack("<I", checksum(length)), record, struct.pack("<I", checksum(record))))
