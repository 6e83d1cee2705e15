"""Language models of transformers, with padded batches and attention masks."""

from __future__ import annotations

from typing import Any

import torch

from zoo.case import OTHER_BITS, Case, Limitation, lengths_mask, tokens

VOCABULARY, LENGTH = 48, 10
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
}


def loss(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch).loss


def padded() -> dict[str, torch.Tensor]:
    """Two texts of different lengths, padded on the right."""
    ids, mask = tokens(VOCABULARY, 2, LENGTH), lengths_mask(LENGTH, LENGTH, 6)
    ids = torch.where(mask.bool(), ids, 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def padded_left() -> dict[str, torch.Tensor]:
    return {name: value.flip(1) for name, value in padded().items()}


def windowed() -> dict[str, torch.Tensor]:
    """Texts of two windows with one global token. Windows without any text would give NaN."""
    ids = tokens(VOCABULARY, 2, 8)
    return {
        "input_ids": ids,
        "attention_mask": lengths_mask(8, 8, 7),
        "global_attention_mask": lengths_mask(8, 1, 1),
        "labels": ids.clone(),
    }


def unpadded() -> dict[str, torch.Tensor]:
    ids = tokens(VOCABULARY, 2, LENGTH)
    return {"input_ids": ids, "labels": ids.clone()}


def sequence_to_sequence() -> dict[str, torch.Tensor]:
    source = padded()
    target = tokens(VOCABULARY, 2, 6)
    target[1, 4:] = -100
    return {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": target}


def case(
    name: str,
    config: str,
    model: str,
    sizes: dict[str, Any],
    *,
    dropouts: tuple[str, ...] = (),
    batch: Any = padded,
    recomputes: bool = False,
    limitation: Limitation | None = None,
) -> Case:
    """A case with a model built from its configuration.

    Args:
        name: The name of the case.
        config: Name of the configuration class.
        model: Name of the model class.
        sizes: Arguments of the configuration.
        dropouts: Names of the dropout probabilities among the arguments.
        batch: Returns a batch.
        recomputes: Whether the model recomputes its activations in the backward pass.
        limitation: As for ``Case``.
    """

    def build(dropout: float) -> Any:
        import transformers

        given = {**sizes, **dict.fromkeys(dropouts, dropout)}
        made = getattr(transformers, model)(getattr(transformers, config)(**given))
        if recomputes:
            made.gradient_checkpointing_enable()
        return made

    return Case(name, "transformers", build, batch, loss, dropout=bool(dropouts), limitation=limitation)


ATTENTION = ("attention_dropout",)
HIDDEN = ("hidden_dropout_prob", "attention_probs_dropout_prob")

CASES = [
    case("llama", "LlamaConfig", "LlamaForCausalLM", LLAMA, dropouts=ATTENTION),
    case("llama, recomputed", "LlamaConfig", "LlamaForCausalLM", LLAMA, dropouts=ATTENTION, recomputes=True),
    case("llama, padded left", "LlamaConfig", "LlamaForCausalLM", LLAMA, batch=padded_left),
    case("mistral", "MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 4}, dropouts=ATTENTION),
    case("qwen2", "Qwen2Config", "Qwen2ForCausalLM", LLAMA, dropouts=ATTENTION),
    case("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}, dropouts=ATTENTION),
    case("gemma", "GemmaConfig", "GemmaForCausalLM", {**LLAMA, "head_dim": 8}, dropouts=ATTENTION),
    case("gemma2", "Gemma2Config", "Gemma2ForCausalLM", {**LLAMA, "head_dim": 8}, dropouts=ATTENTION),
    case(
        "phi",
        "PhiConfig",
        "PhiForCausalLM",
        {**LLAMA, "num_key_value_heads": 2},
        dropouts=("resid_pdrop", "embd_pdrop", "attention_dropout"),
    ),
    case("phi3", "Phi3Config", "Phi3ForCausalLM", {**LLAMA, "pad_token_id": 1}, dropouts=("resid_pdrop", "embd_pdrop")),
    case("olmo2", "Olmo2Config", "Olmo2ForCausalLM", LLAMA, dropouts=ATTENTION),
    *(
        case(
            f"mixtral, experts {how}",
            "MixtralConfig",
            "MixtralForCausalLM",
            {**LLAMA, "num_local_experts": 3, "output_router_logits": True, "experts_implementation": implementation},
            dropouts=ATTENTION,
            limitation=OTHER_BITS if how == "in a loop" else None,
        )
        for how, implementation in (("in a loop", "eager"), ("in a batch", "batched_mm"))
    ),
    case(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2},
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ),
    case(
        "gpt-neox (pythia)",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
        dropouts=("hidden_dropout", "attention_dropout"),
    ),
    case(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
        },
        dropouts=("dropout", "attention_dropout"),
    ),
    case(
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 2},
        dropouts=("hidden_dropout", "attention_dropout"),
    ),
    case(
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        dropouts=("hidden_dropout", "attention_dropout"),
    ),
    case(
        "mamba",
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2},
        batch=unpadded,
    ),
    case("bert", "BertConfig", "BertForMaskedLM", BERT, dropouts=HIDDEN),
    case("bert, recomputed", "BertConfig", "BertForMaskedLM", BERT, dropouts=HIDDEN, recomputes=True),
    case("roberta", "RobertaConfig", "RobertaForMaskedLM", BERT, dropouts=HIDDEN),
    case("electra", "ElectraConfig", "ElectraForMaskedLM", {**BERT, "embedding_size": 8}, dropouts=HIDDEN),
    case("albert", "AlbertConfig", "AlbertForMaskedLM", {**BERT, "embedding_size": 8}, dropouts=HIDDEN),
    case(
        "distilbert",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
        dropouts=("dropout", "attention_dropout"),
    ),
    case(
        "modernbert",
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            **{key: value for key, value in BERT.items() if key != "pad_token_id"},
            "pad_token_id": 1,
            "local_attention": 4,
            "num_hidden_layers": 2,
            "global_attn_every_n_layers": 2,
        },
        dropouts=("embedding_dropout", "mlp_dropout", "attention_dropout"),
    ),
    case(
        "deberta-v2",
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        {
            **BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            "norm_rel_ebd": "layer_norm",
        },
        dropouts=HIDDEN,
    ),
    case(
        "longformer",
        "LongformerConfig",
        "LongformerForMaskedLM",
        {**BERT, "attention_window": 4},
        dropouts=HIDDEN,
        batch=windowed,
    ),
    case(
        "xlnet",
        "XLNetConfig",
        "XLNetLMHeadModel",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
        dropouts=("dropout", "summary_last_dropout"),
    ),
    case(
        "mpnet",
        "MPNetConfig",
        "MPNetForMaskedLM",
        BERT,
        dropouts=HIDDEN,
    ),
    case(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        dropouts=("dropout_rate",),
        batch=sequence_to_sequence,
    ),
    case(
        "bart",
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 32,
        },
        dropouts=("dropout", "attention_dropout", "activation_dropout"),
        batch=sequence_to_sequence,
    ),
    case(
        "perceiver",
        "PerceiverConfig",
        "PerceiverForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "num_latents": 4,
            "d_latents": 16,
            "d_model": 16,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "max_position_embeddings": LENGTH,
            "qk_channels": 16,
            "v_channels": 16,
        },
        dropouts=("attention_probs_dropout_prob",),
    ),
]
