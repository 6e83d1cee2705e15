"""Callbacks of transformers in ``fit``, and side by side with ``Trainer``."""

import ast
import doctest

import pytest
import torch
from hugging_face import Model, TrainerCallback, arguments, batches, fit, loss_fn, rows, transformers

import fxtrain as fx
from fxtrain import testing

HOOKS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


def test_early_stopping_stops(tmp_path):
    result = fit(fx.interop.hf(transformers.EarlyStoppingCallback(3)), lr=0.0, epochs=9)
    assert result.reason == "EarlyStoppingCallback set should_training_stop"
    assert int(result.state.step) == 4 * 3


class Recorder(TrainerCallback):
    """Records each call with what it sees."""

    def __init__(self):
        self.calls = []
        self.kwargs = set()

    def record(self, name, state, control, kwargs):
        flags = tuple(vars(control).values())
        values = kwargs.get("logs", kwargs.get("metrics"))
        seen = None if values is None else {key: value for key, value in values.items() if "per_second" not in key}
        seen = seen and {key: value for key, value in seen.items() if "runtime" not in key and key != "total_flos"}
        weights = [round(float(value), 5) for value in kwargs["model"].linear.weight.detach().flatten()]
        self.calls.append((name, state.global_step, state.epoch, flags, seen, weights, state.best_metric))
        self.kwargs |= kwargs.keys()


def _recording(name):
    def hook(self, args, state, control, **kwargs):
        self.record(name, state, control, kwargs)

    return hook


for _name in HOOKS:
    setattr(Recorder, _name, _recording(_name))


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_by_trainer(callbacks, args, lr=0.1):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = InOrder(
        model, args, train_dataset=rows(), eval_dataset=rows(), callbacks=callbacks, optimizers=(optimizer, schedule)
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def compare(ours, theirs):
    """Checks that two recorders saw the same calls. Values may differ by rounding."""
    assert [call[0] for call in ours.calls] == [call[0] for call in theirs.calls]
    for mine, other in zip(ours.calls, theirs.calls, strict=True):
        assert mine[1] == other[1], (mine, other)
        assert mine[2] == pytest.approx(other[2]), (mine, other)
        assert mine[3] == other[3], (mine, other)
        logs = mine[4] and {name: value for name, value in mine[4].items() if name in other[4]}
        assert logs == (other[4] and pytest.approx(other[4], rel=1e-4)), (mine, other)
        assert mine[5] == pytest.approx(other[5], abs=2e-5), (mine, other)
        assert mine[6] == (other[6] and pytest.approx(other[6], rel=1e-4)), (mine, other)
    assert ours.kwargs == theirs.kwargs


class StopAt(TrainerCallback):
    """Ends the run, or each epoch, at a step."""

    def __init__(self, step, flag):
        self.step, self.flag = step, flag

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 3 == self.step:
            setattr(control, self.flag, True)


CASES = {
    "evaluation per epoch": {"eval_strategy": "epoch", "logging_steps": 2},
    "evaluation every two steps": {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 4},
    "log per epoch": {"eval_strategy": "epoch", "logging_strategy": "epoch"},
    "first step": {"eval_strategy": "no", "logging_steps": 5, "logging_first_step": True},
    "steps end within an epoch": {"max_steps": 4, "eval_strategy": "epoch", "logging_steps": 1},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "eval_strategy": "epoch"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("flag", [None, "should_training_stop", "should_epoch_stop", "should_evaluate", "should_log"])
def test_calls_are_those_of_trainer(tmp_path, case, flag):
    if flag == "should_evaluate" and case in ("steps end within an epoch", "accumulation"):
        pytest.skip("Trainer evaluates the same weights twice, at the step and at the end of the epoch")
    options = {"num_train_epochs": 3, "max_grad_norm": 0.0, "save_strategy": "no", "metric_for_best_model": "loss"}
    args = arguments(tmp_path, **options, greater_is_better=False, **CASES[case])
    stops = [] if flag is None else [StopAt(1, flag)]
    theirs, ours = Recorder(), Recorder()
    train_by_trainer([*stops, theirs], args)
    callback = fx.interop.hf(transformers.DefaultFlowCallback(), *stops, ours, args=args)
    length = {"steps": args.max_steps} if args.max_steps > 0 else {"epochs": 3}
    monitor = fx.callbacks.grad_norms()
    step = {"accumulate": args.gradient_accumulation_steps}
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    tx = fx.optim.sgd(0.1)
    fx.fit(
        fx.init(Model(), tx),
        fx.train_step(loss_fn, tx, **step),
        batches(size),
        callbacks=[monitor, callback],
        eval_step=fx.eval_step(loss_fn),
        eval_data=batches(),
        eval_when=lambda event: False,
        **length,
    )
    compare(ours, theirs)


class TestCallbacksOfTransformers:
    """Side by side with Trainer, on the same data."""

    def run_both(self, tmp_path, make, **options):
        args = arguments(tmp_path, num_train_epochs=6, max_grad_norm=0.0, save_strategy="no", **options)
        trainer = train_by_trainer([make()], args, lr=0.3)
        tx = fx.optim.sgd(0.3)
        result = fx.fit(
            fx.init(Model(), tx),
            fx.train_step(loss_fn, tx),
            batches(),
            callbacks=[fx.callbacks.grad_norms(), fx.interop.hf(transformers.DefaultFlowCallback, make(), args=args)],
            eval_step=fx.eval_step(loss_fn),
            eval_data=batches(),
            eval_when=lambda event: False,
            epochs=6,
        )
        return trainer, result

    @pytest.mark.parametrize("patience", [1, 2, 3])
    @pytest.mark.parametrize("strategy", ["epoch", "steps"])
    def test_early_stopping_stops_at_the_same_step(self, tmp_path, patience, strategy):
        options = {
            "metric_for_best_model": "loss",
            "greater_is_better": True,
            "eval_strategy": strategy,
            "eval_steps": 2,
        }
        trainer, result = self.run_both(tmp_path, lambda: transformers.EarlyStoppingCallback(patience), **options)
        assert trainer.state.global_step < 18
        assert int(result.state.step) == trainer.state.global_step
        assert result.reason == "EarlyStoppingCallback set should_training_stop"

    def test_printer_prints_the_same_lines(self, tmp_path, capsys):
        def lines():
            found = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
            kept = ("loss", "eval_loss", "grad_norm", "learning_rate", "epoch", "train_loss")
            return [{key: float(value) for key, value in line.items() if key in kept} for line in found]

        args = {"logging_steps": 2, "eval_strategy": "epoch"}
        options = arguments(tmp_path, num_train_epochs=2, max_grad_norm=0.0, save_strategy="no", **args)
        train_by_trainer([], options)  # which has a printer itself, since progress bars are disabled
        capsys.readouterr()
        self.run_both(tmp_path, transformers.PrinterCallback, **args)
        both = lines()
        assert len(both) % 2 == 0
        theirs, ours = both[: len(both) // 2], both[len(both) // 2 :]
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=2e-3)

    def test_progress_shows_steps_evaluations_and_logs(self, tmp_path, capsys):
        self.run_both(tmp_path, transformers.ProgressCallback, logging_steps=2, eval_strategy="epoch")
        err = capsys.readouterr().err
        assert err.count("18/18") >= 2
        assert err.count("3/3") >= 2  # of the evaluations, whose number of batches is known

    def test_tensorboard_has_the_same_scalars(self, tmp_path, monkeypatch):
        loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        found = []
        for folder in ("theirs", "ours"):
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / folder))
            args = {"logging_steps": 2, "eval_strategy": "epoch"}
            if folder == "theirs":
                options = arguments(tmp_path, num_train_epochs=6, max_grad_norm=0.0, save_strategy="no", **args)
                train_by_trainer([transformers.integrations.TensorBoardCallback()], options, lr=0.3)
            else:
                made = transformers.integrations.TensorBoardCallback()
                options = arguments(tmp_path, num_train_epochs=6, max_grad_norm=0.0, save_strategy="no", **args)
                callback = fx.interop.hf(transformers.DefaultFlowCallback, made, args=options)
                fit([fx.callbacks.grad_norms(), callback], lr=0.3, epochs=6, eval_when=lambda event: False)
            accumulator = loading.EventAccumulator(str(tmp_path / folder))
            accumulator.Reload()
            found.append(
                {
                    tag: [(point.step, point.value) for point in accumulator.Scalars(tag)]
                    for tag in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
                }
            )
        theirs, ours = found
        for tag, points in theirs.items():
            assert [step for step, _ in ours[tag]] == [step for step, _ in points], tag
            assert [value for _, value in ours[tag]] == pytest.approx([value for _, value in points], rel=1e-3), tag


class TestArguments:
    def test_data_has_a_length_only_unless_it_is_given(self):
        seen = []

        class Look(TrainerCallback):
            def on_epoch_end(self, args, state, control, train_dataloader, eval_dataloader, processing_class, **kwargs):
                seen.append((train_dataloader, eval_dataloader, processing_class))

        fit(fx.interop.hf(Look), epochs=1)
        train, evaluation, processing = seen[0]
        assert (len(train), len(evaluation), processing) == (3, 3, None)
        with pytest.raises(TypeError, match=r"expected train_dataloader to be given for a callback that reads batches"):
            iter(train)
        loader, tokenizer = [1, 2], object()
        fit(fx.interop.hf(Look, train_dataloader=loader, processing_class=tokenizer), epochs=1)
        assert seen[1][0] is loader
        assert seen[1][2] is tokenizer

    def test_state_shows_the_length_of_the_run(self):
        seen = []

        class Look(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                seen.append((state.max_steps, state.num_train_epochs, state.train_batch_size))
                assert state.is_world_process_zero
                assert state.is_local_process_zero

        fit(fx.interop.hf(Look), epochs=4)
        fit(fx.interop.hf(Look), steps=4)
        assert seen == [(12, 4, 2), (4, 2, 2)]

    def test_saves_are_announced_and_name_the_best_checkpoint(self, tmp_path):
        seen = []

        class Look(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                seen.append((state.global_step, control.should_save))

            def on_evaluate(self, args, state, control, metrics, **kwargs):
                control.should_save = True

            def on_train_end(self, args, state, control, **kwargs):
                seen.append(state.best_model_checkpoint)

        fit(fx.interop.hf(Look), epochs=3, checkpointer=fx.checkpointer(tmp_path, keep=9))
        assert seen[:3] == [(3, False), (6, False), (9, False)]
        assert "9" in str(seen[-1])
        assert str(tmp_path) in str(seen[-1])

    def test_methods_outside_fit_are_called_by_hf_event(self):
        class Look(TrainerCallback):
            def __init__(self):
                self.calls = []

            def on_predict(self, args, state, control, metrics, **kwargs):
                self.calls.append(metrics)

            def on_push_begin(self, args, state, control, **kwargs):
                self.calls.append("push")

        made = Look()
        callback = fx.interop.hf(made)
        state = fx.attach(fx.init(Model()), callback)
        state = fx.interop.hf_event("on_predict", state, [callback], metrics={"loss": 0.5})
        state = fx.interop.hf_event("on_push_begin", state, [callback])
        assert made.calls == [{"test_loss": 0.5}, "push"]
        other = Look()
        fx.interop.hf_event("on_push_begin", state, fx.interop.hf(other))
        assert other.calls == [{"test_loss": 0.5}, "push", "push"]  # those in the slot too


class TestErrors:
    def test_value_that_is_no_callback(self):
        with pytest.raises(
            TypeError, match=r"expected callbacks of transformers, got the function <lambda>\. Give callbacks of f"
        ):
            fx.interop.hf(lambda state, event: (state, fx.Control()))
        with pytest.raises(ValueError, match="expected a callback of transformers, got none"):
            fx.interop.hf()

    def test_state_of_several_runs(self):
        callback = fx.interop.hf(transformers.EarlyStoppingCallback)
        state = fx.attach(fx.init(Model()), callback)
        stacked = state.replace(step=torch.zeros(3, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"expected a state of one run for hf/EarlyStoppingCallback, got one of 3"):
            callback(stacked, fx.StepEnd(step=1, metrics={}))

    def test_state_of_several_models(self):
        callback = fx.interop.hf(StopAt(1, "should_log"))
        state = fx.attach(fx.init({"a": Model(), "b": Model()}), callback)
        with pytest.raises(
            ValueError, match="expected a state of one module for callbacks of transformers, got one of"
        ):
            callback(state, fx.StepEnd(step=1, metrics={}))

    def test_missing_best_metric_is_named_before_the_first_step(self, tmp_path):
        args = arguments(tmp_path, eval_strategy="epoch", metric_for_best_model="accuracy")
        with pytest.raises(ValueError, match="expected the metric 'accuracy' at EvalEnd for hf/EarlyStoppingCallback"):
            fit(fx.interop.hf(transformers.EarlyStoppingCallback, args=args), steps=1)

    def test_slot_that_is_not_attached(self):
        callback = fx.interop.hf(transformers.EarlyStoppingCallback)
        with pytest.raises(KeyError, match=r"expected the state to have the slot 'hf/EarlyStoppingCallback', got none"):
            callback(fx.init(Model()), fx.StepEnd(step=1, metrics={}))

    def test_event_that_fit_fires(self):
        with pytest.raises(ValueError, match="expected hook to be"):
            fx.interop.hf_event("on_save", fx.init(Model()), fx.interop.hf(Recorder))
        with pytest.raises(ValueError, match=r"expected callbacks made by fxtrain\.interop\.hf, got none"):
            fx.interop.hf_event("on_predict", fx.init(Model()), fx.callbacks.grad_norms())


@pytest.mark.parametrize("function", [fx.interop.hf, fx.interop.hf_event])
def test_examples_run(function):
    text = function.__doc__.replace("  # doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(text, {}, function.__name__, None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test)
    assert runner.summarize().failed == 0


def test_laws_hold():
    callback = fx.interop.hf(StopAt(2, "should_training_stop"), transformers.EarlyStoppingCallback(1))
    losses = [torch.tensor(value) for value in (1.0, 3.0, 2.0)]
    events = [
        event
        for step, loss in enumerate(losses, 1)
        for event in (
            fx.StepEnd(step=step, position=step, epoch_length=9, metrics={"loss": loss}),
            fx.Published(step=step, event=fx.StepEnd(step=step, metrics={}), log={"train/loss": loss}),
            fx.EvalEnd(step=step, metrics={"loss": loss}),
        )
    ]
    state = fx.attach(fx.init(Model()), callback)
    for check in (testing.check_identity, testing.check_purity, testing.check_monotone, testing.check_resume):
        check(callback, state, events)
