"""Replacements for torch's random functions, with the same arguments after a source of sites.

Gradients match torch's: they flow through the input of a dropout or an attention, never through a sample.
"""

# ruff: noqa: A002 -- arguments keep their names in torch, because callers may pass them by keyword

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fxtrain._torch_internals.tracing import has_symbolic_sizes
from fxtrain.rng import _continuous as continuous
from fxtrain.rng import _discrete as discrete
from fxtrain.rng import _uniform as uniform
from fxtrain.rng._philox import Key

Size = int | Sequence[int]
"""A size, or a shape in place of all sizes."""


class Source(Protocol):
    """Provides the key and the sites for the replacements."""

    key: Key

    def site(self) -> int:
        """Returns the next site. Called only if there is something to sample."""
        ...


# Dropout. The flag is called `train` in torch and `training` in torch.nn.functional, with different defaults.


def dropout(
    source: Source, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool = True
) -> Tensor:
    return _drop(source, input, p, training and train, inplace, input.shape)


def feature_dropout(source: Source, input: Tensor, p: float, train: bool, inplace: bool = False) -> Tensor:
    return _drop(source, input, p, train, inplace, _features(input))


def alpha_dropout(
    source: Source, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, train: bool = False
) -> Tensor:
    return _alpha_drop(source, input, p, training or train, inplace, input.shape)


def feature_alpha_dropout(
    source: Source, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, train: bool = False
) -> Tensor:
    return _alpha_drop(source, input, p, training or train, inplace, _features(input))


def _drop(source: Source, input: Tensor, p: float, active: bool, inplace: bool, shape: Sequence[int]) -> Tensor:
    if not active or p == 0.0:
        return input
    result = discrete.dropout(source.key, input, p=p, site=source.site(), shape=shape)
    return input.copy_(result) if inplace else result


def _alpha_drop(source: Source, input: Tensor, p: float, active: bool, inplace: bool, shape: Sequence[int]) -> Tensor:
    # Klambauer et al., "Self-normalizing neural networks", 2017: dropped values become the limit of SELU at minus
    # infinity, and an affine map restores mean 0 and variance 1.
    if not active or p == 0.0:
        return input
    kept = 1 - discrete.indicator(source.key, shape, site=source.site(), p=p, device=input.device)
    limit = -1.7580993408473766
    scale = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * limit**2)) if p < 1.0 else 0.0
    result = input * kept * scale + ((1 - kept) * (limit * scale) - p * limit * scale).to(input.dtype)
    return input.copy_(result) if inplace else result


def _features(input: Tensor) -> list[int]:
    if input.ndim < 2:
        raise ValueError(f"expected input of feature dropout to be [batch, channels, ...], got {list(input.shape)}.")
    return [*input.shape[:2], *[1] * (input.ndim - 2)]


def rrelu(
    source: Source,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    slope: Any = (lower + upper) / 2
    if training:
        slope = uniform.uniform(
            source.key, input.shape, site=source.site(), low=lower, high=upper, dtype=input.dtype, device=input.device
        )
    result = torch.where(input >= 0, input, input * slope)
    return input.copy_(result) if inplace else result


# Factories. The size is passed as integers or as one sequence.


def rand(source: Source, *size: Size, **options: object) -> Tensor:
    return _factory(source, uniform.uniform, size, options)


def randn(source: Source, *size: Size, **options: object) -> Tensor:
    return _factory(source, continuous.normal, size, options)


def rand_like(source: Source, input: Tensor, **options: object) -> Tensor:
    return _factory(source, uniform.uniform, input.shape, _like(input, options))


def randn_like(source: Source, input: Tensor, **options: object) -> Tensor:
    return _factory(source, continuous.normal, input.shape, _like(input, options))


def randint(source: Source, *arguments: Any, **options: object) -> Tensor:
    # (high, size) or (low, high, size), each by position or keyword.
    rest = list(arguments)
    size: Any = options.pop("size") if "size" in options else rest.pop()
    high = options.pop("high") if "high" in options else rest.pop()
    low = rest.pop() if rest else options.pop("low", 0)
    return _factory(source, uniform.randint, size, {"dtype": torch.int64} | options, low=low, high=high)


def randint_like(source: Source, input: Tensor, *bounds: int, **options: object) -> Tensor:
    return randint(source, *bounds, size=input.shape, **_like(input, options))


def randperm(source: Source, n: int, **options: object) -> Tensor:
    def order(key: Key, shape: Sequence[int], *, site: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return uniform.permutation(key, n, site=site, device=device).to(dtype)

    return _factory(source, order, (), {"dtype": torch.int64} | options)


def normal(
    source: Source,
    mean: float | Tensor = 0.0,
    std: float | Tensor = 1.0,
    size: Sequence[int] | None = None,
    **options: object,
) -> Tensor:
    mean, std = _constant(mean), _constant(std)
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    if tensors:
        size = torch.broadcast_shapes(*[x.shape for x in tensors])
        options = _like(tensors[0], options)
    return _factory(source, continuous.normal, size, options, mean=mean, std=std)


def _factory(
    source: Source,
    sampler: Callable[..., Tensor],
    shape: Size | Sequence[Size] | None,
    options: Mapping[str, object],
    **arguments: object,
) -> Tensor:
    given = {name: value for name, value in options.items() if value is not None}
    size: Any = given.pop("size", shape)
    dtype = given.pop("dtype", None) or torch.get_default_dtype()
    device = given.pop("device", None) or torch.empty(0).device  # Dynamo cannot trace get_default_device
    requires_grad = given.pop("requires_grad", False)
    for name, default in (("layout", torch.strided), ("pin_memory", False), ("memory_format", torch.preserve_format)):
        if given.get(name) == default:
            del given[name]
    if given:
        raise NotImplementedError(
            f"expected a random tensor inside rng.functional without {', '.join(given)}, got one with it. Create a "
            "plain tensor and convert it."
        )
    shape = size[0] if len(size) == 1 and isinstance(size[0], list | tuple) else size
    result = sampler(source.key, shape, site=source.site(), dtype=dtype, device=device, **arguments)
    return result.requires_grad_() if requires_grad else result


def _like(input: Tensor, options: Mapping[str, object]) -> dict[str, object]:
    return {"dtype": input.dtype, "device": input.device} | {k: v for k, v in options.items() if v is not None}


def _constant(parameter: float | Tensor) -> float | Tensor:
    return parameter.detach() if isinstance(parameter, Tensor) else parameter


# Samplers that take a tensor of probabilities.


def bernoulli(source: Source, input: Tensor, p: float | Tensor | None = None) -> Tensor:
    odds = _constant(input if p is None else p)
    drawn = discrete.indicator(source.key, input.shape, site=source.site(), p=odds, device=input.device)
    return drawn.to(input.dtype)


def multinomial(source: Source, input: Tensor, num_samples: int, replacement: bool = False) -> Tensor:
    return discrete.multinomial(
        source.key, input.detach(), num_samples=num_samples, replacement=replacement, site=source.site()
    )


# In-place samplers.


def uniform_(source: Source, tensor: Tensor, low: float = 0.0, high: float = 1.0, **bounds: float) -> Tensor:
    low, high = bounds.get("from", low), bounds.get("to", high)
    return _fill(source, tensor, uniform.uniform, low=low, high=high)


def normal_(source: Source, tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return _fill(source, tensor, continuous.normal, mean=mean, std=std)


def exponential_(source: Source, tensor: Tensor, lambd: float = 1.0) -> Tensor:
    return _fill(source, tensor, continuous.exponential, rate=lambd)


def log_normal_(source: Source, tensor: Tensor, mean: float = 1.0, std: float = 2.0) -> Tensor:
    return _fill(source, tensor, continuous.normal, mean=mean, std=std).exp_()


def cauchy_(source: Source, tensor: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return _fill(source, tensor, continuous.cauchy, median=median, scale=sigma)


def geometric_(source: Source, tensor: Tensor, p: float) -> Tensor:
    return _fill(source, tensor, discrete.geometric, p=p)


def bernoulli_(source: Source, tensor: Tensor, p: float | Tensor = 0.5) -> Tensor:
    return tensor.copy_(bernoulli(source, tensor, p))


def random_(source: Source, tensor: Tensor, *bounds: int | None, **named: int | None) -> Tensor:
    # (), (to) or (from, to), each by position or keyword. `to` defaults to the dtype's largest count, inclusive.
    low, high = (0, *bounds) if len(bounds) == 1 else bounds or (named.get("from") or 0, named.get("to"))
    if high is None:
        high = uniform.largest_count(tensor.dtype) + 1
    return _fill(source, tensor, uniform.randint, low=low, high=high)


def _fill(source: Source, tensor: Tensor, sampler: Callable[..., Tensor], **arguments: object) -> Tensor:
    values = sampler(
        source.key, tensor.shape, site=source.site(), dtype=tensor.dtype, device=tensor.device, **arguments
    )
    return tensor.copy_(values)


# Random in some calls only. These also take the original function, for the other calls.


def attention(
    source: Source,
    func: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Returns dropout(softmax(scale q k^T + mask)) v. Materializes all scores, so memory grows with both lengths."""
    if dropout_p == 0.0:
        return func(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("expected attn_mask or is_causal=True, got both. Combine them in attn_mask.")
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    # Both factors are scaled by the root of the scale, because the unscaled matmul could overflow in float16.
    root = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (query * root) @ (key * root).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
        # A query that may attend to no key gets zeros and no gradient, where a plain softmax would give NaN.
        blind = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    else:
        weights = scores.softmax(-1)
    return discrete.dropout(source.key, weights.to(query.dtype), p=dropout_p, site=source.site()) @ value


def linear(
    source: Source, func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    # Not random. Inside torch.func, torch's implementation reads three sizes as integers, which specializes the graph.
    if (
        bias is None
        or input.ndim != 3
        or weight.ndim != 2
        or not (torch.compiler.is_dynamo_compiling() or has_symbolic_sizes())
    ):
        return func(input, weight, bias)
    flat = torch.addmm(bias, input.reshape(input.shape[0] * input.shape[1], input.shape[2]), weight.t())
    return flat.view(input.shape[0], input.shape[1], weight.shape[0])


def fractional_max_pool(
    axes: int, source: Source, func: Callable[..., Tensor], input: Tensor, *args: object, **options: object
) -> Any:
    if options.get("_random_samples") is None:
        shape = [input.shape[0] if input.ndim == axes + 2 else 1, input.shape[-axes - 1], axes]
        options["_random_samples"] = uniform.uniform(
            source.key, shape, site=source.site(), dtype=input.dtype, device=input.device
        )
    return func(input, *args, **options)


def recurrent(source: Source, func: Callable[..., Tensor], *args: Any) -> Any:
    # (has_biases, num_layers, dropout, train, bidirectional) follow tensors in one of two layouts.
    first = next(index for index, value in enumerate(args) if isinstance(value, bool))
    if args[first + 2] > 0.0 and args[first + 3]:
        raise NotImplementedError(
            f"expected {func.__name__} without dropout between its layers inside rng.functional, got "
            f"dropout={args[first + 2]}. Use dropout=0, or single-layer modules with torch.nn.Dropout between them."
        )
    return func(*args)


def empty(source: Source, func: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
    # A tensor that will be filled in place must be batched if the key is, or vmap refuses the write.
    result = func(*args, **options)
    place = source.key.seed ^ source.key.step ^ source.key.microbatch
    plain = result.layout == torch.strided and result.device == place.device and not hasattr(result, "device_mesh")
    if not plain or result.requires_grad or "out" in options:
        return result
    return torch.where(place == place, result, result)


def unflatten(source: Source, func: Callable[..., Tensor], tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    # Not random. Dynamo cannot call this Python method as a function.
    return tensor.unflatten(*args, **options)


def itself(source: Source, func: Callable[..., Tensor]) -> Source:
    # Not a function of torch. It finds the mode in use.
    return source


REPLACED: dict[str, Callable[..., Any]] = {
    "dropout": dropout,
    "feature_dropout": feature_dropout,
    "alpha_dropout": alpha_dropout,
    "feature_alpha_dropout": feature_alpha_dropout,
    "rrelu": rrelu,
    "dropout_": functools.partial(dropout, inplace=True),
    "feature_dropout_": functools.partial(feature_dropout, inplace=True),
    "alpha_dropout_": functools.partial(alpha_dropout, inplace=True),
    "feature_alpha_dropout_": functools.partial(feature_alpha_dropout, inplace=True),
    "rrelu_": functools.partial(rrelu, inplace=True),
    "rand": rand,
    "randn": randn,
    "rand_like": rand_like,
    "randn_like": randn_like,
    "randint": randint,
    "randint_like": randint_like,
    "randperm": randperm,
    "normal": normal,
    "bernoulli": bernoulli,
    "multinomial": multinomial,
    "uniform_": uniform_,
    "normal_": normal_,
    "exponential_": exponential_,
    "log_normal_": log_normal_,
    "cauchy_": cauchy_,
    "geometric_": geometric_,
    "bernoulli_": bernoulli_,
    "random_": random_,
}
"""Replacements by function name."""

SOMETIMES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": attention,
    "linear": linear,
    "fractional_max_pool2d": functools.partial(fractional_max_pool, 2),
    "fractional_max_pool2d_with_indices": functools.partial(fractional_max_pool, 2),
    "fractional_max_pool3d": functools.partial(fractional_max_pool, 3),
    "fractional_max_pool3d_with_indices": functools.partial(fractional_max_pool, 3),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("empty", "empty_like", "new_empty", "new", "zeros_like"), empty),
    "unflatten": unflatten,
    "innermost_functional": itself,
}
"""Replacements that also take the original function, by its name."""
