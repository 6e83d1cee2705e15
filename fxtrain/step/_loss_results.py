"""Results of loss functions: weighted losses, and the checked parts loss, metrics and weight."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import Metrics, Tree, describe, wide_dtype
from fxtrain.equivalents import advice_on_metric
from fxtrain.metrics import Metric
from fxtrain.step._check_function import ContractError, place_of


class Weighted(NamedTuple):
    """A loss with its weight. Made by ``weighted``.

    Args:
        loss: float [], or a model's output with such a ``loss``.
        weight: The weight of the batch: [].

    Example:
        >>> import fxtrain as fx
        >>> fx.weighted(0.5, weight=3)
        Weighted(loss=0.5, weight=3)
    """

    loss: Tree
    weight: Tensor | float


def weighted(loss: Tree, weight: Tensor | float) -> Weighted:
    """Returns a loss with the weight of its batch, for a loss function to return in place of the loss.

        sum_i w_i L_i / sum_i w_i

    Texts have different numbers of tokens, so the mean of the microbatches' means is not the mean over all tokens.
    Gradients, loss and 0-d metrics are averaged over microbatches by weight, and so are evaluations over batches and
    ``fxtrain.callbacks.epoch_mean`` over steps.

    A batch of weight 0, such as one of padding only, does not count, even if its loss is nan. If all microbatches of a
    step have weight 0, its loss, its 0-d metrics and its gradients are 0.

    Args:
        loss: The mean over the items of the batch: float [], or a model's output with such a ``loss``.
        weight: The number of items, or the sum of their weights: a nonnegative real number or 0-d tensor.

    Raises:
        ValueError: If ``weight`` is a negative or non-finite number. Tensors are not checked.

    Example:
        >>> import torch, fxtrain as fx
        >>> def loss_fn(model, batch):
        ...     kept = batch["x"] != 0
        ...     return fx.weighted((model["w"] * batch["x"]).sum() / kept.sum(), kept.sum())
        >>> tx = fx.optim.sgd(1.0)
        >>> step = fx.train_step(loss_fn, tx, accumulate=2)
        >>> batch = {"x": torch.tensor([[1.0, 1.0], [4.0, 0.0]])}
        >>> state, output = step(fx.init({"w": torch.tensor(1.0)}, tx), batch)
        >>> output.metrics["loss"], output.weight
        (tensor(2.), tensor(3., dtype=torch.float64))
    """
    if isinstance(weight, int | float) and not 0 <= weight < math.inf:
        raise ValueError(f"expected a finite weight of 0 or more, got {weight!r}. Count the items of the batch.")
    return Weighted(loss, weight)


class Returned(NamedTuple):
    """The parts of a loss function's result."""

    loss: Tensor  # float []
    metrics: Metrics  # without the loss
    weight: Tensor | None  # float64 [] (float32 where there is no float64); None without fxtrain.weighted


def without_outputs(function: object, result: object, first: str) -> tuple[Tree, Tree]:
    """Splits the pair that a function returns because of ``outputs=True``.

    Args:
        function: The function, for errors.
        result: Its result.
        first: A noun for the first part of the pair, for errors.

    Raises:
        TypeError: If the result is not a pair.
    """
    if isinstance(result, tuple) and not isinstance(result, Weighted):
        parts: tuple[object, ...] = result
        if len(parts) == 2:
            return parts[0], parts[1]
    raise ContractError(
        f"expected {place_of(function)} to return a pair ({first}, outputs) because of outputs=True, got "
        f"{describe(result)}. Return both, or remove outputs=True."
    )


def detached_outputs(function: object, outputs: Tree) -> Tree:
    """Returns the outputs of a loss function without their autograd graph; an empty tuple for None.

    Raises:
        TypeError: If a leaf is not a tensor.
    """
    for leaf in tree.leaves(outputs, none_is_leaf=True) if outputs is not None else ():
        if not isinstance(leaf, Tensor):
            raise ContractError(
                f"expected the outputs of {place_of(function)} to be tensors, in dicts, lists and tuples, got "
                f"{describe(leaf)}. Leave it out."
            )
    return () if outputs is None else tree.map(torch.detach, outputs)


def loss_and_metrics(function: object, result: Tree) -> Returned:
    """Splits the result of a loss function into loss, metrics and weight.

    A result is a loss, a pair of a loss and a dict of metrics, or a dict with the entry ``"loss"``, whose other
    entries are metrics. A loss is a 0-d floating tensor, an object with the attribute ``loss`` (such as the output of a
    Hugging Face model), or either of them in ``fxtrain.weighted``. Other attributes of such an object are ignored.

    Args:
        function: The loss function, for errors.
        result: Its result.

    Raises:
        TypeError: If the result, a metric or the weight has another type.
        ValueError: If a metric is named ``"loss"``.
    """
    loss, metrics = result, {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        loss, metrics = result
    elif isinstance(result, Mapping) and not hasattr(result, "loss") and "loss" in result:
        metrics = {name: value for name, value in result.items() if name != "loss"}
        loss = result["loss"]
    weight = None
    if isinstance(loss, Weighted):
        loss, weight = loss
    if not isinstance(loss, Tensor | nn.Module):
        loss = getattr(loss, "loss", loss)
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        is_direct = loss is result or isinstance(result, tuple)
        got = describe(result) if is_direct else f"a {type(result).__name__} whose loss is {describe(loss)}"
        raise ContractError(
            f"expected {place_of(function)} to return a 0-d floating tensor, alone or with a dict of metrics, got "
            f"{got}. {_remedy(result, loss)}"
        )
    if "loss" in metrics:
        raise ValueError(
            f"expected metrics of {place_of(function)} with names other than 'loss', got a metric named 'loss'. Rename "
            "it."
        )
    return Returned(loss, checked_metrics(function, metrics), _checked_weight(function, weight, loss))


def refuse_growing(function: object, metrics: Metrics) -> None:
    """Raises if a metric of a training step grows with the data, because its sums over an epoch are in the state.

    Args:
        function: The loss function, for errors.
        metrics: Its metrics by name.

    Raises:
        TypeError: The message names the metric and its states.
    """
    for name, value in metrics.items():
        if isinstance(value, Metric) and value.growing:
            raise ContractError(
                f"expected the metric {name!r} of {place_of(function)} to have a fixed size, got "
                f"{type(value).__name__}, whose states {', '.join(value.growing)} grow with the data. Measure it in an "
                "evaluation step, or bin it, as thresholds=100 does for curves."
            )


def measured(function: object, result: object) -> tuple[Metrics, Tensor | None]:
    """Splits the result of an evaluation function into metrics, including the loss, and weight.

    A result is that of a loss function, or a dict of metrics without a loss.

    Args:
        function: The evaluation function, for errors.
        result: Its result.

    Raises:
        TypeError: As for ``loss_and_metrics``.
        ValueError: As for ``loss_and_metrics``.
    """
    has_loss = hasattr(result, "loss")
    if isinstance(result, Mapping) and not has_loss and ("loss" not in result or _is_metric(result["loss"])):
        return checked_metrics(function, result), None
    loss, metrics, weight = loss_and_metrics(function, result)
    return {"loss": loss, **metrics}, weight


def checked_metrics(function: object, metrics: Metrics) -> Metrics:
    """Returns the metrics as a dict.

    Args:
        function: The function that returned them, for errors.
        metrics: Metrics by name.

    Raises:
        TypeError: If a name is not a string, or a value is neither a real 0-d tensor nor a metric.
    """
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ContractError(
                f"expected the metric names of {place_of(function)} to be strings, got {describe(name)}. Rename the "
                "metric."
            )
        if _is_metric(value):
            continue
        remedy = "Reduce it, or leave it out." if isinstance(value, Tensor) else "Leave it out."
        if isinstance(value, Tensor) and value.is_complex():
            remedy = "Return its real part or its absolute value."
        if isinstance(value, int | float):
            remedy = "Return the tensor itself, without .item() or float(), or wrap a number in torch.tensor."
        remedy = advice_on_metric(value) or remedy
        raise ContractError(
            f"expected the metric {name!r} of {place_of(function)} to be a 0-d tensor or one of fxtrain.metrics, got "
            f"{describe(value)}. {remedy}"
        )
    return dict(metrics)


def _is_metric(value: object) -> TypeGuard[Tensor | Metric]:
    return isinstance(value, Metric) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())


def _remedy(result: object, loss: object) -> str:
    """Returns a sentence on how to return a valid loss."""
    if isinstance(loss, Tensor):
        if loss.ndim:
            return "Reduce the loss of each example with .mean()."
        return "Compute the loss in a floating dtype."
    if loss is None and result is not None:
        return "The model computes no loss without labels. Pass labels, or compute the loss from its outputs."
    if loss is None:
        return "End the function with return loss."
    if isinstance(loss, Awaitable):
        return "Write the function without async."
    if isinstance(loss, int | float | complex) or type(loss).__module__ == "numpy":
        return "Return the tensor itself, without .item(), float() or .numpy()."
    if isinstance(loss, nn.Module):
        return f"Call an instance of the module: {type(loss).__name__}()(prediction, target)."
    if isinstance(loss, tuple | list):
        return _remedy_for_several(loss)
    if isinstance(loss, Mapping):
        return "Give a dict of metrics the loss under the name 'loss', or compute it from the outputs of the model."
    return "Compute the loss from it."


def _remedy_for_several(parts: Sequence[object]) -> str:
    """Returns a sentence on what to return instead of a tuple or list that contains a loss."""
    if len(parts) == 2 and isinstance(parts[0], Mapping) and _is_metric(parts[1]):
        return "Return the loss first: return loss, metrics."
    if isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], Mapping):
        return "Return a tuple: return loss, metrics."
    return (
        "Return the loss, or the loss and a dict of metrics: return loss, {'accuracy': accuracy}. Leave out other "
        "outputs, or return the pair (loss, outputs) with outputs=True."
    )


def _checked_weight(function: object, weight: object, loss: Tensor) -> Tensor | None:
    if weight is None:
        return None
    wide = wide_dtype(loss.device)
    if isinstance(weight, Tensor) and weight.ndim == 0 and not weight.is_complex():
        return weight.detach().to(loss.device, wide)
    if isinstance(weight, int | float):
        return torch.full((), weight, dtype=wide, device=loss.device)
    raise ContractError(
        f"expected the weight that {place_of(function)} gives to fxtrain.weighted to be a number or a real 0-d tensor, "
        f"got {describe(weight)}. Count the items of the batch, as in (labels != -100).sum()."
    )
