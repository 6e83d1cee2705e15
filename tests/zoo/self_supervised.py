"""Representations learned from two views of the data."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Case


def views() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(6, 8), "b": torch.randn(6, 8)}


class SimSiam(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        self.predictor = nn.Linear(16, 16)


def simsiam(model: Any, batch: Any) -> torch.Tensor:
    first, second = model.encoder(batch["a"]), model.encoder(batch["b"])
    similar = F.cosine_similarity(model.predictor(first), second.detach())
    return -(similar + F.cosine_similarity(model.predictor(second), first.detach())).mean() / 2


class MomentumContrast(nn.Module):
    """MoCo with a frozen key encoder and a queue of keys in a buffer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4))
        self.keys = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(12, 4)))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        query = F.normalize(self.encoder(a))
        with torch.no_grad():
            key = F.normalize(self.keys(b))
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().T], 1) / 0.2
        if self.training:
            self.queue = torch.cat([key, self.queue[: -len(key)]])
        return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.int64))


def moco(model: Any, batch: Any) -> torch.Tensor:
    return model(batch["a"], batch["b"])


class BarlowTwins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
        self.norm = nn.BatchNorm1d(4, affine=False)


def barlow(model: Any, batch: Any) -> torch.Tensor:
    first, second = (model.norm(model.encoder(batch[name])) for name in ("a", "b"))
    correlation = first.T @ second / len(first)
    return (correlation - torch.eye(4, dtype=correlation.dtype)).square().sum()


CASES = [
    Case("simsiam", "torch", SimSiam, views, simsiam),
    Case("momentum contrast", "torch", MomentumContrast, views, moco),
    Case("barlow twins", "torch", lambda p: BarlowTwins(), views, barlow, False),
]
