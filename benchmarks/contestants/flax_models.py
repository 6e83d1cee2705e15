"""The models of the workloads in flax. Layers have their torch names, so weights are transferred by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from torch import nn as torch_nn

losses: dict[str, Callable[[Any, Any], Any]] = {
    "cross_entropy": lambda output, y: optax.softmax_cross_entropy_with_integer_labels(output, y).mean(),
    "squared_error": lambda output, y: jnp.square(output - y).mean(),
}


class MLP(nn.Module):
    module: torch_nn.Sequential

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for name, layer in self.module.named_children():
            x = nn.Dense(layer.out_features, name=name)(x) if isinstance(layer, torch_nn.Linear) else nn.relu(x)
        return x


class GPT(nn.Module):
    module: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def norm(name: str, x: Any) -> Any:
            # The epsilon and the variance formula of torch.
            return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)

        vocabulary, width = self.module.tokens.weight.shape
        heads = self.module.blocks[0].heads
        positions = self.param("positions", nn.initializers.zeros, tuple(self.module.positions.shape))
        x = nn.Embed(vocabulary, width, name="tokens")(x) + positions
        batch, length, _ = x.shape
        for index in range(len(self.module.blocks)):
            at = f"blocks.{index}."
            qkv = nn.Dense(3 * width, name=f"{at}qkv")(norm(f"{at}norm1", x))
            q, k, v = (part.squeeze(2) for part in jnp.split(qkv.reshape(batch, length, 3, heads, -1), 3, axis=2))
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, length, width)
            x = x + nn.Dense(width, name=f"{at}out")(mixed)
            up = nn.Dense(4 * width, name=f"{at}up")(norm(f"{at}norm2", x))
            x = x + nn.Dense(width, name=f"{at}down")(nn.gelu(up, approximate=False))
        return nn.Dense(vocabulary, use_bias=False, name="head")(norm("norm", x))


class ResNet(nn.Module):
    module: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def conv(name: str, x: Any) -> Any:
            like = self.module.get_submodule(name)
            padding = [(size, size) for size in like.padding]
            made = nn.Conv(like.out_channels, like.kernel_size, like.stride, padding, use_bias=False, name=name)
            return made(x)

        def norm(name: str, x: Any) -> Any:
            return nn.BatchNorm(use_running_average=False, momentum=0.9, use_fast_variance=False, name=name)(x)

        x = jnp.moveaxis(x, 1, -1)  # needs no copy, because there is one channel
        x = nn.relu(norm("norm", conv("stem", x)))
        for index, block in enumerate(self.module.blocks):
            at = f"blocks.{index}."
            inside = nn.relu(norm(f"{at}norm1", conv(f"{at}conv1", x)))
            skip = conv(f"{at}skip", x) if isinstance(block.skip, torch_nn.Conv2d) else x
            x = nn.relu(skip + norm(f"{at}norm2", conv(f"{at}conv2", inside)))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Rows(nn.Module):
    module: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        named = self.module.named_parameters()
        rows = [self.param(name, nn.initializers.zeros, tuple(row.shape)) for name, row in named]
        return x @ jnp.stack(rows).T


_MODELS = {"tiny_mlp": MLP, "wide_mlp": MLP, "small_gpt": GPT, "digits_resnet": ResNet, "many_leaves": Rows}


def model(name: str, module: torch_nn.Module) -> nn.Module:
    """Returns the model of a workload, with the layer sizes of ``module``."""
    return _MODELS[name](module)


# Weights


def from_torch(module: torch_nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns flax parameters and batch statistics with the values of ``module``."""
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        path, turned = _place(name, module)
        collection = statistics if name.rpartition(".")[2].startswith("running") else params
        for part in path[:-1]:
            collection = collection.setdefault(part, {})
        collection[path[-1]] = turned(value.numpy())
    return params, statistics


def to_torch(params: Any, statistics: Any, module: torch_nn.Module) -> dict[str, Any]:
    """Returns the values as numpy arrays, with the names and shapes of torch."""
    found = {}
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        path, _ = _place(name, module)
        leaf = statistics if name.rpartition(".")[2].startswith("running") else params
        for part in path:
            leaf = leaf[part]
        array = np.asarray(leaf)
        found[name] = (
            np.transpose(array, (3, 2, 0, 1)) if value.ndim == 4 else array.T if path[-1] == "kernel" else array
        )
    return found


def _place(name: str, module: torch_nn.Module) -> tuple[tuple[str, ...], Callable[[Any], Any]]:
    """Returns the flax path of a torch tensor, and the function that converts its layout."""
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner)
    if leaf == "weight":
        if isinstance(layer, torch_nn.Linear):
            return (owner, "kernel"), np.transpose
        if isinstance(layer, torch_nn.Conv2d):
            return (owner, "kernel"), lambda value: np.transpose(value, (2, 3, 1, 0))
        return (owner, "embedding" if isinstance(layer, torch_nn.Embedding) else "scale"), np.asarray
    if leaf in ("running_mean", "running_var"):
        return (owner, leaf.removeprefix("running_")), np.asarray
    if leaf == "bias":
        return (owner, leaf), np.asarray
    return (name,), np.asarray  # a parameter outside of any layer
