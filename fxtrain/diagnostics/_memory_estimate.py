"""Estimates the memory of a step without running it."""

from __future__ import annotations

from fxtrain import tree
from fxtrain.compiler import Compiled
from fxtrain.core import Batch, TrainState
from fxtrain.fold import as_composed, attach
from fxtrain.step import Step


def estimated_bytes(step: Compiled | Step, state: TrainState, batch: Batch) -> int | None:
    """Returns how many bytes a step allocates at its peak, or None if it cannot be one graph.

    These are the activations as ``explain`` estimates them, the gradients of all parameters, and the new state. The
    step is traced with fake tensors, which takes no memory.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).relu().square().mean(), tx)
        >>> state = fx.init(torch.nn.Linear(4, 100), tx)
        >>> [round(estimated_bytes(step, state, torch.ones(size, 4)), -5) for size in (1000, 2000)]
        [800000, 1600000]
    """
    # Imported here, because they load the compiler.
    from fxtrain.compiler.lowering._muted_logs import without_torch_messages
    from fxtrain.diagnostics._activations import activations
    from fxtrain.diagnostics._analysis import trace

    pure = step.step if isinstance(step, Compiled) else step
    if not isinstance(pure, Step):
        return None
    state = attach(state, as_composed(pure))
    memory = step.memory if isinstance(step, Compiled) else "save"
    try:
        with without_torch_messages():
            kept = activations(trace(pure, pure.enter(state), batch), memory)
    except Exception:
        # The step cannot be traced, or raises an error of its own, which running it will raise too.
        return None
    new = state.params if isinstance(step, Compiled) and step.donates else (state, state.params)
    return (kept.activation_bytes or 0) + sum(leaf.nbytes for leaf in tree.leaves(new))
