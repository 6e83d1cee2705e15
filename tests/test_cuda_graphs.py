"""CUDA graphs of compiled steps, by captures that run on the CPU.

What these tests cannot show, and ``test_gpu.py`` does: that the kernels of a step can be captured at all, that a replay
gives the bits of the call, and how much memory the pool takes.

Doubts from torch's documentation and source, none of which a CPU can settle:

- A capture that fails leaves its graph without an end. torch's allocator may then count the pool as captured into, and
  defer the reuse of blocks with ``record_stream``, such as prefetched batches, until the process ends.
- cuBLAS and cuDNN keep a handle for each thread, and a workspace for each stream. The first call runs on the stream of
  the capture to create them, but a step that is first called in one thread and captured in another creates them inside
  the capture. It is then refused, which costs the graph and not the result.
- torch hands out 32 streams per device in turn. A process that makes more may prefetch on the stream of a capture.
- ``thread_local`` lets other threads allocate while this one captures. torch warns to change it only with knowledge of
  CUDA; its own graphs of ``torch.compile`` use it as well.
- A capture that fails for lack of memory is not an error, so ``find_batch_size`` counts a size as fitting that leaves
  no memory for the graph.
- A scalar that the loop replaces at each step, such as a stop flag, costs two small kernels outside of the graph.
- NCCL's collectives can be captured since NCCL 2.9.6. No graph with them has been replayed.
"""

import concurrent.futures
import gc

import problem
import pytest
import torch
from cuda_stand_ins import HostCaptures, Streams, add_graphs, on_device

import fxtrain as fx
from fxtrain import tree
from fxtrain.compiler.lowering import _cuda_graphs, _route_order, _trace
from fxtrain.compiler.lowering._cuda_graphs import CudaCaptures, CudaGraphReplay, only_gpu
from fxtrain.compiler.lowering._modes import MODES, REPLAYED, without_cuda_graphs


def add(tensors):
    """Adds the input to the state in place, and returns ten times the result."""
    tensors[0].add_(tensors[1])
    return [tensors[0] * 10]


@pytest.fixture
def captures():
    return HostCaptures()


class TestReplay:
    def test_replays_from_second_call_with_same_memory(self, captures):
        replay, state = CudaGraphReplay(add, 1, captures), torch.zeros(2)
        seen = [replay([state, torch.full((2,), float(i))])[0] for i in (1, 2, 3)]
        assert [value.tolist() for value in seen] == [[10.0, 10.0], [30.0, 30.0], [60.0, 60.0]]
        assert state.tolist() == [6.0, 6.0]
        assert captures.acts == ["warm up", "capture", "replay", "replay"]

    def test_other_addresses_are_noticed(self, captures):
        """A restore, a rewind, or a copy for a held reference gives the state other addresses."""
        replay, state, other = CudaGraphReplay(add, 1, captures), torch.zeros(2), torch.ones(2)
        for _ in range(3):
            replay([state, torch.ones(2)])
        replay([other, torch.ones(2)])
        assert captures.acts == ["warm up", "capture", "replay", "replay"]
        assert (state.tolist(), other.tolist()) == ([3.0, 3.0], [2.0, 2.0])
        for _ in range(2):
            replay([other, torch.ones(2)])
        assert captures.acts[4:] == ["capture", "replay"]
        assert (state.tolist(), other.tolist()) == ([3.0, 3.0], [4.0, 4.0])

    def test_another_stream_captures_again(self, captures):
        """Graphs that run concurrently must not share memory, and only calls on one stream run one after the other."""
        replay, state = CudaGraphReplay(add, 1, captures), torch.zeros(2)
        for captures.stream in (1, 1, 2, 2, 2):
            replay([state, torch.ones(2)])
        assert captures.acts == ["warm up", "capture", "replay", "capture", "replay"]
        assert state.tolist() == [5.0, 5.0]

    def test_changing_addresses_are_captured_ever_less_often(self, captures):
        """A capture takes as long as many steps, so a reference that is held at every third step must not cause one."""
        replay, calls = CudaGraphReplay(add, 1, captures), 300
        for index in range(calls):
            if index % 3 == 0:
                state = torch.zeros(2)
            replay([state, torch.ones(2)])
            assert state.tolist() == [index % 3 + 1.0] * 2
        assert captures.acts.count("capture") == 2

    def test_memory_of_a_graph_is_freed_before_the_next_capture(self, captures):
        replay, state = CudaGraphReplay(add, 1, captures), torch.zeros(2)
        for _ in range(2):
            replay([state, torch.ones(2)])
        assert replay._outputs
        replay([torch.zeros(2), torch.ones(2)])
        assert (replay._replay, replay._buffers, replay._outputs) == (None, {}, ())

    def test_scalars_that_move_are_copied(self, captures):
        """Callbacks replace a stop flag at each step, while all other tensors stay."""

        def count(tensors):
            state, steps, flag = tensors[:3]
            state.add_(tensors[3] * ~flag)
            steps.add_(~flag)
            return [steps.clone()]

        replay, state, steps = CudaGraphReplay(count, 3, captures), torch.zeros(2), torch.zeros((), dtype=torch.int64)
        kept = []
        for index in range(10):
            kept.append(torch.tensor(index >= 8))
            replay([state, steps, kept[-1], torch.ones(2)])
        assert captures.acts == ["warm up", "capture", *["replay"] * 8]
        assert (state.tolist(), int(steps)) == ([8.0, 8.0], 8)
        assert [bool(flag) for flag in kept] == [False] * 8 + [True] * 2

    def test_written_scalars_that_move_get_their_values(self, captures):
        def count(tensors):
            tensors[1].add_(1)
            return [tensors[0] + tensors[1]]

        replay, state, steps = CudaGraphReplay(count, 2, captures), torch.zeros(2), torch.tensor(0)
        for index in range(10):
            steps = steps.clone()
            assert replay([state, steps])[0].tolist() == [index + 1.0] * 2
            assert int(steps) == index + 1
        assert captures.acts.count("replay") == 8

    @pytest.mark.parametrize(
        "change",
        [lambda x: x, lambda x: x.t(), lambda x: x[:, 1:4], lambda x: x[::2], lambda x: x[:, :1].expand(4, 3)],
        ids=["whole", "transposed", "columns", "every second row", "expanded"],
    )
    def test_static_inputs_have_the_strides_of_the_batch(self, captures, change):
        """The compiled code has the strides as constants, and reads the memory by them."""
        seen = []

        def read(tensors):
            (given,) = tensors[1:]
            seen.append(given.stride())
            return [given.clone(memory_format=torch.contiguous_format)]

        replay, state = CudaGraphReplay(read, 1, captures), torch.zeros(2)
        for index in range(4):
            given = change(torch.randn(4, 5) + index)
            assert replay([state, given])[0].equal(given)
        assert set(seen) == {given.stride()}

    def test_outputs_outlive_the_next_replay(self, captures):
        replay, state = CudaGraphReplay(add, 1, captures), torch.zeros(2)
        seen = [replay([state, torch.ones(2)])[0] for _ in range(5)]
        assert [value[0].item() for value in seen] == [10.0, 20.0, 30.0, 40.0, 50.0]

    def test_step_that_cannot_be_captured_runs_without_a_graph(self):
        captures = HostCaptures(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."))
        replay, state = CudaGraphReplay(add, 1, captures), torch.zeros(2)
        replay([state, torch.ones(2)])
        with pytest.warns(RuntimeWarning, match=r"captured as a CUDA graph, got CUDA out of memory. Tried to .* GiB\."):
            replay([state, torch.ones(2)])
        for _ in range(100):
            replay([state, torch.ones(2)])
        assert captures.acts == ["warm up", "capture"]
        assert state.tolist() == [102.0, 102.0]

    def test_reason_is_the_first_error_of_a_broken_capture(self):
        """The end of a broken capture raises its own error, in the context of the one that broke it."""
        first = RuntimeError("operation not permitted when stream is capturing\nMore.")
        last = RuntimeError("capture was invalidated")
        last.__context__ = first
        assert _cuda_graphs._reason(last) == "operation not permitted when stream is capturing"


class TestCaptures:
    """Which stream, device, pool and mode a capture has, by stand-ins for those of ``torch.cuda``."""

    @pytest.fixture
    def streams(self, monkeypatch):
        monkeypatch.setattr(_cuda_graphs, "_sides", _cuda_graphs._Sides())
        streams = Streams(monkeypatch)
        add_graphs(streams, monkeypatch)
        return streams

    def capture(self, streams, device="cuda:1"):
        return CudaCaptures(torch.device(device)).capture(lambda tensors: streams.acts.append("call") or [], [])[0]

    def test_capture_is_on_a_side_stream_of_the_device_of_the_state(self, streams):
        """Captured on the stream of another device, the step would run instead of being recorded."""
        replay = self.capture(streams)
        assert streams.acts == ["capture on stream 1 of cuda:1, thread_local, pool None", "call", "end"]
        assert streams.current().name == "default stream of 0"
        assert streams.index == 0
        del replay

    def test_graphs_share_stream_and_pool(self, streams):
        """torch shares memory only between captures on one stream."""
        replays = [self.capture(streams) for _ in range(3)]
        pool = replays[0].__self__.pool()
        assert [act for act in streams.acts if act.startswith("capture")] == [
            "capture on stream 1 of cuda:1, thread_local, pool None",
            *[f"capture on stream 1 of cuda:1, thread_local, pool {pool}"] * 2,
        ]

    def test_pool_of_freed_graphs_is_not_used(self, streams):
        """torch ends a pool with its last graph, and asserts that no capture begins with an ended one."""
        first = self.capture(streams)
        del first
        gc.collect()
        self.capture(streams)
        assert {act for act in streams.acts if "pool" in act} == {
            "capture on stream 1 of cuda:1, thread_local, pool None"
        }

    def test_graphs_of_other_streams_devices_and_threads_share_nothing(self, streams):
        """They may run concurrently, and would overwrite each other's intermediate results."""
        replays = [self.capture(streams), self.capture(streams, "cuda:0")]
        with streams.on(streams.new("cuda:1")):
            replays.append(self.capture(streams))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            replays.append(pool.submit(self.capture, streams).result())
        assert len({replay.__self__.pool() for replay in replays}) == len(replays)

    def test_stream_is_restored_after_a_failed_capture(self, streams):
        """The context of torch raises at its end, before it restores the stream."""

        def fail(tensors):
            raise RuntimeError("operation not permitted when stream is capturing")

        with pytest.raises(RuntimeError):
            CudaCaptures(torch.device("cuda:1")).capture(fail, [])
        assert (streams.current().name, streams.index) == ("default stream of 0", 0)
        self.capture(streams)
        assert "pool None" in streams.acts[-3]

    def test_warm_up_is_ordered_with_the_stream_of_the_call(self, streams):
        output = on_device(torch.zeros(2))

        def call(tensors):
            streams.acts.append(f"call on {streams.current('cuda:1').name}")
            return [output, torch.zeros(())]

        CudaCaptures(torch.device("cuda:1")).warm_up(call, [])
        assert streams.acts == [
            "stream 1 waits for default stream of 1",
            "call on stream 1",
            "default stream of 1 waits for stream 1",
            "memory used on default stream of 1",
        ]


class TestModes:
    def test_graphs_need_all_tensors_on_one_gpu(self):
        there, here = on_device(torch.zeros(2)), torch.zeros(2)
        assert only_gpu([there, there]) == torch.device("cuda:1")
        assert [only_gpu(tensors) for tensors in ([there, here], [here, there], [here], [])] == [None] * 4

    def test_no_graphs_of_inductor_are_captured(self):
        """Inductor's graphs return memory that the next call overwrites, such as the new state or metrics."""
        from torch._inductor import list_mode_options

        for mode in MODES[2:]:
            options = list_mode_options()[mode]
            stripped = {name: value for name, value in options.items() if name != "triton.cudagraphs"}
            assert list_mode_options()[without_cuda_graphs(mode)] == stripped
            assert (options != stripped) == (mode in REPLAYED)


@pytest.fixture
def on_host(monkeypatch, captures):
    """Captures the steps of ``mode="reduce-overhead"`` on the CPU."""
    monkeypatch.setattr(_trace, "only_gpu", lambda tensors: torch.device("cpu"))
    monkeypatch.setattr(_trace, "CudaCaptures", lambda device: captures)
    # Steps on a GPU are never recalled. These are on the CPU, so an earlier run with the same cache may have kept them.
    monkeypatch.setattr(_route_order, "Recall", lambda mode, artefacts: None)
    return captures


def compiled(step, **options):
    return fx.compile(step, mode="reduce-overhead", check=False, **options)


class TestRuns:
    """Whole runs, bitwise equal to those of the plain compiled step."""

    def run(self, step, **options):
        return fx.fit(problem.start(), step, problem.data(), steps=20, **options)

    @pytest.mark.slow
    def test_run_replays_and_equals_the_plain_run(self, on_host):
        step = problem.step(callbacks=[fx.callbacks.nan_guard()])
        replayed, plain = self.run(compiled(step)), self.run(fx.compile(step, check=False))
        assert not replayed.state.diff(plain.state)
        assert on_host.acts == ["warm up", "capture", *["replay"] * 19]

    @pytest.mark.slow
    def test_requests_of_callbacks_keep_the_addresses(self, on_host):
        """Requests write ``state.due`` and epochs write a slot, which a step must not read at a changed address."""

        def stop_never(state, event: fx.StepEnd):
            return state, fx.Control(stop=event.metrics["loss"] < 0, reason="never")

        options = {"callbacks": [stop_never], "lag": 1}
        replayed = self.run(compiled(problem.step()), **options)
        plain = self.run(fx.compile(problem.step(), check=False), **options)
        assert not replayed.state.diff(plain.state)
        assert on_host.acts == ["warm up", "capture", *["replay"] * 18]

    def test_evaluations_replay_between_steps(self, on_host):
        options = {"eval_data": problem.data(4, seed=1), "eval_when": 5}
        replayed = self.run(compiled(problem.step()), eval_step=compiled(problem.eval_step), **options)
        plain = self.run(
            fx.compile(problem.step(), check=False), eval_step=fx.compile(problem.eval_step, check=False), **options
        )
        assert not replayed.state.diff(plain.state)
        assert on_host.acts.count("warm up") == 2
        assert on_host.acts.count("capture") == 2

    @pytest.mark.slow
    def test_last_smaller_batch_is_another_graph(self, on_host):
        data = [*problem.data(3), {name: value[:5] for name, value in problem.data(1)[0].items()}] * 5

        def last_state(step):
            state = problem.start()
            for batch in data:
                state, _ = step(state, batch)
            return state

        options = {"donate": True, "on_recompile": "allow"}
        plain = last_state(fx.compile(problem.step(), check=False, **options))
        assert not last_state(compiled(problem.step(), **options)).diff(plain)
        assert on_host.acts.count("capture") == 2
        assert on_host.acts.count("replay") == 18

    def test_held_reference_is_noticed(self, on_host):
        """A state that is held is copied before the step donates it, so the next state has other addresses."""
        held = []

        def hold(state, event: fx.StepEnd, control):
            if event.step == 7:
                held.append(state.params)

        replayed = self.run(compiled(problem.step()), observers=[hold])
        plain = self.run(fx.compile(problem.step(), check=False))
        assert not replayed.state.diff(plain.state)
        assert on_host.acts.count("capture") == 2

    def test_checkpoints_and_snapshots_hold_no_references(self, on_host, tmp_path):
        """Both are copies, so the state stays where it is. Only the two rewinds give it other addresses."""

        def save_and_rewind(state, event: fx.StepEnd):
            return state, fx.Control(save=event.step % 3 == 0, rewind=4 if event.position == 15 else 0)

        options = {"callbacks": [save_and_rewind], "snapshot_every": 5, "snapshots_on_host": True}
        plain = self.run(
            fx.compile(problem.step(), check=False), checkpointer=fx.checkpointer(tmp_path / "1"), **options
        )
        replayed = self.run(compiled(problem.step()), checkpointer=fx.checkpointer(tmp_path / "2"), **options)
        assert not replayed.state.diff(plain.state)
        assert on_host.acts.count("capture") == 3
        first = on_host.acts.index("capture", 2)
        assert on_host.acts[:first] == ["warm up", "capture", *["replay"] * 14]

    def test_state_is_intact_after_a_capture_without_memory(self, on_host):
        on_host.error = torch.OutOfMemoryError("CUDA out of memory.")
        with pytest.warns(RuntimeWarning, match="captured as a CUDA graph, got CUDA out of memory"):
            replayed = self.run(compiled(problem.step()))
        assert not replayed.state.diff(self.run(fx.compile(problem.step(), check=False)).state)

    def test_undonated_steps_are_not_captured(self, on_host):
        """Each would read the state where the last one put it, which is another place each time."""
        step, state = compiled(problem.step(), donate=False), problem.start()
        for batch in problem.data():
            state, _ = step(state, batch)
        assert on_host.acts == []

    def test_first_calls_are_checked_through_the_graph(self, on_host):
        """The second call is the first replay, so the comparison with the uncompiled step covers the capture."""
        step, state = fx.compile(problem.step(), mode="reduce-overhead", donate=True), problem.start()
        for batch in problem.data():
            state, _ = step(state, batch)
        assert on_host.acts == ["warm up", "capture", "replay", "replay"]
        assert [leaf for leaf in tree.leaves(state) if not leaf.isfinite().all()] == []
