"""Ignite, with its supervised trainer."""

from typing import Any

from ignite.engine import create_supervised_trainer

from benchmarks.contestants import ENDLESS
from benchmarks.feed import Feed
from benchmarks.workloads import Workload


def train(workload: Workload, feed: Feed) -> dict[str, Any]:
    module = workload.module()
    engine = create_supervised_trainer(
        module,
        workload.adamw(module),
        workload.loss,
        prepare_batch=lambda batch, device, non_blocking: (batch["x"], batch["y"]),
    )
    engine.run(feed, max_epochs=1, epoch_length=feed.total or ENDLESS)
    return module.state_dict()
