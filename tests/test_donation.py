"""Donation: a step reuses the buffers of its input state, and tensors that are still readable never change."""

import contextlib
import copy
import dataclasses
import gc
import warnings

import numpy as np
import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.compiler import RecompileError
from fxtrain.compiler.call._memory import is_sole, shared
from fxtrain.core import DonatedError

pytestmark = pytest.mark.slow  # Inductor compiles


def average():
    def update(state, event: fx.Updated, memory):
        return tree.map(lambda old, new: 0.5 * old + 0.5 * new, memory, state.params), fx.Control()

    return fx.stateful("average", lambda state: state.params, update)


CALLBACK = average()
PURE = problem.step(callbacks=CALLBACK)
UNDONATED = fx.compile(PURE)
DONATED = UNDONATED.with_donation()
BATCH = problem.data()[0]


def start():
    return fx.attach(problem.start(), CALLBACK)


def going():
    """A state written by the step, as are all but the first."""
    return DONATED(start(), BATCH)[0]


@pytest.fixture(params=[start, going], ids=["the first state", "a later state"])
def state(request):
    return request.param()


def test_donated_step_equals_undonated_step():
    donated, undonated = start(), start()
    for batch in problem.data() * 2:
        donated, output = DONATED(donated, batch)
        undonated, wanted = UNDONATED(undonated, batch)
        testing.assert_equal(donated, undonated, "the next state")
        testing.assert_equal(output, wanted, "the output")
    assert DONATED.graphs == UNDONATED.graphs == 1


def test_buffers_are_reused():
    state = going()
    places = [leaf.data_ptr() for leaf in tree.leaves(state)]
    for batch in problem.data():
        state, _ = DONATED(state, batch)
        assert [leaf.data_ptr() for leaf in tree.leaves(state)] == places


class TestDonatedState:
    @pytest.mark.parametrize(
        "read",
        [
            lambda state: state.step,
            lambda state: state.params["0.weight"],
            lambda state: state.model,
            lambda state: state.copy(),
            lambda state: state.replace(step=torch.tensor(0)),
            lambda state: state.with_slot("a", torch.tensor(0)),
            lambda state: dataclasses.replace(state, step=torch.tensor(0)),
            lambda state: tree.leaves(state),
            lambda state: tree.map(torch.clone, state),
            lambda state: torch.utils._pytree.tree_leaves(state),
            lambda state: DONATED(state, BATCH),
            lambda state: UNDONATED(state, BATCH),
            lambda state: PURE(state, BATCH),
            lambda state: fx.view(state),
            lambda state: fx.evaluate(state, problem.eval_step, [BATCH]),
            lambda state: fx.fit(state, PURE, [BATCH], steps=1),
            lambda state: fx.save("nowhere", state),
            lambda state: copy.copy(state).params,
            lambda state: copy.deepcopy(state).params,
        ],
    )
    def test_read_raises_and_names_step(self, state, read):
        DONATED(state, BATCH)
        with pytest.raises(DonatedError, match=r"was donated to <step train_step\(loss_fn\).*call state\.copy"):
            read(state)

    def test_repr_names_donation(self, state):
        DONATED(state, BATCH)
        assert repr(state).startswith("TrainState, donated to <step")

    def test_every_reference_raises(self, state):
        kept, fields = [state], vars(state)
        DONATED(state, BATCH)
        with pytest.raises(DonatedError):
            kept[0].params  # noqa: B018
        assert "params" not in fields


# References into a state that may outlive its donation.
HOLDS = {
    "a copy": lambda state: state.copy(),
    "another state": lambda state: state.replace(position=torch.tensor(9)),
    "a state with another slot": lambda state: state.with_slot("mine", torch.tensor(9)),
    "a shallow copy": lambda state: copy.copy(state),
    "a field": lambda state: state.params,
    "all fields": lambda state: {name: value for name, value in vars(state).items() if name != "model"},
    "the optimizer's memory": lambda state: state.opt_state,
    "a part of it": lambda state: tree.leaves(state.opt_state)[-1],
    "another dict": lambda state: {**state.params},
    "a parameter": lambda state: state.params["0.weight"],
    "a counter": lambda state: state.step,
    "what is due": lambda state: state.due,
    "a view": lambda state: state.params["0.weight"].view(-1),
    "a row": lambda state: state.params["0.weight"][1],
    "a transpose": lambda state: state.params["0.weight"].T,
    "detached": lambda state: state.params["0.weight"].detach(),
    "an array of numpy's": lambda state: state.params["0.weight"].numpy(),
    "a part of an array": lambda state: state.params["0.weight"].numpy()[1:],
    "through DLPack": lambda state: torch.from_dlpack(state.params["0.weight"]),
    "a capsule": lambda state: torch.utils.dlpack.to_dlpack(state.params["0.weight"]),
    "all leaves": lambda state: tree.leaves(state),
    "an iterator": lambda state: iter(tree.leaves(state)),
    "its bare storage": lambda state: state.params["0.weight"].untyped_storage(),
    "a closure": lambda state: lambda params=state.params: params,
    "a memory of a slot": lambda state: state.slots["average"],
    "a state dict": lambda state: fx.state_dict(state),
}


def values(held):
    if isinstance(held, np.ndarray):
        return [held.copy()]
    if callable(held):
        held = held()
    if isinstance(held, torch.UntypedStorage):
        return [torch.tensor(held.tolist())]
    return [leaf.clone() for leaf in tree.leaves(held)]


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_referenced_values_are_preserved(state, hold):
    wanted, _ = UNDONATED(state.copy(), BATCH)
    held = hold(state)
    opaque = type(held).__name__ in ("PyCapsule", "list_iterator")
    before = None if opaque else values(held)
    new, _ = DONATED(state, BATCH)
    testing.assert_equal(new, wanted, "the next state")
    if opaque:
        held = [torch.from_dlpack(held)] if type(held).__name__ == "PyCapsule" else list(held)
        assert not any(leaf.data_ptr() == other.data_ptr() for leaf in held for other in tree.leaves(new))
        return
    for was, now in zip(before, values(held), strict=True):
        assert np.array_equal(was, now, equal_nan=True) if isinstance(was, np.ndarray) else torch.equal(was, now)


def test_foreign_memory_is_preserved():
    array = np.ones((8, 4), dtype=np.float32)
    state = start()
    state = state.replace(params={**state.params, "0.weight": torch.from_numpy(array)})
    new, _ = DONATED(state, BATCH)
    assert (array == 1).all()
    assert not (new.params["0.weight"] == 1).all()


def test_leaves_sharing_memory_are_separated():
    state = problem.start()
    state = state.with_slot("average", state.params)
    wanted, _ = UNDONATED(state.copy(), BATCH)
    new, _ = DONATED(state, BATCH)
    testing.assert_equal(new, wanted, "the next state")
    places = [leaf.data_ptr() for leaf in tree.leaves(new)]
    assert len(set(places)) == len(places)


def test_swapped_leaves_are_read_before_write():
    def swap(state, batch):
        a, b = state.params["a"], state.params["b"]
        return state.replace(params={"a": b, "b": a.T}), fx.StepOutput({"a": a.sum()}, outputs=a)

    start = fx.init({"a": torch.eye(3) * 2, "b": torch.arange(9.0).reshape(3, 3)})
    new, output = fx.compile(swap, donate=True)(start.copy(), torch.ones(1))
    assert torch.equal(new.params["a"], start.params["b"])
    assert torch.equal(new.params["b"], start.params["a"].T)
    assert torch.equal(output.outputs, start.params["a"])


def test_second_use_of_state_names_remedy():
    state = start()
    DONATED(state, BATCH)
    with pytest.raises(DonatedError, match="Use the state that the step returned"):
        DONATED(state, BATCH)


def counted(kind):
    """A loop callback that changes the state at each event of this kind."""

    def update(state, event, memory):
        return memory + 1, fx.Control()

    return fx.on(kind, fx.stateful(kind.__name__, lambda state: torch.tensor(0), update))


def places_into(places):
    """An observer that records the addresses of parameters and optimizer state after each step."""

    def observe(state, event: fx.StepEnd, control):
        places.append(tuple(leaf.data_ptr() for leaf in tree.leaves((state.params, state.opt_state))))

    return observe


class TestFit:
    def run(self, step, *, callbacks=(), **options):
        options = {"steps": 9, "data": problem.data(), **options}
        return fx.fit(start(), step, callbacks=[CALLBACK, *callbacks], **options)

    def test_equals_undonated_run_and_preserves_argument(self):
        given = start()
        before = given.copy()
        state = given
        donated = fx.fit(given, UNDONATED, problem.data(), callbacks=CALLBACK, steps=9).continue_from
        for batch in problem.data() * 3:
            state, _ = UNDONATED(state, batch)
        for name in ("params", "buffers", "opt_state", "step"):
            testing.assert_equal(getattr(donated, name), getattr(state, name), name)
        for name, slot in state.slots.items():
            testing.assert_equal(donated.slots[name], slot, name)
        testing.assert_equal(given, before, "the state given to fit")

    @pytest.mark.parametrize("lag", [0, 1])
    @pytest.mark.parametrize("kind", [fx.StepBegin, fx.StepEnd])
    def test_consecutive_steps_copy_nothing(self, kind, lag):
        places = []
        asks = fx.on(fx.StepEnd, lambda state, event: (state, fx.Control(stop=torch.tensor(False))))
        self.run(
            UNDONATED, callbacks=[counted(kind), asks], data=problem.data(9), observers=[places_into(places)], lag=lag
        )
        assert len(places) == 9
        assert len(set(places[1:])) == 1

    def test_callbacks_and_saves_copy_nothing(self, tmp_path):
        """From the second step on, parameters and optimizer state keep their addresses."""
        places = []
        kinds = (fx.EpochBegin, fx.StepBegin, fx.StepEnd, fx.EvalEnd, fx.EpochEnd)
        self.run(
            UNDONATED,
            callbacks=[
                *map(counted, kinds),
                fx.callbacks.early_stopping("loss", patience=50),
                fx.callbacks.restore_best("loss"),
                fx.when(fx.every(2), fx.callbacks.save()),
            ],
            eval_step=problem.eval_step,
            eval_data=problem.data(1),
            eval_when=fx.every(2),
            checkpointer=fx.checkpointer(tmp_path),
            observers=[places_into(places)],
        )
        assert len(places) == 9
        assert len(set(places[1:])) == 1

    def test_state_kept_by_observer_is_intact_or_raises(self):
        kept, copies = [], []

        def observe(state, event: fx.StepEnd | fx.EpochEnd, control):
            kept.append(state)
            copies.append(state.copy())

        self.run(UNDONATED, observers=[observe])
        for state, wanted in zip(kept, copies, strict=True):
            with contextlib.suppress(DonatedError):
                testing.assert_equal(state, wanted, "a state that was kept")

    def test_rewind_restores_kept_state(self):
        def back(state, event: fx.StepEnd | fx.Rewound):
            done = state.slots["done"]
            if isinstance(event, fx.Rewound):
                return state.with_slot("done", done + 1), fx.Control()
            return state, fx.Control(rewind=2 if event.step == 5 and not int(done) else 0)

        callback = fx.slotted("done", lambda state: torch.tensor(0), back)
        result = self.run(UNDONATED, callbacks=[callback], snapshot_every=2, steps=7)
        testing.assert_equal(
            result.continue_from.params, self.run(UNDONATED, steps=7).continue_from.params, "parameters"
        )

    def test_checkpoint_has_its_own_copy(self, tmp_path):
        checkpoints = fx.checkpointer(tmp_path, keep=None)
        self.run(UNDONATED, callbacks=[fx.callbacks.save()], checkpointer=checkpoints)
        state = start()
        for step, batch in enumerate(problem.data() * 3, 1):
            state, _ = UNDONATED(state, batch)
            testing.assert_equal(checkpoints.restore(state, step=step).params, state.params, f"step {step}")

    def test_failing_callback_saves_no_partial_step(self, tmp_path):
        def fail(state, event: fx.StepEnd):
            if event.step == 5:
                raise RuntimeError("a bug")
            return state, fx.Control()

        checkpoints = fx.checkpointer(tmp_path, keep=None)
        saving = fx.when(fx.every(2), fx.callbacks.save())
        with pytest.raises(RuntimeError, match="a bug") as caught:
            self.run(UNDONATED, callbacks=[saving, fail], checkpointer=checkpoints)
        assert "Resume from the last checkpoint" in caught.value.__notes__[0]
        assert checkpoints.steps() == [2, 4]
        resumed = self.run(UNDONATED, callbacks=[saving], checkpointer=checkpoints, resume=True)
        testing.assert_equal(resumed.continue_from.params, self.run(UNDONATED).continue_from.params, "resumed")


class TestOwnership:
    def test_extra_reference_is_detected(self):
        state = going()
        flatten = tree.generate_flatten(state)
        leaves, containers = flatten(state)
        assert is_sole(leaves, containers, range(len(leaves)))
        held = state.params
        assert not is_sole(leaves, containers, range(len(leaves)))
        names = tree.paths(state, "state")
        exposed = {name for name, elsewhere in zip(names, shared(leaves, containers), strict=True) if elsewhere}
        assert exposed == {name for name in names if name.startswith("state.params")}
        del held
        gc.collect()
        assert is_sole(leaves, containers, range(len(leaves)))

    def test_generated_flatten_preserves_order_and_detects_other_structures(self):
        state = start()
        flatten = tree.generate_flatten(state)
        assert all(a is b for a, b in zip(flatten(state)[0], tree.leaves(state), strict=True))
        for other in (
            state.replace(params={**state.params, "more": torch.ones(1)}),
            state.replace(params={name + "_": value for name, value in state.params.items()}),
            state.replace(params=list(state.params.values())),
            state.replace(opt_state=()),
            state.replace(slots={}),
            fx.init(torch.nn.Linear(4, 8)),
            {"a": torch.ones(1)},
            torch.ones(1),
            None,
        ):
            with pytest.raises(tree.OtherStructureError):
                flatten(other)


class TestRecompiling:
    def step(self, **options):
        return fx.compile(lambda state, batch: (state, fx.StepOutput({"sum": batch["x"].sum()})), **options)

    def test_warning_names_path_and_change(self):
        step, state = self.step(), fx.init(torch.tensor(1.0))
        step(state, {"x": torch.ones(32, 64)})
        said = r"batch\['x'\]: float32\[32, 64\] on cpu -> float32\[17, 64\] on cpu\. For a smaller last batch, set"
        with pytest.warns(UserWarning, match=said):
            step(state, {"x": torch.ones(17, 64)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(state, {"x": torch.ones(32, 64)})
        assert step.graphs == 2

    def test_recompile_can_be_an_error(self):
        step, state = self.step(on_recompile="error"), fx.init(torch.tensor(1.0))
        step(state, {"x": torch.ones(2)})
        with pytest.raises(RecompileError) as caught:
            step(state, {"x": torch.ones(2, dtype=torch.float64)})
        assert "batch['x']: float32[2] on cpu -> float64[2] on cpu" in str(caught.value)

    def test_strides_and_names_recompile_but_values_do_not(self):
        step, state = self.step(on_recompile="error"), fx.init(torch.tensor(1.0))
        step(state, {"x": torch.ones(2, 3)})
        step(state.replace(params=torch.tensor(5.0)), {"x": torch.zeros(2, 3)})
        with pytest.raises(RuntimeError, match=r"with strides \(1, 2\)"):
            step(state, {"x": torch.ones(3, 2).T})
        with pytest.raises(RuntimeError, match=r"batch\['y'\] is new"):
            step(state, {"x": torch.ones(2, 3), "y": torch.ones(1)})

    def test_slot_of_loop_callback_does_not_recompile(self):
        state = going()
        graphs = DONATED.graphs
        DONATED(state.with_slot("mine", torch.ones(3)), BATCH)
        assert DONATED.graphs == graphs

    def test_on_recompile_is_validated(self):
        with pytest.raises(ValueError, match="expected on_recompile to be one of 'warn', 'error', 'allow', got"):
            self.step(on_recompile="never")
