"""Rewinds and resumes commute: a run interrupted anywhere rewinds to the same states as an uninterrupted run."""

import os
import signal

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing, tree

pytestmark = pytest.mark.slow

STEPS = 14


def rewinds(*asked):
    """Requests each rewind ``(at step, number of steps)`` once: the count survives because ``Rewound`` writes it."""

    def update(state, event: fx.StepEnd | fx.Rewound, memory):
        if isinstance(event, fx.Rewound):
            return memory + 1, fx.Control()
        done = int(memory)
        due = done < len(asked) and event.step == asked[done][0]
        return memory, fx.Control(rewind=asked[done][1] if due else 0, reason="a test")

    return fx.stateful("asked", lambda state: torch.tensor(0), update)


def trace():
    def update(state, event: fx.StepEnd, memory):
        return memory * 31 + event.step, fx.Control()

    return fx.stateful("trace", lambda state: torch.tensor(0), update)


def advance(state, batch):
    """Changes each leaf by the batch and by noise of the step, as a training step does, but in microseconds."""
    noise = torch.rand((), generator=torch.Generator().manual_seed(int(state.seed) + int(state.step)))

    def change(leaf):
        return 0.9 * leaf + batch["x"].mean() + noise if leaf.is_floating_point() else leaf + 1

    trained = {name: tree.map(change, getattr(state, name)) for name in ("params", "buffers", "opt_state")}
    return state.replace(step=state.step + 1, **trained), fx.StepOutput({"loss": noise})


def fit(
    folder, asked, *, interrupt_at=None, step=advance, snapshot_every=2, snapshots=2, saves=5, steps=STEPS, **options
):
    fired, count = [], 0

    def watch(state, event, control):
        nonlocal count
        if isinstance(event, fx.Rewound | fx.StepEnd):
            fired.append((type(event).__name__, event.step, getattr(event, "to_step", None)))
            count += 1
            if count == interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)

    callbacks = [rewinds(*asked), trace()]
    if saves:
        callbacks.append(fx.when(fx.every(saves), fx.callbacks.save()))
    result = fx.fit(
        problem.start(),
        step,
        problem.data(),
        callbacks=callbacks,
        observers=[fx.observers.required(watch)],
        checkpointer=fx.checkpointer(folder, keep=2),
        snapshot_every=snapshot_every,
        snapshots=snapshots,
        steps=steps,
        resume=True,
        **options,
    )
    return result, fired


def assert_equal_wherever_cut(tmp_path, asked, *, first=1, stride=1, **options):
    whole, whole_fired = fit(tmp_path / "whole", asked, **options)
    for cut in range(first, len(whole_fired), stride):
        folder = tmp_path / str(cut)
        sessions = [fit(folder, asked, interrupt_at=at, **options) for at in (cut, 2, None)]
        fired = [each for _, events in sessions for each in events]
        assert fired == whole_fired, f"cut after {cut} events; {[result.reason for result, _ in sessions]}"
        resumed, _ = sessions[-1]
        assert resumed.reason == whole.reason
        testing.assert_equal(resumed.state, whole.state, f"cut after {cut} events")


ASKED = [((7, 2),), ((7, 1), (9, 4)), ((6, 1), (6, 1), (11, 2)), ((9, 9),), ((3, 2), (8, 7))]
RETAINED = {
    "both": {},
    "snapshots": {"saves": None},
    "checkpoints": {"snapshot_every": None},
    "host": {"snapshots_on_host": True, "snapshots": 3},
}


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("kind", RETAINED)
def test_interrupted_run_rewinds_to_the_same_states(tmp_path, asked, kind):
    """Cuts at every third event. The kinds start at different ones, so together they cut each run at all events."""
    first = 1 + (ASKED.index(asked) + list(RETAINED).index(kind)) % 3
    assert_equal_wherever_cut(tmp_path, asked, first=first, stride=3, **RETAINED[kind])


def test_interrupted_training_rewinds_to_the_same_states(tmp_path):
    assert_equal_wherever_cut(tmp_path, ((7, 1),), step=problem.step(), steps=9, stride=3)


def test_save_of_an_interrupt_is_not_a_target(tmp_path):
    asked = ((6, 1),)
    fit(tmp_path, asked, interrupt_at=4, saves=3, snapshot_every=None)
    _, fired = fit(tmp_path, asked, saves=3, snapshot_every=None)
    assert ("Rewound", 6, 3) in fired


def test_save_at_the_start_of_a_session_is_not_a_target(tmp_path):
    def save(state, event: fx.FitBegin):
        return state, fx.Control(save=True)

    def rewind(state, event: fx.StepEnd):
        return state, fx.Control(rewind=1 if event.step == 4 else 0)

    options = {"checkpointer": fx.checkpointer(tmp_path), "callbacks": [save, rewind]}
    result = fx.fit(problem.start(), problem.step(), problem.data(), steps=6, **options)
    assert result.reason == "a rewind of 1 steps was requested at step 4, but no retained state is that old"
    assert options["checkpointer"].steps() == [0, 4]


def test_damaged_snapshot_is_skipped(tmp_path):
    asked = ((7, 1),)
    fit(tmp_path, asked, interrupt_at=7, saves=None)
    (newest,) = (path for path in tmp_path.iterdir() if path.name.endswith("-snapshot-step-000000006"))
    (newest / "leaves.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        _, fired = fit(tmp_path, asked, saves=None)
    assert ("Rewound", 7, 4) in fired


def test_lost_snapshots_are_not_targets_of_a_run_continued_in_memory():
    def rewind(state, event: fx.StepEnd):
        return state, fx.Control(rewind=3 if event.step == 6 else 0)

    options = {"snapshot_every": 2, "snapshots": 2, "callbacks": rewind}
    first = fx.fit(problem.start(), problem.step(), problem.data(), steps=4, **options)
    assert first.state.slots["loop/snapshots"].tolist() == [0, 2]
    second = fx.fit(first.state, problem.step(), problem.data(), steps=8, **options)
    assert second.reason == "a rewind of 3 steps was requested at step 6, but no retained state is that old"


def test_folder_holds_only_listed_snapshots(tmp_path):
    result, _ = fit(tmp_path, (), saves=3)
    listed = [step for step in result.state.slots["loop/snapshots"].tolist() if step >= 0]
    found = sorted(int(path.name[-9:]) for path in tmp_path.iterdir() if "-snapshot-" in path.name)
    assert found == listed == [10, 12]
