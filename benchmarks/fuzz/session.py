"""Runs one session of a program: one recorded call of ``fit``, bounded in time and number of events."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fxtrain as fx
from benchmarks.fuzz import build, sources
from benchmarks.fuzz.cutting import Cutter, InjectedError
from benchmarks.fuzz.program import Cut, Program
from benchmarks.reliability import children
from fxtrain import testing
from fxtrain.core import TRAJECTORY

MOST_EVENTS = 3000
SECONDS = 60.0
COMPILED_SECONDS = 900.0

_CLOCK = (
    "time",
    "previous_time",
    "duration",
    "data_wait",
    "step",
    "position",
    "epoch_length",
    "total_steps",
    "total_epochs",
)
_SESSION_ALONE = fx.FitBegin | fx.Restored | fx.Saved | fx.Interrupted | fx.FitEnd | fx.EvalEnd | fx.Rewound

# Deprecations inside torch, and writers left open if fit raises before it starts.
_NOT_OURS = (DeprecationWarning, FutureWarning, ResourceWarning)


class Shared:
    """Objects shared by the sessions of a program: compiled steps, and with ``reuses`` steps, callbacks and data."""

    def __init__(self) -> None:
        self.cutter = Cutter(None)
        self._made: dict[Any, Any] = {}

    def at(self, where: str) -> Callable[[], None]:
        """Returns a function to call at each occurrence of ``where``. It uses the cutter of the current session."""
        return lambda: self.cutter.at(where)()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the object stored under ``key``, made on first use."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class HungError(BaseException):
    """Raised if a session takes too long or has too many events. A BaseException, so the code under test misses it."""


class Told(NamedTuple):
    """A recorded event, with values as text so that equality is bitwise."""

    kind: str
    step: int
    position: int
    epoch: str
    fields: tuple[tuple[str, str], ...]
    asked: tuple[tuple[str, tuple[str, ...]], ...]
    log: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        words = [f"{self.kind} step={self.step} position={self.position} epoch={self.epoch}"]
        words += [f"{name}={value}" for name, value in (*self.fields, *self.log)]
        return " ".join([*words, *(f"requests {kind}: {reasons}" for kind, reasons in self.asked)])


@dataclasses.dataclass
class Session:
    """The record of one session.

    Args:
        events: All events, or only the session events if the program is unobserved.
        result: The return value of ``fit``.
        error: The exception raised by ``fit``.
        cut: The cut of the session.
        is_recorded: Whether ``events`` is complete.
        warned: The texts of all warnings.
        input_changed: The difference between the state passed to ``fit`` and its copy, or an empty string.
    """

    events: list[Told]
    result: Any = None
    error: BaseException | None = None
    cut: Cut | None = None
    is_recorded: bool = True
    warned: tuple[str, ...] = ()
    input_changed: str = ""

    @property
    def trajectory(self) -> list[Told]:
        """The events that are independent of interruptions."""
        return [told for told in self.events if told.kind in _TRAJECTORY]

    @property
    def began_at(self) -> int:
        """The step of the first event."""
        return self.events[0].step if self.events else 0


_TRAJECTORY = frozenset(kind.__name__ for kind in TRAJECTORY)


def session(program: Program, folder: pathlib.Path, cut: Cut | None = None, *, shared: Shared | None = None) -> Session:
    """Runs one session.

    Args:
        program: The program, whose ``cuts`` are ignored.
        folder: The run folder, with checkpoints and metrics.
        cut: The cut that ends the session, None to run to the end.
        shared: Objects shared with the program's other sessions.
    """
    if cut is not None and cut.how == "kill":
        return _killed(program, folder, cut)
    cutter = Cutter(cut)
    found = Session([], cut=cut, is_recorded=program.observed)
    state = build.state_of(program)
    before = state.copy()
    try:
        with warnings.catch_warnings(record=True) as caught, _bounded(program):
            warnings.simplefilter("always")
            for kind in _NOT_OURS:
                warnings.simplefilter("ignore", kind)
            arguments, options = _arguments(program, folder, cutter, found, shared or Shared())
            if cut is not None and cut.how == "limit":
                options["steps"] = min(cut.at, program.steps or cut.at)
            if cut is not None and cut.how == "epochs":
                options["epochs"] = min(cut.at, program.epochs or cut.at)
            if cut is not None and cut.how == "leave":
                _leave(fx.steps(state, *arguments, **options), cut.at)
            else:
                found.result = fx.fit(state, *arguments, **options)
    except (Exception, HungError, KeyboardInterrupt) as error:
        found.error = error
    finally:
        cutter.disarm()
    found.warned = tuple(str(warning.message) for warning in caught)
    found.input_changed = _difference(state, before)
    return found


def _arguments(program: Program, folder: pathlib.Path, cutter: Cutter, found: Session, shared: Shared) -> Any:
    shared.cutter = cutter
    callbacks, step, eval_step = _parts_of(program, shared)
    options: dict[str, Any] = {
        "callbacks": [callbacks, *cutter.callbacks],
        "observers": [_recorder(found, program.observed), *_writers(program, folder), *cutter.observers],
        "epochs": program.epochs,
        "steps": program.steps,
        "snapshot_every": program.snapshot_every,
        "snapshots": program.snapshots,
        "snapshots_on_host": program.snapshots_on_host,
        "rewind_limit": program.rewind_limit,
        "lag": program.lag,
    }
    if program.evaluate:
        options |= {"eval_step": eval_step, "eval_data": _data_of(program, shared, sources.eval_source, "eval_data")}
        if program.evaluate != "default":
            options["eval_when"] = _trigger(program.evaluate)
        if program.eval_view:
            options["eval_view"] = fx.callbacks.averaged
    if program.saves:
        options |= {"checkpointer": checkpointer(program, folder), "resume": True}
    return (step, _data_of(program, shared, sources.source, "data")), options


def _parts_of(program: Program, shared: Shared) -> tuple[Any, Any, Any]:
    """Returns callbacks, step and evaluation step."""

    def make() -> tuple[Any, Any, Any]:
        callbacks = build.callbacks_of(program)
        eval_step = build.eval_step_of(program, shared.at("eval_step"))
        return callbacks, build.step_of(program, callbacks, shared.at("step")), eval_step

    key = program.steps_per_call, program.donate
    return shared.get(key, make) if program.compiled or program.reuses else make()


def _data_of(program: Program, shared: Shared, make: Callable[..., Any], where: str) -> Any:
    """Returns the training data or the evaluation data."""
    made = functools.partial(make, program, shared.at(where))
    return shared.get(where, made) if program.reuses else made()


def checkpointer(program: Program, folder: pathlib.Path) -> Any:
    """Returns the checkpointer of a run."""
    return fx.checkpointer(
        folder / "checkpoints",
        keep=program.save_keep,
        keep_every=program.save_keep_every,
        best="loss" if program.save_best else None,
        background=program.background,
    )


def _trigger(text: str) -> Any:
    if text == "never":
        return lambda event: False
    number, _, unit = text.partition(" ")
    return fx.every(epochs=float(number)) if unit else fx.every(int(number))


def _writers(program: Program, folder: pathlib.Path) -> list[Any]:
    make = {"jsonl": fx.writers.jsonl, "csv": fx.writers.csv}
    made = [make[kind](folder / f"metrics.{kind}") for kind in program.writers]
    return [fx.observers.required(fx.observers.write(*made, every=program.write_every))] if made else []


def _recorder(found: Session, all_events: bool) -> Any:
    def record(state: Any, event: Any, control: Any) -> None:
        found.events.append(_told(event, control))
        if len(found.events) > MOST_EVENTS:
            raise HungError(f"more than {MOST_EVENTS} events; the last are {found.events[-12:]}")

    if not all_events:
        record.__annotations__ = {"event": _SESSION_ALONE}
    return fx.observers.required(record)


def _told(event: Any, control: fx.Control) -> Told:
    fields = {name: value for name, value in event.__dict__.items() if name not in _CLOCK}
    for name in ("path", "fires", "resumed", "missing", "extra", "environment_changes", "history", "steps_taken"):
        fields.pop(name, None)
    asked = {kind: tuple(control.reasons(kind)) for kind in control.kinds}
    return Told(
        type(event).__name__,
        event.step,
        event.position,
        repr(event.epoch),
        tuple((name, _plain(value)) for name, value in sorted(fields.items())),
        tuple(sorted((kind, reasons) for kind, reasons in asked.items() if reasons)),
        tuple(sorted((name, _plain(entry.value)) for name, entry in control.log.items())),
    )


def _plain(value: Any) -> str:
    if isinstance(value, Tensor):
        return repr(value.tolist())
    if hasattr(value, "items"):
        return repr({str(name): _plain(inner) for name, inner in value.items()})
    return repr(value)


def _leave(moments: Iterator[Any], at: int) -> None:
    """Advances the generator to a trajectory event, and closes it."""
    count = 0
    for _, event, _ in moments:
        count += type(event).__name__ in _TRAJECTORY
        if count == at:
            break
    moments.close()  # pyright: ignore[reportAttributeAccessIssue]


def _killed(program: Program, folder: pathlib.Path, cut: Cut) -> Session:
    def work(tell: Any) -> None:
        arguments, options = _arguments(program, folder, Cutter(cut), Session([]), Shared())
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fx.fit(build.state_of(program), *arguments, **options)

    outcome = children.in_child(work)
    error = RuntimeError(outcome.error) if outcome.error else None
    return Session([], error=error, cut=cut, is_recorded=False)


def delivered_exit() -> int | None:
    """Returns the exit code with which the next session would end this process after a signal, and clears it."""
    state, step = _nothing_to_do()
    try:
        fx.steps(state, step, [torch.zeros(1)], steps=0).close()  # pyright: ignore[reportAttributeAccessIssue]
    except SystemExit as end:
        return end.code  # pyright: ignore[reportReturnType]
    return None


@functools.cache
def _nothing_to_do() -> tuple[fx.TrainState, Any]:
    tx = fx.optim.sgd(0.1)
    return fx.init(torch.nn.Linear(1, 1), tx), fx.train_step(lambda model, batch: model(batch).sum(), tx)


@contextlib.contextmanager
def _bounded(program: Program) -> Iterator[None]:
    """Raises ``HungError`` inside the block after a time limit, and again every second in case it is caught."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hung(number: int, frame: Any) -> None:
        raise HungError("the session took too long")

    handler = signal.signal(signal.SIGALRM, hung)
    theirs = signal.setitimer(signal.ITIMER_REAL, COMPILED_SECONDS if program.compiled else SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *theirs)
        signal.signal(signal.SIGALRM, handler)


def _difference(state: fx.TrainState, before: fx.TrainState) -> str:
    try:
        testing.assert_equal(state, before, "the state given to fit was changed")
    except Exception as error:
        return str(error)
    return ""


def is_injected(error: BaseException | None) -> bool:
    """Returns whether the error was raised by a cut."""
    return isinstance(error, InjectedError | KeyboardInterrupt)
