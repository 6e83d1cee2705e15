"""The ranks of a run: one process per device, which train one model together."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fxtrain._torch_internals.collectives import register_group, register_rank
from fxtrain.core import check_int, check_positive
from fxtrain.core._collective_errors import is_of_collective

T = TypeVar("T")

_LAUNCH = "Launch the script with torchrun --nproc-per-node <processes> script.py"


class LostRankError(RuntimeError):
    """Raised if a collective fails, because another rank has ended, hangs, or runs other code."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mesh:
    """The ranks of a run, as seen from one of them. Made by ``mesh``.

    With ``model=1``, each process has a part of the batch. Otherwise, the processes are a table of ``size`` rows and
    ``model.size`` columns. Those of a row share a part of the batch, and have one model together. ``size``, ``rank``
    and ``group`` are those of a column. ``gather``, ``broadcast`` and ``maximum`` are collectives of all processes.

    Args:
        size: Number of ranks among which each batch is split.
        rank: The rank of this process among these, from 0 to ``size - 1``.
        device: The device of this process.
        timeout: Seconds after which a collective fails that other ranks have not joined.
        group: The process group of these ranks: gloo on CPUs, NCCL on GPUs.
        control: A gloo group of all processes for facts on the host.
        background: A second gloo group for threads that save checkpoints. The collectives of a group must run in one
            order on all ranks, so a thread needs a group of its own.
        model: The ranks that have one model together with this one. None with ``model=1``.
        world_group: The process group of all processes, of the same kind. Without ``model``, it is ``group``.

    Example:
        >>> import fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> mesh.size, mesh.rank, mesh.is_main
        (1, 0, True)
        >>> mesh.gather("loss")
        ['loss']
    """

    size: int
    rank: int
    device: torch.device
    timeout: float
    group: Any
    control: Any
    background: Any
    model: Mesh | None = None
    world_group: Any = None

    @property
    def ranks_per_model(self) -> int:
        """Number of ranks that have one model together."""
        return 1 if self.model is None else self.model.size

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.size * self.ranks_per_model

    @property
    def world_rank(self) -> int:
        """The rank of this process among all, from 0 to ``world_size - 1``. Neighbors share a model."""
        return self.rank if self.model is None else self.rank * self.model.size + self.model.rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of all processes, which alone writes and prints."""
        return self.world_rank == 0

    def broadcast(self, value: T, what: str = "an object", *, step: int | None = None, group: Any = None) -> T:
        """Returns rank 0's value on all ranks.

        Args:
            value: Any object that can be pickled. Only rank 0's is used.
            what: What is sent, for the error message.
            step: The training step, for the error message.
            group: A gloo group. Defaults to ``control``.

        Raises:
            LostRankError: If another rank does not take part in time.
        """
        found: list[Any] = [value]
        with self.collective(f"broadcast of {what}", step=step):
            dist.broadcast_object_list(found, group_src=0, group=group or self.control, device=torch.device("cpu"))
        return found[0]

    def gather(self, value: T, what: str = "an object", *, step: int | None = None, group: Any = None) -> list[T]:
        """Returns the values of all ranks on all ranks, in the order of ranks.

        Args:
            value: A small object that can be pickled.
            what: What is sent, for the error message.
            step: The training step, for the error message.
            group: A gloo group. Defaults to ``control``.

        Raises:
            LostRankError: If another rank does not take part in time.
        """
        found: list[Any] = [None] * self.world_size
        with self.collective(f"all-gather of {what}", step=step):
            dist.all_gather_object(found, value, group=group or self.control)
        return found

    def maximum(self, values: Tensor, what: str = "integers", *, step: int | None = None, group: Any = None) -> Tensor:
        """Returns the elementwise maximum over all ranks.

        Args:
            values: A small integer tensor on the CPU. It is not changed.
            what: What is sent, for the error message.
            step: The training step, for the error message.
            group: A gloo group. Defaults to ``control``.

        Raises:
            LostRankError: If another rank does not take part in time.
        """
        found = values.clone()
        with self.collective(f"all-reduce of {what}", step=step):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group or self.control)
        return found

    @contextlib.contextmanager
    def collective(self, name: str, *, step: int | None = None) -> Iterator[None]:
        """A context manager that turns the errors of collectives into a ``LostRankError`` with rank, step and name.

        ``fit`` uses it for each step.

        Args:
            name: The collective, as a noun.
            step: The training step. None if there is none.

        Example:
            >>> import torch, fxtrain as fx
            >>> mesh, tx = fx.distributed.mesh(), fx.optim.sgd(0.1)
            >>> step = fx.train_step(lambda model, batch: (model["w"] * batch).mean(), tx, mesh=mesh)
            >>> state = fx.init({"w": torch.tensor(1.0)}, tx)
            >>> for number in range(1, 3):
            ...     with mesh.collective("gradients", step=number):
            ...         state, output = step(state, torch.ones(2))
        """
        try:
            yield
        except LostRankError:
            raise
        except RuntimeError as error:
            if not is_of_collective(error):
                raise
            at = "" if step is None else f" at step {step}"
            (reason, *_) = str(error).strip().splitlines() or [type(error).__name__]
            raise LostRankError(
                f"expected all {self.world_size} ranks to join the {name}{at} within {self.timeout:g} s, got an error "
                f"on rank {self.world_rank}: {reason}. Read the logs of the other ranks: one has ended, hangs, or runs "
                "other code. If it was only slow, as in a long compilation, give fxtrain.distributed.mesh a longer "
                "timeout."
            ) from error


def mesh(data: int = -1, model: int = 1, *, timeout: float = 600.0) -> Mesh:
    """Returns the ranks of this run, after joining them.

    Reads the environment that torchrun sets, and initializes ``torch.distributed`` unless it is: gloo on CPUs, and NCCL
    on GPUs, with the device of each process. Without that environment, the process is the only rank, so one script runs
    with and without torchrun. All ranks must call this function equally often.

    A job that ``torchrun --max-restarts`` restarts continues with ``resume=True``. On several machines, set
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` for torchrun, because restarted workers otherwise find old addresses.

    Args:
        data: Number of parts into which each batch is split. -1 means as many as there are ranks for.
        model: Number of ranks that have one model together, see ``tensor_parallel``. They are neighbors, so that they
            can be on one machine.
        timeout: Seconds after which a collective fails that other ranks have not joined, as when one hangs. gloo takes
            up to twice as long, and notices a lost process immediately. ``fit`` meets by gloo at each step, on GPUs
            too. Where code waits for a collective of NCCL, NCCL's watchdog ends the process one minute later, with a
            log that names the collective. The timeout must exceed the longest difference between ranks, such as that
            of their compile times.

    Returns:
        The mesh, to give to ``train_step``, ``eval_step`` and ``fit``.

    Raises:
        ValueError: If ``data * model`` is not the number of ranks, or if the environment is incomplete.
        LostRankError: If other ranks do not join in time.

    Example:
        >>> import fxtrain as fx
        >>> fx.distributed.mesh(data=4)
        Traceback (most recent call last):
        ...
        ValueError: expected data to be the number of ranks, 1, or -1, got 4. Launch the script with torchrun ...
    """
    check_int("data", data, minimum=-1)
    check_int("model", model, minimum=1)
    check_positive(timeout=timeout)
    rank, size = _place()
    data = _rows(data, model, size)
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"expected a GPU for each process of this machine, got {count} for local rank {local_rank}. Start at "
                f"most {count} processes per machine, or set CUDA_VISIBLE_DEVICES='' to train on CPUs."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout)
    if not dist.is_initialized():
        store = _store(limit)
        placed = {} if store is None else {"store": store, "rank": rank, "world_size": size}
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=limit, device_id=device if backend == "nccl" else None, **placed)
        # The threads of a process group that is not destroyed may abort the process on exit.
        atexit.register(_leave)
    group = dist.new_group(timeout=limit)
    control = dist.new_group(timeout=limit, backend="gloo")
    background = dist.new_group(timeout=limit, backend="gloo")
    register_rank()
    if model == 1:
        return Mesh(size, rank, device, timeout, group, control, background, world_group=group)
    rows = torch.arange(size).reshape(data, model)
    place = divmod(rank, model)
    own = [_own_group(rows, limit, backend) for backend in (None, "gloo", "gloo")]
    of_model = Mesh(model, place[1], device, timeout, *own, world_group=own[0])
    column = _own_group(rows.T, limit, None)
    return Mesh(data, place[0], device, timeout, column, control, background, of_model, group)


def _own_group(rows: Tensor, limit: datetime.timedelta, backend: str | None) -> Any:
    """Returns the process group of this rank's row of a table of all ranks, after making those of all rows."""
    own, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=limit, backend=backend)
    register_group(own)
    return own


def _rows(data: int, model: int, size: int) -> int:
    """Returns the number of parts of a batch, so that its product with ``model`` is the number of ranks.

    Args:
        data: The number of parts, or -1.
        model: Number of ranks per model.
        size: Number of ranks.

    Raises:
        ValueError: If there is no such number.

    Example:
        >>> _rows(-1, 2, 8)
        4
    """
    rows = size // model if data == -1 else data
    if model == 1 and rows != size:
        raise ValueError(
            f"expected data to be the number of ranks, {size}, or -1, got {data}. {_LAUNCH}, with --nproc-per-node "
            f"{max(data, 1)} on one machine."
        )
    if rows * model != size:
        raise ValueError(
            f"expected data * model to be the number of ranks, {size}, got data={data} and model={model}. {_LAUNCH}, "
            f"with --nproc-per-node {max(data, 1) * model} on one machine."
        )
    return rows


def _store(limit: datetime.timedelta) -> Any:
    """Returns the store in which the ranks find each other, or None for the default of torch."""
    if "RANK" not in os.environ:
        return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # Restarts are counted per machine, so they are no common prefix on several.
    if not of_agent or int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        return None
    # The store of torchrun outlives the workers. Without a prefix, restarted ones find the addresses of those killed.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=limit)  # pyright: ignore[reportPrivateImportUsage]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"fxtrain/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _place() -> tuple[int, int]:
    """Returns rank and world size, from ``torch.distributed`` or the environment."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return 0, 1
    if missing:
        raise ValueError(
            f"expected the environment variables {', '.join(names)}, got none named {' or '.join(missing)}. {_LAUNCH}, "
            "which sets them."
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
