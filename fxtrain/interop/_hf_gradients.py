"""Copies gradients and parameters of before the update to a slot, for methods that run before the optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Control, Gradients, Microbatch, TrainState, Tree
from fxtrain.fold import Handler, slotted
from fxtrain.model._model import model_of


class BeforeUpdate(NamedTuple):
    """The trainable parameters before the last update, and their gradients."""

    microbatches: Tensor  # int64 []: microbatches of the step
    params: dict[str, Tensor]
    grads: dict[str, Tensor]  # averaged, before clipping


def keep_before_update(slot: str) -> Handler:
    """Returns a traced callback that fills the slot, which holds a ``BeforeUpdate``, at each step."""

    def init(state: TrainState) -> Tree:
        params = _tensors(model_of(state).split(state.params))
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return BeforeUpdate(torch.ones_like(state.step), tree.clone(params), zeros)

    def keep(state: TrainState, event: Microbatch | Gradients) -> tuple[TrainState, Control]:
        kept: BeforeUpdate = state.slots[slot]
        if isinstance(event, Microbatch):
            kept = kept._replace(microbatches=torch.full_like(kept.microbatches, event.index + 1))
        else:
            grads = _tensors(event.grads)
            # Cloned, because no two leaves of a state may share storage.
            kept = kept._replace(
                params=tree.clone({name: state.params[name] for name in grads}), grads=tree.clone(grads)
            )
        return state.with_slot(slot, kept), Control()

    return slotted(slot, init, keep)


def _tensors(values: Tree) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
