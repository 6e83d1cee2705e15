"""The training loop of torch's tutorials, eager and with the model or the optimizer compiled as documented."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.feed import Feed
from benchmarks.workloads import Workload


def eager(workload: Workload, feed: Feed) -> dict[str, Any]:
    module = workload.module()
    optimizer = workload.adamw(module)
    return _loop(workload, feed, module, module, optimizer, optimizer.step)


def model_compiled(workload: Workload, feed: Feed) -> dict[str, Any]:
    module = workload.module()
    optimizer = workload.adamw(module)
    return _loop(workload, feed, module, torch.compile(module), optimizer, optimizer.step)


def both_compiled(workload: Workload, feed: Feed, mode: str | None = None) -> dict[str, Any]:
    """Compiles the model and the optimizer as in torch's recipe.

    The learning rate is a tensor. Inductor fuses the update, so ``fused=True`` is not needed.
    """
    module = workload.module()
    rate = torch.tensor(workload.learning_rate, device=workload.device)
    capturable = workload.device != "cpu"
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=workload.weight_decay, capturable=capturable)
    update = torch.compile(lambda: optimizer.step(), fullgraph=False, mode=mode)
    compiled = torch.compile(module, mode=mode)

    def model(x: torch.Tensor) -> Any:
        # A CUDA graph may overwrite what the step before has returned.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    return _loop(workload, feed, module, model if mode else compiled, optimizer, update)


def both_graphs(workload: Workload, feed: Feed) -> dict[str, Any]:
    return both_compiled(workload, feed, mode="reduce-overhead")


def _loop(
    workload: Workload,
    feed: Feed,
    module: nn.Module,
    model: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    update: Callable[[], Any],
) -> dict[str, Any]:
    module.train()
    for batch in feed:
        loss = workload.loss(model(batch["x"]), batch["y"])
        loss.backward()
        update()
        optimizer.zero_grad()
    return module.state_dict()
