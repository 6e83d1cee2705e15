"""Return values of loss functions: the forms of other libraries, and the error for each unsupported form."""

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing

BATCH = {"x": torch.tensor([[1.0, 2.0], [3.0, -1.0]]), "labels": torch.tensor([[1.0], [0.0]])}


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict[str, Any]):
    """A mapping and a dataclass, like the outputs of Hugging Face models."""

    loss: torch.Tensor | None = None
    logits: Any = None
    aux_loss: Any = None

    def __post_init__(self):
        self.update({name: value for name, value in vars(self).items() if value is not None})


class Pair(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor


class Regression(nn.Module):
    def __init__(self, output=ModelOutput):
        super().__init__()
        self.linear, self.output = nn.Linear(2, 1), output
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        loss = None if labels is None else (logits - labels).square().mean()
        if self.output is tuple:
            return loss, logits
        return self.output(
            loss=loss, logits=logits, **({"aux_loss": logits.sum()} if self.output is ModelOutput else {})
        )


def plain(model, batch):
    return model(**batch).loss


STATE = fx.init(Regression(), fx.optim.sgd(0.1))
WANTED = fx.gradients(plain)(STATE, BATCH)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda model, batch: model(**batch),
        lambda model, batch: (model(**batch), {}),
        lambda model, batch: {"loss": plain(model, batch)},
        lambda model, batch: {"loss": model(**batch)},
        lambda model, batch: collections.OrderedDict(loss=plain(model, batch)),
        lambda model, batch: fx.weighted(model(**batch), 1),
        lambda model, batch: {"loss": fx.weighted(plain(model, batch), 1)},
    ],
)
def test_losses_in_forms_of_other_libraries_are_accepted(loss_fn):
    found = fx.gradients(loss_fn)(STATE, BATCH)
    testing.assert_equal((found.grads, dict(found.metrics)), (WANTED.grads, dict(WANTED.metrics)), "gradients")
    assert fx.evaluate(STATE, fx.eval_step(loss_fn), [BATCH]) == {"loss": pytest.approx(float(WANTED.loss))}


def test_named_tuple_with_a_loss_is_accepted():
    state = fx.init(Regression(Pair))
    found = fx.gradients(lambda model, batch: model(**batch))(state, BATCH)
    testing.assert_equal(found.loss, WANTED.loss, "loss")


def test_other_entries_of_a_loss_dict_are_metrics():
    def loss_fn(model, batch):
        output = model(**batch)
        return {"loss": output.loss, "aux": output.aux_loss}

    assert sorted(fx.gradients(loss_fn)(STATE, BATCH).metrics) == ["aux", "loss"]
    assert sorted(fx.eval_step(loss_fn)(STATE, BATCH).metrics) == ["aux", "loss"]


def test_model_output_is_traced_by_dynamo():
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(**batch), tx)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(STATE, BATCH)[0].params, step(STATE, BATCH)[0].params)


@pytest.mark.parametrize("make", [fx.gradients, fx.eval_step])
def test_output_without_labels_is_refused(make):
    call = make(lambda model, batch: model(x=batch["x"]))
    with pytest.raises(
        TypeError, match=r"got a ModelOutput whose loss is None\. The model computes no loss without lab"
    ):
        call(STATE, BATCH)


def test_tuple_from_a_model_is_refused():
    state = fx.init(Regression(tuple))
    with pytest.raises(TypeError, match=r"got a tuple of \(.*\)\. Return the loss, or the loss and a dict of metrics"):
        fx.gradients(lambda model, batch: model(**batch))(state, BATCH)


def test_output_without_a_loss_field_is_refused():
    with pytest.raises(TypeError, match=r"got a BaseOutput with keys 'y'\. .* or compute it"):
        fx.gradients(lambda model, batch: BaseOutput(y=model(**batch).logits))(STATE, BATCH)


class BaseOutput(collections.OrderedDict[str, Any]):
    """An output without a loss."""
