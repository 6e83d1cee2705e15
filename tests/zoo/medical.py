"""Segmentation models of monai and segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from zoo.case import Case, with_dropout


def scans() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 1, 16, 16), "y": torch.randint(0, 2, (2, 16, 16))}


def segment(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def dice(model: Any, batch: Any) -> torch.Tensor:
    from monai.losses import DiceCELoss

    return DiceCELoss(to_onehot_y=True, softmax=True)(model(batch["x"]), batch["y"][:, None])


def build_unet(dropout: float) -> Any:
    from monai.networks.nets import UNet

    return UNet(2, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, dropout=dropout)


def build_segresnet(dropout: float) -> Any:
    from monai.networks.nets import SegResNet

    return SegResNet(
        2, 4, 1, 2, dropout_prob=dropout or None, blocks_down=(1, 1), blocks_up=(1,), norm=("GROUP", {"num_groups": 2})
    )


def build_unetr(dropout: float) -> Any:
    from monai.networks.nets import ViT

    return ViT(
        1,
        16,
        8,
        hidden_size=16,
        mlp_dim=32,
        num_layers=1,
        num_heads=2,
        spatial_dims=2,
        classification=True,
        num_classes=2,
        dropout_rate=dropout,
    )


def classify(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"])[0], batch["y"][:, 0, 0])


def build_smp(name: str) -> Any:
    def build(dropout: float) -> Any:
        import segmentation_models_pytorch
        from segmentation_models_pytorch.encoders._base import EncoderMixin

        class Encoder(torch.nn.Module, EncoderMixin):
            """A two-stage encoder in place of a pretrained network."""

            def __init__(self) -> None:
                super().__init__()
                self._in_channels, self._depth, self._output_stride = 1, 2, 4
                self._out_channels = [1, 8, 8]
                self.stages = torch.nn.ModuleList(
                    torch.nn.Sequential(torch.nn.Conv2d(a, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
                    for a in (1, 8)
                )

            def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
                found = [x]
                for stage in self.stages:
                    found.append(stage(found[-1]))
                return found

        model = segmentation_models_pytorch.Unet(
            "resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(8, 8, 8), in_channels=1, classes=2
        )
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

        model.encoder = Encoder()
        model.decoder = UnetDecoder(model.encoder.out_channels, (8, 8), n_blocks=2)
        return with_dropout(model, dropout)

    return build


CASES = [
    Case("unet", "monai", build_unet, scans, dice),
    Case("segresnet", "monai", build_segresnet, scans, segment),
    Case("vit", "monai", build_unetr, scans, classify),
    Case("unet", "segmentation_models_pytorch", build_smp("Unet"), scans, segment, dropout=False),
]
