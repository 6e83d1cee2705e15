"""Textgen: what a language model writes, as it learns."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fxtrain import rng
from fxtrain.core import Control, EvalEnd, LoopEvent, TrainState, check_positive_int
from fxtrain.fold import Handler, on
from fxtrain.model import view
from fxtrain.values import Text


class Tokenizer(Protocol):
    """What turns text into tokens and back."""

    def encode(self, text: str, /) -> Sequence[int]: ...

    def decode(self, tokens: Sequence[int], /) -> str: ...


def textgen(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    name: str = "textgen",
    at: type[LoopEvent] = EvalEnd,
) -> Handler:
    """Logs what the model goes on to write after each prompt, as one ``Text``.

        token = softmax(logits / temperature), among the top_k likeliest that make up top_p, at a number u in [0, 1)

    The numbers are a function of the seed, the step and the prompt: the same step writes the same text, before and
    after a resume. Parameters are read through a view, in evaluation mode. It takes a pass of the model for each
    token, uncompiled.

    Args:
        prompts: Each has at least one token.
        tokenizer: With ``encode`` and ``decode``, as those of Hugging Face.
        length: The model sees at most so many tokens, the last ones.
        max_tokens: How many to draw for each prompt.
        temperature: 0 takes the likeliest token; below 1 it draws likely ones more often.
        top_k: How many of the likeliest tokens to draw from.
        top_p: Draw from the fewest of the likeliest tokens that have this probability together.
        stop: Tokens after which a text ends; they are not shown.
        name: What the text is logged as.
        at: When. ``fx.when(fx.every(500), textgen(..., at=fx.StepEnd))`` is every 500 steps.

    Raises:
        TypeError: If ``prompts`` is a single string, or, when it runs, if the model returns no logits.
        ValueError: If an argument is out of its range, or a prompt has no token.

    Example:
        >>> import torch, fxtrain as fx
        >>> class Letters:
        ...     def encode(self, text):
        ...         return [ord(letter) - 97 for letter in text]
        ...     def decode(self, tokens):
        ...         return "".join(chr(97 + token) for token in tokens)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(26, 8), torch.nn.Linear(8, 26))
        >>> callback = textgen(["once"], Letters(), length=16, max_tokens=4, temperature=0)
        >>> _, control = callback(fx.init(model), fx.EvalEnd(step=10, metrics={}))
        >>> control.log["textgen"].value.markdown.splitlines()[:4]
        ['**prompt**', '', '```text', 'once']
    """
    if isinstance(prompts, str) or not prompts:
        raise TypeError(f"prompts={prompts!r}: a sequence of one string or more is wanted.")
    check_positive_int("length", length)
    check_positive_int("max_tokens", max_tokens)
    if top_k is not None:
        check_positive_int("top_k", top_k)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature!r}: 0 or more is wanted.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r}: above 0, and at most 1, is wanted.")
    encoded = [list(tokenizer.encode(prompt)) for prompt in prompts]
    drawing: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop": stop}
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise ValueError(f"The prompt {prompt!r} has no token: a model goes on from one at least.")

    def callback(state: TrainState, event: LoopEvent) -> tuple[TrainState, Control]:
        parts: list[str] = []
        model = view(state)
        for index, tokens in enumerate(encoded):
            key = rng.key(state.seed, stream=rng.Stream.SAMPLE, step=event.step, microbatch=index)
            numbers = rng.uniform(key, (max_tokens,)).tolist()
            written = generate(model, tokens, numbers, length=length, device=state.step.device, **drawing)
            parts += ["**prompt**\n", _verbatim(prompts[index]), "**goes on**\n", _verbatim(tokenizer.decode(written))]
        return state, Control(log={name: Text("\n".join(parts))})

    callback.__name__ = name
    return on(at, callback)


def _verbatim(text: str) -> str:
    """As a block of code, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def generate(
    model: Callable[[Tensor], Any],
    prompt: Sequence[int],
    numbers: Sequence[float],
    *,
    length: int,
    device: torch.device | str = "cpu",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
) -> list[int]:
    """The tokens that continue a prompt, one for each number: a function, without a generator.

    Args:
        model: From int64 [1, T] to logits [1, T, vocabulary], or to something that has them as ``.logits``.
        prompt: At least one token.
        numbers: In [0, 1).
        length: The model sees at most so many tokens, the last ones.
        device: Where the model is.
        temperature: As for ``textgen``, and so are the others.
        top_k: Likewise.
        top_p: Likewise.
        stop: Likewise.

    Raises:
        TypeError: If the model returns no logits.

    Example:
        >>> count = lambda tokens: 100.0 * torch.nn.functional.one_hot(tokens + 1, 32)
        >>> generate(count, [3], [0.5, 0.5, 0.5], length=8)
        [4, 5, 6]
    """
    tokens = list(prompt)
    with torch.no_grad():
        for number in numbers:
            logits = _last_logits(model(torch.tensor([tokens[-length:]], device=device)))
            token = draw(logits, number, temperature=temperature, top_k=top_k, top_p=top_p)
            if token in stop:
                break
            tokens.append(token)
    return tokens[len(prompt) :]


def _last_logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        came = f"a tensor of shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        raise TypeError(
            f"textgen calls the model with tokens [1, T] and wants logits [1, T, vocabulary], or something that has "
            f"them as .logits, and {came} came."
        )
    return logits[0, -1].float()


def draw(logits: Tensor, number: float, *, temperature: float, top_k: int | None, top_p: float | None) -> int:
    """The token at which a number in [0, 1) falls, the likeliest first.

    Args:
        logits: Floating tensor [vocabulary].
        number: In [0, 1).
        temperature: 0 is the likeliest.
        top_k: As in ``textgen``.
        top_p: As in ``textgen``.
    """
    if temperature == 0:
        return int(logits.argmax())
    # A stable sort: equal logits keep their order on every device.
    ordered, tokens = logits.sort(descending=True, stable=True)
    if top_k is not None:
        ordered, tokens = ordered[:top_k], tokens[:top_k]
    shares = (ordered.double() / temperature).softmax(-1)
    if top_p is not None:
        # Those before which there is less than top_p: the first always is.
        kept = int((shares.cumsum(-1) - shares < top_p).sum())
        shares = shares[:kept] / shares[:kept].sum()
    rank = int((shares.cumsum(-1) <= number).sum())
    return int(tokens[min(rank, len(shares) - 1)])
