"""Models of speech."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from zoo.case import Case, lengths_mask, tokens
from zoo.transformers_text import case

WAV2VEC2 = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "ctc_loss_reduction": "mean",
}
SPEECH_DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")


def speech() -> dict[str, torch.Tensor]:
    mask = lengths_mask(256, 256, 200)
    return {"input_values": torch.randn(2, 256) * mask, "attention_mask": mask, "labels": tokens(16, 2, 4)}


def spectrogram() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 16), "labels": tokens(16, 2, 5)}


def build_conformer(dropout: float) -> Any:
    from torchaudio.models import Conformer

    return Conformer(input_dim=16, num_heads=2, ffn_dim=32, num_layers=1, depthwise_conv_kernel_size=3, dropout=dropout)


def frames() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 10, 16), "lengths": torch.tensor([10, 7]), "y": torch.randn(2, 10, 16)}


def conformer_loss(model: Any, batch: Any) -> torch.Tensor:
    found, lengths = model(batch["x"], batch["lengths"])
    mask = torch.arange(10) < lengths[:, None]
    return ((found - batch["y"]).square().mean(-1) * mask).sum() / mask.sum()


def build_deepspeech(dropout: float) -> Any:
    from torchaudio.models import DeepSpeech

    return DeepSpeech(n_feature=8, n_hidden=16, n_class=8, dropout=dropout)


def deepspeech_loss(model: Any, batch: Any) -> torch.Tensor:
    logits = model(batch["x"]).transpose(0, 1)
    return F.ctc_loss(logits, batch["y"], torch.tensor([10, 10]), torch.tensor([3, 2]))


def transcribed() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 1, 10, 8), "y": torch.randint(1, 8, (2, 3))}


CASES = [
    case("wav2vec2", "Wav2Vec2Config", "Wav2Vec2ForCTC", WAV2VEC2, dropouts=SPEECH_DROPOUTS, batch=speech),
    case("hubert", "HubertConfig", "HubertForCTC", WAV2VEC2, dropouts=SPEECH_DROPOUTS, batch=speech),
    case(
        "whisper",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 16,
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_source_positions": 8,
            "max_target_positions": 8,
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        dropouts=("dropout", "attention_dropout", "activation_dropout"),
        batch=spectrogram,
    ),
    Case("conformer", "torchaudio", build_conformer, frames, conformer_loss),
    Case("deepspeech", "torchaudio", build_deepspeech, transcribed, deepspeech_loss),
]
