"""Normalizing flows and neural differential equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.case import Case


def points() -> torch.Tensor:
    return torch.randn(8, 3)


def negative_log_likelihood(model: Any, batch: Any) -> torch.Tensor:
    return -model().log_prob(batch).mean()


def build_nsf(dropout: float) -> Any:
    import zuko

    return zuko.flows.NSF(3, transforms=1, bins=4, hidden_features=(8,))


def build_maf(dropout: float) -> Any:
    import zuko

    return zuko.flows.MAF(3, transforms=2, hidden_features=(8,))


class Field(nn.Module):
    """The right-hand side of dx/dt = f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class NeuralODE(nn.Module):
    """Integrates a field with a solver of torchdiffeq."""

    def __init__(self, solver: str, **options: Any) -> None:
        super().__init__()
        self.field, self.solver, self.options = Field(), solver, options

    def forward(self, start: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        import torchdiffeq

        return getattr(torchdiffeq, self.solver)(self.field, start, times, **self.options)


def trajectories() -> dict[str, torch.Tensor]:
    return {"start": torch.randn(4, 2), "times": torch.linspace(0, 1, 3), "y": torch.randn(3, 4, 2)}


def trajectory_loss(model: Any, batch: Any) -> torch.Tensor:
    return (model(batch["start"], batch["times"]) - batch["y"]).square().mean()


class Coupling(nn.Module):
    """A coupling layer of RealNVP with manually updated normalization statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        x = x - self.mean
        first, second = x.chunk(2, dim=1)
        shift, scale = self.net(first).chunk(2, dim=1)
        scale = scale.tanh()
        return torch.cat([second * scale.exp() + shift, first], 1), scale.sum(1)


def build_realnvp(dropout: float) -> Any:
    return nn.ModuleList([Coupling(), Coupling()])


def realnvp_loss(model: Any, batch: Any) -> torch.Tensor:
    base = torch.distributions.Normal(0.0, 1.0)
    total = batch.new_zeros(len(batch))
    for layer in model:
        batch, volume = layer(batch)
        total = total + volume
    return -(base.log_prob(batch).sum(1) + total).mean()


CASES = [
    Case("neural spline flow", "zuko", build_nsf, points, negative_log_likelihood, False),
    Case("masked autoregressive flow", "zuko", build_maf, points, negative_log_likelihood, False),
    Case(
        "neural ode, rk4",
        "torchdiffeq",
        lambda p: NeuralODE("odeint", method="rk4"),
        trajectories,
        trajectory_loss,
        False,
    ),
    Case(
        "neural ode, adaptive",
        "torchdiffeq",
        lambda p: NeuralODE("odeint", method="dopri5"),
        trajectories,
        trajectory_loss,
        False,
    ),
    Case(
        "neural ode, adjoint",
        "torchdiffeq",
        lambda p: NeuralODE("odeint_adjoint", method="rk4"),
        trajectories,
        trajectory_loss,
        False,
    ),
    Case("realnvp", "torch", build_realnvp, lambda: torch.randn(8, 4), realnvp_loss, False),
]
