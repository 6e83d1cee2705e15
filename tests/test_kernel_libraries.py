"""Kernels that are compiled as one library return the same bits as kernels that Inductor compiles alone."""

import functools
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fxtrain._torch_internals import inductor, kernels, tracing
from fxtrain._torch_internals.kernels import Kernel, library_source, shared_libraries

inductor_utils = pytest.importorskip("torch._inductor.utils")


def numbers(*shape, dtype=torch.float32):
    return torch.linspace(-2, 3, torch.Size(shape).numel()).reshape(shape).to(dtype)


def many_kernels(x, y, index):
    """Computes results in several dtypes, by kernels that read numbers as well as tensors."""
    softmax = torch.softmax(x, -1)
    counts = (index[:, None] == torch.arange(9)).sum(0).cumsum(0)
    low = (y.bfloat16() @ y.bfloat16().T).float().sum(0)
    normal = torch.nn.functional.layer_norm(x, x.shape[1:])
    return softmax, counts, low, normal.argmax(1), (normal > 0).any(0), y[index].double().std(), x.half().flip(0) * 3


def results(*, together, dynamic=False):
    """Returns results with an empty cache, the number of libraries, and the compiled function."""
    torch._dynamo.reset()
    built = []
    function = torch.compile(many_kernels, dynamic=dynamic)
    with inductor_utils.fresh_cache(), pytest.MonkeyPatch.context() as patch:
        begin = kernels.begin_build
        patch.setattr(kernels, "begin_build", lambda given, submit: built.append(given) or begin(given, submit))
        if together:
            with shared_libraries():
                found = function(numbers(5, 7), numbers(8, 4), torch.tensor([1, 7, 3, 1]))
        else:
            found = function(numbers(5, 7), numbers(8, 4), torch.tensor([1, 7, 3, 1]))
    return found, built, function


@functools.cache
def alone(*, dynamic=False):
    found, built, _ = results(together=False, dynamic=dynamic)
    assert not built
    return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_results_have_the_same_bits(dynamic):
    found, built, _ = results(together=True, dynamic=dynamic)
    assert all(map(torch.equal, found, alone(dynamic=dynamic)))
    assert len(built) >= 1
    assert sum(map(len, built)) > len(built)  # several kernels in one library


def test_kernels_are_compiled_alone_if_they_do_not_compile_together(monkeypatch):
    monkeypatch.setattr(kernels, "_BINDINGS", "this is not C++;")
    found, built, _ = results(together=True)
    assert all(map(torch.equal, found, alone()))
    assert built


@pytest.mark.parametrize("bindings", [kernels._BINDINGS, "this is not C++;"])
def test_graphs_are_linked_at_the_end(monkeypatch, bindings):
    monkeypatch.setattr(kernels, "_BINDINGS", bindings)
    begin, events = kernels.begin_build, []

    def noting(given, submit):
        events.append("begun")
        build = begin(given, submit)
        return lambda: events.append("linked") or build()

    monkeypatch.setattr(kernels, "begin_build", noting)
    x = numbers(5, 7)
    with inductor_utils.fresh_cache():
        with kernels.linked_at_the_end():
            softmax = compiled_graph(lambda x: [torch.softmax(x, -1), x.sum(0)], x)
            normal = compiled_graph(lambda x: [torch.nn.functional.layer_norm(x, x.shape[1:])], x)
        assert events == ["begun", "begun", "linked", "linked"]
        torch.testing.assert_close(list(softmax([x])), [torch.softmax(x, -1), x.sum(0)])
        torch.testing.assert_close(list(normal([x])), [torch.nn.functional.layer_norm(x, x.shape[1:])])


def compiled_graph(function, *given):
    """Returns a compiled function of a list of tensors."""
    graph = tracing.make_fx(function, tracing_mode="fake")(*given)
    fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return inductor.compile_graph(graph, fakes, {})


@pytest.mark.parametrize("name", ["COMPILER", "THREADS", "LIBRARIES", "WRAPPER"])
def test_nothing_is_replaced_without_the_interface(monkeypatch, name):
    interface = getattr(kernels, name)
    monkeypatch.setattr(interface, "path", f"{interface.path}_of_another_version")
    for methods in [kernels._GENERATORS] if name == "WRAPPER" else [kernels._METHODS, kernels._GENERATORS]:
        monkeypatch.setattr(methods, "_replace", lambda: pytest.fail("methods were replaced"))
    with shared_libraries():
        pass


def test_other_threads_are_left_alone(monkeypatch):
    monkeypatch.setattr(kernels, "begin_build", lambda given, submit: pytest.fail("kernels were compiled together"))
    torch._dynamo.reset()
    with shared_libraries(), inductor_utils.fresh_cache(), ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.compile(torch.sin), numbers(3, 5)).result()
    torch.testing.assert_close(found, numbers(3, 5).sin())


def test_errors_of_kernels_reach_python():
    _, _, function = results(together=True)
    with pytest.raises(RuntimeError, match="index out of bounds"):
        function(numbers(5, 7), numbers(8, 4), torch.tensor([1, 8, 3, 1]))


def kernel(body, before=""):
    code = f'#include <cstdint>\n{before}\nextern "C"  void  kernel(float* x, const int64_t n)\n{{\n{body}\n}}\n'
    return Kernel(["float*", "const int64_t"], code)


def test_code_that_may_not_stand_beside_other_code_is_compiled_alone():
    assert not kernel("#pragma omp simd\nfor (int64_t i = 0; i < n; i++) x[i] += 1;").is_alone
    assert kernel("x[0] = SIZE;", before="#define SIZE 8").is_alone
    assert kernel("#if 1\nx[0] = 1;\n#endif").is_alone
    assert Kernel([], "void other() {}").is_alone


def test_functions_beside_a_kernel_do_not_clash():
    first, second = (
        kernel("x[0] = one();", "static int one() { return 1; }"),
        kernel("x[0] = one();", "int one() { return n; }"),
    )
    assert library_source([first, first]).count("#include <cstdint>") == 1
    assert library_source([first, second]).count("namespace kernel_") == 2


def test_long_code_is_split_if_there_are_threads():
    short, long = kernel("x[0] = 1;"), kernel("x[0] = 1;\n" * 5_000)
    assert [len(group) for group in kernels._groups([short] * 20, threads=4)] == [20]
    assert [len(group) for group in kernels._groups([short, *[long] * 5], threads=2)] == [3, 2, 1]
    assert [len(group) for group in kernels._groups([long] * 6, threads=1)] == [6]


def test_libraries_are_compiled_while_others_are_generated(monkeypatch):
    early, load = [], kernels._libraries().load_async

    def load_async(source, submit_fn):
        early.append(source)
        return load(source, submit_fn=submit_fn)

    monkeypatch.setattr(kernels, "_CHARACTERS", 2_000)
    monkeypatch.setattr(kernels, "THREADS", types.SimpleNamespace(exists=True, get=lambda: lambda: 2))
    monkeypatch.setattr(kernels._libraries(), "load_async", load_async)
    found, built, _ = results(together=True)
    assert all(map(torch.equal, found, alone()))
    expected = [library_source(group) for given in built for group in kernels._groups(given, 2)]
    assert early == expected
    assert len(early) > len(built)


def test_kernels_of_a_library_that_fails_early_are_compiled_alone(monkeypatch):
    monkeypatch.setattr(kernels, "_CHARACTERS", 2_000)
    monkeypatch.setattr(kernels, "_BINDINGS", "this is not C++;")
    found, built, _ = results(together=True)
    assert all(map(torch.equal, found, alone()))
    assert built


def test_arguments_are_checked():
    add = kernel("for (int64_t i = 0; i < n; i++) x[i] += 1;")
    (function,) = kernels.begin_build([add])()
    x = torch.zeros(4)
    function(x, 3)
    assert x.tolist() == [1, 1, 1, 0]
    with pytest.raises(TypeError, match="expected 2 arguments of a kernel, got 1"):
        function(x)
    with pytest.raises(RuntimeError, match="expected a number"):
        function(x, "three")
