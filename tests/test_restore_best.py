"""The best state of a run: each improvement is saved, and the best is restored at the end."""

import pytest
import torch
from stops import NAN, evaluations

import fxtrain as fx
from fxtrain import testing
from fxtrain.callbacks import early_stopping, restore_best, save_best


class TestSaveBest:
    step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), fx.optim.sgd(0.75))

    def saved(self, folder, steps, **options):
        """Trains with an evaluation at each step and returns the steps of all checkpoints."""
        # w: 1.5, 0.75, 1.125, 0.9375, 1.03125
        checkpointer = fx.checkpointer(folder, keep=None, best="far", mode=options.get("mode", "min"))
        fx.fit(
            fx.init({"w": torch.tensor(0.0)}, fx.optim.sgd(0.75)),
            self.step,
            [torch.tensor(1.0)],
            steps=steps,
            callbacks=save_best("far", **options),
            eval_step=fx.eval_step(lambda model, batch: {"far": (model["w"] - batch).abs()}),
            eval_data=[torch.tensor(1.0)],
            checkpointer=checkpointer,
            resume=True,
        )
        return checkpointer.steps(), checkpointer.best()

    def test_each_improvement_is_saved(self, tmp_path):
        assert self.saved(tmp_path, 5) == ([1, 2, 3, 4, 5], 5)

    def test_evaluations_without_improvement_are_not_saved(self, tmp_path):
        assert self.saved(tmp_path, 5, mode="max") == ([1, 5], 1)  # the last is the session's own

    def test_margin_is_compared_with_the_saved_value(self, tmp_path):
        assert self.saved(tmp_path, 4, min_delta=0.3) == ([1, 3, 4], 3)  # far: 0.5, 0.25, 0.125, 0.0625

    def test_resumed_run_remembers_the_best(self, tmp_path):
        self.saved(tmp_path, 3, mode="max")
        assert self.saved(tmp_path, 5, mode="max") == ([1, 3, 5], 1)

    def test_unknown_mode_is_refused(self):
        with pytest.raises(ValueError, match="expected mode to be 'min', 'max' or a function"):
            save_best("far", mode="lowest")


class TestRestoreBest:
    # The metric is best after the first step, because the learning rate overshoots the minimum.
    tx = fx.optim.sgd(0.75)
    step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)

    def run(self, source=None, callbacks=(), state=None, **options):
        rule = restore_best("far", checkpointer=source)
        evaluate = fx.eval_step(lambda model, batch: {"far": (model["w"] - 1.6).abs()})
        return fx.fit(
            fx.init({"w": torch.tensor(0.0)}, self.tx) if state is None else state,
            self.step,
            [torch.tensor(1.0)],
            epochs=5,
            callbacks=[rule, *callbacks],
            eval_step=evaluate,
            eval_data=[torch.tensor(1.0)],
            **options,
        )

    def test_best_is_restored_from_memory(self):
        result = self.run()
        # w: 1.5, 0.75, 1.125, 0.9375, 1.03125
        assert float(result.state.params["w"]) == 1.5
        assert float(result.continue_from.params["w"]) == 1.03125

    def test_run_never_continues_from_restored_weights(self, tmp_path):
        result = self.run()
        with pytest.raises(ValueError, match=r"expected a state to continue .* Continue from result\.continue_from\."):
            self.run(state=result.state)
        with pytest.raises(ValueError, match=r"Continue from result\.continue_from"):
            fx.steps(result.state.copy(), self.step, [torch.tensor(1.0)], steps=9)
        with pytest.raises(ValueError, match=r"Continue from result\.continue_from"):
            self.run(state=fx.restore(fx.save(tmp_path / "best", result.state), result.continue_from))

    def test_resume_ignores_restored_weights(self, tmp_path):
        options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True}
        with pytest.raises(ValueError, match=r"Continue from result\.continue_from"):  # nothing is saved yet
            self.run(state=self.run().state, **options)
        first = self.run(**options)
        again = self.run(state=first.state, **options)
        testing.assert_equal(again.continue_from, first.continue_from, "resumed")
        restored = options["checkpointer"].restore(first.state)
        assert float(restored.params["w"]) == 1.03125
        assert fx.fit(restored, self.step, [torch.tensor(1.0)], steps=6).reason == "reached 6 steps"

    def test_only_the_final_state_changes(self):
        callback = fx.compose(fx.callbacks.restore_best("loss"))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        for value, event in zip([5.0, 1.0, 7.0], evaluations([0.5, 0.1, 0.3]), strict=True):
            params = {name: torch.full_like(leaf, value) for name, leaf in state.params.items()}
            state, _ = callback(state.replace(params=params), event)
        assert float(state.params["weight"]) == 7.0
        harvest, _ = callback(state, fx.FitEnd(step=30, reason=""))
        assert float(harvest.params["weight"]) == 1.0
        assert int(harvest.slots["restore_best"].step) == int(state.step)

    def test_final_state_is_last_without_evaluation(self):
        callback = fx.compose(fx.callbacks.restore_best("loss"))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        harvest, _ = callback(state, fx.FitEnd(step=0, reason=""))
        testing.assert_equal(harvest.params, state.params, "harvest")

    def test_baseline_of_early_stopping_does_not_matter(self):
        assert float(self.run(callbacks=[early_stopping("far", patience=99, baseline=0.01)]).state.params["w"]) == 1.5

    def test_mode_function_decides_the_best(self):
        def farther(value, best):
            return best.isnan() | (value > best)

        callback = fx.compose(restore_best("loss", mode=farther))
        state = fx.attach(fx.init({"w": torch.tensor(0.0)}), callback)
        for number, event in enumerate(evaluations([NAN, 1.0, 3.0, 2.0]), start=1):
            state = state.replace(step=torch.tensor(number), params={"w": torch.tensor(float(number))})
            state, _ = callback(state, event)
        assert float(callback(state, fx.FitEnd(step=4, reason=""))[0].params["w"]) == 3.0

    def test_checkpointer_must_be_one(self):
        with pytest.raises(TypeError, match="expected checkpointer to be a checkpointer or None, got 'disk'"):
            restore_best("loss", checkpointer="disk")

    def test_best_is_restored_from_the_checkpoint(self, tmp_path):
        checkpointer = fx.checkpointer(tmp_path, best="far")
        result = self.run(checkpointer, checkpointer=checkpointer)
        assert float(result.state.params["w"]) == 1.5
        assert float(result.continue_from.params["w"]) == 1.03125
        assert result.continue_from.slots["restore_best"].kept == ()
        assert 1 in checkpointer.steps()

    def test_missing_best_checkpoint_is_refused(self, tmp_path):
        checkpointer = fx.checkpointer(tmp_path, keep=1)
        with pytest.raises(ValueError, match=r"expected a checkpoint of step 1, where far was best, got steps"):
            self.run(checkpointer, checkpointer=checkpointer, callbacks=[fx.callbacks.save()])
