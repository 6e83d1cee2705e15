"""Callbacks of transformers in ``fit``, and side by side with ``Trainer``."""

import doctest
import math

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

TrainerCallback = transformers.TrainerCallback
HOOKS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
X = torch.arange(12.0).reshape(6, 2) / 10


class Model(nn.Module):
    """A regression whose loss Trainer and fxtrain can both compute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, labels=None):
        out = self.drop(self.linear(x))
        return {"loss": (out - labels).square().mean(), "logits": out}


def rows():
    return [{"x": x, "labels": x.sum(0, keepdim=True)} for x in X]


def loss_fn(model, batch):
    return model(batch["x"], batch["labels"])["loss"]


def batches():
    return fx.data.batches({"x": X, "labels": X.sum(1, keepdim=True)}, 2, shuffle=False)


def arguments(folder, **options):
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "report_to": "none"} | options
    return transformers.TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **options)


def fit(callback, *, lr=0.1, tx=None, steps=None, epochs=None, **options):
    tx = tx or fx.optim.sgd(lr)
    state = fx.init(Model(), tx)
    evaluation = {"eval_step": fx.eval_step(loss_fn), "eval_data": batches()}
    step = fx.train_step(loss_fn, tx, **options.pop("step", {}))
    return fx.fit(state, step, batches(), callbacks=callback, steps=steps, epochs=epochs, **(evaluation | options))


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
    """Checks that two recorders saw the same calls. Values differ by rounding, because the losses are averaged apart."""
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
    others = lambda: [] if flag is None else [StopAt(1, flag)]  # noqa: E731
    theirs, ours = Recorder(), Recorder()
    train_by_trainer([*others(), theirs], args)
    callback = fx.interop.hf(transformers.DefaultFlowCallback(), *others(), ours, args=args)
    length = {"steps": args.max_steps} if args.max_steps > 0 else {"epochs": 3}
    monitor = fx.callbacks.grad_norms()
    step = {"accumulate": args.gradient_accumulation_steps}
    data = fx.data.batches({"x": X, "labels": X.sum(1, keepdim=True)}, 2 if step["accumulate"] == 1 else 3, shuffle=False)
    tx = fx.optim.sgd(0.1)
    fx.fit(
        fx.init(Model(), tx),
        fx.train_step(loss_fn, tx, **step),
        data,
        callbacks=[monitor, callback],
        eval_step=fx.eval_step(loss_fn),
        eval_data=batches(),
        eval_when=lambda event: False,
        **length,
    )
    compare(ours, theirs)
