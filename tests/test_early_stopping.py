"""The evaluation, step or epoch at which early stopping stops, from tables written by hand."""

import pytest
import torch
from stops import INF, NAN, evaluations, number_of, stop_of

import fxtrain as fx
from fxtrain.callbacks import early_stopping
from fxtrain.core import Epoch

PATIENCE = [  # NaN counts as no improvement
    ({"patience": 1}, [3, 2, 1, 0], None),
    ({"patience": 1}, [3, 4], 2),
    ({"patience": 1}, [3, 3], 2),  # a tie is no improvement
    ({"patience": 2}, [3, 4, 2, 4, 3], 5),
    ({"patience": 2}, [3, 4, 3, 2], 3),
    ({"patience": 3}, [1, 2, 2, 0.5, 1, 1, 1], 7),
    ({"patience": 2}, [NAN, NAN], 2),
    ({"patience": 2}, [NAN, 1, NAN, 0.5, NAN, NAN], 6),
    ({"patience": 2}, [INF, INF], 2),
    ({"patience": 1}, [-INF, -INF], 2),
    ({"patience": 2, "min_delta": 0.5}, [3, 2.5, 2.5], 3),  # exactly min_delta better is not enough
    ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.4, 2, 1.8], None),
    ({"patience": 1, "mode": "max"}, [1, 2, 3, 2.9], 4),
    ({"patience": 2, "mode": "max", "min_delta": 1.0}, [0, 1, 0.5], 3),
    ({"patience": 2, "baseline": 1.0}, [3, 2], 2),  # never better than the baseline
    ({"patience": 2, "baseline": 1.0}, [3, 0.9, 1, 0.8, 1, 1], 6),
    ({"patience": 1, "mode": "max", "baseline": 0.5}, [0.4], 1),
]
RELATIVE = [
    ({}, [10, 9.5, 9.0], 3),  # 9 is exactly a tenth better, which is not enough
    ({}, [10, 8.9, 8.0], None),  # 8.01 would be enough
    ({}, [10, 8.9, 8.1, 8.1], 4),
    ({}, [-10, -10.5, -10.9], 3),
    ({}, [-10, -11.5, -13, -15], None),
    ({"mode": "max"}, [10, 10.5, 11], 3),
    ({"mode": "max"}, [10, 11.5, 12.9, 14.3], None),
    ({"mode": "max"}, [-10, -9.5, -8.5, -7], None),
    ({}, [0, -0.0, 0], 3),  # a tenth of 0 is 0, and a tie is no improvement
    ({}, [INF, 5, 4.9, 4.8], 4),
    ({}, [NAN, NAN, 1], 2),
    ({"mode": "max"}, [NAN, 1, 1.05, 1.09], 4),
]
STEPS = [  # one evaluation per 10 steps
    (5, [1, 2], 2),
    (10, [1, 2], 2),
    (11, [1, 2], None),
    (11, [1, 2, 2], 3),
    (20, [1, 0.5, 0.7, 0.6], 4),
    (20, [1, 0.5, 0.7, 0.4, 0.5], None),
    (30, [1, 1, 1, 1], 4),
    (30, [1, 1, 1, 0], None),
    (10, [NAN], 1),
    (20, [NAN, NAN], 2),
    (20, [NAN, 1, NAN, NAN], 4),
    (1, [3, 2, 1], None),
]
EPOCHS = [  # one evaluation per 10 batches, 20 batches per epoch
    (1, [1, 2, 2], 3),
    (1, [1, 2, 0], None),
    (1, [1, 2, 0, 1, 1], 5),
    (2, [1, 2, 2, 2, 2], 5),
    (2, [1, 2, 2, 2, 0], None),
    (1, [NAN, NAN], 2),
    (1, [NAN], None),
    (2, [NAN, NAN, NAN, NAN], 4),
    (1, [1, 1, 1], 3),
    (3, [1] * 7, 7),
    (3, [1] * 6, None),
]
START = [
    ({"start_from": 2, "patience": 1}, [1, 2, 3], None),  # watching starts at the third, which is the best so far
    ({"start_from": 2, "patience": 1}, [0, 0, 3, 4], 4),
    ({"start_from": 2, "patience": 2}, [0, 0, 3, 4], None),
    ({"start_from": 2, "patience": 2}, [0, 0, 3, 4, 5], 5),
    ({"start_from": 1, "patience": 1}, [NAN, 2, 1], None),
    ({"start_from": 1, "patience": 1}, [NAN, 2, 2], 3),
    ({"start_from": 3, "patience": 1}, [NAN, NAN, NAN, NAN], 4),
    ({"start_from": 20, "unit": "steps", "patience": 10}, [1, 2, 2], 3),
    ({"start_from": 20, "unit": "steps", "patience": 10}, [1, 2, 1, 2], 4),
    ({"start_from": 30, "unit": "steps", "patience": 10}, [1, 2, 3, 2, 3], 5),
    ({"start_from": 1, "unit": "epochs", "patience": 1}, [1, 2, 2, 2], 4),
    ({"start_from": 1, "unit": "epochs", "patience": 1}, [1, 2, 3, 1, 1, 1], 6),
]


class TestEarlyStopping:
    @pytest.mark.parametrize(("options", "values", "stop"), PATIENCE)
    def test_stops_after_patience_evaluations(self, options, values, stop):
        assert number_of(early_stopping("loss", **options), values) == stop

    @pytest.mark.parametrize(("options", "values", "stop"), RELATIVE)
    def test_relative_min_delta_scales_with_the_best(self, options, values, stop):
        rule = early_stopping("loss", patience=2, min_delta=0.1, relative=True, **options)
        assert number_of(rule, values) == stop

    @pytest.mark.parametrize(("patience", "values", "stop"), STEPS)
    def test_patience_counts_steps(self, patience, values, stop):
        rule = early_stopping("loss", patience=patience, unit="steps")
        assert number_of(rule, values) == stop

    @pytest.mark.parametrize(("patience", "values", "stop"), EPOCHS)
    def test_patience_counts_epochs(self, patience, values, stop):
        rule = early_stopping("loss", patience=patience, unit="epochs")
        assert number_of(rule, values) == stop

    @pytest.mark.parametrize(("options", "values", "stop"), START)
    def test_start_from_delays_watching(self, options, values, stop):
        assert number_of(early_stopping("loss", **options), values) == stop

    @pytest.mark.parametrize(("dtype", "stop"), [(torch.float64, None), (torch.float32, 3)])
    def test_float64_metrics_are_compared_in_float64(self, dtype, stop):
        values = [1.0, 1.0 - 1e-12, 1.0 - 2e-12, 1.0 - 3e-12]
        events = [fx.EvalEnd(step=i, metrics={"loss": torch.tensor(v, dtype=dtype)}) for i, v in enumerate(values)]
        found = stop_of(early_stopping("loss", patience=2), events)
        assert (found and found[0]) == stop

    def test_float64_evaluation_keeps_its_precision(self):
        tx = fx.optim.sgd(1e-12)
        step = fx.train_step(lambda model, batch: model["w"] * batch, tx)
        data = [torch.tensor(1.0, dtype=torch.float64)]
        state = fx.init({"w": torch.tensor(1.0, dtype=torch.float64)}, tx)
        evaluate = fx.eval_step(lambda model, batch: {"w": model["w"] * batch})
        rule = early_stopping("w", patience=1)
        result = fx.fit(state, step, data, callbacks=rule, eval_step=evaluate, eval_data=data, epochs=5)
        assert result.reason == "finished 5 epochs"

    def test_mode_function_decides_improvement(self):
        def nearer_to_one(value, best):
            return best.isnan() | ((value - 1).abs() < (best - 1).abs())

        rule = early_stopping("loss", patience=2, mode=nearer_to_one)
        assert number_of(rule, [3, -0.5, 0.8, 1.1, 1.1, 0.9]) == 6
        assert number_of(early_stopping(lambda metrics: metrics["loss"].abs(), patience=1), [-3, 2, -1, -2]) == 4

    def test_patience_starts_at_the_current_step(self):
        state = fx.init(torch.nn.Linear(1, 1)).replace(step=torch.tensor(1000), position=torch.tensor(1000))
        events = [
            fx.EvalEnd(step=s, position=s, epoch_length=10, metrics={"loss": torch.tensor(NAN)}) for s in (1010, 1020)
        ]
        rule = early_stopping("loss", patience=20, unit="steps")
        assert stop_of(rule, events, state)[0] == 2
        rule = early_stopping("loss", patience=2, unit="epochs")
        assert stop_of(rule, events, Epoch(done=100, start=1000, length=10).written_to(state))[0] == 2

    def test_best_and_waited_are_logged(self):
        composed = fx.compose(early_stopping("loss", patience=3))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), composed)
        logs = []
        for event in evaluations([3.0, 2.5, 2.75]):
            state, control = composed(state, event)
            logs.append({name: float(entry.value) for name, entry in control.log.items() if bool(entry.when)})
        assert logs == [
            {"early_stopping/best": 3.0, "early_stopping/waited": 0.0},
            {"early_stopping/best": 2.5, "early_stopping/waited": 0.0, "early_stopping/improved_by": 0.5},
            {"early_stopping/best": 2.5, "early_stopping/waited": 1.0},
        ]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"patience": 0}, "expected patience to be a positive int, got 0"),
            ({"patience": 1.5, "unit": "steps"}, "expected patience to be a positive int, got 1.5"),
            ({"patience": 1, "min_delta": -1.0}, "expected min_delta to be a finite number of at least 0, got -1.0"),
            ({"patience": 1, "min_delta": NAN}, "expected min_delta to be a finite number of at least 0, got nan"),
            ({"patience": 1, "mode": "least"}, "expected mode to be 'min', 'max' or a function .*, got 'least'"),
            ({"patience": 1, "unit": "hours"}, "expected unit to be one of 'evaluations', 'steps', 'epochs'"),
            ({"patience": 1, "start_from": -1}, "expected start_from to be an int of at least 0, got -1"),
            ({"patience": 1, "mode": torch.lt, "min_delta": 0.1}, "expected mode .* with min_delta or relative"),
        ],
    )
    def test_invalid_options_are_refused(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            early_stopping("loss", **options)

    def test_unknown_epoch_length_is_refused(self):
        with pytest.raises(ValueError, match="expected data with a known epoch length"):
            number_of(early_stopping("loss", patience=1, unit="epochs"), [1.0], epoch_length=None)

    def test_unknown_metric_error_lists_the_metrics(self):
        with pytest.raises(KeyError, match="expected the metric 'acc' at EvalEnd for early_stopping, got 'loss'"):
            number_of(early_stopping("acc", patience=1), [1.0])
