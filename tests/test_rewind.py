"""Rewinds: their target, the state that survives them, and their limits."""

import os
import signal

import problem
import pytest
import torch
from problem import fit, recorder

import fxtrain as fx
from fxtrain import testing


def rewind_once(at, steps):
    """Requests one rewind. The slot survives it because it is written at ``Rewound``."""

    def callback(state, event: fx.StepEnd | fx.Rewound):
        done = state.slots["once"]
        if isinstance(event, fx.Rewound):
            return state.with_slot("once", done + 1), fx.Control()
        return state, fx.Control(rewind=steps if event.step == at and not int(done) else 0)

    return fx.slotted("once", lambda state: torch.tensor(0), callback)


class TestRewind:
    @pytest.mark.parametrize("where", ["device", "host", "disk"])
    def test_returns_to_the_newest_state_of_sufficient_age(self, tmp_path, where):
        fired = []
        options = {"snapshot_every": 2, "snapshots": 5, "snapshots_on_host": where == "host"}
        callbacks = [rewind_once(at=5, steps=2)]
        if where == "disk":
            options = {"checkpointer": fx.checkpointer(tmp_path, keep=None)}
            callbacks.append(fx.when(fx.every(2), fx.callbacks.save()))
        result = fit(callbacks=callbacks, observers=[recorder(fired)], **options)
        (rewound,) = [event for event in fired if isinstance(event, fx.Rewound)]
        assert (rewound.from_step, rewound.to_step, rewound.abandoned, rewound.times) == (5, 2, range(2, 5), 1)
        steps = [event.step for event in fired if isinstance(event, fx.StepEnd)]
        assert steps == [1, 2, 3, 4, 5, 3, 4, 5, 6]
        straight = fit(steps=6)
        for field in ("params", "buffers", "opt_state", "position", "step"):
            testing.assert_equal(getattr(result.state, field), getattr(straight.state, field), field)
        assert int(result.state.slots["once"]) == 1
        assert result.history["train/loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]

    def test_is_saved_and_not_repeated_by_a_resume(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path, keep=None, background=False)

        def interrupt(state, event, control):
            if isinstance(event, fx.Saved) and event.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        options = {"checkpointer": checkpoints, "snapshot_every": 2, "snapshots": 5}
        # The run saves at step 4, rewinds to step 2, and ends right after.
        callbacks = [rewind_once(at=5, steps=2), fx.when(fx.at(4), fx.callbacks.save())]
        first = fit(callbacks=callbacks, observers=[fx.observers.required(interrupt)], **options)
        assert int(first.state.step) == 2
        assert checkpoints.latest() == 2
        fired = []
        fit(callbacks=callbacks, observers=[recorder(fired)], resume=True, **options)
        assert not [event for event in fired if isinstance(event, fx.Rewound)]
        assert [event.step for event in fired if isinstance(event, fx.StepEnd)] == [3, 4, 5, 6]

    def test_drops_other_requests_of_the_step(self):
        def asks(state, event: fx.StepEnd):
            return state, fx.Control(evaluate=event.step == 3)

        fired = []
        fit(
            callbacks=[rewind_once(at=3, steps=1), asks],
            snapshot_every=1,
            eval_step=problem.eval_step,
            eval_data=problem.data(1),
            eval_when=lambda event: False,
            observers=[recorder(fired)],
            steps=4,
        )
        evaluations = [event.step for event in fired if isinstance(event, fx.EvalEnd)]
        assert evaluations == [3]  # only in the second pass over step 3

    def test_rewind_limit_stops_the_run(self):
        def always(state, event: fx.StepEnd):
            return state, fx.Control(rewind=1 if event.step == 3 else 0)

        result = fit(callbacks=always, snapshot_every=2, rewind_limit=2)
        assert result.reason == "rewound to step 2 3 times, more than rewind_limit=2 allows"

    def test_run_stops_without_a_state_of_sufficient_age(self):
        result = fit(callbacks=rewind_once(at=2, steps=1))
        assert result.reason == "a rewind of 1 steps was requested at step 2, but no retained state is that old"
