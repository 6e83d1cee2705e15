"""Image models of torchvision, reduced to one block per stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from zoo.case import Case, with_dropout
from zoo.timm_models import CLASSES, classify, images


def case(name: str, build: Callable[[Any, float], Any], size: int = 16, *, dropout: bool = True) -> Case:
    def imported(probability: float) -> Any:
        import torchvision

        return build(torchvision.models, probability)

    return Case(name, "torchvision", imported, images(size), classify, dropout=dropout)


def resnet(models: Any, dropout: float) -> Any:
    made = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=64)
    made.layer3 = made.layer4 = torch.nn.Identity()
    made.fc = torch.nn.Linear(128, CLASSES)
    return made


def densenet(models: Any, dropout: float) -> Any:
    return models.DenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, drop_rate=dropout, num_classes=CLASSES
    )


def vision_transformer(models: Any, dropout: float) -> Any:
    return models.VisionTransformer(
        image_size=16,
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=dropout,
        attention_dropout=dropout,
        num_classes=CLASSES,
    )


def swin(models: Any, dropout: float) -> Any:
    return models.SwinTransformer(
        patch_size=[2, 2],
        embed_dim=8,
        depths=[2],
        num_heads=[2],
        window_size=[4, 4],
        dropout=dropout,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )


def squeezenet(models: Any, dropout: float) -> Any:
    made = models.SqueezeNet(version="1_1", num_classes=CLASSES, dropout=dropout)
    fire = models.squeezenet.Fire
    made.features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), fire(8, 4, 8, 8))
    made.classifier[1] = torch.nn.Conv2d(16, CLASSES, 1)
    return made


def build_fcn(dropout: float) -> Any:
    import torchvision
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone = torchvision.models._utils.IntermediateLayerGetter(
        torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()), {"2": "out"}
    )
    return with_dropout(FCN(backbone, FCNHead(16, CLASSES)), dropout)


def pixels() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3, 16, 16), "y": torch.randint(0, CLASSES, (2, 16, 16))}


def segment(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"])["out"], batch["y"])


CASES = [
    case("resnet", resnet, dropout=False),
    case("densenet", densenet),
    case("vit", vision_transformer),
    case("swin", swin),
    case("squeezenet", squeezenet),
    Case("fcn (segmentation)", "torchvision", build_fcn, pixels, segment),
]
