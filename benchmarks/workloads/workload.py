"""Workload: what is trained. Every contestant takes its model, weights, batches, loss and optimizer from here."""

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
    """What is trained, and for how long at a time.

    Args:
        name: Also the name of its file.
        about: For the report.
        make: A fresh module, with weights from torch's global generator, which is seeded here.
        batches: At least 8, of one kind; everybody takes them in this order, again and again.
        loss: From the module's output and ``y``.
        threads: For computing; with one, the process is pinned to one core.
        turn: Steps in a turn.
        warmup: Steps before the first turn.
        learning_rate: AdamW's; betas and epsilon are torch's defaults.
        weight_decay: AdamW's.
        peers: Whether trainers of other libraries take part, beside loops by hand and flax.
        memory: Whether peak memory is measured too.
        device: Where modules and batches are.
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
        """The same on another device. Its batches are there, so that nobody waits for copies."""
        batches = [{name: value.to(device) for name, value in batch.items()} for batch in self.batches]
        return dataclasses.replace(self, device=device, batches=batches, threads=1, memory=True)

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(self.device)

    def adamw(self, module: nn.Module) -> torch.optim.AdamW:
        """The optimizer of every contestant that uses torch's."""
        return torch.optim.AdamW(module.parameters(), self.learning_rate, weight_decay=self.weight_decay, fused=True)
