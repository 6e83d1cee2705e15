"""Detectors. Their losses match boxes to anchors, so they branch on values."""

from __future__ import annotations

from typing import Any

import torch

from zoo.case import Case

SIZE = 32


def backbone() -> Any:
    body = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, 2, 1),
        torch.nn.ReLU(),
    )
    body.out_channels = 16
    return body


def build_retinanet(dropout: float) -> Any:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),))
    return RetinaNet(backbone(), num_classes=3, anchor_generator=anchors, min_size=SIZE, max_size=SIZE)


def build_faster_rcnn(dropout: float) -> Any:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.rpn import RegionProposalNetwork
    from torchvision.ops import MultiScaleRoIAlign

    class Proposals(RegionProposalNetwork):
        """Casts labels to the dtype of the logits, because torch's loss is in float32 and torch.func's in float64."""

        def compute_loss(self, objectness: torch.Tensor, deltas: Any, labels: Any, targets: Any) -> Any:
            return super().compute_loss(objectness, deltas, [part.to(objectness.dtype) for part in labels], targets)

    made = FasterRCNN(
        backbone(),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(featmap_names=["0"], output_size=2, sampling_ratio=2),
        min_size=SIZE,
        max_size=SIZE,
        rpn_pre_nms_top_n_train=16,
        rpn_post_nms_top_n_train=8,
        # Larger than the number of matches, so none of them is sampled at random.
        rpn_batch_size_per_image=1000,
        box_batch_size_per_image=1000,
    )
    made.rpn.__class__ = Proposals
    return made


def boxes() -> dict[str, Any]:
    return {
        "images": [torch.rand(3, SIZE, SIZE), torch.rand(3, SIZE, SIZE)],
        "targets": [
            {"boxes": torch.tensor([[2.0, 2.0, 12.0, 14.0]]), "labels": torch.tensor([1])},
            {
                "boxes": torch.tensor([[4.0, 6.0, 20.0, 20.0], [16.0, 16.0, 30.0, 28.0]]),
                "labels": torch.tensor([2, 1]),
            },
        ],
    }


def loss(model: Any, batch: Any) -> torch.Tensor:
    losses = model(batch["images"], batch["targets"])
    return torch.stack(list(losses.values())).sum()


def scores(model: Any, batch: Any) -> torch.Tensor:
    return torch.stack([found["scores"].sum() for found in model(batch["images"])]).sum()


CASES = [
    Case("retinanet", "torchvision", build_retinanet, boxes, loss, dropout=False, measure=scores),
    Case("faster r-cnn", "torchvision", build_faster_rcnn, boxes, loss, dropout=False, measure=scores),
]
