"""Several steps in one call, for models so small that dispatch overhead dominates."""

from __future__ import annotations

from collections.abc import Sequence

from fxtrain.core import Batch, StepOutput, TrainState, Tree
from fxtrain.step._step import Step


class ManySteps(Step):
    """A function ``(state, batches) -> (state, outputs)`` that applies a step to each batch in turn.

    Args:
        step: The step.
        count: Number of batches per call.

    Raises:
        ValueError: When it runs, if there are more or fewer batches.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.5)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)
        >>> state, batches = fx.init({"w": torch.tensor(0.0)}, tx), torch.tensor([1.0, 3.0]).unbind()
        >>> state, outputs = ManySteps(step, 2)(state, batches)
        >>> [float(output.metrics["loss"]) for output in outputs], int(state.step)
        ([1.0, 4.0], 2)
    """

    def __init__(self, step: Step, count: int) -> None:
        super().__init__(step.function, callbacks=step.callbacks, fires=step.fires)
        self.step, self.count = step, count

    def __call__(self, state: TrainState, batch: Sequence[Batch]) -> tuple[TrainState, Tree]:
        if len(batch) != self.count:
            raise ValueError(f"expected steps_per_call={self.count} batches, got {len(batch)}.")
        outputs: list[StepOutput] = []
        for each in batch:
            state, output = self.step(state, each)
            outputs.append(output)
        return state, tuple(outputs)

    def __repr__(self) -> str:
        return f"<{self.count} of {self.step!r}>"
