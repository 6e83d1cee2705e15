"""The arguments that all methods of transformers' callbacks take: the model, the optimizer and the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fxtrain.core import LoopEvent, TrainState
from fxtrain.interop._hf_gradients import BeforeUpdate
from fxtrain.interop._hf_model import ShownModule
from fxtrain.interop._hf_stand_ins import DataView, OptimizerView, SchedulerView
from fxtrain.optim import get_hyperparams, set_hyperparams

_UPDATED = "The update is made already. Change gradients with a transformation of fxtrain.optim."
_SESSION = (
    "How often this event fires depends on interruptions. Write in a method that belongs to training, such as "
    "on_step_end."
)


class SharedArguments:
    """The arguments of all methods. They show the state of the current event.

    Args:
        given: The values given to ``hf``. Data that was not given has a length only.

    Attributes:
        state: The state of the current event, with the writes of callbacks.
        published: The values logged at the last step, such as the learning rates, by the names that writers see.
        named: The arguments by name.
        train_data: Stands in for the training data.
        eval_data: Stands in for the evaluation data.
    """

    def __init__(self, given: Mapping[str, object]) -> None:
        self.train_data, self.eval_data = DataView("train_dataloader"), DataView("eval_dataloader")
        stand_ins = {"train_dataloader": self.train_data, "eval_dataloader": self.eval_data}
        self._given = {name: stand_ins.get(name) if value is None else value for name, value in given.items()}
        self.named: dict[str, object] = {}
        self.published: Mapping[str, Any] = {}
        self._shown: ShownModule | None = None
        self._refusal: str | None = None

    @contextlib.contextmanager
    def showing(self, state: TrainState, event: LoopEvent | None, *, is_writable: bool) -> Iterator[None]:
        """Shows a state. Inside, ``state`` is this state with the writes of callbacks.

        Args:
            state: The state of the event.
            event: The event.
            is_writable: Whether callbacks may change the state now.
        """
        self.state, self._refusal = state, None if is_writable else _SESSION
        if event is not None:
            self.train_data.length = event.epoch_length
        self._is_filled = False
        try:
            yield
        finally:
            if self._is_filled and self._shown is not None:
                self._shown.hide()
            del self.state  # a step copies a state that something else references

    @contextlib.contextmanager
    def watching(self, who: str) -> Iterator[None]:
        """Applies the writes of a method, which is called inside this context, to ``state``.

        Args:
            who: The callback and its method, for errors.
        """
        shown = self._filled()
        with shown.watch(who, refuse=self._refusal) as writes:
            yield
        if writes.values:
            self.state = self.state.replace(
                params={**self.state.params, **{k: v for k, v in writes.values.items() if k in self.state.params}},
                buffers={**self.state.buffers, **{k: v for k, v in writes.values.items() if k in self.state.buffers}},
            )
            self._fill(shown, self.state.params)

    def show_before_update(self, kept: BeforeUpdate) -> None:
        """Shows the parameters and gradients of before the last update."""
        self._refusal = _UPDATED
        self._fill(self._filled(), {**self.state.params, **kept.params}, kept.grads)

    def show_after_update(self, kept: BeforeUpdate) -> None:
        """Shows the state with the gradients of the last update."""
        self._refusal = None
        self._fill(self._filled(), self.state.params, kept.grads)

    def show_state(self) -> None:
        """Shows the state without gradients."""
        self._fill(self._filled(), self.state.params)

    def _filled(self) -> ShownModule:
        shown = self._shown
        if shown is None or not shown.fits(self.state):
            shown = self._shown = ShownModule(self.state)
            self.named = {"model": shown.module, **self._given, **self._optimizer(shown.module)}
        if not self._is_filled:
            self._fill(shown, self.state.params)
        return shown

    def _fill(
        self, shown: ShownModule, params: Mapping[str, Tensor], grads: Mapping[str, Tensor] | None = None
    ) -> None:
        shown.show(params, self.state.buffers, grads)
        self._is_filled = True

    def _optimizer(self, module: nn.Module) -> dict[str, object]:
        def rates() -> dict[str, float]:
            prefix = "train/learning_rate"
            found = {k[len(prefix) + 1 :]: float(v) for k, v in self.published.items() if k.startswith(prefix)}
            injected = get_hyperparams(self.state.opt_state).get("learning_rate")
            return found if injected is None else {"": float(injected)}

        def write(name: str, value: float) -> None:
            if self._refusal is not None:
                raise RuntimeError(f"expected the optimizer to be left as it is, got another {name}. {self._refusal}")
            self.state = self.state.replace(opt_state=set_hyperparams(self.state.opt_state, **{name: value}))

        return {"optimizer": OptimizerView(module, rates, write), "lr_scheduler": SchedulerView(rates)}
