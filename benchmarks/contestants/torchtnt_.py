"""torchtnt, with its ``AutoUnit``."""

import sys
import types
from typing import Any

import torch
from torch import Tensor

# torchtnt 0.2.4 imports pkg_resources without using it for this torch, and setuptools no longer provides it.
sys.modules.setdefault("pkg_resources", types.ModuleType("pkg_resources"))

from torchtnt.framework.auto_unit import AutoUnit  # noqa: E402
from torchtnt.framework.train import train as train_unit  # noqa: E402

from benchmarks.contestants import ENDLESS  # noqa: E402
from benchmarks.feed import Feed  # noqa: E402
from benchmarks.workloads import Workload  # noqa: E402


class Unit(AutoUnit[Any]):
    def __init__(self, workload: Workload) -> None:
        super().__init__(module=workload.module(), device=torch.device("cpu"))
        self.workload = workload

    def compute_loss(self, state: Any, data: Any) -> tuple[Tensor, Any]:
        output = self.module(data["x"])
        return self.workload.loss(output, data["y"]), output

    def configure_optimizers_and_lr_scheduler(self, module: Any) -> Any:
        return self.workload.adamw(module), None


def train(workload: Workload, feed: Feed) -> dict[str, Any]:
    unit = Unit(workload)
    train_unit(unit, feed, max_steps=feed.total or ENDLESS, max_epochs=1)
    return unit.module.state_dict()
