"""The step of supervised training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from fxtrain import optim
from fxtrain.core import (
    TRACED,
    Batch,
    Callback,
    Control,
    Microbatch,
    StepOutput,
    TrainState,
    Tree,
    argument_text,
    check_choice,
    check_positive_int,
    describe,
    name_of,
    public_name,
)
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.equivalents import refuse_foreign, with_known_arguments
from fxtrain.fold import Composed, as_composed, compose
from fxtrain.optim._hyperparams import learning_rates_by_name
from fxtrain.optim._wrappers import steps_per_update
from fxtrain.precision import Policy, dynamic_loss_scale, policy_of
from fxtrain.step._check_function import refuse_unless_loss
from fxtrain.step._differentiate import Differentiate
from fxtrain.step._gradients import gradients
from fxtrain.step._microbatches import averaged, joined, microbatches
from fxtrain.step._step import Step
from fxtrain.step._transform_batch import TransformBatch, seeded_transform
from fxtrain.step._update import check_optimizer_state, merged, update

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh
    from fxtrain.distributed._sharded_step import Placed


@with_short_traceback
@with_known_arguments
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
    mesh: Mesh | None = None,
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
        mesh: The ranks among which each batch is split, from ``fxtrain.distributed.mesh``. The step of each rank takes
            its own examples, as ``fxtrain.distributed.rows`` splits them, and gradients, loss and metrics are averaged
            over ranks before ``Gradients``, as ``fxtrain.distributed.averaged`` describes. All ranks must take the step
            equally often, and begin with the same state. ``accumulate`` must divide the examples of each rank. If a
            callback subscribes to ``Microbatch``, or the state is sharded, the average is taken for each microbatch.
            ``gradients`` describes random samples. The state may be sharded, see ``fxtrain.shard``.

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
    find = gradients(loss_fn, precision=policy, differentiate=differentiate, outputs=outputs, mesh=mesh)
    transform = None if transform_batch is None else seeded_transform(transform_batch, mesh)
    placement = None if mesh is None else _placement(mesh)

    settings = {"accumulate": str(accumulate), "precision": policy.described}
    if unused != "keep":
        settings["unused"] = unused
    if transform_batch is not None:
        settings["transform_batch"] = name_of(transform_batch)
    description = {
        "loss": public_name(loss_fn),
        "optimizer": tx,
        **{name: argument_text(rate.given) for name, rate in learning_rates_by_name(tx).items()},
        "precision": policy.described if isinstance(precision, Policy) else precision or "that of the parameters",
    }

    if (steps := steps_per_update(tx)) != 1:
        description["steps_per_update"] = steps or "variable"

    def build(folded: Composed) -> Step:
        visible = folded.traced_slots
        is_early = Microbatch in folded.table

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
            placed = None if placement is None else placement(state)
            if placed is not None:
                state = placed.opened
            averages_each = placed is not None and (is_early or placed.keeps_parts)
            number = state.step + 1
            before, control, found = state if placed is None else placed.whole, Control(), None
            extra: list[Tree] = []
            if transform is not None:
                slots = {name: slot for name, slot in state.slots.items() if name in visible}
                batch = transform(state.replace(slots=slots), batch, 0)
            for index, microbatch in enumerate(microbatches(batch, accumulate)):
                part = find(before, microbatch, index)
                if placed is not None and averages_each:
                    part = placed.averaged(part)
                before = part.carried(before)
                measured = {"loss": part.loss, "metrics": part.metrics, "grads": part.grads, "weight": part.weight}
                with contextlib.nullcontext() if placed is None else placed.reading():
                    state, requests = folded(state, Microbatch(step=number, index=index, **measured))
                control = merged(control, requests)
                found = part if found is None else joined(found, part)
                extra.append(part.outputs)
            assert found is not None
            found = averaged(found, extra)
            if placed is not None and not averages_each:
                found = placed.averaged(found)
            with contextlib.nullcontext() if placed is None else placed.reading():
                result = update(state, found, tx, folded, control=control, unused=unused)
            return result if placed is None else placed.closed(*result)

        step.__name__ = f"train_step({name_of(loss_fn)})"
        step.__doc__ = loss_fn.__doc__
        return Step(
            step,
            callbacks=folded,
            fires=TRACED,
            rebuild=build,
            settings=settings,
            description=description,
            check_state=functools.partial(check_optimizer_state, tx),
            mesh=mesh,
            takes_shards=mesh is not None,
        )

    return build(folded)


def _placement(mesh: Mesh) -> Callable[[TrainState], Placed]:
    from fxtrain.distributed._sharded_step import Placed  # keeps the import of fxtrain fast

    return functools.partial(Placed, mesh=mesh)
