"""Passes that make graphs pure: in-place operations on intermediate results, constants, and products with zero."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fxtrain import _torch_internals as internals
from fxtrain.compiler.passes._constants import keep_products_with_zero, replace_constants
from fxtrain.compiler.passes._in_place import replace_in_place


def _in_place(graph):
    return [
        node.target
        for node in graph.graph.nodes
        if node.op == "call_function" and getattr(node.target, "_schema", None) and node.target._schema.is_mutable
    ]


def _batch_norm(x):
    mean, var = torch.zeros(3), torch.ones(3)
    y = torch.ops.aten.native_batch_norm(x, None, None, mean, var, True, 0.1, 1e-5)[0]
    return y, mean, var


FUNCTIONS = {
    "sum": lambda x: (x * 2).add_(1).mul_(x),
    "read before": lambda x: [y := x * 2, y + 1, y.add_(1), y * 3][1:],
    "view after": lambda x: (x * 2).add_(1).view(-1) + 1,
    "silu": lambda x: torch.func.grad(lambda x: F.silu(x).sum())(x),
    "batch norm": _batch_norm,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_place_operations_are_replaced(name):
    x = torch.randn(4, 3)
    graph = make_fx(FUNCTIONS[name], tracing_mode="fake")(x)
    hidden = [node for node in graph.graph.nodes if node.target is torch.ops.aten.native_batch_norm.default]
    assert _in_place(graph) or hidden
    expected = graph(x)
    replace_in_place(graph.graph)
    graph.recompile()
    graph.graph.lint()
    assert not _in_place(graph)
    torch.testing.assert_close(graph(x), expected, rtol=0, atol=0)
    assert torch.ops.aten.native_batch_norm.default not in {node.target for node in graph.graph.nodes}


def _through_view(x):
    y = x * 2
    y.view(-1)[0].fill_(7.0)
    return y + 1


def _view_before(x):
    y = x * 2
    flat = y.view(-1)
    y.add_(1)
    return flat + y.view(-1)


def _other_dtype(x):
    return (x * 2).mul_(torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize("function", [_through_view, _view_before, lambda x: x.add_(1)])
def test_writes_that_others_see_are_kept(function):
    graph = make_fx(function, tracing_mode="fake")(torch.randn(4, 3))
    before = _in_place(graph)
    expected = graph(torch.ones(4, 3))
    replace_in_place(graph.graph)
    graph.recompile()
    assert before
    assert _in_place(graph) == before
    torch.testing.assert_close(graph(torch.ones(4, 3)), expected, rtol=0, atol=0)


def test_results_keep_the_dtype_of_what_is_written():
    x = torch.randn(4, 3)
    graph = make_fx(_other_dtype, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    expected = graph(x)
    replace_in_place(graph.graph)
    graph.recompile()
    assert graph(x).dtype == expected.dtype == torch.float32


@pytest.mark.parametrize("number", [True, 3, -0.0, 0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_constants_of_one_element_become_numbers(number, shape):
    x = torch.randn(2)
    graph = make_fx(lambda x: x + torch.tensor(number).view(shape), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    expected = graph(x)
    assert len(list(graph.buffers())) + len(graph.graph.find_nodes(op="get_attr")) > 0
    replace_constants(graph)
    graph.recompile()
    assert not list(graph.buffers())
    assert not graph.graph.find_nodes(op="get_attr")
    assert torch.equal(graph(x).view(torch.int32), expected.view(torch.int32))


def test_tensors_from_outside_stay_constants():
    outside = torch.tensor(2.0)
    graph = make_fx(lambda x: x * outside, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.randn(2))
    replace_constants(graph)
    graph.recompile()
    outside.fill_(3.0)
    assert torch.equal(graph(torch.ones(2)), torch.full((2,), 3.0))


@pytest.mark.parametrize(
    "product",
    [
        lambda x: x * 0,
        lambda x: 0 * x,
        lambda x: x * False,
        lambda x: torch.ops.aten.mul.Scalar(x, 0),
        lambda x: x.mul_(0),
    ],
)
def test_product_with_the_integer_zero_is_nan_where_a_factor_is(product):
    given = [torch.tensor([1.0, -1.0, float("nan"), float("inf")])]
    graph = make_fx(lambda x: [product(x.clone())], tracing_mode="fake")(*given)
    replace_in_place(graph.graph)
    keep_products_with_zero(graph.graph)
    graph.recompile()
    fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    (found,) = internals.inductor.compile_graph(graph, fakes, {})(list(given))
    assert torch.equal(found.view(torch.int32), product(given[0].clone()).view(torch.int32))


def test_integers_are_multiplied_by_the_integer_zero():
    graph = make_fx(lambda x: x * 0, tracing_mode="fake")(torch.arange(3))
    keep_products_with_zero(graph.graph)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert isinstance(node.args[1], int)
