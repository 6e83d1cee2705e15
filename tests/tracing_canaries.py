"""Canaries of operators, dispatch and traces."""

import torch
from canaries import canary, recorded
from torch.overrides import TorchFunctionMode

import fxtrain
from fxtrain import _torch_internals as internals
from fxtrain import rng
from fxtrain._torch_internals.interface import INTERFACES


@canary("torch._C._get_dispatch_mode", "torch._C._TorchDispatchModeKey")
def modes_show_a_trace():
    found = []
    recorded(lambda x: found.append(internals.dispatch.is_recorded()) or x, torch.ones(1))
    with internals.tracing.new_fake_mode() as mode:
        assert internals.dispatch.fake_mode() is mode
    assert found == [True]
    assert not internals.tracing.is_traced()


@canary("torch.utils._python_dispatch._disable_current_modes")
def modes_can_be_left():
    with internals.tracing.new_fake_mode(), internals.dispatch.without_dispatch_modes():
        assert torch.ones(1).item() == 1


@canary(
    "torch._C._dispatch_tls_local_include_set",
    "torch._C._dispatch_tls_local_exclude_set",
    "torch._C._ForceDispatchKeyGuard",
)
def dispatch_keys_are_restored():
    included = torch._C._dispatch_tls_local_include_set()
    with internals.dispatch.dispatch_keys_kept() as is_kept:
        torch._C._dispatch_tls_set_dispatch_key_included(torch._C.DispatchKey.FuncTorchBatched, True)
    assert is_kept
    assert repr(torch._C._dispatch_tls_local_include_set()) == repr(included)


@canary(
    "torch.distributed._functional_collectives",
    "torch.ops._c10d_functional.all_reduce",
    "torch.ops._c10d_functional.all_gather_into_tensor",
    "torch.ops._c10d_functional.reduce_scatter_tensor",
    "torch.ops._c10d_functional.wait_tensor",
)
def collectives_are_recorded():
    group = fxtrain.distributed.mesh().group.group_name

    def doubled(x):
        (total,) = internals.collectives.all_reduce([x], group)
        (part,) = internals.collectives.reduce_scatter([total.unsqueeze(0)], group, 1)
        return part + internals.collectives.all_gather(x, group, 1)[0] + internals.collectives.rank(x)

    graph = recorded(doubled, torch.ones(2))
    assert graph(torch.tensor([1.0, 2.0])).tolist() == [2, 4]
    namespaces = [getattr(node.target, "namespace", "") for node in graph.graph.nodes]
    assert namespaces.count("_c10d_functional") == 6
    assert namespaces.count("fxtrain") == 1


@canary("torch.ops._c10d_functional.all_to_all_single")
def rows_are_exchanged():
    group = fxtrain.distributed.mesh().group.group_name

    def summed(x):
        return internals.collectives.reduce_scatter([x], group, 1, exchanges=True)[0]

    graph = recorded(summed, torch.ones(1, 2))
    assert graph(torch.tensor([[1.0, 2.0]])).tolist() == [1, 2]
    assert sum(internals.collectives.is_exchange(node.target) for node in graph.graph.nodes) == 1


@canary(
    "torch.ops._c10d_functional.all_gather_into_tensor_coalesced",
    "torch.ops._c10d_functional.reduce_scatter_tensor_coalesced",
)
def several_tensors_are_one_transfer():
    group, operators = fxtrain.distributed.mesh().group.group_name, torch.ops._c10d_functional
    given = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    gather = internals.collectives.of_many(operators.all_gather_into_tensor.default)
    scatter = internals.collectives.of_many(operators.reduce_scatter_tensor.default)
    whole = [operators.wait_tensor(each) for each in gather(given, 1, group)]
    found = scatter(whole, "sum", 1, group)
    assert [operators.wait_tensor(each).tolist() for each in found] == [[1.0, 2.0], [[3.0]]]


@canary("torch._C._set_grad_enabled")
def grad_mode_is_set():
    with torch.no_grad():
        internals.dispatch.grad_mode_setter()(True)
        assert torch.is_grad_enabled()


@canary("torch._ops.OpOverload", "torch._ops.OpOverloadPacket", "torch.ops.aten.copy_.default._schema")
def operators_describe_themselves():
    add, copy = torch.ops.aten.add.Tensor, torch.ops.aten.copy_.default
    assert isinstance(add, internals.dispatch.Operator)
    assert isinstance(torch.ops.aten.add, internals.dispatch.OperatorPacket)
    assert internals.dispatch.operator_name(torch.ops.aten._to_copy.default) == "_to_copy"
    assert internals.dispatch.is_in_place(copy)
    assert not internals.dispatch.is_in_place(add)
    assert internals.dispatch.is_view(torch.ops.aten.t.default)
    assert internals.dispatch.arguments_kept(copy) == [False, True, True]


@canary("torch._ops.HigherOrderOperator")
def operators_that_take_functions_have_a_type():
    assert isinstance(torch.ops.higher_order.cond, internals.dispatch.HigherOrderOperator)
    assert not isinstance(torch.ops.aten.add, internals.dispatch.HigherOrderOperator)


@canary("torch.ops.aten._local_scalar_dense.default")
def reads_are_an_operator():
    seen = []

    class Watch(internals.dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(1).item()
    assert internals.dispatch.item_operator() in seen


@canary("torch.ops.mkldnn._linear_pointwise")
def linear_layers_run_by_onednn():
    x, weight, bias = torch.rand(2, 3), torch.rand(4, 3), torch.rand(4)
    torch.testing.assert_close(internals.dispatch.linear_by_onednn(x, weight, bias), x @ weight.t() + bias)


@canary("torch.ops.aten._native_batch_norm_legit_functional.default")
def batch_norms_can_return_statistics():
    x, mean, variance = torch.rand(8, 3), torch.zeros(3), torch.ones(3)
    *results, new_mean, new_variance = internals.dispatch.pure_batch_norm()(
        x, None, None, mean, variance, True, 0.1, 1e-5
    )
    assert (mean.tolist(), variance.tolist()) == ([0, 0, 0], [1, 1, 1])
    expected = torch.ops.aten.native_batch_norm(x, None, None, mean, variance, True, 0.1, 1e-5)
    torch.testing.assert_close((*results, new_mean, new_variance), (*expected, mean, variance))


@canary("torch.ops.aten._ctc_loss", "torch.ops.aten._ctc_loss_backward")
def ctc_losses_have_gradients():
    scores = torch.rand(5, 1, 4).log_softmax(-1).requires_grad_()
    given = scores, torch.tensor([[1, 2]]), [5], [2]
    losses = torch.nn.functional.ctc_loss(*given, reduction="none")
    losses.sum().backward()
    torch.testing.assert_close(internals.dispatch.ctc_loss(*given, 0, False), (losses, scores.grad))


@canary(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
)
def attention_is_an_operator_on_cpu():
    x = torch.rand(1, 1, 4, 8, requires_grad=True)
    operators = {
        node.target.overloadpacket
        for node in recorded(
            lambda x: torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(x, x, x).sum(), x), x
        ).graph.find_nodes(
            op="call_function", target=torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        )
    }
    assert internals.dispatch.attention_on_cpu()[0] in operators


@canary(
    "torch.fx.experimental.proxy_tensor.make_fx",
    "torch.fx.experimental.proxy_tensor.get_proxy_slot",
    "torch.fx.experimental.proxy_tensor.disable_proxy_modes_tracing",
)
def traces_record_operators_and_their_tensors():
    def function(x):
        with internals.tracing.unrecorded():
            x.exp()
        y = x.sin()
        assert internals.tracing.node_of(y).target == torch.ops.aten.sin.default
        assert internals.tracing.tracer().graph is not None
        return y

    graph = internals.tracing.make_fx(function, tracing_mode="fake")(torch.ones(1)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.aten.sin.default]


@canary("torch.ops.prim.device.default")
def devices_are_read_by_an_operator():
    with internals.tracing.new_fake_mode():
        fake = torch.ones(1, device="cuda")
        assert INTERFACES["torch.ops.prim.device.default"].get()(fake) == fake.device == torch.device("cuda", 0)


@canary("torch.fx.experimental.proxy_tensor.get_proxy_mode")
def function_modes_see_no_calls_of_the_tracer():
    seen = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def function(x):
        with Seen(), internals.tracing.operations_outside_of_function_modes():
            return torch.sin(x)

    graph = internals.tracing.make_fx(function, tracing_mode="fake")(torch.ones(1)).graph
    assert seen == [torch.sin]
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.aten.sin.default]


@canary("torch._subclasses.FakeTensorMode")
def fake_tensors_have_no_values():
    mode = internals.tracing.new_fake_mode()
    with mode:
        assert (mode.from_tensor(torch.ones(2)) + torch.ones(2)).shape == (2,)


@canary(
    "torch.fx.experimental.symbolic_shapes.ShapeEnv",
    "torch.fx.experimental.symbolic_shapes.DimDynamic",
    "torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext",
    "torch.fx.experimental.symbolic_shapes.SYMPY_INTERP",
    "torch.fx.experimental.symbolic_shapes.statically_known_true",
    "torch._dynamo.source.ConstantSource",
)
def sizes_are_symbols_with_conditions():
    environment = internals.tracing.new_shape_env()
    mode = internals.tracing.new_fake_mode(environment)
    x = internals.tracing.with_symbolic_sizes(mode, torch.ones(6, 4), "x")
    assert not internals.tracing.is_known_true(x.shape[0] == 6)
    assert bool(x.shape[0] > 5)
    text = environment.produce_guards_expression(list(x.shape))
    sizes = {"L": {"t0": 5, "t1": 4}}
    assert not eval(text, internals.tracing.size_functions(), sizes)
    assert eval(text, internals.tracing.size_functions(), {"L": {"t0": 7, "t1": 3}})
    with mode:
        assert internals.tracing.has_symbolic_sizes()


@canary("torch._decomp.get_decompositions")
def operators_have_decompositions():
    assert internals.tracing.decompositions([torch.ops.aten.constant_pad_nd])
    softmax = internals.tracing.decomposition(torch.ops.aten._softmax.default)
    x = torch.tensor([1.0, 2.0])
    assert torch.allclose(softmax(x, 0, False), x.softmax(0))


@canary("torch.compiler._is_compiling_flag")
def libraries_see_the_flag():
    before = internals.tracing.compiling_flag()
    internals.tracing.set_compiling_flag(True)
    try:
        assert torch.compiler.is_compiling()
    finally:
        internals.tracing.set_compiling_flag(before)
    assert not torch.compiler.is_compiling()


@canary("torch._C._functorch.peek_interpreter_stack")
def transforms_are_recognized():
    found = []
    torch.vmap(lambda x: found.append(internals.dispatch.is_transformed()) or x)(torch.ones(2))
    assert [*found, internals.dispatch.is_transformed()] == [True, False]


@canary("torch._C._functorch.is_functorch_wrapped_tensor", "torch._C._functorch.get_unwrapped")
def wrappers_are_removed():
    x, found = torch.ones(2), []
    torch.vmap(torch.func.grad(lambda x: found.append(internals.dispatch.unwrapped(x)) or x.sum()))(x)
    assert internals.memory.storage_id(found[0]) == internals.memory.storage_id(x)


@canary("torch._C.DisableTorchFunction", "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack")
def traces_can_be_left():
    found = []

    def function(x):
        with internals.dispatch.outside_of_traces():
            found.append((internals.dispatch.is_transformed(), torch.rand(1).item()))
        assert internals.dispatch.is_transformed()
        return x

    with rng.functional(rng.key(0)):
        torch.vmap(function)(torch.ones(2))
    assert not found[0][0]
