"""Models of time series."""

from __future__ import annotations

import torch

from zoo.transformers_text import case


def windows() -> dict[str, torch.Tensor]:
    return {"past_values": torch.randn(2, 16, 3), "future_values": torch.randn(2, 4, 3)}


def dated_windows() -> dict[str, torch.Tensor]:
    return {
        "past_values": torch.randn(2, 14),
        "past_time_features": torch.randn(2, 14, 2),
        "past_observed_mask": torch.ones(2, 14),
        "future_values": torch.randn(2, 4),
        "future_time_features": torch.randn(2, 4, 2),
    }


CASES = [
    case(
        "patchtst",
        "PatchTSTConfig",
        "PatchTSTForPrediction",
        {
            "num_input_channels": 3,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "prediction_length": 4,
            "d_model": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "ffn_dim": 32,
        },
        dropouts=("attention_dropout", "ff_dropout", "head_dropout"),
        batch=windows,
    ),
    case(
        "time series transformer",
        "TimeSeriesTransformerConfig",
        "TimeSeriesTransformerForPrediction",
        {
            "prediction_length": 4,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            "context_length": 10,
            "lags_sequence": [1, 2, 4],
            "num_time_features": 2,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        },
        dropouts=("dropout", "attention_dropout", "activation_dropout"),
        batch=dated_windows,
    ),
]
