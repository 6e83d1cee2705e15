"""Other code that differs on CUDA devices, by stand-ins for ``torch.cuda`` and ``torch.distributed``.

Doubts, which a CPU cannot settle:

- Autocast has other lists of operators on CUDA than on the CPU, so half precision differs by more than rounding.
- Free memory counts what torch's allocator has reserved, which may be too fragmented for one large tensor.
"""

import datetime
import importlib
import types

import problem
import pytest
import torch
import torch.distributed as dist
from cuda_stand_ins import on_device
from torch import nn

import fxtrain as fx
from fxtrain.core._available_memory import available_bytes
from fxtrain.finders import find_batch_size


class TestRanks:
    @pytest.fixture
    def acts(self, monkeypatch):
        acts = []
        monkeypatch.setenv("LOCAL_RANK", "1")
        for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: acts.append(("current device", device)))
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
        monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: acts.append(("init", args, options)))
        monkeypatch.setattr(dist, "new_group", lambda **options: acts.append(("group", options)) or len(acts))
        module = importlib.import_module("fxtrain.distributed._mesh")
        monkeypatch.setattr(module, "register_rank", lambda: None)
        monkeypatch.setattr(module, "atexit", types.SimpleNamespace(register=lambda function: None))
        return acts

    def test_each_rank_has_the_gpu_of_its_local_rank(self, acts):
        """The device is current before NCCL starts. Otherwise each process makes a context on the first one."""
        mesh = fx.distributed.mesh(timeout=5)
        assert mesh.device == torch.device("cuda:1")
        limit = datetime.timedelta(seconds=5)
        assert acts[0] == ("current device", torch.device("cuda:1"))
        assert acts[1] == ("init", ("nccl",), {"timeout": limit, "device_id": torch.device("cuda:1")})

    def test_objects_and_flags_are_exchanged_by_gloo(self, acts):
        """On an NCCL group, an object would be copied to the device and back, which synchronizes with it."""
        mesh = fx.distributed.mesh(timeout=5)
        groups = [options.get("backend") for kind, *rest in acts for options in rest if kind == "group"]
        assert groups == [None, "gloo", "gloo"]
        assert (mesh.group, mesh.control, mesh.background) == (3, 4, 5)

    def test_more_ranks_than_gpus_are_refused(self, acts, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ValueError, match="expected a GPU for each process of this machine, got 2 for local rank 2"):
            fx.distributed.mesh(timeout=5)
        assert acts == []


class TestMemory:
    def test_free_memory_includes_the_allocators_own(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
        assert available_bytes(torch.device("cuda:1")) == 130

    def test_search_for_a_batch_size_frees_memory_after_each_trial(self, monkeypatch):
        """Errors of kernels arrive late, so each trial waits for the device before it counts as fitting."""
        acts, finder = [], importlib.import_module("fxtrain.finders._batch_size")
        monkeypatch.setattr(finder, "to_device", lambda batch, device: batch)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: acts.append(f"wait for {device}"))
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: acts.append("empty cache"))

        def step(state, batch):
            acts.append(len(batch))
            if len(batch) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return state, fx.StepOutput({})

        state = fx.init(nn.Linear(1, 1))
        state = state.replace(step=on_device(state.step))
        assert find_batch_size(state, step, torch.ones, start=16, limit=32, multiple=4) == 20
        waits = ["wait for cuda:1", "empty cache"]
        assert acts == [16, 16, *waits, 32, "empty cache", 24, "empty cache", 20, 20, *waits]


class TestRandomness:
    def test_other_samples_of_a_step_include_those_of_the_device(self, monkeypatch):
        """A step that samples from the device's global generator differs at each call, as intended."""
        generators = importlib.import_module("fxtrain.compiler.check._generators")
        drawn = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch, "rand", lambda *size, device="cpu": drawn.append(str(device)))
        with generators.other_samples():
            assert drawn == ["cpu", "cuda:1"]


class TestPrecision:
    @pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
    def test_autocast_is_that_of_the_state_s_device(self, monkeypatch, precision, dtype):
        """Autocast of the CPU has no effect on tensors of a GPU."""
        entered, real = [], torch.autocast

        def autocast(kind, **options):
            entered.append((kind, options.get("dtype"), options.get("enabled", True)))
            return real("cpu", **options)

        monkeypatch.setattr(torch, "autocast", autocast)
        policy = fx.precision.policy_of(precision)
        with policy.autocast(torch.device("cuda")), policy.backward(torch.device("cuda")):
            pass
        assert entered == [("cuda", dtype, True), ("cuda", None, False)]

    def test_loss_scale_is_never_read(self):
        """A read would synchronize with the device at each step. Skipped updates are chosen inside the graph."""
        step = problem.step(precision="fp16")
        fake = fx.attach(problem.start(), step)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = fx.tree.map(mode.from_tensor, fake)
            batch = fx.tree.map(mode.from_tensor, problem.data()[0])
            with fx.core.compiling():
                new, _ = step(fakes, batch)
        assert type(new.step).__name__ == "FakeTensor"
