"""TensorBoard event files, made of the protocol buffers of tensorboardX.

tensorboardX's ``SummaryWriter`` is not used, for four reasons. It passes records to a thread, so a flush may run before
the records that it should flush. It names files by the second, so a run that rewinds within one second overwrites its
own file. It writes one record per scalar instead of one per step, which is slower. Its record writer buffers, so it
would write the same bytes again after a failed write.
"""

from __future__ import annotations

import math
import os
import re
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fxtrain.core import LoopEvent, check_path, describe, warn
from fxtrain.disk import Appendable, make_folder
from fxtrain.values import Audio, Histogram, HParams, Image, PointCloud, Text, Value, Video
from fxtrain.values._encoders import gif, png, wav
from fxtrain.writers._append_only import OneFile
from fxtrain.writers._interface import explain_failure, numbered

_LENGTH_BYTES = 8  # at the beginning of a record, never all zero
_MARKED = re.compile(r"[\\`*_\[\]#]|^[+>-](?= )|(?<=\d)\.(?= )", re.MULTILINE)  # characters with a meaning in Markdown
_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")


def tensorboard(folder: str | os.PathLike[str]) -> TensorBoardWriter:
    """A writer of TensorBoard event files. Creates missing folders.

    Each opening begins a new file, and so does ``purge``: its first record makes TensorBoard ignore older records after
    the step. Nothing on the disk is deleted. Several images of one name become ``name/0``, ``name/1`` and so on. A
    video is a GIF among the images, and tables are texts. Captions are the text ``name/caption``.

    Start TensorBoard on the parent of the runs' folders, ``tensorboard --logdir runs``, because its hyperparameters tab
    shows last metrics only for runs that have a name.

    Args:
        folder: The folder of one run.

    Raises:
        OSError: The folder cannot be created or written to.

    Example:
        >>> import tempfile
        >>> writer = tensorboard(tempfile.mkdtemp())
        >>> writer.write_scalars(1, {"train/loss": 0.5})
        >>> writer.close()
    """
    check_path("folder", folder)
    path = Path(folder)
    with explain_failure("tensorboard", path):
        make_folder(path)
        tempfile.TemporaryFile(dir=path).close()
    return TensorBoardWriter(path)


class TensorBoardWriter(OneFile):
    """Writes TensorBoard event files. Created by ``tensorboard``. Opens a file at the first value."""

    kinds = frozenset((float, Text, Histogram, Image, Video, Audio, PointCloud, HParams))

    def __init__(self, folder: Path) -> None:
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._checksum, self._summaries = masked_crc32c, summary
        self._event: Any = event_pb2  # their classes are made at run time, where type checkers cannot see them
        self._message: Any = summary_pb2
        self._folder = folder
        self._began = math.inf  # start of the session's clock, in seconds since the Unix epoch

    def put(self, step: int, values: Mapping[str, Value], event: LoopEvent | None) -> None:
        summaries: list[Any] = []
        for name, value in values.items():
            summaries += self._summaries_of(step, name, value)
        if self._file is None:
            self._open()
        assert self._file is not None
        summary = self._message.Summary(value=summaries)
        self._file.append(self._record(wall_time=self._when(event), step=step, summary=summary))

    def _when(self, event: LoopEvent | None) -> float:
        """Returns the Unix time of an event, in seconds.

        Points are written after their event, several together, so the smallest delay seen gives the start of the clock.
        """
        now = time.time()
        if event is None:
            return now
        self._began = min(self._began, now - event.time)
        return self._began + event.time

    def _summaries_of(self, step: int, name: str, value: Value) -> list[Any]:
        message, summaries = self._message.Summary, self._summaries
        match value:
            case Text(markdown):
                return [self._text(name, markdown)]
            case Histogram():
                return self._histogram(step, name, value)
            case Image():
                frames = value.frames
                images = [
                    self._image(numbered(name, i, len(frames)), frame, png(frame)) for i, frame in enumerate(frames)
                ]
                return images + self._captions(name, value)
            case Video():
                videos = value.frames
                images = [
                    self._image(numbered(name, i, len(videos)), frames[0], gif(frames, value.fps))
                    for i, frames in enumerate(videos)
                ]
                return images + self._captions(name, value)
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
                # Only the session is written. Without an experiment summary, TensorBoard collects the columns from all
                # runs, with the last value of every scalar as a metric. With one, it would show the columns of the
                # first run that it finds, as they were when that run began.
                # Without values that are None, which would turn a column of numbers into one of texts.
                flat = value.flat()
                given = {key: scalar for key, scalar in value.scalars().items() if flat[key] is not None}
                _, session, _ = summaries.hparams(given, {})
                return session.value
            case bool() | int() | float():
                # Stored as float32, which is all that TensorBoard reads.
                return [message.Value(tag=name, simple_value=float(value))]
            case _:
                raise TypeError(f"expected a value that TensorBoard shows, got {describe(value)}.")

    def _text(self, tag: str, markdown: str) -> Any:
        (text,) = self._summaries.text(tag, markdown).value
        text.tag = tag  # the name as logged, without the suffix that tensorboardX adds
        return text

    def _captions(self, name: str, value: Image | Video) -> list[Any]:
        """Returns a text with the captions, because TensorBoard shows one description for all steps of an image."""
        found = value.captions
        if not any(found):
            return []
        if len(set(found)) == 1:
            lines = [found[0]]
        else:
            lines = [f"{numbered(name, index, len(found))}: {caption}" for index, caption in enumerate(found)]
        # TensorBoard shows Markdown, in which a line breaks only after two spaces. A caption is plain text.
        plain = _MARKED.sub(r"\\\g<0>", "\n".join(lines))
        return [self._text(f"{name}/caption", plain.replace("\n", "  \n"))]

    def _image(self, tag: str, frame: np.ndarray, encoded: bytes) -> Any:
        height, width, channels = frame.shape
        image = self._message.Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=encoded
        )
        return self._message.Summary.Value(tag=tag, image=image)

    def _histogram(self, step: int, name: str, histogram: Histogram) -> Any:
        counts, edges = histogram.buckets()
        if not counts.sum():
            warn(
                f"{name!r} of step {step} is not written: expected a histogram with finite values, got none.",
                RuntimeWarning,
            )
            return []
        # Drops empty buckets at both ends, because TensorBoard plots everything between the outermost edges.
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
        """Makes TensorBoard ignore everything after a step. Adds a file, unless nothing was ever written."""
        self.close()
        self._began = math.inf
        if self._older():
            self._open(first_step=step + 1)

    def _record(self, wall_time: float | None = None, **fields: Any) -> bytes:
        event = self._event.Event(wall_time=time.time() if wall_time is None else wall_time, **fields)
        return _framed(event.SerializeToString(), self._checksum)

    def _open(self, first_step: int | None = None) -> None:
        # TensorBoard reads files in the order of their names, so the second in a name must exceed those of earlier
        # files, even if several begin within one second or the clock was set back.
        second = max([int(time.time()), *(before + 1 for before in self._older())])
        path = self._folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
        head = [self._record(file_version="brain.Event:2")]
        if first_step is not None:
            # Written twice, because TensorBoard takes the first one that it reads as the beginning of the run, and
            # then ignores no records.
            log = self._event.SessionLog
            head += 2 * [self._record(step=first_step, session_log=log(status=log.START))]
        with explain_failure("tensorboard", self._folder):
            make_folder(self._folder)
            self._set_damaged_aside()
            file = Appendable(path)
            try:
                file.append(b"".join(head))
            except BaseException:
                file.close()
                path.unlink()
                raise
        self._file = file

    def _set_damaged_aside(self) -> None:
        """Renames event files without a record: empty, or beginning with zeros after a power cut."""
        for path in self._folder.glob("*tfevents*"):
            with open(path, "rb") as file:
                begin = file.read(_LENGTH_BYTES)
            if len(begin) < _LENGTH_BYTES or not any(begin):
                target = path.with_name(
                    f"damaged.{path.name.replace('tfevents.', '')}"
                )  # a name that TensorBoard does not read
                os.replace(path, target)
                warn(
                    f"{path} contains no record, possibly after a crash, and was renamed to {target.name}.",
                    RuntimeWarning,
                )

    def _older(self) -> list[int]:
        """Returns the seconds in the names of existing event files."""
        return [int(found[1]) for path in self._folder.glob("*tfevents*") if (found := _NAME.match(path.name))]


def _framed(record: bytes, checksum: Callable[[bytes], int]) -> bytes:
    """Returns a TFRecord: the length and the bytes of a record, each followed by a checksum."""
    length = struct.pack("<Q", len(record))
    return b"".join((length, struct.pack("<I", checksum(length)), record, struct.pack("<I", checksum(record))))
