"""Generative models: adversarial, latent-variable and score-based."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from zoo.case import Case


def build_players(dropout: float) -> Any:
    return {
        "generator": nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 2)),
        "critic": nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Linear(16, 1)),
    }


def samples() -> dict[str, torch.Tensor]:
    return {"real": torch.randn(8, 2), "noise": torch.randn(8, 4), "mix": torch.rand(8, 1)}


def critic_loss(model: Any, batch: Any) -> torch.Tensor:
    """The Wasserstein distance with a penalty on the norm of the critic's gradient."""
    fake = model["generator"](batch["noise"]).detach()
    between = (batch["mix"] * batch["real"] + (1 - batch["mix"]) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(model["critic"](between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    return model["critic"](fake).mean() - model["critic"](batch["real"]).mean() + 10 * penalty


def generator_loss(model: Any, batch: Any) -> torch.Tensor:
    return -model["critic"](model["generator"](batch["noise"])).mean()


def losses(model: Any, batch: Any) -> torch.Tensor:
    return critic_loss(model, batch) + generator_loss(model, batch)


def wgan_step(tx: Any) -> fx.Step:
    find = {
        "critic": fx.gradients(critic_loss, wrt="critic"),
        "generator": fx.gradients(generator_loss, wrt="generator"),
    }

    def step(state: fx.TrainState, batch: Any) -> tuple[fx.TrainState, fx.StepOutput]:
        metrics = {}
        for index, (name, gradients) in enumerate(find.items()):
            found = gradients(state, batch, index)
            state, _ = fx.apply_gradients(state, found.grads, tx[name], wrt=name)
            state, metrics[f"{name}_loss"] = state.replace(buffers=found.buffers), found.loss
        return state, fx.StepOutput({"loss": metrics["critic_loss"] + metrics["generator_loss"], **metrics})

    return fx.Step(step)


def wgan_plain(modules: Any, optimizers: Any, batch: Any) -> torch.Tensor:
    total = torch.zeros(())
    for name, function in (("critic", critic_loss), ("generator", generator_loss)):
        loss = function(modules, batch)
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        total = total + loss.detach()
    return total


class VariationalAutoencoder(nn.Module):
    """A standard variational autoencoder that takes its noise as an argument."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, Any]:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        posterior = torch.distributions.Normal(mean, log_scale.exp())
        return self.decoder(mean + log_scale.exp() * noise), posterior


def autoencode(model: Any, batch: Any) -> torch.Tensor:
    logits, posterior = model(batch["x"], batch["noise"])
    prior = torch.distributions.Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(-1).mean()
    return F.binary_cross_entropy_with_logits(logits, batch["x"]) + divergence


def encoded() -> dict[str, torch.Tensor]:
    return {"x": torch.rand(8, 16), "noise": torch.randn(8, 4)}


class ScoreNetwork(nn.Module):
    """The gradient of a learned log density."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(self.layers(x).sum(), x, create_graph=True)[0]


def score_matching(model: Any, batch: Any) -> torch.Tensor:
    return (model(batch["real"] + 0.1 * batch["noise"][:, :2]) + batch["noise"][:, :2] / 0.1).square().mean()


CASES = [
    Case("wgan-gp, step by hand", "torch", build_players, samples, losses, step=wgan_step, plain=wgan_plain),
    Case("variational autoencoder", "torch", VariationalAutoencoder, encoded, autoencode),
    Case("denoising score matching", "torch", lambda p: ScoreNetwork(), samples, score_matching, False),
]
