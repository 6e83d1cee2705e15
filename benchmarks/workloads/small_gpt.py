"""A small GPT on one core, where the computation of a step dominates its overhead."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads.workload import Workload, cross_entropy


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make(quick: bool) -> Workload:
    size = (1, 32, 4, 64, 2, 16) if quick else (4, 128, 4, 512, 8, 64)
    return gpt("small_gpt", *size, about="compute", turn=10)


def gpt(
    name: str, layers: int, width: int, heads: int, vocabulary: int, batch: int, length: int, *, about: str, turn: int
) -> Workload:
    """Returns a GPT workload with random tokens."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(vocabulary, (8, batch, length + 1), generator=generator)
    return Workload(
        name=name,
        about=f"{layers} layers, width {width}, vocabulary {vocabulary}, batch {batch} x {length}: {about}",
        make=lambda: GPT(layers, width, heads, vocabulary, length),
        batches=[{"x": text[:, :-1].contiguous(), "y": text[:, 1:].contiguous()} for text in texts],
        loss=cross_entropy,
        turn=turn,
        memory=True,
    )
