"""Laws of a single session, and of interrupted sessions compared with the uninterrupted run.

Each check returns one line ``law: violation`` per violation, or an empty list if the law holds.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.fuzz import order
from benchmarks.fuzz.program import Cut, Program
from benchmarks.fuzz.session import Session, Told, checkpointer, is_injected
from fxtrain import testing, writers
from fxtrain.core import BATCH, DATA, STOP_REASONS

_EXITS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138}
_IN_CHECKPOINTS = (STOP_REASONS, BATCH, DATA)  # slots that only saved states have
_LOSING = ("kill", "leave", "exit", "error")
_EVALUATION = ("EvalBegin", "EvalStepBegin", "EvalStep", "EvalEnd")
_STOPPED_BEFORE = "stopped before this session began"
_REFUSED = (
    # Raised for end_epoch requests and triggers in epochs while the epoch length is unknown.
    "expected data with a known epoch length",
    "expected an event with a known epoch length",
    # Raised if callbacks end or skip every epoch without a step.
    "expected a step within",
)

_EXPECTED_WARNINGS = (
    "expected a checkpointer for a save requested by a callback",
    "'set_vital' is deprecated",  # raised by torchdata
    "os.fork() was called",  # raised by JAX if another test imported it
    "may differ in the last bits (compiled by",  # programs with alternates=True
    " is restored.",  # an older checkpoint replaces a damaged one
)


def is_refused(session: Session) -> bool:
    """Returns whether fxtrain rejected the program with a documented error. No law applies to such programs."""
    return isinstance(session.error, (ValueError, TypeError)) and any(text in str(session.error) for text in _REFUSED)


def every_session(program: Program, session: Session) -> list[str]:
    """Returns violations of the laws that apply to any single session."""
    found = []
    if session.error is not None and not is_injected(session.error):
        found.append(f"error: {type(session.error).__name__}: {session.error}")
    if session.error is None and session.cut is not None and session.cut.how == "error" and session.result is None:
        found.append("error: the injected exception was lost")
    found += [f"warning: {text}" for text in session.warned if not _is_expected(text)]
    if session.input_changed:
        found.append(f"input: {session.input_changed}")
    if session.is_recorded:
        # A closed generator or an exception may end the events anywhere.
        found += [
            f"order: {line}" for line in order.problems(session.events, program, is_whole=session.result is not None)
        ]
    if session.result is not None:
        found += [f"history: {line}" for line in _unordered(session.result.history)]
    return found


def ends_process(session: Session, code: int | None) -> list[str]:
    """Checks that a terminating signal ends the process after the save, when the next session would begin.

    Args:
        session: The session to check.
        code: The exit code with which the process would end, None if it would continue.
    """
    if session.result is None or session.cut is None:
        return []
    exits, reason = session.result.exit_code, session.result.reason
    right = _EXITS.get(session.cut.how, 0)
    # The run may have ended for another reason before the signal.
    is_right = exits == right or (exits == 0 and "interrupted" not in reason)
    found = [] if is_right else [f"exit: expected {right}, got {exits} after {reason}"]
    wanted = exits if session.cut.how in ("SIGTERM", "SIGUSR1") and exits else None
    return found if code == wanted else [*found, f"exit: expected the process to exit with {wanted}, got {code}"]


def same_end(whole: Session, final: Session, reasons: Sequence[str]) -> list[str]:
    """Checks that the final states and stop reasons are equal.

    Args:
        whole: The uninterrupted run.
        final: The last session of the interrupted run.
        reasons: The stop reasons of all its sessions.
    """
    found: list[str] = []
    for name in ("continue_from", "state"):
        got, wanted = getattr(final.result, name), getattr(whole.result, name)
        try:
            testing.assert_equal(got, wanted, f"result.{name}")
        except AssertionError as error:
            found.append(f"state: {error}")
    reason = whole.result.reason
    if final.result.reason != reason and not (final.result.reason == _STOPPED_BEFORE and reason in reasons):
        found.append(f"reason: expected {reason!r}, got {final.result.reason!r}")
    return found


def same_trajectory(program: Program, whole: Session, sessions: Sequence[Session]) -> list[str]:
    """Checks that the events of all sessions together are those of the uninterrupted run.

    Only events whose effects an error or a kill discarded may be repeated.
    """
    wanted = _comparable(program, whole)
    if not sessions[-1].is_recorded:
        return []
    if not all(session.is_recorded for session in sessions if session is not sessions[-1]):
        sessions = sessions[-1:]
        known_end = len(wanted)
    else:
        known_end = 0
    found: list[str] = []
    silent = 0  # the last session with events; later cuts may all have lost some
    for number, session in enumerate(sessions):
        told = _comparable(program, session)
        begin = _placed(told, wanted, known_end, is_final=session is sessions[-1])
        if begin is None:
            return [*found, f"events: session {number + 1}: {_where_apart(told, wanted, known_end)}"]
        again = wanted[begin:known_end] if number else []
        before = _harshest([each.cut for each in sessions[silent:number] if each.cut is not None])
        if told:
            silent = number
        if again and before is not None and not _is_unsaved(sessions):
            found += _too_much_again(again, before, program)
        known_end = begin + len(told) if told else known_end
    if known_end != len(wanted):
        found.append(f"events: {len(wanted) - known_end} of {len(wanted)} are missing, first {wanted[known_end]!r}")
    return found


def does_nothing(again: Session, final: Session, whole: Session) -> list[str]:
    """Checks that resuming a finished run takes no step and leaves the state unchanged."""
    found: list[str] = []
    if again.result is None:
        return []
    try:
        testing.assert_equal(
            again.result.continue_from, final.result.continue_from, "resumed again: result.continue_from"
        )
        testing.assert_equal(again.result.state, final.result.state, "resumed again: result.state")
    except AssertionError as error:
        found.append(f"again: {error}")
    if again.is_recorded and again.trajectory:
        found.append(f"again: expected no events after a finished run, got {again.trajectory[0]!r}")
    return found


def same_files(program: Program, whole: pathlib.Path, cut: pathlib.Path) -> list[str]:
    """Checks that metrics files have one point per step, equal to the uninterrupted run's except for times."""
    found: list[str] = []
    for kind in program.writers:
        read = _json_lines if kind == "jsonl" else _rows
        wanted, got = read(whole / f"metrics.{kind}"), read(cut / f"metrics.{kind}")
        found += [f"{kind}: {line}" for line in _doubled(got)]
        if program.write_every == 1 and got != wanted:
            found.append(f"{kind}: {_first_difference(got, wanted)}")
    return found


def same_history(whole: Session, sessions: Sequence[Session]) -> list[str]:
    """Checks that the joined histories of all sessions equal the history of the uninterrupted run."""
    if not all(session.result is not None for session in sessions):
        return []  # a session that raised has no history
    joined: dict[tuple[str, int], float] = {}
    for session in sessions:
        back_to = [int(dict(told.fields)["to_step"]) for told in session.events if told.kind == "Rewound"]
        kept_until = min([session.began_at, *back_to])
        joined = {point: value for point, value in joined.items() if point[1] <= kept_until}
        joined |= _points(session.result.history)
    wanted = _points(whole.result.history)
    if repr(sorted(joined.items())) == repr(sorted(wanted.items())):
        return []
    differing = [
        f"{point}: expected {wanted.get(point)}, got {joined.get(point)}"
        for point in sorted({*joined, *wanted})
        if repr(joined.get(point)) != repr(wanted.get(point))
    ]
    return [f"history: {differing[0]} ({len(differing)} points differ)"]


def saved_last(program: Program, folder: pathlib.Path, final: Session) -> list[str]:
    """Checks that the newest checkpoint equals the final state."""
    with checkpointer(program, folder) as checkpoints:
        if checkpoints.latest() is None:
            return ["disk: expected a checkpoint at the end, got none"]
        last = final.result.continue_from
        saved = checkpoints.restore(last, extra="keep")
    # The checkpoint keeps the stop request that ended the run, so that a resume does nothing.
    false = last.due.stop.new_zeros(())
    slots = {name: memory for name, memory in saved.slots.items() if name not in _IN_CHECKPOINTS}
    try:
        testing.assert_equal(
            saved.replace(due=saved.due._replace(stop=false, skip_final_save=false), slots=slots),
            last,
            "disk: the newest checkpoint",
        )
    except AssertionError as error:
        return [str(error)]
    return []


def _is_unsaved(sessions: Sequence[Session]) -> bool:
    """Returns whether a stop without a final save was requested, after which a resume repeats the last steps."""
    return any("skip_final_save" in dict(event.asked) for session in sessions for event in session.events)


def _is_expected(text: str) -> bool:
    return any(part in text for part in _EXPECTED_WARNINGS)


def _comparable(program: Program, session: Session) -> list[Told]:
    """Returns the trajectory without the events that may depend on steps per call or lag."""
    told = session.trajectory
    if program.lag and any(kind == "stop" for event in told for kind, _ in event.asked):
        # With lag a stop is read after the next step began, and that step is discarded.
        while told and told[-1].kind in ("StepBegin", "EpochBegin"):
            told = told[:-1]
    return [event for event in told if event.kind != "StepBegin" or program.steps_per_call == 1]


def _placed(told: list[Told], wanted: list[Told], known_end: int, *, is_final: bool) -> int | None:
    """Returns the latest index at which a session's events match those of the uninterrupted run without a gap.

    Returns None if they match nowhere.
    """
    if is_final:
        begin = len(wanted) - len(told)
        return begin if 0 <= begin <= known_end and wanted[begin:] == told else None
    return next((b for b in range(known_end, -1, -1) if wanted[b : b + len(told)] == told), None)


def _harshest(cuts: Sequence[Cut]) -> Cut | None:
    """Returns the cut that may lose the most progress."""

    def kept(cut: Cut) -> int:
        return 0 if cut.damage else _LOSING.index(cut.how) if cut.how in _LOSING else len(_LOSING)

    return min(cuts, key=kept, default=None)


def _too_much_again(again: list[Told], cut: Cut, program: Program) -> list[str]:
    """Checks that a signal repeats only an unfinished evaluation, and an exception only one call of the step."""
    if cut.how in ("kill", "leave", "exit") or cut.damage:
        return []
    if cut.how != "error":
        others = [told for told in again if told.kind not in _EVALUATION]
        return [f"events: repeated after {cut.how}: {again}"] if others else []
    if program.donate:
        return []  # a failed donating step loses its input state, so the run resumes from the last checkpoint
    steps = sum(told.kind == "StepEnd" for told in again)
    return [f"events: {steps} steps are repeated after an error"] if steps > program.steps_per_call else []


def _where_apart(told: list[Told], wanted: list[Told], known_end: int) -> str:
    """Describes the first event that differs from the uninterrupted run, at the placement with the longest match."""
    best, at = -1, 0
    for begin in range(known_end, -1, -1):
        same = 0
        while same < len(told) and begin + same < len(wanted) and told[same] == wanted[begin + same]:
            same += 1
        if same > best:
            best, at = same, begin
    got = repr(told[best]) if best < len(told) else "nothing"
    should = repr(wanted[at + best]) if at + best < len(wanted) else "nothing"
    return f"expected {should}, got {got} (event {at + best} of {len(wanted)})"


def _json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = writers.read_jsonl(path)
    for record in records:
        for clock in ("time", "timestamp"):
            record.pop(clock, None)
        # As text, because NaN equals nothing.
        record["metrics"] = {name: str(value) for name, value in _of_run(record.get("metrics", {})).items()}
    return [record for record in records if record["metrics"]]


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # A resumed run may add columns in another order, or for rows that a rewind removed. Without epochs, because compile
    # times, logged at FitEnd, set that of a session's last row.
    points = [
        {name: str(value) for name, value in sorted(_of_run(row).items()) if name not in ("time", "epoch")}
        for row in writers.read_csv(path)
    ]
    return [point for point in points if point.keys() - {"step"}]


def _of_run(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics without compile times, because each session compiles separately."""
    return {name: value for name, value in metrics.items() if not name.startswith("compile/")}


def _doubled(rows: list[dict[str, Any]]) -> list[str]:
    seen = set()
    found: list[str] = []
    for row in rows:
        key = (row.get("event"), str(row.get("step")), row.get("index"))
        if key in seen:
            found.append(f"duplicate points for {key}")
        seen.add(key)
    return found


def _first_difference(got: list[Any], wanted: list[Any]) -> str:
    for a, b in zip(got, wanted, strict=False):
        if a != b:
            return f"expected {b}, got {a}"
    longer = max(got, wanted, key=len)
    return f"expected {len(wanted)} points, got {len(got)}: {longer[min(len(got), len(wanted))]}"


def _unordered(history: Any) -> list[str]:
    return [
        f"{name}: expected increasing steps, got {series.steps.tolist()}"
        for name, series in history.items()
        if any(a >= b for a, b in zip(series.steps, series.steps[1:], strict=False))
    ]


def _points(history: Any) -> dict[tuple[str, int], float]:
    return {
        (name, int(step)): float(value)
        for name, series in _of_run(history).items()
        for step, value in zip(series.steps, series.values, strict=True)
    }


def signature(line: str) -> str:
    """Returns a problem line with its digits masked, so that failures of one kind have one signature."""
    return re.sub(r"\[#(, #)*\]", "[#]", re.sub(r"-?\d[\d.e+-]*", "#", line))[:100]
