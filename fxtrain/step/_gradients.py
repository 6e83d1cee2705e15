"""Gradients: the first piece of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import rng, tree
from fxtrain.core import TrainState, register_node
from fxtrain.fold._subscription import name_of
from fxtrain.metrics import Metric
from fxtrain.model import Model, model_of
from fxtrain.precision import Policy, loss_scale_of, policy_of
from fxtrain.step._carried import note
from fxtrain.step._contract import refuse_unless_loss, torch_optimizers_refused
from fxtrain.step._differentiate import (
    Differentiate,
    Differentiation,
    Find,
    Objective,
    by_autograd,
    ordinary,
    outside_inference_mode,
)
from fxtrain.step._forward import forward
from fxtrain.step._interception import handled
from fxtrain.step._returned import loss_and_metrics
from fxtrain.step._unreached import unreached


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What ``gradients`` finds: a pytree of tensors.

    Args:
        loss: Floating [].
        metrics: 0-d tensors and metrics, ``"loss"`` among them.
        grads: Like the trainable parameters.
        buffers: Like ``state.buffers``, after the forward pass.
        used: A pytree like ``grads`` of Python bools: False for a parameter that the loss does not depend on, where
            torch leaves ``grad`` at None; ``grads`` holds zeros there. A traced step has the answer of its trace, and
            one that Dynamo compiles has True everywhere. Static: it is part of the tree's structure and no leaf.
        weight: float64 []. How much it counts in a mean, from ``fxtrain.weighted``; None without it.
        written: The frozen parameters that the forward pass writes, such as a momentum encoder's, after it. ``carried``
            puts them and the buffers into a state.
    """

    loss: Tensor
    metrics: dict[str, Any]
    grads: Any
    buffers: Any
    used: Any
    weight: Tensor | None = None
    written: Any = dataclasses.field(default_factory=dict)

    def carried(self, state: TrainState) -> TrainState:
        """The state with what the forward pass wrote: buffers, and frozen parameters such as momentum encoders.

        Example:
            >>> import torch, fxtrain as fx
            >>> state = fx.init(torch.nn.BatchNorm1d(1))
            >>> found = fx.gradients(lambda model, batch: model(batch).sum())(state, torch.ones(2, 1))
            >>> int(found.carried(state).buffers["num_batches_tracked"])
            1
        """
        moved = state.replace(buffers=self.buffers)
        if not tree.leaves(self.written):
            return moved
        return moved.replace(params=model_of(state).carry(state.params, self.written))


_CHILDREN = ("loss", "metrics", "grads", "buffers", "weight", "written")


def _flatten(gradient: Gradient) -> tuple[list[Any], Any]:
    leaves, structure = tree.flatten(gradient.used)
    # torch's pytree takes None for a leaf; an empty tuple has none.
    children = [() if (value := getattr(gradient, name)) is None else value for name in _CHILDREN]
    return children, (tuple(leaves), structure)


def _unflatten(used: Any, children: Sequence[Any]) -> Gradient:
    leaves, structure = used
    loss, metrics, grads, buffers, weight, written = children
    used = tree.unflatten(structure, leaves)
    return Gradient(loss, metrics, grads, buffers, used, None if isinstance(weight, tuple) else weight, written)


register_node(Gradient, _flatten, _unflatten, fields=_CHILDREN)


def gradients(
    loss_fn: Callable[..., Any],
    *,
    wrt: str | None = None,
    precision: str | Policy | None = None,
    differentiate: Differentiate = "auto",
) -> Callable[..., Gradient]:
    """The function ``(state, batch, index=0) -> Gradient`` that differentiates a loss: the first piece of a step.

    Args:
        loss_fn: ``(model, batch) -> loss`` or ``-> (loss, metrics)``: a 0-d floating tensor, and a dict of 0-d
            tensors or ``fxtrain.metrics``. The model is called as usual, and torch's random functions too. In place of
            the loss it may return the model's output, of which only ``.loss`` is taken, or ``fxtrain.weighted``; in
            place of the pair a dict of metrics with the entry ``"loss"``.
        wrt: The entry of a dict of modules to differentiate; by default all parameters.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.
        differentiate: ``"func"`` is ``torch.func``, which nests in ``torch.func.vmap`` and in outer derivatives.
            ``"autograd"`` is ``torch.autograd.grad`` on detached parameters, which takes whatever a plain PyTorch
            loop takes: activation checkpointing, ``requires_grad_()`` and ``torch.autograd.grad`` in the loss, backward
            hooks, any ``autograd.Function``. Both give the same numbers. ``"auto"`` begins with the first, and changes
            to the second with a warning where ``torch.func`` refuses the loss.

    Returns:
        A pure function. ``index`` tells apart several calls in one step: each draws its own random numbers.

    Raises:
        TypeError: If ``loss_fn`` does not take a model and a batch. When it runs, if it returned anything else, or
            calls an optimizer of torch.
        ValueError: If ``differentiate`` is none of these. When it runs, if there is nothing to train, or if
            ``differentiate="autograd"`` runs inside a transform of ``torch.func`` or under outer derivatives.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init({"w": torch.tensor(3.0), "b": torch.tensor(1.0)})
        >>> find = fx.gradients(lambda model, batch: (model["w"] * batch).square())
        >>> found = find(state, torch.tensor(2.0))
        >>> found.grads, found.used
        ({'w': tensor(24.), 'b': tensor(0.)}, {'w': True, 'b': False})
    """
    refuse_unless_loss(loss_fn)
    policy = policy_of(precision)
    differentiation = Differentiation(differentiate, name_of(loss_fn))

    def find(state: TrainState, batch: Any, index: int = 0) -> Gradient:
        return handled(compute, state, batch, index)

    def compute(state: TrainState, batch: Any, index: int) -> Gradient:
        model = model_of(state)
        state, batch = ordinary((state, batch))
        key = rng.key(state.seed, stream=rng.Stream.TRAIN, step=state.step, microbatch=index)
        scale = loss_scale_of(state) if policy.loss_scale else None
        policy.check(state.params)

        def objective(trainable: Any, find: Find, apart: bool) -> tuple[Tensor, Any, Any]:
            params, inputs = model.merge(state.params, trainable, wrt), batch
            if apart:  # what a loss does to a frozen parameter or to the batch itself stays inside
                frozen = tree.map(torch.detach, state.params)
                params = model.merge(frozen, trainable, wrt)
                inputs = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, batch)

            def finish(result: Any) -> tuple[Tensor, Any, Any]:
                with policy.backward(state.step.device):
                    loss, measured, weight = loss_and_metrics(loss_fn, result)
                    if torch.compiler.is_dynamo_compiling() and _is_unreached(loss, trainable):
                        raise ValueError(
                            "expected a loss that depends on a trainable parameter, got one that reaches none"
                        )
                    metrics = policy.cast_output({"loss": loss, **measured})
                    loss = metrics["loss"]
                    value = loss if scale is None else loss * scale
                    return value, find(value), (metrics, () if weight is None else (weight,))

            called = forward(policy, state.replace(params=params), loss_fn, inputs, train=True, key=key, finish=finish)
            value, found, (metrics, weights) = called.output
            return value, found, (metrics, called.buffers, called.written, weights)

        trainable = model.split(state.params, wrt)
        if not tree.leaves(trainable):
            raise ValueError("Nothing to train: no parameter is floating or complex and requires gradients.")
        model.refuse_hooks()
        reached = model.first_calls(("reached", wrt))
        is_first = not torch.compiler.is_dynamo_compiling() and reached.draws(loss_fn) is None
        with outside_inference_mode(), torch_optimizers_refused(loss_fn) if is_first else contextlib.nullcontext():
            grads, used, (metrics, buffers, written, weights) = differentiation(objective, trainable)
            if is_first and not any(tree.leaves(used)):
                raise unreached(loss_fn, wrt, functools.partial(_run_again, objective, trainable))
        if is_first:
            reached.add(loss_fn)
        if tree.leaves(written):
            _note_written(model, state.params, written)
        if scale is not None:
            grads = tree.map(lambda grad: grad / scale, grads)
        found = Gradient(metrics["loss"], metrics, grads, buffers, used, *weights, written=written)
        return found if found.weight is None else _zero_unless_counted(found, found.weight > 0)

    return find


def _note_written(model: Model, params: Any, written: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    new = tree.leaves(model.carry(params, written))
    old = zip(tree.leaves(params), new, tree.paths(params, "state.params"), strict=True)
    replaced = [(path, leaf) for leaf, after, path in old if after is not leaf]
    note([path for path, _ in replaced], [leaf for _, leaf in replaced])


def _zero_unless_counted(found: Gradient, counted: Tensor) -> Gradient:
    """Zeros where the weight is 0: the mean of nothing is nan, and so is its gradient."""
    metrics = {
        name: value if isinstance(value, Metric) else torch.where(counted, value, 0)
        for name, value in found.metrics.items()
    }
    grads = tree.map(lambda grad: torch.where(counted, grad, 0), found.grads)
    return dataclasses.replace(found, loss=metrics["loss"], metrics=metrics, grads=grads)


def _run_again(objective: Objective, trainable: Any, look: Callable[[Tensor], None]) -> None:
    """Computes a loss again by torch.autograd, for ``look``."""

    def watched(trainable: Any, find: Find, apart: bool) -> tuple[Tensor, Any, Any]:
        def seen(value: Tensor) -> Any:
            look(value)
            return find(value)

        return objective(trainable, seen, apart)

    by_autograd(watched, trainable)


def _is_unreached(loss: Tensor, trainable: Any) -> bool:
    # Whether Dynamo knows what requires a gradient inside torch.func depends on its version. A parameter of a module
    # from outside requires a gradient that torch.func does not compute; a sum in which it takes part does not.
    return (tree.leaves(trainable)[0] + 0).requires_grad and not (loss + 0).requires_grad
