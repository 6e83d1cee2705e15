"""A tiny MLP, whose step time is nearly all dispatch overhead."""

import torch
from torch import nn

from benchmarks.workloads.workload import Workload, cross_entropy


def make(quick: bool) -> Workload:
    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "x": torch.randn(32, 64, generator=generator),
            "y": torch.randint(10, (32,), generator=generator),
        }
        for _ in range(16)
    ]
    return Workload(
        name="tiny_mlp",
        about="64-64-10, batch 32: dispatch",
        make=lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        batches=batches,
        loss=cross_entropy,
        turn=100 if quick else 1000,
        warmup=20 if quick else 200,
    )
