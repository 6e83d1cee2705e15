"""Programs: training runs with their interruptions, as plain data that can be printed, compared and shrunk.

The default of every field is its simplest value. ``repr`` omits defaults, so a shrunk program is short.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_UNKNOWN_LENGTH = ("generator", "iterable", "iterator", "iterable_loader", "stateful", "torchdata", "endless")
_SEEING_STEPS = {"spike_guard", "nan_guard", "save"}  # callbacks that make requests at StepEnd


class Terse:
    """A dataclass whose ``repr`` shows the fields that differ from their defaults."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        shown = [f"{field.name}={value!r}" for field in fields if (value := getattr(self, field.name)) != field.default]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Ask(Terse):
    """A callback's request at an event.

    Args:
        kind: A request of ``fx.Control``.
        event: The name of the event type.
        at: The occurrence of the event at which to make the request, from 1, or with ``by_step`` the step. 0 makes it
            at every occurrence.
        by_step: Whether to make the request wherever ``event.step == at``, which repeats it after a rewind.
        steps: The number of steps to rewind.
        crosses: Whether the count of occurrences survives a rewind, so that the request is made only once.
        final_save: Whether a stop saves a checkpoint.
        tensor: Whether the flag is a tensor, which ``lag=1`` reads one step later.
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
    """The interruption that ends one session.

    Args:
        how: ``"SIGINT"``, ``"SIGTERM"``, ``"SIGUSR1"``; ``"error"``, an exception; ``"exit"``, KeyboardInterrupt, which
            must not be caught; ``"kill"``, SIGKILL to a forked child; ``"leave"``, closing the generator ``fx.steps``;
            ``"limit"``, a smaller ``steps``; ``"epochs"``, a smaller ``epochs``.
        where: ``"observer"``, ``"callback"``, ``"step"``, ``"eval_step"``, ``"data"``, ``"eval_data"``, or ``"time"``
            for any instruction, which is not reproducible. Ignored for limits and ``"leave"``.
        at: The occurrence at that place, from 1: of trajectory events, of calls, or of batches read. The number of
            steps or epochs for a limit. Units of 0.2 ms after ``FitBegin`` for ``"time"``.
        event: The only event type counted by observers and callbacks. The default counts all trajectory events.
        damage: Whether to flip a bit of the newest checkpoint afterwards, if there is an older one.
    """

    how: str = "SIGINT"
    where: str = "observer"
    at: int = 1
    event: str = ""
    damage: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class Program(Terse):
    """A training run with its interruptions.

    Args:
        seed: The seed of the state and of the data's values.
        model: ``"machine"``, a hand-written step of a few operations, or ``"mlp"``, with dropout and batch norm.
        optimizer: The optimizer of the mlp: ``"sgd"``, ``"momentum"``, ``"adamw"``, or ``"injected"`` hyperparameters.
        source: A key of ``sources.KINDS``.
        batches: The number of batches per epoch.
        rows: The number of rows per batch, a multiple of ``accumulate``.
        short: Whether the last batch of an epoch has fewer rows, if the source supports it.
        bad: Positions in an epoch whose batches are NaN.
        epochs: The epoch limit.
        steps: The step limit.
        evaluate: ``""`` for no evaluation, ``"default"``, ``"never"`` for evaluation on request only, or the period in
            steps or epochs, such as ``"2"`` or ``"0.5 epochs"``.
        eval_batches: The number of batches per evaluation.
        eval_unknown: Whether the length of the evaluation data is unknown.
        counted: The events hashed by a stateful callback.
        asks: Requests at loop events.
        traced_asks: Requests inside the step.
        callbacks: Keys of ``build.READY``.
        eval_view: Whether to evaluate the moving average.
        snapshot_every: As for ``fit``.
        snapshots: As for ``fit``.
        snapshots_on_host: As for ``fit``.
        rewind_limit: As for ``fit``.
        saves: Whether to use a checkpointer. Programs without one have no cuts.
        save_keep: ``keep`` of the checkpointer.
        save_keep_every: ``keep_every`` of the checkpointer.
        save_best: Whether the checkpointer keeps the checkpoint with the best loss.
        background: Whether the checkpointer writes in the background.
        accumulate: The number of microbatches per batch of the mlp.
        steps_per_call: The number of steps per call.
        lag: As for ``fit``.
        donate: Whether the step donates its input state.
        loss_scale: Whether the mlp uses dynamic loss scaling, starting from a scale that overflows.
        alternates: Whether every second session runs on the plainest path, so that resumes change the call path.
        reuses: Whether all sessions share the step, callbacks and data, as a rerun notebook cell does.
        compiled: Whether Inductor compiles the step. Otherwise ``interpreted`` emulates a compiled step if needed.
        observed: Whether an observer receives every event. If not, the loop takes its shorter path.
        writers: Formats of metrics files, ``"jsonl"`` and ``"csv"``.
        write_every: The period of the writers in steps.
        cuts: The interruptions of all sessions except the last.
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
    snapshot_every: int | None = None
    snapshots: int = 2
    snapshots_on_host: bool = False
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
        """Returns the program with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def plain(self) -> Program:
        """The program without cuts, on the plainest path, which serves as the reference."""
        return self.replace(
            cuts=(),
            lag=0,
            donate=False,
            observed=True,
            steps_per_call=1 if self.is_call_neutral else self.steps_per_call,
        )

    @property
    def is_call_neutral(self) -> bool:
        """Whether the result is independent of the number of steps per call.

        Requests at ``StepEnd`` are handled after all steps of a call, so programs with such requests depend on it.
        """
        asks_at_steps = any(ask.event in ("StepBegin", "StepEnd") for ask in self.asks)
        return not (asks_at_steps or self.evaluate[:1].isdigit() or _SEEING_STEPS & set(self.callbacks))


def unknown_length(program: Program) -> bool:
    """Returns whether the length of the data is unknown before its first epoch ends."""
    return program.source in _UNKNOWN_LENGTH


def rewinds(program: Program) -> bool:
    """Returns whether the program may rewind."""
    return "spike_guard" in program.callbacks or any(ask.kind == "rewind" for ask in program.asks)


def depends_on_sessions(program: Program) -> bool:
    """Returns whether callbacks make requests at session events, so that interruptions change the result."""
    return any(ask.event in ("FitBegin", "Saved") for ask in program.asks)
