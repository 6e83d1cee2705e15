"""Gradients: the first piece of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxtrain import rng, tree
from fxtrain.core import TrainState
from fxtrain.fold.subscription import name_of
from fxtrain.model import captured, model_of
from fxtrain.precision import Policy, loss_scale_of, policy_of
from fxtrain.rng.tracing import unrecorded
from fxtrain.step.returned import loss_and_metrics


class Gradient(NamedTuple):
    """What ``gradients`` finds."""

    loss: Tensor  # float []
    metrics: dict[str, Any]  # 0-d tensors and metrics; "loss" among them
    grads: Any  # like the trainable parameters
    buffers: Any  # like state.buffers, after the forward pass


def gradients(
    loss_fn: Callable[..., Any],
    *,
    wrt: str | None = None,
    precision: str | Policy | None = None,
) -> Callable[..., Gradient]:
    """The function ``(state, batch, index=0) -> Gradient`` that differentiates a loss: the first piece of a step.

    Args:
        loss_fn: ``(model, batch) -> loss`` or ``-> (loss, metrics)``: a 0-d floating tensor, and a dict of 0-d
            tensors or ``fxtrain.metrics``. The model is called as usual, and torch's random functions too.
        wrt: The entry of a dict of modules to differentiate; by default all parameters.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.

    Returns:
        A pure function. ``index`` tells apart several calls in one step: each draws its own random numbers.

    Raises:
        TypeError: When it runs, if the loss function returned anything else.
        ValueError: When it runs, if there is nothing to train.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init({"w": torch.tensor(3.0)})
        >>> find = fx.gradients(lambda model, batch: (model["w"] * batch).square())
        >>> find(state, torch.tensor(2.0)).grads
        {'w': tensor(24.)}
    """
    policy = policy_of(precision)

    def run(state: TrainState, batch: Any, index: int = 0) -> Gradient:
        model = model_of(state)
        key = rng.key(state.seed, stream=rng.Stream.TRAIN, step=state.step, microbatch=index)
        scale = loss_scale_of(state) if policy.loss_scale else None
        policy.check(state.params)

        def objective(trainable: Any) -> tuple[Tensor, tuple[dict[str, Any], Any]]:
            params = model.merge(state.params, trainable, wrt)
            with policy.autocast(state.step.device):
                result, buffers = model.call(params, state.buffers, loss_fn, batch, train=True, key=key, check=True)
            loss, measured = loss_and_metrics(loss_fn, result)
            if torch.compiler.is_dynamo_compiling():
                # Whether Dynamo knows what requires a gradient inside torch.func depends on its version.
                if _requires_grad(tree.leaves(trainable)[0]) and not _requires_grad(loss):
                    raise ValueError("expected a loss that depends on a trainable parameter, got one that reaches none")
            elif (reached := model.first_calls(("reached", wrt))).draws(loss_fn) is None:
                _refuse_unreached(loss_fn, loss, wrt)
                reached.add(loss_fn)
            metrics = policy.cast_output({"loss": loss, **measured})
            loss = metrics["loss"]
            return (loss if scale is None else loss * scale), (metrics, buffers)

        trainable = model.split(state.params, wrt)
        if not tree.leaves(trainable):
            raise ValueError("Nothing to train: no parameter is floating or complex and requires gradients.")
        model.refuse_hooks()
        # Inside inference_mode the gradients of torch 2.11 are zero, and nothing says so.
        inferring = not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if inferring else contextlib.nullcontext():
            grads, (metrics, buffers) = torch.func.grad(objective, has_aux=True)(trainable)
        if scale is not None:
            grads = tree.map(lambda grad: grad / scale, grads)
        return Gradient(metrics["loss"], metrics, grads, buffers)

    return run


def _refuse_unreached(loss_fn: Callable[..., Any], loss: Tensor, wrt: str | None) -> None:
    """A zero gradient is a number; a loss that no trainable parameter takes part in is a mistake."""
    with unrecorded():  # the first trace of a step is the same graph as the next ones
        if _requires_grad(loss):
            return
    what = "a trainable parameter" if wrt is None else f"a trainable parameter of the entry {wrt!r}"
    modules = [name for name, value in captured(loss_fn) if isinstance(value, nn.Module)]
    instead = f" instead of {', '.join(modules)}, which it takes from outside" if modules else ""
    raise ValueError(
        f"expected a loss that depends on {what}, got one from {name_of(loss_fn)} that reaches none, so nothing would "
        f"be trained. Call the model that the loss function is given{instead}, outside of torch.no_grad() and without "
        ".detach() or .item()."
    )


def _requires_grad(value: Tensor) -> bool:
    # A parameter of a module from outside requires a gradient that torch.func does not compute; a sum in which it
    # takes part does not.
    return (value + 0).requires_grad
