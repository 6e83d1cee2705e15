"""Mistakes with checkpoints, weights, writers and logged values name the path and what is there."""

import pathlib

import pytest
import torch
from messages import DATA, STEP, TX, fit, net, said, start
from tensorboardX import SummaryWriter

import fxtrain as fx
from fxtrain import observers, values, writers


def run():
    """A run with one checkpoint, in the folder ``run`` and under another name in ``first``."""
    fit(checkpointer=fx.checkpointer("run"))
    (checkpoint,) = pathlib.Path("run").glob("*-step-*")
    checkpoint.rename("run/3")
    return start()


def saved():
    fx.save("first", start())
    return start()


def weights(module):
    torch.save(module.state_dict(), "weights.pt")
    return "weights.pt"


def logged(value):
    return fx.on(fx.StepEnd, lambda state, event: (state, fx.Control(log={"value": value})))


def written(value, steps=2):
    observer = observers.write(writers.media("media"), writers.jsonl("metrics.jsonl"))
    return fx.fit(start(), STEP, DATA, steps=steps, callbacks=logged(value), observers=observer)


def link():
    """A link to a folder that does not exist."""
    pathlib.Path("latest").symlink_to("gone")
    return "latest"


MISTAKES = {
    "an empty path for a checkpointer": (
        lambda: fx.checkpointer(""),
        "ValueError: expected folder to be a path, got ''. Pass '.' for the current folder.",
    ),
    "a path that is too long for a checkpointer": (
        lambda: fx.checkpointer("x" * 300),
        (
            "ValueError: expected folder to be a path, got "
            "'xxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxx' (File name too long). Choose another."
        ),
    ),
    "a null character in the path of a checkpointer": (
        lambda: fx.checkpointer("a\0b"),
        "ValueError: expected folder to be a path, got 'a\\x00b' (embedded null byte). Choose another.",
    ),
    "a link to nothing for a checkpointer": (
        lambda: fx.checkpointer(link()),
        (
            "ValueError: expected folder to be a directory, got a link to gone, which does not exist. Create that "
            "folder, or choose another path."
        ),
    ),
    "a link to nothing for a checkpoint": (
        lambda: fx.save(link(), start()),
        (
            "CheckpointError: expected a new folder, got latest, which exists. Checkpoints are never overwritten. "
            "Choose another name."
        ),
    ),
    "a part with a typo": (
        lambda: fx.restore("first", saved(), where="state.parms"),
        (
            "CheckpointError: expected where='state.parms' to match a path of `like`, got only state.step, "
            "state.params['bias'], state.params['weight'], state.seed, state.position, state.due.begin_epoch and 6 "
            "more. Did you mean 'state.params'?"
        ),
    ),
    "a folder of checkpoints": (
        lambda: fx.restore("run", run()),
        (
            "CheckpointError: expected a checkpoint at run, got a folder of 1 checkpoint. Restore the newest "
            "with fxtrain.checkpointer(folder).restore(like), or give the path of one, such as 3."
        ),
    ),
    "a missing folder next to checkpoints": (
        lambda: fx.restore("run/4", run()),
        (
            "CheckpointError: expected a checkpoint at run/4, got no such folder. Check the path. run has the "
            "checkpoints 3."
        ),
    ),
    "a missing folder": (
        lambda: fx.restore("nowhere", start()),
        "CheckpointError: expected a checkpoint at nowhere, got no such folder. Check the path.",
    ),
    "a step": (
        lambda: fx.restore(3, start()),
        (
            "TypeError: expected path to be a path, got 3. To restore a step of a run, call "
            "fxtrain.checkpointer(folder).restore(like, step=3)."
        ),
    ),
    "a file": (
        lambda: fx.restore(weights(net()), start()),
        (
            "CheckpointError: expected a checkpoint at weights.pt, got a file. Give a folder written by "
            "fxtrain.save, or load weights with fxtrain.load_weights."
        ),
    ),
    "a folder without a checkpoint": (
        lambda: fx.restore(".", start()),
        (
            "DamagedError: expected a checkpoint at ., got no manifest.jsonl in it. Give a folder written by "
            "fxtrain.save or a checkpointer."
        ),
    ),
    "a state before the path": (
        lambda: fx.restore(start(), "first"),
        (
            "TypeError: expected path to be a path, got a TrainState. Give the arguments in this order: "
            "restore(path, like)."
        ),
    ),
    "a module to restore into": (
        lambda: fx.restore("first", (saved(), net())[1]),
        (
            "TypeError: expected like to be a tree of tensors, got a Linear in it. Make a state of the same "
            "model and optimizer: fxtrain.init(module, tx)."
        ),
    ),
    "a device that does not exist": (
        lambda: fx.restore("first", saved(), device="gpu"),
        (
            "ValueError: expected device to be a device, got 'gpu'. Name one as in torch, such as 'cuda', "
            "'cuda:1' or 'cpu'."
        ),
    ),
    "a state before the path in save": (
        lambda: fx.save(start(), "first"),
        (
            "TypeError: expected path to be a path, got a TrainState. Give the arguments in this order: "
            "save(path, state)."
        ),
    ),
    "a module in save": (
        lambda: fx.save("first", net()),
        "CheckpointError: expected a dense tensor at tree, got a Linear. Save a state, or a tree of tensors.",
    ),
    "a number for metrics": (
        lambda: fx.save("first", start(), metrics=0.5),
        (
            "TypeError: expected metrics to be a mapping from names to scalars, got 0.5. Pass a dict, as in "
            'save(path, state, metrics={"loss": 0.5}).'
        ),
    ),
    "a vector as a metric": (
        lambda: fx.save("first", start(), metrics={"loss": torch.ones(2)}),
        "TypeError: expected metrics['loss'] to be a scalar, got a float32 tensor of shape [2]. Reduce it first.",
    ),
    "no folder for checkpoints": (
        lambda: fx.checkpointer(None),
        "TypeError: expected folder to be a path, got None. Pass a str or a pathlib.Path.",
    ),
    "a state for a folder": (
        lambda: fx.checkpointer(start()),
        "TypeError: expected folder to be a path, got a TrainState. Pass a str or a pathlib.Path.",
    ),
    "no checkpoints to keep": (
        lambda: fx.checkpointer("run", keep=0),
        "ValueError: expected keep to be a positive int, got 0.",
    ),
    "an unknown reaction to errors": (
        lambda: fx.checkpointer("run", on_error="ignore"),
        "ValueError: expected on_error to be one of 'raise', 'warn', got 'ignore'.",
    ),
    "missing weights": (
        lambda: fx.load_weights(start(), "nowhere.pt"),
        (
            "CheckpointError: expected a file or a folder of weights, got nowhere.pt, which does not exist. "
            "Check the path."
        ),
    ),
    "a path before the state": (
        lambda: fx.load_weights("weights.pt", start()),
        (
            "TypeError: expected a TrainState in load_weights(state, path), got 'weights.pt'. Make one with "
            "fxtrain.init(module, tx), and give the arguments in this order."
        ),
    ),
    "a module to load into": (
        lambda: fx.load_weights(net(), weights(net())),
        (
            "TypeError: expected a TrainState in load_weights(state, path), got a Linear. Make one with "
            "fxtrain.init(module, tx), and give the arguments in this order."
        ),
    ),
    "a checkpoint of fxtrain": (
        lambda: fx.load_weights(saved(), "first"),
        (
            "CheckpointError: expected a folder with weights, such as model.safetensors, got the checkpoint "
            "first. Restore it: fxtrain.restore(path, like=state, where=['state.params', 'state.buffers'])."
        ),
    ),
    "a folder of other files": (
        lambda: fx.load_weights(run(), "run"),
        (
            "CheckpointError: expected a folder with weights, such as model.safetensors, got run with .lock, "
            "3. Pass one file."
        ),
    ),
    "a number for a path of weights": (
        lambda: fx.load_weights(start(), 3),
        "TypeError: expected path to be a path, got 3. Pass a str or a pathlib.Path.",
    ),
    "a state before the path in save_weights": (
        lambda: fx.save_weights(start(), "weights"),
        (
            "TypeError: expected path to be a path, got a TrainState. Give the arguments in this order: "
            "save_weights(path, state)."
        ),
    ),
    "a module in save_weights": (
        lambda: fx.save_weights("weights", net()),
        (
            "TypeError: expected a TrainState in save_weights(path, state), got a Linear. Make one with "
            "fxtrain.init(module, tx), and give the arguments in this order."
        ),
    ),
    "a format with a typo": (
        lambda: fx.save_weights("weights", start(), format="safetensor"),
        (
            "ValueError: expected format to be one of 'auto', 'safetensors', 'state_dict', 'save_pretrained', "
            "got 'safetensor'. Did you mean 'safetensors'?"
        ),
    ),
    "weights before the state": (
        lambda: fx.load_state_dict(net().state_dict(), start()),
        (
            "TypeError: expected a TrainState in load_state_dict(state, state_dict), got an OrderedDict with "
            "keys 'weight', 'bias'. Make one with fxtrain.init(module, tx), and give the arguments in this "
            "order."
        ),
    ),
    "a transformation for a torch optimizer": (
        lambda: fx.optimizer_state_dict(start(), TX),
        (
            "TypeError: expected optimizer to be a torch optimizer, got a GradientTransformation of length 4. "
            "Make the one to load the state into, such as torch.optim.AdamW(module.parameters())."
        ),
    ),
    "no path for a writer": (
        lambda: writers.csv(None),
        "TypeError: expected path to be a path, got None. Pass a str or a pathlib.Path.",
    ),
    "a number for a folder of a writer": (
        lambda: writers.tensorboard(3),
        "TypeError: expected folder to be a path, got 3. Pass a str or a pathlib.Path.",
    ),
    "a path for a writer": (
        lambda: observers.write("runs"),
        (
            "TypeError: expected writers for write(), got 'runs'. Make a writer of the path, such as "
            "fxtrain.writers.tensorboard('runs')."
        ),
    ),
    "a function of writers": (
        lambda: observers.write(writers.console),
        (
            "TypeError: expected writers for write(), got the function console. Call it, as in "
            "fxtrain.writers.csv(path)."
        ),
    ),
    "a list of writers": (
        lambda: observers.write([writers.console()]),
        "TypeError: expected writers for write(), got a list of length 1. Unpack it: write(*writers).",
    ),
    "a SummaryWriter": (
        lambda: observers.write(SummaryWriter("tensorboard")),
        (
            "TypeError: expected writers for write(), got a SummaryWriter. Use "
            "fxtrain.writers.tensorboard(folder), which takes the folder."
        ),
    ),
    "a path for an asynchronous writer": (
        lambda: writers.asynchronous("a.csv"),
        (
            "TypeError: expected writers for asynchronous(), got 'a.csv'. Make a writer of the path, such as "
            "fxtrain.writers.tensorboard('a.csv')."
        ),
    ),
    "a path for a console": (
        lambda: writers.console("log.txt"),
        "TypeError: expected file to be an open text file, got 'log.txt'. Open it first, as in open('log.txt', 'a').",
    ),
    "a vector as a logged scalar": (
        lambda: written(torch.ones(3)),
        (
            "TypeError: expected <lambda> to log a scalar or a value of fxtrain.values as 'value', got a "
            "float32 tensor of shape [3]. Reduce it to a scalar, or wrap it, for example in Histogram."
        ),
    ),
    "a string as a logged scalar": (
        lambda: written("hello"),
        (
            "TypeError: expected <lambda> to log a scalar or a value of fxtrain.values as 'value', got "
            "'hello'. Wrap it in Text."
        ),
    ),
    "an image slightly out of range": (
        lambda: written(values.Image(torch.full((4, 4, 3), 1.02))),
        (
            "RuntimeWarning: 'value' of step 1: Image pixels from 1.02 to 1.02 are clipped to 0 to 1. Set "
            "limits= or scale the values. Later values of this name are clipped without a warning."
        ),
    ),
    "an image far out of range": (
        lambda: written(values.Image(torch.full((4, 4, 3), 255.0)), steps=1),
        (
            "RuntimeWarning: 'value' of step 1 is not written: expected Image pixels from 0 to 1, got 255 to "
            "255. Set limits= to the values of black and white."
        ),
    ),
    "channels first": (
        lambda: values.Image(torch.ones(3, 8, 8)),
        (
            "ValueError: expected Image pixels of shape [H, W, C] or [N, H, W, C] with 1, 3 or 4 channels, got "
            "[3, 8, 8]. Pass layout='CHW'."
        ),
    ),
    "a layout with a typo": (
        lambda: values.Image(torch.ones(3, 8, 8), layout="CWH"),
        "ValueError: expected layout to be one of 'HWC', 'CHW', 'NHWC', 'NCHW', got 'CWH'. Did you mean 'CHW'?",
    ),
    "a path for an image": (
        lambda: values.Image("a.png"),
        "TypeError: expected a real tensor or array for Image, got 'a.png'. Convert it with torch.as_tensor.",
    ),
    "limits from white to black": (
        lambda: values.Image(torch.ones(4, 4, 3), limits=(1, 0)),
        "ValueError: expected limits to increase from black to white, got (1.0, 0.0).",
    ),
    "a list for a table": (
        lambda: values.Table([[1, 2]]),
        (
            "ValueError: expected a nonempty mapping from names to columns, got a list of length 1. Pass a "
            'dict, as in Table({"loss": [0.5, 0.4]}).'
        ),
    ),
    "columns of different lengths": (
        lambda: values.Table({"a": [1, 2], "b": [1]}),
        "ValueError: expected columns of equal length, got {'a': 2, 'b': 1}. Fill the shorter ones.",
    ),
    "nothing for a histogram": (
        lambda: values.Histogram(),
        (
            "ValueError: expected Histogram of values, or of counts and edges, got nothing. Pass the values: "
            "Histogram(values)."
        ),
    ),
    "a matrix that is not square": (
        lambda: values.ConfusionMatrix(torch.ones(2, 3)),
        "ValueError: expected counts of shape [C, C], got [2, 3]. Count targets by predictions.",
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_with_files_is_explained(mistake, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(mistake) == message


def test_image_slightly_out_of_range_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="Image pixels from 1.02 to 1.02 are clipped to 0 to 1") as caught:
        written(values.Image(torch.full((4, 4, 3), 1.02)), steps=3)
    assert len(caught) == 1
    assert list(writers.read_media("media")["value"]) == [1, 2, 3]


def test_path_that_cannot_be_listed_is_an_error_of_checkpoints():
    with pytest.raises(fx.CheckpointError, match=r"expected a readable file at .*File name too long"):
        fx.restore("x" * 300, start())
