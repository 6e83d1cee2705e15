"""The interface of a workload, from which all contestants take model, weights, batches, loss and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]  # "x" and "y"


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Output [..., classes], integers y [...]."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().mean()


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model with its training data, its hyperparameters, and the length of the measured turns.

    Args:
        name: The name of the workload, equal to the name of its file.
        about: A description for the report.
        make: Returns a new module, with weights from torch's global generator, which ``module`` seeds.
        batches: At least 8 batches with equal shapes. All contestants repeat them in this order.
        loss: Maps the module's output and ``y`` to the loss.
        threads: Number of compute threads. With one thread, the process is pinned to one core.
        turn: Number of steps per turn.
        warmup: Number of steps before the first turn.
        learning_rate: Learning rate of AdamW. Its betas and epsilon are the defaults of torch.
        weight_decay: Weight decay of AdamW.
        peers: Whether to measure the trainers of other libraries besides loops by hand and flax.
        memory: Whether to measure peak memory.
        device: The device of modules and batches.
    """

    name: str
    about: str
    make: Callable[[], nn.Module]
    batches: list[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    threads: int = 1
    turn: int = 20
    warmup: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    peers: bool = True
    memory: bool = False
    device: str = "cpu"

    def on(self, device: str) -> Workload:
        """Returns the workload on another device, with its batches already copied there."""
        batches = [{name: value.to(device) for name, value in batch.items()} for batch in self.batches]
        return dataclasses.replace(self, device=device, batches=batches, threads=1, memory=True)

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(self.device)

    def adamw(self, module: nn.Module) -> torch.optim.AdamW:
        """Returns the optimizer of all contestants that use an optimizer of torch."""
        return torch.optim.AdamW(module.parameters(), self.learning_rate, weight_decay=self.weight_decay, fused=True)
