"""Adapters of peft: frozen models with a few trainable parameters."""

from __future__ import annotations

from typing import Any

from zoo.case import Case
from zoo.transformers_text import LLAMA, loss, padded


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def build_lora(dropout: float) -> Any:
    model = llama()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    return get_peft_model(model, config)


def build_ia3(dropout: float) -> Any:
    model = llama()
    from peft import IA3Config, get_peft_model

    return get_peft_model(model, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))


CASES = [
    Case("llama with lora", "peft", build_lora, padded, loss),
    Case("llama with ia3", "peft", build_ia3, padded, loss, dropout=False),
]
