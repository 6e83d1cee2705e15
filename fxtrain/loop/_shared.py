"""The parts of a session that differ between ranks: the agreement, the checkpointer, and the observers of a rank."""

from __future__ import annotations

from collections.abc import Iterable

from fxtrain.core import Observer, TrainState
from fxtrain.distributed import Mesh
from fxtrain.loop._interrupts import Interrupts
from fxtrain.loop._plan import Plan
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


def _observers_of_rank(observers: Observer | Iterable[Observer], mesh: Mesh) -> list[Observer]:
    """Returns all observers on rank 0, and those made by ``fxtrain.observers.every_rank`` on the others."""
    given = list(observers) if isinstance(observers, Iterable) else [observers]
    return [observer for observer in given if mesh.is_main or getattr(observer, "every_rank", False)]
