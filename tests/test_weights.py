"""Weights in files: read from what other programs write, and written as what they read."""

import pytest
import torch
from test_loading import MODULES, Net, TiedNet
from torch import nn

import fxtrain as fx
from fxtrain import testing

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_saved_weights_come_back(make, tmp_path):
    torch.manual_seed(0)
    state = fx.init(make())
    path = fx.save_weights(tmp_path / "w", state)
    testing.assert_equal(fx.state_dict(fx.load_weights(fx.init(make()), path)), fx.state_dict(state), "the weights")
    assert [file.name for file in tmp_path.iterdir()] == ["w"]


def test_safetensors_loads_tied_weights_into_a_module(tmp_path):
    from safetensors.torch import load_file, load_model

    state = fx.init(TiedNet())
    file = fx.save_weights(tmp_path / "w", state) / "model.safetensors"
    assert list(load_file(file)) == ["embed.weight"]
    module = TiedNet()
    load_model(module, file)
    assert torch.equal(module.head.weight, state.params["embed.weight"])


def test_module_writes_its_own_folder(tmp_path):
    class Pretrained(Net):
        def save_pretrained(self, folder):
            torch.save(self.state_dict(), f"{folder}/pytorch_model.bin")

    state = fx.init(Pretrained())
    path = fx.save_weights(tmp_path / "w", state)
    testing.assert_equal(fx.load_weights(fx.init(Net()), path).params, state.params, "the parameters")


def test_shards_are_read_by_their_index(tmp_path):
    import json

    from safetensors.torch import save_file

    weights = Net().state_dict()
    names = sorted(weights)
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    testing.assert_equal(fx.state_dict(fx.load_weights(fx.init(Net()), tmp_path)), dict(weights), "the weights")
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(fx.CheckpointError, match=r"all shards of .*, got none at model-1"):
        fx.load_weights(fx.init(Net()), tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(fx.CheckpointError, match="expected shards in the folder"):
        fx.load_weights(fx.init(Net()), tmp_path)


def test_nested_checkpoints_name_their_entry(tmp_path):
    module = nn.Linear(2, 1)
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    state = fx.init(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"Entries with tensors are 'state_dict' \(2 values\): pass one as entry="):
        fx.load_weights(state, tmp_path / "last.ckpt")
    loaded = fx.load_weights(state, tmp_path / "last.ckpt", entry="state_dict")
    assert torch.equal(loaded.params["weight"], module.weight)
    with pytest.raises(ValueError, match=r"got 'model'\. Entries with tensors are 'state_dict'"):
        fx.load_weights(state, tmp_path / "last.ckpt", entry="model")


def test_unreadable_files_are_refused(tmp_path):
    state = fx.init(nn.Linear(2, 1))
    torch.save(nn.Linear(2, 1), tmp_path / "module.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for name, message in {
        "module.pt": "got other Python objects",
        "bad.safetensors": "could not be read as weights",
        "none.pt": "which is not there",
        ".": "expected a folder with weights",
    }.items():
        with pytest.raises(fx.CheckpointError, match=message):
            fx.load_weights(state, tmp_path / name)


def test_nothing_is_overwritten_and_nothing_is_left_by_a_failed_save(tmp_path):
    fx.save_weights(tmp_path / "w", fx.init(nn.Linear(2, 1)))
    with pytest.raises(fx.CheckpointError, match="is there already"):
        fx.save_weights(tmp_path / "w", fx.init(nn.Linear(2, 1)))
    with pytest.raises(fx.CheckpointError, match=r"got torch\.complex128 at x"):
        fx.save_weights(tmp_path / "v", fx.init({"x": torch.ones(2, dtype=torch.complex128)}))
    assert [file.name for file in tmp_path.iterdir()] == ["w"]
