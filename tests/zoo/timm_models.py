"""Image models of timm, reduced to one block per stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from zoo.case import Case

CLASSES = 3


def images(size: int) -> Callable[[], dict[str, torch.Tensor]]:
    def batch() -> dict[str, torch.Tensor]:
        return {"x": torch.randn(4, 3, size, size), "y": torch.tensor([0, 2, 1, 0])}

    return batch


def classify(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def case(name: str, build: Callable[[Any, float], Any], size: int = 16, *, dropout: bool = True) -> Case:
    def imported(probability: float) -> Any:
        import timm

        return build(timm.models, probability)

    return Case(name, "timm", imported, images(size), classify, dropout=dropout)


def resnet(models: Any, dropout: float) -> Any:
    return models.resnet.ResNet(
        models.resnet.BasicBlock,
        layers=(1, 1, 1, 1),
        channels=(8, 8, 8, 16),
        stem_width=8,
        num_classes=CLASSES,
        drop_rate=dropout,
    )


def vision_transformer(models: Any, dropout: float) -> Any:
    return models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=CLASSES, proj_drop_rate=dropout
    )


def efficientnet(models: Any, dropout: float) -> Any:
    from timm.models._efficientnet_builder import decode_arch_def

    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c16_se0.25"]])
    return models.efficientnet.EfficientNet(
        blocks, num_classes=CLASSES, num_features=16, stem_size=8, drop_rate=dropout
    )


def mobilenet_v3(models: Any, dropout: float) -> Any:
    from timm.models._efficientnet_builder import decode_arch_def

    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8_nre"], ["ir_r1_k3_s2_e2_c16_se0.25"]])
    return models.mobilenetv3.MobileNetV3(blocks, num_classes=CLASSES, num_features=16, stem_size=8, drop_rate=dropout)


def convnext(models: Any, dropout: float) -> Any:
    return models.convnext.ConvNeXt(
        num_classes=CLASSES,
        depths=(1, 1, 1, 1),
        dims=(8, 8, 8, 8),
        patch_size=2,
        drop_path_rate=dropout,
        ls_init_value=0.1,  # the default hides the blocks, and with them their dropout, for many steps
    )


def mixer(models: Any, dropout: float) -> Any:
    return models.mlp_mixer.MlpMixer(
        num_classes=CLASSES, img_size=16, patch_size=8, num_blocks=1, embed_dim=16, proj_drop_rate=dropout
    )


def swin(models: Any, dropout: float) -> Any:
    return models.swin_transformer.SwinTransformer(
        img_size=16,
        patch_size=2,
        num_classes=CLASSES,
        embed_dim=8,
        depths=(2,),
        num_heads=(2,),
        window_size=4,
        drop_path_rate=0.0,
        proj_drop_rate=dropout,
    )


def beit(models: Any, dropout: float) -> Any:
    return models.beit.Beit(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=CLASSES, proj_drop_rate=dropout
    )


CASES = [
    case("resnet", resnet, 32),
    case("vit", vision_transformer),
    case("efficientnet", efficientnet),
    case("mobilenetv3", mobilenet_v3),
    case("convnext, stochastic depth", convnext, 32),
    case("mlp-mixer", mixer),
    case("swin", swin),
    case("beit", beit),
]
