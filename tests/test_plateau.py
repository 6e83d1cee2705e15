"""Callbacks that change hyperparameters between steps: exact timing and values, without recompilation."""

import functools
import math

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import optim, testing
from fxtrain.callbacks import reduce_on_plateau, schedule_hyperparam

NAN, INF = math.nan, math.inf


def transform(**options):
    return optim.inject_hyperparams(optim.sgd)(**{"learning_rate": 1.0, **options})


def evaluations(values):
    return [
        fx.EvalEnd(step=step, metrics={"loss": torch.tensor(float(value))})
        for step, value in enumerate(values, start=1)
    ]


def rates(callback, values):
    """Returns the learning rate after each evaluation."""
    composed = fx.compose(callback)
    state = fx.attach(fx.init(torch.nn.Linear(1, 1), transform()), composed)
    seen = []
    for event in evaluations(values):
        state, _ = composed(state, event)
        seen.append(float(optim.get_hyperparams(state.opt_state)["learning_rate"]))
    return seen


TABLE = [
    ({"patience": 0}, [3, 2, 1], [1, 1, 1]),
    ({"patience": 0}, [3, 3, 3], [1, 0.5, 0.25]),
    ({"patience": 1}, [3, 3, 3, 3, 3], [1, 1, 0.5, 0.5, 0.25]),
    ({"patience": 1}, [3, 4, 2, 3, 1], [1, 1, 1, 1, 1]),
    ({"patience": 2}, [3, 3, 3, 3, 3, 3, 3], [1, 1, 1, 0.5, 0.5, 0.5, 0.25]),
    ({"patience": 0, "cooldown": 2}, [3, 3, 3, 3, 3], [1, 0.5, 0.5, 0.5, 0.25]),
    ({"patience": 1, "cooldown": 1}, [3, 3, 3, 3, 3, 3], [1, 1, 0.5, 0.5, 0.5, 0.25]),
    ({"patience": 0, "minimum": 0.3}, [3, 3, 3, 3], [1, 0.5, 0.3, 0.3]),
    ({"patience": 0, "minimum": 2.0}, [3, 3], [1, 1]),  # a value below the minimum is not raised
    ({"patience": 0, "mode": "max"}, [1, 2, 2, 3], [1, 1, 0.5, 0.5]),
    ({"patience": 0, "min_delta": 0.5, "relative": False}, [3, 2.6, 2.4], [1, 0.5, 0.5]),
    ({"patience": 0, "min_delta": 0.1}, [10, 9.5, 8.9], [1, 0.5, 0.5]),
    ({"patience": 0}, [NAN, NAN], [0.5, 0.25]),
    ({"patience": 0}, [INF, 1, INF], [0.5, 0.5, 0.25]),
    ({"patience": 1}, [1, NAN, NAN], [1, 1, 0.5]),
]


@pytest.mark.parametrize("margin", [{"min_delta": 0.1}, {"relative": True}])
def test_margin_with_a_mode_function_is_refused(margin):
    reduce_on_plateau("loss", mode=torch.lt)
    with pytest.raises(ValueError, match="expected mode to be 'min' or 'max' with min_delta or relative"):
        reduce_on_plateau("loss", mode=torch.lt, **margin)


@pytest.mark.parametrize(("options", "values", "wanted"), TABLE)
def test_learning_rate_is_reduced_at_exact_evaluations(options, values, wanted):
    assert rates(reduce_on_plateau("loss", factor=0.5, **options), values) == pytest.approx(wanted)


@pytest.mark.parametrize("patience", [0, 1, 2])
@pytest.mark.parametrize("cooldown", [0, 1, 3])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_reduce_on_plateau_matches_torch(patience, cooldown, mode):
    values = torch.rand(40, generator=torch.Generator().manual_seed(patience + 10 * cooldown)).tolist()
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=0.5, patience=patience, cooldown=cooldown, min_lr=0.01, eps=0.0
    )
    wanted = []
    for value in values:
        scheduler.step(value)
        wanted.append(optimizer.param_groups[0]["lr"])
    rule = reduce_on_plateau("loss", factor=0.5, patience=patience, cooldown=cooldown, minimum=0.01, mode=mode)
    assert rates(rule, values) == pytest.approx(wanted)


def test_new_value_is_logged():
    tx = optim.chain(
        optim.inject_hyperparams(optim.add_decayed_weights)(weight_decay=0.1),
        transform(),
    )
    composed = fx.compose(reduce_on_plateau("loss", patience=0, factor=0.5, hyperparam="weight_decay", name="decay"))
    state = fx.attach(fx.init(torch.nn.Linear(1, 1), tx), composed)
    for event in evaluations([1, 1]):
        state, control = composed(state, event)
    assert {name: float(entry.value) for name, entry in control.log.items()} == pytest.approx(
        {"decay/weight_decay": 0.05}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0}, "expected factor to be between 0 and 1, got 1.0"),
        ({"patience": -1}, "expected patience to be an int of at least 0, got -1"),
        ({"cooldown": 0.5}, "expected cooldown to be an int of at least 0, got 0.5"),
        ({"mode": "up"}, "expected mode to be 'min', 'max' or a function .*, got 'up'"),
        ({"min_delta": -1.0}, "expected min_delta to be a finite number of at least 0, got -1.0"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        reduce_on_plateau("loss", **options)


def test_missing_hyperparameter_is_rejected():
    composed = fx.compose(reduce_on_plateau("loss"))
    state = fx.attach(fx.init(torch.nn.Linear(1, 1), optim.sgd(0.1)), composed)
    with pytest.raises(ValueError, match=r"expected a hyperparameter in the optimizer state .*, got 'learning_rate'"):
        composed(state, evaluations([1])[0])


def test_hyperparameter_callbacks_obey_callback_laws():
    state = fx.init(torch.nn.Linear(1, 1), transform(momentum=0.9))
    testing.check_laws(reduce_on_plateau("loss", patience=1, factor=0.5), state, evaluations([3, 3, 3, 2, NAN, 2]))
    steps = [fx.EpochBegin(step=0), *(fx.StepEnd(step=step, metrics={}) for step in (1, 2, 3))]
    testing.check_laws(schedule_hyperparam("momentum", lambda step: 1 / (2.0 + step)), state, steps)


class TestInFit:
    def compiled(self, tx):
        return fx.compile(fx.train_step(problem.loss_fn, tx), backend="eager", on_recompile="error")

    def run(self, callback, tx, steps=6, step=None, **options):
        step = step or self.compiled(tx)
        options = {"eval_step": problem.eval_step, "eval_data": problem.data(), "eval_when": fx.every(1), **options}
        return fx.fit(fx.init(problem.module(), tx), step, problem.data(), steps=steps, callbacks=callback, **options)

    def test_reduction_does_not_recompile(self):
        result = self.run(reduce_on_plateau("loss", patience=0, factor=0.5, mode="max"), transform(learning_rate=0.1))
        assert float(optim.get_hyperparams(result.state.opt_state)["learning_rate"]) < 0.1

    def test_scheduled_callback_matches_optimizer_schedule(self):
        schedule = fx.schedules.cosine(0.1, 6)
        inside = self.run((), transform(learning_rate=schedule))
        outside = self.run(schedule_hyperparam("learning_rate", schedule), transform(learning_rate=0.1))
        testing.assert_equal(outside.state.params, inside.state.params, "the run")

    def test_resumed_run_matches_uninterrupted_run(self, tmp_path):
        callback = fx.compose(
            reduce_on_plateau("loss", patience=1, factor=0.5),
            schedule_hyperparam("momentum", fx.schedules.linear(0.9, 0.5, transition_steps=12)),
        )
        tx = transform(learning_rate=0.1, momentum=0.9)
        run = functools.partial(self.run, callback, tx, step=self.compiled(tx))
        whole = run(steps=12).state
        for cut in range(1, 12, 2):
            checkpointer = fx.checkpointer(tmp_path / str(cut))
            run(steps=cut, checkpointer=checkpointer)
            again = run(steps=12, checkpointer=checkpointer, resume=True).state
            testing.assert_equal(again, whole, f"cut after {cut}")
