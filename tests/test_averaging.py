"""Weight averages: exact values, skipped steps, and evaluation of the average while the live weights train."""

import dataclasses

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.callbacks import averaged, ema, swa


def updated(step, skipped=False):
    loss = torch.tensor(0.0)
    return fx.Updated(
        step=torch.tensor(step),
        loss=loss,
        metrics={"loss": loss},
        grads={},
        updates={},
        skipped=torch.tensor(skipped),
    )


def averages(callback, first, values, skipped=()):
    """Returns the averaged parameter after each step, given the values of the live parameter."""
    composed = fx.compose(callback)
    state = fx.attach(fx.init({"w": torch.tensor(float(first))}), composed)
    seen = []
    for step, value in enumerate(values, start=1):
        state = state.replace(params={"w": torch.tensor(float(value))})
        state, _ = composed(state, updated(step, step in skipped))
        seen.append(float(averaged(state, composed.handlers[0].slot).params["w"]))
    return seen


class TestValues:
    @pytest.mark.parametrize(
        ("options", "values", "wanted"),
        [
            ({}, [8, 8, 0], [4, 6, 3]),
            ({}, [0, 0, 0], [0, 0, 0]),
            ({"debias": True}, [8, 8, 0], [8, 8, 24 / 7]),  # (0.125 8 + 0.25 8 + 0.5 0) / 0.875
            ({"debias": True}, [8, 0, 0], [8, 8 / 3, 8 / 7]),
            ({"every": 2}, [8, 8, 0, 0], [0, 4, 4, 2]),
            ({"start": 2}, [8, 6, 2, 2], [8, 6, 4, 3]),  # before the start, the parameters themselves
            ({"start": 1, "every": 2}, [8, 6, 2, 2], [8, 7, 7, 4.5]),
            ({"start": 2, "debias": True}, [8, 6, 2, 4], [8, 6, 2, 10 / 3]),
            ({"warmup": True}, [10, 10], [9, 9 + 9 / 11]),  # decays of 1/10 and 2/11
            ({"warmup": True, "every": 2}, [10, 10, 10, 10], [0, 9, 9, 9 + 9 / 11]),
        ],
    )
    def test_ema_values(self, options, values, wanted):
        assert averages(ema(0.5, **options), 0, values) == pytest.approx(wanted, rel=1e-6)

    @pytest.mark.parametrize(
        ("options", "values", "wanted"),
        [
            ({"start": 0}, [3, 5, 7], [3, 4, 5]),
            ({"start": 1}, [3, 5, 7], [3, 5, 6]),
            ({"start": 2}, [3, 5, 7], [3, 5, 7]),
            ({"start": 5}, [3, 5, 7], [3, 5, 7]),
            ({"start": 0, "every": 2}, [3, 5, 7, 9], [0, 5, 5, 7]),
            ({"start": 1, "every": 3}, [3, 5, 7, 9, 1, 3], [3, 3, 7, 7, 7, 5]),
        ],
    )
    def test_swa_values(self, options, values, wanted):
        assert averages(swa(**options), 0, values) == pytest.approx(wanted, rel=1e-6)

    @pytest.mark.parametrize("callback", [ema(0.5), ema(0.5, debias=True), swa(start=0)])
    def test_skipped_step_does_not_update_average(self, callback):
        with_skips = averages(callback, 0, [8, 100, 4, 100], skipped=(2, 4))
        assert with_skips[0] == with_skips[1]
        assert with_skips[2] == with_skips[3]
        assert [with_skips[0], with_skips[2]] == averages(callback, 0, [8, 4])

    def test_integer_buffers_are_copied(self):
        composed = fx.compose(ema(0.5, buffers=True))
        module = torch.nn.BatchNorm1d(2)
        state = fx.attach(fx.init(module), composed)
        buffers = {**state.buffers, "running_mean": torch.full((2,), 4.0), "num_batches_tracked": torch.tensor(7)}
        state, _ = composed(state.replace(buffers=buffers), updated(1))
        seen = averaged(state)
        assert seen.buffers["running_mean"].tolist() == [2.0, 2.0]
        assert int(seen.buffers["num_batches_tracked"]) == 7

    def test_half_precision_and_complex_parameters(self):
        composed = fx.compose(ema(0.5))
        params = {"half": torch.tensor(4.0, dtype=torch.bfloat16), "complex": torch.tensor(2.0 + 4.0j)}
        state = fx.attach(fx.init(tree.zeros_like(params)), composed)
        state, _ = composed(state.replace(params=params), updated(1))
        assert averaged(state).params["half"].dtype == torch.bfloat16
        assert float(averaged(state).params["half"]) == 2.0
        assert complex(averaged(state).params["complex"]) == 1 + 2j

    @pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999, 0.999999, 0.99999999])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("options", [{}, {"debias": True}, {"warmup": True}])
    def test_weight_of_new_value_is_exact(self, decay, dtype, options):
        composed = fx.compose(ema(decay, **options))
        state = fx.attach(fx.init({"w": torch.zeros(2, dtype=dtype)}), composed)
        average, weight = 0.0, 0.0
        for step in range(1, 4):
            state = state.replace(params={"w": torch.full((2,), float(step), dtype=dtype)})
            state, _ = composed(state, updated(step))
            share = max(1 - decay, 9 / (9 + step)) if "warmup" in options else 1 - decay
            if "debias" in options:
                weight += share * (1 - weight)
                share /= weight
            average += share * (step - average)
        rel = 1e-12 if dtype == torch.float64 else 5e-7
        assert averaged(state).params["w"].tolist() == pytest.approx([average] * 2, rel=rel, abs=0)

    @pytest.mark.parametrize("count", [10**6, 2**24 + 1, 10**9])
    def test_swa_still_updates_after_many_steps(self, count):
        composed = fx.compose(swa(start=0))
        state = fx.attach(fx.init({"w": torch.zeros(2)}), composed)
        memory = state.slots["swa"]._replace(count=torch.tensor(count))
        state = state.with_slot("swa", memory).replace(params={"w": torch.ones(2)})
        state, _ = composed(state, updated(count + 1))
        assert averaged(state, "swa").params["w"].tolist() == pytest.approx([1 / (count + 1)] * 2, rel=1e-6, abs=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_average_does_not_stall(self, dtype):
        composed = fx.compose(ema(0.999))
        state = fx.attach(fx.init({"w": torch.ones(2, dtype=dtype)}), composed)
        state = state.replace(params={"w": torch.full((2,), 2.0, dtype=dtype)})
        for step in range(1, 1001):
            state, _ = composed(state, updated(step))
        seen = averaged(state).params["w"]
        assert seen.dtype == dtype
        assert seen.tolist() == pytest.approx([2 - 0.999**1000] * 2, rel=1e-2)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ema(1.0), "expected decay to be between 0 and 1, got 1.0"),
            (lambda: ema(0.5, every=0), "expected every to be a positive int or a trigger, got 0"),
            (lambda: ema(0.5, start=-1), "expected start to be an int of at least 0, got -1"),
            (lambda: swa(start=1.5), "expected start to be an int of at least 0, got 1.5"),
        ],
    )
    def test_arguments_are_validated(self, make, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make()

    def test_missing_average_is_named(self):
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), ema(0.5, name="slow"))
        with pytest.raises(KeyError, match="expected a state with the average 'ema', got one with 'slow'"):
            averaged(state)

    @pytest.mark.parametrize("callback", [ema(0.9), ema(0.9, debias=True, warmup=True, every=2), swa(start=1)])
    def test_callback_laws_hold(self, callback):
        events = [updated(step, step == 3) for step in range(1, 6)]
        testing.check_laws(callback, fx.init(torch.nn.Linear(2, 1)), events)


class TestRun:
    def test_average_updates_once_per_step_not_per_microbatch(self):
        average = ema(0.5)
        step = problem.step(callbacks=average, accumulate=2)
        state, _ = step(fx.attach(problem.start(), average), problem.data()[0])
        assert int(state.slots["ema"].count) == 1

    @pytest.mark.parametrize("compiled", [False, True])
    def test_resume_at_every_step_is_exact(self, compiled, tmp_path):
        average = fx.compose(ema(0.9, warmup=True, buffers=True), swa(start=3, every=2))
        step = problem.step(callbacks=average)
        step = fx.compile(step) if compiled else step
        options = {"callbacks": average}
        whole = fx.fit(problem.start(), step, problem.data(), steps=12, **options).state
        for cut in range(1, 12, 3 if compiled else 1):
            folder = fx.checkpointer(tmp_path / f"{compiled}{cut}")
            fx.fit(problem.start(), step, problem.data(), steps=cut, checkpointer=folder, **options)
            again = fx.fit(
                problem.start(), step, problem.data(), steps=12, checkpointer=folder, resume=True, **options
            ).state
            testing.assert_equal(again, whole, f"cut after {cut}")

    def test_eval_view_evaluates_average_and_saves_live_weights(self, tmp_path):
        average = ema(0.5)
        step = problem.step(callbacks=average)
        options = {
            "callbacks": fx.compose(average, fx.when(fx.every(3), fx.callbacks.save())),
            "eval_step": problem.eval_step,
            "eval_data": problem.data(seed=1),
            "steps": 6,
        }
        folders = [fx.checkpointer(tmp_path / name) for name in ("live", "viewed")]
        live = fx.fit(problem.start(), step, problem.data(), checkpointer=folders[0], **options)
        viewed = fx.fit(
            problem.start(),
            step,
            problem.data(),
            eval_view=averaged,
            checkpointer=folders[1],
            **options,
        )
        # The states differ only in the metrics of the last evaluation.
        mine, other = (
            dataclasses.replace(state, slots={"ema": state.slots["ema"]}) for state in (viewed.state, live.state)
        )
        testing.assert_equal(mine, other, "the run")
        wanted = fx.evaluate(averaged(viewed.state), problem.eval_step, problem.data(seed=1))
        assert viewed.history["eval/loss"].values[-1] == wanted["loss"]
        assert live.history["eval/loss"].values[-1] != wanted["loss"]
        saved = folders[1].restore(viewed.state, step=6)
        testing.assert_equal(saved.params, viewed.state.params, "the checkpoint")

    @pytest.mark.parametrize("batch", range(problem.BATCHES))
    def test_interrupted_evaluation_saves_live_weights(self, batch, tmp_path):
        average = ema(0.5)
        step = problem.step(callbacks=average)
        live = {}

        def note(state, event: fx.StepEnd, control):
            live["params"] = tree.clone(state.params)

        def interrupt(state, event: fx.EvalStep):
            if event.index == batch:
                raise RuntimeError("in the middle of an evaluation")
            return state, fx.Control()

        with pytest.raises(RuntimeError, match="in the middle"):
            fx.fit(
                problem.start(),
                step,
                problem.data(),
                steps=2,
                callbacks=fx.compose(average, interrupt),
                eval_step=problem.eval_step,
                eval_data=problem.data(),
                eval_view=averaged,
                observers=[note],
                checkpointer=fx.checkpointer(tmp_path),
            )
        like = fx.attach(problem.start(), average)
        saved = fx.checkpointer(tmp_path).restore(like)
        testing.assert_equal(saved.params, live["params"], "the checkpoint")
        assert int(saved.step) == 2

    def test_eval_view_requires_evaluation(self):
        with pytest.raises(ValueError, match="expected eval_step and eval_data with eval_view, got neither"):
            fx.fit(problem.start(), problem.step(), problem.data(), steps=1, eval_view=averaged)
