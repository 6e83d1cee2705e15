"""The checked arguments of ``fit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from fxtrain.core import TrainState
from fxtrain.fold import Composed


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options of a run. ``fit`` documents each."""

    callbacks: Composed
    eval_step: Callable[..., Any] | None
    eval_data: Any
    eval_view: Callable[[TrainState], TrainState] | None
    evaluate_epochs: bool  # whether each epoch ends with an evaluation
    epochs: int | None
    steps: int | None
    observers: Iterable[Callable[..., None]]
    checkpointer: Any
    resume: bool
    snapshot_every: int | None
    snapshots: int
    snapshots_on_host: bool
    rewind_limit: int
    lag: int | None
    clock: Callable[[], float]
    every_event: bool  # whether to yield each event, even if nothing subscribes to it
