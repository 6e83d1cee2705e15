"""Random training programs, run whole, cut and resumed, obey the laws of benchmarks.fuzz, and violations are detected.

These tests run a few hundred programs. ``python -m benchmarks.fuzz`` runs thousands. A failure prints the smallest
program that fails in the same way.
"""

import pytest
import torch

import fxtrain as fx
from benchmarks.fuzz import build, check, draw, laws, order, shrink
from benchmarks.fuzz.program import Ask, Cut, Program

FIRST, CHUNKS, CHUNK = 0, 10, 30  # seeds


def refuse_failure(program, seconds=40.0):
    verdict = check.check(program)
    if not verdict.problems:
        return
    kind = laws.signature(verdict.problems[0])

    def fails(tried):
        return any(laws.signature(line) == kind for line in check.check(tried).problems)

    smallest = shrink.shrink(program, fails, seconds=seconds)
    problems = "\n  ".join(line[:400] for line in check.check(smallest).problems)
    pytest.fail(f"seed {program.seed}, shrunk: {smallest}\n  {problems}", pytrace=False)


@pytest.mark.parametrize("first", range(FIRST, FIRST + CHUNKS * CHUNK, CHUNK))
def test_random_programs_obey_the_laws(first):
    for seed in range(first, first + CHUNK):
        refuse_failure(draw.draw(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_compiled_programs_obey_the_laws(seed):
    refuse_failure(draw.draw(seed, compiled=True), seconds=0.0)


def test_program_is_determined_by_seed_and_by_its_repr():
    for seed in range(200):
        program = draw.draw(seed)
        assert program == draw.draw(seed) == eval(repr(program))


def test_random_programs_cover_all_kinds():
    programs = [draw.draw(seed) for seed in range(1000)]
    for field in ("source", "evaluate", "steps_per_call", "lag", "donate", "writers", "saves", "observed"):
        assert len({getattr(program, field) for program in programs}) > 1, field
    assert {cut.how for program in programs for cut in program.cuts} >= {"SIGINT", "SIGTERM", "error", "leave", "kill"}
    assert {ask.kind for program in programs for ask in program.asks} >= {
        *("stop", "save", "rewind", "evaluate", "end_epoch", "skip_batch")
    }


CUT = Program(
    epochs=2, evaluate="2", counted=("StepEnd",), cuts=(Cut(at=4, event="StepEnd"),), writers=("jsonl", "csv")
)


def test_callback_state_outside_slots_is_detected(monkeypatch):
    def forgetful():
        seen = []

        def update(state, event: fx.StepEnd):
            seen.append(event.step)
            params = fx.tree.map(lambda leaf: leaf + len(seen), state.params)
            return state.replace(params=params), fx.Control()

        return update

    assert not check.check(CUT).problems
    monkeypatch.setitem(build.READY, "forgetful", forgetful)
    problems = check.check(CUT.replace(callbacks=("forgetful",))).problems
    assert {line.partition(":")[0] for line in problems} >= {"state", "events", "history", "jsonl", "csv"}


def test_modified_input_state_is_detected(monkeypatch):
    def writes():
        def update(state, event: fx.FitBegin):
            GIVEN[-1].params["0.bias"].add_(1.0)
            return state, fx.Control()

        return update

    state_of = build.state_of
    monkeypatch.setattr(build, "state_of", lambda program: GIVEN.append(state_of(program)) or GIVEN[-1])
    monkeypatch.setitem(build.READY, "writes", writes)
    problems = check.check(Program(steps=1, callbacks=("writes",))).problems
    assert any("input: the state given to fit was changed" in line for line in problems)


GIVEN = []


def test_endless_program_is_stopped(monkeypatch):
    def never_moves():
        return lambda state, event: (state, fx.Control())

    monkeypatch.setitem(build.READY, "endless", never_moves)
    monkeypatch.setattr("benchmarks.fuzz.session.MOST_EVENTS", 20)
    (problem, *_) = check.check(Program(steps=100)).problems
    assert "HungError: more than 20 events" in problem


def test_illegal_event_order_is_detected():
    program = Program(epochs=2, evaluate="2")
    whole = check.whole_session(program)
    assert not order.problems(whole.events, program, is_whole=True)
    assert [told.kind for told in whole.events[:3]] == ["FitBegin", "EpochBegin", "StepBegin"]
    for index in range(len(whole.events)):
        without = whole.events[:index] + whole.events[index + 1 :]
        assert order.problems(without, program, is_whole=True), f"without {whole.events[index]}"
        if whole.events[index].kind == "Saved":
            continue  # Saved may be repeated
        twice = whole.events[: index + 1] + whole.events[index:]
        assert order.problems(twice, program, is_whole=True), f"twice {whole.events[index]}"


def test_shrinking_keeps_cause_of_failure():
    def fails(program):
        return program.lag == 1 and any(ask.kind == "stop" for ask in program.asks)

    asks = (Ask(kind="save", at=3), Ask(kind="stop", event="EvalEnd", at=7), Ask(kind="rewind"))
    program = Program(epochs=3, batches=4, lag=1, asks=asks, donate=True, callbacks=("ema",), cuts=(Cut(),))
    smallest = shrink.shrink(program, fails)
    assert smallest == Program(
        epochs=1, batches=1, rows=1, eval_batches=1, snapshots=1, lag=1, asks=(Ask(event="EvalEnd"),)
    )
    assert torch.get_num_threads() == 1
