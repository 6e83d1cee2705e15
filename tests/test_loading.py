"""load_state_dict with weights of other programs: renaming, skipping and casting are explicit options."""

import re
import warnings

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.body(x))


class TiedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Unusual(nn.Module):
    """Complex, scalar, empty, integer and boolean tensors."""

    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 2))
        self.low = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("table", torch.randint(0, 255, (4,), dtype=torch.uint8))
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("scratch", torch.randn(3), persistent=False)


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


def prefixed(prefix, state_dict):
    return {prefix + name: value for name, value in state_dict.items()}


def refused(message, state, given, **options):
    before = state.copy()
    with pytest.raises(ValueError, match=message) as error:
        fx.load_state_dict(state, given, **options)
    testing.assert_equal(state, before, "the given state")
    return str(error.value)


LEGACY = {
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(3, 2)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
}
MODULES = {
    **LEGACY,
    "weight_norm parametrization": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral_norm parametrization": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    "unusual dtypes": Unusual,
    "bfloat16": lambda: Net().bfloat16(),
    "tied": TiedNet,
    "dict of modules": lambda: {"g": Net(), "d": TiedNet(), "scale": torch.randn(2)},
    "list of modules": lambda: [Net(), Net()],
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_every_kind_of_module_round_trips(make):
    torch.manual_seed(0)
    one, other = fx.init(make()), fx.init(make())
    weights = fx.state_dict(one)
    loaded = fx.load_state_dict(other, weights)
    testing.assert_equal(fx.state_dict(loaded), weights, "the weights")


def test_deprecated_weight_norm_matches_plain_loop():
    torch.manual_seed(0)
    module = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(8, 3).double()
    tx, optimizer = fx.optim.sgd(0.1), torch.optim.SGD(module.parameters(), 0.1)
    state = fx.init(module, tx)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    for _ in range(3):
        state, _ = step(state, x)
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    for name, value in module.named_parameters():
        torch.testing.assert_close(state.params[name], value.detach(), rtol=0, atol=1e-12)


def test_deprecated_weight_norm_loads_into_parametrization():
    torch.manual_seed(0)
    old, new = nn.utils.weight_norm(nn.Linear(3, 2)), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    state = fx.load_state_dict(fx.init(new), old.state_dict())
    x = torch.randn(4, 3)
    testing.assert_equal(fx.view(state)(x), old(x), "the outputs")
    given = {**old.double().state_dict(), "bias": torch.zeros(2)}
    refused("expected float32 for weight_g, weight_v, got float64", fx.init(new), given)


@pytest.mark.parametrize(
    ("wrap", "code"),
    [
        (lambda weights: prefixed("module.", weights), "rename={'module.': ''}"),
        (lambda weights: prefixed("_orig_mod.", weights), "rename={'_orig_mod.': ''}"),
        (lambda weights: prefixed("module._orig_mod.", weights), "rename={'module._orig_mod.': ''}"),
        (
            lambda weights: {name.replace(".", "._orig_mod.", 1): value for name, value in weights.items()},
            "rename=lambda name: name.replace('_orig_mod.', '')",
        ),
    ],
    ids=["DDP", "compiled", "DDP of compiled", "compiled parts"],
)
def test_error_proposes_matching_rename(wrap, code):
    module = Net()
    given = wrap(module.state_dict())
    state = fx.init(Net())
    for strict in (True, False):
        message = refused("no name matches", state, given, strict=strict)
        assert f"Pass {code}, with which all names match." in message
    loaded = eval(f"fx.load_state_dict(state, given, {code})", {"fx": fx, "state": state, "given": given})
    testing.assert_equal(loaded.params, fx.init(module).params, "the parameters")


def test_weights_of_submodule_and_outer_module_load_with_rename():
    torch.manual_seed(0)
    module = Net()
    message = refused("no name matches", fx.init(Net()), module.body.state_dict())
    assert "Pass rename={'': 'body.'} and strict=False, with which 7 of 9 names match." in message
    loaded = fx.load_state_dict(fx.init(Net()), module.body.state_dict(), rename={"": "body."}, where="body.*")
    assert torch.equal(loaded.params["body.0.weight"], module.body[0].weight)

    message = refused("no name matches", fx.init(module.body), module.state_dict())
    assert "Pass rename={'body.': ''} and strict=False, with which 7 of 7 names match." in message
    rename = {"body.": "", "head.": None}
    loaded = fx.load_state_dict(fx.init(Net().body), module.state_dict(), rename=rename)
    assert torch.equal(loaded.params["0.weight"], module.body[0].weight)


def test_invalid_rename_is_rejected():
    state, given = fx.init(nn.Linear(2, 1)), nn.Linear(2, 1).state_dict()
    refused(
        r"prefixes of names in the state dict, got 'modul\.'\. The names are weight, bias",
        state,
        given,
        rename={"modul.": ""},
    )
    refused("got 'weight' for each of weight, bias", state, given, rename=lambda name: "weight")


def test_report_lists_all_names():
    torch.manual_seed(0)
    module = Net(classes=5)
    given = {**module.state_dict(), **{f"more.{i}": torch.ones(1) for i in range(9)}}
    del given["body.0.bias"]
    state = fx.init(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fx.load_state_dict(state, given, strict=False, ignore_mismatched_sizes=True, report=True)
    assert found.missing == ["body.0.bias"]
    assert found.unexpected == [f"more.{i}" for i in range(9)]
    assert found.mismatched == {"head.weight": ((5, 4), (3, 4)), "head.bias": ((5,), (3,))}
    assert sorted(found.loaded) == sorted(name for name in fx.state_dict(state) if name in given and "head" not in name)
    assert torch.equal(found.state.params["body.0.weight"], module.body[0].weight)
    testing.assert_equal(found.state.params["head.weight"], state.params["head.weight"], "the head")


def test_unexpected_names_are_reported_before_renaming():
    given = {**prefixed("module.", nn.Linear(2, 1).state_dict()), "module.more": torch.ones(1)}
    found = fx.load_state_dict(fx.init(nn.Linear(2, 1)), given, rename={"module.": ""}, strict=False, report=True)
    assert found.unexpected == ["module.more"]


def test_mismatched_shapes_are_skipped_only_on_request():
    module, state = Net(classes=5), fx.init(Net())
    message = refused(r"head\.weight: expected \[3, 4\], got \[5, 4\]", state, module.state_dict())
    assert "Pass ignore_mismatched_sizes=True" in message
    refused(r"head\.weight: expected", state, module.state_dict(), strict=False)
    with pytest.warns(UserWarning, match=r"With another shape \(2\): head\.weight \[5, 4\] for \[3, 4\], head\.bias"):
        loaded = fx.load_state_dict(state, module.state_dict(), ignore_mismatched_sizes=True)
    assert torch.equal(loaded.params["body.0.weight"], module.body[0].weight)


def test_where_restricts_loading_and_checks():
    torch.manual_seed(0)
    module, state = Net(classes=5), fx.init(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fx.load_state_dict(state, module.state_dict(), where="body.*", report=True)
    assert found.loaded == [name for name in fx.state_dict(state) if name.startswith("body.")]
    assert found.missing == found.unexpected == []
    testing.assert_equal(found.state.params["head.weight"], state.params["head.weight"], "the head")
    refused(r"expected 'tail\.\*' to match a name of the model", state, module.state_dict(), where=["body.*", "tail.*"])
    partial = {name: value for name, value in module.state_dict().items() if name != "body.0.bias"}
    refused(r"missing \(1\): body\.0\.bias", state, partial, where="body.*")
    refused(r"unexpected \(1\): body\.more", state, {**module.state_dict(), "body.more": torch.ones(1)}, where="body.*")


def test_dtypes_are_cast_only_on_request():
    torch.manual_seed(0)
    module = Net().double()
    refused(r"head\.bias: expected float32, got float64\n(.*\n)*Pass cast=True", fx.init(Net()), module.state_dict())
    found = fx.load_state_dict(fx.init(Net()), module.state_dict(), cast=True, report=True)
    assert found.cast["head.bias"] == (torch.float64, torch.float32)
    assert torch.equal(found.state.params["head.bias"], module.head.bias.float())


def test_casts_that_change_values_are_rejected():
    state = fx.init({"real": torch.ones(2), "small": torch.ones(2, dtype=torch.uint8)})
    good = fx.state_dict(state)
    refused(
        "values of real that float32 can hold, got complex64",
        state,
        {**good, "real": torch.ones(2, dtype=torch.complex64)},
        cast=True,
    )
    refused(
        "values of small that uint8 can hold, got int64", state, {**good, "small": torch.tensor([1, 256])}, cast=True
    )
    refused("values of small that uint8 can hold, got float32", state, {**good, "small": torch.ones(2)}, cast=True)
    loaded = fx.load_state_dict(state, {**good, "small": torch.tensor([1, 255])}, cast=True)
    assert loaded.params["small"].tolist() == [1, 255]


class TestTies:
    def test_one_name_loads_all_tied_names(self):
        weight = torch.randn(5, 3)
        for name in ("embed.weight", "head.weight"):
            found = fx.load_state_dict(fx.init(TiedNet()), {name: weight}, report=True)
            assert found.loaded == ["embed.weight", "head.weight"]
            assert torch.equal(found.state.params["embed.weight"], weight)

    def test_different_values_for_tied_names_are_rejected(self):
        state = fx.init(TiedNet())
        given = {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}
        refused(r"equal values for embed\.weight and head\.weight, which the model ties", state, given)
        loaded = fx.load_state_dict(state, given, rename={"head.": None})
        assert not loaded.params["embed.weight"].any()

    def test_equal_tied_values_with_nan_are_accepted(self):
        weight = torch.full((5, 3), torch.nan)
        loaded = fx.load_state_dict(fx.init(TiedNet()), {"embed.weight": weight, "head.weight": weight.clone()})
        assert loaded.params["embed.weight"].isnan().all()

    def test_mismatched_tied_tensor_is_reported_once(self):
        given = {"head.weight": torch.zeros(7, 3)}
        found = fx.load_state_dict(fx.init(TiedNet()), given, ignore_mismatched_sizes=True, report=True)
        assert (found.loaded, found.missing, list(found.mismatched)) == ([], [], ["head.weight"])

    def test_ties_between_modules_are_loaded(self):
        one, other = nn.Linear(2, 3), nn.Linear(2, 3)
        other.weight = one.weight
        state = fx.init({"a": one, "b": other})
        given = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3), "b.bias": torch.zeros(3)}
        loaded = fx.load_state_dict(state, given)
        testing.assert_equal(fx.state_dict(loaded)["b"]["weight"], torch.ones(3, 2), "the tied weight")


def test_tree_accepts_flat_names_with_paths():
    torch.manual_seed(0)
    modules = {"g": Net(), "d": [nn.Linear(2, 3), torch.ones(2)]}
    weights = fx.state_dict(fx.init(modules))
    flat = {**prefixed("g.", weights["g"]), **prefixed("d.0.", weights["d"][0]), "d.1": torch.zeros(2)}
    loaded = fx.load_state_dict(fx.init({"g": Net(), "d": [nn.Linear(2, 3), torch.ones(2)]}), flat)
    testing.assert_equal(fx.state_dict(loaded), {**weights, "d": [weights["d"][0], torch.zeros(2)]}, "the weights")
    nested = {**weights, "epoch": 3}
    message = refused(r"unexpected \(1\): epoch", fx.init(modules), nested)
    assert "strict=False" in message
    refused(r"unexpected \(1\): d\.2", fx.init(modules), {**weights, "d": [*weights["d"], torch.ones(1)]})


def test_different_extra_state_is_rejected():
    class Extra(nn.Linear):
        version = 1

        def get_extra_state(self):
            return {"version": self.version}

        def set_extra_state(self, state):
            self.version = state["version"]

    module = Extra(2, 1)
    module.version = 2
    refused(
        r"_extra_state to be the model's, \{'version': 1\}, got \{'version': 2\}\. .* before fxtrain\.init",
        fx.init(Extra(2, 1)),
        module.state_dict(),
    )


def test_part_selects_submodule_or_tree_entry():
    torch.manual_seed(0)
    module, body = Net(), Net().body
    found = fx.load_state_dict(fx.init(module), body.state_dict(), part="body", report=True)
    assert torch.equal(found.state.params["body.0.weight"], body[0].weight)
    assert torch.equal(found.state.params["head.weight"], module.head.weight)
    assert found.loaded == [f"body.{name}" for name in body.state_dict()]
    state = fx.init({"g": [Net(), torch.ones(2)], "d.e": nn.Linear(2, 3)})
    loaded = fx.load_state_dict(state, body.state_dict(), part="g.0.body")
    assert torch.equal(loaded.params["g"][0]["body.0.weight"], body[0].weight)
    loaded = fx.load_state_dict(state, {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, part="d.e")
    assert not loaded.params["d.e"]["weight"].any()
    refused(r"path of a submodule, got 'g\.7'. Choose from 0, 1\.", state, {}, part="g.7")
    message = refused("no name matches", fx.init(module), prefixed("module.", body.state_dict()), part="body")
    assert "Pass rename={'module.': ''}, with which all names match." in message


def test_error_for_nested_state_dict_lists_its_name():
    given = {"epoch": 3, "state_dict": nn.Linear(2, 1).state_dict()}
    message = refused("no name matches", fx.init(nn.Linear(2, 1)), given)
    assert re.search(r"unexpected \(2\): epoch, state_dict", message)
