"""The model and data of ``fxtrain lm`` with its default options."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fxtrain as fx
from fxtrain.cli._corpus import read_corpus
from fxtrain.cli._transformer import Config, Transformer


def model(length: int = 128, *, layers: int = 4, width: int = 128) -> Transformer:
    return Transformer(Config(layers, width, 4, length, 0.1), torch.Generator().manual_seed(0))


def data(length: int = 128, batch_size: int = 16) -> tuple[Any, Any]:
    """Returns batches of the training text, and a few batches of the validation text."""
    corpus = read_corpus(None)
    held_out = fx.data.windows(corpus.validation, length, batch_size, shuffle=False)
    return fx.data.windows(corpus.train, length, batch_size, seed=0), fx.data.sequence([held_out[i] for i in range(4)])


def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy in nats per byte."""
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())
