"""Typical user modules, covering features of torch.nn that the packages in the zoo do not use."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.case import Case, lengths_mask, tokens

VOCABULARY = 24


def text() -> dict[str, torch.Tensor]:
    return {"x": tokens(VOCABULARY, 3, 7), "lengths": torch.tensor([7, 4, 2]), "y": torch.tensor([0, 1, 1])}


def points() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(8, 4), "y": torch.randint(0, 3, (8,))}


def classify(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def classify_text(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"], batch["lengths"]), batch["y"])


class Recurrent(nn.Module):
    """Sequences packed by their lengths."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(x), lengths, batch_first=True)
        _, (hidden, _) = self.lstm(packed)
        return self.head(self.dropout(torch.cat([hidden[0], hidden[1]], 1)))


class Gated(nn.Module):
    """A GRU cell in a Python loop."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(VOCABULARY, 8), nn.GRUCell(8, 8), nn.Linear(8, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(len(x), 8, dtype=self.embedding.weight.dtype)
        for index in range(x.shape[1]):
            new = self.cell(self.dropout(self.embedding(x[:, index])), hidden)
            hidden = torch.where((index < lengths)[:, None], new, hidden)
        return self.head(hidden)


class Translator(nn.Module):
    """torch.nn.Transformer with a causal mask and a padding mask."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=dropout, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        hidden = self.transformer(
            self.embedding(source),
            self.embedding(target),
            tgt_mask=causal,
            src_key_padding_mask=torch.zeros_like(padding, dtype=causal.dtype).masked_fill(padding, -torch.inf),
            tgt_is_causal=True,
        )
        return self.head(hidden)


def sentences() -> dict[str, torch.Tensor]:
    return {
        "source": tokens(VOCABULARY, 2, 6),
        "target": tokens(VOCABULARY, 2, 5),
        "padding": lengths_mask(6, 6, 4) == 0,
    }


def translate(model: Any, batch: Any) -> torch.Tensor:
    logits = model(batch["source"], batch["target"][:, :-1], batch["padding"])
    return F.cross_entropy(logits.transpose(1, 2), batch["target"][:, 1:])


class AdaptiveSoftmax(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Dropout(dropout))
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(8, VOCABULARY, cutoffs=[8, 16])


def adaptive_loss(model: Any, batch: Any) -> torch.Tensor:
    return model.softmax(model.body(batch["x"]).flatten(0, 1), batch["x"].flatten()).loss


class SparseExperts(nn.Module):
    """Routes each example to one expert, so rows are selected by value."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        hidden = x.new_zeros(len(x), 8)
        for index, expert in enumerate(self.experts):
            rows = torch.where(chosen == index)[0]
            if len(rows):
                hidden = hidden.index_add(0, rows, expert(x[rows]) * weights[rows, None])
        return self.head(hidden)


class EarlyExit(nn.Module):
    """Stops at the first layer whose mean confidence is above a threshold."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.dropout(layer(x).tanh())
            if self.head(x).softmax(-1).max(-1).values.mean() > 0.6:
                break
        return self.head(x)


class Checkpointed(nn.Module):
    """Activation checkpointing: the backward pass recomputes activations, including dropout."""

    def __init__(self, dropout: float, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        return self.head(checkpoint(self.blocks[1], x, use_reentrant=self.reentrant))


class StraightThrough(torch.autograd.Function):
    """The sign with a straight-through gradient, in the old signature of autograd functions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return slope * (x.abs() <= 1)


class Binary(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.head, self.dropout = nn.Linear(4, 8), nn.Linear(8, 3), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(StraightThrough.apply(self.first(x))))


class Normalized(nn.Module):
    """Weight and spectral norm, by the new parametrizations and by the old hook."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
        self.second = nn.utils.weight_norm(nn.Linear(8, 8))
        self.third = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.dropout(self.second(self.first(x).relu()).relu()))


class Tied(nn.Module):
    """An embedding tied to the output layer, and parameters that the loss does not use."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(x)))


def tied_loss(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"][:, :-1]).transpose(1, 2), batch["x"][:, 1:])


class Convolutional(nn.Module):
    """A small U-Net with batch norm, group norm, pooling and a skip connection."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(dropout))
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x)
        return self.head(torch.cat([skip, self.up(self.deep(skip))], 1))


def pixels() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 1, 8, 8), "y": torch.randint(0, 2, (2, 8, 8))}


def connectionist(model: Any, batch: Any) -> torch.Tensor:
    """CTC over a recurrent network."""
    hidden, _ = model["rnn"](batch["x"])
    logits = model["head"](hidden).log_softmax(-1)
    return F.ctc_loss(logits, batch["y"], batch["x_lengths"], batch["y_lengths"])


def speech() -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(8, 2, 4),
        "y": torch.randint(1, 5, (2, 3)),
        "x_lengths": torch.tensor([8, 8]),
        "y_lengths": torch.tensor([3, 2]),
    }


def mixture(model: Any, batch: Any) -> torch.Tensor:
    """A mixture density network."""
    weights, means, scales = model(batch["x"]).chunk(3, -1)
    components = torch.distributions.Normal(means, F.softplus(scales) + 1e-3)
    chosen = torch.distributions.Categorical(logits=weights)
    density = torch.distributions.MixtureSameFamily(chosen, components)
    return -density.log_prob(batch["x"][:, 0]).mean()


def triplet(model: Any, batch: Any) -> torch.Tensor:
    first, second, third = model(batch["x"]).chunk(3)
    return F.triplet_margin_loss(first, second, third)


def build_ctc(dropout: float) -> Any:
    return nn.ModuleDict({"rnn": nn.RNN(4, 8), "head": nn.Linear(8, 5)})


CASES = [
    Case("lstm, packed sequences", "torch", Recurrent, text, classify_text),
    Case("gru cell in a loop", "torch", Gated, text, classify_text),
    Case("torch.nn.Transformer", "torch", Translator, sentences, translate),
    Case("adaptive softmax", "torch", AdaptiveSoftmax, text, adaptive_loss),
    Case("experts, rows by value", "torch", SparseExperts, points, classify),
    Case("early exit", "torch", EarlyExit, points, classify),
    Case("activation checkpointing", "torch", lambda p: Checkpointed(p, reentrant=False), points, classify),
    Case("activation checkpointing, reentrant", "torch", lambda p: Checkpointed(p, reentrant=True), points, classify),
    Case("autograd.Function, old signature", "torch", Binary, points, classify),
    Case("weight norm and spectral norm", "torch", Normalized, points, classify),
    Case("tied and unused weights", "torch", Tied, text, tied_loss),
    Case("u-net by hand", "torch", Convolutional, pixels, classify),
    Case("rnn with ctc", "torch", build_ctc, speech, connectionist, False),
    Case(
        "mixture density network",
        "torch",
        lambda p: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 9)),
        points,
        mixture,
    ),
    Case(
        "triplet embedding",
        "torch",
        lambda p: nn.Sequential(nn.Linear(4, 8), nn.Dropout(p), nn.Linear(8, 4)),
        lambda: {"x": torch.randn(9, 4)},
        triplet,
    ),
]
