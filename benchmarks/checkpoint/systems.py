"""The saved state, and the measured systems behind a common interface.

The interface: prepare, save (returns when training can continue), wait (until the save is on disk), restore, close.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import shutil
from typing import Any

import torch
from torch import Tensor

import fxtrain as fx


@dataclasses.dataclass(frozen=True)
class Problem:
    """A state with ``leaves`` float32 parameters of equal size. Systems other than fxtrain save only the parameters."""

    size: int  # in bytes
    leaves: int
    state: fx.TrainState

    @classmethod
    def make(cls, size: int, leaves: int) -> Problem:
        generator = torch.Generator().manual_seed(0)
        params = {f"w{i:05d}": torch.randn(size // leaves // 4, generator=generator) for i in range(leaves)}
        return cls(size, leaves, fx.init({}).replace(params=params))  # init would copy the tensors

    @functools.cached_property
    def like(self) -> fx.TrainState:
        return fx.tree.map(lambda leaf: leaf.to("meta"), self.state)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.state.params


class System:
    """The interface of a system. Only ``save``, ``wait`` and ``restore`` are timed."""

    name: str

    def __init__(self, folder: pathlib.Path, problem: Problem) -> None:
        self.folder, self.problem = folder, problem
        self.path = folder / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Prepares the system once, before the first step of a run."""

    def save(self) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        """Waits until the save is on disk. Synchronous systems have nothing to wait for."""

    def restore(self) -> dict[str, Any]:
        raise NotImplementedError

    def close(self) -> None:
        """Releases all resources."""

    def clear(self) -> None:
        """Deletes all written files except locks."""
        for path in self.folder.glob("[!.]*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Fxtrain(System):
    name = "fxtrain, background"
    reserved = True

    def prepare(self) -> None:
        self.checkpoints = fx.checkpointer(self.folder)
        if self.reserved:
            self.checkpoints.reserve(self.problem.state)  # as fit does

    def save(self) -> None:
        self.checkpoints.save(self.problem.state)

    def wait(self) -> None:
        self.checkpoints.wait()

    def restore(self) -> dict[str, Any]:
        (path,) = self.folder.glob("*-step-*")
        return fx.restore(path, like=self.problem.like).params

    def close(self) -> None:
        self.checkpoints.close()


class FxtrainUnreserved(Fxtrain):
    name = "fxtrain, not reserved"
    reserved = False


class FxtrainSync(System):
    name = "fxtrain, fx.save"

    def save(self) -> None:
        fx.save(self.path, self.problem.state)

    def restore(self) -> dict[str, Any]:
        return fx.restore(self.path, like=self.problem.like).params


class OrbaxSync(System):
    name = "Orbax, sync"

    def prepare(self) -> None:
        import orbax.checkpoint as ocp

        self.ocp = ocp
        self.checkpointer = self.make()

    def make(self) -> Any:
        return self.ocp.Checkpointer(self.ocp.PyTreeCheckpointHandler())

    def save(self) -> None:
        arrays = {name: leaf.numpy() for name, leaf in self.problem.tensors.items()}
        self.checkpointer.save(self.path, args=self.ocp.args.PyTreeSave(arrays))

    def restore(self) -> dict[str, Any]:
        return {name: torch.from_numpy(array) for name, array in self.checkpointer.restore(self.path).items()}

    def close(self) -> None:
        self.checkpointer.close()


class OrbaxAsync(OrbaxSync):
    name = "Orbax, async"

    def make(self) -> Any:
        return self.ocp.AsyncCheckpointer(self.ocp.PyTreeCheckpointHandler())

    def wait(self) -> None:
        self.checkpointer.wait_until_finished()


class TorchSave(System):
    name = "torch.save + fsync"

    def save(self) -> None:
        torch.save(self.problem.tensors, self.path)
        for path in (self.path, self.folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def restore(self) -> dict[str, Any]:
        return torch.load(self.path)


class Safetensors(System):
    name = "safetensors (no fsync)"

    def save(self) -> None:
        from safetensors.torch import save_file

        save_file(self.problem.tensors, self.path)

    def restore(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.path)


class DCPSync(System):
    name = "DCP, sync"

    def prepare(self) -> None:
        import torch.distributed.checkpoint as dcp

        self.dcp = dcp

    def save(self) -> None:
        self.dcp.save(self.problem.tensors, checkpoint_id=self.path)

    def restore(self) -> dict[str, Any]:
        target = {name: torch.empty_like(leaf) for name, leaf in self.problem.tensors.items()}
        self.dcp.load(target, checkpoint_id=self.path)
        return target


class DCPAsync(DCPSync):
    name = "DCP, async"

    def save(self) -> None:
        self.future = self.dcp.async_save(self.problem.tensors, checkpoint_id=self.path)

    def wait(self) -> None:
        self.future.result()


class Memcpy(System):
    """The reference for blocked time: one copy of as many bytes, under the conditions of the other systems.

    A copy measured elsewhere would be faster, because a virtual machine has to reclaim memory after large disk writes.
    """

    name = "one memcpy"

    def prepare(self) -> None:
        self.source = torch.ones(self.problem.size // 4)
        self.target = torch.zeros(self.problem.size // 4)

    def save(self) -> None:
        self.target.copy_(self.source)

    def wait(self) -> None:
        with open(self.path, "wb") as file:
            file.write(self.target.numpy().data)
            os.fsync(file.fileno())

    def restore(self) -> dict[str, Any]:
        return self.problem.tensors


FXTRAIN = (Fxtrain, FxtrainUnreserved, FxtrainSync)
SYSTEMS: tuple[type[System], ...] = (Memcpy, *FXTRAIN, OrbaxSync, OrbaxAsync, TorchSave, Safetensors, DCPSync, DCPAsync)
