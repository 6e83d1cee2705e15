"""Text generation by the own ``generate`` of a model of transformers."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch

from fxtrain.callbacks._generation_options import Options
from fxtrain.core import did_you_mean


def has_generate(model: object) -> bool:
    """Returns whether a model has the ``generate`` of transformers, as adapters of peft have too."""
    return callable(getattr(model, "generate", None)) and hasattr(model, "generation_config")


def generate_by_model(
    model: Any,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    length: int,
    device: torch.device | str,
    tokenizer: object,
    limit: int | None = None,
) -> list[list[list[int]]]:
    """Returns the sequences that continue each prompt, without the tokens that end them.

    Prompts of a decoder are padded at their beginning, those of an encoder at their end. A model without attention
    masks gets the prompts of each length in a call of its own.

    Args:
        model: A model with ``generate``.
        prompts: At least one token each.
        options: Values by the names of its ``GenerationConfig``.
        length: Context length.
        device: Device of the model.
        tokenizer: Passed on for ``stop_strings``.
        limit: Generate at most this many tokens. None for those of the options.

    Raises:
        ValueError: If an option is unknown, or prompt and new tokens exceed ``length``.
    """
    config = _config(model, options)
    _check_length(model, config, max(map(len, prompts)), length)
    if limit is not None:
        config.update(max_new_tokens=limit, min_new_tokens=None, min_length=0)
    if "attention_mask" in inspect.signature(model.forward).parameters:
        groups = [list(range(len(prompts)))]
    else:
        lengths = sorted({len(prompt) for prompt in prompts})
        groups = [[i for i, prompt in enumerate(prompts) if len(prompt) == each] for each in lengths]
    found: dict[int, list[list[int]]] = {}
    for group in groups:
        sequences = _batch(model, [prompts[index] for index in group], config, device, tokenizer, len(groups) == 1)
        count = len(sequences) // len(group)
        found |= {index: sequences[at * count : (at + 1) * count] for at, index in enumerate(group)}
    return [found[index] for index in range(len(prompts))]


def _batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: Any,
    device: torch.device | str,
    tokenizer: object,
    masked: bool,
) -> list[list[int]]:
    longest = max(map(len, prompts))
    encodes = _is_encoder_decoder(model)

    def padded(row: Sequence[int], value: int) -> list[int]:
        padding = [value] * (longest - len(row))
        return [*row, *padding] if encodes else [*padding, *row]

    tokens = torch.tensor([padded(row, config.pad_token_id) for row in prompts], device=device)
    mask = torch.tensor([padded([1] * len(row), 0) for row in prompts], device=device)
    extra = ({"attention_mask": mask} if masked else {}) | ({"tokenizer": tokenizer} if config.stop_strings else {})
    output = model.generate(input_ids=tokens, generation_config=config, **extra)
    # A decoder's output begins with the prompt, that of an encoder and a decoder with the token that starts the latter.
    start = 1 if encodes else longest
    return [_ended(row, config) for row in output[:, start:].tolist()]


def _ended(tokens: list[int], config: Any) -> list[int]:
    """Returns the tokens before the first one that ends a text, without padding."""
    ends = _ids(config.eos_token_id)
    size = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    while config.stop_strings and size and tokens[size - 1] == config.pad_token_id:
        size -= 1
    return tokens[:size]


def _config(model: Any, options: Options) -> Any:
    """Returns the model's own configuration with other options."""
    config = copy.deepcopy(model.generation_config)
    names = [name for name in vars(config) if not name.startswith("_")]
    for name in options:
        if name not in names:
            raise ValueError(
                f"expected generation_config to have options of {type(config).__name__}, got {name!r}."
                f"{did_you_mean(name, names)} Remove it."
            )
    if "max_length" in options:
        config.max_new_tokens = None
    config.update(**options, return_dict_in_generate=False)
    # Padding is masked, but embedded. The default configuration of a small model may name a token that it lacks.
    vocabulary = getattr(model.config, "vocab_size", math.inf)
    fitting = (token for token in (*_ids(config.pad_token_id), *_ids(config.eos_token_id)) if token < vocabulary)
    config.pad_token_id = next(fitting, 0)
    return config


def _check_length(model: Any, config: Any, longest: int, length: int) -> None:
    new = config.max_length - longest if config.max_new_tokens is None else config.max_new_tokens
    needed = max(longest, new) if _is_encoder_decoder(model) else longest + new
    positions = getattr(model.config, "max_position_embeddings", None) or length
    if needed > min(length, positions):
        limit = f"length={length}" if length <= positions else f"the model's max_position_embeddings={positions}"
        raise ValueError(
            f"expected the longest prompt and the new tokens to fit into {limit}, because the model's generate keeps "
            f"all of them in its context, got {longest} and {new} tokens. Generate fewer tokens, or raise the limit."
        )


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _ids(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else [*value]
