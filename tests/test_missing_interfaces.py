"""A torch without one of the private interfaces, or newer than those tested: results stay right, with one warning."""

import functools
import warnings

import pytest
import torch

import fxtrain as fx
from fxtrain._torch_internals import interface
from fxtrain._torch_internals.interface import INTERFACES, Feature

TX = fx.optim.sgd(1e-2, momentum=0.9)
NEEDED = [path for path, each in INTERFACES.items() if each.feature is not None]
OTHERS = [path for path in INTERFACES if path not in NEEDED]
USED_BY_DYNAMO = {
    "torch._C._autograd._saved_tensors_hooks_enable",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._storage_Use_Count",
    "torch._dynamo.exc.FailOnRecompileLimitHit",
    "torch._dynamo.variables.torch.get_overridable_functions",
    "torch.utils._pytree.register_pytree_node",
}
OPTIONS = {Feature.SYMBOLIC: {"dynamic": True}, Feature.AHEAD: {"mode": "ahead-of-time"}}


@pytest.fixture(autouse=True)
def forget_warnings():
    interface._warn.cache_clear()
    yield
    interface._warn.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def compile_by_eager(monkeypatch):
    """Makes ``torch.compile`` trace, but not generate code."""
    by_torch = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: by_torch(function, **options | {"backend": "eager", "mode": None})
    )


def hide(monkeypatch, path):
    monkeypatch.setattr(INTERFACES[path], "path", f"{path}_of_another_version")


@functools.cache
def module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))


def loss_fn(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(8, 3, generator=generator), "y": torch.randn(8, 1, generator=generator)} for _ in range(3)
    ]


def trained(compiled=None):
    """Returns the parameters after three steps."""
    step = fx.train_step(loss_fn, TX)
    return fx.fit(fx.init(module(), TX), step if compiled is None else compiled(step), batches(), epochs=1).state.params


@functools.cache
def expected():
    return trained()


def fallbacks(caught):
    return [str(each.message) for each in caught if "torch.compile instead" in str(each.message)]


@pytest.mark.parametrize("path", INTERFACES)
def test_eager_training_is_right_without_interface(monkeypatch, recwarn, path):
    reference = expected()
    hide(monkeypatch, path)
    assert all(map(torch.equal, fx.tree.leaves(trained()), fx.tree.leaves(reference)))
    assert not fallbacks(recwarn)


@pytest.mark.parametrize("path", NEEDED)
def test_missing_interface_is_named_once(monkeypatch, path):
    hide(monkeypatch, path)
    feature = INTERFACES[path].feature
    with pytest.warns(UserWarning, match=f"lacks {path}_of_another_version.*{INTERFACES[path].purpose}"):
        assert not interface.supports(feature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not interface.supports(feature)


@pytest.mark.parametrize(
    "path",
    [
        "torch.fx.experimental.proxy_tensor.make_fx",
        "torch._subclasses.FakeTensorMode",
        "torch._C._get_dispatch_mode",
        "torch.compiler._is_compiling_flag",
        "torch._inductor.compile",
        "torch._inductor.aoti_load_package",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv",
    ],
)
def test_step_is_compiled_by_torch_compile_without_interface(monkeypatch, recwarn, compile_by_eager, path):
    reference = expected()
    hide(monkeypatch, path)
    options = OPTIONS.get(INTERFACES[path].feature, {})
    compiled = []

    def compile_step(step):
        compiled.append(fx.compile(step, **options))
        return compiled[0]

    found = trained(compile_step)
    torch.testing.assert_close(fx.tree.leaves(found), fx.tree.leaves(reference))
    assert "dynamo" in compiled[0].route
    (warning,) = fallbacks(recwarn)
    assert path in warning


@pytest.mark.parametrize("path", sorted(USED_BY_DYNAMO))
def test_dynamo_is_right_without_interface(monkeypatch, path):
    check_dynamo_without(monkeypatch, path)


@pytest.mark.parametrize("start", [0, 1])
def test_dynamo_is_right_without_others(monkeypatch, start):
    # Neighbours are in different halves, because one of a pair, such as a getter and its setter, may hide the other.
    check_dynamo_without(monkeypatch, *[path for path in OTHERS if path not in USED_BY_DYNAMO][start::2])


def check_dynamo_without(monkeypatch, *paths):
    reference = expected()
    for path in paths:
        hide(monkeypatch, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trained(lambda step: fx.compile(step, backend="eager"))
    torch.testing.assert_close(fx.tree.leaves(found), fx.tree.leaves(reference))


def test_newer_torch_is_named_and_step_compiled_by_torch_compile(monkeypatch, recwarn, compile_by_eager):
    reference = expected()
    monkeypatch.setattr(interface, "NEWEST_TESTED", (2, 1))
    steps = []

    def compile_step(step):
        steps.append(fx.compile(step))
        return steps[0]

    found = trained(compile_step)
    torch.testing.assert_close(fx.tree.leaves(found), fx.tree.leaves(reference))
    assert "dynamo" in steps[0].route
    (warning,) = fallbacks(recwarn)
    assert "tested with torch up to 2.1" in warning


def test_newer_torch_trains_uncompiled_without_a_warning(monkeypatch, recwarn):
    reference = expected()
    monkeypatch.setattr(interface, "NEWEST_TESTED", (2, 1))
    assert all(map(torch.equal, fx.tree.leaves(trained()), fx.tree.leaves(reference)))
    assert not fallbacks(recwarn)


def test_random_functions_hidden_from_modes_leave_the_step_uncompiled(monkeypatch, compile_by_eager):
    reference = expected()
    hide(monkeypatch, "torch._dynamo.variables.torch.get_overridable_functions")
    hide(monkeypatch, "torch.fx.experimental.proxy_tensor.make_fx")
    steps = []

    def compile_step(step):
        steps.append(fx.compile(step))
        return steps[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trained(compile_step)
    assert steps[0].route == "uncompiled"
    assert all(map(torch.equal, fx.tree.leaves(found), fx.tree.leaves(reference)))
