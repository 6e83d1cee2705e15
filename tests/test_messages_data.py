"""Mistakes in data, init and the functions that make steps name the argument and the value."""

import pytest
import torch
from messages import BATCH, STEP, TX, fit, fit_loss, loss_fn, net, said, start
from torch.utils.data import Dataset

import fxtrain as fx
from fxtrain import data

ROWS = {"x": torch.ones(64, 2), "y": torch.zeros(64, 1)}
TOKENS = [{"ids": torch.arange(100)}] * 4


class Samples(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.ones(2), "y": torch.zeros(1)}


MISTAKES = {
    "a path": (
        lambda: fit(data="train.csv"),
        "TypeError: expected batches, got 'train.csv'. Load the data first, for example with datasets.load_dataset.",
    ),
    "no data": (
        lambda: fit(data=None),
        "TypeError: expected an iterable of batches, or a function that returns one, got None.",
    ),
    "a batch of another dtype": (
        lambda: fit(data=[BATCH, {**BATCH, "x": torch.ones(4, 2).double()}]),
        (
            "ValueError: At position 1: expected batch['x'] to be a float32 tensor of shape [4, 2] as before, "
            "got a float64 tensor of shape [4, 2]. Convert it with data.map."
        ),
    ),
    "a batch size above the rows": (
        lambda: data.batches(ROWS, 100),
        (
            "ValueError: expected data for at least one batch of batch_size=100, got arrays with 64 rows. "
            'Lower batch_size, or keep the short batch with drop_last=False or "pad".'
        ),
    ),
    "a batch size as a string": (
        lambda: data.batches(ROWS, "4"),
        "TypeError: expected batch_size to be a positive int, got '4'.",
    ),
    "columns of different lengths": (
        lambda: data.batches({"x": torch.ones(5, 2), "y": torch.ones(4)}, 2),
        "ValueError: expected arrays of equal length, got 5 rows in arrays['x'] and 4 in arrays['y'].",
    ),
    "drop_last with a typo": (
        lambda: data.batches(ROWS, 4, drop_last="padd"),
        "ValueError: expected drop_last to be one of True, False, 'pad', got 'padd'. Did you mean 'pad'?",
    ),
    "shuffle as a string": (
        lambda: data.batches(ROWS, 4, shuffle="yes"),
        "ValueError: expected shuffle to be one of True, False, got 'yes'.",
    ),
    "no seed": (
        lambda: data.batches(ROWS, 4, seed=None),
        "TypeError: expected seed to be an int, got None. A run can only be repeated and resumed with a seed.",
    ),
    "a number of rows": (
        lambda: data.batches(5, 2),
        (
            "TypeError: expected arrays to be a tensor, a numpy array or an array on disk, got 5. Convert it "
            "with numpy.asarray(...)."
        ),
    ),
    "a tuple of inputs and targets": (
        lambda: data.as_source((torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64))),
        (
            "TypeError: expected batches, got a tuple of 2 arrays of 6 rows each, which differ like the columns of one "
            "data set. Batch them with fxtrain.data.batches(columns, batch_size), or with a DataLoader."
        ),
    ),
    "windows of a list": (
        lambda: data.windows([1, 2, 3], 2, 1),
        (
            "TypeError: expected tokens to be a tensor or an array, got a list of length 3. Convert it with "
            "torch.tensor(tokens)."
        ),
    ),
    "windows of a matrix": (
        lambda: data.windows(torch.zeros(4, 4), 2, 2),
        (
            "ValueError: expected tokens to be integers of shape [n], got a float32 tensor of shape [4, 4]. "
            "Concatenate all documents to one vector of token ids."
        ),
    ),
    "too few tokens": (
        lambda: data.windows(torch.arange(4), 8, 2),
        (
            "ValueError: expected data for at least one batch of batch_size=2, got 0 windows of length=8 from "
            '4 tokens. Lower batch_size, or keep the short batch with drop_last=False or "pad".'
        ),
    ),
    "an example longer than the limit": (
        lambda: data.padded(TOKENS, 2, max_length=10)[0],
        (
            "ValueError: expected at most 10 positions in an example, got 100 in column 'ids' at index 0. "
            'Raise the limit, or cut examples with truncate="right".'
        ),
    ),
    "a side with a typo": (
        lambda: data.padded(TOKENS, 2, side="rigth"),
        "ValueError: expected side to be one of 'right', 'left', got 'rigth'. Did you mean 'right'?",
    ),
    "a dataset for a loader": (
        lambda: data.from_loader(Samples()),
        (
            "TypeError: expected loader to be a DataLoader, got a Samples. Batch a dataset with "
            "fxtrain.data.batches(dataset, batch_size)."
        ),
    ),
    "gpu for cuda": (
        lambda: data.prefetch([BATCH], device="gpu"),
        (
            "ValueError: expected device to be a device, got 'gpu'. Name one as in torch, such as 'cuda', "
            "'cuda:1' or 'cpu'."
        ),
    ),
    "a learning rate for the optimizer": (
        lambda: fx.init(net(), 0.1),
        (
            "TypeError: expected tx to be a gradient transformation or a dict of them, got 0.1. Make one with "
            "a function of fx.optim, such as fx.optim.adamw(1e-3)."
        ),
    ),
    "an optimizer that was not made": (
        lambda: fx.init(net(), fx.optim.adam),
        (
            "TypeError: expected tx to be a gradient transformation or a dict of them, got the function adam. "
            "Make one with a function of fx.optim, such as fx.optim.adamw(1e-3)."
        ),
    ),
    "an optimizer before the module": (
        lambda: fx.init(TX, net()),
        (
            "TypeError: expected modules, tensors, or a pytree of them, got the function init at model.init. "
            "Give the module that the loss function calls."
        ),
    ),
    "a dtype as a string": (
        lambda: fx.init(net(), TX, dtype="bf16"),
        (
            "TypeError: expected dtype to be a floating-point dtype such as torch.bfloat16, got 'bf16'. Pass a "
            "torch.dtype."
        ),
    ),
    "gpu for cuda in init": (
        lambda: fx.init(net(), TX, device="gpu"),
        (
            "ValueError: expected device to be a device, got 'gpu'. Name one as in torch, such as 'cuda', "
            "'cuda:1' or 'cpu'."
        ),
    ),
    "a number of a class for the device": (
        lambda: fx.init(net(), TX, device=1.5),
        (
            "TypeError: expected device to be a device, got 1.5. Name one as in torch, such as 'cuda', "
            "'cuda:1' or 'cpu'."
        ),
    ),
    "a precision of other trainers": (
        lambda: fx.train_step(loss_fn, TX, precision="bf16-mixed"),
        "ValueError: expected precision to be 'fp32', 'bf16', 'fp16', None or an fxtrain.Policy, got 'bf16-mixed'.",
    ),
    "microbatches that do not divide the batch": (
        lambda: fit(step=fx.train_step(loss_fn, TX, accumulate=3)),
        (
            "ValueError: accumulate=3: expected tensors with the same first dimension, divisible by 3, got a "
            "float32 tensor of shape [4, 2] at batch['x']. Choose another batch size. Keep a tensor without "
            "examples outside the batch, or give it a first dimension of 1, which all microbatches share."
        ),
    ),
    "an unknown way to differentiate": (
        lambda: fx.train_step(loss_fn, TX, differentiate="grad"),
        (
            "ValueError: expected differentiate to be one of 'auto', 'func', 'autograd', got 'grad'. Did you "
            "mean 'autograd'?"
        ),
    ),
    "a loss per example": (
        lambda: fit_loss(lambda model, batch: model(batch["x"]).squeeze()),
        (
            "ContractError: expected <lambda> (FILE) to return a 0-d floating tensor, alone or with a "
            "dict of metrics, got a float32 tensor of shape [4]. Reduce the loss of each example with .mean()."
        ),
    ),
    "metrics before the loss": (
        lambda: fit_loss(lambda model, batch: ({"a": torch.ones(())}, model(batch["x"]).mean())),
        (
            "ContractError: expected <lambda> (FILE) to return a 0-d floating tensor, alone or with a "
            "dict of metrics, got a tuple of (a dict with keys 'a', a float32 tensor of shape []). Return the "
            "loss first: return loss, metrics."
        ),
    ),
    "a metric per example": (
        lambda: fit_loss(lambda model, batch: (model(batch["x"]).mean(), {"p": model(batch["x"])})),
        (
            "ContractError: expected the metric 'p' of <lambda> (FILE) to be a 0-d tensor or one of "
            "fxtrain.metrics, got a float32 tensor of shape [4, 1]. Reduce it, or leave it out."
        ),
    ),
    "a metric named loss": (
        lambda: fit_loss(lambda model, batch: (model(batch["x"]).mean(), {"loss": torch.ones(())})),
        (
            "ValueError: expected metrics of <lambda> (FILE) with names other than 'loss', got a metric "
            "named 'loss'. Rename it."
        ),
    ),
    "a name for a statistic": (
        lambda: fx.tap(loss_fn, "*", "mean"),
        (
            "TypeError: expected statistic to be a function (output) -> tensor or dict of tensors, got 'mean'. "
            "Pass a function."
        ),
    ),
    "modules of a model without any": (
        lambda: fit_loss(fx.tap(loss_fn, "layer", fx.callbacks.activation_stats)),
        "ValueError: expected 'layer' to match a module, got a model without any. Leave the pattern out.",
    ),
    "a view of a module": (
        lambda: fx.view(net()),
        (
            "TypeError: expected a TrainState, got a Linear. Make one with fxtrain.init(module, tx), and give "
            "it as the state."
        ),
    ),
    "a number for a key": (
        lambda: fx.view(start(), key=3),
        "TypeError: expected key to be a key of fxtrain.rng, got 3. Make one: fxtrain.rng.key(seed).",
    ),
    "gradients at a module": (
        lambda: fx.gradients(loss_fn)(net(), BATCH),
        (
            "TypeError: expected a TrainState, got a Linear. Make one with fxtrain.init(module, tx), and give "
            "it as the state."
        ),
    ),
    "a batch before the state in explain": (
        lambda: fx.explain(STEP, BATCH, start()),
        (
            "TypeError: expected a TrainState in explain(step, state, batch), got a dict with keys 'x', 'y'. "
            "Make one with fxtrain.init(module, tx), and give the arguments in this order."
        ),
    ),
    "a batch for a function of batches": (
        lambda: fx.find_batch_size(start(), STEP, BATCH),
        (
            "TypeError: expected make_batch to be a function (size) -> batch, got a dict with keys 'x', 'y'. "
            "Pass a function."
        ),
    ),
    "a module in find_batch_size": (
        lambda: fx.find_batch_size(net(), STEP, lambda size: BATCH),
        (
            "TypeError: expected a TrainState in find_batch_size(state, step, make_batch), got a Linear. Make "
            "one with fxtrain.init(module, tx), and give the arguments in this order."
        ),
    ),
    "one batch for several": (
        lambda: fx.recompute_statistics(start(), torch.ones(4, 2)),
        (
            "TypeError: expected batches to be an iterable of batches, got a float32 tensor of shape [4, 2], "
            "which is one. Put it in a list."
        ),
    ),
    "parameters of a module made trainable": (
        lambda: fx.with_trainable(net(), TX, "weight"),
        (
            "TypeError: expected a TrainState in with_trainable(state, tx, parameters), got a Linear. Make one "
            "with fxtrain.init(module, tx), and give the arguments in this order."
        ),
    ),
    "a transformation for parameters": (
        lambda: fx.with_trainable(start(), "weight", TX),
        (
            "TypeError: expected patterns that match a parameter that can be trained as strings, got a "
            "GradientTransformation of length 4. Use a shell pattern such as 'blocks.*.attn'."
        ),
    ),
    "a parameter that does not exist": (
        lambda: fx.with_trainable(start(), TX, ["weight", "biass"]),
        (
            "ValueError: expected 'biass' to match a parameter that can be trained, got no match among bias, "
            "weight. Use a shell pattern such as 'blocks.*.attn'."
        ),
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_data_or_model_is_explained(mistake, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(mistake) == message
