"""The legal order of events, as a state machine based on the table in ``fxtrain.loop`` instead of its code.

One session is::

    FitBegin Restored?
    (EpochBegin | StepBegin+ StepEnd+ | Rewound | EvalBegin (EvalStepBegin EvalStep)* EvalEnd | EpochEnd | SaveBegin
     | Saved)*
    Interrupted? Saved* SaveBegin? Saved* FitEnd?

Steps, positions and epochs are consecutive. Requests are handled in the order rewind, evaluate, end of epoch, save,
stop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.fuzz.program import Program, unknown_length
from benchmarks.fuzz.session import Told

_ASK = re.compile(r"ask (\d+): ")  # reasons written by build.py


def problems(told: Sequence[Told], program: Program, *, is_whole: bool) -> list[str]:
    """Returns what is illegal in the events of one session, at most one line per event.

    Args:
        told: Every event of the session.
        program: The program of the session.
        is_whole: Whether ``fit`` returned, without an exception or a closed generator.
    """
    machine = _Machine(program)
    found: list[str] = []
    for index, event in enumerate(told):
        found += [f"event {index}, {event!r:.160}: {problem}" for problem in machine.see(event)][:1]
    if is_whole and (not told or told[-1].kind != "FitEnd"):
        found.append("the session returned without FitEnd")
    return found


class _Machine:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._last = ""  # the kind of the previous event
        self._step = self._position = -1
        self._begun: list[int] = []  # the positions of batches whose steps have not ended
        self._is_in_epoch: bool | None = None  # None if unknown, after a resume or a rewind
        self._is_evaluating = False
        self._index = 0  # the index of the next evaluation batch
        self._begun_evaluation_batch = -1
        self._ended = ""  # the kind of the event that ended the session
        self._pending: set[str] = set()  # requests not handled yet
        self._rewind = 0  # the most steps that a pending request rewinds
        self._saved: int | None = None  # the step of the last save
        self._saving: set[int] = set()  # the steps of saves that have begun
        self._is_unsaved = self._has_stepped = False
        self._has_moved = False  # whether a batch was used or skipped since the last EpochEnd

    def see(self, event: Told) -> list[str]:
        found = list(self._common(event))
        found += getattr(self, f"_{event.kind}")(event)
        self._last = event.kind
        self._ask(event)
        return found

    def _common(self, event: Told) -> list[str]:
        found: list[str] = []
        # An error in a callback at FitBegin emits Interrupted first.
        if self._last == "" and event.kind not in ("FitBegin", "Interrupted"):
            found.append("the session does not begin with FitBegin")
        if self._last == "FitEnd":
            found.append("an event after FitEnd")
        if self._ended and event.kind not in ("SaveBegin", "Saved", "FitEnd"):
            found.append(f"{event.kind} after Interrupted")
        if self._is_evaluating and event.kind not in ("EvalStepBegin", "EvalStep", "EvalEnd", "Interrupted"):
            found.append(f"{event.kind} inside an evaluation")
        if event.kind not in ("FitBegin", "StepBegin", "StepEnd", "Saved") and self._step >= 0:
            moved = event.kind == "EpochEnd" and event.position >= self._position  # end_epoch skips the other batches
            # After an exception the state may be one step ahead of the observed events, or a call behind.
            # With lag, a stop may undo steps, rewinds and requests that were already observed.
            is_undone = event.kind == "Interrupted" or (event.kind == "FitEnd" and self._program.lag)
            is_there = event.step == self._step and (event.position == self._position or moved)
            if not is_there and not is_undone:
                found.append(f"expected {_at(self._step, self._position)}, got {_at(event.step, event.position)}")
        return found

    def _ask(self, event: Told) -> None:
        for kind, reasons in event.asked:
            if kind == "rewind":
                steps = [self._program.asks[int(match[1])].steps for each in reasons if (match := _ASK.match(each))]
                self._rewind = max([self._rewind, *steps])
            self._is_unsaved |= kind == "skip_final_save"
            between_epochs = kind == "end_epoch" and self._is_in_epoch is False  # has no epoch to end
            if kind in ("evaluate", "end_epoch", "save", "stop", "rewind") and not between_epochs:
                self._pending.add(kind)

    def _due(self, *kinds: str) -> list[str]:
        return [f"the request {kind} is still pending" for kind in kinds if kind in self._pending]

    # Session events

    def _FitBegin(self, event: Told) -> list[str]:  # noqa: N802
        self._step, self._position = event.step, event.position
        self._is_in_epoch = False if event.step == event.position == 0 else None
        return ["FitBegin inside a session"] if self._last else []

    def _Restored(self, event: Told) -> list[str]:  # noqa: N802
        self._is_in_epoch = None
        return [] if self._last == "FitBegin" else [f"Restored after {self._last}"]

    def _SaveBegin(self, event: Told) -> list[str]:  # noqa: N802
        self._pending.discard("save")
        self._saving.add(event.step)
        found = [] if self._program.saves else ["SaveBegin without a checkpointer"]
        if self._last == "SaveBegin":
            found.append("SaveBegin inside a save")
        is_at_a_step = dict(event.fields)["role"] == "trajectory"
        return found + self._due("rewind", "evaluate", "end_epoch") if is_at_a_step else found

    def _Saved(self, event: Told) -> list[str]:  # noqa: N802
        self._saved = event.step
        found = [] if self._program.saves else ["Saved without a checkpointer"]
        if event.step not in self._saving:
            found.append(f"expected SaveBegin before Saved, got none at step {event.step}")
        # A lagged stop, or a stop inside a multi-step call, leaves unfinished steps.
        can_be_left = self._program.lag or self._program.steps_per_call > 1
        return found if self._begun == [] or self._ended or can_be_left else [*found, "Saved inside a step"]

    def _Interrupted(self, event: Told) -> list[str]:  # noqa: N802
        self._ended, self._is_evaluating, self._begun = event.kind, False, []
        return []

    def _FitEnd(self, event: Told) -> list[str]:  # noqa: N802
        if self._program.saves and not self._is_unsaved and self._has_stepped and self._saved != event.step:
            return [f"expected a save of step {event.step}, got {self._saved} as the last saved step"]
        reason = dict(event.fields)["reason"]
        if self._ended or self._program.lag or "no retained state is that old" in reason:
            return []
        is_over = self._has_moved and event.position % self._program.batches == 0
        found = ["expected EpochEnd after the last batch"] if is_over and not unknown_length(self._program) else []
        return found + self._due("evaluate", "end_epoch", "rewind")

    # Trajectory events

    def _EpochBegin(self, event: Told) -> list[str]:  # noqa: N802
        found = self._settled()
        if self._is_in_epoch:
            found.append("EpochBegin inside an epoch")
        length = self._program.batches
        if event.position % length:
            found.append(f"expected EpochBegin at a multiple of {length}, got position {event.position}")
        self._is_in_epoch = True
        return found

    def _StepBegin(self, event: Told) -> list[str]:  # noqa: N802
        if self._last != "StepBegin" and self._program.steps_per_call > 1:
            self._begun = []  # a stop inside the previous call left steps unfinished
        found = self._settled() if not self._begun else []
        if self._is_in_epoch is False:
            found.append("a step before EpochBegin")
        self._is_in_epoch = True
        ahead = len(self._begun)
        if (event.step, event.position) != (self._step + 1 + ahead, self._position + ahead):
            expected = _at(self._step + 1 + ahead, self._position + ahead)
            found.append(f"expected {expected}, got {_at(event.step, event.position)}")
        if ahead >= self._program.steps_per_call:
            found.append(f"expected at most {self._program.steps_per_call} steps per call, got {ahead + 1}")
        asked = dict(event.asked)
        if "skip_batch" in asked:
            self._position += 1
            self._has_moved = True
        elif not {"stop", "rewind", "end_epoch"} & asked.keys():
            self._begun.append(event.position)
        return found

    def _StepEnd(self, event: Told) -> list[str]:  # noqa: N802
        found: list[str] = []
        self._has_stepped = True
        if not self._begun:
            found.append("StepEnd without StepBegin")
        else:
            self._begun.pop(0)
        if (event.step, event.position) != (self._step + 1, self._position + 1):
            expected = _at(self._step + 1, self._position + 1)
            found.append(f"expected {expected}, got {_at(event.step, event.position)}")
        self._step, self._position, self._has_moved = event.step, event.position, True
        return found

    def _Rewound(self, event: Told) -> list[str]:  # noqa: N802
        found = (
            []
            if "rewind" in self._pending or self._is_in_epoch is None or "spike_guard" in self._program.callbacks
            else ["Rewound without a request"]
        )
        fields: dict[str, Any] = dict(event.fields)
        to_step = int(fields["to_step"])
        if int(fields["from_step"]) != self._step or to_step > self._step - self._rewind:
            found.append(f"expected a rewind of at least {self._rewind} steps from step {self._step}")
        self._step, self._position = to_step, _start(fields["abandoned"], self._position)
        self._pending, self._rewind, self._is_in_epoch = self._pending & {"stop"}, 0, None
        self._has_moved = False
        return found

    def _EvalBegin(self, event: Told) -> list[str]:  # noqa: N802
        found = self._due("rewind")
        self._is_evaluating, self._index, self._begun_evaluation_batch = True, 0, -1
        self._pending.discard("evaluate")
        self._begun = []
        return found

    def _EvalStepBegin(self, event: Told) -> list[str]:  # noqa: N802
        index = int(dict(event.fields)["index"])
        found = [] if self._is_evaluating else ["EvalStepBegin outside of an evaluation"]
        if index != self._index or index == self._begun_evaluation_batch:
            found.append(f"expected evaluation batch {self._index} to begin once, got {index}")
        self._begun_evaluation_batch = index
        return found

    def _EvalStep(self, event: Told) -> list[str]:  # noqa: N802
        found = [] if self._is_evaluating else ["EvalStep outside of an evaluation"]
        index = int(dict(event.fields)["index"])
        if index != self._index or index != self._begun_evaluation_batch:
            found.append(f"expected evaluation batch {self._index} after its EvalStepBegin, got {index}")
        self._index = index + 1
        return found

    def _EvalEnd(self, event: Told) -> list[str]:  # noqa: N802
        found = [] if self._is_evaluating else ["EvalEnd outside of an evaluation"]
        if self._index != self._program.eval_batches:
            found.append(f"expected {self._program.eval_batches} evaluation batches, got {self._index}")
        self._is_evaluating = False
        return found

    def _EpochEnd(self, event: Told) -> list[str]:  # noqa: N802
        found = self._due("rewind", "evaluate")
        if self._is_in_epoch is False:
            found.append("EpochEnd outside of an epoch")
        if event.position % self._program.batches:
            found.append(f"expected EpochEnd at a multiple of {self._program.batches}, got position {event.position}")
        self._is_in_epoch, self._position, self._has_moved = False, event.position, False
        self._pending.discard("end_epoch")
        self._begun = []
        return found

    def _settled(self) -> list[str]:
        """Reports requests that must be handled before the next step or epoch begins."""
        self._begun = []
        return self._due("rewind", "evaluate", "end_epoch", *(() if self._program.lag else ("stop",)))


def _at(step: int, position: int) -> str:
    return f"step {step} at position {position}"


def _start(range_text: str, otherwise: int) -> int:
    """Returns the start of a ``range``, parsed from its ``repr``."""
    first = range_text.removeprefix("range(").split(",")[0]
    return int(first) if first.isdigit() else otherwise
