"""Passes events to the observers and the history, with scalars on the host."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch

from fxtrain.core import (
    EVENTS,
    SESSION,
    TRAJECTORY,
    Control,
    Epoch,
    EvalEnd,
    Event,
    History,
    LoopEvent,
    Metrics,
    Observer,
    Published,
    Rewound,
    Saved,
    StepEnd,
    TrainState,
    event_of,
    name_of,
    printable,
    printable_lines,
    takes,
    try_all,
    warn,
)
from fxtrain.fold import Composed, Handler
from fxtrain.fold._lookalikes import refuse_lookalikes
from fxtrain.fold._subscription import subscription
from fxtrain.fold._watched import Outcome, Watched
from fxtrain.loop._history import HistoryRecorder, Moment
from fxtrain.loop._published import published_after
from fxtrain.loop._transfer import HostTransfer, LazyMetrics, host_scalars
from fxtrain.values import METRIC_PREFIXES, Kind, named_after, published

_EVENTS_PER_TRANSFER = 64  # events per transfer to the host; more would evict other data from the CPU caches
_RECORDED = (EvalEnd, Rewound)  # events that the history records even if nothing subscribes to them
_MEASURED = ("metrics", "evaluation")  # fields of events with metrics
_NOTHING = Control()

# An event's type, step, metrics, requests and moment
_Published = tuple[type[LoopEvent], int, Metrics, Control, Moment]


class Publisher:
    """The observers of a run. They see events after the fold, with scalars on the host, and cannot influence the run.

    An observer that raises is reported and dropped. If it has ``required = True``, its error ends the run instead.

    Args:
        observers: Functions ``(state, event, control) -> None``. The annotation of the second parameter is the
            subscription. Without one, an observer sees all events of the loop. With ``sees_logged = True``, it also
            sees any event at which something was logged. If an observer has ``flush()``, it is called before each save.
            If it has ``close()``, it is called at the end. If it has ``callback_ran(name, event, before, outcome)``, it
            is called after each callback. If it has ``compile_began(name, last_seconds)`` and ``compile_ended(name,
            seconds)``, they are called before and after a compilation. An attribute ``keeps`` is the set of kinds of
            logged values that it keeps.
        device: Device of the run's state.

    Raises:
        TypeError: If one of ``observers`` is a callback.
    """

    def __init__(self, observers: Observer | Iterable[Observer], device: torch.device) -> None:
        is_one = isinstance(observers, Mapping) or not isinstance(observers, Iterable)
        given = [cast("Observer", observers)] if is_one else list(cast("Iterable[Observer]", observers))
        for observer in given:
            _check_observer(observer)
        self._use(given)
        self.recorder = HistoryRecorder()
        self.history = History(self.recorder.points, refresh=self._read, clock=self.recorder.clock)  # live
        self._on_host = device.type == "cpu"
        # Both for the history.
        self._unread: list[_Published] = []
        self._sent: list[_Published] = []  # asynchronous copies to the host
        self._transfer = HostTransfer(on_host=self._on_host)

    def _use(self, observers: list[Callable[..., None]]) -> None:
        """Sets the observers. Makes new lists, because a caller may iterate over the old ones."""
        self._observers = observers
        self._log_observers = [observer for observer in observers if getattr(observer, "sees_logged", False)]
        self._seeing: dict[type[object], list[Callable[..., None]]] = {}
        for observer in observers:
            for kind in _events(observer):
                self._seeing.setdefault(kind, []).append(observer)
        self._seeing_published = self._seeing.get(Published, ())

    def is_seen(self, kind: type[object]) -> bool:
        """Whether the history or an observer needs events of this type, even if no callback subscribes."""
        return kind in _RECORDED or bool(
            self._seeing.get(kind) or (kind in METRIC_PREFIXES and self._seeing.get(Published))
        )

    def keeps(self) -> frozenset[Kind]:
        """Returns the kinds of logged values that the observers keep, as far as they declare it."""
        return frozenset[Kind]().union(*(getattr(observer, "keeps", ()) for observer in self._observers))

    def watched(self, callbacks: Composed) -> Composed:
        """Returns callbacks that report each call to the observers that watch them, if there are any."""
        return Watched(callbacks, self._callback_ran) if self.watches_callbacks else callbacks

    @property
    def watches_callbacks(self) -> bool:
        """Whether an observer sees each call of a callback."""
        return any(hasattr(observer, "callback_ran") for observer in self._observers)

    def _callback_ran(self, name: str, event: Event, before: TrainState, outcome: Outcome) -> None:
        at = f"{type(event).__name__} of step {int(event.step)}"
        self._each("callback_ran", at, name, event, before, outcome)

    def compile_began(self, name: str, last_seconds: float | None) -> None:
        """Passes on that a step begins to compile."""
        self._each("compile_began", f"the compilation of {name}", name, last_seconds)

    def compile_ended(self, name: str, seconds: float | None) -> None:
        """Passes on that a step has been compiled."""
        self._each("compile_ended", f"the compilation of {name}", name, seconds)

    def _each(self, method: str, at: str, *arguments: object) -> None:
        """Calls a method of the observers that have it."""
        for observer in self._observers:
            try:
                _call(observer, method, *arguments)
            except Exception as error:
                if getattr(observer, "required", False):
                    raise
                self._drop(observer, at, error)

    def step(self, number: int, measured: Metrics, moment: Moment) -> None:
        """Records the metrics of a step without an event, because nothing subscribes to it."""
        self._unread.append((StepEnd, number, measured, _NOTHING, moment))
        if len(self._unread) >= _EVENTS_PER_TRANSFER:
            self._read()

    def __call__(self, state: TrainState, event: LoopEvent, control: Control, epoch: Epoch) -> None:
        """Passes on an event.

        Args:
            state: The state after the fold.
            event: The event.
            control: The requests made at it.
            epoch: The epoch of the event.
        """
        seeing, seeing_published = self._seeing.get(type(event), ()), self._seeing_published
        if control.log and self._log_observers:
            seeing = [observer for observer in self._observers if observer in (*seeing, *self._log_observers)]
        if seeing or seeing_published:
            event, control = self._shown(event, control)
        self._record(event, control, epoch)
        if seeing:
            self._pass(seeing, state, event, control)
        published_event = published_after(event, control.log, compute=dict) if seeing_published else None
        if published_event is not None:
            self._pass(seeing_published, state, published_event, control)

    def _pass(
        self, seeing: Iterable[Callable[..., None]], state: TrainState, event: LoopEvent, control: Control
    ) -> None:
        for observer in seeing:
            try:
                observer(state, event, control)
            except Exception as error:
                if getattr(observer, "required", False):
                    raise
                self._drop(observer, f"{type(event).__name__} of step {event.step}", error)

    def flush(self, step: int) -> None:
        """Flushes the observers before the save of a step.

        All points up to a checkpoint are then written, whenever the run is killed.
        """
        self._each("flush", f"the save of step {step}")

    def close(self) -> None:
        """Closes the observers.

        All are closed before the first error of a required observer or of the history is raised. Errors of other
        observers are reported.
        """
        try_all(self._read, *(functools.partial(self._close, observer) for observer in self._observers))

    def _close(self, observer: Callable[..., None]) -> None:
        try:
            _call(observer, "close")
        except Exception as error:
            if getattr(observer, "required", False):
                raise
            _report(observer, "failed in close()", error)

    def _shown(self, event: LoopEvent, control: Control) -> tuple[LoopEvent, Control]:
        """Returns the event and its requests as observers see them."""
        kind = type(event)
        if kind is not Saved:  # metrics of Saved are Python floats already
            fields = event.__dict__.copy()
            for name in _MEASURED:
                if (value := fields.get(name)) is not None:
                    fields[name] = self._transfer.scalars(value)
            event = event_of(kind, fields)
        return event, self._transfer.control(control) if control.log else control

    def _record(self, event: LoopEvent, control: Control, epoch: Epoch) -> None:
        kind, step, measured = type(event), event.step, None
        if kind is Rewound:
            self._read()
            step = event.to_step
            self.recorder.forget_after(step)
        elif kind is StepEnd or kind is EvalEnd:
            measured = event.metrics
        logged = control is not _NOTHING and (type(control.log) is LazyMetrics or len(control.log) > 0)
        if measured is not None or logged:
            moment = (event.time, event.position, epoch)
            self._unread.append((kind, step, {} if measured is None else measured, control, moment))
            # Read immediately on a CPU, so that a value that cannot be published raises at its event.
            if logged and self._on_host:
                self._read()
            elif len(self._unread) >= _EVENTS_PER_TRANSFER:
                self._read(wait=False)

    def _read(self, *, wait: bool = True) -> None:
        """Adds the published values to the history.

        Args:
            wait: Whether to wait for values on a device. If not, their asynchronous copy starts now, and the next call
                adds them.
        """
        pending, self._unread = self._unread, []
        if not self._on_host:
            shown = [
                (kind, step, self._transfer.scalars(metrics), self._transfer.control(control), moment)
                for kind, step, metrics, control, moment in pending
            ]
            pending = self._sent + shown if wait else self._sent
            self._sent = [] if wait else shown
            self._transfer.send()
        if pending:
            self.recorder.mark([record[1] for record in pending], [record[4] for record in pending])
        for kind, step, measured, control, _ in pending:
            values = host_scalars(measured)
            if control.log:
                event = event_of(kind, {"metrics": values})
                self.recorder.add(step, published(event, self._transfer.control(control)))
            else:
                self.recorder.add(step, named_after(kind, values))

    def _drop(self, observer: Callable[..., None], at: str, error: Exception) -> None:
        self._use([other for other in self._observers if other is not observer])
        with contextlib.suppress(Exception):
            _call(observer, "close")
        _report(observer, f"failed at {at} and is dropped, and training continues", error)


def _report(observer: Callable[..., None], what: str, error: Exception) -> None:
    lines = printable_lines("".join(traceback.format_exception(error)))
    warn("\n".join([f"The observer {printable(name_of(observer))} {what}.", *lines]), RuntimeWarning)


def _call(observer: Callable[..., None], name: str, *arguments: object) -> None:
    """Calls a method of an observer, if it has one of this name."""
    method = getattr(observer, name, None)
    if method is not None:
        method(*arguments)


def _check_observer(observer: Callable[..., None]) -> None:
    refuse_lookalikes(observer, "observers")
    if isinstance(observer, Composed):
        name = ", ".join(handler.name for handler in observer.handlers) or "compose()"
    else:
        name = observer.name if isinstance(observer, Handler) else name_of(observer)
    if isinstance(observer, Composed | Handler) or not takes(observer, 3):
        remedy = "Pass it in callbacks=" if takes(observer, 2) else "Give it these three parameters"
        raise TypeError(
            f"observers: expected functions (state, event, control), got {name}, which does not take three "
            f"arguments. {remedy}."
        )


def _events(observer: Callable[..., None]) -> frozenset[type[object]]:
    seen = frozenset(subscription(observer))
    # Without an annotation, a callback sees trajectory events, and an observer session events too.
    return frozenset((*TRAJECTORY, *SESSION)) if seen == frozenset(TRAJECTORY) else seen & frozenset(EVENTS)
