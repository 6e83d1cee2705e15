"""Denoisers and autoencoders of diffusers. Noise and time steps are part of the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from zoo.case import Case


def noisy() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([3, 700]), "noise": torch.randn(2, 3, 8, 8)}


def classed() -> dict[str, torch.Tensor]:
    return {**noisy(), "class_labels": torch.tensor([0, 2])}


def with_text() -> dict[str, torch.Tensor]:
    return {**noisy(), "encoder_hidden_states": torch.randn(2, 5, 8)}


def denoise(model: Any, batch: Any) -> torch.Tensor:
    given = {name: value for name, value in batch.items() if name not in ("x", "t", "noise")}
    return F.mse_loss(model(batch["x"], batch["t"], **given).sample, batch["noise"])


def reconstruct(model: Any, batch: Any) -> torch.Tensor:
    posterior = model.encode(batch["x"]).latent_dist
    latent = posterior.mean + posterior.std * batch["noise"]
    return F.mse_loss(model.decode(latent).sample, batch["x"]) + 1e-3 * posterior.kl().mean()


def images() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3, 8, 8), "noise": torch.randn(2, 2, 4, 4)}


def build_unet(dropout: float) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        dropout=dropout,
    )


def build_conditioned_unet(dropout: float) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        dropout=dropout,
    )


def build_dit(dropout: float) -> Any:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=4,
        norm_num_groups=1,
        dropout=dropout,
    )
    for part in model.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = dropout
    return model


def build_autoencoder(dropout: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
    )


CASES = [
    Case("unet2d", "diffusers", build_unet, noisy, denoise),
    Case("unet2d, conditioned", "diffusers", build_conditioned_unet, with_text, denoise),
    Case("dit", "diffusers", build_dit, classed, denoise),
    Case("vae (AutoencoderKL)", "diffusers", build_autoencoder, images, reconstruct, dropout=False),
]
