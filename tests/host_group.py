"""Collectives of ranks that share a GPU, which NCCL refuses: through the host, by gloo."""

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

BACKEND = "host"


class HostGroup(dist.ProcessGroup):
    """A process group whose collectives copy to the host and back. Each has ended when it returns."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):  # noqa: N802
        return BACKEND

    @property
    def group_name(self):
        return dist.distributed_c10d._world.pg_names[self]

    def _summed(self, tensor, options):
        host, same = tensor.to("cpu", copy=True).contiguous(), dist.AllreduceOptions()
        same.reduceOp = options.reduceOp
        self._gloo.allreduce([host], same).wait()
        return host

    def allreduce(self, tensors, options):
        for tensor in tensors:
            tensor.copy_(self._summed(tensor, options))
        return _ended(tensors)

    def broadcast(self, tensors, options):
        for tensor in tensors:
            host = tensor.cpu()
            self._gloo.broadcast([host], options).wait()
            tensor.copy_(host)
        return _ended(tensors)

    def barrier(self, options):
        self._gloo.barrier().wait()
        return _ended([])

    def allgather(self, results, tensors, options):
        for parts, tensor in zip(results, tensors, strict=True):
            hosts = [torch.empty_like(part, device="cpu") for part in parts]
            self._gloo.allgather([hosts], [tensor.cpu()]).wait()
            for part, host in zip(parts, hosts, strict=True):
                part.copy_(host)
        return _ended(results)

    def all_gather_single(self, result, tensor, options):
        return self.allgather([list(result.view(self._size, -1))], [tensor.reshape(-1)], options)

    def all_gather_single_coalesced(self, results, tensors, options):
        for result, tensor in zip(results, tensors, strict=True):
            self.all_gather_single(result, tensor, options)
        return _ended(results)

    def reduce_scatter_single(self, result, tensor, options):
        result.copy_(self._summed(tensor, options).view(self._size, *result.shape)[self._rank])
        return _ended([result])

    def reduce_scatter_single_coalesced(self, results, tensors, options):
        for result, tensor in zip(results, tensors, strict=True):
            self.reduce_scatter_single(result, tensor, options)
        return _ended(results)

    def all_to_all_single(self, result, tensor, result_sizes, sizes, options):
        host = torch.empty_like(result, device="cpu")
        self._gloo.alltoall_base(host, tensor.cpu(), result_sizes, sizes).wait()
        result.copy_(host)
        return _ended([result])

    # Their names before torch 2.13.
    alltoall_base = all_to_all_single
    _allgather_base, allgather_into_tensor_coalesced = all_gather_single, all_gather_single_coalesced
    _reduce_scatter_base, reduce_scatter_tensor_coalesced = reduce_scatter_single, reduce_scatter_single_coalesced


dist.Backend.register_backend(BACKEND, HostGroup, devices=["cpu", "cuda"])


def _ended(result):
    """Returns the handle of a collective that has ended."""
    future = Future()
    future.set_result(result)
    return _create_work_from_future(future)
