"""Weight files: loads files of other libraries, and saves files that they can load."""

import pathlib
import re

import pytest
import torch
from test_loading import MODULES, Net, TiedNet
from torch import nn

import fxtrain as fx
from fxtrain import testing, tree

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_saved_weights_load_exactly(make, tmp_path):
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


def test_save_pretrained_of_the_module_is_used(tmp_path):
    class Pretrained(Net):
        def save_pretrained(self, folder):
            torch.save(self.state_dict(), f"{folder}/pytorch_model.bin")

    state = fx.init(Pretrained())
    path = fx.save_weights(tmp_path / "w", state)
    testing.assert_equal(fx.load_weights(fx.init(Net()), path).params, state.params, "the parameters")


class Converting(Net):
    """Like a model of transformers, whose class converts the names in its folder."""

    base_model_prefix, config = "body", {}

    def save_pretrained(self, folder):
        torch.save({f"old.{name}": value for name, value in self.state_dict().items()}, f"{folder}/pytorch_model.bin")
        (pathlib.Path(folder) / "config.json").write_text("{}")

    @classmethod
    def from_pretrained(cls, folder, *, config, dtype, **options):
        torch.rand(1)
        assert dtype == torch.float32
        assert {*options} == {"output_loading_info", "ignore_mismatched_sizes", "local_files_only"}
        module, given = cls(), torch.load(f"{folder}/pytorch_model.bin", weights_only=True)
        given = {name.removeprefix("old."): value for name, value in given.items()}
        mismatched = [("head.weight", tuple(given.pop("head.weight").shape), (3, 4))] if "extra" in given else []
        found = module.load_state_dict(given, strict=False)
        return module, {
            "missing_keys": {name for name in found.missing_keys if not mismatched},
            "unexpected_keys": set(found.unexpected_keys),
            "mismatched_keys": mismatched,
        }


def test_folder_is_converted_by_from_pretrained(tmp_path):
    torch.manual_seed(0)
    state = fx.init(Converting())
    path = fx.save_weights(tmp_path / "w", state)
    before = torch.get_rng_state()
    testing.assert_equal(fx.load_weights(fx.init(Converting()), path).params, state.params, "the parameters")
    torch.set_rng_state(before)
    fx.load_weights(state, path)
    assert torch.equal(torch.get_rng_state(), before)


def test_part_of_a_model_is_converted_by_from_pretrained(tmp_path):
    torch.manual_seed(0)
    saved = fx.init(Converting())
    path = fx.save_weights(tmp_path / "w", saved)
    state = fx.load_weights(fx.init({"g": nn.Sequential(Converting()), "d": nn.Linear(1, 1)}), path, part="g.0")
    testing.assert_equal(
        {f"0.{name}": value for name, value in saved.params.items()}, state.params["g"], "the parameters"
    )


def test_folder_refused_by_from_pretrained_is_an_error(tmp_path):
    torch.save({"old.weight": torch.ones(1, dtype=torch.float64)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(fx.CheckpointError, match=r"a folder that Converting.from_pretrained can load"):
        fx.load_weights(fx.init(Converting()), tmp_path)


def test_mismatches_of_from_pretrained_are_reported(tmp_path):
    torch.manual_seed(0)
    state = fx.init(Converting())
    given = {**Net(5).state_dict(), "extra": torch.ones(1)}
    given = {name: value for name, value in given.items() if name != "head.bias"}
    torch.save(given, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"head.weight: expected \[3, 4\], got \[5, 4\]"):
        fx.load_weights(state, tmp_path)
    found = fx.load_weights(state, tmp_path, ignore_mismatched_sizes=True, strict=False, report=True)
    assert (found.unexpected, [*found.mismatched]) == (["extra"], ["head.weight"])
    assert torch.equal(found.state.params["head.weight"], state.params["head.weight"])


def test_convert_saves_the_returned_module(tmp_path):
    torch.manual_seed(0)
    state = fx.init(TiedNet())
    before = state.copy()

    def untied(model):
        assert type(model.head.weight) is nn.Parameter
        assert model.head.weight is model.embed.weight
        model.embed.weight.data.add_(1)
        return nn.Sequential(model.embed)

    with pytest.raises(TypeError, match=r"expected convert to return a module, got None"):
        fx.save_weights(tmp_path / "v", state, convert=lambda model: None)
    path = fx.save_weights(tmp_path / "w", state, convert=untied)
    testing.assert_equal(state, before, "the state")
    loaded = fx.load_weights(fx.init(nn.Sequential(nn.Embedding(5, 3))), path)
    assert torch.equal(loaded.params["0.weight"], state.params["embed.weight"] + 1)


def test_adapter_folder_requires_an_adapted_module(tmp_path):
    torch.save({"layer.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"The folder contains an adapter. Pass a module adapted by peft"):
        fx.load_weights(fx.init(Net()), tmp_path)


def test_view_of_averaged_weights_is_saved(tmp_path):
    torch.manual_seed(0)
    state = fx.attach(fx.init(Net()), fx.callbacks.ema(0.5))
    slot = state.slots["ema"]
    average = (tree.map(lambda leaf: leaf + 1, slot.average[0]), slot.average[1])
    view = fx.callbacks.averaged(state.with_slot("ema", slot._replace(average=average)))
    expected = fx.state_dict(fx.load_state_dict(state, {**Net().state_dict(), **average[0]}))
    for name in state.params:
        assert torch.equal(fx.state_dict(view)[name], state.params[name] + 1)
        assert torch.equal(expected[name], state.params[name] + 1)
    loaded = fx.load_weights(fx.init(Net()), fx.save_weights(tmp_path / "w", view))
    testing.assert_equal(loaded.params, average[0], "the averaged weights")


@pytest.mark.parametrize(
    ("prefix", "entry"),
    [("module.", None), ("_orig_mod.", None), ("_orig_mod.module.", None), ("model.", "state_dict")],
    ids=["DataParallel", "torch.compile", "both", "Lightning"],
)
def test_wrapper_prefixes_are_removed_by_rename(tmp_path, prefix, entry):
    torch.manual_seed(0)
    module = Net()
    wrapped = {prefix + name: value for name, value in module.state_dict().items()}
    torch.save(wrapped if entry is None else {entry: wrapped, "epoch": 1, "callbacks": {}}, tmp_path / "last.ckpt")
    state = fx.init(Net())
    with pytest.raises(ValueError, match=re.escape(f"Pass rename={{{prefix!r}: ''}}, with which all names match.")):
        fx.load_weights(state, tmp_path / "last.ckpt", entry=entry)
    loaded = fx.load_weights(state, tmp_path / "last.ckpt", entry=entry, rename={prefix: ""})
    testing.assert_equal(fx.state_dict(loaded), dict(module.state_dict()), "the weights")
    back = {prefix + name: value for name, value in fx.state_dict(loaded).items()}
    testing.assert_equal(back, wrapped, "the weights under the wrapper's names")


def test_shards_are_read_from_their_index(tmp_path):
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
    with pytest.raises(fx.CheckpointError, match=r"all shards of .*, got no file model-1"):
        fx.load_weights(fx.init(Net()), tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(fx.CheckpointError, match="expected shards in the folder"):
        fx.load_weights(fx.init(Net()), tmp_path)


def test_error_for_a_nested_checkpoint_lists_its_entries(tmp_path):
    module = nn.Linear(2, 1)
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    state = fx.init(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"Entries with tensors: 'state_dict' \(2 values\). Pass one as entry="):
        fx.load_weights(state, tmp_path / "last.ckpt")
    loaded = fx.load_weights(state, tmp_path / "last.ckpt", entry="state_dict")
    assert torch.equal(loaded.params["weight"], module.weight)
    with pytest.raises(ValueError, match=r"got 'model'\. Entries with tensors: 'state_dict'"):
        fx.load_weights(state, tmp_path / "last.ckpt", entry="model")


def test_unreadable_files_are_refused(tmp_path):
    state = fx.init(nn.Linear(2, 1))
    torch.save(nn.Linear(2, 1), tmp_path / "module.pt")
    (tmp_path / "noise.pt").write_bytes(bytes(range(160, 256)))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for name, message in {
        "module.pt": "got other Python objects",
        "./module.pt": r"objects \(torch\.nn\.modules\.linear\.Linear\)\. If you trust the file",
        "noise.pt": r"got a file that cannot be read\. Write it with torch\.save or as safetensors",
        "empty.pt": r"got a file that cannot be read \(EOFError",
        "bad.safetensors": "got a file that cannot be read",
        "none.pt": "which does not exist",
        ".": "expected a folder with weights",
    }.items():
        with pytest.raises(fx.CheckpointError, match=message):
            fx.load_weights(state, tmp_path / name)


def test_failed_save_overwrites_nothing_and_leaves_no_files(tmp_path):
    fx.save_weights(tmp_path / "w", fx.init(nn.Linear(2, 1)))
    with pytest.raises(fx.CheckpointError, match="which exists"):
        fx.save_weights(tmp_path / "w", fx.init(nn.Linear(2, 1)))
    with pytest.raises(fx.CheckpointError, match=r"got torch\.complex128 at x"):
        fx.save_weights(tmp_path / "v", fx.init({"x": torch.ones(2, dtype=torch.complex128)}))
    assert [file.name for file in tmp_path.iterdir()] == ["w"]
