"""Canaries of Dynamo and Inductor."""

import contextlib
import dataclasses
import inspect
import os
from unittest import mock

import pytest
import torch
from canaries import canary, recorded, uncompiled

from fxtrain import _torch_internals as internals
from fxtrain import rng
from fxtrain._torch_internals.interface import INTERFACES


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


@canary("torch._inductor.ir.ExternKernel.require_contiguous", "torch._inductor.ir.ExternKernel.require_exact_strides")
def lowerings_have_the_required_strides():
    from torch._inductor import lowering

    operator, given = torch.ops.aten.hypot.default, [torch.ones(3, 2), torch.randn(2, 3)]
    before = lowering.lowerings.get(operator)

    def check(required, strides):
        found = []

        def second(x, y):
            found.append(required(y))
            return found[-1]

        internals.inductor.register_lowering(operator, second)
        graph = recorded(lambda x, y: [torch.hypot(x, (y + 1).t())], *given)
        (value,) = internals.inductor.compile_graph(graph, given, {})(*given)
        assert torch.equal(value, (given[1] + 1).t())
        assert [list(map(int, each.get_stride())) for each in found] == [strides]

    try:
        check(internals.inductor.contiguous_buffer, [2, 1])
        check(lambda x: internals.inductor.strided_buffer(x, [1, 3]), [1, 3])
    finally:
        lowering.lowerings.pop(operator) if before is None else lowering.lowerings.update({operator: before})


@canary("torch._inductor.aoti_compile_and_package", "torch._inductor.aoti_load_package")
def programs_are_packaged_as_expected():
    assert {"package_path", "inductor_configs"} <= set(
        inspect.signature(torch._inductor.aoti_compile_and_package).parameters
    )
    assert "path" in inspect.signature(torch._inductor.aoti_load_package).parameters


@canary("torch._inductor.runtime.cache_dir_utils.cache_dir")
def compiled_code_has_a_folder():
    module = torch._inductor.runtime.cache_dir_utils
    assert internals.inductor.cache_folder() == module.cache_dir()
    # Before Inductor is imported, the folder is found without it.
    with mock.patch.object(internals.inductor, "is_loaded", return_value=False), mock.patch.dict(os.environ):
        assert internals.inductor.cache_folder() == module.cache_dir()
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert internals.inductor.cache_folder() == module.default_cache_dir()
        # torch 2.11 has no folder for a user without a name.
        with mock.patch("getpass.getuser", side_effect=KeyError), contextlib.suppress(KeyError):
            expected = module.default_cache_dir()
            assert internals.inductor.cache_folder() == expected


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


@canary(
    "torch._inductor.cpu_vec_isa",
    "torch._inductor.cpu_vec_isa.supported_vec_isa_list",
    "torch._inductor.cpu_vec_isa.valid_vec_isa_list",
    "torch._inductor.cpu_vec_isa.x86_isa_checker",
    "torch._inductor.config.cpp",
    "torch._inductor.config.cpp.simdlen",
    "torch._inductor.codecache",
    "torch.utils._filelock.FileLock",
)
def widest_vector_instructions_are_the_first_of_all():
    instructions = internals.vector_instructions
    (found,) = instructions.widest() or [None]
    listed = torch._inductor.cpu_vec_isa.valid_vec_isa_list()
    assert found is None or found is listed[0]


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


@canary(
    "torch._inductor.dtype_propagation.DtypePropagationOpsHandler",
    "torch._inductor.utils.op_dtype_propagation_rules",
)
def dtype_rules_are_those_of_one_object():
    internals.inductor.LOWERING.get()  # imports the modules that define operations
    with internals.dtype_rules.dtype_rules_kept():
        handler, source = internals.dtype_rules.HANDLER.get(), internals.dtype_rules.SOURCE.get()
        rules = handler()
        first = vars(rules)["add"]
        assert handler() is rules
        assert vars(rules)["add"] is first
        with mock.patch.dict(source, {"exp": dataclasses.replace(source["exp"], override_return_dtype=torch.bool)}):
            assert handler().exp() == torch.bool
        assert handler().exp(torch.ones(1)) == torch.float32
    handler()
    assert vars(rules)["add"] is not first


@canary("torch._inductor.graph.GraphLowering")
def lowering_drops_dead_values():
    with internals.dead_values.dead_values_skipped():
        graph = internals.dead_values.GRAPH.get()
    assert list(inspect.signature(graph.mark_buffer_mutated.__wrapped__).parameters) == ["self", "name"]
    lowering = graph(recorded(torch.sin, torch.ones(1)))
    assert lowering.garbage_collect_values
    assert (lowering.env, lowering.name_to_users) == ({}, {})
