"""A small byte-level transformer."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fxtrain.core import check_positive_int

VOCABULARY = 256
"""The number of distinct bytes."""

PLAN: dict[str, Literal["column", "row"]] = {"blocks.*.qkv": "column", "blocks.*.up": "column", "blocks.*.out": "row"}
"""The modules that ``tensor_parallel`` splits, by heads and hidden features."""


KeysValues = tuple[Tensor, Tensor]
"""Rotated keys, and values, of one layer: float [batch, heads, length, channels] each."""

Cache = tuple[KeysValues, ...]
"""The keys and values of each layer."""


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

        Token by token, with a cache:

        >>> _, cache = model(torch.tensor([[104]]), cache=model.init_cache(1))
        >>> logits, cache = model(torch.tensor([[105]]), cache=cache)
        >>> torch.allclose(logits[:, -1], model(torch.tensor([[104, 105]]))[:, -1], atol=1e-5)
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

    def init_cache(self, batch_size: int) -> Cache:
        """Returns an empty cache.

        Args:
            batch_size: Number of sequences.
        """
        channels = self.config.width // self.config.heads
        empty = self.embedding.weight.new_zeros(batch_size, self.config.heads, 0, channels)
        return ((empty, empty),) * self.config.layers

    @overload
    def forward(self, tokens: Tensor, cache: None = None) -> Tensor: ...

    @overload
    def forward(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]: ...

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor | tuple[Tensor, Cache]:
        """Returns the logits of each next byte, and with a cache also the cache that includes these tokens.

        Args:
            tokens: Integers [batch, length], in [0, 256).
            cache: Keys and values of the tokens before these.

        Returns:
            float [batch, length, 256]. Row i depends on the cached tokens and tokens 0 to i.
        """
        start = 0 if cache is None else cache[0][0].shape[2]
        end = start + tokens.shape[1]
        x = self.embedding(tokens.long())
        cos, sin = self.cos[start:end], self.sin[start:end]
        extended: list[KeysValues] = []
        for index, block in enumerate(self.blocks):
            x, keys_values = block(x, cos, sin, None if cache is None else cache[index])
            if cache is not None:
                extended.append(keys_values)
        logits = self.head(self.norm(x))
        return logits if cache is None else (logits, tuple(extended))


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        attended, keys_values = self.attention(self.attention_norm(x), cos, sin, past)
        x = x + self.dropout(attended)
        return x + self.dropout(self.perceptron(self.perceptron_norm(x))), keys_values


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.channels = config.width // config.heads
        self.qkv = _linear(config.width, 3 * config.width)
        self.out = _linear(config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        batch, length, _ = x.shape
        # One block of outputs per head, so that a rank with some of them has whole heads.
        q, k, v = self.qkv(x).view(batch, length, -1, 3, self.channels).permute(3, 0, 2, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mask = None
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            if length > 1:
                # is_causal would align the first query, not the last one, with the end of the keys.
                mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - length)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None)
        return self.out(mixed.transpose(1, 2).flatten(2)), (k, v)


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
