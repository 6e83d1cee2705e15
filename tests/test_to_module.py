"""Modules made of states: values, ties, modes, frozen parameters, and refused modules of another structure."""

import problem
import pytest
import torch
from test_loading import MODULES
from test_state_dict import Tied
from torch import nn

import fxtrain as fx
from fxtrain import testing


@pytest.mark.parametrize("given", [False, True], ids=["own modules", "given modules"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
@pytest.mark.filterwarnings("ignore:.*_norm. is deprecated:FutureWarning")
def test_module_has_the_values_of_the_state(make, given):
    torch.manual_seed(0)
    state = fx.init(make())
    made = fx.to_module(state, make() if given else None)
    testing.assert_equal(fx.state_dict(fx.init(made)), fx.state_dict(state), "the values")
    for part in fx.tree.leaves(made):
        if isinstance(part, nn.Module):
            assert all(type(value) is nn.Parameter for value in part.parameters())


def test_module_computes_what_the_view_computes():
    state = problem.start()
    batch = problem.data()[0]["x"]
    assert torch.equal(fx.to_module(state)(batch), fx.view(state)(batch))


def test_writes_to_the_module_do_not_reach_the_state_or_the_template():
    template = problem.module()
    state = problem.start()
    before, kept = state.copy(), {name: value.clone() for name, value in template.state_dict().items()}
    for module in (fx.to_module(state), fx.to_module(state, template)):
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                value.zero_()
    testing.assert_equal(state, before, "the state")
    testing.assert_equal(dict(template.state_dict()), kept, "the template")
    assert template.training


@pytest.mark.parametrize("given", [False, True], ids=["own module", "given module"])
def test_ties_and_buffers_that_are_not_persistent_are_kept(given):
    state = fx.init(Tied())
    state = state.replace(buffers={**state.buffers, "scratch": torch.ones(3)})
    module = fx.to_module(state, Tied() if given else None)
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.scratch, torch.ones(3))


def test_frozen_parameters_do_not_require_gradients():
    state = fx.with_trainable(fx.init(nn.Linear(2, 1), fx.optim.sgd(0.1)), fx.optim.sgd(0.1), "bias")
    for module in (fx.to_module(state), fx.to_module(state, nn.Linear(2, 1))):
        assert {name: value.requires_grad for name, value in module.named_parameters()} == {
            "weight": False,
            "bias": True,
        }


def test_training_mode_keeps_frozen_batch_norms_in_eval_mode():
    template = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    template[1].eval()
    state = fx.init(template)
    for given in (None, template, fx.to_module(state, train=True)):
        module = fx.to_module(state, given, train=True)
        assert (module.training, module[1].training) == (True, False)
        assert not any(part.training for part in fx.to_module(state, given).modules())


def test_dtype_is_that_of_the_state():
    state = fx.init(nn.Linear(2, 1), dtype=torch.bfloat16)
    assert fx.to_module(state, nn.Linear(2, 1)).weight.dtype == torch.bfloat16


def test_given_module_keeps_its_class_attributes_and_hooks():
    class Named(nn.Linear):
        label = "mine"

    template = Named(2, 1)
    template.config = {"size": 2}
    calls = []
    template.register_forward_hook(lambda *_: calls.append(1))
    module = fx.to_module(fx.init(nn.Linear(2, 1)), template)
    module(torch.ones(1, 2))
    assert (type(module), module.config, calls) == (Named, {"size": 2}, [1])
    assert module.config is not template.config


def test_averaged_view_gives_averaged_weights():
    state = fx.attach(fx.init(nn.Linear(2, 1)), fx.callbacks.ema(0.5))
    average = state.params["weight"].clone()
    state = state.replace(params={**state.params, "weight": average + 1})
    assert torch.equal(fx.to_module(fx.callbacks.averaged(state)).weight, average)
    assert torch.equal(fx.to_module(state).weight, average + 1)


@pytest.mark.parametrize("given", [False, True], ids=["own modules", "given modules"])
def test_tree_of_modules_is_returned_as_a_tree(given):
    state = fx.init({"a": nn.Linear(2, 1), "b": [nn.ReLU(), torch.ones(3)]})
    modules = fx.to_module(state, {"a": nn.Linear(2, 1), "b": [nn.ReLU(), torch.zeros(3)]} if given else None)
    assert torch.equal(modules["a"].weight, state.params["a"]["weight"])
    assert type(modules["b"][0]) is nn.ReLU
    assert torch.equal(modules["b"][1], torch.ones(3))
    assert modules["b"][1].data_ptr() != state.params["b"][1].data_ptr()


class Untied(Tied):
    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())


class Reordered(nn.Module):
    """The tensors of ``Tied``, with the tied ones in the other order."""

    def __init__(self):
        super().__init__()
        tied = Tied()
        self.head, self.norm, self.embed = tied.head, tied.norm, tied.embed
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_order_of_tied_names_does_not_matter():
    state = fx.init(Tied())
    module = fx.to_module(state, Reordered())
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight, state.params["embed.weight"])


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (nn.Linear, nn.Linear(2, 2), r"module\.weight: expected a parameter of shape \[1, 2\], got .* \[2, 2\]"),
        (nn.Linear, nn.Linear(2, 1, bias=False), r"module\.bias: expected a parameter of shape \[1\], got none"),
        (nn.Linear, nn.Sequential(nn.Linear(2, 1)), r"module\.0\.weight: expected none, got a parameter of shape"),
        (nn.Linear, {"a": nn.Linear(2, 1)}, r"module\['a'\]: expected none, got a module"),
        (
            Tied,
            Untied(),
            r"head\.weight: expected .*, tied to module\.embed\.weight, got a parameter of shape \[5, 3\]",
        ),
        (Untied, Tied(), r"head\.weight: expected a parameter of shape \[5, 3\], got .* tied to module\.embed\.weight"),
    ],
    ids=["shape", "missing", "deeper", "tree", "untied", "tied"],
)
def test_module_of_another_structure_is_refused_with_the_path(make, given, message):
    state = fx.init(make(2, 1) if make is nn.Linear else make())
    with pytest.raises(
        ValueError, match=rf"expected module to have the parameters(.|\n)*{message}(.|\n)*Build it like"
    ):
        fx.to_module(state, given)


def test_other_arguments_are_refused():
    state = fx.init(nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"got the class Linear at module\. Make an instance"):
        fx.to_module(state, nn.Linear)
    with pytest.raises(TypeError, match=r"expected uncompiled modules"):
        fx.to_module(state, torch.compile(nn.Linear(2, 1)))
    with pytest.raises(ValueError, match=r"expected one state, got a batch of \[3\]\. Select one"):
        fx.to_module(fx.tree.map(lambda leaf: torch.stack([leaf] * 3), state))
