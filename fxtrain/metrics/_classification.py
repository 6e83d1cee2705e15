"""Metrics of classifiers."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from fxtrain.core import Tree, describe
from fxtrain.metrics._statistics import Average


class Accuracy(Average):
    """The fraction of examples whose largest logit is at their label.

    Example:
        >>> Accuracy.from_model_output(logits=torch.eye(2), labels=torch.tensor([0, 0])).compute()
        tensor(0.5000)
    """

    @classmethod
    def from_model_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, *, logits: Tensor, labels: Tensor, mask: Tensor | None = None, **_: Tree
    ) -> Self:
        """Returns the accuracy of one batch.

        Args:
            logits: float [..., classes].
            labels: Any integer dtype, [...]. Class indices.
            mask: The shape of ``labels`` or of its leading dimensions. False, or 0, excludes an example.
        """
        if logits.shape[:-1] != labels.shape or logits.ndim == 0:
            raise ValueError(
                "expected logits of shape [..., classes] and labels of shape [...], got logits of shape "
                f"{list(logits.shape)} and labels of shape {list(labels.shape)}. Convert one-hot labels with "
                ".argmax(-1)."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"expected labels to be class indices of an integer dtype, got {describe(labels)}.")
        return super().from_model_output(logits.argmax(-1) == labels, mask)
