"""Data and tensor parallel training: one process per device, on ``torch.distributed``.

One script trains on one device, and on those of several machines::

    mesh = fx.distributed.mesh()
    state = fx.init(module, tx, seed=0, device=mesh.device)
    result = fx.fit(
        fx.shard(state, mesh),  # the state of rank 0, on all ranks
        fx.compile(fx.train_step(loss_fn, tx, mesh=mesh)),
        fx.data.batches(train, 512),  # 512 examples on all devices together
        mesh=mesh,
        eval_step=fx.compile(fx.eval_step(loss_fn, mesh=mesh)),
        eval_data=fx.data.batches(held_out, 512),
        epochs=3,
        checkpointer=fx.checkpointer("runs/1"),  # one folder that all machines see
        resume=True,
    )
    sys.exit(result.exit_code)

``torchrun --nproc-per-node 8 script.py`` starts it on one machine with 8 devices. With ``--max-restarts 3``, the job
continues from the newest checkpoint when a process is killed.

A batch size is that of all ranks. Each rank reads its rows of each batch, and gradients, loss and metrics are averaged
inside the step, so a run has the same result with any number of ranks, up to rounding. All ranks hold the same state,
with the same bits. Callbacks run on all ranks and see the values of the whole batch. Rank 0 alone writes, prints and
draws. A run that is resumed with another number of ranks, or without a mesh, continues in the same order of data.

Each rank has the whole state, unless it is sharded::

    state = fx.shard(state, mesh, fx.distributed.fsdp("data", least=2**16))

Then each rank keeps its part of the large parameters, their optimizer state and averages of them, and the step gathers
parameters for the forward and the backward pass. All else stays the same: see ``shard`` for what callbacks see, and
``gathered`` for the whole state after the run. With n ranks, the large tensors need 1 / n of the memory between steps.
During an uncompiled step, each rank also has all whole parameters and gradients. A compiled one has them bucket by
bucket.

Several ranks can also have one model together, each with some attention heads and hidden features::

    mesh = fx.distributed.mesh(model=2)  # with 8 ranks, 4 models of 2 ranks
    plan = {"blocks.*.qkv": "column", "blocks.*.up": "column", "blocks.*.out": "row"}
    state = fx.shard(state, mesh, fx.distributed.tensor_parallel(plan))

Each module of the plan computes with its part, so a step needs no whole parameters, gradients or activations between
the modules of a pair: see ``tensor_parallel``. Neighboring ranks share a model and its examples. Each batch is split
among the models, so ``mesh.size`` and ``mesh.rank`` count these.

A signal or an error on one rank ends all ranks at the same step. Where a rank is lost or hangs, the others raise
``LostRankError`` within the timeout of the mesh.
"""

from fxtrain.core._shard import Shard
from fxtrain.distributed._averaged import averaged
from fxtrain.distributed._failed_rank import FailedRankError
from fxtrain.distributed._layouts import FullySharded, Layout, TensorParallel, fsdp, tensor_parallel
from fxtrain.distributed._mesh import LostRankError, Mesh, mesh
from fxtrain.distributed._rank_rows import rows
from fxtrain.distributed._shards import gathered, shard
from fxtrain.distributed._sync_batch_norm import sync_batch_norm

__all__ = [
    "FailedRankError",
    "FullySharded",
    "Layout",
    "LostRankError",
    "Mesh",
    "Shard",
    "TensorParallel",
    "averaged",
    "fsdp",
    "gathered",
    "mesh",
    "rows",
    "shard",
    "sync_batch_norm",
    "tensor_parallel",
]
