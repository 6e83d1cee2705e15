"""Networks differentiated with respect to their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.case import Case


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x)


def build_network(dropout: float) -> Any:
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def build_siren(dropout: float) -> Any:
    return nn.Sequential(nn.Linear(2, 16), Sine(), nn.Linear(16, 16), Sine(), nn.Linear(16, 1))


def places() -> dict[str, torch.Tensor]:
    return {"inside": torch.rand(8, 2), "edge": torch.rand(4, 2), "y": torch.randn(4, 1)}


def heat_equation(model: Any, batch: Any) -> torch.Tensor:
    """The squared residual of u_t = u_xx inside, plus the error on the boundary."""
    inside = batch["inside"].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(inside).sum(), inside, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 0].sum(), inside, create_graph=True)
    return (slope[:, 1] - bend[:, 0]).square().mean() + (model(batch["edge"]) - batch["y"]).square().mean()


def laplace(model: Any, batch: Any) -> torch.Tensor:
    """The squared Laplacian, as the trace of a torch.func Hessian, plus the error on the boundary."""

    def value(point: torch.Tensor) -> torch.Tensor:
        return model(point).squeeze()

    hessians = torch.func.vmap(torch.func.hessian(value))(batch["inside"])
    trace = hessians.diagonal(dim1=1, dim2=2).sum(-1)
    return trace.square().mean() + (model(batch["edge"]) - batch["y"]).square().mean()


class Hamiltonian(nn.Module):
    """Time derivatives from a learned energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return torch.stack([slope[:, 1], -slope[:, 0]], 1)


def derivative_loss(model: Any, batch: Any) -> torch.Tensor:
    return (model(batch["inside"]) - batch["inside"].flip(1)).square().mean()


CASES = [
    Case("heat equation (pinn)", "torch", build_network, places, heat_equation, False),
    Case("laplace equation (siren, torch.func)", "torch", build_siren, places, laplace, False),
    Case("hamiltonian network", "torch", lambda p: Hamiltonian(), places, derivative_loss, False),
]
