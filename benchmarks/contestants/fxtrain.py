"""fxtrain: the compiled step in a bare loop, donated and not, and under ``fit``."""

from typing import Any

from torch import Tensor

import fxtrain as fx
from benchmarks.contestants import ENDLESS
from benchmarks.feed import Feed
from benchmarks.workloads import Workload


def pieces(
    workload: Workload, *, donate: bool = True, mode: str | None = None, **options: Any
) -> tuple[fx.TrainState, Any]:
    """A fresh state and its compiled step."""
    tx = fx.optim.adamw(workload.learning_rate, weight_decay=workload.weight_decay)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return workload.loss(model(batch["x"]), batch["y"])

    step = fx.train_step(loss_fn, tx, **options)
    return fx.init(workload.module(), tx), fx.compile(step, donate=donate, mode=mode, on_recompile="error")


def donated(workload: Workload, feed: Feed) -> dict[str, Any]:
    return _loop(workload, feed)


def ahead(workload: Workload, feed: Feed) -> dict[str, Any]:
    return _loop(workload, feed, mode="ahead-of-time")


def undonated(workload: Workload, feed: Feed) -> dict[str, Any]:
    return _loop(workload, feed, donate=False)


def _loop(workload: Workload, feed: Feed, **options: Any) -> dict[str, Any]:
    state, step = pieces(workload, **options)
    for batch in feed:
        state, _ = step(state, batch)
    return fx.state_dict(state)


def fit(workload: Workload, feed: Feed) -> dict[str, Any]:
    state, step = pieces(workload)
    return fx.state_dict(fx.fit(state, step, feed, steps=feed.total or ENDLESS).state)
