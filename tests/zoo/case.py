"""A case: one model with its data and its loss, small enough to compile in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxtrain as fx


@dataclasses.dataclass(frozen=True)
class Limitation:
    """A known failure of a case.

    Args:
        reason: A sentence for the table.
        error: A part of the error's message. Any other error, or none, is unexpected.
        is_certain: False if the case may also pass, for example because the rounding of a sum depends on memory layout.
    """

    reason: str
    error: str
    is_certain: bool = True


OTHER_BITS = Limitation(
    "Compiled as uncompiled within 1e-4, but a run restored after the first step may end with other bits.",
    "a restored run ends with other bits",
    is_certain=False,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its training data and its loss.

    Packages are imported inside the functions, so a table of cases can be read without installing any of them.

    Args:
        name: Unique within the zoo.
        package: The distribution that the model comes from; "torch" for models written in the zoo.
        build: Returns the module, or a dict of modules, for a dropout probability.
        batch: Returns one batch: a pytree of tensors, floating ones in float32.
        loss: ``(model, batch) -> loss``.
        dropout: Whether training is random if the dropout probability is above zero.
        step: Builds a step by hand from the optimizers; by default ``fx.train_step(loss, tx)``.
        plain: The same step for a plain loop: ``(modules, optimizers, batch) -> loss``, updates included.
        measure: A scalar in evaluation mode that exported weights must reproduce; by default the loss.
        limitation: The known failure of the case, if any.
    """

    name: str
    package: str
    build: Callable[[float], Any]
    batch: Callable[[], Any]
    loss: Callable[[Any, Any], Any]
    dropout: bool = True
    step: Callable[[Any], fx.Step] | None = None
    plain: Callable[[Any, Any, Any], torch.Tensor] | None = None
    measure: Callable[[Any, Any], Any] | None = None
    limitation: Limitation | None = None

    @property
    def key(self) -> str:
        return f"{self.package}: {self.name}"


def tokens(vocabulary: int, *shape: int) -> torch.Tensor:
    """Random token ids, at least 3, because 0 to 2 are special tokens in most models."""
    return torch.randint(3, vocabulary, shape)


def lengths_mask(length: int, *lengths: int) -> torch.Tensor:
    """An attention mask of shape [len(lengths), length]: ones, then zeros where a row is padding."""
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def with_dropout(module: nn.Module, probability: float) -> nn.Module:
    """Sets the probability of all dropout layers of a module, for packages without such an option."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = probability
    return module
