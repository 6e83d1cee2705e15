"""A ResNet on scikit-learn's digits: convolutions, and batch norms with running statistics in the state."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.workloads.workload import Workload, cross_entropy


class Residual(nn.Module):
    """relu(skip(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(inside)))


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.ModuleList(Residual(i, o, 1 if i == o else 2) for i, o in pairs)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def make(quick: bool) -> Workload:
    widths, batch = ((8, 16), 16) if quick else ((32, 32, 64, 64), 64)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(1))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    return Workload(
        name="digits_resnet",
        about=f"ResNet with BatchNorm, widths {widths}, on 8 x 8 digits, batch {batch}",
        make=lambda: ResNet(widths),
        batches=[
            {"x": images[i * batch : (i + 1) * batch].clone(), "y": labels[i * batch : (i + 1) * batch].clone()}
            for i in range(16)
        ],
        loss=cross_entropy,
        turn=10,
    )
