"""Operators of torch that have no public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxtrain._torch_internals.interface import Feature, Interface

ITEM = Interface("torch.ops.aten._local_scalar_dense.default", "reading values in a trace", Feature.TRACED)
LINEAR = Interface("torch.ops.mkldnn._linear_pointwise", "matmuls by oneDNN", Feature.INDUCTOR)
CTC = Interface("torch.ops.aten._ctc_loss", "CTC losses in a graph", Feature.TRACED)
CTC_BACKWARD = Interface("torch.ops.aten._ctc_loss_backward", "CTC losses in a graph", Feature.TRACED)
ATTENTION = Interface("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "FLOPs of attention in fx.explain")
ATTENTION_BACKWARD = Interface(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "FLOPs of attention in fx.explain"
)


def item_operator() -> Any:
    """Returns the operator that reads a one-element tensor as a number. None if torch lacks it."""
    return ITEM.get() if ITEM.exists else None


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x weight^T + bias. Shapes: x [n, k], weight [m, k], bias [m], result [n, m]."""
    return LINEAR.get()(x, weight, bias, "none", [], "")


def ctc_loss(
    scores: Tensor, targets: Tensor, inputs: Sequence[int], lengths: Sequence[int], blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    """Returns CTC losses [batch] and their gradients with respect to the scores [time, batch, classes].

    Takes the arguments of ``torch.nn.functional.ctc_loss``.
    """
    given = targets, inputs, lengths
    losses, alphas = CTC.get()(scores, *given, blank, zero_infinity)
    ones = losses.new_ones(losses.shape)
    return losses, CTC_BACKWARD.get()(ones, scores, *given, losses, alphas, blank, zero_infinity)


def attention_on_cpu() -> tuple[Any, Any]:
    """Returns the operators of attention on a CPU, forward and backward."""
    return ATTENTION.get(), ATTENTION_BACKWARD.get()
