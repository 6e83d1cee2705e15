"""Steps: pure functions that move the state forward, and the pieces to write one by hand."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import optim, rng, tree
from fxtrain.core import TRACED, Control, Gradients, Microbatch, StepOutput, TrainState, Updated
from fxtrain.fold import Composed, as_composed, compose
from fxtrain.metrics import Metric
from fxtrain.precision import SLOT as LOSS_SCALE
from fxtrain.precision import Policy, dynamic_loss_scale, policy_of


class Step:
    """A pure function ``(state, batch) -> (state, output)``, with what the loop and the compiler must know of it.

    Whatever the function does, the step counts itself, moves the position by one batch, and returns its input
    once ``state.due.stop`` is set: a stopped state is a fixed point. A hand-written function needs none of this.

    Args:
        function: The step. It may be any pure function of this signature.
        callbacks: The callbacks that it folds; their slots enter the compiled graph.
        fires: The traced events at which it folds them.

    Example:
        >>> import torch, fxtrain as fx
        >>> def halve(state, batch):
        ...     return state.replace(params=state.params * 0.5), fx.StepOutput({"loss": state.params})
        >>> state, output = fx.Step(halve)(fx.init(torch.tensor(8.0)), batch=None)
        >>> float(state.params), int(state.step)
        (4.0, 1)
    """

    def __init__(self, function: Callable[..., Any], *, callbacks: Any = (), fires: Iterable[type[Any]] = ()) -> None:
        self.function = function
        self.callbacks: Composed = as_composed(callbacks)
        self.fires = frozenset(fires)
        unknown = self.fires - set(TRACED)
        if unknown:
            raise ValueError(
                f"fires={sorted(kind.__name__ for kind in unknown)}: a step fires "
                f"{', '.join(kind.__name__ for kind in TRACED)}, and nothing else."
            )
        functools.update_wrapper(self, function, updated=())

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepOutput]:
        new, output = _checked_step(self, self.function(state, batch))
        control = _on_device(output.control, state.step.device)
        due = state.due._replace(
            stop=state.due.stop | control.any("stop"), unsaved=state.due.unsaved | control.any("unsaved")
        )
        new = new.replace(step=state.step + 1, position=state.position + 1, due=due)
        _refuse_changed_leaves(self, state, new)
        return tree.where(state.due.stop, state, new), StepOutput(output.metrics, control, output.outputs)

    def enter(self, state: TrainState) -> TrainState:
        """What of the state goes into the compiled graph: slots that only the loop uses stay outside."""
        traced = self.callbacks.traced_slots
        return state.replace(slots={name: memory for name, memory in state.slots.items() if name in traced})

    def leave(self, state: TrainState, result: tuple[TrainState, StepOutput]) -> tuple[TrainState, StepOutput]:
        """The result of the graph, with what stayed outside of it."""
        new, output = result
        return new.replace(slots={**state.slots, **new.slots}), output

    def __repr__(self) -> str:
        fires = ", ".join(kind.__name__ for kind in TRACED if kind in self.fires) or "nothing"
        return f"<step {getattr(self, '__name__', type(self.function).__name__)}, fires {fires}>"


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
            tensors or ``fxtrain.metrics``.
        wrt: The entry of a dict of modules to differentiate; by default all parameters.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.

    Returns:
        A pure function. ``index`` tells apart several calls in one step: each draws its own random numbers.

    Raises:
        TypeError: When it runs, if the loss function returned anything else.
    """
    policy = policy_of(precision)

    def run(state: TrainState, batch: Any, index: int = 0, buffers: Any = None) -> Gradient:
        model = state.model
        memory = state.buffers if buffers is None else buffers
        key = rng.key(state.seed, stream=rng.Stream.TRAIN, step=state.step, microbatch=index)
        scale = state.slots[LOSS_SCALE].scale if policy and policy.loss_scale else None

        def objective(trainable: Any) -> tuple[Tensor, tuple[Tensor, dict[str, Any], Any]]:
            params = model.merge(state.params, trainable, wrt)
            with _autocast(policy, state):
                result, written = model.call(params, memory, loss_fn, batch, train=True, key=key)
            loss, measured = _loss_and_metrics(loss_fn, result)
            loss = loss if policy is None else loss.to(policy.output)
            return (loss if scale is None else loss * scale), (loss, measured, written)

        if policy is not None:
            policy.check(state.params)
        trainable = model.split(state.params, wrt)
        if not tree.leaves(trainable):
            raise ValueError("Nothing to train: no parameter is floating or complex and requires gradients.")
        grads, (loss, measured, written) = torch.func.grad(objective, has_aux=True)(trainable)
        if scale is not None:
            grads = tree.map(lambda grad: grad / scale.to(grad.dtype), grads)
        return Gradient(loss, {"loss": loss, **measured}, grads, written)

    return run


def train_step(
    loss_fn: Callable[..., Any],
    tx: optim.GradientTransformation,
    *,
    accumulate: int = 1,
    precision: str | Policy | None = None,
    callbacks: Any = (),
) -> Step:
    """The step of supervised training: gradients, averaged over microbatches, then the optimizer.

        g = 1/k sum_i grad L(params, batch_i)
        u, opt_state = tx.update(g, opt_state, params)
        params = params + u

    It is one pure function: ``torch.compile(step, fullgraph=True)`` takes it whole, callbacks included.

    Args:
        loss_fn: ``(model, batch) -> loss`` or ``-> (loss, metrics)``. The model is called as usual.
        tx: The gradient transformation, as given to ``init``.
        accumulate: Into how many microbatches each batch is cut, along its first dimension. Each adds its
            forward and backward pass to the graph, and so to the time of compiling it.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.
        callbacks: Those that subscribe to ``Microbatch``, ``Gradients`` or ``Updated`` are folded in here.

    Raises:
        ValueError: If ``accumulate`` is below 1 or does not divide the batch.

    Example:
        >>> import torch, fxtrain as fx
        >>> def loss_fn(model, batch):
        ...     return (model(batch["x"]) - batch["y"]).square().mean()
        >>> tx = fx.optim.sgd(0.1)
        >>> state = fx.init(torch.nn.Linear(1, 1), tx)
        >>> step = fx.train_step(loss_fn, tx)
        >>> state, output = step(state, {"x": torch.ones(8, 1), "y": torch.ones(8, 1)})
        >>> sorted(output.metrics), int(state.step)
        (['loss'], 1)
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r}: a whole number of microbatches, 1 or more, is wanted.")
    policy = policy_of(precision)
    folded = as_composed(callbacks)
    if policy is not None and policy.loss_scale is not None:
        folded = compose(dynamic_loss_scale(policy.loss_scale), folded)
    differentiate = gradients(loss_fn, precision=policy)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepOutput]:
        number = state.step + 1
        before, control, found = state, Control(), None
        for index, microbatch in enumerate(_microbatches(batch, accumulate)):
            part = differentiate(before, microbatch, index, None if found is None else found.buffers)
            state, asked = folded(
                state,
                Microbatch(step=number, index=index, loss=part.loss, metrics=part.metrics, grads=part.grads),
            )
            control = control | asked
            found = part if found is None else _joined(found, part)
        assert found is not None
        measured = found.metrics if accumulate == 1 else _averaged(found.metrics, accumulate)
        grads = found.grads if accumulate == 1 else tree.map(lambda grad: grad / accumulate, found.grads)
        loss = measured["loss"]
        state, asked = folded(state, Gradients(step=number, loss=loss, metrics=measured, grads=grads))
        control = control | asked

        trainable = state.model.split(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, trainable)
        moved = state.model.merge(state.params, optim.apply_updates(trainable, updates))
        skipped = torch.as_tensor(control.any("skip_update"), device=number.device)
        new = (moved, opt_state, found.buffers)
        if control.kinds and "skip_update" in control.kinds:
            new = tree.where(skipped, (state.params, state.opt_state, state.buffers), new)
        state = state.replace(params=new[0], opt_state=new[1], buffers=new[2])
        state, asked = folded(
            state,
            Updated(step=number, loss=loss, metrics=measured, grads=grads, updates=updates, skipped=skipped),
        )
        return state, StepOutput(measured, control | asked)

    functools.update_wrapper(step, loss_fn, assigned=("__module__", "__doc__"), updated=())
    return Step(step, callbacks=folded, fires=TRACED)


class EvalFunction:
    """A pure function ``(state, batch) -> output`` that measures; made by ``eval_step``."""

    def __init__(self, function: Callable[[TrainState, Any], StepOutput]) -> None:
        self.function = function
        functools.update_wrapper(self, function, updated=())

    def __call__(self, state: TrainState, batch: Any) -> StepOutput:
        output = self.function(state, batch)
        return StepOutput(output.metrics, _on_device(output.control, state.step.device), output.outputs)

    def enter(self, state: TrainState) -> TrainState:
        """What of the state goes into the compiled graph: no optimizer and no slots."""
        return state.replace(opt_state={}, slots={})

    def leave(self, state: TrainState, result: StepOutput) -> StepOutput:
        """The result of the graph, as it is."""
        return result


def eval_step(
    measure: Callable[..., Any], *, precision: str | Policy | None = None, outputs: bool = False
) -> EvalFunction:
    """The function ``(state, batch) -> StepOutput`` that measures the model in eval mode.

    Args:
        measure: ``(model, batch)`` to a 0-d loss, a loss and a dict of metrics, or a dict of metrics alone; a loss
            function serves as it is. Tensors are averaged over the batches, weighted by their first dimension;
            ``fxtrain.metrics`` are merged.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.
        outputs: Whether ``measure`` returns a pair of that and anything else, which reaches callbacks at
            ``EvalStep``.

    Example:
        >>> import torch, fxtrain as fx
        >>> step = fx.eval_step(lambda model, batch: {"mean": model(batch).mean()})
        >>> state = fx.init(torch.nn.Dropout())
        >>> step(state, torch.ones(2, 2)).metrics
        {'mean': tensor(1.)}
    """
    policy = policy_of(precision)

    def step(state: TrainState, batch: Any) -> StepOutput:
        key = rng.key(state.seed, stream=rng.Stream.EVAL, step=state.step, microbatch=state.position)
        with _autocast(policy, state):
            result, _ = state.model.call(state.params, state.buffers, measure, batch, train=False, key=key)
        extra = None
        if outputs:
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(
                    f"{_name(measure)} returned {_described(result)}: with outputs=True a pair (metrics, outputs) "
                    "is wanted."
                )
            result, extra = result
        if isinstance(result, Mapping):
            return StepOutput(_checked_metrics(measure, result), outputs=extra)
        loss, measured = _loss_and_metrics(measure, result)
        return StepOutput({"loss": loss, **measured}, outputs=extra)

    functools.update_wrapper(step, measure, assigned=("__module__", "__doc__"), updated=())
    return EvalFunction(step)


def _autocast(policy: Policy | None, state: TrainState) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if policy is None else policy.autocast(state.step.device)


def _microbatches(batch: Any, count: int) -> list[Any]:
    if count == 1:
        return [batch]
    for path, leaf in zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] % count:
            came = _described(leaf)
            raise ValueError(
                f"accumulate={count} cuts each batch into {count} parts along its first dimension, and {path} is "
                f"{came}: choose a batch size that {count} divides, and keep what has no batch dimension elsewhere."
            )
    return [
        tree.map(lambda leaf, i=i: leaf[i * (leaf.shape[0] // count) : (i + 1) * (leaf.shape[0] // count)], batch)
        for i in range(count)
    ]


def _joined(total: Gradient, part: Gradient) -> Gradient:
    measured = {
        name: value.merge(part.metrics[name]) if isinstance(value, Metric) else value + part.metrics[name]
        for name, value in total.metrics.items()
    }
    return Gradient(total.loss + part.loss, measured, tree.map(torch.add, total.grads, part.grads), part.buffers)


def _averaged(metrics: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {name: value if isinstance(value, Metric) else value / count for name, value in metrics.items()}


def _on_device(control: Control | None, device: torch.device) -> Control:
    # What leaves the compiled step is tensors, so that a vmapped step can return it.
    asked = Control() if control is None else control
    return tree.map(lambda leaf: leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, device=device), asked)


def _loss_and_metrics(loss_fn: Any, result: Any) -> tuple[Tensor, dict[str, Any]]:
    loss, metrics = result, {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        loss, metrics = result
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise TypeError(
            f"{_name(loss_fn)} returned {_described(result)}: a loss function returns a 0-d floating tensor, or that "
            "and a dict of metrics. A loss of each example is reduced with .mean()."
        )
    if "loss" in metrics:
        raise ValueError(f"{_name(loss_fn)} returned a metric named 'loss', which is the loss's own name: rename it.")
    return loss, _checked_metrics(loss_fn, metrics)


def _checked_metrics(loss_fn: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in metrics.items():
        if not isinstance(value, Metric) and not (isinstance(value, Tensor) and value.ndim == 0):
            raise TypeError(
                f"{_name(loss_fn)} returned the metric {name!r} as {_described(value)}: a 0-d tensor is wanted, or "
                "one of fxtrain.metrics."
            )
    return dict(metrics)


def _checked_step(step: Step, result: Any) -> tuple[TrainState, StepOutput]:
    if (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], TrainState)
        and isinstance(result[1], StepOutput)
    ):
        return result
    raise TypeError(
        f"{_name(step.function)} returned {_described(result)}: a step returns (state, fxtrain.StepOutput(metrics))."
    )


def _refuse_changed_leaves(step: Step, old: TrainState, new: TrainState) -> None:
    """A state keeps its structure, shapes and dtypes: anything else would be another graph at each step."""
    old_leaves, new_leaves = tree.leaves(old), tree.leaves(new)
    if len(old_leaves) == len(new_leaves) and all(
        was.shape == came.shape and was.dtype == came.dtype for was, came in zip(old_leaves, new_leaves, strict=True)
    ):
        return
    before = dict(zip(tree.paths(old, "state"), old_leaves, strict=True))
    after = dict(zip(tree.paths(new, "state"), new_leaves, strict=True))
    for path in (*before, *after):
        was, came = before.get(path), after.get(path)
        if was is None or came is None:
            raise ValueError(
                f"{_name(step.function)} {'added' if was is None else 'removed'} {path}: a step keeps the structure "
                "of its state. What a callback remembers is a slot, attached before the first step."
            )
        if was.shape != came.shape or was.dtype != came.dtype:
            raise ValueError(
                f"{_name(step.function)} changed {path} from {_described(was)} to {_described(came)}: a step keeps "
                "shapes and dtypes."
            )


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(_described(part) for part in value)}"
    return "None" if value is None else f"a {type(value).__name__}"
