"""Requests of callbacks in the loop: saves, stops, skipped batches, ends of epochs and evaluations."""

import problem
import pytest
import torch
from problem import fit, recorder

import fxtrain as fx
from fxtrain import testing


class TestRequests:
    def test_save_contains_updates_of_later_callbacks(self, tmp_path):
        def late(state, event: fx.StepEnd, memory):
            return memory + event.step, fx.Control()

        late = fx.stateful("late", lambda state: torch.tensor(0), late)
        checkpoints = fx.checkpointer(tmp_path, keep=None)
        callbacks = [fx.when(fx.every(2), fx.callbacks.save()), late]  # the save request precedes the update
        result = fit(callbacks=callbacks, checkpointer=checkpoints, steps=5)
        for step in (2, 4, 5):
            assert int(checkpoints.restore(result.state, step=step).slots["late"]) == sum(range(step + 1))

    def test_save_contains_metrics_of_evaluation_at_same_step(self, tmp_path):
        saved = []
        fit(
            callbacks=fx.when(fx.every(2), fx.callbacks.save()),
            eval_step=problem.eval_step,
            eval_data=problem.data(1),
            eval_when=4,
            checkpointer=fx.checkpointer(tmp_path),
            observers=[fx.observers.required(lambda s, e, c: saved.append(e) if isinstance(e, fx.Saved) else None)],
        )
        assert [(event.step, sorted(event.metrics)) for event in saved] == [
            (2, []),
            (4, ["loss", "mae"]),
            (6, []),
        ]

    @pytest.mark.parametrize("unsaved", [False, True])
    def test_stop_ends_run_with_or_without_final_save(self, tmp_path, unsaved):
        def stop(state, event: fx.StepEnd):
            return state, fx.Control(stop=event.metrics["loss"] < 9, reason="low enough", final_save=not unsaved)

        checkpoints = fx.checkpointer(tmp_path)
        result = fit(callbacks=stop, checkpointer=checkpoints)
        assert result.reason == "low enough"
        assert int(result.state.step) == 1
        assert checkpoints.steps() == ([] if unsaved else [1])

    def test_later_callback_cannot_clear_stop(self):
        def stop(state, event: fx.StepEnd):
            return state, fx.Control(stop=True, reason="first")

        def objects(state, event: fx.StepEnd):
            return state, fx.Control(stop=False, reason="second")

        assert fit(callbacks=[stop, objects]).reason == "first"

    def test_skipped_batch_advances_position_but_not_step(self):
        def skip(state, event: fx.StepBegin):
            return state, fx.Control(skip_batch=event.position in (1, 3))

        steps = []
        result = fit(callbacks=skip, steps=3, observers=[recorder(steps)])
        assert (int(result.state.step), int(result.state.position)) == (3, 5)
        assert [e.position for e in steps if isinstance(e, fx.StepEnd)] == [1, 3, 5]

    def test_end_epoch_ends_epoch_early(self):
        def end(state, event: fx.StepEnd):
            return state, fx.Control(end_epoch=event.step == 1)

        fired = []
        result = fit(callbacks=end, epochs=2, steps=None, observers=[recorder(fired)])
        ends = [(e.step, e.epoch) for e in fired if isinstance(e, fx.EpochEnd)]
        assert ends == [(1, 1.0), (4, 2.0)]
        assert int(result.state.step) == 4

    def test_stop_at_step_begin_prevents_the_step(self):
        def stop(state, event: fx.StepBegin):
            return state, fx.Control(stop=event.step == 3, reason="enough")

        result = fit(callbacks=stop)
        assert (int(result.state.step), int(result.state.position)) == (2, 2)

    def test_traced_stop_read_one_step_late_gives_same_state(self):
        def stop(state, event: fx.Updated, memory):
            return memory + 1, fx.Control(stop=event.step == 3, reason="three")

        def watch(state, event: fx.StepBegin, memory):
            return memory + 1, fx.Control()

        callbacks = [
            fx.stateful("inside", lambda state: torch.tensor(0), stop),
            fx.stateful("outside", lambda state: torch.tensor(0), watch),
        ]
        step = problem.step(callbacks=callbacks[0])
        at_once, late = (fit(step=step, callbacks=callbacks, lag=lag) for lag in (0, 1))
        assert at_once.reason == late.reason == "three"
        assert int(late.state.step) == 3
        testing.assert_equal(late.state, at_once.state, "flags read one step late")

    def test_loop_stop_read_one_step_late_gives_same_state(self):
        def stop(state, event: fx.StepEnd):
            return state, fx.Control(stop=event.metrics["loss"] < 9, reason="low")

        at_once, late = (fit(callbacks=stop, lag=lag, steps=steps) for lag, steps in ((0, 6), (1, 6)))
        testing.assert_equal(late.state, at_once.state, "flags read one step late")
        assert fit(callbacks=stop, lag=1, steps=1).reason == "low"

    @pytest.mark.parametrize("where", ["inside", "StepEnd", "StepBegin", "EvalEnd", "EpochEnd"])
    @pytest.mark.parametrize("request_", ["none", "skip_batch", "end_epoch", "evaluate", "save", "rewind", "stop"])
    def test_requests_after_unread_stop_are_ignored(self, tmp_path, where, request_):
        stopped = torch.tensor(True)  # a tensor is read late, as a flag on a device is

        def stop(state, event, memory):
            asked = fx.Control(stop=stopped & (event.step == 3), reason="three")
            return memory + 1, asked

        def asks(state, event: fx.StepBegin, memory):
            after = event.step == 4
            asked = {"rewind": int(after)} if request_ == "rewind" else {request_: after} if request_ != "none" else {}
            return memory + 1, fx.Control(**asked, reason="too late")

        kind = fx.Updated if where == "inside" else getattr(fx, where)
        callbacks = [
            fx.stateful("stop", lambda state: torch.tensor(0), fx.on(kind, stop)),
            fx.stateful("asks", lambda state: torch.tensor(0), asks),
        ]
        step = problem.step(callbacks=callbacks[0] if where == "inside" else ())
        at_once, late = (
            fit(
                step=step,
                callbacks=callbacks,
                lag=lag,
                snapshot_every=1,
                eval_step=problem.eval_step,
                eval_data=problem.data(1),
                checkpointer=fx.checkpointer(tmp_path / str(lag)),
            )
            for lag in (0, 1)
        )
        assert at_once.reason == late.reason == "three"
        testing.assert_equal(late.state, at_once.state, "flags read one step late")

    def test_save_without_checkpointer_warns(self):
        with pytest.warns(UserWarning, match="expected a checkpointer .*, so nothing is saved"):
            fit(callbacks=fx.callbacks.save(), steps=1)

    def test_evaluation_request_without_eval_step_is_rejected(self):
        with pytest.raises(ValueError, match="expected eval_step and eval_data for an evaluation requested"):
            fit(callbacks=fx.callbacks.evaluate())
