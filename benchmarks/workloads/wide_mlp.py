"""A wide MLP, whose step time is limited by the memory traffic of parameters and optimizer state."""

import torch
from torch import nn

from benchmarks.workloads.workload import Workload, squared_error


def wide(layers: int, width: int) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(width, width)
        # Keeps gradients far above the epsilon of AdamW.
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def make(quick: bool) -> Workload:
    layers, width, batch = 8, 64 if quick else 2048, 64
    generator = torch.Generator().manual_seed(1)
    return Workload(
        name="wide_mlp",
        about=f"{layers} x Linear({width}), batch {batch}, two threads: memory",
        make=lambda: wide(layers, width),
        batches=[
            {
                "x": torch.randn(batch, width, generator=generator),
                "y": torch.randn(batch, width, generator=generator),
            }
            for _ in range(8)
        ],
        loss=squared_error,
        threads=2,
        turn=20 if quick else 3,
        warmup=4,
        learning_rate=1e-4,
        peers=False,
        memory=True,
    )
