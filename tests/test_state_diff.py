"""``state.diff``: the leaves in which two states differ."""

import math

import problem
import pytest
import torch

import fxtrain as fx


@pytest.fixture
def state():
    return problem.start()


def changed(state, **params):
    return state.replace(params={**state.params, **params})


def only(diff):
    (leaf,) = diff.leaves
    return leaf


def test_equal_states_have_no_difference(state):
    diff = state.diff(state.copy())
    assert not diff
    assert diff.compared == len(fx.tree.leaves(state))
    assert repr(diff) == f"no difference in {diff.compared} leaves"
    assert f"no difference in {diff.compared} leaves" in diff._repr_html_()


def test_changed_value_states_largest_difference_and_number_of_elements(state):
    name, leaf = next((name, leaf) for name, leaf in state.params.items() if leaf.numel() > 4)
    other = leaf.clone()
    other.view(-1)[:3] += torch.tensor([0.5, -2.0, 1.0])
    found = only(state.diff(changed(state, **{name: other})))
    assert (found.path, found.kind, found.elements) == (f"state.params[{name!r}]", "value", 3)
    assert found.largest == pytest.approx(2.0)
    assert "by at most 2 in 3 elements" in repr(state.diff(changed(state, **{name: other})))


def test_small_leaves_show_both_values(state):
    row = repr(state.diff(state.replace(step=torch.tensor(7)))).splitlines()[1]
    assert row.split() == ["state.step", "0", "7", "by", "7"]


@pytest.mark.parametrize(
    ("other", "kind", "texts"),
    [
        (torch.zeros(3, 3), "shape", ("float32 [2]", "float32 [3, 3]")),
        (torch.zeros(2, dtype=torch.float64), "dtype", ("float32", "float64")),
    ],
)
def test_other_shape_or_dtype_is_not_compared_by_value(state, other, kind, texts):
    state = state.replace(params={"w": torch.zeros(2)})
    found = only(state.diff(changed(state, w=other)))
    assert (found.kind, found.this, found.other, found.largest) == (kind, *texts, None)


def test_leaves_of_one_state_only_are_missing_in_the_other(state):
    slotted = fx.attach(state, fx.callbacks.stop_at("loss", 0.1)).with_slot("mine", {"count": torch.tensor(3)})
    there = {leaf.path: leaf for leaf in slotted.diff(state).leaves}
    assert there["state.slots['mine']['count']"].other == "missing"
    assert {leaf.this for leaf in state.diff(slotted).leaves} == {"missing"}
    assert {leaf.kind for leaf in state.diff(slotted).leaves} == {"structure"}


def test_comparison_is_bitwise_with_equal_nans(state):
    at = state.replace(params={"w": torch.tensor([math.nan, 0.0, math.inf])})
    assert not at.diff(at.copy())
    found = only(at.diff(changed(at, w=torch.tensor([math.nan, -0.0, math.inf]))))
    assert (found.largest, found.elements) == (0.0, 1)
    assert math.isnan(only(at.diff(changed(at, w=torch.tensor([1.0, 0.0, math.inf])))).largest)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.complex64, torch.float8_e4m3fn])
def test_every_dtype_is_compared(state, dtype):
    at = state.replace(params={"w": torch.zeros(6).to(dtype)})
    found = only(at.diff(changed(at, w=torch.ones(6).to(dtype))))
    assert (found.largest, found.elements) == (1.0, 6)


def test_large_integers_are_compared_exactly(state):
    at = state.replace(seed=torch.tensor(2**62))
    assert only(at.diff(state.replace(seed=torch.tensor(2**62 + 1)))).largest == 1


def test_long_differences_are_cut(state):
    at = state.replace(params={f"w{index:03}": torch.zeros(2) for index in range(300)})
    diff = at.diff(at.replace(params={name: leaf + 1 for name, leaf in at.params.items()}))
    assert len(diff.leaves) == 300
    assert repr(diff).splitlines()[-1] == "  ... and 260 more"
    assert "and 260 more leaves" in diff._repr_html_()
    assert len(diff._repr_html_()) < 20_000


def test_names_are_escaped(state):
    at = state.replace(params={"<b>\x1b": torch.zeros(2)})
    diff = at.diff(at.replace(params={"<b>\x1b": torch.ones(2)}))
    assert "<b>\x1b" not in diff._repr_html_()
    assert "&lt;b&gt;" in diff._repr_html_()
    assert "\x1b" not in repr(diff)


def test_error_for_another_object_names_what_to_pass(state):
    with pytest.raises(TypeError, match=r"expected another TrainState to compare with, got 3\. Pass a state"):
        state.diff(3)


def test_error_for_leaf_without_values_names_it(state):
    with pytest.raises(ValueError, match=r"expected two states with values, got state.params\['w'\] on meta"):
        state.replace(params={"w": torch.zeros(2)}).diff(state.replace(params={"w": torch.zeros(2, device="meta")}))


def test_restored_state_does_not_differ(state, tmp_path):
    step = problem.step()
    after, _ = step(state, problem.data()[0])
    fx.save(tmp_path / "saved", after)
    assert not after.diff(fx.restore(tmp_path / "saved", like=state))
    assert after.diff(state)


def test_sparse_leaves_are_compared(state):
    at = state.replace(params={"w": torch.eye(3).to_sparse()})
    assert not at.diff(at.copy())
    assert only(at.diff(changed(at, w=2 * at.params["w"]))).elements == 3
