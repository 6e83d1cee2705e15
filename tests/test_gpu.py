"""What only a GPU can show: captured steps, memory, overlap and synchronization.

Run ``pytest -m gpu`` on the GPU's machine. ``test_cuda_graphs.py`` and ``test_device_copies.py`` show on any machine
what fxtrain asks of torch.
"""

import random
import time

import problem
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import rng, tree
from fxtrain.data import prefetch
from fxtrain.finders import find_batch_size

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

REPLAYED = "reduce-overhead"
LIMIT = 2**31  # bytes of the device, where a test limits them


def start(seed=0):
    return fx.init(problem.module().cuda(), problem.transform(), seed=seed)


def compiled(step, mode: str | None = REPLAYED, **options):
    return fx.compile(step, mode=mode, donate=True, **options)


def fit(step, steps=20, data=None, **options):
    return fx.fit(start(), step, problem.data(steps) if data is None else data, steps=steps, **options)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are captured, and the number of replays of each."""
    replays = {}
    begin, replay = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.replay

    def captured(graph, *args, **options):
        replays[graph] = 0
        return begin(graph, *args, **options)

    def replayed(graph):
        replays[graph] += 1
        return replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", captured)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed)
    return replays


@pytest.fixture
def _default_sync_mode():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def _limited_memory():
    torch.cuda.set_per_process_memory_fraction(LIMIT / torch.cuda.mem_get_info()[1])
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


class Wide(nn.Module):
    """A model with more activations than parameters, and with dropout."""

    def __init__(self, width=1024, depth=4):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def wide_step(**options):
    tx = fx.optim.adamw(1e-3)
    return fx.train_step(lambda model, batch: model(batch).square().mean(), tx, **options), tx


class TestGraphs:
    def test_200_replayed_steps_equal_the_plain_compiled_ones(self, graphs):
        """Dropout, a schedule, a guard, and an update that it skips. Both run the same kernels, so the bits are equal.

        In doubt: kernels that choose their algorithm by the free memory, as cuDNN's may.
        """
        data = problem.data(200)
        data[50]["x"][0, 0] = float("nan")
        step = problem.step(callbacks=[fx.callbacks.nan_guard(patience=5)])
        plain = fit(compiled(step, mode=None), 200, data)
        assert not graphs
        replayed = fit(compiled(step), 200, data)
        assert not replayed.state.diff(plain.state)
        # Seen on an H200. The first call runs the step. At the second one, a scalar that the loop reads has probably
        # moved.
        assert list(graphs.values()) == [198]

    @pytest.mark.parametrize("mode", [REPLAYED, "max-autotune"])
    def test_no_graph_is_captured_by_inductor(self, graphs, mode):
        """Its graphs return memory that the next call overwrites. An undonated step has none at all."""
        step, state = fx.compile(problem.step(), mode=mode, donate=False), start()
        held = []
        for batch in problem.data(5):
            state, output = step(state, tree.map(lambda leaf: leaf.cuda(), batch))
            held.append((state, output.metrics["loss"], float(output.metrics["loss"])))
        assert not graphs
        assert all(float(loss) == value for _, loss, value in held)

    def test_graphs_of_training_evaluation_and_small_batches_share_one_pool(self, graphs):
        step, evaluate = compiled(problem.step(), on_recompile="allow"), compiled(problem.eval_step)
        state = start()
        batches = [tree.map(lambda leaf: leaf.cuda(), batch) for batch in problem.data(4)]
        small = tree.map(lambda leaf: leaf[:5].clone(), batches[0])
        for batch in (*batches, small, small, small, *batches):
            state, _ = step(state, batch)
        for batch in batches:
            evaluate(state, batch)
        assert len(graphs) == 3
        assert len({graph.pool() for graph in graphs}) == 1

    def test_replayed_steps_take_no_more_memory_than_plain_ones(self):
        """32 MiB more were seen on an H200: probably the workspace of cuBLAS there, which captures' stream has too."""
        step, tx = wide_step()
        batch = torch.randn(4096, 1024, device="cuda")

        def peak(mode):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            state, run = fx.init(Wide().cuda(), tx), compiled(step, mode=mode, check=False)
            for _ in range(3):
                state, _ = run(state, batch)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(5):
                state, _ = run(state, batch)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_reserved()

        plain = peak(None)
        assert peak(REPLAYED) <= 1.1 * plain + 2**25

    def test_changed_addresses_are_noticed(self, graphs, tmp_path):
        """After a held reference, a checkpoint that is restored, and a rewind."""
        held = []

        def hold(state, event: fx.StepEnd, control):
            if event.step in (7, 13):
                held.append(state.params)

        def rewind(state, event: fx.StepEnd):
            return state, fx.Control(rewind=5 if event.step == 15 and event.position < 16 else 0)

        options = {"observers": [hold], "callbacks": [rewind], "snapshot_every": 5}
        step = problem.step()
        plain, replayed = (fit(compiled(step, mode=mode), 30, problem.data(60), **options) for mode in (None, REPLAYED))
        assert not replayed.state.diff(plain.state)
        assert len(graphs) > 1
        fx.save(tmp_path / "state", replayed.state)
        restored = fx.restore(tmp_path / "state", start())
        step = compiled(problem.step())
        for state in (restored.copy(), restored):
            for batch in problem.data(4):
                state, _ = step(state, tree.map(lambda leaf: leaf.cuda(), batch))
        assert int(state.step) == int(replayed.state.step) + 4

    def test_threads_use_the_device_during_a_capture(self, graphs, tmp_path):
        """The saver and the prefetching thread copy, allocate and wait for events while the main thread captures."""
        for attempt in range(10):
            checkpoints = fx.checkpointer(tmp_path / str(attempt))
            data = prefetch(problem.data(20), 2, device="cuda")
            saving = {"callbacks": [save_each_step], "checkpointer": checkpoints}
            replayed = fit(compiled(problem.step()), 20, data, **saving)
            assert int(replayed.state.step) == 20
        assert sum(graphs.values()) >= 10 * 15

    def test_state_on_another_device_than_the_current_one(self, graphs):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        states = []
        for mode in (None, REPLAYED):
            state, step = fx.init(problem.module().to("cuda:1"), problem.transform()), compiled(problem.step(), mode)
            states.append(fx.fit(state, step, problem.data(20), steps=20).state)
        assert not states[0].diff(states[1])
        assert sum(graphs.values()) > 10


def save_each_step(state, event: fx.StepEnd):
    return state, fx.Control(save=True)


@pytest.mark.usefixtures("_default_sync_mode")
class TestSynchronization:
    """Between steps 20 and 120, nothing may wait for the device."""

    def run(self, data, mode, **options):
        def forbid(state, event: fx.StepEnd, control):
            if event.step in (20, 120):
                torch.cuda.set_sync_debug_mode("error" if event.step == 20 else "default")

        return fit(
            compiled(problem.step(callbacks=[fx.callbacks.nan_guard()]), mode=mode),
            130,
            data,
            **options | {"observers": [forbid, *options.get("observers", [])]},
        )

    @pytest.mark.parametrize("mode", [None, REPLAYED])
    @pytest.mark.parametrize("prefetched", [False, True])
    def test_100_steps_do_not_synchronize(self, mode, prefetched):
        """torch reports its own synchronizing copies and reads, in all threads. Waits for events are not among them."""
        data = problem.data(130)
        result = self.run(prefetch(data, 2, device="cuda") if prefetched else data, mode)
        assert int(result.state.step) == 130

    def test_logging_each_step_does_not_synchronize(self, tmp_path):
        writers = [fx.observers.write(fx.writers.jsonl(tmp_path / "log.jsonl"))]
        assert int(self.run(problem.data(130), REPLAYED, observers=writers).state.step) == 130

    def test_stop_flags_on_the_device_do_not_synchronize(self):
        def stop_never(state, event: fx.StepEnd):
            return state, fx.Control(stop=event.metrics["loss"] < 0, reason="never")

        assert int(self.run(problem.data(130), REPLAYED, callbacks=[stop_never]).state.step) == 130

    def test_checkpoints_do_not_synchronize(self, tmp_path):
        """The writer thread waits for events only, and each save for that of the last step's metrics."""

        def save(state, event: fx.StepEnd):
            return state, fx.Control(save=event.step % 10 == 0)

        checkpoints = fx.checkpointer(tmp_path)
        assert int(self.run(problem.data(130), None, callbacks=[save], checkpointer=checkpoints).state.step) == 130

    def test_profile_of_100_steps_has_no_synchronization(self):
        """The driver's calls, which also show what torch's debug mode does not report."""
        from torch.profiler import ProfilerActivity, profile

        events = fx.steps(start(), compiled(problem.step()), problem.data(130), steps=130)
        for _ in range(20):
            next(events)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(100):
                next(events)
        counts = {event.key: event.count for event in profiled.key_averages()}
        assert not counts.keys() & {"cudaStreamSynchronize", "cudaMemcpy"}
        assert counts.get("cudaDeviceSynchronize", 0) <= 1  # the profiler's own, at its end


class TestCheckpoints:
    def test_no_saved_state_is_torn(self, tmp_path):
        """Steps overwrite the donated state in place while its copies are under way."""
        step, tx = wide_step()
        initial, data = fx.init(Wide().cuda(), tx), [torch.randn(64, 1024) for _ in range(12)]
        states = {}

        def hold(state, event: fx.StepEnd, control):
            states[event.step] = state.copy()

        fx.fit(initial, compiled(step), data, steps=12, observers=[hold])
        checkpoints = fx.checkpointer(tmp_path, keep=None)
        fx.fit(initial, compiled(step), data, steps=12, callbacks=[save_each_step], checkpointer=checkpoints)
        assert checkpoints.steps() == list(range(1, 13))
        for number in range(1, 13):
            saved, expected = checkpoints.read(initial, step=number).state, states[number]
            for part in ("params", "opt_state", "step"):
                pairs = zip(tree.leaves(getattr(saved, part)), tree.leaves(getattr(expected, part)), strict=True)
                assert all(torch.equal(leaf, other) for leaf, other in pairs), f"step {number}, {part}"

    def test_save_blocks_at_most_twice_one_copy_to_pinned_memory(self, tmp_path):
        """The copy runs on the stream of the steps, so the next step waits for one copy. Nothing else may wait."""
        _, tx = wide_step()
        state = fx.init(Wide(2048, 8).cuda(), tx)
        leaves = tree.leaves(state)
        pinned = [torch.empty_like(leaf, device="cpu", pin_memory=True) for leaf in leaves]

        def seconds(function):
            torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            torch.cuda.synchronize()
            return time.perf_counter() - began

        def copy():
            for target, leaf in zip(pinned, leaves, strict=True):
                target.copy_(leaf, non_blocking=True)

        once = min(seconds(copy) for _ in range(5))
        with fx.checkpointer(tmp_path) as checkpoints:
            checkpoints.reserve(state)
            took = []
            for _ in range(5):
                took.append(seconds(lambda: checkpoints.save(state)))
                checkpoints.wait()
        assert min(took) <= 2 * once

    def test_50_of_50_resumes_are_exact(self, tmp_path):
        whole, chosen = fit(compiled(problem.step()), 30, problem.data()).state, random.Random(0)
        for attempt in range(50):
            checkpoints = fx.checkpointer(tmp_path / str(attempt))
            step = chosen.randrange(1, 30)
            fit(compiled(problem.step()), step, problem.data(), checkpointer=checkpoints)
            resumed = fit(compiled(problem.step()), 30, problem.data(), checkpointer=checkpoints, resume=True).state
            assert not resumed.diff(whole), f"resumed after step {step}"


class TestMemory:
    @pytest.mark.usefixtures("_limited_memory")
    def test_out_of_memory_leaves_the_given_state_intact(self):
        """The run owns a copy."""
        step, tx = wide_step()
        state = fx.init(Wide().cuda(), tx)
        before = state.copy()
        # A quarter of the memory for the batch, and more than the rest for its activations.
        data = [torch.ones(64, 1024), torch.ones(LIMIT // (4 * 4 * 1024), 1024)]
        for mode in (None, REPLAYED):
            with pytest.raises(torch.OutOfMemoryError):
                fx.fit(state, compiled(step, mode, on_recompile="allow"), iter_shapes(data), steps=2)
            assert not state.diff(before)
        after = fx.fit(state, compiled(step), [data[0]] * 4, steps=4).state
        assert int(after.step) == 4

    @pytest.mark.usefixtures("_limited_memory")
    @pytest.mark.parametrize("mode", [None, REPLAYED])
    def test_batch_size_that_is_found_fits_and_memory_is_freed(self, mode):
        step, tx = wide_step()
        state = fx.init(Wide().cuda(), tx)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        make = lambda size: torch.ones(size, 1024)  # noqa: E731
        found = find_batch_size(state, compiled(step, mode), make, start=4096, limit=2**20, multiple=4096)
        assert torch.cuda.mem_get_info()[0] >= free - 2**28
        run, taken = compiled(step, mode), state.copy()
        for _ in range(5):
            taken, _ = run(taken, make(found).cuda())
        torch.cuda.synchronize()
        assert 4096 <= found < 2**20

    def test_recomputed_batch_norms_update_their_statistics_once(self):
        layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
        tx, batch = fx.optim.sgd(0.1), torch.randn(16, 8, 8, 8, device="cuda")
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        state = fx.init(nn.Sequential(*layers).cuda(), tx, seed=0)
        kept, recomputed = (fx.compile(step, memory=memory)(state, batch)[0] for memory in ("save", "recompute"))
        torch.testing.assert_close(dict(recomputed.buffers), dict(kept.buffers))

    def test_offloaded_activations_lower_the_peak_and_keep_the_bits(self):
        """Inductor keeps each transfer at its place in the graph."""
        network = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.Tanh()))).cuda()
        tx, batch = fx.optim.sgd(0.1), torch.randn(8192, 512, device="cuda")
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        ends, peaks = [], []
        for memory in ("save", "offload"):
            made = compiled(step, None, memory=memory, check=False)
            state, _ = made(fx.init(network, tx, seed=0), batch)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            state, _ = made(state, batch)
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
            ends.append(state)
        assert all(map(torch.equal, *map(tree.leaves, ends)))
        assert peaks[1] < 0.6 * peaks[0]


def iter_shapes(batches):
    """Returns a source of batches of several sizes."""
    return fx.data.from_iterable(batches, dynamic=True)


class TestNumbers:
    @pytest.mark.parametrize(
        "draw",
        [
            lambda key, device: rng.bits(key, (1000,), width=64, device=device),
            lambda key, device: rng.uniform(key, (1000,), device=device),
            lambda key, device: rng.bernoulli(key, (1000,), p=0.3, device=device),
            lambda key, device: rng.randint(key, (1000,), high=1000, device=device),
            lambda key, device: rng.dropout(key, torch.ones(1000, device=device), p=0.3),
        ],
        ids=["bits", "uniform", "bernoulli", "randint", "dropout"],
    )
    def test_random_values_equal_those_of_the_cpu(self, draw):
        key = rng.key(3, step=5)
        assert torch.equal(draw(key, "cuda").cpu(), draw(key, "cpu"))
        assert torch.equal(torch.compile(draw)(key, "cuda").cpu(), draw(key, "cpu"))

    @pytest.mark.parametrize("draw", [rng.normal, rng.exponential])
    def test_compiled_random_values_with_sums_of_products_equal_those_of_the_cpu_up_to_rounding(self, draw):
        """Triton contracts a product and a sum into one rounding. Uncompiled kernels do not."""
        key = rng.key(3, step=5)
        expected = draw(key, (1000,), device="cpu")
        assert torch.equal(draw(key, (1000,), device="cuda").cpu(), expected)
        compiled = torch.compile(lambda key: draw(key, (1000,), device="cuda"))(key).cpu()
        torch.testing.assert_close(compiled, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-7)

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("mode", [None, REPLAYED])
    def test_precisions_train(self, precision, mode):
        """fp16 scales its loss inside the graph, and skips updates that overflow, without a read."""
        result = fit(compiled(problem.step(precision=precision), mode), 200, problem.data() * 67)
        losses = result.history["train/loss"].values
        assert losses[-20:].mean() < losses[:20].mean()
        assert {leaf.dtype for leaf in tree.leaves(result.state.params)} == {torch.float32}

    def test_tf32_is_left_to_the_user(self):
        """It changes results, so a compiled step follows torch's setting, and a checkpoint records it."""
        before = torch.get_float32_matmul_precision()
        step, _ = wide_step()
        state, batch = fx.init(Wide().cuda(), fx.optim.adamw(1e-3)), torch.randn(256, 1024, device="cuda")
        losses = {}
        try:
            for setting in ("highest", "high"):
                torch.set_float32_matmul_precision(setting)
                losses[setting] = float(fx.compile(step)(state, batch)[1].metrics["loss"])
        finally:
            torch.set_float32_matmul_precision(before)
        assert losses["high"] == pytest.approx(losses["highest"], rel=1e-2)

    def test_deterministic_mode_repeats_a_run_bitwise(self, monkeypatch):
        """cuBLAS needs its workspace setting before its first call of the process, or it raises."""
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        try:
            runs = [fit(compiled(problem.step()), 100).state for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert not runs[0].diff(runs[1])
