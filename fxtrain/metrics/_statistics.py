"""Means, sums and standard deviations of values of any shape, and the accuracy of classifiers."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree, describe, wide_dtype
from fxtrain.metrics._metric import Metric


class Average(Metric):
    """The mean of values of any shape. Values whose mask is false do not count.

        sum_i w_i x_i / sum_i w_i

    Args:
        total: float64 []. The weighted sum.
        count: float64 []. The sum of the weights.

    Example:
        >>> first = Average.from_model_output(torch.tensor([1.0, 3.0]))
        >>> second = Average.from_model_output(torch.tensor([8.0, 9.0]), mask=torch.tensor([True, False]))
        >>> first.merge(second).compute()
        tensor(4.)
    """

    total: Tensor
    count: Tensor

    @classmethod
    def from_model_output(cls, values: Tensor, mask: Tensor | None = None, **_: Tree) -> Self:
        """Returns the average of one batch.

        Args:
            values: Any shape and dtype.
            mask: The shape of ``values`` or of its leading dimensions. False, or 0, excludes a value.
        """
        values, kept = _masked(values, mask)
        return cls(values.sum(), kept.sum())

    def merge(self, other: Average) -> Self:
        return type(self)(self.total + other.total, self.count + other.count)

    def compute(self) -> Tensor:
        return _narrow(self.total / self.count)


class WideAverage(Average):
    """An average that stays in float64."""

    def compute(self) -> Tensor:
        return self.total / self.count


class LastValue(Average):
    """The mean over the last batch that had any value. Its ``merge`` is associative but not commutative.

    Example:
        >>> first, second = (LastValue.from_model_output(torch.tensor(value)) for value in (1.0, 8.0))
        >>> first.merge(second).compute()
        tensor(8.)
    """

    def merge(self, other: Average) -> Self:
        return tree.where(other.count > 0, other, self)


class Sum(Metric):
    """The sum of values of any shape. Values whose mask is false do not count. The sum of no values is 0.

    Args:
        total: float64 []. Sums of integers are exact up to 2^53. ``compute`` rounds the total to the default dtype.

    Example:
        >>> Sum.from_model_output(torch.tensor([1, 2])).update(torch.tensor([3])).compute()
        tensor(6.)
    """

    total: Tensor

    @classmethod
    def from_model_output(cls, values: Tensor, mask: Tensor | None = None, **_: Tree) -> Self:
        """Returns the sum of one batch.

        Args:
            values: Any shape and dtype.
            mask: The shape of ``values`` or of its leading dimensions. False, or 0, excludes a value.
        """
        return cls(_masked(values, mask)[0].sum())

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total)

    def compute(self) -> Tensor:
        return _narrow(self.total)


class Std(Metric):
    """The population standard deviation (divided by n) of values of any shape.

        m2_ab = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b)

    Squared deviations from the mean are accumulated, because a difference of large sums of squares would cancel
    catastrophically if the mean is large.

    Args:
        mean: float64 [].
        m2: float64 []. The sum of squared deviations from the mean.
        count: float64 [].

    Example:
        >>> Std.from_model_output(torch.tensor([1.0, 3.0])).compute()
        tensor(1.)

    References:
        Chan et al., Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """

    mean: Tensor
    m2: Tensor
    count: Tensor

    @classmethod
    def from_model_output(cls, values: Tensor, mask: Tensor | None = None, **_: Tree) -> Self:
        """Returns the statistics of one batch.

        Args:
            values: Any shape and dtype.
            mask: The shape of ``values`` or of its leading dimensions. False, or 0, excludes a value.
        """
        values, kept = _masked(values, mask)
        count = kept.sum()
        mean = values.sum() / count.clamp(min=1)
        return cls(mean, torch.where(kept > 0, values - mean, 0).square().sum(), count)

    def merge(self, other: Self) -> Self:
        count = self.count + other.count
        some = torch.where(count > 0, count, 1)
        mean = (self.count * self.mean + other.count * other.mean) / some
        between = (other.mean - self.mean).square() * (self.count * other.count / some)
        return type(self)(mean, self.m2 + other.m2 + between, count)

    def compute(self) -> Tensor:
        return _narrow((self.m2 / self.count).sqrt())


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


def _masked(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the values with masked ones set to zero, and the mask as ones and zeros, both in the wide dtype."""
    values = values.detach()  # otherwise the autograd graph of a whole evaluation would stay alive
    values = values.to(wide_dtype(values.device))
    if mask is None:
        return values, torch.ones_like(values)
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(
            f"expected a mask with the shape or the leading dimensions of the values, {list(values.shape)}, got shape "
            f"{list(mask.shape)}."
        )
    kept = (mask != 0).reshape(*mask.shape, *([1] * (values.ndim - mask.ndim))).expand(values.shape)
    return torch.where(kept, values, 0), kept.to(values.dtype)


def _narrow(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
