"""A small byte-level transformer."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fxtrain.core import check_positive_int

VOCABULARY = 256
"""The number of distinct bytes."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a transformer.

    Args:
        layers: Number of blocks of attention and a multilayer perceptron.
        width: Channels of the residual stream, a multiple of ``2 * heads``.
        heads: Attention heads per block.
        length: Maximum sequence length, in bytes.
        dropout: Dropout probability of the outputs of attention and perceptron, in [0, 1).

    Raises:
        TypeError: A number is not an int.
        ValueError: A value is out of range, or ``width`` is not a multiple of ``2 * heads``.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    length: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "length"):
            check_positive_int(name, getattr(self, name))
        if self.width % (2 * self.heads):
            raise ValueError(
                f"expected width to be a multiple of {2 * self.heads}, because each of {self.heads} heads has an even "
                f"number of channels, got {self.width}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"expected dropout to be at least 0 and below 1, got {self.dropout}.")


class Transformer(nn.Module):
    """A causal byte-level transformer with pre-norm blocks, rotary positions, and tied embedding and head.

    Args:
        config: The shape.
        generator: The generator of the initial weights. The global one is neither read nor advanced.

    Example:
        >>> model = Transformer(Config(layers=1, width=16, heads=2, length=8), torch.Generator().manual_seed(0))
        >>> model(torch.tensor([[104, 105]])).shape
        torch.Size([1, 2, 256])
        >>> model.head.weight is model.embedding.weight
        True

    References:
        Vaswani et al. 2017, "Attention is all you need" (arXiv:1706.03762).
        Su et al. 2021, "RoFormer" (arXiv:2104.09864).
        Press and Wolf 2017, "Using the output embedding to improve language models" (arXiv:1608.05859).
    """

    cos: Tensor  # float32 [length, width / heads / 2]
    sin: Tensor

    def __init__(self, config: Config, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.embedding = cast(nn.Embedding, skip_init(nn.Embedding, VOCABULARY, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = _linear(config.width, VOCABULARY)
        self.head.weight = self.embedding.weight
        cos, sin = _rotary(config.length, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize(generator)

    def _initialize(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.embedding.weight, std=self.config.width**-0.5, generator=generator)
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2:
                # Layers that add to the residual stream start small, in proportion to 1 / sqrt(number of additions).
                scale = (2 * self.config.layers) ** -0.5 if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of each next byte.

        Args:
            tokens: Integers [batch, length], in [0, 256).

        Returns:
            float [batch, length, 256]. Row i depends on tokens 0 to i.
        """
        length = tokens.shape[1]
        x = self.embedding(tokens.long())
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


class Block(nn.Module):
    """A residual block: ``x + attention(norm(x))``, then ``x + perceptron(norm(x))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.perceptron_norm = nn.RMSNorm(config.width)
        self.perceptron = Perceptron(config)
        # A dropout of 0 would still be traced as a site of random samples.
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.perceptron(self.perceptron_norm(x)))


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = _linear(config.width, 3 * config.width)
        self.out = _linear(config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Perceptron(nn.Module):
    """A perceptron, width -> 4 * width -> width, with a GELU in between."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = _linear(config.width, 4 * config.width)
        self.out = _linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x)))


def _rotary(length: int, channels: int) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of the rotary angles, float32 [length, channels / 2] each."""
    frequencies = 10_000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    # The constructor of nn.Linear would sample weights with the global generator.
    return cast(nn.Linear, skip_init(nn.Linear, inputs, outputs, bias=False))
