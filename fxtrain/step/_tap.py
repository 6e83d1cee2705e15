"""Measures the outputs of submodules while a loss function runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import Metrics, Tree, check_callable, matching
from fxtrain.model._model_calls import named_modules
from fxtrain.step._check_function import refuse_unless_loss
from fxtrain.step._forward_pass import forwards_wrapped
from fxtrain.step._loss_results import Weighted, loss_and_metrics, weighted

Statistic = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
"""Maps the output of a module to a 0-d tensor, or a dict of them by name."""


def tap(
    loss_fn: Callable[..., object], modules: str | Sequence[str], statistic: Statistic, *, prefix: str = "activations"
) -> Callable[..., tuple[Tensor | Weighted, Metrics]]:
    """Returns a loss function that also measures a statistic of some modules' outputs.

    Forward hooks observe the modules while the loss runs, and are removed afterwards. The statistics become metrics of
    the step, ``<prefix>/<module>`` or ``<prefix>/<module>/<name>``. They are not differentiated. A step returns whole
    tensors, such as attention maps, with ``train_step(outputs=True)``.

    Args:
        loss_fn: ``(model, batch) -> loss`` or ``-> (loss, metrics)``, or any other form that ``fxtrain.gradients``
            accepts.
        modules: Shell-style patterns of submodule names, such as ``"blocks.*.attn"``. In a dict of modules, names begin
            with its keys. A module that is called several times is measured at its last call.
        statistic: Maps an output, or the first tensor of an output with several, to a 0-d tensor or a dict of them.
            ``fxtrain.callbacks.activation_stats`` is one.
        prefix: Prefix of the metric names.

    Returns:
        A function ``(model, batch) -> (loss, metrics)``.

    Raises:
        ValueError: When it runs, if a pattern matches no module, or if the loss has a metric of the same name.

    Example:
        >>> import torch, fxtrain as fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> loss_fn = tap(lambda model, batch: model(batch).sum(), "1", lambda y: (y == 0).float().mean())
        >>> found = fx.gradients(loss_fn)(fx.init(model), torch.zeros(4, 2))
        >>> sorted(found.metrics)
        ['activations/1', 'loss']
    """

    refuse_unless_loss(loss_fn)
    check_callable("statistic", statistic, "(output) -> tensor or dict of tensors")

    @functools.wraps(loss_fn)
    def tapped(model: Tree, *arguments: object) -> tuple[Tensor | Weighted, Metrics]:
        seen: dict[str, Tensor] = {}

        def watch(name: str, output: Tree) -> None:
            first = next((leaf for leaf in tree.leaves(output) if isinstance(leaf, Tensor)), None)
            if first is not None:
                seen.update(_named(f"{prefix}/{name}", statistic(first.detach())))

        with _observed(_chosen(model, modules), watch):
            result = loss_fn(model, *arguments)
        loss, metrics, weight = loss_and_metrics(loss_fn, result)
        twice = sorted(seen.keys() & metrics.keys())
        if twice:
            raise ValueError(
                f"expected names of metrics that differ between the loss and tap, got {twice[0]!r} from both. "
                "Choose another prefix."
            )
        return (loss if weight is None else weighted(loss, weight)), {**metrics, **seen}

    return tapped


@contextlib.contextmanager
def _observed(modules: Sequence[tuple[str, nn.Module]], watch: Callable[[str, Tree], None]) -> Iterator[None]:
    """Calls ``watch(name, output)`` after each call of one of the modules inside the context."""

    def watched(name: str, forward: Callable[..., Tree], *args: object, **kwargs: object) -> Tree:
        output = forward(*args, **kwargs)
        watch(name, output)
        return output

    def hook(name: str, module: nn.Module, inputs: object, output: Tree) -> None:
        watch(name, output)

    # Dynamo cannot trace the registration of hooks.
    if torch.compiler.is_dynamo_compiling():
        with forwards_wrapped([(module, functools.partial(watched, name)) for name, module in modules]):
            yield
        return
    hooks = [module.register_forward_hook(functools.partial(hook, name)) for name, module in modules]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _named(name: str, found: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in found.items()} if isinstance(found, Mapping) else {name: found}


def _chosen(model: Tree, modules: str | Sequence[str]) -> list[tuple[str, nn.Module]]:
    named = named_modules(model)
    # A root module can be measured only if it has no submodules.
    names = [name for name in named if name] or list(named)
    return [(names[i], named[names[i]]) for i in matching(names, modules, "module")]
