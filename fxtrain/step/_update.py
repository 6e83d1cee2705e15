"""The second part of a step: the update of the parameters by an optimizer, between two events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fxtrain import optim, tree
from fxtrain.core import Callback, Control, Gradients, StepOutput, TrainState, Tree, Updated, describe, first_names
from fxtrain.core._shard import Shard, holds_shards, is_shard, refuse_shards
from fxtrain.fold import as_composed
from fxtrain.model import model_of
from fxtrain.model._model import models_of
from fxtrain.optim._partial_update import accumulates
from fxtrain.optim._transform import refuse_unless_transformation
from fxtrain.step._gradients import Gradient


def update(
    state: TrainState,
    found: Gradient,
    tx: optim.GradientTransformation,
    callbacks: Callback | Iterable[Callback] = (),
    *,
    wrt: str | None = None,
    control: Control | None = None,
    unused: Literal["keep", "zero"] = "keep",
) -> tuple[TrainState, StepOutput]:
    """Fires ``Gradients``, updates the state unless a callback skips it, and fires ``Updated``.

    The second part of a step, for hand-written ones. With ``wrt``, the events name the model, and a skipped update
    keeps that model only.

    Args:
        state: The state with which ``found`` was computed.
        found: The result of ``gradients``.
        tx: The transformation given to ``init``. With ``wrt``, that of the entry.
        callbacks: Callbacks to fold.
        wrt: Key of a dict of modules, as given to ``gradients``.
        control: Requests made earlier in the step, such as the control of the model before.
        unused: As for ``train_step``.

    Returns:
        The new state, and the output with the metrics of ``found``, the learning rates, and all requests so far.

    Raises:
        TypeError: If ``found`` is not the result of ``gradients``, or as for ``apply_gradients``.
        ValueError: As for ``apply_gradients``.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = {"generator": fx.optim.adam(1e-3), "discriminator": fx.optim.adam(1e-3)}
        >>> def real_or_made(model, batch):
        ...     made = model["generator"](torch.randn(len(batch), 2))
        ...     return model["discriminator"](made).mean() - model["discriminator"](batch).mean()
        >>> descend = fx.gradients(real_or_made, wrt="discriminator")
        >>> ascend = fx.gradients(lambda model, batch: -real_or_made(model, batch), wrt="generator")
        >>> def build(callbacks):
        ...     def gan(state, batch):
        ...         found = descend(state, batch)
        ...         state, first = fx.step.update(state, found, tx["discriminator"], callbacks, wrt="discriminator")
        ...         found = ascend(state, batch, 1)
        ...         return fx.step.update(
        ...             state, found, tx["generator"], callbacks, wrt="generator", control=first.control
        ...         )
        ...     return fx.Step(gan, callbacks=callbacks, fires=[fx.Gradients, fx.Updated], rebuild=build)
        >>> state = fx.init({"generator": torch.nn.Linear(2, 2), "discriminator": torch.nn.Linear(2, 1)}, tx)
        >>> monitor = fx.callbacks.grad_norms()
        >>> result = fx.fit(state, build(fx.compose()), [torch.ones(4, 2)], steps=1, callbacks=monitor)
        >>> [name for name in result.history if name.endswith("total")]
        ['grad_norm/discriminator/total', 'grad_norm/generator/total']
    """
    if not isinstance(found, Gradient):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"update: expected the result of fxtrain.gradients, got {describe(found)}. Call update(state, found, tx) "
            "with found = fxtrain.gradients(loss_fn)(state, batch)."
        )
    _check_transformation(state, tx, wrt)
    folded, number = as_composed(callbacks), state.step + 1
    measured = {"loss": found.loss, "metrics": found.metrics, "grads": found.grads, "weight": found.weight}
    measured["model"] = wrt
    state, requests = folded(state, Gradients(step=number, **measured))
    control = merged(Control() if control is None else control, requests)

    carried = found.carried(state)
    used = found.used if unused == "keep" else None
    moved, updates = apply_gradients(carried, found.grads, tx, wrt=wrt, used=used)
    before = carried if wrt is None else carried.replace(opt_state=carried.opt_state[wrt])
    # The metrics of the loss function come first, and win if a name occurs twice.
    metrics = {**found.metrics, **optim.learning_rates(tx, before), **found.metrics}
    measured["metrics"] = metrics
    skip = requests.any("skip_update") if wrt is not None else control.any("skip_update")
    # Not torch.tensor(...), which would become an input of the graph even if it is unused.
    skipped = skip if isinstance(skip, Tensor) else torch.full_like(number, skip, dtype=torch.bool)
    state = moved if skip is False else tree.where(skipped, state, moved)
    state, requests = folded(state, Updated(step=number, updates=updates, skipped=skipped, **measured))
    return state, StepOutput(metrics, merged(control, requests), found.outputs, found.weight)


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

    Raises:
        TypeError: If ``state`` is not a TrainState, or ``tx`` is not a transformation.
        ValueError: If the state has an optimizer for each of several models, and ``wrt`` names none of them.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = {"a": fx.optim.sgd(0.1), "b": fx.optim.adam(0.1)}
        >>> state = fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, tx)
        >>> found = fx.gradients(lambda model, batch: model["a"] * model["b"], wrt="a")(state, None)
        >>> state, updates = fx.step.apply_gradients(state, found.grads, tx["a"], wrt="a")
        >>> float(updates), float(state.params["a"])
        (-0.10000000149011612, 0.8999999761581421)
    """
    _check_transformation(state, tx, wrt)
    if not torch.compiler.is_dynamo_compiling() and holds_shards(state.params):
        refuse_shards(state.params, "apply_gradients(state, grads, tx)")
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


def _check_transformation(state: TrainState, tx: optim.GradientTransformation, wrt: str | None) -> None:
    """Raises unless ``state`` is a state, and ``tx`` a transformation for its only model or that of ``wrt``."""
    if not isinstance(state, TrainState):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected a TrainState as the first argument, got {describe(state)}. Create it with fxtrain.init."
        )
    if isinstance(tx, Mapping):
        names = list(map(str, tx))
        name = wrt or "..."
        raise TypeError(
            f"expected tx to be one gradient transformation, got a dict with the keys {first_names(names, 8)}. "
            f"Update one model at a time: give tx[{name!r}], and wrt={name!r}."
        )
    refuse_unless_transformation("tx", tx)
    models = models_of(state)
    if models and wrt not in models:
        raise ValueError(
            f"expected wrt to be one of {first_names(models, 8)}, because each has its own optimizer, got {wrt!r}. "
            "Give the same wrt= to fxtrain.gradients and to update."
        )


def check_optimizer_state(tx: optim.GradientTransformation, state: TrainState) -> None:
    """Raises if the optimizer state is that of another transformation.

    Only the paths are compared, because the shapes may be those of a shard.

    Args:
        tx: The transformation of the step.
        state: The state to train.

    Raises:
        ValueError: The message names the transformation and the first path that differs.
    """
    if models_of(state):  # each has its own optimizer, which the update checks
        return
    expected: Tree = None
    with contextlib.suppress(Exception):  # an init that reads values, which the meta device does not have
        trainable = model_of(state).split(state.params, None)
        expected = tx.init(tree.map(_on_meta, trainable, is_leaf=is_shard))
    if expected is None:
        return
    both = (state.opt_state, expected)
    found, wanted = (dict.fromkeys(tree.paths(part, "state.opt_state", is_leaf=is_shard)) for part in both)
    missing, extra = [path for path in wanted if path not in found], [path for path in found if path not in wanted]
    if missing or extra:
        path, *others = missing or extra
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"expected the optimizer state of {tx}, got one {'without' if missing else 'with'} {path}{more}. Give the "
            "same tx to fxtrain.init and to fxtrain.train_step."
        )


def _on_meta(leaf: Tensor | Shard) -> Tensor:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if is_shard(leaf) else leaf.to("meta")


def merged(control: Control, requests: Control) -> Control:
    """Returns the requests of two successive events. If a callback logs a name twice, the later value is kept."""
    again = {
        name for name, entry in requests.log.items() if name in control.log and control.log[name].owner == entry.owner
    }
    kept = {name: entry for name, entry in control.log.items() if name not in again}
    return control.with_log(kept) | requests
