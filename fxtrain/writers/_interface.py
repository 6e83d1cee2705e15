"""The shape of a writer: the verbs of clu's ``MetricWriter``, and what our own have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from fxtrain.values import Audio, Histogram, HParams, Image, PointCloud, Text, Video, kept_by, kind_of
from fxtrain.writers._encoding import numbered


@runtime_checkable
class Writer(Protocol):
    """Keeps values by step and name. Names and arguments are those of clu, so a clu writer is one as well.

    Two verbs more are used where a writer has them. ``purge(step)`` drops all that lies beyond a step, when a run
    resumes or goes back; without it, points are doubled. ``write(step, values, event)`` takes all that an event
    published at once, in place of one verb for each kind.
    """

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers, or 0-d arrays or tensors, by name."""
        ...

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images by name, each uint8 or floating [N, H, W, C]."""
        ...

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Writes videos by name, each uint8 or floating [N, T, H, W, C]."""
        ...

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Writes sounds by name, each floating [N, T, C]."""
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


class Backend:
    """The verbs of clu by one method. A writer says what kinds it keeps, and has ``put``.

    What it does not keep it is given as something simpler, a table as its text say, or it says once that it leaves
    such values out.
    """

    kinds: ClassVar[frozenset[type[Any]]]  # ``float`` stands for numbers

    def put(self, step: int, values: Mapping[str, Any], event: Any) -> None:
        """Writes values of the writer's own kinds.

        Args:
            step: Where they belong.
            values: By name, at least one; numbers are ``bool``, ``int`` or ``float``.
            event: What published them, or None.
        """
        raise NotImplementedError

    def write(self, step: int, values: Mapping[str, Any], event: Any = None) -> None:
        """Writes values of any kinds.

        Args:
            step: Where they belong.
            values: Numbers, and values of ``fxtrain.values``, by name.
            event: What published them, if anything did.
        """
        kept = kept_by(self, self.kinds, step, values)
        if kept:
            self.put(int(step), {name: plain_number(value) for name, value in kept.items()}, event)

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Writes arrays whose meaning somebody else's plugin knows: as histograms, which is what we know of them."""
        self.write_histograms(step, values)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self.write(step, scalars)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        self.write(step, {name: Image(pixels) for name, pixels in images.items()})

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        self.write(step, {name: Video(pixels) for name, pixels in videos.items()})

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        self.write(step, {name: Audio(samples, sample_rate) for name, samples in audios.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self.write(step, {name: Text(markdown) for name, markdown in texts.items()})

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        found: dict[str, Histogram] = {}
        for name, array in arrays.items():
            given = array if isinstance(array, Histogram) else Histogram(torch.as_tensor(array))
            counts, edges = given.buckets((num_buckets or {}).get(name, 30))
            found[name] = Histogram(counts=torch.from_numpy(counts), edges=torch.from_numpy(edges))
        self.write(step, found)

    def write_pointcloud(
        self,
        step: int,
        point_clouds: Mapping[str, Any],
        *,
        point_colors: Mapping[str, Any] | None = None,
        configs: Mapping[str, Any] | None = None,
    ) -> None:
        found: dict[str, PointCloud] = {}
        for name, points in point_clouds.items():
            colors = (point_colors or {}).get(name)
            for index, cloud in enumerate(points):
                color = None if colors is None else colors[index]
                found[numbered(name, index, len(points))] = PointCloud(cloud, color)
        self.write(step, found)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self.write(0, {"hparams": HParams(hparams)})


def plain_number(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    if kind_of(value) is not float or isinstance(value, bool | int | float):
        return value
    return value.item() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else float(value)


def unwritable(writer: str, path: Path, error: OSError) -> OSError:
    """The error that says what cannot be written, why, and what to do."""
    return OSError(
        f"{writer} cannot write to {path} ({error.strerror or error}): give a path that you may write to, on a disk "
        "that has room."
    )
