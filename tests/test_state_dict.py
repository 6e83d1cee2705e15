"""State dicts of modules, loaded into a state and read back exactly."""

import problem
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.arange(3.0), persistent=False)
        self.version = 1

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))

    def get_extra_state(self):
        return {"version": self.version}

    def set_extra_state(self, state):
        self.version = state["version"]


@pytest.mark.parametrize(
    "make",
    [
        problem.module,
        Tied,
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.LSTM(3, 4, num_layers=2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    ],
    ids=["batch norm", "tied", "transformer", "lstm", "parametrized"],
)
def test_state_dict_round_trip_is_exact(make):
    torch.manual_seed(0)
    module, other = make(), make()
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()):
            value.copy_(torch.rand_like(value.double()) * 9)
    state = fx.init(module)
    before = state.copy()
    loaded = fx.load_state_dict(state, other.state_dict())
    testing.assert_equal(loaded.params, fx.init(other).params, "parameters")
    assert fx.state_dict(loaded).keys() == other.state_dict().keys()
    again = make()
    again.load_state_dict(fx.state_dict(loaded))
    for name, value in other.state_dict().items():
        got = again.state_dict()[name]
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value
    testing.assert_equal(state, before, "the given state")


def test_returned_state_dict_shares_no_memory():
    state = problem.start()
    before = state.copy()
    for value in fx.state_dict(state).values():
        value.zero_()
    testing.assert_equal(state, before, "the state")


def test_load_keeps_optimizer_state_and_seed():
    tx = fx.optim.adam(0.1)
    state = fx.init(problem.module(), tx, seed=3)
    loaded = fx.load_state_dict(state, problem.module().state_dict())
    testing.assert_equal(loaded.opt_state, state.opt_state, "the optimizer's memory")
    assert int(loaded.seed) == 3


def test_tree_of_modules_round_trips():
    torch.manual_seed(0)
    modules = {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1), "scale": torch.ones(2)}
    given = {"generator": nn.Linear(2, 3).state_dict(), "critic": nn.Linear(3, 1).state_dict(), "scale": torch.zeros(2)}
    loaded = fx.load_state_dict(fx.init(modules), given)
    for name, value in given.items():
        got = fx.state_dict(loaded)[name]
        testing.assert_equal(got, dict(value) if isinstance(value, dict) else value, name)


def test_mismatched_state_dicts_are_refused():
    state = fx.init(nn.Linear(2, 3))
    good = nn.Linear(2, 3).state_dict()
    with pytest.raises(
        ValueError, match=r"expected the names of the model, got others .*\n  unexpected \(1\): more\nPass strict"
    ):
        fx.load_state_dict(state, {**good, "more": torch.ones(1)})
    with pytest.raises(ValueError, match=r"  missing \(1\): bias\nPass strict=False to load the 1 names"):
        fx.load_state_dict(state, {"weight": good["weight"]})
    with pytest.raises(
        ValueError, match=r"weight: expected \[3, 2\], got \[2, 3\]\n.*\n?.*ignore_mismatched_sizes=True"
    ):
        fx.load_state_dict(state, nn.Linear(3, 2).state_dict())
    with pytest.raises(ValueError, match=r"weight: expected float32, got float16\n(.*\n)*Pass cast=True"):
        fx.load_state_dict(state, {name: value.half() for name, value in good.items()})


def test_partial_load_warns_with_counts():
    state = fx.init(nn.Linear(2, 3))
    weight = torch.ones(3, 2)
    with pytest.warns(UserWarning, match="Loaded 1 of 2 names of the model") as caught:
        loaded = fx.load_state_dict(state, {"weight": weight, "head": weight, "tail": weight}, strict=False)
    testing.assert_equal(loaded.params["weight"], weight, "the weight")
    testing.assert_equal(loaded.params["bias"], state.params["bias"], "the bias")
    (warning,) = caught
    assert warning.filename == __file__
    assert "Not in the state dict (1): bias" in str(warning.message)
    assert "Not in the model (2): head, tail" in str(warning.message)


def test_load_without_matching_names_is_refused():
    good = nn.Linear(2, 3).state_dict()
    for given in ({f"module.{name}": value for name, value in good.items()}, {}):
        with pytest.raises(ValueError, match=r"no name matches:\n  missing \(2\): weight, bias"):
            fx.load_state_dict(fx.init(nn.Linear(2, 3)), given, strict=False)


def test_partial_load_of_a_tree_names_the_part():
    modules = {"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}
    given = {"a": nn.Linear(2, 3).state_dict(), "b": {}}
    with pytest.warns(UserWarning, match=r"Loaded 2 of 4 .* \(2\): b\.weight, b\.bias"):
        loaded = fx.load_state_dict(fx.init(modules), given, strict=False)
    testing.assert_equal(fx.state_dict(loaded)["a"], dict(given["a"]), "the part that fits")


def test_load_into_modules_without_weights_is_silent(recwarn):
    fx.load_state_dict(fx.init(nn.ReLU()), {}, strict=False)
    fx.load_state_dict(fx.init(nn.Linear(2, 3)), nn.Linear(2, 3).state_dict(), strict=False)
    assert not recwarn.list


def test_load_into_a_meta_state_is_refused():
    with torch.device("meta"):
        state = fx.init(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="on the meta device"):
        fx.load_state_dict(state, nn.Linear(2, 3).state_dict())
