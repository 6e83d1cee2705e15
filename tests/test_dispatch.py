"""Multi-step calls: several steps in one graph, with the results and events of single steps."""

from typing import Any, NamedTuple

import problem
import pytest
import torch

import fxtrain as fx

K = 4
DATA = problem.data(8, seed=3)  # two calls per epoch


def same(first, second):
    return all(map(torch.equal, fx.tree.leaves(first), fx.tree.leaves(second)))


def taken(step, state, batches):
    outputs = []
    for batch in batches:
        state, output = step(state, batch)
        outputs.append(output)
    return state, outputs


def counting(stop_at=None):
    """Returns a traced callback that counts its calls and stops at ``stop_at``."""

    def update(state, event: fx.Updated, memory):
        stop = event.step == stop_at if stop_at is not None else False
        return memory + 1, fx.Control(stop=stop, reason=f"it is step {stop_at}")

    return fx.stateful("calls", lambda state: torch.tensor(0), update)


class Compiled(NamedTuple):
    """A state with its step, compiled as it is and with two steps per call."""

    state: fx.TrainState
    single: Any
    several: Any
    donating: Any


@pytest.fixture(scope="module")
def compiled():
    tx = fx.optim.adamw(fx.schedules.cosine(1e-2, 100))
    module = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Dropout(0.2))
    step = fx.train_step(problem.loss_fn, tx, callbacks=counting())
    return Compiled(
        fx.attach(fx.init(module, tx), step),
        fx.compile(step),
        fx.compile(step, steps_per_call=2, on_recompile="error"),
        fx.compile(step, steps_per_call=2, on_recompile="error", donate=True),
    )


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
def test_multi_step_call_equals_single_steps_bitwise(compiled, donate):
    single, outputs = taken(compiled.single, compiled.state, DATA[:2])
    several = compiled.donating if donate else compiled.several
    together, many = several.multi_step(compiled.state.copy(), DATA[:2])
    assert same(together, single)
    assert [float(output.metrics["loss"]) for output in many] == [float(o.metrics["loss"]) for o in outputs]
    assert int(together.slots["calls"]) == 2


@pytest.mark.slow
def test_compiled_multi_step_run_equals_single_steps(compiled):
    plain = fx.fit(compiled.state, compiled.single, DATA, epochs=1)
    together = fx.fit(compiled.state, compiled.several, DATA, epochs=1)
    assert same(together.state, plain.state)
    assert together.history["train/loss"].values.tolist() == plain.history["train/loss"].values.tolist()


def run(steps_per_call, callbacks=(), data=DATA, **options):
    step = problem.Together(problem.step(callbacks=callbacks), steps_per_call)
    seen = []

    def watch(state, event: fx.Event, control):
        kind = type(event).__name__
        seen.append((kind, event.step, event.position))

    options = {"epochs": 2, "callbacks": callbacks, "observers": [watch], **options}
    return fx.fit(problem.start(), step, data, **options), seen


def ordered(seen):
    """Drops ``StepBegin`` events, which are emitted together for all steps of a call."""
    return [moment for moment in seen if moment[0] != "StepBegin"]


@pytest.mark.parametrize("k", [2, 3, 4, 8, 9])
@pytest.mark.parametrize("limit", [{"epochs": 2}, {"steps": 13}])
def test_multi_step_run_emits_the_events_of_single_steps(k, limit):
    plain, plain_seen = run(1, **{"epochs": None, **limit})
    together, seen = run(k, **{"epochs": None, **limit})
    assert ordered(seen) == ordered(plain_seen)
    assert sorted(seen) == sorted(plain_seen)
    assert same(together.state, plain.state)
    for name in {*plain.history} - {"compile/graphs", "compile/seconds"}:
        curve = plain.history[name]
        assert together.history[name].values.tolist() == curve.values.tolist()


class Streamed:
    """An iterable without a length."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(DATA[: self.count])


@pytest.mark.parametrize("count", [6, 8])
def test_unknown_epoch_length_gives_the_events_of_single_steps(count):
    plain, plain_seen = run(1, data=Streamed(count), epochs=2)
    together, seen = run(K, data=Streamed(count), epochs=2)
    assert ordered(seen) == ordered(plain_seen)
    assert same(together.state, plain.state)


@pytest.mark.parametrize("stop_at", range(1, 10))
def test_stop_inside_a_call_skips_its_remaining_steps(stop_at):
    callbacks = counting(stop_at)
    result, seen = run(K, callbacks)
    assert result.reason == f"it is step {stop_at}"
    assert int(result.state.step) == int(result.state.slots["calls"]) == int(result.state.position) == stop_at
    assert [step for kind, step, _ in seen if kind == "StepEnd"] == list(range(1, stop_at + 1))
    assert same(result.state.params, run(1, callbacks)[0].state.params)


def test_requests_at_step_end_apply_after_the_whole_call(tmp_path):
    def save(state, event: fx.StepEnd):
        return state, fx.Control(save=event.step == 2, reason="it is step 2")

    checkpointer = fx.checkpointer(tmp_path)
    result, _ = run(K, save, steps=K, epochs=None, checkpointer=checkpointer)
    assert checkpointer.steps() == [K]
    assert result.reason == f"reached {K} steps"


def test_resume_after_interrupt_equals_the_uninterrupted_run(tmp_path):
    whole, _ = run(K)

    def interrupt(state, event: fx.StepEnd, control):
        if event.step == 6:
            raise KeyboardInterrupt

    step = problem.Together(problem.step(), K)
    save = fx.when(fx.every(3), fx.callbacks.save())
    with pytest.raises(KeyboardInterrupt):
        fx.fit(
            problem.start(),
            step,
            DATA,
            epochs=2,
            callbacks=save,
            observers=[interrupt],
            checkpointer=fx.checkpointer(tmp_path),
        )
    resumed = fx.fit(
        problem.start(), step, DATA, epochs=2, callbacks=save, checkpointer=fx.checkpointer(tmp_path), resume=True
    )
    assert same(resumed.state.params, whole.state.params)
    assert int(resumed.state.step) == int(whole.state.step)


@pytest.mark.parametrize(("snapshot_every", "way"), [(4, (8, 4)), (3, (7, 6))])
def test_rewind_returns_to_a_snapshot_taken_by_snapshot_every(snapshot_every, way):
    went = []

    def go_back(state, event: fx.StepEnd):
        return state, fx.Control(rewind=1 if event.step == 7 and not went else 0, reason="once")

    def watch(state, event: fx.Rewound, control):
        went.append((event.from_step, event.to_step))

    run(K, go_back, snapshot_every=snapshot_every, observers=[watch])
    assert went == [way]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda step: fx.compile(step, steps_per_call=0),
            ValueError,
            "expected steps_per_call to be a positive int, got 0",
        ),
        (
            lambda step: fx.compile(step, steps_per_call=True),
            TypeError,
            "expected steps_per_call to be a positive int, got True",
        ),
        (
            lambda step: fx.compile(problem.eval_step, steps_per_call=2),
            ValueError,
            "expected steps_per_call=1 for an evaluation step, got 2",
        ),
        (
            lambda step: fx.compile(step, steps_per_call=2).multi_step(problem.start(), DATA[:3]),
            ValueError,
            r"expected 2 batches \(steps_per_call\), got 3",
        ),
        (
            lambda step: fx.compile(step, mode="ahead-of-time", dynamic=True),
            ValueError,
            "expected mode='ahead-of-time' without backend and dynamic",
        ),
    ],
)
def test_invalid_arguments_are_refused(make, error, said):
    with pytest.raises(error, match=said):
        make(problem.step())


def test_callback_on_step_begin_is_refused():
    def skip(state, event: fx.StepBegin):
        return state, fx.Control(skip_batch=event.step == 2)

    with pytest.raises(ValueError, match="no callback on StepBegin with steps_per_call=4, got skip"):
        run(K, skip)


def test_many_accepts_one_step_per_call():
    state, step = problem.train()
    state, (output,) = fx.compile(step, backend="eager").multi_step(state, [problem.SMALL_BATCH])
    assert int(state.step) == 1
    assert "loss" in output.metrics


def test_remainder_of_an_epoch_runs_as_single_steps(monkeypatch):
    calls = []
    many, one = problem.Together.multi_step, problem.Together.__call__
    monkeypatch.setattr(problem.Together, "multi_step", lambda self, *given: (calls.append(3), many(self, *given))[1])
    monkeypatch.setattr(problem.Together, "__call__", lambda self, *given: (calls.append(1), one(self, *given))[1])
    run(3)
    assert calls == [3, 3, 1, 1, 3, 3, 1, 1]
