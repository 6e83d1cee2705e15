"""Data parallel training: one process per device, on ``torch.distributed``, started by torchrun.

    mesh   = fx.distributed.mesh()
    state  = fx.distributed.replicated(fx.init(module, tx, seed=0), mesh)
    step   = fx.compile(fx.train_step(loss_fn, tx, mesh=mesh))
    result = fx.fit(state, step, data, mesh=mesh, eval_step=fx.eval_step(loss_fn, mesh=mesh), eval_data=held_out)

A batch size is that of all ranks. Each rank reads its rows of each batch, and gradients, loss and metrics are averaged
inside the step, so a run has the same result with any number of ranks, up to rounding, and callbacks see the values of
the whole batch. All ranks hold the same state, with the same bits.
"""

from fxtrain.distributed._averaged import averaged
from fxtrain.distributed._failed_rank import FailedRankError
from fxtrain.distributed._mesh import LostRankError, Mesh, mesh
from fxtrain.distributed._rank_rows import rows
from fxtrain.distributed._replicated import replicated
from fxtrain.distributed._sync_batch_norm import sync_batch_norm

__all__ = [
    "FailedRankError",
    "LostRankError",
    "Mesh",
    "averaged",
    "mesh",
    "replicated",
    "rows",
    "sync_batch_norm",
]
