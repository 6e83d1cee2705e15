"""Losses of reinforcement learning on recorded data."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Case

ACTIONS = 3


class ActorCritic(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout))
        self.policy, self.value = nn.Linear(16, ACTIONS), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.distributions.Categorical, torch.Tensor]:
        hidden = self.body(x)
        return torch.distributions.Categorical(logits=self.policy(hidden)), self.value(hidden).squeeze(-1)


def experience() -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(8, 4),
        "next": torch.randn(8, 4),
        "action": torch.randint(0, ACTIONS, (8,)),
        "reward": torch.randn(8),
        "done": torch.randint(0, 2, (8,)).float(),
        "log_prob": -torch.rand(8) - 0.5,
    }


def ppo(model: Any, batch: Any) -> torch.Tensor:
    policy, value = model(batch["x"])
    ratio = (policy.log_prob(batch["action"]) - batch["log_prob"]).exp()
    advantage = (batch["reward"] - value).detach()
    gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -gain.mean() + 0.5 * F.mse_loss(value, batch["reward"]) - 0.01 * policy.entropy().mean()


class QNetwork(nn.Module):
    """A Q-network with a frozen target network."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, ACTIONS))
        self.target = copy.deepcopy(self.online).requires_grad_(False)


def dqn(model: Any, batch: Any) -> torch.Tensor:
    value = model.online(batch["x"]).gather(1, batch["action"][:, None]).squeeze(1)
    with torch.no_grad():
        best = model.target(batch["next"]).max(1).values
        wanted = batch["reward"] + 0.9 * (1 - batch["done"]) * best
    return F.smooth_l1_loss(value, wanted)


class GaussianPolicy(nn.Module):
    """A policy with actions squashed by tanh, as in soft actor-critic."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.mean, self.log_scale = nn.Linear(16, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.distributions.Distribution:
        base = torch.distributions.Normal(self.mean(self.body(x)), self.log_scale.exp())
        squash = torch.distributions.TanhTransform(cache_size=1)
        return torch.distributions.Independent(torch.distributions.TransformedDistribution(base, squash), 1)


def squashed(model: Any, batch: Any) -> torch.Tensor:
    actions = batch["next"][:, :2].tanh() * 0.9
    return -(model(batch["x"]).log_prob(actions) * batch["reward"].tanh()).mean()


CASES = [
    Case("ppo, actor and critic", "torch", ActorCritic, experience, ppo),
    Case("dqn, frozen target", "torch", lambda p: QNetwork(), experience, dqn, False),
    Case("squashed gaussian policy", "torch", lambda p: GaussianPolicy(), experience, squashed, False),
]
