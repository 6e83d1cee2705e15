"""Transformers of x-transformers, vit-pytorch and open_clip."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from zoo.case import Case, lengths_mask, tokens
from zoo.timm_models import CLASSES, classify, images

VOCABULARY = 32


def text() -> dict[str, torch.Tensor]:
    return {"ids": tokens(VOCABULARY, 2, 9), "mask": lengths_mask(9, 9, 6).bool()}


def build_decoder(dropout: float) -> Any:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=16,
        depth=1,
        heads=2,
        attn_dim_head=8,
        rotary_pos_emb=True,
        use_rmsnorm=True,
        ff_glu=True,
        attn_dropout=dropout,
        ff_dropout=dropout,
    )
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers)


def next_token(model: Any, batch: Any) -> torch.Tensor:
    logits = model(batch["ids"][:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
    mask = batch["mask"][:, 1:]
    return (losses * mask).sum() / mask.sum()


def build_encoder(dropout: float) -> Any:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(
        dim=16, depth=1, heads=2, attn_dim_head=8, alibi_pos_bias=True, attn_dropout=dropout, ff_dropout=dropout
    )
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers)


def same_token(model: Any, batch: Any) -> torch.Tensor:
    losses = F.cross_entropy(model(batch["ids"], mask=batch["mask"]).transpose(1, 2), batch["ids"], reduction="none")
    return (losses * batch["mask"]).sum() / batch["mask"].sum()


def build_vit(dropout: float) -> Any:
    from vit_pytorch import ViT

    return ViT(
        image_size=16,
        patch_size=8,
        num_classes=CLASSES,
        dim=16,
        depth=1,
        heads=2,
        mlp_dim=32,
        dim_head=8,
        dropout=dropout,
        emb_dropout=dropout,
    )


def build_cct(dropout: float) -> Any:
    from vit_pytorch.cct import CCT

    return CCT(
        img_size=16,
        embedding_dim=16,
        n_conv_layers=1,
        num_layers=1,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=CLASSES,
        positional_embedding="learnable",
        dropout_rate=dropout,
        attention_dropout=dropout,
        stochastic_depth=0.0,
    )


def build_open_clip(dropout: float) -> Any:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(
        embed_dim=8,
        vision_cfg=CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16),
        text_cfg=CLIPTextCfg(context_length=8, vocab_size=VOCABULARY, width=16, heads=2, layers=1),
    )


def pairs() -> dict[str, torch.Tensor]:
    return {"images": torch.randn(3, 3, 16, 16), "texts": tokens(VOCABULARY, 3, 8)}


def contrast(model: Any, batch: Any) -> torch.Tensor:
    image, text, scale = model(batch["images"], batch["texts"])
    logits = scale * image @ text.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


CASES = [
    Case("decoder with rotary positions", "x_transformers", build_decoder, text, next_token),
    Case("encoder with alibi", "x_transformers", build_encoder, text, same_token),
    Case("vit", "vit_pytorch", build_vit, images(16), classify),
    Case("compact convolutional transformer", "vit_pytorch", build_cct, images(16), classify),
    Case("clip", "open_clip", build_open_clip, pairs, contrast, dropout=False),
]
