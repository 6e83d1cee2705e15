"""Canaries of tensors, trees, modules, checkpoints and data loaders."""

import inspect

import pytest
import torch
from canaries import canary

from fxtrain import _torch_internals as internals


@canary("torch.utils.checkpoint._checkpoint_without_reentrant_generator", "torch.utils.checkpoint.CheckpointFunction")
def checkpoints_call_two_functions():
    from torch.utils.checkpoint import checkpoint

    seen = []

    def passes(function, preserve, context_fn, *rest, **kwargs):
        seen.append(("before", preserve, rest[3:], kwargs))
        yield
        seen.append("after")

    class Reentrant:
        @staticmethod
        def apply(function, preserve, *args):
            seen.append((preserve, args))
            return function(*args)

    before = internals.checkpointing.replace_checkpoints(passes, Reentrant)
    try:
        assert checkpoint(lambda x, y: x + y, 1, y=2, use_reentrant=False, preserve_rng_state=False) == 3
        assert checkpoint(lambda x: -x, 1, use_reentrant=True) == -1
    finally:
        internals.checkpointing.replace_checkpoints(*before)
    assert seen == [("before", False, (1,), {"y": 2}), "after", (True, (1,))]


@canary("torch.autograd._unsafe_preserve_version_counter")
def writes_are_not_counted():
    x, y = torch.ones(1), torch.ones(1, requires_grad=True)
    product = x * y
    with torch.no_grad(), internals.checkpointing.keeping_versions([x]):
        x.mul_(1)
    product.backward()


@canary(
    "torch.utils.data._DatasetKind", "torch.utils.data._DatasetKind.create_fetcher", "torch.utils.data._DatasetKind.Map"
)
def fetchers_are_made_by_kind():
    kinds = torch.utils.data._DatasetKind
    before, seen = kinds.create_fetcher, []
    try:
        internals.loaders.set_fetcher(lambda create: lambda *args: seen.append(args[0]) or create(*args))
        (batch,) = torch.utils.data.DataLoader(range(2), batch_size=2)
    finally:
        kinds.create_fetcher = staticmethod(before)
    assert batch.tolist() == [0, 1]
    assert internals.loaders.is_by_index(seen[0])


@canary("torch.utils.data._utils.signal_handling._remove_worker_pids")
def workers_are_unregistered():
    class Iterator:
        _worker_pids_set = True

    iterator = Iterator()
    torch.utils.data._utils.signal_handling._set_worker_pids(id(iterator), (2**22,))
    internals.loaders.unregister_workers(iterator)
    assert not iterator._worker_pids_set
    with pytest.raises(ValueError, match="Cannot find worker information"):
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))


@canary("torch.cuda.memory._record_memory_history", "torch.cuda.memory._dump_snapshot")
def memory_history_is_recorded_as_expected():
    assert callable(torch.cuda.memory._record_memory_history)
    assert "filename" in inspect.signature(torch.cuda.memory._dump_snapshot).parameters


@canary("torch.nn.modules.batchnorm._BatchNorm")
def batch_norms_share_a_class():
    parts = torch.nn.BatchNorm2d(2), torch.nn.SyncBatchNorm(2), torch.nn.LayerNorm(2)
    assert internals.modules.batch_norms(torch.nn.Sequential(*parts)) == list(parts[:2])


@canary("torch.Tensor._backward_hooks", "torch.Tensor._post_accumulate_grad_hooks")
def hooks_are_listed():
    one, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    assert not internals.modules.has_gradient_hooks(one)
    one.register_hook(lambda grad: None)
    other.register_post_accumulate_grad_hook(lambda tensor: None)
    assert internals.modules.has_gradient_hooks(one)
    assert internals.modules.has_accumulation_hooks(other)


@canary(
    "torch.utils._pytree.register_pytree_node",
    "torch.utils._pytree.tree_is_leaf",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_unflatten",
)
def registered_classes_are_nodes():
    class Pair:
        def __init__(self, *parts):
            self.parts = parts

    pair = Pair(1, [2])
    assert internals.pytree.is_leaf(pair)
    internals.pytree.register_pytree_node(
        Pair, lambda node: (list(node.parts), None), lambda parts, _: Pair(*parts), "Pair"
    )
    assert not internals.pytree.is_leaf(pair)
    children, context = internals.pytree.parts_of(pair)
    assert children == [1, [2]]
    assert internals.pytree.node_of_parts(context, children).parts == (1, [2])


@canary("torch.UntypedStorage._cdata", "torch._C._storage_Use_Count")
def storages_are_identified_and_counted():
    x = torch.ones(2, 2)
    assert internals.memory.storage_id(x) == internals.memory.storage_id(x.t())
    (alone,) = internals.memory.storage_use_counter()([x.untyped_storage()])
    view = x.t()
    (shared,) = internals.memory.storage_use_counter()([view.untyped_storage()])
    assert shared == alone + 1


@canary("torch.Tensor._version")
def writes_are_counted():
    x = torch.ones(2)
    before = internals.memory.write_count(x)
    x[:1].add_(1)
    assert internals.memory.write_count(x) == before + 1


@canary("torch._foreach_copy_")
def many_tensors_are_copied():
    targets = [torch.zeros(2), torch.zeros(3, dtype=torch.int64)]
    internals.memory.copy_all(targets, [torch.ones(2), torch.arange(3)], non_blocking=False)
    assert [target.tolist() for target in targets] == [[1, 1], [0, 1, 2]]
