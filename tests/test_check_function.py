"""The contract of loss functions and steps: invalid ones are rejected before they run."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx

BATCH = {"x": torch.tensor([[1.0, 2.0], [3.0, -1.0]]), "y": torch.tensor([0, 1])}
TX = fx.optim.sgd(0.1)
NET = nn.Linear(2, 3)
OPTIMIZER = torch.optim.SGD(NET.parameters(), lr=0.1)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


class Trainer:
    def __init__(self):
        self.optimizer, self.scaler = OPTIMIZER, torch.amp.GradScaler("cpu")

    def __call__(self, model, batch):
        return loss_fn(model, batch)

    def loss(self, model, batch):
        return loss_fn(model, batch)

    def of_batch(self, batch):
        return loss_fn(NET, batch)

    def with_step(self, model, batch):
        self.optimizer.zero_grad()
        return loss_fn(model, batch)

    def with_scaler(self, model, batch):
        return self.scaler.scale(loss_fn(model, batch))


class LightningModule(nn.Linear):
    def training_step(self, batch, batch_idx):
        return loss_fn(self, batch)


class Criterion(nn.Module):
    def forward(self, pred, target):
        return F.cross_entropy(pred, target)


class ByModule(nn.Module):
    def forward(self, model, batch):
        return loss_fn(model, batch)


def with_third(model, batch, scale):
    return loss_fn(model, batch) * scale


@functools.wraps(with_third)
def wrapped(model, batch):
    return with_third(model, batch, 1.0)


def by_keyword(*, model, batch):
    return loss_fn(model, batch)


def swapped(batch, model):
    return loss_fn(model, batch)


async def awaited(model, batch):
    return loss_fn(model, batch)


def yielded(model, batch):
    yield loss_fn(model, batch)


def annotated(model: nn.Module) -> torch.Tensor:
    return loss_fn(model, BATCH)


@pytest.mark.parametrize(
    "accepted",
    [
        loss_fn,
        lambda m, b: loss_fn(m, b),
        lambda *args: loss_fn(*args),
        lambda model, batch, scale=1.0: with_third(model, batch, scale),
        functools.partial(with_third, scale=1.0),
        wrapped,
        Trainer(),
        Trainer().loss,
        ByModule(),
    ],
)
def test_callable_of_model_and_batch_is_a_loss_function(accepted):
    state = fx.init(NET, TX)
    found = fx.gradients(accepted)(state, BATCH)
    assert found.loss.equal(fx.gradients(loss_fn)(state, BATCH).loss)


@pytest.mark.parametrize("make", [fx.gradients, fx.eval_step, lambda function: fx.train_step(function, TX)])
@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (
            annotated,
            r"annotated\(model\) \(.*test_check_function.py:\d+\)\. Define it with the parameters \(model, batch\)",
        ),
        (
            with_third,
            r"with_third\(model, batch, scale\) \(.*\)\. Bind the others: functools.partial\(with_third, scale=",
        ),
        (functools.partial(with_third), r"with_third.* Bind the others: functools.partial\(with_third, scale="),
        (swapped, r"swapped\(batch, model\) .*\. Swap the parameters: \(model, batch\)"),
        (by_keyword, r"by_keyword\(\*, model, batch\) .* lambda model, batch: by_keyword\(model=model, batch=batch\)"),
        (Trainer().of_batch, r"of_batch\(batch\) .*\. Take the model as the first parameter"),
        (LightningModule(2, 3).training_step, r"training_step\(batch, batch_idx\) .*\. Take the model as the first"),
        (LightningModule(2, 3), "the LightningModule LightningModule. Give it to fxtrain.init, and turn its"),
        (Trainer.loss, r"loss\(self, model, batch\) .*, an unbound method. Give the method of an instance"),
        (Trainer, "the class Trainer. Give an instance"),
        (nn.CrossEntropyLoss, r"the class CrossEntropyLoss\. Make an instance, .* criterion = CrossEntropyLoss\(\)"),
        (
            nn.CrossEntropyLoss(),
            r"the module CrossEntropyLoss, .* criterion\(model\(batch\[\"x\"\]\), batch\[\"y\"\]\)",
        ),
        (Criterion(), "the module Criterion, which compares predictions with targets"),
        (NET, "the module Linear. Give the model to fxtrain.init, and write a function that computes the loss"),
        (F.cross_entropy, r"cross_entropy\(input, target, .* batch: cross_entropy\(model\(batch\[\"x\"\]\), batch"),
        (awaited, r"the async function awaited\(model, batch\) .* without async"),
        (yielded, r"the generator function yielded\(model, batch\) .*\. Return the loss"),
        ("loss", "'loss'. Give the function itself"),
        (None, "None. Give the function itself"),
    ],
)
def test_invalid_loss_function_is_rejected_at_construction(make, refused, message):
    with pytest.raises(TypeError, match=rf"to be a function \(model, batch\) -> loss, got {message}"):
        make(refused)


def with_zero_grad(model, batch):
    OPTIMIZER.zero_grad()
    return loss_fn(model, batch)


def with_backward(model, batch):
    loss = loss_fn(model, batch)
    loss.backward()
    return loss


def with_hidden_optimizer(model, batch):
    next(iter(HIDDEN)).step()
    return loss_fn(model, batch)


def as_array(model, batch):
    return loss_fn(model, batch).detach().numpy()


HIDDEN = [OPTIMIZER]
BY_TORCH = r"Remove zero_grad\(\), backward\(\) and step\(\): the step computes the gradients"


@pytest.mark.parametrize("differentiate", ["auto", "autograd"])
@pytest.mark.parametrize(
    ("habit", "message"),
    [
        (
            with_zero_grad,
            rf"with_zero_grad \(.*test_check_function.py:\d+\) .* reads the optimizer OPTIMIZER \(SGD\). {BY_TORCH}",
        ),
        (Trainer().with_step, rf"with_step .* reads the optimizer self.optimizer \(SGD\). {BY_TORCH}"),
        (
            Trainer().with_scaler,
            r"with_scaler .* reads the gradient scaler self.scaler .* give the step precision=\"fp16\"",
        ),
        (with_hidden_optimizer, rf"calls step\(\) of an optimizer \(SGD\)\. {BY_TORCH}"),
        (as_array, r"as_array .*, got a float32 array of shape .*\. Return the tensor itself"),
    ],
)
def test_training_loop_calls_in_loss_function_are_rejected(habit, message, differentiate):
    before = NET.weight.detach().clone()
    state = fx.init(NET, TX)
    step = fx.train_step(habit, TX, differentiate=differentiate)
    with pytest.raises(TypeError, match=message):
        fx.fit(state, step, [BATCH], epochs=1)
    assert NET.weight.equal(before)


def test_loss_with_finished_backward_pass_is_rejected():
    step = fx.train_step(with_backward, TX)
    with pytest.raises(
        TypeError, match=r"whose backward pass already ran at .*test_check_function.py:\d+\. Remove loss.backw"
    ):
        step(fx.init(NET, TX), BATCH)


def test_torch_optimizer_still_steps_outside_loss_function():
    trainer, state = Trainer(), fx.init(NET, TX)
    fx.train_step(trainer.loss, TX)(state, BATCH)
    OPTIMIZER.step()


def test_metric_names_must_be_strings():
    with pytest.raises(TypeError, match=r"metric names of .* to be strings, got 0"):
        fx.gradients(lambda model, batch: (loss_fn(model, batch), {0: torch.tensor(1.0)}))(fx.init(NET), BATCH)
