"""Options of text generation, under the names of transformers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from fxtrain.callbacks._decoding import Sampling
from fxtrain.core import check_int, check_non_negative, check_positive, check_positive_int, describe, did_you_mean

Options = dict[str, Any]
"""Values by the names of a ``GenerationConfig``."""

_MAX_TOKENS = 100
_SAMPLED = ("temperature", "top_k", "top_p")
_OWN = ("max_new_tokens", "do_sample", *_SAMPLED, "eos_token_id", "use_cache")


def generation_options(
    config: object,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
) -> Options:
    """Returns the options of ``textgen`` under the names of transformers.

    Args:
        config: A mapping, a ``GenerationConfig`` or None.
        max_tokens: As for ``textgen``.
        temperature: As for ``textgen``.
        top_k: As for ``textgen``.
        top_p: As for ``textgen``.
        stop: As for ``textgen``.

    Raises:
        TypeError: If ``config`` is of another type.
        ValueError: If an argument is out of range, or an option is given twice.

    Example:
        >>> generation_options({"num_beams": 4}, max_tokens=20)
        {'max_new_tokens': 20, 'num_beams': 4}
        >>> generation_options(None, temperature=0)
        {'max_new_tokens': 100, 'do_sample': False}
    """
    arguments = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in arguments.items():
        _check(name, value)
    given = _given(config)
    if temperature is None and config is None:
        temperature = 1.0
    if temperature == 0:
        top_k = top_p = None  # the likeliest token is in every selection
    elif config is None:
        top_k, top_p = top_k or 0, top_p or 1.0  # transformers would select the 50 likeliest tokens
    named: Options = {
        "max_new_tokens": max_tokens,
        "do_sample": None if temperature is None else temperature > 0,
        "temperature": temperature or None,
        "top_k": top_k,
        "top_p": top_p,
        "eos_token_id": list(stop) or None,
    }
    options = {name: value for name, value in named.items() if value is not None}
    for name in options.keys() & given.keys():
        argument = {"max_new_tokens": "max_tokens", "do_sample": "temperature", "eos_token_id": "stop"}.get(name, name)
        raise ValueError(f"expected {argument} or generation_config[{name!r}], got both. Give one of them.")
    if "max_length" not in given and "max_new_tokens" not in given:
        options = {"max_new_tokens": _MAX_TOKENS, **options}
    return {**options, **given}


def own_sampling(options: Options) -> Sampling:
    """Returns the options for models that have no ``generate`` of transformers.

    Raises:
        ValueError: If there is another option, or one is out of range.
    """
    for name, value in options.items():
        if name not in _OWN:
            raise ValueError(
                f"expected generation_config to have {', '.join(_OWN)} only, because the model has no generate of "
                f"transformers, got {name!r}.{did_you_mean(name, _OWN)} Remove it, or log texts of the model's own "
                "method with fxtrain.callbacks.samples."
            )
        _check(name, value, "generation_config[{!r}]")
    if not options.get("do_sample"):
        for name in _SAMPLED:
            if options.get(name) is not None:
                raise ValueError(
                    f"expected generation_config to have do_sample=True with {name}, got none. Add it, or remove "
                    f"{name}."
                )
    stop = options.get("eos_token_id")
    return Sampling(
        temperature=options.get("temperature", 1.0) if options.get("do_sample") else 0.0,
        top_k=options.get("top_k") or None,
        top_p=None if options.get("top_p") == 1 else options.get("top_p"),
        stop=frozenset(() if stop is None else [stop] if isinstance(stop, int) else stop),
    )


def _given(config: Any) -> Options:
    """Returns the options that a config sets."""
    if config is None:
        return {}
    if hasattr(config, "to_diff_dict"):
        changed = {name: getattr(config, name, None) for name in config.to_diff_dict()}
        given = {name: value for name, value in changed.items() if not name.startswith("_")}
        given.pop("transformers_version", None)
    elif isinstance(config, Mapping):
        given = dict(config)
    else:
        raise TypeError(
            f"expected generation_config to be a dict or a GenerationConfig of transformers, got {describe(config)}."
        )
    if given.get("max_time") is not None:
        raise ValueError(
            "expected generation_config without max_time, because a resumed run would generate other texts, got "
            f"{given['max_time']!r}. Use max_new_tokens."
        )
    return {name: value for name, value in given.items() if value is not None}


def _check(name: str, value: Any, label: str = "{}") -> None:
    shown = label.format(name)
    if value is None:
        return
    match name:
        case "max_tokens" | "max_new_tokens":
            check_positive_int(shown, value)
        case "top_k":
            # 0 turns the selection off in transformers.
            check_int(shown, value, minimum=1 if shown == name else 0)
        case "temperature":
            check_non_negative(**{shown: value})
            if value == math.inf:
                raise ValueError(f"expected {shown} to be finite, got {value}.")
        case "top_p":
            check_positive(**{shown: value})
            if value > 1:
                raise ValueError(f"expected {shown} to be at most 1, got {value!r}.")
        case _:
            pass
