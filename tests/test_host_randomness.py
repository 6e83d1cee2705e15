"""Random samples from Python and numpy in a model or a loss: determined by the seed, or rejected with an error."""

import datetime
import functools
import logging
import os
import random
import secrets
import time
import uuid
from time import monotonic

import numpy as np
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing
from fxtrain.model._unseeded_values import clock_reads
from fxtrain.rng import _host_generators as host

X = torch.ones(4, 2)
DRAWS = {"numpy": np.random.rand, "Python": random.random, "numpy's normal": np.random.normal}


class Drops(nn.Linear):
    """A layer with a random scale, similar to LayerDrop."""

    def __init__(self, draw=random.random):
        super().__init__(2, 1)
        self.draw = draw

    def forward(self, x):
        return super().forward(x) * float(self.draw())


def loss_fn(model, batch):
    return model(batch).square().mean()


def run(draw, *, seed=0, steps=3, resume_at=None):
    tx = fx.optim.sgd(0.1)
    torch.manual_seed(0)
    state, found = fx.init(Drops(draw), tx, seed=seed), []
    step = fx.train_step(loss_fn, tx, accumulate=2)
    for index in range(steps):
        if index == resume_at:  # a resumed process also builds the step again
            step = fx.train_step(loss_fn, tx, accumulate=2)
        np.random.seed(index)
        random.seed(index)
        state, output = step(state, X)
        found.append(float(output.metrics["loss"]))
    return found


def states():
    return random.getstate(), [repr(part) for part in np.random.get_state()]


@pytest.fixture(autouse=True)
def _generators():
    before, bits = random.getstate(), np.random.get_bit_generator()
    yield
    random.setstate(before)
    np.random.set_bit_generator(bits)


class TestUncompiled:
    @pytest.mark.parametrize("name", DRAWS)
    def test_samples_are_determined_by_seed(self, name):
        draw = DRAWS[name]
        found = run(draw)
        assert run(draw) == run(draw, resume_at=1) == found
        assert run(draw, seed=1) != found

    def test_samples_differ_by_step_and_microbatch(self):
        seen = []

        def draw():
            seen.append(np.random.rand())
            return seen[-1]

        run(draw)
        assert len(set(seen)) == 6  # 3 steps of 2 microbatches, and one sample for each

    @pytest.mark.parametrize("name", DRAWS)
    def test_global_generators_are_left_unchanged(self, name):
        draw = DRAWS[name]
        state, tx = fx.init(Drops(draw)), fx.optim.sgd(0.1)
        step, evaluation = fx.train_step(loss_fn, tx), fx.eval_step(loss_fn)
        np.random.normal()  # numpy caches the second sample of each pair
        before = states()
        for _ in range(2):
            step(state.replace(opt_state=fx.init(Drops(draw), tx).opt_state), X)
            evaluation(state, X)
            fx.view(state)(X)
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                fx.view(state)(torch.ones(1, 3))
        assert states() == before

    def test_samples_of_evaluation_and_views_are_determined_by_seed(self):
        state = fx.init(Drops(np.random.rand))
        evaluation, view = fx.eval_step(loss_fn), fx.view(state)
        first = evaluation(state, X).metrics["loss"]
        for seed in (1, 2):
            np.random.seed(seed)
            assert torch.equal(evaluation(state, X).metrics["loss"], first)
            assert torch.equal(fx.eval_step(loss_fn)(state, X).metrics["loss"], first)
            assert torch.equal(view(X), view(X))
        moved = state.replace(position=state.position + 1)
        assert not torch.equal(evaluation(moved, X).metrics["loss"], first)

    def test_samples_without_modules_are_determined_by_seed(self):
        def noisy(model, batch):
            return (model["w"] * np.random.rand()).square()

        state = fx.init({"w": torch.tensor(2.0)})
        find = fx.gradients(noisy)
        assert float(find(state, None).loss) == float(find(state, None).loss)

    @pytest.mark.parametrize("name", DRAWS)
    def test_samples_first_taken_at_a_later_step_are_determined_by_seed(self, name):
        def losses(seed_of_process):
            class Late(nn.Linear):
                def forward(self, x):
                    return super().forward(x) * (DRAWS[name]() if x[0, 0] > 1 else 1.0)

            torch.manual_seed(0)
            tx = fx.optim.sgd(0.1)
            state, step, found = fx.init(Late(2, 1), tx), fx.train_step(loss_fn, tx), []
            for batch in (X, X, X + 1, X + 1):
                np.random.seed(seed_of_process)
                random.seed(seed_of_process)
                before = states()
                state, output = step(state, batch)
                assert states() == before
                found.append(float(output.metrics["loss"]))
            return found

        assert losses(1) == losses(2)

    def test_step_without_samples_is_not_seeded_after_first_call(self, monkeypatch):
        tx = fx.optim.sgd(0.1)
        state, step = fx.init(nn.Linear(2, 1), tx), fx.train_step(loss_fn, tx)
        step(state, X)

        def fails(_):
            raise AssertionError("seeded")

        monkeypatch.setattr(host, "seeded", fails)
        step(state, X)


class TestRejected:
    @pytest.mark.parametrize("name", ["numpy", "Python"])
    @pytest.mark.parametrize("backend", [None, "eager"])
    def test_samples_in_compiled_step_are_rejected(self, name, backend):
        tx = fx.optim.sgd(0.1)
        wanted = {"numpy": r"numpy\.random", "Python": "Python's random module"}[name]
        before = states()
        for step in (fx.train_step(loss_fn, tx), fx.eval_step(loss_fn)):
            state = fx.init(Drops(DRAWS[name]), tx)
            with pytest.raises(
                RuntimeError, match=f"expected loss_fn to take .* got samples from {wanted}, which a comp"
            ):
                fx.compile(step, backend=backend)(state, X)
        assert states() == before

    def test_samples_under_vmap_over_seeds_are_rejected(self):
        tx = fx.optim.sgd(0.1)
        states = [fx.init(Drops(), tx, seed=seed) for seed in (0, 1)]
        stacked = fx.tree.map(lambda *leaves: torch.stack(leaves), *states)
        with pytest.raises(RuntimeError, match="Python's random module"):
            torch.vmap(fx.train_step(loss_fn, tx), (0, None))(stacked, X)

    @pytest.mark.parametrize(
        "generator",
        [np.random.default_rng(0), random.Random(0), np.random.RandomState(0)],
        ids=lambda generator: type(generator).__name__,
    )
    def test_samples_from_private_generator_are_rejected(self, generator):
        kind = type(generator).__name__
        draw = generator.random if not isinstance(generator, np.random.RandomState) else generator.rand
        module = nn.Linear(2, 1)
        module.augment = {"generator": generator}

        def by_attribute(model, batch):
            owned = model.augment["generator"]
            return loss_fn(model, batch) * getattr(owned, draw.__name__)()

        def by_closure(model, batch):
            return loss_fn(model, batch) * getattr(generator, draw.__name__)()

        def by_argument(generator, model, batch):
            return loss_fn(model, batch) * getattr(generator, draw.__name__)()

        for function, name in (
            (by_attribute, r"model\.augment\['generator'\]"),
            (by_closure, "generator"),
            (functools.partial(by_argument, generator), "argument 0"),
        ):
            state = fx.init(module)
            for run in (fx.gradients(function), fx.eval_step(function)):
                with pytest.raises(RuntimeError, match=rf"got samples from {name} \({kind}\)"):
                    run(state, X)

    def test_unused_private_generator_is_accepted(self):
        module = nn.Linear(2, 1)
        module.generator = np.random.default_rng(0)
        fx.gradients(loss_fn)(fx.init(module), X)

    def test_view_leaves_generator_of_module_unchanged(self):
        module = Drops()
        module.generator = np.random.default_rng(0)
        module.draw = module.generator.random
        view = fx.view(fx.init(module))
        testing.assert_equal(view(X), view(X), "two calls")


class TestClocks:
    """Clock reads are rejected in compiled steps, because tracing would turn the time into a constant."""

    @pytest.mark.parametrize("backend", [None, "eager"])
    @pytest.mark.parametrize(
        "read", [lambda: time.time(), lambda: time.perf_counter(), lambda: monotonic()], ids=["time", "other", "name"]
    )
    def test_clock_read_in_compiled_step_is_rejected(self, read, backend):
        def timed(model, batch):
            return loss_fn(model, batch) * read()

        tx = fx.optim.sgd(0.1)
        clocks = time.time, time.perf_counter, monotonic
        for step in (fx.train_step(timed, tx), fx.eval_step(timed)):
            with pytest.raises(RuntimeError, match=rf"expected timed .* got a read of time\.\w+\(\) at {__file__}:"):
                fx.compile(step, backend=backend)(fx.init(nn.Linear(2, 1), tx), X)
        assert (time.time, time.perf_counter, monotonic) == clocks

    READS = (
        *("process_time()", "thread_time()", "localtime()", "ctime()", "strftime('%S')", "datetime.now()"),
        *("datetime.datetime.utcnow()", "os.urandom(1)", "secrets.randbelow(9)", "uuid.uuid4()"),
        *("random.SystemRandom().random()", "np.random.default_rng().random()"),
        *("random.Random().random()", "random.Random(None).random()", "Random().random()"),
        "np.random.RandomState().rand()",
    )

    @pytest.mark.parametrize("text", READS)
    def test_other_clocks_and_system_randomness_are_detected(self, text):
        names = {
            **vars(time),
            "Random": random.Random,
            "secrets": secrets,
            "uuid": uuid,
            "os": os,
            "np": np,
            "random": random,
        }
        names["datetime"] = datetime if text.startswith("datetime.datetime") else datetime.datetime
        real = datetime.datetime, os.urandom, time.localtime, random.Random
        read = eval(f"lambda: {text}", names)
        with clock_reads(read) as found:
            read()
            assert isinstance(datetime.datetime(2020, 1, 1), datetime.datetime)
            assert time.strftime("%Y", time.gmtime(0)) == "1970"
        assert found  # possibly several reads, because some generators sample repeatedly
        assert (datetime.datetime, os.urandom, time.localtime, random.Random) == real

    def test_seeded_generator_is_not_reported(self):
        with clock_reads(random.Random) as found:
            first, second = random.Random(1), random.Random(x=1)

            class Own(random.Random):
                pass

            assert isinstance(Own(1), Own)
            assert isinstance(first, random.Random)
            assert not isinstance(first, Own)
            assert not isinstance(1, random.Random)
        assert first.random() == second.random() == Own(1).random()
        assert not found

    def test_clock_reads_in_uncompiled_steps_and_libraries_are_accepted(self):
        def logs(model, batch):
            logging.getLogger("fxtrain.test").warning("now")  # logging reads the time
            return loss_fn(model, batch)

        tx = fx.optim.sgd(0.1)
        state = fx.init(nn.Linear(2, 1), tx)
        fx.eval_step(lambda model, batch: loss_fn(model, batch) * time.time())(state, X)
        fx.compile(fx.train_step(logs, tx))(state, X)
