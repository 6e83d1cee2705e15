"""Run: what the report draws, as values of checked shapes."""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from fxtrain.report._folder import Folder
from fxtrain.report._kept import Curve

Value = TypeVar("Value")


class RunFolderError(Exception):
    """A folder has no run in it, or nothing of it that can be shown. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """What happened at a step.

    Args:
        step: Where.
        kind: ``"improved"``, ``"saved"``, ``"skipped"``, ``"stopped"``, ``"rewound"``, ``"interrupted"`` or
            ``"resumed"``.
        text: What is to be said of it.
    """

    step: int
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Sampled(Generic[Value]):
    """Values of one name at some of its steps.

    Args:
        items: Steps, increasing, and values.
        count: How many steps there are in all.
    """

    items: list[tuple[int, Value]]
    count: int


class Heights(NamedTuple):
    """A histogram: float64 [n] counts between float64 [n + 1] edges."""

    counts: np.ndarray
    edges: np.ndarray


class Table(NamedTuple):
    """The latest table of a name. A cell that is a path is an image in the run folder."""

    step: int
    columns: dict[str, list[Any]]  # the first rows
    rows: int  # in all


class Confusion(NamedTuple):
    """The latest confusion matrix of a name."""

    step: int
    labels: list[str]
    counts: np.ndarray  # float64 [n, n]


@dataclasses.dataclass
class Run:
    """What is in the folder of a run. Steps that a rewind abandoned are not in its curves.

    Paths are relative to ``folder``, which alone opens them.
    """

    name: str
    curves: dict[str, Curve]
    marks: list[Mark]
    texts: dict[str, Sampled[str]]
    histograms: dict[str, Sampled[Heights]]
    tables: dict[str, Table]
    confusion: dict[str, Confusion]
    media: dict[str, dict[int, list[PurePosixPath]]]  # images, videos and sounds, by name and step
    config: dict[str, Any]
    sessions: list[dict[str, Any]]
    summary: str  # the page of observers.summary, if it was written there
    result: dict[str, Any]
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # of marks by kind, where not all are kept
    folder: Folder | None = None
