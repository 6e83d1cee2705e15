"""The step of supervised training, and its second piece: applying gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fxtrain import optim, tree
from fxtrain.core import TRACED, Control, Gradients, Microbatch, StepOutput, TrainState, Updated, check_positive_int
from fxtrain.equivalents import refuse_foreign
from fxtrain.fold import as_composed, compose
from fxtrain.fold._subscription import name_of
from fxtrain.model import model_of
from fxtrain.optim._unused import accumulates
from fxtrain.precision import Policy, dynamic_loss_scale, policy_of
from fxtrain.step._contract import refuse_unless_loss
from fxtrain.step._differentiate import Differentiate
from fxtrain.step._gradients import gradients
from fxtrain.step._microbatches import averaged, joined, microbatches
from fxtrain.step._returned import described
from fxtrain.step._step import Step


def train_step(
    loss_fn: Callable[..., Any],
    tx: optim.GradientTransformation,
    *,
    accumulate: int = 1,
    precision: str | Policy | None = None,
    callbacks: Any = (),
    differentiate: Differentiate = "auto",
    unused: Literal["keep", "zero"] = "keep",
) -> Step:
    """The step of supervised training: gradients, averaged over microbatches, then the optimizer.

        g = sum_i w_i grad L(params, batch_i) / sum_i w_i        w_i = 1, or from fxtrain.weighted
        u, opt_state = tx.update(g, opt_state, params)
        params = params + u

    It is one pure function: ``torch.compile(step, fullgraph=True)`` takes it whole, callbacks included.

    Args:
        loss_fn: ``(model, batch) -> loss`` or ``-> (loss, metrics)``. The model is called as usual, and a model that
            computes its own loss may return its output: ``lambda model, batch: model(**batch)``. All that is taken is
            listed at ``gradients``.
        tx: The gradient transformation, as given to ``init``.
        accumulate: Into how many microbatches each batch is cut, along its first dimension. Each adds its
            forward and backward pass to the graph, and so to the time of compiling it. Leaves without examples are
            shared by all: tensors of shape [] or of first dimension 1, and leaves that are not tensors.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.
        callbacks: Those that subscribe to ``Microbatch``, ``Gradients`` or ``Updated`` are folded in here.
        differentiate: ``"auto"``, ``"func"`` or ``"autograd"``, as ``gradients`` takes it.
        unused: What happens to trainable parameters that the loss of a step does not depend on. ``"keep"``: they and
            their optimizer state stay as they are, as in ``torch.optim``. ``"zero"``: their gradient is zero, so weight
            decay and momentum move them, as in optax.

    Raises:
        TypeError: If ``loss_fn`` does not take a model and a batch, or ``tx`` is no gradient transformation.
        ValueError: If ``accumulate`` is below 1, or ``unused`` is neither of the two, or when it runs, if
            ``accumulate`` does not divide the batch.

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
    refuse_unless_loss(loss_fn)
    if not isinstance(tx, optim.GradientTransformation):
        refuse_foreign("tx", "a gradient transformation", tx)
        raise TypeError(
            f"tx is {described(tx)}: one gradient transformation is wanted. For several, fxtrain.optim.partition makes "
            "one of them, or write the step by hand, from fxtrain.gradients and fxtrain.step.apply_gradients."
        )
    if unused not in ("keep", "zero"):
        raise ValueError(f"expected unused='keep' or 'zero', got {unused!r}.")
    check_positive_int("accumulate", accumulate)
    policy = policy_of(precision)
    folded = as_composed(callbacks)
    if policy.loss_scale is not None:
        folded = compose(dynamic_loss_scale(policy.loss_scale), folded)
    find = gradients(loss_fn, precision=policy, differentiate=differentiate)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepOutput]:
        number = state.step + 1
        before, control, found = state, Control(), None
        for index, microbatch in enumerate(microbatches(batch, accumulate)):
            part = find(before, microbatch, index)
            before = part.carried(before)
            state, asked = folded(
                state,
                Microbatch(
                    step=number,
                    index=index,
                    loss=part.loss,
                    metrics=part.metrics,
                    grads=part.grads,
                    weight=part.weight,
                ),
            )
            control = _followed(control, asked)
            found = part if found is None else joined(found, part)
        assert found is not None
        found = averaged(found, accumulate)
        loss, measured, grads, weight = found.loss, found.metrics, found.grads, found.weight
        state, asked = folded(state, Gradients(step=number, loss=loss, metrics=measured, grads=grads, weight=weight))
        control = _followed(control, asked)

        used = found.used if unused == "keep" else None
        carried = state.replace(params=before.params, buffers=before.buffers)
        moved, updates = apply_gradients(carried, grads, tx, used=used)
        skip = control.any("skip_update")
        # Filled and not torch.tensor(...), which would be an input of the graph even where nobody reads it.
        skipped = skip if isinstance(skip, Tensor) else torch.full_like(number, skip, dtype=torch.bool)
        state = _where_not(skipped, moved, state) if "skip_update" in control.kinds else moved
        state, asked = folded(
            state,
            Updated(
                step=number, loss=loss, metrics=measured, grads=grads, updates=updates, skipped=skipped, weight=weight
            ),
        )
        return state, StepOutput(measured, _followed(control, asked), weight=weight)

    step.__name__ = f"train_step({name_of(loss_fn)})"
    step.__doc__ = loss_fn.__doc__
    settings = {"accumulate": str(accumulate), "precision": policy.described}
    if unused != "keep":
        settings["unused"] = unused
    return Step(step, callbacks=folded, fires=TRACED, settings=settings)


def apply_gradients(
    state: TrainState,
    grads: Any,
    tx: optim.GradientTransformation,
    *,
    wrt: str | None = None,
    used: Any = None,
) -> tuple[TrainState, Any]:
    """The state with its parameters moved, and the updates that moved them: the second piece of a step.

    Unused parameters keep their values and their optimizer state, see ``fxtrain.optim.update_used``.

    Args:
        state: Any state with a model.
        grads: From ``gradients``.
        tx: As given to ``init``; with ``wrt``, for that entry.
        wrt: The entry of a dict of modules, as given to ``gradients``.
        used: Pytree like ``grads`` of bools: which parameters got a gradient. None for all.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = {"a": fx.optim.sgd(0.1), "b": fx.optim.adam(0.1)}
        >>> state = fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, tx)
        >>> found = fx.gradients(lambda model, batch: model["a"] * model["b"], wrt="a")(state, None)
        >>> state, updates = fx.step.apply_gradients(state, found.grads, tx["a"], wrt="a")
        >>> float(updates), float(state.params["a"])
        (-0.10000000149011612, 0.8999999761581421)
    """
    model = model_of(state)
    trainable = model.split(state.params, wrt)
    memory = state.opt_state if wrt is None else state.opt_state[wrt]
    updates, memory = optim.update_used(tx, grads, memory, trainable, used)
    moved = optim.apply_updates(trainable, updates)
    if not all(tree.leaves(used)) and not accumulates(memory):
        moved = tree.map(lambda use, old, new: new if use else old, used, trainable, moved)
    params = model.merge(state.params, moved, wrt)
    opt_state = memory if wrt is None else {**state.opt_state, wrt: memory}
    return state.replace(params=params, opt_state=opt_state), updates


def _followed(control: Control, asked: Control) -> Control:
    """What was asked at one event and then at the next. What a callback logs again, the later value stands for."""
    again = {
        name for name, entry in asked.log.items() if name in control.log and control.log[name].owner == entry.owner
    }
    kept = {name: entry for name, entry in control.log.items() if name not in again}
    return control.with_log(kept) | asked


def _where_not(skipped: Tensor, moved: TrainState, state: TrainState) -> TrainState:
    kept = tree.where(
        skipped, (state.params, state.opt_state, state.buffers), (moved.params, moved.opt_state, moved.buffers)
    )
    return state.replace(params=kept[0], opt_state=kept[1], buffers=kept[2])
