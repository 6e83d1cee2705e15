"""Autoregressive decoding with a model of the user's own, with its cache if it has one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain.core import describe


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each next token is chosen. The fields are those of ``textgen``.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: Number of likeliest tokens to sample from; None for all.
        top_p: Total probability of the likeliest tokens to sample from; None for all.
        stop: Token ids that end a text.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: frozenset[int] = frozenset()


def has_cache(model: object) -> bool:
    """Returns whether a model implements the cache protocol of ``textgen``."""
    return callable(getattr(model, "init_cache", None))


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[Sequence[float]],
    sampling: Sampling,
    *,
    length: int,
    device: torch.device | str = "cpu",
    use_cache: bool = True,
) -> list[list[int]]:
    """Returns the tokens that continue each prompt: one per uniform sample, up to a stop token.

    Args:
        model: Maps tokens, int64 [N, T], to logits [N, T, vocabulary], or to an object with the attribute ``logits``.
            Its cache, if it has one, is used until it holds ``length`` tokens.
        prompts: At least one token each.
        numbers: Uniform samples in [0, 1), for each prompt.
        sampling: How tokens are chosen.
        length: Context length, as for ``textgen``.
        device: Device of the model.
        use_cache: Whether to use the model's cache.

    Raises:
        TypeError: If the model returns no logits.

    Example:
        >>> count = lambda tokens: 100.0 * torch.nn.functional.one_hot(tokens + 1, 32)
        >>> generate(count, [[3], [7, 8]], [[0.5, 0.5, 0.5], [0.5]], Sampling(), length=8)
        [[4, 5, 6], [9]]
    """
    rows = [list(prompt) for prompt in prompts]
    ends = [len(row) + len(own) for row, own in zip(rows, numbers, strict=True)]
    active = list(range(len(rows)))
    cache = _new_cache(model, len(rows)) if use_cache and has_cache(model) else None
    cached, upto = 0, min(map(len, rows))
    while active:
        if cache is not None and upto <= length:
            # All rows are at one position, so no row is padded. A longer prompt supplies its tokens before it grows.
            # Rows that have ended repeat their last token, which no other row reads.
            fed = [[row[min(at, len(row) - 1)] for at in range(cached, upto)] for row in rows]
            logits, cache = _cached_pass(model, torch.tensor(fed, device=device), cache)
            cached, upto = upto, upto + 1
            grown = [index for index in active if len(rows[index]) == cached]
            logits = logits[grown, -1]
        else:
            # The context slides past ``length``, which changes every position, so nothing cached stays valid.
            cache, grown = None, active
            windows = [rows[index][-length:] for index in active]
            longest = max(map(len, windows))
            padded = [[*window, *window[-1:] * (longest - len(window))] for window in windows]
            logits = _logits(model(torch.tensor(padded, device=device)), "from the model for tokens [N, T]")
            logits = logits[range(len(windows)), [len(window) - 1 for window in windows]]
        at = [numbers[index][len(rows[index]) - len(prompts[index])] for index in grown]
        for index, token in zip(grown, draw(logits.float(), at, sampling) if grown else (), strict=True):
            if token not in sampling.stop:
                rows[index].append(token)
            if token in sampling.stop or len(rows[index]) == ends[index]:
                active = [other for other in active if other != index]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _new_cache(model: Any, size: int) -> object:
    if "cache" not in inspect.signature(model.forward).parameters:
        raise TypeError(
            "expected a model with init_cache to take model(tokens, cache=cache), got a forward without the parameter "
            "cache. Add it, or rename init_cache."
        )
    return model.init_cache(size)


def _cached_pass(model: Any, tokens: Tensor, cache: object) -> tuple[Tensor, object]:
    result = model(tokens, cache=cache)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"expected (logits, cache) from model(tokens, cache=cache), got {describe(result)}.")
    return _logits(result[0], "from model(tokens, cache=cache) for tokens [N, T]"), result[1]


def _logits(output: object, where: str) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise TypeError(
            f"expected logits [N, T, vocabulary] {where}, or an object with .logits, got {describe(logits)}."
        )
    return logits


def draw(logits: Tensor, numbers: Sequence[float], sampling: Sampling) -> list[int]:
    """Returns the tokens at which the cumulative probability, likeliest token first, exceeds a uniform sample.

    Args:
        logits: Floating tensor [N, vocabulary].
        numbers: N samples in [0, 1).
        sampling: How tokens are chosen.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    # A stable sort keeps the order of equal logits on every device.
    ordered, tokens = logits.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered, tokens = ordered[:, : sampling.top_k], tokens[:, : sampling.top_k]
    shares = (ordered.double() / sampling.temperature).softmax(-1)
    last = shares.shape[-1] - 1
    if sampling.top_p is not None:
        # Keep tokens preceded by a probability below top_p. The first always is.
        kept = shares.cumsum(-1) - shares < sampling.top_p
        shares = shares * kept
        shares = shares / shares.sum(-1, keepdim=True)
        last = (kept.sum(-1, keepdim=True) - 1).clamp(min=0)
    above = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]
    rank = (shares.cumsum(-1) <= above).sum(-1, keepdim=True).clamp(max=last)
    return tokens.gather(-1, rank)[:, 0].tolist()
