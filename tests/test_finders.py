"""Finders of the batch size and the learning rate: their results, and that the given state stays bitwise unchanged."""

import gc
import importlib
import math
import subprocess
import sys
import weakref

import problem
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.finders import find_batch_size, find_learning_rate

trace = importlib.import_module("fxtrain.compiler.lowering._trace")


@pytest.fixture(scope="module", autouse=True)
def _only_what_is_new_is_searched():
    """Excludes imported objects from garbage collection, because the finder collects garbage after each size."""
    gc.freeze()
    yield
    gc.unfreeze()


def injected(factory=fx.optim.adamw, rate=1e-3):
    tx = fx.optim.inject_hyperparams(factory)(learning_rate=rate)
    return fx.init(problem.module(), tx, seed=0), fx.train_step(problem.loss_fn, tx)


TX = fx.optim.sgd(0.1)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def linear():
    """A state and a step that take a batch of any size."""

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean()

    return fx.init(torch.nn.Linear(4, 1), TX), fx.train_step(loss_fn, TX)


def batch(size):
    return {"x": torch.ones(size, 4)}


def find(largest, error=None, **options):
    """Returns the batch size found and the sizes tried, if sizes up to ``largest`` fit."""
    state, step = linear()
    limited = Limited(step, largest, error or OUT_OF_MEMORY)
    return find_batch_size(state, limited, batch, **options), limited.tried


class Unchanged:
    """Asserts that all leaves are the same tensor objects, not written to and bitwise equal."""

    def __init__(self, state):
        self.state, self.leaves = state, tree.leaves(state)
        self.versions, self.copy = [leaf._version for leaf in self.leaves], state.copy()
        self.generator = torch.random.get_rng_state()

    def check(self):
        assert all(map(lambda a, b: a is b, tree.leaves(self.state), self.leaves))
        assert [leaf._version for leaf in self.leaves] == self.versions
        testing.assert_equal(self.state, self.copy, "the state")
        assert torch.equal(torch.random.get_rng_state(), self.generator)


class Limited:
    """A step that raises ``error`` for batches above a size."""

    def __init__(self, step, size, error):
        self.step, self.size, self.error = step, size, error
        self.tried = []

    def __call__(self, state, batch):
        size = len(batch["x"])
        if size not in self.tried:
            self.tried.append(size)
        if size > self.size:
            raise self.error
        return self.step.function(state, batch)


class TestBatchSize:
    @pytest.mark.parametrize("largest", [1, 2, 3, 15, 16, 17, 37, 63, 64])
    @pytest.mark.parametrize("start", [None, 1, 8, 64])
    def test_finds_largest_size_that_fits(self, largest, start):
        found, _ = find(largest, start=start, limit=64)
        assert found == largest

    def test_search_doubles_then_bisects(self):
        assert find(21) == (21, [8, 16, 32, 24, 20, 22, 21])
        assert find(5) == (5, [8, 4, 6, 5])
        assert find(3, limit=2) == (2, [2])

    @pytest.mark.parametrize(("limit", "found"), [(50, 48), (48, 48), (8, 8), (64, 56)])
    def test_only_multiples_are_tried(self, limit, found):
        got, tried = find(60, limit=limit, multiple=8)
        assert got == found
        assert all(size % 8 == 0 for size in tried)

    @pytest.mark.parametrize(
        "error",
        [
            OUT_OF_MEMORY,
            MemoryError("Unable to allocate 8.00 GiB for an array"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ],
    )
    def test_out_of_memory_errors_are_recognized(self, error):
        assert find(5, error, limit=8)[0] == 5

    def test_allocation_error_in_make_batch_is_recognized(self):
        def make(size):
            torch.empty(2**60 if size > 3 else 1, dtype=torch.uint8)
            return batch(size)

        assert find_batch_size(*linear(), make, limit=8) == 3

    def test_other_errors_are_raised(self):
        with pytest.raises(RuntimeError, match="boom"):
            find(2, RuntimeError("boom"))

    def test_error_if_batch_of_one_does_not_fit(self):
        with pytest.raises(RuntimeError, match=r"Not even a batch of 1 fits into memory \(CUDA out of memory"):
            find(0)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_batch_size_search_leaves_state_unchanged_and_frees_batches(self, compiled):
        state, step = problem.start(), problem.step()
        made = []

        def make(size):
            torch.empty(2**60 if size > 2 else 1, dtype=torch.uint8)
            (made_now,) = problem.data(count=1, size=size)
            made.append(weakref.ref(made_now["x"]))
            return made_now

        called = fx.compile(step, backend="eager", donate=True, on_recompile="error") if compiled else step
        before = Unchanged(state)
        assert find_batch_size(state, called, make, limit=4) == 2
        before.check()
        gc.collect()
        assert len(made) == 3  # one for the estimate, and two for steps
        assert not any(ref() is not None for ref in made)
        assert not compiled or called.graphs == 0

    def test_missing_slots_of_step_are_attached(self):
        step = problem.step(callbacks=fx.callbacks.ema(0.9))
        assert step.callbacks.slots
        found = find_batch_size(problem.start(), step, lambda size: problem.data(count=1, size=size)[0], limit=2)
        assert found == 2

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the memory of a process")
    def test_process_memory_limit_is_respected(self):
        code = (
            "import resource, torch, fxtrain as fx\n"
            "from fxtrain.finders import find_batch_size\n"
            "torch.set_num_threads(1)\n"
            "tx = fx.optim.sgd(0.1)\n"
            "step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)\n"
            "state = fx.init(torch.nn.Linear(8, 8), tx)\n"
            "step(state, torch.ones(4, 8))\n"
            "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, -1))\n"
            "print(find_batch_size(state, step, lambda size: torch.ones(size, 8), start=2**16, multiple=2**16,\n"
            "                      limit=2**26))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        # A row takes 32 bytes in the batch and more for activations, so fewer than 2**28 / 32 = 2**23 rows fit.
        assert 2**18 <= int(done.stdout) < 2**23

    @pytest.mark.parametrize("memory", [None, "save", "recompute"])
    def test_sizes_whose_estimate_exceeds_free_memory_are_not_tried(self, memory, monkeypatch):
        finder = importlib.import_module("fxtrain.finders._batch_size")
        monkeypatch.setattr(finder, "available_bytes", lambda device: 10**6)
        monkeypatch.setattr(trace, "_compiled", lambda graph, *_: lambda given: graph(*given))
        tried, layers = [], [module for _ in range(8) for module in (torch.nn.Linear(32, 32), torch.nn.GELU())]

        def loss_fn(model, batch):
            if not isinstance(batch, FakeTensor):
                tried.append(len(batch))
            return model(batch).square().mean()

        state, step = fx.init(torch.nn.Sequential(*layers), TX), fx.train_step(loss_fn, TX)
        step = step if memory is None else fx.compile(step, memory=memory, check=False, on_recompile="allow")
        found = find_batch_size(state, step, lambda size: torch.ones(size, 32), multiple=64)
        # A row has 128 bytes at each of 16 layers, without recomputation.
        assert (100 if memory != "recompute" else 800) < found < (10**6 / 128 / 8 if memory != "recompute" else 4000)
        assert memory or max(tried) == found

    def test_smallest_size_beyond_free_memory_is_an_error(self, monkeypatch):
        finder = importlib.import_module("fxtrain.finders._batch_size")
        monkeypatch.setattr(finder, "available_bytes", lambda device: 0)
        with pytest.raises(RuntimeError, match=r"batch of 1 fits into memory \(it takes about .* B, of which 0 B"):
            find_batch_size(*linear(), batch, limit=4)

    @pytest.mark.parametrize(
        ("make", "got"),
        [
            (
                lambda size: {"x": torch.ones(20, 4)[:size], "weights": torch.ones(8)},
                r"32 rows, got batch\['x'\]: \[20",
            ),
            (lambda size: {"x": torch.ones(8, 4)}, r"16 rows, got the shapes of make_batch\(8\)"),
            (lambda size: {"x": torch.ones(3, 4)}, r"16 rows, got the shapes of make_batch\(8\)"),
        ],
    )
    def test_batch_without_the_rows_asked_for_is_rejected(self, make, got):
        with pytest.raises(ValueError, match=got):
            find_batch_size(*linear(), make, limit=64)

    def test_rows_may_be_in_any_dimension_and_other_leaves_constant(self):
        def make(size):
            return {"x": torch.ones(3, size, 4), "weights": torch.ones(8)}

        assert find_batch_size(*linear(), make, limit=16) == 16

    def test_estimate_of_a_step_that_fails_logs_nothing(self, capfd):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            find_batch_size(*linear(), lambda size: {"x": torch.ones(size, 5)})
        assert "fake_tensor" not in capfd.readouterr().err

    def test_invalid_batch_size_options_are_rejected(self):
        with pytest.raises(ValueError, match="expected limit to be a positive int, got 0"):
            find_batch_size(problem.start(), problem.step(), batch, limit=0)
        with pytest.raises(ValueError, match=r"expected start to be a multiple of multiple=8 .*, got 12\."):
            find_batch_size(problem.start(), problem.step(), batch, start=12, multiple=8)
        with pytest.raises(ValueError, match=r"limit to be at least multiple=7, got 5\. Raise limit\."):
            find_batch_size(problem.start(), problem.step(), batch, limit=5, multiple=7)
        with pytest.raises(ValueError, match=r"at most limit=4, got 8\. Use 4\."):
            find_batch_size(problem.start(), problem.step(), batch, start=8, limit=4)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_memory_limit_is_respected(self):
        tx = fx.optim.sgd(0.1)
        state = fx.init(torch.nn.Linear(1024, 1024).cuda(), tx)
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        free, _ = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(0.02)
        try:
            found = find_batch_size(state, step, lambda size: torch.ones(size, 1024), start=1024, limit=2**26)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert 1024 <= found < 2**26
        assert torch.cuda.mem_get_info()[0] >= free - 2**28


class TestLearningRate:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_learning_rate_search_leaves_state_unchanged(self, compiled):
        state, step = injected()
        before = Unchanged(state)
        called = fx.compile(step, backend="eager", donate=True, on_recompile="error") if compiled else step
        found = find_learning_rate(state, called, problem.data(), steps=20)
        before.check()
        assert len(found.rates) <= 20
        assert not compiled or called.graphs == 1

    def test_learning_rate_search_is_deterministic(self):
        state, step = injected()
        assert find_learning_rate(state, step, problem.data(), steps=20) == find_learning_rate(
            state, step, problem.data(), steps=20
        )

    def test_reported_rates_are_those_used_by_steps(self):
        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        state = fx.init({"w": torch.tensor(0.0)}, tx)
        step = fx.train_step(lambda model, batch: model["w"] * batch.mean(), tx)  # each step subtracts the rate
        found = find_learning_rate(state, step, [torch.ones(1)], low=1e-3, high=1e1, steps=5, factor=math.inf)
        assert found.rates == pytest.approx([1e-3, 1e-2, 1e-1, 1e0, 1e1])
        assert found.losses == pytest.approx([0, -1e-3, -1.1e-2, -1.11e-1, -1.111])

    @pytest.mark.parametrize("curvature", [1e-2, 1.0, 1e2])
    def test_suggestion_scales_with_curvature(self, curvature):
        # Gradient descent on c w^2 / 2 converges for learning rates below 2 / c, and fastest at 1 / c.
        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        state = fx.init({"w": torch.tensor(1.0)}, tx)
        step = fx.train_step(lambda model, batch: curvature * model["w"].square() / 2 * batch.mean(), tx)
        found = find_learning_rate(state, step, [torch.ones(1)], low=1e-5, high=1e4, steps=200)
        assert found.diverged
        assert 0.01 / curvature < found.suggestion < 2 / curvature
        assert 2 / curvature < found.rates[-1] < 1e3 / curvature

    def test_search_stops_if_loss_diverges(self):
        state, step = injected(fx.optim.sgd)
        found = find_learning_rate(state, step, problem.data(), high=1e6, steps=100)
        assert found.diverged
        assert len(found.rates) == len(found.losses) < 100
        assert found.suggestion < found.rates[-1] / 10

    def test_search_ends_at_highest_rate_without_divergence(self):
        state, step = injected()
        found = find_learning_rate(state, step, problem.data(), low=1e-6, high=1e-4, steps=10)
        assert not found.diverged
        assert len(found.rates) == len(found.losses) == len(found.smoothed) == 10
        assert found.rates[0] == pytest.approx(1e-6)
        assert found.rates[-1] == pytest.approx(1e-4)

    def test_search_stops_at_non_finite_loss(self):
        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        state = fx.init({"w": torch.tensor(0.0)}, tx)
        step = fx.train_step(lambda model, batch: (model["w"] + 1).log() * batch.mean(), tx)
        found = find_learning_rate(state, step, [torch.ones(1)], low=1e-2, high=1e2, steps=50)
        assert found.diverged
        assert not math.isfinite(found.losses[-1])
        assert all(map(math.isfinite, found.smoothed))

    def test_no_suggestion_if_loss_never_falls(self):
        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        state = fx.init({"w": torch.tensor(0.0)}, tx)
        step = fx.train_step(lambda model, batch: model["w"].square() * 0 + batch.mean(), tx)
        found = find_learning_rate(state, step, [torch.ones(1)], steps=10)
        assert (found.suggestion, found.diverged) == (None, False)
        assert "none, because the loss never fell" in repr(found)

    def test_negative_loss_is_not_divergence(self):
        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        state = fx.init({"w": torch.tensor(1.0)}, tx)
        step = fx.train_step(lambda model, batch: model["w"].square() - 100 * batch.mean(), tx)
        found = find_learning_rate(state, step, [torch.ones(1)], high=0.5, steps=50)
        assert not found.diverged
        assert 0.01 < found.suggestion <= 0.5

    def test_stop_request_of_step_is_ignored(self):
        def stop(state, event: fx.Gradients):
            return state, fx.Control(stop=event.step > 2, reason="enough")

        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        step = fx.train_step(problem.loss_fn, tx, callbacks=stop)
        state = fx.init(problem.module(), tx)
        losses = find_learning_rate(state, step, problem.data()[:1], low=1e-2, high=1e-1, steps=8).losses
        assert len(set(losses)) == 8

    def test_metric_option_selects_the_metric(self):
        state, step = injected()
        assert find_learning_rate(state, step, problem.data(), steps=5, metric="mae").losses[0] != pytest.approx(
            find_learning_rate(state, step, problem.data(), steps=5).losses[0]
        )
        with pytest.raises(KeyError, match=r"a metric of the step \('loss', 'mae', 'learning_rate'\), got 'acc'"):
            find_learning_rate(state, step, problem.data(), metric="acc")

    def test_error_if_learning_rate_cannot_be_set(self):
        with pytest.raises(
            ValueError,
            match=r"find_learning_rate cannot set the learning rate: .* got 'learning_rate'\. .*inject_hyperp",
        ):
            find_learning_rate(problem.start(), problem.step(), problem.data())
        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=fx.schedules.cosine(1e-2, 10))
        with pytest.raises(ValueError, match=r"find_learning_rate cannot set the learning rate: .* follows a schedule"):
            find_learning_rate(fx.init(problem.module(), tx), fx.train_step(problem.loss_fn, tx), problem.data())

    def test_invalid_learning_rate_options_are_rejected(self):
        state, step = injected()
        for wrong in ({"low": 0.0}, {"low": 1.0, "high": 0.1}, {"high": math.inf}):
            with pytest.raises(ValueError, match="expected 0 < low < high"):
                find_learning_rate(state, step, problem.data(), **wrong)
        with pytest.raises(ValueError, match="expected steps to be an int of at least 5, got 4"):
            find_learning_rate(state, step, problem.data(), steps=4)
        with pytest.raises(ValueError, match="expected factor to be above 1, got 1"):
            find_learning_rate(state, step, problem.data(), factor=1)
        with pytest.raises(ValueError, match="got the end of the data after 3 batches"):
            find_learning_rate(state, step, iter(problem.data()), steps=10)

    def test_search_reads_data_from_position_of_state(self):
        seen = []

        def loss_fn(model, batch):
            seen.append(float(batch.mean()))
            return model["w"] * batch.mean()

        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        state = fx.init({"w": torch.tensor(0.0)}, tx).replace(position=torch.tensor(1))
        find_learning_rate(state, fx.train_step(loss_fn, tx), [torch.full((1,), float(i)) for i in range(3)], steps=5)
        assert seen == [1.0, 2.0, 0.0, 1.0, 2.0]

    def test_repr_and_html_summarize_learning_rates(self):
        state, step = injected()
        found = find_learning_rate(state, step, problem.data(), low=1e-6, high=1e-2, steps=20)
        assert repr(found) == (
            f"LearningRates: suggestion {found.suggestion:.2g}; 20 learning rates from 1e-06 to 0.01, until the highest"
        )
        (axes,) = found.plot().axes
        assert (axes.get_xscale(), len(axes.get_lines()[0].get_xdata())) == ("log", 20)
        assert "<b>LearningRates</b>" in found._repr_html_()
        assert f"suggestion {found.suggestion:.2g}" in found._repr_html_()
