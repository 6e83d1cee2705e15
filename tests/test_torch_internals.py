"""Private interfaces of torch: where they may be used, and a test of each, which names what depends on it."""

import ast
import inspect
import pathlib
import re

import pytest
import torch

import fxtrain
from fxtrain import _torch_internals as internals
from fxtrain import rng
from fxtrain._torch_internals.interface import INTERFACES
from fxtrain.model._tensor_access import TensorReads
from fxtrain.precision._policy import Float32Norms
from fxtrain.step._loss_mistakes import _Cuts

ROOT = pathlib.Path(fxtrain.__file__).parent
DOOR = ROOT / "_torch_internals"
PRIVATE = re.compile(r"(torch|numpy|functorch)\b.*\._(?!_)|torch\.fx\.experimental|torch\._(?!_)")
# Private attributes of tensors, storages, modules, operators and generators, which have no dotted path.
ATTRIBUTES = {
    *("_cdata", "_version", "_backward_hooks", "_post_accumulate_grad_hooks"),
    *("_parameters", "_buffers", "_modules"),
    *("_schema", "_opname", "_dynamo_marked_constant"),
    *("_workers", "_shutdown_workers", "_worker_pids_set", "_bit_generator"),
}


def private_names(path):
    """Yields (line, name) for each private name of torch or NumPy that a file uses."""
    tree = ast.parse(path.read_text())
    names = {}  # dotted paths of imported names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            base = value.id if isinstance(value, ast.Name) else ""
            yield node.lineno, ".".join([names.get(base, base), *reversed(parts)])
            if node.attr in ATTRIBUTES and base not in ("self", "cls"):
                yield node.lineno, f"torch.*.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "attr" in node.func.id:
            for argument in node.args[1:2]:
                if isinstance(argument, ast.Constant) and argument.value in ATTRIBUTES:
                    yield node.lineno, f"torch.*.{argument.value}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            yield node.lineno, node.value


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(ROOT.rglob("*.py")) if DOOR not in path.parents],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_module_uses_no_private_interface_of_torch(path):
    used = sorted({(line, name) for line, name in private_names(path) if PRIVATE.match(name)})
    assert not used, "Reach private interfaces through fxtrain/_torch_internals."


# One canary for each private interface. It calls the interface as fxtrain does.

CANARIES = {}


def canary(*paths):
    def register(function):
        CANARIES.update(dict.fromkeys(paths, function))
        return function

    return register


@pytest.mark.parametrize("path", INTERFACES)
def test_interface_behaves_as_fxtrain_expects(path):
    purpose = INTERFACES[path].purpose
    assert INTERFACES[path].exists, f"torch lacks {path}, which fxtrain uses for {purpose}."
    try:
        CANARIES[path]()
    except Exception as error:
        pytest.fail(f"{path} has changed, which fxtrain uses for {purpose}: {error!r}")


def recorded(function, *tensors):
    return internals.tracing.make_fx(function, tracing_mode="real")(*tensors)


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


@canary("torch._dynamo.lookup_backend")
def backend_is_found_by_name():
    graph = recorded(torch.sin, torch.ones(1))
    assert torch.equal(
        internals.dynamo.backend_named("eager")(graph, [torch.ones(1)])(torch.ones(1)), torch.ones(1).sin()
    )


@canary("torch._dynamo.exc.FailOnRecompileLimitHit")
def too_many_graphs_raise():
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True, dynamic=False)
        compiled(torch.ones(2))
        with pytest.raises(internals.dynamo.recompile_limit_error()):
            compiled(torch.ones(3))
    torch._dynamo.reset()


@canary("torch._dynamo.config.error_on_nested_fx_trace")
def compiled_functions_run_in_a_trace():
    restore = internals.dynamo.nested_calls_inlined()
    try:
        recorded(torch.compile(torch.sin, backend="eager"), torch.ones(1))
    finally:
        restore()
    assert torch._dynamo.config.error_on_nested_fx_trace


@canary("torch._dynamo.convert_frame.compile_lock")
def dynamo_has_a_lock():
    with internals.dynamo.compile_lock():
        assert INTERFACES["torch._dynamo.convert_frame.compile_lock"].get() is internals.dynamo.compile_lock()


@canary("torch._dynamo.backends.debugging.ExplainWithBackend")
def breaks_are_explained():
    backend = internals.dynamo.explaining_backend()

    def function(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y.sin()

    torch.compile(function, backend=backend)(torch.ones(1))
    output = backend.output()
    assert output.break_reasons[0].reason
    assert output.break_reasons[0].user_stack
    assert output.graph_count >= 1


@canary("torch._dynamo.variables.torch.get_overridable_functions")
def random_functions_reach_modes_in_dynamo():
    assert internals.dynamo.can_show_to_modes()
    x = torch.ones(8)
    found = []
    for compiled in (torch.dropout, torch.compile(lambda *args: torch.dropout(*args), backend="eager", fullgraph=True)):
        with rng.functional(rng.key(0)):
            found.append(compiled(x, 0.5, True))
    assert torch.equal(*found)


@canary(
    "torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "torch._C._dynamo.eval_frame._FrameAction.SKIP",
    "torch._C._dynamo.eval_frame._FrameExecStrategy",
)
def mode_is_not_compiled_by_itself():
    with rng.functional(rng.key(0)):
        found = torch.compile(lambda x: uncompiled(x), backend="eager")(torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(found, uncompiled(torch.tensor([2.0, -1.0])))


@canary(
    "torch._C._autograd._saved_tensors_hooks_get_disabled_error_message",
    "torch._C._autograd._saved_tensors_hooks_enable",
)
def saved_tensor_hooks_are_restored():
    def fails():
        torch._C._autograd._saved_tensors_hooks_disable("off")
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        internals.dynamo.restoring_saved_tensor_hooks(fails)()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        pass


@canary(
    "torch._inductor.compile",
    "torch._inductor.output_code.CompiledFxGraph",
    "torch._inductor.metrics.generated_kernel_count",
)
def inductor_is_called_as_expected():
    parameters = inspect.signature(torch._inductor.compile).parameters
    assert list(parameters)[:2] == ["gm", "example_inputs"]
    assert "options" in parameters
    assert {"current_callable", "output_strides"} <= set(internals.inductor.compiled_graph_class().__annotations__)
    assert isinstance(internals.inductor.kernel_count(), int)


@canary("torch._inductor.list_mode_options", "torch._inductor.config")
def inductor_has_options():
    assert internals.inductor.mode_options("max-autotune-no-cudagraphs")
    assert internals.inductor.has_option("layout_optimization")
    assert internals.inductor.has_option("size_asserts")


@canary(
    "torch._inductor.lowering.register_lowering",
    "torch._inductor.lowering.make_pointwise",
    "torch._inductor.virtualized.ops",
    "torch._inductor.ir.Pointwise",
)
def lowerings_are_registered_as_expected():
    from torch._inductor import lowering

    operator = torch.ops.aten.hypot.default
    before = lowering.lowerings.get(operator)
    try:
        internals.inductor.register_lowering(
            operator, internals.inductor.pointwise(lambda x, y: internals.inductor.loop_operators().add(x, y))
        )
        assert lowering.lowerings[operator] is not before
    finally:
        lowering.lowerings.pop(operator) if before is None else lowering.lowerings.update({operator: before})
    assert {"device", "dtype", "inner_fn", "ranges"} <= set(inspect.signature(torch._inductor.ir.Pointwise).parameters)


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


@canary("torch._inductor.aoti_compile_and_package", "torch._inductor.aoti_load_package")
def programs_are_packaged_as_expected():
    assert {"package_path", "inductor_configs"} <= set(
        inspect.signature(torch._inductor.aoti_compile_and_package).parameters
    )
    assert "path" in inspect.signature(torch._inductor.aoti_load_package).parameters


@canary("torch._inductor.runtime.cache_dir_utils.cache_dir")
def compiled_code_has_a_folder():
    assert isinstance(internals.inductor.cache_folder(), str)


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


@canary(
    "torch.fx.experimental.proxy_tensor.make_fx",
    "torch.fx.experimental.proxy_tensor.get_proxy_mode",
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


# Function modes around functions that torch.compile splits into several graphs


@torch._dynamo.disable(recursive=False)
def uncompiled(x):
    return x.mean(), x.sum(), x.exp(), x.neg(), torch.relu(x)


@pytest.fixture
def no_compiled_frames():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [lambda: rng.functional(rng.key(0)), Float32Norms, lambda: TensorReads([]), _Cuts])
def test_compiled_frame_is_not_reused_for_another_operation(mode, no_compiled_frames):
    def function(x):
        return uncompiled(x)

    x = torch.tensor([2.0, -1.0])
    with mode():
        found = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(found, uncompiled(x))


def test_traced_random_samples_equal_uncompiled_ones(no_compiled_frames):
    def function(x):
        return torch.nn.functional.dropout(x, 0.5)

    x = torch.ones(8)
    with rng.functional(rng.key(0)):
        expected = function(x)
    with rng.functional(rng.key(0)):
        found = torch.compile(function, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, expected)


@canary("torch._inductor.config._config", "torch.utils._config_module._UNSET_SENTINEL")
def changed_settings_are_found():
    before = internals.inductor.changed_settings()
    with torch._inductor.config.patch({"cpp.simdlen": 256, "compile_threads": 1}):
        assert internals.inductor.changed_settings() == {**before, "cpp.simdlen": "256"}
    assert internals.inductor.changed_settings() == before
    with torch._inductor.config.patch(post_grad_custom_post_pass=lambda graph: None):
        assert internals.inductor.changed_settings() is None


@canary("torch._inductor.select_algorithm.extern_kernels")
def matmuls_are_called_by_name():
    functions = internals.inductor.extern_functions()
    assert functions["mm"] is torch.mm
    assert functions["bmm"] is torch.bmm


@canary("torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr")
def kernels_read_addresses_of_tensors():
    assert isinstance(internals.inductor.DATA_POINTER.get(), int)


@canary(
    "torch._inductor.async_compile.AsyncCompile",
    "torch._inductor.async_compile.get_compile_threads",
    "torch._inductor.codecache.CppPythonBindingsCodeCache",
)
def kernels_are_compiled_by_two_methods():
    with internals.kernels.shared_libraries():
        compiler = internals.kernels.COMPILER.get()
    for method, names in (
        (compiler.cpp_pybinding, ["self", "argtypes", "source_code"]),
        (compiler.wait, ["self", "scope"]),
    ):
        assert list(inspect.signature(method.__wrapped__).parameters) == names
    assert internals.kernels.THREADS.get()() >= 1
    libraries = internals.kernels.LIBRARIES.get()
    assert next(iter(inspect.signature(libraries.load_async).parameters)) == "main_code"
    assert "submit_fn" in inspect.signature(libraries.load_async).parameters


@canary("torch._inductor.codegen.wrapper.PythonWrapperCodegen")
def kernels_are_defined_by_one_method():
    with internals.kernels.shared_libraries():
        define = internals.kernels.WRAPPER.get().define_kernel.__wrapped__
    assert list(inspect.signature(define).parameters)[:3] == ["self", "kernel_name", "kernel_body"]
    definition = "async_compile.cpp_pybinding(['float*'], r'''void kernel() {}''')"
    assert internals.kernels._parsed(definition) == (["float*"], "void kernel() {}")
    assert internals.kernels._parsed("async_compile.triton('name', '', device_str='cuda')") is None


@canary(
    "torch._inductor.codegen.cpp.CppKernelProxy",
    "torch._inductor.codegen.cpp.LoopNest",
    "torch._inductor.config.cpp.enable_loop_tail_vec",
    "torch._inductor.config.patch",
)
def loops_are_tiled_by_two_methods():
    with internals.empty_tails.empty_tails_skipped():
        proxy, nest = internals.empty_tails.KERNELS.get(), internals.empty_tails.LOOPS.get()
    names = ["self", "fn_list", "var_sizes_list"]
    assert list(inspect.signature(proxy.codegen_functions.__wrapped__).parameters) == names
    assert list(inspect.signature(nest.tile.__wrapped__).parameters) == ["self", "depth", "factor"]


@canary("torch._inductor.cpu_vec_isa.valid_vec_isa_list")
def vector_instructions_are_listed():
    found = internals.inductor.INSTRUCTIONS.get()
    assert isinstance(found(), list)
    assert found() is found()  # remembered, so that the second search is free


@canary(
    "torch._inductor.compile_fx.compile_fx_forward",
    "torch._inductor.compile_fx.create_compiler_config_extra",
    "torch._inductor.decomposition.select_decomp_table",
    "torch._inductor.virtualized.V",
    "torch._guards.tracing",
    "torch._guards.TracingContext",
    "torch._dispatch.python.enable_python_dispatcher",
)
def simple_graphs_need_no_aotautograd():
    graph = internals.tracing.make_fx(lambda x: [x.sigmoid()], tracing_mode="fake")(torch.ones(3))
    fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    (found,) = internals.decomposed.compile_decomposed(graph, fakes, torch._inductor.config)([torch.zeros(3)])
    assert found.tolist() == [0.5, 0.5, 0.5]


@canary("torch._inductor.graph.GraphLowering")
def lowering_drops_dead_values():
    with internals.dead_values.dead_values_skipped():
        graph = internals.dead_values.GRAPH.get()
    assert list(inspect.signature(graph.mark_buffer_mutated.__wrapped__).parameters) == ["self", "name"]
    lowering = graph(recorded(torch.sin, torch.ones(1)))
    assert lowering.garbage_collect_values
    assert (lowering.env, lowering.name_to_users) == ({}, {})
