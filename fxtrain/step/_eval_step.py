"""Evaluation steps: pure functions that compute metrics of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fxtrain import rng
from fxtrain.core import Batch, StepOutput, TrainState, name_of
from fxtrain.core._shard import holds_shards, refuse_shards
from fxtrain.core._short_tracebacks import shorten_traceback, with_short_traceback
from fxtrain.core._state import refuse_stacked
from fxtrain.data import for_step
from fxtrain.equivalents import with_known_arguments
from fxtrain.precision import Policy, policy_of
from fxtrain.step._check_function import refuse_unless_loss
from fxtrain.step._forward_pass import forward
from fxtrain.step._loss_results import measured, without_outputs
from fxtrain.step._step import on_device
from fxtrain.step._transform_batch import TransformBatch, seeded_transform

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh


class EvalFunction:
    """A pure function ``(state, batch) -> output`` that computes metrics. Made by ``eval_step``.

    Args:
        function: Any pure function with this signature.
        mesh: The ranks over which it averages, from ``fxtrain.distributed.mesh``.
        takes_shards: Whether the function takes sharded states, as that of ``eval_step`` with a mesh does.

    Example:
        >>> import torch, fxtrain as fx
        >>> norm = EvalFunction(lambda state, batch: fx.StepOutput({"norm": state.params["w"].norm()}))
        >>> norm(fx.init({"w": torch.tensor([3.0, 4.0])}), batch=None).metrics
        {'norm': tensor(5.)}
    """

    callbacks: tuple[()] = ()  # an evaluation folds none
    enters: frozenset[str] = frozenset()  # the slots that enter the compiled graph

    def __init__(
        self,
        function: Callable[[TrainState, Batch], StepOutput],
        *,
        mesh: Mesh | None = None,
        takes_shards: bool = False,
    ) -> None:
        self.function, self.mesh, self.takes_shards = function, mesh, takes_shards
        self._of_members: EvalFunction | None = None
        functools.update_wrapper(self, function, updated=())

    def __call__(self, state: TrainState, batch: Batch) -> StepOutput:
        try:
            if not torch.compiler.is_dynamo_compiling() and not self.takes_shards:
                refuse_shards(getattr(state, "params", None), "an evaluation step without a mesh")
            output = self.function(state, for_step(batch))
            control = on_device(output.control, state.step.device)
            return StepOutput(output.metrics, control, output.outputs, output.weight)
        except Exception as error:
            if not torch.compiler.is_dynamo_compiling():
                shorten_traceback(error)
            raise

    def enter(self, state: TrainState) -> TrainState:
        """Returns the part of the state that enters the compiled graph, without optimizer state and most slots."""
        return state.replace(opt_state={}, slots={name: state.slots[name] for name in self.enters})

    def over_members(self) -> EvalFunction:
        """Returns the evaluation step of a batch of runs. The same object is returned each time."""
        if self._of_members is None:
            from fxtrain.step._members import MembersEval  # keeps the import of fxtrain fast

            self._of_members = MembersEval(self)
        return self._of_members

    def __repr__(self) -> str:
        return f"<{name_of(self.function)}>"


@with_short_traceback
@with_known_arguments
def eval_step(
    measure: Callable[..., object],
    *,
    precision: str | Policy | None = None,
    outputs: bool = False,
    transform_batch: TransformBatch | None = None,
    mesh: Mesh | None = None,
) -> EvalFunction:
    """Returns a function ``(state, batch) -> StepOutput`` that evaluates the model in eval mode.

    Args:
        measure: Maps ``(model, batch)`` to any result that ``gradients`` accepts, such as a loss, or to a dict of
            metrics without a loss. 0-d tensors are averaged over batches, by the weight from ``fxtrain.weighted`` or
            else by the batch size, see ``fxtrain.evaluate``. ``fxtrain.metrics`` are merged.
        precision: ``"bf16"``, ``"fp16"``, or an ``fxtrain.Policy``.
        outputs: Whether ``measure`` returns a pair of such a result and any other value, which callbacks receive at
            ``EvalStep``.
        transform_batch: ``(state, batch) -> batch``, a pure function that runs before ``measure``, as in
            ``train_step``. The state has no optimizer state and no slots.
        mesh: The ranks among which each batch is split, from ``fxtrain.distributed.mesh``. The metrics are then those
            of the examples of all ranks, and metrics that grow with the data are refused. Outputs stay those of the
            rank.

    Returns:
        A pure function, which ``fxtrain.compile`` compiles like a step.

    Raises:
        TypeError: If ``measure`` does not take a model and a batch, or ``transform_batch`` a state and a batch. When it
            runs, if one of them returns anything else.

    Example:
        >>> import torch, fxtrain as fx
        >>> step = fx.eval_step(lambda model, batch: {"mean": model(batch).mean()})
        >>> state = fx.init(torch.nn.Dropout())
        >>> step(state, torch.ones(2, 2)).metrics
        {'mean': tensor(1.)}
    """
    refuse_unless_loss(measure, "measure")
    policy = policy_of(precision)
    transform = None if transform_batch is None else seeded_transform(transform_batch, mesh)

    def step(state: TrainState, batch: Batch) -> StepOutput:
        refuse_stacked(state, "eval_step(measure)(state, batch)")
        if mesh is not None and not torch.compiler.is_dynamo_compiling() and holds_shards(state.params):
            from fxtrain.distributed._sharded_step import gathered_params

            state = gathered_params(state, mesh)
        if transform is not None:
            # Index 0 is that of training steps.
            batch = transform(state.replace(opt_state={}, slots={}), batch, state.position + 1)
        key = rng.key(state.seed, stream=rng.Stream.EVAL, step=state.step, microbatch=state.position)
        if mesh is not None:
            from fxtrain.distributed._examples import on_rank

            key = on_rank(key, mesh, batch)
        result = forward(policy, state, measure, batch, train=False, key=key, mesh=mesh).output
        extra = None
        if outputs:
            result, extra = without_outputs(measure, result, "metrics")
        metrics, weight = measured(measure, result)
        metrics = policy.cast_output(metrics)
        if mesh is not None:
            from fxtrain.distributed._averaged import averaged_metrics

            metrics, weight = averaged_metrics(metrics, weight, batch, mesh, state.step.device)
        return StepOutput(metrics, outputs=extra, weight=weight)

    step.__name__ = f"eval_step({name_of(measure)})"
    step.__doc__ = measure.__doc__
    return EvalFunction(step, mesh=mesh, takes_shards=mesh is not None)
