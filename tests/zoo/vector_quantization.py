"""Vector quantization, from a package and handwritten."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Case


def images() -> torch.Tensor:
    return torch.rand(4, 1, 8, 8)


class Autoencoder(nn.Module):
    """An encoder, a quantizer and a decoder."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 1, 1))
        self.quantizer = quantizer
        self.decoder = nn.Sequential(nn.Conv2d(4, 8, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1))


def build_package(name: str, **options: Any) -> Any:
    def build(dropout: float) -> Any:
        import vector_quantize_pytorch

        return Autoencoder(getattr(vector_quantize_pytorch, name)(**options))

    return build


def quantize_images(model: Any, batch: Any) -> torch.Tensor:
    quantized, _, commitment = model.quantizer(model.encoder(batch))
    return F.mse_loss(model.decoder(quantized), batch) + commitment.sum()


def quantize_finite(model: Any, batch: Any) -> torch.Tensor:
    quantized, _ = model.quantizer(model.encoder(batch))
    return F.mse_loss(model.decoder(quantized), batch)


class Codebook(nn.Module):
    """A codebook trained by its loss, with the gradient passed straight through, as in the paper's code."""

    def __init__(self, count: int = 6, width: int = 4) -> None:
        super().__init__()
        self.codes = nn.Embedding(count, width)
        nn.init.uniform_(self.codes.weight, -1 / count, 1 / count)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = x.permute(0, 2, 3, 1)
        distances = (flat.unsqueeze(-2) - self.codes.weight).square().sum(-1)
        found = self.codes(distances.argmin(-1))
        loss = F.mse_loss(found.detach(), flat) * 0.25 + F.mse_loss(found, flat.detach())
        passed = flat + (found - flat).detach()
        return passed.permute(0, 3, 1, 2), loss


def build_by_hand(dropout: float) -> Any:
    return Autoencoder(Codebook())


def by_hand_loss(model: Any, batch: Any) -> torch.Tensor:
    quantized, loss = model.quantizer(model.encoder(batch))
    return F.mse_loss(model.decoder(quantized), batch) + loss


CASES = [
    Case(
        "vq-vae, learnable codebook",
        "vector_quantize_pytorch",
        build_package(
            "VectorQuantize",
            dim=4,
            codebook_size=6,
            channel_last=False,
            accept_image_fmap=True,
            learnable_codebook=True,
            ema_update=False,
        ),
        images,
        quantize_images,
        False,
    ),
    Case(
        "vq-vae, averaged codebook",
        "vector_quantize_pytorch",
        build_package("VectorQuantize", dim=4, codebook_size=6, accept_image_fmap=True, kmeans_init=False),
        images,
        quantize_images,
        False,
    ),
    Case(
        "finite scalar quantization",
        "vector_quantize_pytorch",
        build_package("FSQ", levels=[4, 3], dim=4),
        images,
        quantize_finite,
        False,
    ),
    Case("vq-vae by hand", "torch", build_by_hand, images, by_hand_loss, False),
]
