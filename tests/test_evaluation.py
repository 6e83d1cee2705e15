"""Averages of an evaluation: batch weights from batch sizes and masks, and batches of ambiguous size."""

from collections import UserDict, namedtuple

import optree
import pytest
import torch

import fxtrain as fx
from fxtrain.metrics import Average

STATE = fx.init(torch.nn.ReLU())
Pair = namedtuple("Pair", ["x", "extra"])
Padded = namedtuple("Padded", ["x", "mask"])


@optree.dataclasses.dataclass(namespace="fxtrain")
class Record:
    x: torch.Tensor
    extra: object = None
    mask: object = None


def tensor_of(batch):
    while not isinstance(batch, torch.Tensor):
        if isinstance(batch, dict | UserDict):
            batch = batch["x"]
        else:
            batch = batch[0] if isinstance(batch, list | tuple) else batch.x
    return batch


MEAN = fx.eval_step(lambda model, batch: {"mean": tensor_of(batch).mean()})
SIZES = [(6, 0.0), (2, 4.0)]  # 6 examples of 0 and 2 of 4: the mean is 1


def batches(make):
    return [make(torch.full((size, 3), value)) for size, value in SIZES]


AGREE = {
    "a tensor": lambda x: x,
    "a dict": lambda x: {"x": x, "y": x[:, 0]},
    "a dict with a number": lambda x: {"a": torch.tensor(2.0), "d": None, "x": x},
    "a tuple": lambda x: (x, x[:, :1]),
    "a list": lambda x: [x, x[:, 0]],
    "a named tuple": lambda x: Pair(x, x[:, 0]),
    "a dataclass": lambda x: Record(x, x[:, 0]),
    "a mapping that is no dict": lambda x: UserDict(x=x, y=x[:, 0]),
    "nested": lambda x: {"in": [Record(x)], "x": Pair(x, {"z": x[:, 0]})},
}


@pytest.mark.parametrize("kind", AGREE)
def test_batches_are_weighted_by_shared_first_dimension(kind):
    assert fx.evaluate(STATE, MEAN, batches(AGREE[kind])) == {"mean": 1.0}


DISAGREE = {
    "class weights": (lambda x: {"class_weights": torch.ones(10), "x": x}, r"batch\['class_weights'\] of shape \[10\]"),
    "class weights last": (lambda x: {"x": x, "zeros": torch.zeros(10)}, r"batch\['zeros'\] of shape \[10\]"),
    "edges": (lambda x: (x, torch.zeros(3, 11)), r"batch\[0\] of shape \[6, 3\] and batch\[1\] of shape \[3, 11\]"),
    "a list of images": (lambda x: [x, x[:1]], r"batch\[1\] of shape \[1, 3\]"),
    "a named tuple": (lambda x: Pair(x, x[:, 0][:4]), r"batch\.x of shape \[6, 3\] and batch\.extra of shape \[4\]"),
    "a dataclass": (lambda x: Record(x, {"w": x[:4]}), r"batch\.extra\['w'\] of shape \[4, 3\]"),
    "a mapping that is no dict": (lambda x: UserDict(x=x, w=torch.ones(10)), r"batch\['w'\] of shape \[10\]"),
    "a mask of positions": (lambda x: {"x": x, "mask": torch.ones(3, 3).bool()}, r"batch\['mask'\] of shape \[3, 3\]"),
    "a mask of something else": (lambda x: {"x": x, "mask": torch.ones(9).bool()}, r"batch\['mask'\] of shape \[9\]"),
}


@pytest.mark.parametrize("kind", DISAGREE)
def test_batch_of_ambiguous_size_is_rejected_with_paths(kind):
    make, message = DISAGREE[kind]
    with pytest.raises(ValueError, match=rf"Evaluation batch 0: expected .*{message}.*1-d \"mask\".*Average"):
        fx.evaluate(STATE, MEAN, batches(make))


@pytest.mark.parametrize("kind", DISAGREE)
def test_weighted_metrics_need_no_batch_size(kind):
    own = fx.eval_step(lambda model, batch: {"mean": Average.from_model_output(tensor_of(batch).mean(1))})
    assert fx.evaluate(STATE, own, batches(DISAGREE[kind][0])) == {"mean": 1.0}


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64, torch.float64])
@pytest.mark.parametrize("make", [dict, UserDict, Padded, Record])
def test_mask_gives_number_of_examples_in_batch(make, kind):
    def padded(x):
        return make(x=torch.cat([x, x.new_zeros(3, 3)]), mask=torch.tensor([1] * len(x) + [0] * 3).to(kind))

    def measure(model, batch):
        mask = batch["mask"] if isinstance(batch, dict | UserDict) else batch.mask
        return {"mean": (tensor_of(batch)[:, 0] * mask).sum() / mask.sum()}

    assert fx.evaluate(STATE, fx.eval_step(measure), batches(padded)) == {"mean": 1.0}


def test_fractional_mask_gives_sum_as_batch_weight():
    data = [
        {"x": torch.tensor([1.0, 3.0]), "mask": torch.tensor([0.5, 0.25]), "class_weights": torch.ones(10)},
        {"x": torch.tensor([5.0, 0.0]), "mask": torch.tensor([2.0, 0.0]), "class_weights": torch.ones(10)},
    ]
    mean = fx.eval_step(lambda model, batch: {"x": (batch["x"] * batch["mask"]).sum() / batch["mask"].sum()})
    assert fx.evaluate(STATE, mean, data)["x"] == pytest.approx((0.5 + 0.75 + 10) / 2.75)


def test_class_weights_are_not_used_as_batch_weights():
    data = [
        {"class_weights": torch.ones(10), "loss": torch.zeros(8)},
        {"class_weights": torch.ones(10), "loss": torch.ones(2)},
    ]
    own = fx.eval_step(lambda model, batch: {"loss": Average.from_model_output(batch["loss"])})
    assert fx.evaluate(STATE, own, data)["loss"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="class_weights"):
        fx.evaluate(STATE, fx.eval_step(lambda model, batch: {"loss": batch["loss"].mean()}), data)


def test_scalar_batches_have_equal_weight():
    once = fx.eval_step(lambda model, batch: {"x": batch})
    assert fx.evaluate(STATE, once, [torch.tensor(1.0), torch.tensor(3.0)]) == {"x": 2.0}


def test_fit_rejects_evaluation_batch_of_ambiguous_size():
    tx = fx.optim.sgd(0.1)
    state = fx.init({"w": torch.tensor(1.0)}, tx)
    step = fx.train_step(lambda model, batch: model["w"] * batch["x"].mean(), tx)
    data = [{"x": torch.ones(4), "class_weights": torch.ones(10)}]
    with pytest.raises(ValueError, match=r"Evaluation batch 0: .*batch\['class_weights'\]"):
        fx.fit(state, step, data, eval_step=MEAN, eval_data=data, epochs=1)


class ChangesLength:
    """An iterable with one batch more at each iteration, all with the number of its batches as value."""

    def __init__(self):
        self.length = 1

    def __iter__(self):
        self.length += 1
        return iter([torch.full((2, 3), float(self.length))] * self.length)


def test_evaluations_in_fit_may_differ_in_length_as_those_of_evaluate():
    tx = fx.optim.sgd(0.1)
    state, step = fx.init(torch.nn.Linear(3, 1), tx), fx.train_step(lambda model, batch: model(batch).mean(), tx)
    seen = []

    def count(state, event: fx.EvalStep, control):
        seen.append(event.step)

    evaluation = {"eval_step": MEAN, "eval_data": ChangesLength()}
    result = fx.fit(state, step, [torch.ones(2, 3)], epochs=3, observers=[count], **evaluation)
    assert seen == [1] * 2 + [2] * 3 + [3] * 4
    assert list(result.history["eval/mean"].values) == [2, 3, 4]


def test_evaluation_average_keeps_float64_precision():
    data = [torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    assert fx.evaluate(STATE, MEAN, data)["mean"] == pytest.approx(1.0 + 5e-13, rel=1e-15, abs=0)


def test_epoch_mean_keeps_float64_precision():
    tx = fx.optim.sgd(0.0)
    mean = fx.callbacks.epoch_mean()
    step = fx.train_step(lambda model, batch: model["w"] * batch, tx, callbacks=mean)
    data = [torch.tensor(1.0 + 1e-12, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)]
    state = fx.init({"w": torch.tensor(1.0, dtype=torch.float64)}, tx)
    result = fx.fit(state, step, data, callbacks=mean, epochs=1)
    assert result.history["epoch/loss"].values[-1] == pytest.approx(1.0 + 5e-13, rel=1e-15, abs=0)


def test_end_of_a_source_within_a_batch_is_not_that_of_the_evaluation():
    other = fx.data.from_iterable(iter([torch.zeros(2, 3)] * 2))
    data = fx.data.batches(torch.ones(8, 3), 2, shuffle=False).map(
        lambda batch, at: batch + other[at], with_position=True
    )
    with pytest.raises(ValueError, match="expected 4 batches of evaluation data, got 2, after which a source that it"):
        fx.evaluate(STATE, MEAN, data)
