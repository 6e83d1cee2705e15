"""The step of supervised training, and the update of the parameters by an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from fxtrain import optim, tree
from fxtrain.core import (
    TRACED,
    Batch,
    Callback,
    Control,
    Gradients,
    Microbatch,
    StepOutput,
    TrainState,
    Tree,
    Updated,
    argument_text,
    check_choice,
    check_positive_int,
    describe,
    name_of,
)
from fxtrain.equivalents import refuse_foreign
from fxtrain.fold import Composed, as_composed, compose
from fxtrain.model import model_of
from fxtrain.optim._hyperparams import learning_rates_by_name
from fxtrain.optim._partial_update import accumulates
from fxtrain.precision import Policy, dynamic_loss_scale, policy_of
from fxtrain.step._check_function import refuse_unless_loss
from fxtrain.step._differentiate import Differentiate
from fxtrain.step._gradients import gradients
from fxtrain.step._microbatches import averaged, joined, microbatches
from fxtrain.step._step import Step
from fxtrain.step._transform_batch import TransformBatch, seeded_transform


def train_step(
    loss_fn: Callable[..., object],
    tx: optim.GradientTransformation,
    *,
    accumulate: int = 1,
    precision: str | Policy | None = None,
    callbacks: Callback | Iterable[Callback] = (),
    differentiate: Differentiate = "auto",
    unused: Literal["keep", "zero"] = "keep",
    outputs: bool = False,
    transform_batch: TransformBatch | None = None,
) -> Step:
    """Returns the step of supervised training: gradients averaged over microbatches, then the optimizer.

        g = sum_i w_i grad L(params, batch_i) / sum_i w_i        w_i = 1, or from fxtrain.weighted
        u, opt_state = tx.update(g, opt_state, params)
        params = params + u

    The step adds the learning rate to the metrics, as ``learning_rate``, or as ``learning_rate/<group>`` if there are
    several: see ``fxtrain.optim.learning_rates``. A metric of the loss function with this name takes precedence.

    The step is one pure function. ``torch.compile(step, fullgraph=True)`` compiles all of it, callbacks included.

    Args:
        loss_fn: ``(model, batch) -> loss`` or ``-> (loss, metrics)``. The model is called as usual. If the model
            computes its own loss, the function may return the model's output: ``lambda model, batch: model(**batch)``.
            ``gradients`` lists all results that are accepted.
        tx: The gradient transformation given to ``init``.
        accumulate: Number of microbatches into which each batch is split along its first dimension. Each adds a
            forward and a backward pass to the graph, and so to the compile time. Leaves without examples are shared:
            0-d tensors, tensors with first dimension 1, and leaves that are not tensors.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.
        callbacks: Callbacks to fold inside the step, which subscribe to ``Microbatch``, ``Gradients`` or ``Updated``.
            ``fit`` adds those of its own, so only a step that is called without ``fit`` needs them.
        differentiate: ``"auto"``, ``"func"`` or ``"autograd"``, see ``gradients``.
        unused: Treatment of trainable parameters that the loss does not depend on. ``"keep"`` leaves them and their
            optimizer state unchanged, as in ``torch.optim``. ``"zero"`` gives them a zero gradient, so that weight
            decay and momentum still move them, as in optax.
        outputs: Whether ``loss_fn`` returns a pair of such a result and a pytree of other tensors, such as logits or
            attention maps, which callbacks and observers receive at ``StepEnd``. Those of microbatches are concatenated
            along the first dimension, and 0-d ones stacked.
        transform_batch: ``(state, batch) -> batch``, a pure function that runs inside the step, before the batch is
            split: mixup, noise that decays with ``state.step``, a curriculum. The new batch may have other entries,
            shapes and dtypes. torch's random functions depend on the seed and the step, so a resumed run samples the
            same. The state has the slots of traced callbacks.

    Returns:
        The step ``(state, batch) -> (state, output)``.

    Raises:
        TypeError: If ``loss_fn`` does not take a model and a batch, ``transform_batch`` a state and a batch, or ``tx``
            is not a gradient transformation.
        ValueError: If ``accumulate`` is below 1, or ``unused`` is neither of the two. When it runs, if ``accumulate``
            does not divide the batch.

    Example:
        >>> import torch, fxtrain as fx
        >>> def loss_fn(model, batch):
        ...     return (model(batch["x"]) - batch["y"]).square().mean()
        >>> tx = fx.optim.sgd(0.1)
        >>> state = fx.init(torch.nn.Linear(1, 1), tx)
        >>> step = fx.train_step(loss_fn, tx)
        >>> state, output = step(state, {"x": torch.ones(8, 1), "y": torch.ones(8, 1)})
        >>> sorted(output.metrics), int(state.step)
        (['learning_rate', 'loss'], 1)
        >>> step.description["optimizer"], step.description["accumulate"]
        ('sgd(0.1)', '1')

        Mixup, with other weights at each step:

        >>> def mixup(state, batch):
        ...     share, order = torch.rand(len(batch["x"]), 1), torch.randperm(len(batch["x"]))
        ...     return {name: share * value + (1 - share) * value[order] for name, value in batch.items()}
        >>> step = fx.train_step(loss_fn, tx, transform_batch=mixup)
        >>> state, output = step(state, {"x": torch.ones(8, 1), "y": torch.ones(8, 1)})
    """
    refuse_unless_loss(loss_fn)
    if not isinstance(tx, optim.GradientTransformation):
        refuse_foreign("tx", "a gradient transformation", tx)
        raise TypeError(
            f"expected tx to be a gradient transformation, got {describe(tx)}. Combine several with "
            "fxtrain.optim.partition, or write the step with fxtrain.gradients and fxtrain.step.apply_gradients."
        )
    check_choice("unused", unused, ("keep", "zero"))
    check_positive_int("accumulate", accumulate)
    policy = policy_of(precision)
    folded = as_composed(callbacks)
    if policy.loss_scale is not None:
        folded = compose(dynamic_loss_scale(policy.loss_scale), folded)
    find = gradients(loss_fn, precision=policy, differentiate=differentiate, outputs=outputs)
    transform = None if transform_batch is None else seeded_transform(transform_batch)

    settings = {"accumulate": str(accumulate), "precision": policy.described}
    if unused != "keep":
        settings["unused"] = unused
    if transform_batch is not None:
        settings["transform_batch"] = name_of(transform_batch)
    description = {
        "loss": name_of(loss_fn),
        "optimizer": tx,
        **{name: argument_text(rate.given) for name, rate in learning_rates_by_name(tx).items()},
        "precision": policy.described if isinstance(precision, Policy) else precision or "that of the parameters",
    }

    def build(folded: Composed) -> Step:
        visible = folded.traced_slots

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
            number = state.step + 1
            before, control, found = state, Control(), None
            extra: list[Tree] = []
            if transform is not None:
                slots = {name: slot for name, slot in state.slots.items() if name in visible}
                batch = transform(state.replace(slots=slots), batch, 0)
            for index, microbatch in enumerate(microbatches(batch, accumulate)):
                part = find(before, microbatch, index)
                before = part.carried(before)
                measured = {"loss": part.loss, "metrics": part.metrics, "grads": part.grads, "weight": part.weight}
                state, requests = folded(state, Microbatch(step=number, index=index, **measured))
                control = _merged(control, requests)
                found = part if found is None else joined(found, part)
                extra.append(part.outputs)
            assert found is not None
            found = averaged(found, extra)
            measured = {"loss": found.loss, "metrics": found.metrics, "grads": found.grads, "weight": found.weight}
            state, requests = folded(state, Gradients(step=number, **measured))
            control = _merged(control, requests)

            used = found.used if unused == "keep" else None
            carried = state.replace(params=before.params, buffers=before.buffers)
            moved, updates = apply_gradients(carried, found.grads, tx, used=used)
            # The metrics of the loss function come first, and win if a name occurs twice.
            metrics = {**found.metrics, **optim.learning_rates(tx, carried), **found.metrics}
            measured["metrics"] = metrics
            skip = control.any("skip_update")
            # Not torch.tensor(...), which would become an input of the graph even if it is unused.
            skipped = skip if isinstance(skip, Tensor) else torch.full_like(number, skip, dtype=torch.bool)
            state = tree.where(skipped, state, moved) if "skip_update" in control.kinds else moved
            state, requests = folded(state, Updated(step=number, updates=updates, skipped=skipped, **measured))
            return state, StepOutput(metrics, _merged(control, requests), found.outputs, found.weight)

        step.__name__ = f"train_step({name_of(loss_fn)})"
        step.__doc__ = loss_fn.__doc__
        return Step(step, callbacks=folded, fires=TRACED, rebuild=build, settings=settings, description=description)

    return build(folded)


def apply_gradients(
    state: TrainState,
    grads: Tree,
    tx: optim.GradientTransformation,
    *,
    wrt: str | None = None,
    used: Tree | None = None,
) -> tuple[TrainState, Tree]:
    """Updates the parameters and the optimizer state, the second part of a step.

    Unused parameters keep their values and their optimizer state, see ``fxtrain.optim.update_used``.

    Args:
        state: Any state with a model.
        grads: Gradients from ``gradients``.
        tx: The transformation given to ``init``. With ``wrt``, that of the entry.
        wrt: Key of a dict of modules, as given to ``gradients``.
        used: Pytree of bools like ``grads``: which parameters got a gradient. None for all.

    Returns:
        The new state, and the updates that were added to the parameters.

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
    tx_state = state.opt_state if wrt is None else state.opt_state[wrt]
    updates, tx_state = optim.update_used(tx, grads, tx_state, trainable, used)
    moved = optim.apply_updates(trainable, updates)
    if not all(tree.leaves(used)) and not accumulates(tx_state):
        moved = tree.map(lambda use, old, new: new if use else old, used, trainable, moved)
    params = model.merge(state.params, moved, wrt)
    opt_state = tx_state if wrt is None else {**state.opt_state, wrt: tx_state}
    return state.replace(params=params, opt_state=opt_state), updates


def _merged(control: Control, requests: Control) -> Control:
    """Merges the requests of two successive events. If a callback logs a name twice, the later value is kept."""
    again = {
        name for name, entry in requests.log.items() if name in control.log and control.log[name].owner == entry.owner
    }
    kept = {name: entry for name, entry in control.log.items() if name not in again}
    return control.with_log(kept) | requests
