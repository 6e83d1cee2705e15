"""flax and optax: a linen ``TrainState`` under ``jax.jit`` with donation, with batches on the device or in numpy."""

import functools
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
from flax.training import train_state

from benchmarks.contestants.flax_models import from_torch, losses, model, to_torch
from benchmarks.feed import Feed
from benchmarks.workloads import Workload


class State(train_state.TrainState):
    batch_stats: Any


def device_batches(workload: Workload, feed: Feed) -> dict[str, Any]:
    feed.convert(lambda batch: {name: jax.device_put(value.numpy()) for name, value in batch.items()})
    return _train(workload, feed)


def numpy_batches(workload: Workload, feed: Feed) -> dict[str, Any]:
    feed.convert(lambda batch: {name: value.numpy() for name, value in batch.items()})
    return _train(workload, feed)


def _train(workload: Workload, feed: Feed) -> dict[str, Any]:
    module = workload.module()
    net, loss_of = model(workload.name, module), losses[workload.loss.__name__]
    params, batch_stats = from_torch(module)
    tx = optax.adamw(workload.learning_rate, weight_decay=workload.weight_decay)
    state = State.create(apply_fn=net.apply, params=params, tx=tx, batch_stats=batch_stats)
    # Arrays owned by jax, so that the first step donates like all others and the step compiles only once.
    state = jax.tree.map(jax.numpy.array, state)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Any) -> tuple[State, Any]:
        def loss_fn(params: Any) -> tuple[Any, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            output, changed = state.apply_fn(variables, batch["x"], mutable=["batch_stats"])
            return loss_of(output, batch["y"]), changed

        (loss, changed), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads).replace(**{"batch_stats": {}, **changed}), loss

    feed.sync = lambda: jax.block_until_ready(state)
    for batch in feed:
        state, _ = step(state, batch)
    return to_torch(state.params, state.batch_stats, module)
