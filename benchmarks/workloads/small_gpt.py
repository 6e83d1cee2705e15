"""Small GPT: what a step computes counts, on one core."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads.workload import Workload, cross_entropy

HEADS = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make(quick: bool) -> Workload:
    layers, width, vocabulary, batch, length = (1, 32, 64, 2, 16) if quick else (4, 128, 512, 8, 64)
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(vocabulary, (8, batch, length + 1), generator=generator)
    return Workload(
        name="small_gpt",
        about=f"{layers} layers, width {width}, vocabulary {vocabulary}, batch {batch} x {length}: compute",
        make=lambda: GPT(layers, width, vocabulary, length),
        batches=[{"x": text[:, :-1].contiguous(), "y": text[:, 1:].contiguous()} for text in texts],
        loss=cross_entropy,
        turn=10,
        memory=True,
    )
