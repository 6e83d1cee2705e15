"""Fit: a whole run, as a function of what it begins with."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fxtrain.core import Control, StepEnd, TrainState, check_choice, check_int, check_positive_int
from fxtrain.fold import Handler, as_composed, compose, on
from fxtrain.loop._arguments import refuse_unless_checkpointer, refuse_unless_evaluates
from fxtrain.loop._emitter import Moment
from fxtrain.loop._history import History
from fxtrain.loop._plan import Plan
from fxtrain.loop._run import Run


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``fit`` returns.

    Args:
        state: The harvest: the last state, with what callbacks did to it at ``FitEnd`` (the best weights put
            back, say). It was never saved.
        last: The state that continues the run.
        reason: Why the run ended, in words.
        history: Every number that was published.
        exit_code: What a program should exit with: 0, or 128 and the number of the signal that interrupted the run
            (130 for SIGINT, 143 for SIGTERM).
    """

    state: TrainState
    last: TrainState
    reason: str
    history: History
    exit_code: int = 0

    def __repr__(self) -> str:
        return f"Result at step {int(self.last.step)}: {self.reason}\n{self.history!r}"


def fit(
    state: TrainState,
    step: Callable[..., Any],
    data: Any,
    *,
    callbacks: Any = (),
    eval_step: Callable[..., Any] | None = None,
    eval_data: Any = None,
    eval_when: Callable[[Any], Any] | None = None,
    eval_view: Callable[[TrainState], TrainState] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    observers: Iterable[Callable[..., None]] = (),
    checkpointer: Any = None,
    resume: bool = False,
    keep_every: int | None = None,
    keep: int = 2,
    keep_on_host: bool = False,
    rewind_limit: int = 3,
    lag: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Trains until a limit is reached, a callback asks to stop, or a signal interrupts.

    ``state`` itself is left as it was: the run works on a copy.

    SIGINT, SIGTERM and SIGUSR1 end the run where the state is whole, with a last checkpoint: after the step under way
    at the latest. A compilation, an evaluation or a wait for data is left immediately, and is repeated when the run is
    resumed. A second SIGINT ends the process, even while a checkpoint is written. ``result.exit_code`` is what the
    process should then exit with. If it does not exit, the next ``fit`` after SIGTERM or SIGUSR1 raises SystemExit
    with that code. Two cases differ: after SIGINT the next ``fit`` trains, as in a notebook; and a SIGTERM handler
    that the program has installed is called in place of SystemExit, when the interrupted run is saved.

    Beside what the step and callbacks measure, a run publishes ``compile/graphs`` and ``compile/seconds`` at its end if
    the step is compiled, with ``compile/pending`` and ``compile/uncompiled_steps`` if that happens in the background.
    It publishes ``data/padding`` at the end of each epoch if the data source counts its padding: the share of positions
    in the batches of that epoch that hold no part of an example.

    Args:
        state: From ``init``, or the ``last`` of another result.
        step: From ``train_step``, compiled or not; or any pure function ``(state, batch) -> (state, output)``.
        data: A source of batches: from ``fxtrain.data``, a ``DataLoader``, a list, or any iterable.
        callbacks: Folded over after each event, in their order.
        eval_step: From ``fxtrain.eval_step``.
        eval_data: As ``data``; an evaluation takes one epoch of it.
        eval_when: A trigger, asked at each ``StepEnd``. By default each epoch ends with an evaluation, and so does
            the run.
        eval_view: From the state to the one that is evaluated in its place, ``fxtrain.callbacks.averaged`` say. What
            trains, and what is saved, stays what it is.
        epochs: How many epochs the run is to have in all, those before a resume included. Each may have another number
            of batches, as with another batch size, but none changes its length once it has begun.
        steps: How many steps the run is to have in all. With both, what comes first ends it.
        observers: What sees each event after the fold.
        checkpointer: From ``fxtrain.checkpointer``. Without one nothing is saved.
        resume: Whether to continue from the checkpointer's latest state, if there is one. Callbacks that were not part
            of the run start from that state. Without it, a folder with checkpoints of another run is an error.
        keep_every: Retain a snapshot of the state in memory every so many steps, to rewind to. Each checkpoint is saved
            with the snapshots retained then, so a resumed run rewinds to where the uninterrupted one would have.
        keep: How many of them, the newest.
        keep_on_host: Whether to retain them in host memory, which an accelerator waits for, and not on the device.
        rewind_limit: Going back to one step more often than this stops the run.
        lag: After how many steps the device's requests to stop are read: 0 or 1. By default 0 on a CPU and 1 on an
            accelerator, where reading at once would stall it. A stopped state is a fixed point of the step, so the
            result is the same.
        clock: Seconds; every time that callbacks see comes from it.

    Raises:
        TypeError: If an argument is not what its name says: the message says how to make it.
        ValueError: If no limit is given, evaluation is half given, a callback subscribes to what never fires, or the
            state is inside an epoch of another length than the data's.
        CheckpointError: If the folder has checkpoints of another run, or cannot be written to.
        SystemExit: If SIGTERM or SIGUSR1 has ended an earlier run in this process.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
        >>> result = fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, [torch.ones(4, 1)], steps=100)
        >>> result.reason, bool(result.history["train/loss"].values[-1] < 1e-6)
        ('reached 100 steps', True)
    """
    history = History()
    plan = _plan(
        callbacks=callbacks,
        eval_step=eval_step,
        eval_data=eval_data,
        eval_when=eval_when,
        eval_view=eval_view,
        epochs=epochs,
        steps=steps,
        observers=observers,
        checkpointer=checkpointer,
        resume=resume,
        keep_every=keep_every,
        keep=keep,
        keep_on_host=keep_on_host,
        rewind_limit=rewind_limit,
        lag=lag,
        clock=clock,
        every_event=False,
    )
    run = Run(state, step, data, plan, history)
    for _ in run.moments():
        pass
    return Result(run.state, run.last, run.reason, history, run.exit_code)


def steps(state: TrainState, step: Callable[..., Any], data: Any, **options: Any) -> Iterator[Moment]:
    """The run of ``fit``, driven by hand: a generator of ``(state, event, control)``, one for each event.

    Leaving it early ends the run without a last save. A yielded state is borrowed: ``state.copy()`` keeps one.

    Args:
        state: As for ``fit``, and so are ``step`` and ``data``.
        options: The keyword arguments of ``fit``.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
        >>> state = fx.init(torch.nn.Linear(1, 1), tx)
        >>> for state, event, control in fx.steps(state, step, [torch.ones(4, 1)], epochs=1):
        ...     print(type(event).__name__, end=" ")
        FitBegin EpochBegin StepBegin StepEnd EpochEnd FitEnd
    """
    arguments = inspect.signature(fit).bind(state, step, data, **options)
    arguments.apply_defaults()
    options = {name: value for name, value in arguments.arguments.items() if name not in ("state", "step", "data")}
    return Run(state, step, data, _plan(**options, every_event=True), History()).moments()


def _plan(
    *,
    callbacks: Any,
    eval_step: Any,
    eval_data: Any,
    eval_when: Any,
    eval_view: Any,
    epochs: int | None,
    steps: int | None,
    observers: Any,
    checkpointer: Any,
    resume: bool,
    keep_every: int | None,
    keep: int,
    rewind_limit: int,
    lag: int | None,
    **others: Any,
) -> Plan:
    if epochs is None and steps is None:
        raise ValueError("How long? Give epochs=, steps= or both.")
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None:
            check_int(name, value, minimum=0)
    if keep_every is not None:
        check_positive_int("keep_every", keep_every)
    check_positive_int("keep", keep)
    check_int("rewind_limit", rewind_limit, minimum=0)
    check_choice("lag", lag, (None, 0, 1))
    if (eval_step is None) != (eval_data is None):
        missing = "eval_data" if eval_data is None else "eval_step"
        raise ValueError(f"Evaluation needs eval_step and eval_data, and {missing} is missing.")
    for name, value in (("eval_when", eval_when), ("eval_view", eval_view)):
        if value is not None and eval_step is None:
            raise ValueError(f"{name} says how to evaluate, and there is no eval_step and eval_data to do it with.")
    if eval_step is not None:
        refuse_unless_evaluates(eval_step)
    if eval_when is not None and not callable(eval_when):
        raise TypeError(
            f"expected a trigger as eval_when, got {eval_when!r:.60}. Make one: fxtrain.every(100), or "
            "fxtrain.every(epochs=1)."
        )
    refuse_unless_checkpointer(checkpointer)
    check_choice("resume", resume, (True, False))
    if resume and checkpointer is None:
        raise ValueError("resume=True goes on from a checkpoint, and no checkpointer is given.")
    if not isinstance(observers, Iterable):
        observers = (observers,)
    folded = as_composed(callbacks)
    if eval_step is not None:
        folded = compose(folded, _evaluation_by(eval_when or _at_the_last_step))
    return Plan(
        callbacks=folded,
        eval_step=eval_step,
        eval_data=eval_data,
        eval_view=eval_view,
        evaluate_epochs=eval_step is not None and eval_when is None,
        epochs=epochs,
        steps=steps,
        observers=observers,
        checkpointer=checkpointer,
        resume=resume,
        keep_every=keep_every,
        keep=keep,
        rewind_limit=rewind_limit,
        lag=lag,
        **others,
    )


def _evaluation_by(trigger: Callable[[Any], Any]) -> Handler:
    def evaluation(state: TrainState, event: StepEnd) -> tuple[TrainState, Control]:
        return state, Control(evaluate=trigger(event), reason="evaluation is due")

    return on(StepEnd, evaluation)


def _at_the_last_step(event: StepEnd) -> bool:
    """The last step of an epoch, or of the run."""
    ends_epoch = event.epoch_length is not None and event.position == event.epoch_start + event.epoch_length
    return ends_epoch or event.step == event.total_steps
