"""The CTC loss as an opaque operator. torch's own cannot be traced if lengths are tensors, as it reads their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxtrain.compiler.passes._operators import ctc
from fxtrain.core import Tree

_REDUCTIONS = ("none", "mean", "sum")


class OpaqueCTC(TorchFunctionMode):
    """A context in which ``ctc_loss`` is one opaque operator, so that its lengths stay tensors.

    Example:
        >>> scores = torch.randn(5, 2, 4).log_softmax(-1)
        >>> given = scores, torch.tensor([[1, 2], [3, 3]]), torch.tensor([5, 4]), torch.tensor([2, 1])
        >>> with OpaqueCTC():
        ...     found = torch.nn.functional.ctc_loss(*given)
        >>> bool(found == torch.nn.functional.ctc_loss(*given))
        True
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        if func is torch.nn.functional.ctc_loss or func is torch.ctc_loss:
            return _ctc_loss(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Like ``torch.nn.functional.ctc_loss``. ``log_probs`` is [time, batch, classes] or [time, classes]."""
    is_batched = log_probs.ndim == 3
    scores = log_probs if is_batched else log_probs.unsqueeze(1)
    inputs, lengths = (
        torch.as_tensor(given, dtype=torch.int64, device=None if isinstance(given, Tensor) else "cpu").reshape(-1)
        for given in (input_lengths, target_lengths)
    )
    losses = _CTC.apply(scores, targets, inputs, lengths, blank, zero_infinity)[0]
    kind = reduction if isinstance(reduction, str) else _REDUCTIONS[reduction]
    if kind == "mean":
        return (losses / lengths.to(losses.device, losses.dtype).clamp_min(1)).mean()
    return losses.sum() if kind == "sum" else losses if is_batched else losses.squeeze(0)


class _CTC(torch.autograd.Function):
    """Computes the losses, and in the same pass their gradients with respect to the scores."""

    @staticmethod
    def forward(
        scores: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
    ) -> tuple[Tensor, Tensor]:
        return ctc()(scores, targets, inputs, lengths, blank, zero_infinity)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tree) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], inputs[0])

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> Tree:
        return slope[:, None] * _Once.apply(*ctx.saved_tensors), None, None, None, None, None


class _Once(torch.autograd.Function):
    """Returns the gradients unchanged. They cannot be differentiated again."""

    @staticmethod
    def forward(slopes: Tensor, scores: Tensor) -> Tensor:
        return slopes.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tree) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        raise NotImplementedError(
            "expected a first derivative of ctc_loss, got a second one, which is not implemented."
        )
