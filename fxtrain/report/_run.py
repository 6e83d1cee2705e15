"""Data structures of a run as shown in the report, with validated types and shapes."""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import Generic, NamedTuple, TypedDict

import numpy as np

from fxtrain.report._downsampling import Curve, Value
from fxtrain.report._folder import Folder


class RunFolderError(Exception):
    """A folder does not contain a run that can be shown. The message is one line.

    Example:
        >>> import fxtrain.report as report
        >>> try:
        ...     report.read_run("nowhere")
        ... except report.RunFolderError as error:
        ...     print(error)
        expected a run folder, got nowhere (No such file or directory). Check the path.
    """


@dataclasses.dataclass(frozen=True)
class Mark:
    """An event at a step of a run.

    Args:
        step: The step.
        kind: ``"improved"``, ``"saved"``, ``"skipped"``, ``"stopped"``, ``"rewound"``, ``"interrupted"`` or
            ``"resumed"``.
        text: A description, such as the reason.
    """

    step: int
    kind: str
    text: str


class Sampled(NamedTuple, Generic[Value]):
    """Values of one name at a selection of its steps.

    Args:
        items: Pairs of a step and a value, by increasing steps.
        count: The number of all steps of the name.
    """

    items: list[tuple[int, Value]]
    count: int


Cell = float | str | PurePosixPath
"""A number, a text, or the path of an image in the run folder."""


class Heights(NamedTuple):
    """A histogram with counts, float64 [n], between edges, float64 [n + 1]."""

    counts: np.ndarray
    edges: np.ndarray


class Table(NamedTuple):
    """The latest table of a name. A cell with a path is an image in the run folder."""

    step: int
    columns: dict[str, list[Cell]]  # the first rows only
    rows: int  # of the complete table


class Confusion(NamedTuple):
    """The latest confusion matrix of a name."""

    step: int
    labels: list[str]
    counts: np.ndarray  # float64 [n, n]


class Session(TypedDict):
    """A session of a run. Texts are empty if they were not recorded."""

    began: str
    from_step: str
    ended: str
    to_step: str
    reason: str
    seconds: float
    environment: dict[str, object]


@dataclasses.dataclass
class Run:
    """The content of a run folder. Curves do not include steps abandoned by a rewind.

    Args:
        name: The name of the folder.
        curves: Steps and values of each metric, by name.
        marks: The events of the run, by increasing step.
        texts: Logged texts, by name.
        histograms: Logged histograms, by name.
        tables: The latest table of each name.
        confusion: The latest confusion matrix of each name.
        media: The files of images, videos and sounds, by name and step. Paths are relative to the folder.
        config: The configuration, as nested dictionaries.
        sessions: The sessions of the run, oldest first.
        summary: The output of ``observers.summary``, or an empty string.
        result: The content of ``result.json``.
        counts: The number of marks by kind, where ``marks`` is incomplete.
        captions: The captions of images and videos, by path.
        folder: Opens the files, and lists those that could not be read.
        about: The project, name, tags and description of the run.
        clocks: Steps with their ``"epoch"``, and with their ``"time"`` in seconds of all sessions.

    Example:
        >>> import fxtrain.report as report
        >>> run = report.Run("a run", {"loss": ([1, 2], [0.5, 0.25])}, [], {}, {}, {}, {}, {}, {}, [], "", {})
        >>> "<h1>a run</h1>" in report.page(run)
        True
    """

    name: str
    curves: dict[str, Curve]
    marks: list[Mark]
    texts: dict[str, Sampled[str]]
    histograms: dict[str, Sampled[Heights]]
    tables: dict[str, Table]
    confusion: dict[str, Confusion]
    media: dict[str, dict[int, list[PurePosixPath]]]
    config: dict[str, object]
    sessions: list[Session]
    summary: str
    result: dict[str, object]
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    captions: dict[PurePosixPath, str] = dataclasses.field(default_factory=dict)
    folder: Folder | None = None
    about: dict[str, object] = dataclasses.field(default_factory=dict[str, object])
    clocks: dict[str, Curve] = dataclasses.field(default_factory=dict[str, Curve])
