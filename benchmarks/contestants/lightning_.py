"""Lightning in ``barebones`` mode, which is documented for measuring the overhead of the trainer."""

import logging
from typing import Any

import lightning
from torch import Tensor, nn

from benchmarks.contestants import ENDLESS
from benchmarks.feed import Feed
from benchmarks.workloads import Workload


class Module(lightning.LightningModule):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload
        self.inner: nn.Module = workload.module()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.workload.loss(self.inner(batch["x"]), batch["y"])

    def configure_optimizers(self) -> Any:
        return self.workload.adamw(self.inner)


def train(workload: Workload, feed: Feed) -> dict[str, Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module(workload)
    accelerator = "cpu" if workload.device == "cpu" else "gpu"
    trainer = lightning.Trainer(barebones=True, accelerator=accelerator, devices=1, max_steps=feed.total or ENDLESS)
    trainer.fit(module, feed.loader())
    return module.inner.state_dict()
