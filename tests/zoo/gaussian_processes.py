"""Gaussian processes of gpytorch."""

from __future__ import annotations

from typing import Any

import torch

from zoo.case import OTHER_BITS, Case

COUNT = 12


def inputs() -> torch.Tensor:
    return torch.linspace(0, 1, COUNT)


def data() -> dict[str, torch.Tensor]:
    return {"x": inputs(), "y": torch.sin(6 * inputs()) + 0.1 * torch.randn(COUNT)}


def build_exact(dropout: float) -> Any:
    import gpytorch

    class ExactProcess(gpytorch.models.ExactGP):
        def __init__(self, likelihood: Any) -> None:
            super().__init__(inputs().double(), torch.sin(6 * inputs()).double(), likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return ExactProcess(gpytorch.likelihoods.GaussianLikelihood())


def exact_loss(model: Any, batch: Any) -> torch.Tensor:
    """The negative log marginal likelihood per data point."""
    import gpytorch

    found = model.likelihood(model.forward(batch["x"]))
    with gpytorch.settings.fast_computations(False, False, False):
        return -found.log_prob(batch["y"]) / COUNT


def build_variational(dropout: float) -> Any:
    import gpytorch

    class VariationalProcess(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            points = torch.linspace(0, 1, 4)[:, None]
            distribution = gpytorch.variational.CholeskyVariationalDistribution(4)
            strategy = gpytorch.variational.VariationalStrategy(
                self, points, distribution, learn_inducing_locations=True
            )
            super().__init__(strategy)
            # Otherwise the first call of the strategy initializes these parameters with random noise.
            strategy.variational_params_initialized.fill_(1)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
            self.likelihood = gpytorch.likelihoods.GaussianLikelihood()

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return VariationalProcess()


def variational_loss(model: Any, batch: Any) -> torch.Tensor:
    import gpytorch

    objective = gpytorch.mlls.VariationalELBO(model.likelihood, model, num_data=COUNT)
    return -objective(model(batch["x"][:, None]), batch["y"])


CASES = [
    Case("exact gaussian process", "gpytorch", build_exact, data, exact_loss, False),
    Case(
        "variational gaussian process",
        "gpytorch",
        build_variational,
        data,
        variational_loss,
        dropout=False,
        limitation=OTHER_BITS,
    ),
]
