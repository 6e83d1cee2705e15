"""A program: one training run with its interruptions, as plain data that prints, compares and shrinks.

Every field has the simplest value as its default. ``repr`` leaves the defaults out, so a shrunk program is a few words.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_UNKNOWN_LENGTH = ("generator", "iterable", "iterator", "iterable_loader", "stateful", "torchdata", "endless")
_SEEING_STEPS = {"spike_guard", "nan_guard", "save"}  # callbacks that ask at StepEnd


class Terse:
    """A dataclass whose ``repr`` shows the fields that differ from their defaults."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        shown = [f"{field.name}={value!r}" for field in fields if (value := getattr(self, field.name)) != field.default]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Ask(Terse):
    """A request that a callback makes at an event.

    Args:
        kind: As in ``fx.Control``.
        event: The name of the event type.
        at: The occurrence of that event at which to ask, from 1; 0 for each; with ``by_step`` the step instead.
        by_step: Whether to ask wherever ``event.step == at``, which after a rewind asks again.
        steps: How far to rewind.
        crosses: Whether the count of occurrences survives a rewind, so that the request is made once only.
        final_save: For a stop.
        tensor: Whether the flag is a tensor, which with ``lag=1`` is read late.
    """

    kind: str = "stop"
    event: str = "StepEnd"
    at: int = 1
    by_step: bool = False
    steps: int = 1
    crosses: bool = True
    final_save: bool = True
    tensor: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class Cut(Terse):
    """The end of one session.

    Args:
        how: ``"SIGINT"``, ``"SIGTERM"``, ``"SIGUSR1"``; ``"error"``, an exception; ``"exit"``, KeyboardInterrupt, which
            nothing may catch; ``"kill"``, SIGKILL to a forked child; ``"leave"``, the generator ``fx.steps`` is closed;
            ``"limit"``, a smaller ``steps``; ``"epochs"``, a smaller ``epochs``.
        where: ``"observer"``, ``"callback"``, ``"step"``, ``"eval_step"``, ``"data"``, ``"eval_data"``, or ``"time"``:
            at any instruction, which no seed repeats. A limit is nowhere.
        at: The occurrence there, from 1: of trajectory events, of calls, of batches read. For a limit, the steps or
            epochs; for a time, units of 0.2 ms after ``FitBegin``.
        event: With observers and callbacks, count events of this type only.
        damage: Whether a byte of the newest checkpoint is flipped afterwards, if there is an older one.
    """

    how: str = "SIGINT"
    where: str = "observer"
    at: int = 1
    event: str = ""
    damage: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class Program(Terse):
    """One training run.

    Args:
        seed: Of the state and of the data's values.
        model: ``"machine"``, a hand-written step of a few operations, or ``"mlp"``, with dropout and batch norm.
        optimizer: Of the mlp: ``"sgd"``, ``"momentum"``, ``"adamw"``, or ``"injected"`` hyper-parameters.
        source: See ``sources.KINDS``.
        batches: In an epoch.
        rows: In a batch, a multiple of ``accumulate``.
        short: Whether the last batch of an epoch has fewer rows, where the source can have one.
        bad: Positions in an epoch whose batch holds a NaN.
        epochs: A limit.
        steps: A limit.
        evaluate: ``""`` for no evaluation, ``"default"``, ``"never"`` for requests alone, the period in steps, or
            in epochs: ``"0.5 epochs"``.
        eval_batches: In an evaluation.
        eval_unknown: Whether the evaluation data has no length.
        counted: The events at which callbacks with state count.
        asks: Requests at events of the loop.
        traced_asks: Requests inside the step.
        callbacks: Names of ready-made callbacks; see ``callbacks.READY``.
        eval_view: Whether to evaluate the moving average.
        keep_every: As for ``fit``.
        keep: As for ``fit``.
        keep_on_host: As for ``fit``.
        rewind_limit: As for ``fit``.
        saves: Whether there is a checkpointer. Without one there are no cuts.
        save_keep: ``keep`` of the checkpointer.
        save_keep_every: ``keep_every`` of the checkpointer.
        save_best: Whether the checkpointer keeps the best.
        background: Whether it writes in the background.
        accumulate: Microbatches in a batch of the mlp.
        steps_per_call: Steps in one call.
        lag: As for ``fit``.
        donate: Whether the step overwrites the state that it is given.
        loss_scale: Whether the mlp's loss is scaled dynamically, from a scale at which it overflows.
        alternates: Whether every second session is run plainly, so that a run is resumed by another call path.
        reuses: Whether all sessions use the same step, callbacks and data, as a notebook cell that is run again does.
        compiled: Whether the step is compiled by Inductor; else an interpreter stands in where one is needed.
        observed: Whether an observer sees every event. If not, the loop takes its shorter path.
        writers: ``"jsonl"`` and ``"csv"``.
        write_every: Of the writers.
        cuts: How each session but the last ends.
    """

    seed: int = 0
    model: str = "machine"
    optimizer: str = "sgd"
    source: str = "list"
    batches: int = 3
    rows: int = 2
    short: bool = False
    bad: tuple[int, ...] = ()
    epochs: int | None = None
    steps: int | None = None
    evaluate: str = ""
    eval_batches: int = 2
    eval_unknown: bool = False
    counted: tuple[str, ...] = ()
    asks: tuple[Ask, ...] = ()
    traced_asks: tuple[Ask, ...] = ()
    callbacks: tuple[str, ...] = ()
    eval_view: bool = False
    keep_every: int | None = None
    keep: int = 2
    keep_on_host: bool = False
    rewind_limit: int = 3
    saves: bool = True
    save_keep: int | None = 3
    save_keep_every: int | None = None
    save_best: bool = False
    background: bool = True
    accumulate: int = 1
    steps_per_call: int = 1
    lag: int = 0
    donate: bool = False
    loss_scale: bool = False
    alternates: bool = False
    reuses: bool = False
    compiled: bool = False
    observed: bool = True
    writers: tuple[str, ...] = ()
    write_every: int = 1
    cuts: tuple[Cut, ...] = ()

    def replace(self, **changes: Any) -> Program:
        """The same program with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def plain(self) -> Program:
        """The program without cuts, on the plainest path: what the others must equal."""
        return self.replace(
            cuts=(),
            lag=0,
            donate=False,
            observed=True,
            steps_per_call=1 if self.is_call_neutral else self.steps_per_call,
        )

    @property
    def is_call_neutral(self) -> bool:
        """Whether the run is the same however many steps are taken in a call.

        What callbacks of the loop ask for at ``StepEnd`` comes after all steps of a call, so those that ask there
        make another run.
        """
        asks_at_steps = any(ask.event in ("StepBegin", "StepEnd") for ask in self.asks)
        return not (asks_at_steps or self.evaluate[:1].isdigit() or _SEEING_STEPS & set(self.callbacks))


def unknown_length(program: Program) -> bool:
    """Whether the data has no length before its first epoch ends."""
    return program.source in _UNKNOWN_LENGTH


def rewinds(program: Program) -> bool:
    """Whether the program may go back."""
    return "spike_guard" in program.callbacks or any(ask.kind == "rewind" for ask in program.asks)


def depends_on_sessions(program: Program) -> bool:
    """Whether a callback makes requests at events of the session, so that an interrupted run is another run."""
    return any(ask.event in ("FitBegin", "Saved") for ask in program.asks)
