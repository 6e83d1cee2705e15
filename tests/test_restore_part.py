"""Partial restores: by path patterns, and with fresh parameters, including their optimizer state and counts."""

import warnings
from typing import NamedTuple

import pytest
import torch
from test_loading import Net
from torch import Tensor
from torch.nn import functional

import fxtrain as fx
from fxtrain import testing, tree

TX = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(fx.schedules.constant(0.1)))
HEAD = ["head.bias", "head.weight"]
EMA = fx.callbacks.ema(0.5)


def loss_fn(model, batch):
    return functional.mse_loss(model(batch).sum(1), batch.sum(1))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 2, generator=generator) for _ in range(count)]


def start(classes=3, *, seed=0, callbacks=None):
    torch.manual_seed(seed)
    state = fx.init(Net(classes), TX, seed=seed)
    return state if callbacks is None else fx.attach(state, callbacks)


def trained(state, steps=3, tx=TX):
    step = fx.train_step(loss_fn, tx, callbacks=EMA)
    return fx.fit(state, step, batches(6), steps=steps, callbacks=[EMA]).state


def checkpoint(tmp_path, state):
    return fx.save(tmp_path / "c", state)


def quiet(path, like, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fx.restore(path, like=like, **options)


def adam(state):
    return state.opt_state[1][0]


@pytest.mark.parametrize("classes", [3, 5])
def test_fresh_head_keeps_its_optimizer_state_and_counts(tmp_path, classes):
    saved, like = trained(start()), start(classes, seed=7, callbacks=EMA)
    path = checkpoint(tmp_path, saved)
    with pytest.warns(UserWarning, match=r"'ema' is restored with counts that fresh parameters share"):
        back = fx.restore(path, like=like, fresh="head.*")
    for name in back.params:
        source = like if name in HEAD else saved
        for part in ("mu", "nu"):
            assert torch.equal(getattr(adam(back), part)[name], getattr(adam(source), part)[name]), (part, name)
        assert int(adam(back).count[name]) == (0 if name in HEAD else 3)
        assert torch.equal(back.params[name], source.params[name]), name
        assert torch.equal(back.slots["ema"].average[0][name], source.slots["ema"].average[0][name]), name
    testing.assert_equal(back.buffers, saved.buffers, "the buffers of the body")
    assert (int(back.step), int(back.position), int(back.opt_state[1][2].count)) == (3, 3, 3)
    trained(back, 5)


def test_head_under_another_name_is_fresh(tmp_path):
    class Renamed(Net):
        def __init__(self):
            super().__init__(2)
            self.classifier = self.head
            del self.head

        def forward(self, x):
            return self.classifier(self.body(x))

    saved = trained(start()).replace(slots={})
    like = fx.init(Renamed(), TX)
    path = checkpoint(tmp_path, saved)
    with pytest.raises(fx.CheckpointError, match=r"fresh=\['classifier.bias', .*'head.weight'\]"):
        fx.restore(path, like=like)
    back = quiet(path, like, fresh=["head.*", "classifier.*"])
    assert int(adam(back).count["classifier.bias"]) == 0
    assert int(adam(back).count["body.0.bias"]) == 3


def test_shape_mismatch_is_refused_with_the_remedy(tmp_path):
    path, like = checkpoint(tmp_path, trained(start()).replace(slots={})), start(5)
    before = like.copy()
    with pytest.raises(fx.CheckpointError) as error:
        fx.restore(path, like=like)
    message = str(error.value)
    assert "state.params['head.weight']: expected float32[5, 4], got float32[3, 4]" in message
    assert f"fresh={HEAD}, or patterns of these names, to keep them as in `like`" in message
    testing.assert_equal(like, before, "the given state")
    quiet(path, like, fresh=HEAD)


def test_checkpointer_restores_with_a_fresh_head(tmp_path):
    with fx.checkpointer(tmp_path / "run") as checkpoints:
        checkpoints.save(trained(start()).replace(slots={}))
        back = checkpoints.restore(start(5), fresh="head.*")
    assert int(adam(back).count["body.0.weight"]) == 3


def test_pattern_without_a_match_is_refused(tmp_path):
    path = checkpoint(tmp_path, start())
    with pytest.raises(ValueError, match=r"expected 'tail.*' to match a parameter or buffer"):
        fx.restore(path, like=start(), fresh="tail.*")
    with pytest.raises(fx.CheckpointError, match=r"expected where=\"state.\*\['tail.\*'\]\" to match a path of `like`"):
        fx.restore(path, like=start(), where="state.*['tail.*']")
    with pytest.raises(ValueError, match=r"expected a TrainState as `like` for fresh='head.\*'"):
        fx.restore(path, like=start().params, fresh="head.*")


def test_pattern_selects_a_submodule_with_its_optimizer_state_and_counts(tmp_path):
    saved, like = trained(start()), start(5, seed=7)
    back = quiet(checkpoint(tmp_path, saved), like, where="state.*['body.*']")
    for name in back.params:
        source = like if name in HEAD else saved
        assert torch.equal(back.params[name], source.params[name]), name
        assert torch.equal(adam(back).nu[name], adam(source).nu[name]), name
        assert int(adam(back).count[name]) == (0 if name in HEAD else 3)
    testing.assert_equal(back.buffers, saved.buffers, "the buffers of the body")
    assert (int(back.step), int(back.position), int(back.opt_state[1][2].count)) == (0, 0, 0)
    assert back.slots == {}


def test_paths_missing_on_one_side_of_a_pattern_are_named(tmp_path):
    path = checkpoint(tmp_path, start())
    with pytest.raises(fx.CheckpointError, match=r"params\['body.0.bias'\]: expected none, got float32\[4\]"):
        fx.restore(path, like=fx.init(torch.nn.ModuleDict({"head": torch.nn.Linear(4, 3)})), where="state.params")
    more = fx.init(torch.nn.ModuleDict({"tail": torch.nn.Linear(1, 1), "head": torch.nn.Linear(4, 3)}))
    with pytest.raises(fx.CheckpointError, match=r"state.params\['tail.bias'\]: expected float32\[1\], got none"):
        fx.restore(path, like=more, where="state.params['*.bias']")


def test_average_of_fresh_parameters_is_dropped_with_a_warning(tmp_path):
    path = checkpoint(tmp_path, trained(start()))
    with pytest.warns(UserWarning, match=r"'ema' is only in the checkpoint, .*attach its callback to `like`"):
        back = fx.restore(path, like=start(5), fresh="head.*")
    assert "ema" not in back.slots


def test_mismatch_of_trained_parameters_is_refused_with_the_remedy(tmp_path):
    frozen = trained(fx.with_trainable(start(), TX, "head.*")).replace(slots={})
    path = checkpoint(tmp_path, frozen)
    with pytest.raises(
        fx.CheckpointError, match=r"only `like` has optimizer state for body\.0.*fxtrain.with_trainable"
    ):
        fx.restore(path, like=start())
    back = quiet(path, fx.with_trainable(start(), TX, "head.*"))
    testing.assert_equal(back, frozen, "restored as it was trained")
    unfrozen = trained(fx.with_trainable(back, TX, "*"), 5)
    assert (int(adam(unfrozen).count["body.0.bias"]), int(adam(unfrozen).count["head.bias"])) == (2, 5)
    one = fx.save(tmp_path / "d", unfrozen.replace(slots={}))
    with pytest.raises(fx.CheckpointError, match=r"only the checkpoint has optimizer state for body\.0"):
        fx.restore(one, like=fx.with_trainable(start(), TX, "head.*"))


def test_freezing_and_restoring_in_mid_run_continues_bitwise(tmp_path):
    plain = trained(fx.with_trainable(trained(fx.with_trainable(start(), TX, "head.*")), TX, "*"), 6)
    first = checkpoint(tmp_path, trained(fx.with_trainable(start(), TX, "head.*")))
    like = fx.attach(fx.with_trainable(start(seed=5), TX, "head.*"), EMA)
    second = fx.save(tmp_path / "d", trained(fx.with_trainable(quiet(first, like), TX, "*"), 4))
    resumed = trained(quiet(second, fx.attach(start(seed=6), EMA)), 6)
    testing.assert_equal(resumed, plain, "the run that was not interrupted")


class OneCount(NamedTuple):
    count: Tensor
    mu: dict


def test_fresh_parameters_with_a_shared_count_are_refused(tmp_path):
    def update(gradients, state, params):
        return gradients, OneCount(state.count + 1, state.mu)

    tx = fx.optim.GradientTransformation(lambda params: OneCount(torch.tensor(0), tree.zeros_like(params)), update)
    torch.manual_seed(0)
    saved = trained(fx.init(Net(), tx), 2, tx).replace(slots={})
    path = checkpoint(tmp_path, saved)
    with pytest.raises(ValueError, match=r"fresh='head.\*': expected .* after 2 updates.*where='state.params'"):
        fx.restore(path, like=fx.init(Net(5), tx), fresh="head.*")
    back = quiet(path, fx.init(Net(5), tx), fresh="head.*", where=["state.params", "state.buffers"])
    assert torch.equal(back.params["body.0.bias"], saved.params["body.0.bias"])


def test_elements_of_per_parameter_vectors_are_matched_by_name(tmp_path):
    """Equal lengths are not enough: the vectors are over different pairs of parameters."""
    tx = fx.optim.scale_by_adam()
    saved, like = (fx.init({name: torch.ones(2) for name in names}, tx) for names in ("ab", "bc"))
    counts = saved.opt_state.count.replace(torch.tensor([2, 3]))
    path = checkpoint(tmp_path, saved.replace(opt_state=saved.opt_state._replace(count=counts)))
    back = quiet(path, like, fresh=["a", "c"])
    assert (int(back.opt_state.count["b"]), int(back.opt_state.count["c"])) == (3, 0)


def test_fresh_parameters_of_an_abstract_state_are_refused(tmp_path):
    path = checkpoint(tmp_path, trained(start()).replace(slots={}))
    with torch.device("meta"):
        abstract = start(5)
    with pytest.raises(
        fx.CheckpointError, match=r"(?s)expected values for .*params\['head.bias'\].*on the meta device"
    ):
        fx.restore(path, like=abstract, fresh="head.*")


def test_parameter_named_like_a_field_of_the_optimizer_state_is_fresh(tmp_path):
    tx = fx.optim.adam(0.1)
    saved = fx.init({"mu": torch.ones(2), "x": torch.ones(2)}, tx)
    saved = saved.replace(opt_state=tree.map(lambda leaf: leaf + 1, saved.opt_state))
    back = quiet(checkpoint(tmp_path, saved), fx.init({"mu": torch.ones(3), "x": torch.ones(2)}, tx), fresh="mu")
    state = back.opt_state[0]
    assert (state.mu["x"].tolist(), state.nu["mu"].tolist()) == ([1, 1], [0, 0, 0])
    assert (int(state.count["x"]), int(state.count["mu"])) == (1, 0)


def test_dtype_mismatch_is_refused_with_the_remedy(tmp_path):
    path = checkpoint(tmp_path, fx.init(Net().bfloat16()))
    with pytest.raises(fx.CheckpointError, match=r"Only dtypes differ\. Create `like` with .*dtype=torch.bfloat16\)"):
        fx.restore(path, like=fx.init(Net()))
    back = quiet(path, fx.init(Net(), dtype=torch.bfloat16), where="state.params")
    loaded = fx.load_state_dict(fx.init(Net()), fx.state_dict(back), cast=True)
    assert loaded.params["head.bias"].dtype == torch.float32


def test_dtype_mismatch_of_a_slot_is_refused_without_another_dtype_of_the_model(tmp_path):
    path = checkpoint(tmp_path, fx.attach(start(), fx.callbacks.early_stopping("loss", patience=2, unit="steps")))
    with pytest.raises(fx.CheckpointError, match=r"To initialize 'early_stopping', restore") as refused:
        fx.restore(path, like=fx.attach(start(), fx.callbacks.early_stopping("loss", patience=2, unit="epochs")))
    assert "Only dtypes differ" not in str(refused.value)


def test_slots_over_all_parameters_are_refused_with_the_remedy(tmp_path):
    monitor = fx.callbacks.weight_stats()
    path = checkpoint(tmp_path, fx.attach(start(), monitor))
    with_more = torch.nn.ModuleDict({**dict(Net().named_children()), "more": torch.nn.Linear(1, 1)})
    bare = fx.init(with_more, TX)
    with pytest.raises(fx.CheckpointError, match=r"To initialize 'weights', restore into a state without these slots"):
        fx.restore(path, like=fx.attach(bare, monitor), fresh="more.*")
    fx.attach(quiet(path, bare, fresh="more.*", extra="drop"), monitor)


def test_fresh_refuses_counts_without_parameter_names(tmp_path):
    state = fx.init({"a": torch.ones(2), "b": torch.ones(2)}, fx.optim.scale_by_adam())
    adam_state = state.opt_state
    nameless = adam_state._replace(count=WithoutNames(torch.tensor([2, 3])))
    path = checkpoint(tmp_path, state.replace(opt_state=nameless))
    testing.assert_equal(quiet(path, state).opt_state.count.values, torch.tensor([2, 3]), "the counts")
    with pytest.raises(fx.CheckpointError, match=r"expected the parameter of each element of .*count.values"):
        fx.restore(path, like=state, fresh="a")


class WithoutNames(NamedTuple):
    values: Tensor


def test_where_maps_an_element_to_a_scalar_and_back(tmp_path):
    state = fx.init({"a": torch.ones(2), "b": torch.ones(2)}, fx.optim.scale_by_adam())
    counts = state.opt_state.count.replace(torch.tensor([2, 3]))
    path = checkpoint(tmp_path, state.replace(opt_state=state.opt_state._replace(count=counts)))
    element = "state.opt_state.count.values['b']"
    assert quiet(path, torch.tensor(0), where={"tree": element}).tolist() == 3
    scalar = fx.save(tmp_path / "d", torch.tensor(7))
    assert quiet(scalar, state, where={element: "tree"}).opt_state.count.values.tolist() == [0, 7]
