"""fxtrain: the compiled step in a bare loop, with and without donation, and in ``fit``."""

import itertools
from typing import Any

from torch import Tensor

import fxtrain as fx
from benchmarks.contestants import ENDLESS
from benchmarks.feed import Feed
from benchmarks.workloads import Workload


def pieces(
    workload: Workload, *, donate: bool = True, mode: str | None = None, together: int = 1, **options: Any
) -> tuple[fx.TrainState, Any]:
    """Returns a fresh state and its compiled step. ``together`` is the number of steps per call."""
    tx = fx.optim.adamw(workload.learning_rate, weight_decay=workload.weight_decay)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return workload.loss(model(batch["x"]), batch["y"])

    step = fx.train_step(loss_fn, tx, **options)
    return fx.init(workload.module(), tx), fx.compile(
        step, donate=donate, mode=mode, steps_per_call=together, on_recompile="error"
    )


def donated(workload: Workload, feed: Feed) -> dict[str, Any]:
    return _loop(workload, feed)


def ahead(workload: Workload, feed: Feed) -> dict[str, Any]:
    return _loop(workload, feed, mode="ahead-of-time")


def graphs(workload: Workload, feed: Feed) -> dict[str, Any]:
    return _loop(workload, feed, mode="reduce-overhead")


def undonated(workload: Workload, feed: Feed) -> dict[str, Any]:
    return _loop(workload, feed, donate=False)


def eight(workload: Workload, feed: Feed) -> dict[str, Any]:
    state, step = pieces(workload, together=8)
    batches = iter(feed)
    while some := list(itertools.islice(batches, 8)):
        if len(some) == 8:
            state, _ = step.multi_step(state, some)
        else:
            for batch in some:
                state, _ = step(state, batch)
    return fx.state_dict(state)


def _loop(workload: Workload, feed: Feed, **options: Any) -> dict[str, Any]:
    state, step = pieces(workload, **options)
    for batch in feed:
        state, _ = step(state, batch)
    return fx.state_dict(state)


def fit(workload: Workload, feed: Feed) -> dict[str, Any]:
    state, step = pieces(workload)
    return fx.state_dict(fx.fit(state, step, feed, steps=feed.total or ENDLESS).state)
