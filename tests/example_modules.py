"""Modules of several kinds with example inputs, and the tolerance of comparisons."""

import torch
from torch import nn


class Tied(nn.Module):
    """An embedding whose weight is tied to the head, with a method besides ``forward``."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, *, scale=1.0):
        return self.head(self.embed(tokens)) * scale

    def score(self, tokens):
        return self(tokens, scale=2.0).logsumexp(-1)


class Parts(nn.Module):
    """A list and a dict of submodules, a plain parameter, and buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.by_name = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Tanh()})
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.tensor(0), persistent=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        for layer in self.layers:
            x = layer(x).relu()
        return self.by_name["b"](self.by_name["a"](x)) * self.scale


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))


KINDS = {
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), (5, 4)),
    "convolutions, batch norm": (convolutions, (5, 1, 6, 6)),
    "tied": (Tied, "tokens"),
    "parts and buffers": (Parts, (5, 4)),
    "recurrent": (lambda: Recurrent(4, 3, num_layers=2), (6, 5, 4)),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (2, 5, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), (5, 4)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)), (5, 4)),
    "bfloat16": (lambda: nn.Linear(4, 2).bfloat16(), (5, 4)),
    "float16": (lambda: nn.Linear(4, 2).half(), (5, 4)),
    "double": (lambda: nn.Linear(4, 2).double(), (5, 4)),
    "complex": (lambda: nn.Linear(4, 2, dtype=torch.complex64), (5, 4)),
}


def example(kind):
    make, shape = KINDS[kind]
    module = seeded(make)
    generator = torch.Generator().manual_seed(1)
    if shape == "tokens":
        return module, torch.randint(0, 7, (3, 5), generator=generator)
    return module, torch.randn(shape, generator=generator).to(next(module.parameters()).dtype)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
