"""Core types: states of tensors, controls that combine, and the closed union of events."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given
from hypothesis import strategies as st

import fxtrain as fx
from fxtrain import tree
from fxtrain.core import EVENTS, KINDS, SESSION, TRACED, TRAJECTORY, Due


def make_state(**changes):
    state = fx.init(torch.nn.Linear(2, 3), seed=7)
    return state.replace(**changes)


class TestState:
    def test_is_a_pytree_for_optree_and_torch(self):
        state = make_state()
        assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(state))
        assert len(torch_pytree.tree_leaves(state)) == len(tree.leaves(state))
        again = torch_pytree.tree_map(lambda leaf: leaf, state)
        assert isinstance(again, fx.TrainState)
        assert again.model is state.model

    @pytest.mark.parametrize(
        ("changes", "path"),
        [
            ({"step": 3}, r"expected state\.step to be a tensor, got 3"),
            ({"params": {"w": [torch.zeros(1), 2.5]}}, r"expected state\.params\['w'\]\[1\] to be a tensor, got 2\.5"),
            (
                {"slots": {"ema": {"decay": "high"}}},
                r"expected state\.slots\['ema'\]\['decay'\] to be a tensor, got 'high'",
            ),
        ],
    )
    def test_non_tensor_leaf_is_rejected_with_path(self, changes, path):
        with pytest.raises(TypeError, match=path):
            make_state(**changes)
        with pytest.raises(TypeError, match=path):
            dataclasses.replace(make_state(), **changes)

    def test_unknown_field_is_rejected(self):
        with pytest.raises(TypeError, match=r"field of TrainState \(step, params, .*\), got 'parameters'"):
            make_state(parameters={})

    def test_model_can_be_replaced(self):
        other = make_state()
        assert make_state(model=other.model).model is other.model

    def test_is_immutable(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            make_state().step = torch.tensor(1)

    def test_tree_map_may_return_non_tensors(self):
        shapes = tree.map(lambda leaf: tuple(leaf.shape), make_state())
        assert shapes.params["weight"] == (3, 2)

    def test_copy_shares_no_memory(self):
        state = make_state()
        twin = state.copy()
        pointers = {leaf.data_ptr() for leaf in tree.leaves(state)}
        assert pointers.isdisjoint(leaf.data_ptr() for leaf in tree.leaves(twin))

    def test_repr_is_a_table_without_values(self):
        text = repr(make_state(params={"w": torch.full((4, 5), 0.123)}))
        assert "0.12" not in text
        row = next(line for line in text.splitlines() if "params" in line)
        assert row.split() == ["state.params['w']", "[4,", "5]", "float32", "80", "B"]
        many = make_state(params={f"w{i:03}": torch.zeros(1024) for i in range(600)})
        assert len(repr(many).splitlines()) < 50
        assert "more" in repr(many)


flags = st.one_of(st.booleans(), st.booleans().map(torch.tensor))
requests = st.dictionaries(st.sampled_from(["a", "b", "c"]), flags, max_size=3)


@st.composite
def controls(draw, names=("x", "y", "z")):
    kinds = {kind: draw(requests) for kind in ("stop", "save", "evaluate", "end_epoch", "skip_batch", "skip_update")}
    rewind = draw(st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 9), max_size=2))
    name = draw(st.sampled_from(names))
    return fx.Control(**kinds, rewind=rewind, log={name: draw(st.integers())} if draw(st.booleans()) else None)


def meaning(control):
    held = {kind: set(control.reasons(kind)) for kind in KINDS}
    return held, control.rewind, dict(control.log)


class TestControl:
    @given(controls(names="x"), controls(names="y"), controls(names="z"))
    def test_is_a_monoid(self, a, b, c):
        assert meaning((a | b) | c) == meaning(a | (b | c))
        assert meaning(a | fx.Control()) == meaning(a) == meaning(fx.Control() | a)

    @given(controls(names="x"), controls(names="y"))
    def test_join_keeps_all_reasons(self, a, b):
        joined = a | b
        for kind in KINDS:
            assert set(joined.reasons(kind)) == set(a.reasons(kind)) | set(b.reasons(kind))
        for reason in {*a.rewind, *b.rewind}:
            assert joined.rewind[reason] == max(a.rewind.get(reason, 0), b.rewind.get(reason, 0))

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda control: pickle.loads(pickle.dumps(control))])
    def test_copy_equals_original(self, copied):
        control = fx.Control(stop=True, reason="done", log={"lr": 0.1})
        assert copied(control) == control
        assert not fx.Control()
        assert copied(fx.Control()) is fx.Control()  # the fold recognizes it by identity

    def test_reasons_require_true_flag(self):
        control = fx.Control(stop=torch.tensor(False), reason="no") | fx.Control(stop=True, reason="yes")
        assert control.reasons("stop") == ["yes"]
        assert bool(control.any("stop"))

    def test_duplicate_log_name_names_both_callbacks(self):
        first = fx.Control(log={"lr": 1.0}).owned_by("monitor")
        second = fx.Control(log={"lr": 2.0}).owned_by("plateau")
        with pytest.raises(ValueError, match="got 'lr' from monitor and from plateau"):
            first | second

    @pytest.mark.parametrize("flag", [1, "yes", torch.tensor(1.0), torch.tensor([True]), None])
    def test_flag_must_be_bool_or_scalar_bool_tensor(self, flag):
        with pytest.raises(TypeError, match="expected stop to be a bool"):
            fx.Control(stop=flag)

    @pytest.mark.parametrize("steps", [-1, True, 2.5])
    def test_rewind_must_be_non_negative_int(self, steps):
        with pytest.raises(TypeError, match="expected rewind to be an int of at least 0"):
            fx.Control(rewind=steps)

    def test_stop_without_final_save_wins(self):
        control = fx.Control(stop=True, reason="a") | fx.Control(stop=True, reason="b", final_save=False)
        assert control.reasons("skip_final_save") == ["b"]

    def test_is_a_pytree_structured_by_reasons(self):
        control = fx.Control(stop=torch.tensor(True), reason="r", log={"x": torch.tensor(2.0)}).owned_by("cb")
        again = tree.unflatten(*reversed(tree.flatten(control)))
        assert meaning(again) == meaning(control)
        assert torch.vmap(lambda flag: fx.Control(stop=flag, reason="r"))(torch.tensor([True, False])).stop[
            "r"
        ].tolist() == [True, False]

    def test_is_immutable(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            fx.Control().log = {}


class TestEvents:
    def test_events_are_traced_trajectory_or_session(self):
        assert set(EVENTS) == {*TRACED, *TRAJECTORY, *SESSION, fx.Published}
        assert len(EVENTS) == len(TRACED) + len(TRAJECTORY) + len(SESSION) + 1

    @pytest.mark.parametrize("kind", EVENTS)
    def test_event_is_a_frozen_dataclass_for_match(self, kind):
        values = dict.fromkeys((field.name for field in dataclasses.fields(kind)), 1)
        event = kind(**values)
        match event:
            case fx.StepEnd(metrics=found):
                assert kind is fx.StepEnd
                assert found == 1
            case _:
                assert kind is not fx.StepEnd
        with pytest.raises(dataclasses.FrozenInstanceError):
            event.step = 2

    def test_epoch_is_fractional_or_unknown(self):
        assert fx.StepEnd(step=1, metrics={}, position=3, epoch_length=4).epoch == 0.75
        assert fx.StepEnd(step=1, metrics={}, position=3).epoch is None


def test_due_starts_with_epoch_begin():
    assert {name for name, flag in Due.start()._asdict().items() if flag} == {"begin_epoch"}
