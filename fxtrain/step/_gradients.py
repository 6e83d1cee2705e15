"""Computes the loss, the metrics and the gradients of a state, the first part of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fxtrain import rng, tree
from fxtrain.core import Batch, Metrics, TrainState, Tree, name_of, register_node
from fxtrain.core._protocols import present
from fxtrain.core._shard import holds_shards, refuse_shards
from fxtrain.core._state import refuse_stacked
from fxtrain.metrics import Metric
from fxtrain.model import Model, model_of
from fxtrain.precision import Policy, loss_scale_of, policy_of
from fxtrain.step._check_function import refuse_unless_loss
from fxtrain.step._differentiate import Differentiate, Differentiation, Find, ordinary, outside_inference_mode, rerun
from fxtrain.step._forward_pass import forward
from fxtrain.step._loss_mistakes import missing_gradient, torch_optimizers_refused
from fxtrain.step._loss_results import detached_outputs, loss_and_metrics, refuse_growing, without_outputs

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh


class LocalPart(NamedTuple):
    """What ``fxtrain.distributed.averaged`` needs to know about the part of a rank.

    Args:
        examples: float64 []. The number of examples.
        buffers: The buffers before the forward pass.
    """

    examples: Tensor
    buffers: Tree


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The result of a forward and a backward pass: a pytree of tensors. Made by ``gradients``.

    Args:
        loss: Floating [].
        metrics: 0-d tensors and metrics, including ``"loss"``.
        grads: Gradients, like the trainable parameters.
        buffers: Buffers after the forward pass, like ``state.buffers``.
        used: A pytree of Python bools like ``grads``: False for parameters that the loss does not depend on. ``grads``
            holds zeros for these, where torch leaves ``grad`` at None. A traced step keeps the values of its trace, and
            a step compiled by Dynamo has True everywhere. Static: part of the tree's structure, not a leaf.
        weight: float64 []. The weight in a mean, from ``fxtrain.weighted``. None without it.
        written: The frozen parameters that the forward pass writes, such as a momentum encoder's, after the pass.
        outputs: Other outputs of the loss function, detached. None without ``outputs=True``.
        local: With a mesh, the number of examples of this rank, and the buffers before the forward pass.

    Example:
        >>> import torch, fxtrain as fx
        >>> find = fx.gradients(lambda model, batch: (model["w"] * batch).sum())
        >>> found = find(fx.init({"w": torch.tensor(3.0)}), torch.tensor([2.0, 1.0]))
        >>> found.loss, found.grads
        (tensor(9.), {'w': tensor(3.)})
    """

    loss: Tensor
    metrics: Metrics
    grads: Tree
    buffers: Tree
    used: Tree
    weight: Tensor | None = None
    written: Tree = dataclasses.field(default_factory=dict)
    outputs: Tree | None = None
    local: LocalPart | None = None

    def carried(self, state: TrainState) -> TrainState:
        """Returns the state with the buffers and frozen parameters that the forward pass wrote.

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
        return moved.replace(params=model_of(state).with_written(state.params, self.written))


_FIELDS = ("loss", "metrics", "grads", "buffers", "weight", "written", "outputs", "local")


def _flatten(gradient: Gradient) -> tuple[list[Tree], Tree]:
    leaves, structure = tree.flatten(gradient.used)
    # torch's pytree treats None as a leaf. An empty tuple has no leaves.
    children = [() if (value := getattr(gradient, name)) is None else value for name in _FIELDS]
    return children, (tuple(leaves), structure)


def _unflatten(used: Tree, children: Sequence[Tree]) -> Gradient:
    leaves, structure = used
    loss, metrics, grads, buffers, weight, written, outputs, local = children
    used = tree.unflatten(structure, leaves)
    return Gradient(loss, metrics, grads, buffers, used, present(weight), written, present(outputs), present(local))


register_node(Gradient, _flatten, _unflatten, fields=_FIELDS)


def gradients(
    loss_fn: Callable[..., object],
    *,
    wrt: str | None = None,
    precision: str | Policy | None = None,
    differentiate: Differentiate = "auto",
    outputs: bool = False,
    mesh: Mesh | None = None,
) -> Callable[..., Gradient]:
    """Returns a function ``(state, batch, index=0) -> Gradient`` that differentiates a loss.

    Args:
        loss_fn: ``(model, batch) -> loss`` or ``-> (loss, metrics)``: a 0-d floating tensor, and a dict of 0-d
            tensors or ``fxtrain.metrics``. The model and torch's random functions are called as usual. The loss may
            also be ``fxtrain.weighted`` or a model's output, of which only ``.loss`` is used. The pair may also be a
            dict of metrics with the entry ``"loss"``.
        wrt: Key of a dict of modules, to differentiate one entry only. Defaults to all trainable parameters.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.
        differentiate: ``"func"`` uses ``torch.func``, which nests in ``torch.func.vmap`` and in outer derivatives.
            ``"autograd"`` uses ``torch.autograd.grad`` on detached parameters, which supports everything that a plain
            PyTorch loop does: activation checkpointing, ``requires_grad_()`` and ``torch.autograd.grad`` in the loss,
            backward hooks, any ``autograd.Function``. Both give the same gradients. ``"auto"`` uses ``torch.func``, and
            switches to ``torch.autograd`` with a warning if ``torch.func`` rejects the loss.
        outputs: Whether ``loss_fn`` returns a pair of such a result and a pytree of other tensors, such as logits.
        mesh: The ranks among which each batch is split, from ``fxtrain.distributed.mesh``, whose results
            ``fxtrain.distributed.averaged`` averages. Random samples of torch with one row per example are those that
            one process takes for these examples of the whole batch. All other samples are equal on all ranks: those
            whose first dimension is not the number of examples, such as the masks of ``[time, examples, channels]``,
            and those of Python and NumPy.

    Returns:
        A pure function. Calls with different ``index`` in one step take different random samples.

    Raises:
        TypeError: If ``loss_fn`` does not take a model and a batch. When it runs, if it returns anything else, or
            calls a torch optimizer.
        ValueError: If ``differentiate`` is none of these. When it runs, if there is nothing to train, if the loss does
            not depend on a trainable parameter, or if ``differentiate="autograd"`` runs inside a transform of
            ``torch.func`` or under outer derivatives.

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

    def find(state: TrainState, batch: Batch, index: int = 0) -> Gradient:
        handler = None if torch.compiler.is_dynamo_compiling() else _handler.get()
        return compute(state, batch, index) if handler is None else handler(compute, state, batch, index)

    def compute(state: TrainState, batch: Batch, index: int) -> Gradient:
        model = model_of(state)
        refuse_stacked(state, "step(state, batch)")
        if mesh is None and not torch.compiler.is_dynamo_compiling() and holds_shards(state.params):
            refuse_shards(state.params, "gradients(loss_fn)(state, batch)")
        state, batch = ordinary((state, batch))
        key = rng.key(state.seed, stream=rng.Stream.TRAIN, step=state.step, microbatch=index)
        local, is_synced = None, False
        if mesh is not None:
            from fxtrain.distributed import _examples, _sync_batch_norm

            key = _examples.on_rank(key, mesh, batch)
            examples = _examples.scalar(_examples.num_examples(batch), state.step.device)
            local = LocalPart(examples, state.buffers)
            is_synced = _sync_batch_norm.is_synced(model.named_modules(train=True).values())
        scale = loss_scale_of(state) if policy.loss_scale else None
        policy.check(state.params)

        def objective(trainable: Tree, find: Find, apart: bool) -> tuple[Tensor, Tree, Tree]:
            params, inputs = model.merge(state.params, trainable, wrt), batch
            # Detached, so that requires_grad_() of a frozen parameter or the batch in the loss has no effect outside.
            if apart:
                frozen = tree.map(torch.detach, state.params)
                params = model.merge(frozen, trainable, wrt)
                inputs = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, batch)

            def finish(result: object) -> tuple[Tensor, Tree, Tree]:
                with policy.backward(state.step.device):
                    extra: Tree = ()
                    if outputs:
                        result, extra = without_outputs(loss_fn, result, "loss")
                        extra = detached_outputs(loss_fn, extra)
                    loss, measured, weight = loss_and_metrics(loss_fn, result)
                    refuse_growing(loss_fn, measured)
                    if torch.compiler.is_dynamo_compiling() and _depends_on_none(loss, trainable):
                        raise ValueError(
                            "expected a loss that depends on a trainable parameter, got one that depends on none"
                        )
                    metrics = policy.cast_output({"loss": loss, **measured})
                    loss = metrics["loss"]
                    value = loss if scale is None else loss * scale
                    if local is not None and is_synced:
                        # Gradients that flow from one rank to another have the weight of the rank that they come from.
                        value = value * (local.examples if weight is None else weight).to(value.dtype)
                    return value, find(value), (metrics, () if weight is None else (weight,), extra)

            given = state.replace(params=params)
            called = forward(policy, given, loss_fn, inputs, train=True, key=key, finish=finish, mesh=mesh)
            value, found, (metrics, weights, extra) = called.output
            return value, found, (metrics, called.buffers, called.written, weights, extra)

        trainable = model.split(state.params, wrt)
        if not tree.leaves(trainable):
            raise ValueError(
                "expected a trainable parameter, got none. Make a floating or complex parameter require gradients."
            )
        model.refuse_hooks()
        # Dynamo would guard what it reads here, and compile again once it has changed.
        reached = None if torch.compiler.is_dynamo_compiling() else model.checked_functions(("reached", wrt))
        is_first = reached is not None and reached.samples_on_host(loss_fn) is None
        with outside_inference_mode(), torch_optimizers_refused(loss_fn) if is_first else contextlib.nullcontext():
            grads, used, (metrics, buffers, written, weights, extra) = differentiation(objective, trainable)
            if is_first and not any(tree.leaves(used)):
                raise missing_gradient(loss_fn, wrt, functools.partial(rerun, objective, trainable))
        if reached is not None and is_first:
            reached.add(loss_fn)
        if tree.leaves(written):
            _record_replaced(model, state.params, written)
        if scale is not None:
            grads = tree.map(lambda grad: grad / scale, grads)
        if local is not None and is_synced:
            grads = _divided(grads, weights[0] if weights else local.examples)
        found = Gradient(
            metrics["loss"],
            metrics,
            grads,
            buffers,
            used,
            *weights,
            written=written,
            outputs=present(extra),
            local=local,
        )
        return found if found.weight is None else _zero_unless_counted(found, found.weight > 0)

    return find


FindGradient = Callable[[TrainState, Batch, int], Tree]
"""``(state, batch, index) -> Gradient``, as returned by ``gradients``."""

_handler: ContextVar[Callable[[FindGradient, TrainState, Batch, int], Tree] | None]
_handler = ContextVar("handler of gradients", default=None)


@contextlib.contextmanager
def intercepted(handler: Callable[[FindGradient, TrainState, Batch, int], Tree]) -> Generator[None]:
    """Passes calls of functions from ``gradients`` to ``handler`` inside the context, in this thread only.

    Args:
        handler: Maps such a function and its arguments to the result that the step gets instead.

    Example:
        >>> import torch, fxtrain as fx
        >>> find = fx.gradients(lambda model, batch: model(batch).mean())
        >>> state = fx.init(torch.nn.Linear(1, 1))
        >>> with intercepted(lambda find, state, batch, index: "in place of a gradient"):
        ...     find(state, torch.ones(2, 1))
        'in place of a gradient'
    """
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


_replaced: ContextVar[list[tuple[str, Tensor]] | None] = ContextVar("replaced parameters", default=None)


def recording_replaced() -> contextlib.AbstractContextManager[list[tuple[str, Tensor]]]:
    """Collects the frozen parameters that forward passes inside the context replace, with their paths.

    In this thread only. Collects nothing inside Dynamo.
    """
    return contextlib.nullcontext([]) if torch.compiler.is_dynamo_compiling() else _recording_replaced()


@contextlib.contextmanager
def _recording_replaced() -> Generator[list[tuple[str, Tensor]]]:
    replaced: list[tuple[str, Tensor]] = []
    token = _replaced.set(replaced)
    try:
        yield replaced
    finally:
        _replaced.reset(token)


def _record_replaced(model: Model, params: Tree, written: Tree) -> None:
    replaced = None if torch.compiler.is_dynamo_compiling() else _replaced.get()
    if replaced is not None:
        new = tree.leaves(model.with_written(params, written))
        old = zip(tree.paths(params, "state.params"), tree.leaves(params), new, strict=True)
        replaced += [(path, leaf) for path, leaf, after in old if after is not leaf]


def refuse_lost(who: str, replaced: list[tuple[str, Tensor]], params: Tree) -> None:
    """Raises if a new state still has parameters from before a forward pass that wrote them.

    Args:
        who: Name of the step, for errors.
        replaced: The leaves that forward passes replaced, with their paths.
        params: Parameters of the new state.

    Raises:
        RuntimeError: Names the parameter.
    """
    if not replaced:
        return
    kept = set(map(id, tree.leaves(params)))
    lost = next((path for path, leaf in replaced if id(leaf) in kept), None)
    if lost is not None:
        raise RuntimeError(
            f"expected {who} to return a state with the frozen parameters that its forward pass wrote, got {lost} from "
            "before it. Use state = found.carried(state), where found is the result of fxtrain.gradients."
        )


def _divided(grads: Tree, weight: Tensor) -> Tree:
    """Returns the gradients divided by the weight, and zeros if it is 0."""

    def divided(grad: Tensor) -> Tensor:
        return torch.where(weight > 0, grad / weight.to(grad.real.dtype if grad.is_complex() else grad.dtype), 0)

    return tree.map(divided, grads)


def _zero_unless_counted(found: Gradient, counted: Tensor) -> Gradient:
    """Returns zeros if the weight is 0, because a mean over no items and its gradient are nan."""
    metrics = {
        name: value if isinstance(value, Metric) else torch.where(counted, value, 0)
        for name, value in found.metrics.items()
    }
    grads = tree.map(lambda grad: torch.where(counted, grad, 0), found.grads)
    return dataclasses.replace(found, loss=metrics["loss"], metrics=metrics, grads=grads)


def _depends_on_none(loss: Tensor, trainable: Tree) -> bool:
    # Some versions of Dynamo do not track requires_grad inside torch.func, hence the first test. A parameter of an
    # outside module requires a gradient that torch.func does not compute, but a sum with it does not, hence "+ 0".
    return (tree.leaves(trainable)[0] + 0).requires_grad and not (loss + 0).requires_grad
