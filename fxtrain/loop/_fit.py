"""``fit`` runs training to its end, and ``steps`` yields its events one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NoReturn

from fxtrain.core import Donated, History, StepFn, TrainState, leaf_values, pluralize
from fxtrain.core._field_access import missing_field
from fxtrain.core._html import html_view, view
from fxtrain.core._short_tracebacks import shorten_traceback
from fxtrain.core._slots import MEMBERS
from fxtrain.core._tracebacks import in_notebook
from fxtrain.data import SourceLike
from fxtrain.loop._plan import Plan, with_options, with_progress
from fxtrain.loop._run import Run
from fxtrain.loop._types import EventRecord


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The result of ``fit``.

    Args:
        state: The state to use: the last state, as changed by callbacks at ``FitEnd``, for example with the best
            weights restored. These changes are not saved, and ``fit`` raises if it is given a state with such changes.
        continue_from: The state to continue training from: the last state before ``FitEnd``. Without callbacks that
            change the state there, it is the same object as ``state``.
        reason: Why the run ended.
        history: All scalars published in this session. Those of earlier sessions are in the files of writers.
        exit_code: Exit code for the program: 0, or 128 plus the number of the signal that interrupted the run (130 for
            SIGINT, 143 for SIGTERM).

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
        >>> first = fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, [torch.ones(4, 1)], steps=2)
        >>> fx.fit(first.continue_from, step, [torch.ones(4, 1)], steps=5).reason
        'reached 5 steps'
    """

    state: TrainState
    continue_from: TrainState
    reason: str
    history: History
    exit_code: int = 0

    def __getattr__(self, name: str) -> NoReturn:
        fields = [field.name for field in dataclasses.fields(self)]
        advice = "Curves are in result.history, and the parameters in result.state.params."
        raise missing_field(self, name, fields, lambda: advice)

    def __repr__(self) -> str:
        return f"Result {self._where()}: {self.reason}\n{self.history!r}"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.core._history_view import history_table  # loaded only in notebooks

        note = f"{self.reason}; {pluralize(len(self.history), 'curve')}"
        return view(f"Result {self._where()}", history_table(self.history), note=note)

    def _where(self) -> str:
        if isinstance(self.state, Donated):
            return "whose state was donated"
        return f"at step {leaf_values([self.state.step])[0] or 'of several runs'}"


@with_options(Plan)
def fit(state: TrainState, step: StepFn, data: SourceLike, plan: Plan) -> Result:
    """Trains until a limit is reached, a callback requests a stop, or a signal interrupts the run.

    The run works on a copy, so ``state`` itself is not modified.

    SIGINT, SIGTERM and SIGUSR1 end the run with a final checkpoint, at the latest after the current step. A
    compilation, an evaluation or a wait for data is aborted, and repeated when the run is resumed. A second SIGINT ends
    the process, even during a save. The process should then exit with ``result.exit_code``. If it calls ``fit`` again
    after SIGTERM or SIGUSR1 instead, ``fit`` raises SystemExit with that code. There are two exceptions: after SIGINT
    the next ``fit`` trains, as notebooks need, and a SIGTERM handler installed by the program is called instead, once
    the interrupted run is saved.

    Besides the metrics of the step and the callbacks, a run publishes ``compile/graphs`` and ``compile/seconds`` at its
    end if the step is compiled, with ``compile/pending`` and ``compile/uncompiled_steps`` if it is compiled in the
    background. At the end of each epoch it publishes ``data/padding``, the fraction of padding in the batches, if the
    data source counts it.

    The traceback of an error shows the user's lines alone. With the environment variable ``FXTRAIN_TRACEBACK=full``, it
    shows the frames of fxtrain and torch too.

    Args:
        state: From ``init``, or ``continue_from`` of another result.
        step: From ``train_step``, compiled or not, or any pure function ``(state, batch) -> (state, output)``.
        data: A source of batches: from ``fxtrain.data``, a ``DataLoader``, a list, or any iterable.
        callbacks: Folded over the state at each event, in order. Those on ``Microbatch``, ``Gradients`` and ``Updated``
            are folded inside the step, after its own. Those given to the step are folded here too, before the others.
            A callback object given to both is folded once. A compiled step compiles once for the same callback objects.
        eval_step: From ``fxtrain.eval_step``.
        eval_data: A source of batches, as ``data``. Each evaluation takes one epoch of it.
        eval_when: A number of steps, or a trigger, evaluated at each ``StepEnd``. By default each epoch and the run end
            with an evaluation.
        eval_view: Maps the state to the state to evaluate, such as ``fxtrain.callbacks.averaged``. It affects neither
            training nor saves.
        epochs: Total number of epochs, those before a resume included. Epochs may differ in length, for example after a
            change of the batch size, but a started epoch keeps its length.
        steps: Total number of steps, those before a resume included. If both limits are given, the first one reached
            ends the run.
        observers: Functions ``(state, event, control)``, called after the fold of each event.
        progress: Whether to add ``fxtrain.observers.progress()`` to the observers, unless they show progress already.
            By default ``fit`` does so in a notebook, and nowhere else.
        checkpointer: From ``fxtrain.checkpointer``. Without one, nothing is saved.
        resume: Whether to continue from the latest checkpoint, if there is one. Callbacks that were not part of the run
            are initialized from that state. Without ``resume``, a folder with checkpoints of another run is an error.
        snapshot_every: Retain a snapshot of the state at steps that are multiples of this, to rewind to. Checkpoints
            include the retained snapshots, so a resumed run rewinds to the same step as an uninterrupted one.
        snapshots: Number of snapshots to retain, the newest ones.
        snapshots_on_host: Whether to retain snapshots in host memory instead of on the device. Each copy synchronizes
            with the device.
        rewind_limit: Stop the run if it rewinds to the same step more often than this.
        lag: After how many steps stop flags on the device are read: 0 or 1. The default is 0 on a CPU and 1 on an
            accelerator, where an immediate read would stall the device. Both give the same result, because a stopped
            state is a fixed point of the step.
        clock: Returns the time in seconds. All times in events are taken from it.
        mesh: The ranks of the run, from ``fxtrain.distributed.mesh``, as given to ``train_step`` and ``eval_step``.
            Each rank reads its rows of each batch, so batch sizes and positions are those of all ranks together.
            Callbacks run on all ranks and see the same values. Observers run on rank 0, except for those of
            ``fxtrain.observers.every_rank``. A signal on any rank, the clock of rank 0, errors and finished saves are
            agreed on before each step, so all ranks stop, save, evaluate and rewind at the same step. Compilations and
            waits for data are not aborted by a signal. Rank 0 writes one whole checkpoint, which all ranks read, and
            which any number of ranks can resume. ``StepEnd.time`` is read before the step, and ``StepEnd.duration`` is
            that of the step before, except after the first step.
        run: The name, tags, configuration and other facts of the run, for ``FitBegin.run``, the summary, ``record_run``
            and all writers. They do not affect training.

    Raises:
        TypeError: If an argument has the wrong type. The message says how to make it.
        ValueError: If there is no limit, only one of ``eval_step`` and ``eval_data``, a callback on an event that never
            fires, a state inside an epoch that has another length in this data, or a state that callbacks changed at
            ``FitEnd``.
        CheckpointError: If the folder has checkpoints of another run, or cannot be written to.
        SystemExit: If SIGTERM or SIGUSR1 ended an earlier run in this process.
        FailedRankError: With ``mesh``, if another rank has failed. The message has its error.
        LostRankError: With ``mesh``, if another rank does not join a collective within the timeout of the mesh.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
        >>> result = fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, [torch.ones(4, 1)], steps=100)
        >>> result.reason, bool(result.history["train/loss"].values[-1] < 1e-6)
        ('reached 100 steps', True)
    """
    run = Run(state, step, data, with_progress(plan, by_default=in_notebook()))
    for _ in run.events():
        pass
    state, continue_from = run.now.state, run.continue_from
    if MEMBERS in state.slots:
        from fxtrain.loop._members import stacked_results  # keeps the import of fxtrain fast

        state, continue_from = stacked_results(state, continue_from)
    return Result(state, continue_from, run.reason, run.history, run.exit_code)


@with_options(Plan)
def steps(state: TrainState, step: StepFn, data: SourceLike, plan: Plan) -> Iterator[EventRecord]:
    """Runs the loop of ``fit`` as a generator of ``(state, event, control)``, one for each event.

    The keyword arguments are those of ``fit``, without progress in a notebook by default. Leaving the generator early
    ends the run without a final save. A yielded state is borrowed, because the next step may donate it. Keep one with
    ``state.copy()``.

    A run that continues such a copy takes the same steps bitwise. Only the sums of ``EpochEnd.metrics``, which the loop
    keeps on the host, are not in it: if it was copied within an epoch, the means of that epoch are those of the steps
    since. Checkpoints, ``Result.continue_from`` and the state of ``FitEnd`` include the sums.

    Args:
        state: As for ``fit``.
        step: As for ``fit``.
        data: As for ``fit``.

    Yields:
        The state after the fold of the event, the event, and the requests made at it.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
        >>> state = fx.init(torch.nn.Linear(1, 1), tx)
        >>> for state, event, control in fx.steps(state, step, [torch.ones(4, 1)], epochs=1):
        ...     print(type(event).__name__, end=" ")
        FitBegin EpochBegin StepBegin StepEnd EpochEnd FitEnd
    """
    return _with_short_tracebacks(Run(state, step, data, with_progress(plan, by_default=False), every_event=True))


def _with_short_tracebacks(run: Run) -> Iterator[EventRecord]:
    try:
        yield from run.events()
    except Exception as error:
        shorten_traceback(error)
        raise
