"""200 small parameters, 600 leaves with the moments of AdamW, whose cost per leaf dominates the computation."""

import torch
from torch import Tensor, nn

from benchmarks.workloads.workload import Workload, squared_error

WIDTH = 16


class Rows(nn.Module):
    """A linear map with a separate parameter for each row."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.stack(list(self.rows)).T


def make(quick: bool) -> Workload:
    count = 20 if quick else 200
    generator = torch.Generator().manual_seed(1)
    return Workload(
        name="many_leaves",
        about=f"{3 * count} leaves of {WIDTH} scalars, batch 8: cost per leaf",
        make=lambda: Rows(count),
        batches=[
            {
                "x": torch.randn(8, WIDTH, generator=generator),
                "y": torch.randn(8, count, generator=generator),
            }
            for _ in range(8)
        ],
        loss=squared_error,
        turn=20 if quick else 200,
        warmup=20,
        peers=False,
    )
