"""Warnings that name the layers or parameters with a norm out of range."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fxtrain.core import Logged, Record
from fxtrain.values import Text

_MAX_NAMED = 5


def layer_warning(what: str, names: Sequence[str], norms: Tensor, wrong: Tensor, *, sign: float = 1.0) -> Logged:
    """Returns a text that names the worst layers, published only if there is one. It is computed without a read.

    Args:
        what: What is wrong, as in ``"large gradient"``.
        names: The names of the layers or parameters, one or more.
        norms: float32 [names].
        wrong: bool [names]. Those to name.
        sign: 1 if larger norms are worse, or -1.
    """
    order = torch.where(wrong, sign * norms, -torch.inf).topk(min(_MAX_NAMED, len(names))).indices
    count = wrong.sum()
    text = Text.written(_Warning(what, tuple(names)), count, *order.unbind(), *norms[order].unbind())
    return Logged(text, when=count > 0)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Warning(Record):
    """Writes a warning. Equal for equal names, as parts of a pytree's structure are."""

    what: str
    names: tuple[str, ...]

    def __call__(self, count: int, *found: float) -> str:
        shown, half = min(count, _MAX_NAMED), len(found) // 2
        named = zip(found[:shown], found[half : half + shown], strict=True)
        rest = f" and {count - shown} more" if count > shown else ""
        return f"{self.what} in " + ", ".join(f"{self.names[int(i)]}: {norm:.3g}" for i, norm in named) + rest
