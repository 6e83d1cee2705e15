"""Wide MLP: a step is as long as its parameters and the optimizer's memory take through the bus."""

import torch
from torch import nn

from benchmarks.workloads.workload import Workload, squared_error


def wide(layers: int, width: int) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(width, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")  # so that gradients stay far above epsilon
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
