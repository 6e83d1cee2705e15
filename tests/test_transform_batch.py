"""Batches transformed inside the step: mixup, noise and curricula, eager, compiled, resumed and under vmap."""

import random

import problem
import pytest
import torch
from problem import SMALL_BATCH

import fxtrain as fx
from fxtrain import testing


def mixup(state, batch):
    share, order = torch.rand(len(batch["x"]), 1), torch.randperm(len(batch["x"]))
    return {name: share * value + (1 - share) * value[order] for name, value in batch.items()}


def noise_that_decays(state, batch):
    return {**batch, "x": batch["x"] + 0.9**state.step * torch.randn_like(batch["x"])}


def longer_sequences(state, batch):
    """Uses one more column at each step, and changes structure and dtype."""
    seen = torch.arange(batch["x"].shape[1]) <= state.step
    return {"x": batch["x"] * seen, "y": batch["y"], "mask": seen.to(torch.int32)[None]}


TRANSFORMS = [mixup, noise_that_decays, longer_sequences]
SGD = fx.optim.sgd(0.1, momentum=0.9)  # traced faster than AdamW


def start():
    torch.manual_seed(0)
    return fx.init(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1)), SGD)


def assert_equal_steps(compiled, step):
    wanted, got = start(), start()
    for batch in problem.data():
        wanted, eager = step(wanted, batch)
        got, output = compiled(got, batch)
        torch.testing.assert_close(output.metrics, eager.metrics)
    torch.testing.assert_close(dict(got.params), dict(wanted.params))


def assert_resumes(step, folder):
    begin = start()
    whole = problem.fit(begin, step).state
    problem.fit(begin, step, steps=4, checkpointer=fx.checkpointer(folder))
    again = problem.fit(begin, step, checkpointer=fx.checkpointer(folder), resume=True).state
    testing.assert_equal(again, whole, "resumed")


class Seen:
    """A transform that keeps the batches that it returns."""

    def __init__(self, transform):
        self.transform, self.batches = transform, []

    def __call__(self, state, batch):
        self.batches.append(self.transform(state, batch))
        return self.batches[-1]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("transform", TRANSFORMS)
class TestLaws:
    def test_compiled_step_equals_eager_step_and_resumes(self, transform, tmp_path):
        accumulate = 2 if transform is mixup else 1
        step = fx.train_step(problem.loss_fn, SGD, transform_batch=transform, accumulate=accumulate)
        compiled = fx.compile(step, backend="aot_eager", donate=True)
        assert_equal_steps(compiled, step)
        assert_resumes(compiled, tmp_path)

    def test_resumed_run_equals_uninterrupted_run(self, transform, tmp_path):
        assert_resumes(fx.train_step(problem.loss_fn, SGD, transform_batch=transform), tmp_path)

    def test_members_under_vmap_equal_single_runs(self, transform):
        step, batch = problem.step(transform_batch=transform), problem.data()[0]
        members = [step(problem.start(seed=seed), batch)[0] for seed in (1, 2)]
        losses = [step(state, batch)[1].metrics["loss"] for state in members]
        both = fx.tree.map(lambda *leaves: torch.stack(leaves), *members)
        _, output = torch.vmap(step, in_dims=(0, None))(both, batch)
        torch.testing.assert_close(output.metrics["loss"], torch.stack(losses))


@pytest.mark.usefixtures("fresh_dynamo")
def test_torch_compiles_the_step_as_full_graph():
    step = fx.train_step(problem.loss_fn, SGD, transform_batch=mixup)
    assert_equal_steps(torch.compile(step, fullgraph=True, backend="aot_eager"), step)


class TestTransformBatch:
    def test_transforms_the_whole_batch_once_before_it_is_split(self):
        seen = Seen(mixup)
        problem.step(transform_batch=seen, accumulate=4)(problem.start(), problem.data()[0])
        assert [batch["x"].shape for batch in seen.batches] == [(8, 4)]

    def test_samples_differ_between_steps_seeds_and_evaluations(self):
        seen, batch = Seen(mixup), problem.data()[0]
        step = problem.step(transform_batch=seen)
        first, _ = step(problem.start(), batch)
        step(first, batch)
        step(problem.start(seed=1), batch)
        fx.eval_step(problem.loss_fn, transform_batch=seen)(problem.start(), batch)
        assert len({tuple(each["x"].flatten().tolist()) for each in seen.batches}) == 4

    def test_host_samples_come_from_the_seed(self):
        seen = Seen(lambda state, batch: {**batch, "x": batch["x"] * random.random()})
        step, batch = problem.step(transform_batch=seen), problem.data()[0]
        random.seed(7)
        before = random.getstate()
        step(problem.start(), batch)
        random.seed(8)
        step(problem.start(), batch)
        random.seed(7)
        assert random.getstate() == before
        testing.assert_equal(seen.batches[-1], seen.batches[1], "batch")

    def test_compiled_step_refuses_host_samples(self):
        step = problem.step(transform_batch=lambda state, batch: {**batch, "x": batch["x"] * random.random()})
        with pytest.raises(fx.model.UnseededError, match="expected <lambda> to take random samples from the run's"):
            fx.compile(step, backend="eager")(problem.start(), problem.data()[0])

    def test_sees_slots_of_traced_callbacks(self):
        def harder(state, event: fx.Updated | fx.EvalEnd, level):
            return (level if isinstance(event, fx.Updated) else level + 1), fx.Control()

        def scaled(state, batch):
            return {**batch, "x": batch["x"] * state.slots["level"]}

        seen = Seen(scaled)
        level = fx.stateful("level", lambda state: torch.tensor(1), harder)
        stopping = fx.callbacks.early_stopping("loss", patience=9)
        problem.fit(
            step=problem.step(transform_batch=seen),
            callbacks=[level, stopping],
            eval_step=problem.eval_step,
            eval_data=problem.data(1),
        )
        for index, batch in enumerate(seen.batches):
            torch.testing.assert_close(batch["x"], problem.data()[index % 3]["x"] * (1 + index // 3))

        def reads_loop_state(state, batch):
            return {**batch, "x": batch["x"] * state.slots["early_stopping"].wait}

        state = fx.attach(problem.start(), stopping)
        with pytest.raises(KeyError, match="early_stopping"):
            problem.step(transform_batch=reads_loop_state)(state, problem.data()[0])

    def test_evaluation_transforms_its_batches(self):
        step = fx.eval_step(lambda model, batch: {"size": batch.sum()}, transform_batch=lambda state, batch: 2 * batch)
        assert float(step(fx.init(problem.linear()), SMALL_BATCH).metrics["size"]) == 2 * float(SMALL_BATCH.sum())

    def test_settings_name_the_transform(self):
        assert problem.step(transform_batch=mixup).settings["transform_batch"] == "mixup"
        assert "transform_batch" not in problem.step().settings


class TestErrors:
    @pytest.mark.parametrize(
        ("transform", "message"),
        [
            (
                5,
                r"transform_batch to be a function \(state, batch\) -> batch, got 5. Define one: def transform",
            ),
            (lambda batch: batch, r"got <lambda>\(batch\) .*Add the state: lambda state, batch: <lambda>\(batch\)\."),
            (lambda batch, state: batch, r"got <lambda>\(batch, state\) .*Swap the parameters: \(state, batch\)\."),
            (
                lambda model, batch: batch,
                r"which takes a model. Take the state. A view of it is its model: fxtrain.view",
            ),
            (torch.nn.Identity(), r"got the module Identity. Add the state: lambda state, batch: Identity\(batch\)\."),
        ],
    )
    @pytest.mark.parametrize("make", [problem.step, lambda **options: fx.eval_step(problem.loss_fn, **options)])
    def test_other_functions_are_refused(self, make, transform, message):
        with pytest.raises(TypeError, match=message):
            make(transform_batch=transform)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_errors_name_the_transform(self, compiled):
        def broken(state, batch):
            return batch["missing"]

        step = problem.step(transform_batch=broken)
        step = fx.compile(step, backend="eager") if compiled else step
        with pytest.raises(KeyError, match="missing") as caught:
            step(problem.start(), problem.data()[0])
        assert caught.value.__notes__[0].startswith("Raised by transform_batch=broken (")

    @pytest.mark.parametrize("result", [lambda state, batch: None, lambda state, batch: (state, batch)])
    def test_results_that_are_no_batch_are_refused(self, result):
        with pytest.raises(TypeError, match=r"to return a batch, got .*\. Return the new batch alone\."):
            problem.step(transform_batch=result)(problem.start(), problem.data()[0])

    def test_in_place_writes_are_refused(self):
        def write(state, batch):
            batch["x"].mul_(2)
            return batch

        with pytest.raises(
            RuntimeError, match=r"expected write .* to leave the state and the batch unchanged, got an in-"
        ):
            problem.step(transform_batch=write)(problem.start(), problem.data()[0])
