"""Background compilation: steps run uncompiled until their graph is ready, then switch to it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor

import fxtrain as fx
from fxtrain.compiler.lowering import _compile_thread as worker
from fxtrain.compiler.lowering import _trace as traced
from fxtrain.data import bucketed

TX = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(1e-2))
A_WHILE = 30.0  # seconds until a waiting test fails


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def start():
    torch.manual_seed(0)
    return fx.init(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3)), TX, seed=0)


def batch(number, rows=8):
    drawn = torch.Generator().manual_seed(number)
    return {"x": torch.randn(rows, 4, generator=drawn), "y": torch.randint(0, 3, (rows,), generator=drawn)}


class Compiler:
    """Replaces Inductor. A compilation in another thread blocks until ``finish``."""

    def __init__(self):
        self.begun, self.allowed = threading.Semaphore(0), threading.Semaphore(0)
        self.threads, self.rows, self.error, self.during = [], [], None, None

    def __call__(self, graph, *_):
        self.threads.append(threading.current_thread())
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        self.rows.append(max(value.shape[0] for value in inputs if value.ndim))
        self.begun.release()
        if threading.current_thread() is not threading.main_thread():
            assert self.allowed.acquire(timeout=A_WHILE)
        if self.error is not None:
            raise self.error
        return lambda tensors: graph(*tensors)

    def finish(self):
        """Lets the running job return, and waits for its end."""
        assert self.begun.acquire(timeout=A_WHILE)
        self.allowed.release()
        until = time.monotonic() + A_WHILE
        while not worker.is_idle():
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def compiler(monkeypatch):
    stub = Compiler()
    monkeypatch.setattr(traced, "_compiled", stub)
    yield stub
    for _ in range(100):
        stub.allowed.release()
    until = time.monotonic() + A_WHILE
    while not worker.is_idle() and time.monotonic() < until:
        time.sleep(0.001)
    if worker._current_job is not None:
        worker._current_job.close()


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(
        dict(enumerate(fx.tree.leaves(ours))), dict(enumerate(fx.tree.leaves(theirs))), **tolerance
    )


class TestSwitching:
    @pytest.mark.parametrize("donate", [False, True])
    def test_steps_equal_eager_before_and_after_switch(self, compiler, donate):
        step = fx.train_step(loss_fn, TX)
        compiled, plain, ours = fx.compile(step, background=True, donate=donate), start(), start()
        for number in range(8):
            if number == 4:
                assert (compiled.graphs, compiled.pending, compiled.uncompiled_steps) == (0, 1, 4)
                compiler.finish()
            plain, expected = step(plain, batch(number))
            ours, output = compiled(ours, batch(number))
            assert_same(output.metrics, expected.metrics)
            assert_same(ours, plain)
        assert (compiled.graphs, compiled.pending, compiled.uncompiled_steps) == (1, 0, 4)
        assert compiled.seconds > 0
        (thread,) = compiler.threads
        assert thread is not threading.main_thread()

    def test_uncompiled_steps_donate(self, compiler):
        compiled, state = fx.compile(fx.train_step(loss_fn, TX), background=True, donate=True), start()
        kept = state.params["0.weight"]
        before = kept.clone()
        state.copy()
        after, _ = compiled(state, batch(0))
        assert torch.equal(kept, before)
        with pytest.raises(RuntimeError, match="donated"):
            _ = state.params
        held = after.params["0.weight"].data_ptr()
        after, _ = compiled(after, batch(1))
        assert after.params["0.weight"].data_ptr() == held

    def test_evaluation_switches_to_graph(self, compiler):
        measure = fx.eval_step(lambda model, batch: {"loss": loss_fn(model, batch)})
        compiled, state = fx.compile(measure, background=True), start()
        data = [batch(number) for number in range(4)]
        expected = fx.evaluate(state, measure, data)
        assert fx.evaluate(state, compiled, data) == expected
        assert compiled.uncompiled_steps == 4
        compiler.finish()
        assert fx.evaluate(state, compiled, data) == pytest.approx(expected, rel=1e-6)
        assert (compiled.graphs, compiled.uncompiled_steps) == (1, 4)

    def test_multi_step_calls_switch_to_graph(self, compiler):
        step = fx.train_step(loss_fn, TX)
        compiled, plain, ours = fx.compile(step, background=True, steps_per_call=2), start(), start()
        for number in range(0, 6, 2):
            if number == 4:
                compiler.finish()
            for each in (number, number + 1):
                plain, _ = step(plain, batch(each))
            ours, _ = compiled.multi_step(ours, [batch(number), batch(number + 1)])
            assert_same(ours, plain)
        assert (compiled.graphs, compiled.pending, compiled.uncompiled_steps) == (1, 0, 4)


class TestOtherThreads:
    def begun(self, compiler, monkeypatch, during):
        """Returns a step whose graph a thread is compiling within the context ``during``, and its state."""
        inside = threading.Event()

        def stub(graph, *_):
            with during():
                inside.set()
                return compiler(graph)

        monkeypatch.setattr(traced, "_compiled", stub)
        compiled, state = fx.compile(fx.train_step(loss_fn, TX), background=True), start()
        for number in range(2):
            state, _ = compiled(state, batch(number))
        assert inside.wait(A_WHILE)
        return compiled, state

    def test_compilation_does_not_rewind_torch_generator(self, compiler, monkeypatch):
        """Inductor restores the generator to its state before the compilation."""
        self.begun(compiler, monkeypatch, torch._dynamo.utils.preserve_rng_state)
        torch.rand(3)
        left = torch.get_rng_state()
        compiler.finish()
        assert torch.equal(torch.get_rng_state(), left)

    def test_dynamo_functions_run_during_compilation(self, compiler, monkeypatch):
        doubled = torch.compile(lambda x: x * 2, backend="eager")
        doubled(torch.ones(2))

        @contextlib.contextmanager
        def tracing():
            monkeypatch.setattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", True)
            yield
            monkeypatch.setattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", False)

        before = torch._dynamo.config.error_on_nested_fx_trace
        compiled, state = self.begun(compiler, monkeypatch, tracing)
        assert doubled(torch.ones(2)).tolist() == [2, 2]
        compiler.finish()
        compiled(state, batch(2))
        assert torch._dynamo.config.error_on_nested_fx_trace == before

    def test_inductor_options_reach_background_job(self, compiler, monkeypatch):
        seen = []
        during = lambda: seen.append(inductor.epilogue_fusion) or contextlib.nullcontext()  # noqa: E731
        with inductor.patch(epilogue_fusion=not inductor.epilogue_fusion):
            self.begun(compiler, monkeypatch, during)
        assert seen == [not inductor.epilogue_fusion]

    def test_foreground_compilation_waits_for_background_job(self, compiler, monkeypatch):
        self.begun(compiler, monkeypatch, contextlib.nullcontext)
        threading.Timer(0.3, compiler.allowed.release).start()
        measure = fx.compile(fx.eval_step(lambda model, batch: {"loss": loss_fn(model, batch)}))
        measure(start(), batch(0))
        assert measure.graphs == 1
        assert worker.is_idle()


class TestSizes:
    def test_each_size_compiles_once_in_order_of_first_batch(self, compiler):
        compiled, state = fx.compile(fx.train_step(loss_fn, TX), background=True, on_recompile="error"), start()
        compiled.expect_shapes(3)
        for rows in (12, 9, 15, 9):
            state, _ = compiled(state, batch(rows, rows))
        assert (compiled.graphs, compiled.pending) == (0, 3)
        for left in (2, 1, 0):
            compiler.finish()
            state, _ = compiled(state, batch(9, 9))
            assert compiled.pending == left
        assert compiler.rows == [12, 9, 15]
        ran = compiled.uncompiled_steps
        for rows in (12, 9, 15):
            state, _ = compiled(state, batch(rows, rows))
        assert (compiled.graphs, compiled.uncompiled_steps) == (3, ran)
        assert not any(thread is threading.main_thread() for thread in compiler.threads)

    def test_undeclared_size_warns_or_raises(self, compiler):
        refusing = fx.compile(fx.train_step(loss_fn, TX), background=True, on_recompile="error")
        state, _ = refusing(start(), batch(0))
        with pytest.raises(RuntimeError, match="expected inputs for which"):
            refusing(state, batch(0, 9))
        warning = fx.compile(fx.train_step(loss_fn, TX), background=True)
        state, _ = warning(start(), batch(0))
        with pytest.warns(UserWarning, match="recompiles") as caught:
            state, _ = warning(state, batch(0, 9))
        assert caught[0].filename == __file__

    def test_bucketed_run_publishes_pending_graphs(self, compiler):
        data = bucketed([[1.0] * (1 + number % 9) for number in range(24)], 3, sizes=3, multiple=4)
        step = fx.train_step(lambda model, batch: (model["w"] * batch["x"]).square().mean(), TX)
        compiled, state = fx.compile(step, background=True, on_recompile="error"), fx.init({"w": torch.tensor(1.0)}, TX)
        result = fx.fit(state, compiled, data, epochs=2)
        expected = fx.fit(state, step, data, epochs=2)
        assert_same(result.state.params, expected.state.params)
        assert result.history["compile/graphs"].values.tolist() == [0]
        assert result.history["compile/pending"].values.tolist() == [len(data.sizes)]
        assert result.history["compile/uncompiled_steps"].values.tolist() == [2 * data.epoch_length]
        compiler.finish()
        result = fx.fit(result.state, compiled, data, epochs=3)
        assert result.history["compile/graphs"].values.tolist() == [1]
        assert result.history["compile/pending"].values.tolist() == [len(data.sizes) - 1]


class TestErrors:
    def test_failed_compilation_falls_back_to_next_route(self, compiler):
        compiler.error = NotImplementedError("no such kernel")
        step = fx.train_step(loss_fn, TX)
        compiled, plain, ours = fx.compile(step, background=True), start(), start()
        for number in range(2):
            plain, _ = step(plain, batch(number))
            ours, _ = compiled(ours, batch(number))
        compiler.finish()
        compiled._routes._routes[2] = compiled._routes._routes[-1]  # uncompiled instead of Dynamo
        with pytest.warns(UserWarning, match="cannot be traced as one graph") as caught:
            ours, _ = compiled(ours, batch(2))
        assert len(caught) == 1
        assert_same(ours, step(plain, batch(2))[0])
        ours, _ = compiled(ours, batch(3))
        assert (compiled.route, compiled.graphs, compiled.pending, compiled.uncompiled_steps) == ("uncompiled", 1, 0, 2)

    def test_transient_compiler_error_is_retried(self, compiler):
        compiler.error = OSError("the disk is full")
        compiled, state = fx.compile(fx.train_step(loss_fn, TX), background=True, on_recompile="error"), start()
        for number in range(2):
            state, _ = compiled(state, batch(number))
        compiler.finish()
        compiler.error = None
        state, _ = compiled(state, batch(2))
        assert (compiled.graphs, compiled.pending, compiled.uncompiled_steps) == (1, 0, 2)
        assert [thread is threading.main_thread() for thread in compiler.threads] == [False, True]

    def test_fullgraph_rejects_graph_break(self, compiler):
        def branching(model, batch):
            loss = loss_fn(model, batch)
            return loss * 2 if loss > 1 else loss

        compiled, state = fx.compile(fx.train_step(branching, TX), background=True, fullgraph=True), start()
        del compiled._routes._routes[1:]  # without Dynamo, which takes seconds to reject the step
        state, _ = compiled(state, batch(0))
        with pytest.raises(RuntimeError, match="expected a step that is one graph"):
            compiled(state, batch(1))

    def test_step_error_is_raised_unchanged(self, compiler):
        compiled = fx.compile(fx.train_step(lambda model, batch: model(batch["z"]), TX), background=True)
        with pytest.raises(KeyError, match="z"):
            compiled(start(), batch(0))

    def test_step_with_python_counter_is_rejected(self, compiler):
        calls = 0

        def counting(model, batch):
            nonlocal calls
            calls += 1
            return loss_fn(model, batch) * calls

        compiled = fx.compile(fx.train_step(counting, TX), background=True)
        state, _ = compiled(start(), batch(0))
        with pytest.raises(RuntimeError, match="calls"):
            compiled(state, batch(1))
        assert not compiler.rows

    @pytest.mark.parametrize("options", [{"backend": "eager"}, {"mode": "ahead-of-time"}, {"dynamic": True}])
    def test_foreground_options_are_rejected(self, options):
        with pytest.raises(ValueError, match="expected background=True without"):
            fx.compile(fx.train_step(loss_fn, TX), background=True, **options)

    def test_multiple_processes_are_rejected(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match="expected one process"):
            fx.compile(fx.train_step(loss_fn, TX), background=True)(start(), batch(0))


class TestResume:
    def run(self, step, folder, steps, **options):
        data = [batch(number) for number in range(4)]
        return fx.fit(start(), step, data, steps=steps, checkpointer=fx.checkpointer(folder), **options)

    def test_warns_about_different_uncompiled_steps(self, compiler, tmp_path):
        def compiled():
            return fx.compile(fx.train_step(loss_fn, TX), background=True)

        self.run(compiled(), tmp_path, 3)
        with pytest.warns(UserWarning, match="uncompiled steps: 3 at the save, 0 now"):
            self.run(compiled(), tmp_path, 5, resume=True)

    def test_warns_about_foreground_compilation_at_save(self, compiler, tmp_path):
        self.run(fx.compile(fx.train_step(loss_fn, TX)), tmp_path, 3)
        with pytest.warns(UserWarning, match="inductor, traced at the save, inductor, traced, in the background now"):
            self.run(fx.compile(fx.train_step(loss_fn, TX), background=True), tmp_path, 5, resume=True)

    def test_does_not_warn_without_new_uncompiled_steps(self, compiler, tmp_path):
        step = fx.compile(fx.train_step(loss_fn, TX), background=True)
        state = start()
        for number in range(2):
            state, _ = step.with_donation()(state, batch(number))
        compiler.finish()
        self.run(step, tmp_path, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.run(step, tmp_path, 5, resume=True)


PENDING_STEP = """
import os, signal, threading, time, torch
import fxtrain as fx
from fxtrain.compiler.lowering import _trace as traced

begun = threading.Event()

def forever(graph, *_):
    begun.set()
    while True:
        sum(range(1000))

traced._compiled = forever
tx = fx.optim.sgd(0.1)
step = fx.compile(fx.train_step(lambda model, batch: model(batch).sum(), tx), background=True)
state = fx.init(torch.nn.Linear(2, 1), tx)
for _ in range(2):
    state, _ = step(state, torch.ones(3, 2))
assert begun.wait(30) and step.pending == 1
traced._compiled = lambda graph, *_: lambda tensors: graph(*tensors)
child = os.fork()
if not child:
    until = time.monotonic() + 30
    while step.pending and time.monotonic() < until:
        state, _ = step(state, torch.ones(3, 2))
    os._exit(10 + step.graphs)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert step.pending == 1
print("begun", flush=True)
raise SystemExit(code)
"""
PENDING_JOB = """
import signal, threading, time, torch
from fxtrain.compiler.lowering._compile_thread import Job

begun = threading.Event()
job = Job(lambda: begun.set() or time.sleep(60), torch.device("cpu"))
assert begun.wait(30)
print("begun", flush=True)
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("code", "expected"), [(PENDING_STEP, {11}), (PENDING_JOB, {1, -signal.SIGINT})])
def test_pending_compilation_does_not_block_exit_or_fork(code, expected):
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        began = time.monotonic()
        # After SIGINT it is 1 if torch's report at exit imports tabulate, because then Python forgets the signal.
        assert process.wait(A_WHILE) in expected
        assert time.monotonic() - began < 20
        assert "fxtrain-compile" not in process.stderr.read()


@pytest.mark.slow
def test_inductor_thread_leaves_eager_steps_and_generator_unchanged():
    def loss(model, batch):
        return (model["w"] * F.dropout(batch, 0.5)).square().mean()

    step, state = fx.train_step(loss, fx.optim.sgd(0.1)), fx.init({"w": torch.ones(3)}, fx.optim.sgd(0.1))
    compiled, plain, ours, data = fx.compile(step, background=True), state, state.copy(), torch.ones(4, 3)
    generator = torch.get_rng_state()
    until = time.monotonic() + 120
    while not compiled.graphs and time.monotonic() < until:
        plain, _ = step(plain, data)
        before = compiled.uncompiled_steps
        ours, _ = compiled(ours, data)
        assert_same(ours, plain, **({"rtol": 0, "atol": 0} if compiled.uncompiled_steps > before else {}))
    assert compiled.route == "inductor, traced, in the background"
    assert compiled.uncompiled_steps > 1
    assert torch.equal(generator, torch.get_rng_state())
    for _ in range(3):
        (plain, expected), (ours, output) = step(plain, data), compiled(ours, data)
        assert_same((ours, output.metrics), (plain, expected.metrics))
