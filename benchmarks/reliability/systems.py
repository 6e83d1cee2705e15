"""Checkpointing systems behind a common interface, each used as documented.

A state is a dict from name to tensor. torch.save, safetensors and DCP have no managers, so they overwrite ``last`` and
``best`` at each save, as is common practice. Orbax and fxtrain have managers that delete old checkpoints. The other
libraries are imported on first use.
"""

from __future__ import annotations

import pathlib
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import fxtrain as fx

Values = dict[str, Tensor]


class Save(NamedTuple):
    """One save of a scenario."""

    step: int
    loss: float
    reopen: bool = False  # whether to save in a new session


class System:
    """The interface of a system. Checkpoints are named by step, or ``"last"`` and ``"best"``.

    Args:
        folder: The folder of the checkpoints.
        keep: The number of newest checkpoints to keep.
        best: Whether to also keep the checkpoint with the lowest loss.
    """

    name: ClassVar[str]
    can_rewind: ClassVar[bool] = False  # whether steps smaller than the largest can be saved
    has_target: ClassVar[bool] = True  # whether restore takes the expected structure
    manages: ClassVar[bool] = False  # whether a new session finds the best checkpoint of earlier sessions
    every: ClassVar[int] = 1  # the default period of tested crash points, larger for slower systems

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, best: bool = False) -> None:
        self.folder, self.keep, self.best = folder, keep, best

    def save(self, step: int, values: Values, loss: float | None = None) -> None:
        """Saves, or starts a background save."""
        raise NotImplementedError

    def wait(self) -> None:
        """Waits until the save is as durable as the system makes it."""

    def listed(self) -> list[Any]:
        """Returns the names of the checkpoints listed by the system."""
        raise NotImplementedError

    def latest(self) -> Any:
        """Returns the name of the checkpoint that a resumed run would restore, or None."""
        raise NotImplementedError

    def restore(self, name: Any, like: Values) -> Values:
        """Returns the saved values, in the structure of ``like`` if the system takes a target."""
        raise NotImplementedError

    def path(self, name: Any) -> pathlib.Path:
        """Returns the file or folder of a checkpoint."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the session."""
        self.wait()

    def kept(self, saves: Sequence[Save]) -> set[int]:
        """Returns the indices of the saves that must remain after these, with ``keep=1``."""
        if not saves:
            return set()
        last_of = {save.step: index for index, save in enumerate(saves)}
        best = min(last_of.values(), key=lambda index: saves[index].loss)
        return {len(saves) - 1} | ({best} if self.best else set())

    def leftovers(self) -> list[str]:
        """Returns the names of files that are not part of a checkpoint."""
        return []


class Fxtrain(System):
    name = "fxtrain"
    can_rewind = True
    manages = True

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, best: bool = False, on_error: str = "raise") -> None:
        super().__init__(folder, keep=keep, best=best)
        self.checkpoints = fx.checkpointer(folder, keep=keep, best="loss" if best else None, on_error=on_error)
        self._continues = False

    def save(self, step: int, values: Values, loss: float | None = None) -> None:
        # A restore adopts the run of the folder. Without it a save into the folder of another run would be rejected.
        if not self._continues and self.checkpoints.has_any():
            self.checkpoints.restore(state_of(zeros_like(values), 0))
        self._continues = True
        self.checkpoints.save(state_of(values, step), {} if loss is None else {"loss": loss})

    def wait(self) -> None:
        self.checkpoints.wait()

    def listed(self) -> list[Any]:
        return self.checkpoints.steps()

    def latest(self) -> Any:
        return self.checkpoints.latest()

    def restore(self, name: Any, like: Values) -> Values:
        return self.checkpoints.restore(state_of(like, 0), step=name).params

    def path(self, name: Any) -> pathlib.Path:
        return sorted(self.folder.glob(f"*-step-{name:09d}"))[-1]

    def close(self) -> None:
        self.checkpoints.close()

    def leftovers(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if not path.name[0].isdigit() and path.name != ".lock"]


def state_of(values: Mapping[str, Any], step: int) -> fx.TrainState:
    """Returns a state with these parameters."""
    return _EMPTY.replace(step=torch.tensor(step), params=dict(values))


_EMPTY = fx.init(torch.nn.Identity())


class Orbax(System):
    name = "orbax"
    manages = True
    every = 25

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, best: bool = False) -> None:
        super().__init__(folder, keep=keep, best=best)
        import logging

        import orbax.checkpoint as ocp

        logging.disable(logging.CRITICAL)  # Orbax logs many lines per save
        self._ocp = ocp
        by_loss = {"best_fn": lambda metrics: metrics["loss"], "best_mode": "min"} if best else {}
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, **by_loss)
        self._manager = ocp.CheckpointManager(folder, options=options)

    def save(self, step: int, values: Values, loss: float | None = None) -> None:
        arrays = {name: _array(value) for name, value in values.items()}
        self._manager.save(
            step, args=self._ocp.args.StandardSave(arrays), metrics={"loss": loss} if self.best else None
        )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def listed(self) -> list[Any]:
        return list(self._manager.all_steps())

    def latest(self) -> Any:
        return self._manager.latest_step()

    def restore(self, name: Any, like: Values) -> Values:
        arrays = {name: _array(value) for name, value in like.items()}
        restored = self._manager.restore(name, args=self._ocp.args.StandardRestore(arrays))
        return {name: _tensor(value) for name, value in restored.items()}

    def path(self, name: Any) -> pathlib.Path:
        return self.folder / str(name)

    def close(self) -> None:
        self._manager.close()

    def kept(self, saves: Sequence[Save]) -> set[int]:
        if not (self.best and saves):
            return super().kept(saves)
        return {min(range(len(saves)), key=lambda index: saves[index].loss)}  # Orbax deletes the newest if it is worse


def _array(value: Tensor) -> Any:
    """Converts a tensor to numpy, with the dtypes of ml_dtypes if numpy lacks its dtype."""
    import ml_dtypes

    name = str(value.dtype).removeprefix("torch.")
    if not hasattr(ml_dtypes, name):
        return value.numpy()
    return value.contiguous().view(torch.uint8).numpy().view(getattr(ml_dtypes, name))


def _tensor(array: Any) -> Tensor:
    import ml_dtypes

    if not hasattr(ml_dtypes, array.dtype.name):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view("uint8")).view(getattr(torch, array.dtype.name))


class _OneFile(System):
    """A system that overwrites ``last`` in place, and ``best`` if the loss is the lowest so far."""

    suffix: ClassVar[str] = ""

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, best: bool = False) -> None:
        super().__init__(folder, keep=keep, best=best)
        folder.mkdir(parents=True, exist_ok=True)
        self._lowest: float | None = None

    def save(self, step: int, values: Values, loss: float | None = None) -> None:
        self._write(self.path("last"), values)
        if self.best and loss is not None and (self._lowest is None or loss < self._lowest):
            self._lowest = loss
            self._write(self.path("best"), values)

    def listed(self) -> list[Any]:
        return [name for name in ("last", "best") if self.path(name).exists()]

    def latest(self) -> Any:
        return "last" if self.path("last").exists() else None

    def restore(self, name: Any, like: Values) -> Values:
        return self._read(self.path(name), like)

    def path(self, name: Any) -> pathlib.Path:
        return self.folder / f"{name}{self.suffix}"

    def _write(self, path: pathlib.Path, values: Values) -> None:
        raise NotImplementedError

    def _read(self, path: pathlib.Path, like: Values) -> Values:
        raise NotImplementedError


class TorchSave(_OneFile):
    name, suffix, has_target = "torch.save", ".pt", False

    def _write(self, path: pathlib.Path, values: Values) -> None:
        torch.save(values, path)

    def _read(self, path: pathlib.Path, like: Values) -> Values:
        return torch.load(path)


class Safetensors(_OneFile):
    name, suffix, has_target = "safetensors", ".safetensors", False

    def _write(self, path: pathlib.Path, values: Values) -> None:
        from safetensors.torch import save_file

        save_file(values, path)

    def _read(self, path: pathlib.Path, like: Values) -> Values:
        from safetensors.torch import load_file

        return load_file(path)


class DCP(_OneFile):
    name = "dcp"
    every = 10

    def _write(self, path: pathlib.Path, values: Values) -> None:
        import torch.distributed.checkpoint as dcp

        self._tame(dcp.save, values, path)

    def _read(self, path: pathlib.Path, like: Values) -> Values:
        import torch.distributed.checkpoint as dcp

        values = {name: value.clone() for name, value in like.items()}
        self._tame(dcp.load, values, path)
        return values

    def _tame(self, function: Any, values: Values, path: pathlib.Path) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a single process
            try:
                function(values, checkpoint_id=path)
            except CheckpointException as error:  # not an Exception, but a BaseException
                raise RuntimeError(str(error)) from None


SYSTEMS: dict[str, type[System]] = {system.name: system for system in (Fxtrain, Orbax, TorchSave, Safetensors, DCP)}


def values_of(index: int, *, kilobytes: int = 24) -> Values:
    """Returns the values of save ``index``, in several dtypes. No leaf is equal in two saves."""
    generator = torch.Generator().manual_seed(1000 + index)
    rows = kilobytes * 16
    return {
        "index": torch.tensor([index]),
        "weight": torch.randn(rows, 8, generator=generator),
        "moment": torch.randn(rows, 4, generator=generator, dtype=torch.float64),
        "bias": torch.randn(17, generator=generator),
        "counts": torch.randint(0, 1000, (9,), generator=generator, dtype=torch.int32) + 1000 * index,
        "mask": torch.randint(0, 256, (33,), generator=generator, dtype=torch.uint8),
    }


def same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Returns whether all leaves are bit-identical."""
    return got.keys() == wanted.keys() and all(_same_leaf(got[name], wanted[name]) for name in wanted)


def _same_leaf(got: Tensor, wanted: Tensor) -> bool:
    if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
        return False
    return torch.equal(*(leaf.contiguous().reshape(-1).view(torch.uint8) for leaf in (got, wanted)))


def zeros_like(values: Values) -> Values:
    """Returns zeros in the structure of ``values``, as a restore target."""
    return {name: torch.zeros_like(value) for name, value in values.items()}


def clear(folder: pathlib.Path) -> None:
    """Deletes the folder if it exists."""
    shutil.rmtree(folder, ignore_errors=True)
