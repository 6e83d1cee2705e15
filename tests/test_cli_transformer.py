"""The transformer of ``fxtrain lm``: shapes, causality, tied weights, initialization and vmap."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fxtrain.cli._transformer import Config, Transformer

SMALL = Config(layers=2, width=32, heads=2, length=16)


def make(config: Config = SMALL, seed: int = 0) -> Transformer:
    return Transformer(config, torch.Generator().manual_seed(seed))


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, params: dict, tokens: torch.Tensor) -> torch.Tensor:
    logits = functional_call(model, params, (tokens[:, :-1],))
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_logits_have_one_row_per_token(dtype, length):
    tokens = random_tokens(3, length)
    logits = make()(tokens.to(dtype))
    assert logits.shape == (3, length, 256)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, make()(tokens))


@pytest.mark.parametrize("changed", range(16))
def test_attention_is_causal(changed):
    model = make()
    tokens = random_tokens(1, 16)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 256
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).flatten(2).any(-1).all()


def test_prefix_logits_equal_full_logits():
    model, tokens = make(), random_tokens(2, 16)
    torch.testing.assert_close(model(tokens[:, :9]), model(tokens)[:, :9])


@pytest.mark.parametrize("sizes", [[16], [3, 1, 5, 7], [1] * 16])
def test_logits_of_cached_parts_equal_full_logits(sizes):
    model, tokens = make(), random_tokens(2, 16)
    cache, parts = model.init_cache(2), []
    for part in tokens.split(sizes, dim=1):
        logits, cache = model(part, cache=cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))


def test_positions_enter_only_through_attention():
    model = make()
    logits = model(torch.tensor([[7] * 16, [7, 8] * 8]))
    # Equal tokens make positions indistinguishable.
    torch.testing.assert_close(logits[0], logits[0, :1].expand(16, 256))
    assert not torch.allclose(logits[1, 2], logits[1, 4])


def test_embedding_and_head_share_one_parameter():
    model = make()
    assert model.head.weight is model.embedding.weight
    names = dict(model.named_parameters())
    assert "embedding.weight" in names
    assert "head.weight" not in names
    both = grad(lambda params: loss_of(model, params, random_tokens(2, 16)))({**names})
    unused = [byte for byte in range(256) if byte not in random_tokens(2, 16)]
    assert both["embedding.weight"][unused].abs().sum() > 0  # only through the head


def test_init_ignores_global_generator():
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    moved = torch.random.get_rng_state()
    first = make(Config(layers=1, width=16, heads=1, length=8))
    assert torch.equal(torch.random.get_rng_state(), moved)
    torch.random.set_rng_state(before)
    second = make(Config(layers=1, width=16, heads=1, length=8))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    other = make(Config(layers=1, width=16, heads=1, length=8), seed=1)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_initial_loss_is_near_uniform():
    model = make(Config(layers=3, width=64, heads=2, length=64))
    loss = loss_of(model, dict(model.named_parameters()), random_tokens(8, 65))
    assert math.log2(256) <= loss.item() / math.log(2) < 9.5
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention has no batching rule on a CPU
def test_vmapped_ensemble_equals_single_models():
    model, tokens = make(), random_tokens(2, 17)
    members = [{name: p.detach() for name, p in make(seed=seed).named_parameters()} for seed in range(3)]
    gradient = grad(lambda params: loss_of(model, params, tokens))
    together = vmap(gradient)({name: torch.stack([member[name] for member in members]) for name in members[0]})
    for i, member in enumerate(members):
        for name, wanted in gradient(member).items():
            torch.testing.assert_close(together[name][i], wanted, rtol=1e-4, atol=1e-6)


def test_gradient_compiles_to_one_graph():
    model, tokens = make(), random_tokens(2, 17)
    step = torch.compile(grad(lambda p: loss_of(model, p, tokens)), fullgraph=True, backend="aot_eager")
    params = {name: p.detach() for name, p in model.named_parameters()}
    wanted = grad(lambda p: loss_of(model, p, tokens))(params)
    for name, gradient in step(params).items():
        torch.testing.assert_close(gradient, wanted[name])


def test_dropout_is_active_only_in_training():
    model, tokens = make(Config(layers=1, width=16, heads=1, length=8, dropout=0.5)), random_tokens(1, 8)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert not any(isinstance(module, nn.Dropout) for module in make().modules())


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ({"layers": 0}, "expected layers to be a positive int, got 0."),
        ({"length": -1}, "expected length to be a positive int, got -1."),
        (
            {"width": 100, "heads": 4},
            "expected width to be a multiple of 8, because each of 4 heads has an even number of channels, got 100.",
        ),
        ({"dropout": 1.0}, "expected dropout to be at least 0 and below 1, got 1.0."),
        ({"dropout": float("nan")}, "expected dropout to be at least 0 and below 1, got nan."),
    ],
)
def test_invalid_config_is_rejected(wrong, wanted):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Config(**wrong)
    assert str(caught.value) == wanted
