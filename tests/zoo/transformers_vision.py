"""Vision models of transformers, and CLIP."""

from __future__ import annotations

from typing import Any

import torch

from zoo.case import Case, lengths_mask, tokens
from zoo.transformers_text import HIDDEN, case

CLASSES = 3
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_labels": CLASSES,
}


def images(size: int) -> Any:
    def batch() -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 2])}

    return batch


def segmentation() -> dict[str, torch.Tensor]:
    labels = torch.randint(0, CLASSES, (2, 32, 32))
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": labels}


def image_and_text() -> dict[str, torch.Tensor]:
    ids = tokens(40, 2, 6)
    ids[:, -1] = 47  # the end-of-text token, from which the model pools
    return {"input_ids": ids, "attention_mask": lengths_mask(6, 6, 6), "pixel_values": torch.randn(2, 3, 8, 8)}


def clip_loss(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch, return_loss=True).loss


def build_clip(dropout: float) -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "eos_token_id": 47,
        "attention_dropout": dropout,
    }
    vision = {key: value for key, value in VIT.items() if key != "num_labels"}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config={**vision, "attention_dropout": dropout}, projection_dim=8)
    )


def build_detr(dropout: float) -> Any:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=4,
            num_labels=CLASSES,
            dropout=dropout,
            attention_dropout=dropout,
        )
    )


def detection() -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(2, 3, 32, 32),
        "pixel_mask": torch.ones(2, 32, 32, dtype=torch.int64),
        "labels": [
            {"class_labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.2},
            {"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4) * 0.4 + 0.2},
        ],
    }


def detr_matching(model: Any, batch: Any) -> torch.Tensor:
    """The loss of DETR from transformers, with class weights in the dtype of the logits."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    found = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    criterion = ImageLoss(matcher, CLASSES, 0.1, ["labels", "boxes"]).to(found.logits.dtype)
    losses = criterion({"logits": found.logits, "pred_boxes": found.pred_boxes}, batch["labels"])
    return losses["loss_ce"] + 5 * losses["loss_bbox"] + 2 * losses["loss_giou"]


def detr_loss(model: Any, batch: Any) -> torch.Tensor:
    """The loss without Hungarian matching: each object is matched to the query of its index."""
    found = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    total = found.logits.new_zeros(())
    for index, labels in enumerate(batch["labels"]):
        count = len(labels["class_labels"])
        total = total + torch.nn.functional.cross_entropy(found.logits[index, :count], labels["class_labels"])
        total = total + (found.pred_boxes[index, :count] - labels["boxes"]).abs().mean()
    return total


CASES = [
    case("vit", "ViTConfig", "ViTForImageClassification", VIT, dropouts=HIDDEN, batch=images(8)),
    case("beit", "BeitConfig", "BeitForImageClassification", VIT, dropouts=HIDDEN, batch=images(8)),
    case("dinov2", "Dinov2Config", "Dinov2ForImageClassification", VIT, dropouts=HIDDEN, batch=images(8)),
    case(
        "swin",
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2],
            "num_heads": [2],
            "window_size": 4,
            "num_labels": CLASSES,
            "drop_path_rate": 0.0,
        },
        dropouts=HIDDEN,
        batch=images(16),
    ),
    case(
        "convnext",
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "num_labels": CLASSES},
        batch=images(16),
    ),
    case(
        "segformer",
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "num_labels": CLASSES,
            "drop_path_rate": 0.0,
        },
        dropouts=(*HIDDEN, "classifier_dropout_prob"),
        batch=segmentation,
    ),
    Case("clip", "transformers", build_clip, image_and_text, clip_loss),
    Case("detr, hungarian matching", "transformers", build_detr, detection, detr_matching),
    Case("detr, fixed matching", "transformers", build_detr, detection, detr_loss),
]
