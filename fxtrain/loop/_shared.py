"""The parts of a session that differ between ranks: the agreement, the checkpointer, and the observers of a rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxtrain.core import Observer, TrainState
from fxtrain.core._shard import Shard
from fxtrain.distributed import Mesh
from fxtrain.distributed._sharded_step import refuse_other_mesh
from fxtrain.loop._interrupts import Interrupts
from fxtrain.loop._plan import Plan
from fxtrain.loop._publisher import Publisher
from fxtrain.loop._ranks import Ranks
from fxtrain.loop._shared_checkpointer import SharedCheckpointer


def share(
    plan: Plan, mesh: Mesh, state: TrainState, interrupts: Interrupts
) -> tuple[Ranks, SharedCheckpointer | None, list[Observer]]:
    """Returns the agreement of the ranks, the checkpointer that they share, and the observers of this rank.

    Args:
        plan: The options of the run.
        mesh: The ranks, two or more.
        state: The state of this rank.
        interrupts: The signals of this process.

    Raises:
        ValueError: If the state is that of a batch of runs, or on another device than the mesh.
    """
    if state.step.ndim:
        raise ValueError("expected one run with mesh=, got a batch of runs. Train the batch in one process.")
    if state.step.device.type != mesh.device.type:
        raise ValueError(
            f"expected the state on {mesh.device}, the device of this rank, got {state.step.device}. Make it there: "
            "fxtrain.init(module, tx, device=mesh.device)."
        )
    ranks = Ranks(mesh, interrupts, plan.clock)
    checkpointer = None if plan.checkpointer is None else SharedCheckpointer(plan.checkpointer, ranks)
    return ranks, checkpointer, _observers_of_rank(plan.observers, mesh)


def check_shards(
    shards: Sequence[Shard], mesh: Mesh | None, step: object, eval_step: object, publish: Publisher
) -> None:
    """Raises unless a run can train a sharded state.

    Args:
        shards: The shards of the state.
        mesh: The ranks of the run, if it has any.
        step: The step.
        eval_step: The evaluation step, if there is one.
        publish: The observers.

    Raises:
        ValueError: If the state is sharded over other ranks than those of the run, or if an observer sees the states
            before and after each callback.
        TypeError: If a step does not take sharded states.
    """
    refuse_other_mesh(shards, mesh)
    for name, given in (("step", step), ("eval_step", eval_step)):
        if given is not None and not getattr(getattr(given, "step", given), "takes_shards", False):
            raise TypeError(
                f"expected {name} to take a sharded state, got {given!r}. Make it with fxtrain.{_MAKERS[name]}(..., "
                "mesh=mesh), or train with a replicated state."
            )
    if publish.watches_callbacks:
        raise ValueError(
            "expected observers that do not watch callbacks, such as fxtrain.observers.debug, because the state is "
            "sharded, got one that does. Leave it out, or train with a replicated state."
        )


_MAKERS = {"step": "train_step", "eval_step": "eval_step"}


def _observers_of_rank(observers: Observer | Iterable[Observer], mesh: Mesh) -> list[Observer]:
    """Returns all observers on rank 0, and those made by ``fxtrain.observers.every_rank`` on the others."""
    given = list(observers) if isinstance(observers, Iterable) else [observers]
    return [observer for observer in given if mesh.is_main or getattr(observer, "every_rank", False)]
