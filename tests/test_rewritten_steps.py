"""Matmuls and scalars of compiled steps: which operations a graph calls, and with what results."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain import tree
from fxtrain.compiler.passes import _matmuls as matmul
from fxtrain.compiler.passes._scalars import hoist_scalars


def close(got, wanted):
    torch.testing.assert_close(tree.leaves(got), tree.leaves(wanted), rtol=1e-4, atol=1e-5)


def changed(change, function, given):
    """Traces the function and applies ``change`` to its graph."""
    graph = make_fx(function, tracing_mode="fake")(*given)
    change(graph.graph)
    graph.recompile()
    return graph


def operations(graph):
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


class TestMatmuls:
    """Large matmuls use oneDNN, with biases added separately."""

    @pytest.fixture(autouse=True)
    def _anywhere(self, monkeypatch):
        if not torch.backends.mkldnn.is_available():
            pytest.skip("torch was built without oneDNN")
        monkeypatch.setattr(matmul, "_pays", lambda: True)

    @pytest.mark.parametrize("rows", [4, 256])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("turned", [False, True])
    def test_large_matmuls_use_onednn_with_same_result(self, rows, bias, turned):
        def function(x, other, more):
            other = other.t() if turned else other
            return torch.addmm(more, x, other) if bias else x @ other

        given = torch.randn(rows, 96), torch.randn((112, 96) if turned else (96, 112)), torch.randn(112)
        graph = changed(matmul.speed_up_matmuls, function, given)
        assert ("fxtrain.linear.default" in operations(graph)) == (rows == 256)
        assert "aten.addmm.default" not in operations(graph)
        torch.testing.assert_close(graph(*given), function(*given), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("vendor", "family", "expected"),
        [("AuthenticAMD", 25, False), ("AuthenticAMD", 26, True), ("GenuineIntel", 26, False)],
    )
    def test_onednn_requires_full_width_amd_vectors(self, vendor, family, expected):
        processor = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 1\n"
        assert matmul._is_full_width(processor) == expected

    def test_unsupported_dtype_is_unchanged(self):
        given = torch.randn(256, 96, dtype=torch.float64), torch.randn(96, 112, dtype=torch.float64)
        graph = changed(matmul.speed_up_matmuls, torch.mm, given)
        assert operations(graph) == {"aten.mm.default"}

    def test_bfloat16_keeps_fused_bias(self):
        """A separate bias would be rounded twice."""
        given = [torch.randn(*shape, dtype=torch.bfloat16) for shape in ((112,), (4, 96), (96, 112))]
        graph = changed(matmul.speed_up_matmuls, torch.addmm, given)
        assert operations(graph) == {"aten.addmm.default"}

    @pytest.mark.slow
    def test_step_with_onednn_equals_eager(self):
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        module = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
        state, batch = fx.init(module, tx), torch.randn(256, 128)
        expected, output = step(state, batch)
        ahead = fx.compile(step, mode="ahead-of-time")
        ends = [compiled(state, batch) for compiled in (fx.compile(step), ahead)]
        for found, compiled in ends:
            torch.testing.assert_close(found.params, expected.params, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(compiled.metrics["loss"], output.metrics["loss"])
        assert all(map(torch.equal, *map(tree.leaves, ends)))
        assert "ahead-of-time" in ahead.route


class TestScalars:
    """Scalars that many elements read are computed once."""

    @pytest.mark.parametrize(
        ("function", "shapes", "expected"),
        [
            (lambda x, y: x * -torch.expm1(y), [(64,), ()], 1),
            (lambda x, y: x[:4] * torch.expm1(y), [(64,), ()], 0),  # no more elements than one vector
            (lambda x, y: x * (y + 1), [(64,), ()], 0),  # cheap to recompute
            (lambda x, y: (x * y).exp(), [(64,), ()], 0),  # differs per element
            (lambda x, y: (x * torch.cos(y), x - torch.cos(y)), [(64,), ()], 2),
            (lambda x, y: x * (1 - torch.exp(y))[:, None, None], [(3, 8, 8), (3,)], 1),  # several runs under vmap
            (lambda x, y: x * torch.cos(y).to(torch.float32), [(64,), ()], 1),
        ],
    )
    def test_expensive_scalars_are_computed_once(self, function, shapes, expected):
        given = [torch.randn(shape) for shape in shapes]
        graph = changed(hoist_scalars, function, given)
        kept = [node for node in graph.graph.nodes if str(node.target) == "fxtrain.once.default"]
        assert len(kept) == expected
        assert all(node.meta["val"].numel() <= 3 for node in kept)
        torch.testing.assert_close(graph(*given), function(*given), rtol=0, atol=0)

    @pytest.mark.parametrize("write", [lambda y, view: y.add_(1.0), lambda y, view: view.add_(1.0)])
    def test_in_place_writes_to_scalars_are_respected(self, write):
        def function(x, y):
            y = torch.log(y)
            view = y.view(())
            write(y, view)
            return x * view, x * y

        given = torch.randn(64), torch.rand(1)
        graph = changed(hoist_scalars, function, given)
        torch.testing.assert_close(graph(*given), function(*given), rtol=0, atol=0)

    @pytest.mark.slow
    def test_scalars_are_hoisted_out_of_parameter_loops(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        tx = fx.optim.adamw(fx.schedules.cosine(1e-1, 100))
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        state, batch = fx.init(nn.Linear(64, 64), tx), torch.randn(4, 64)
        (found, _), (code,) = run_and_get_code(fx.compile(step), state, batch)
        close(found, step(state, batch)[0])
        loops = re.findall(r"^( +)for\(.*\n((?:\1[ {].*\n)+)", code, re.MULTILINE)
        assert sum("sqrt(" in loop for _, loop in loops) >= 2  # for weight and bias
        # Bias corrections have their own loop over step counts, before the loops over elements. The bound of their
        # exponents identifies it.
        assert any("(-750.0)" in loop for _, loop in loops)
        assert not any("sqrt(" in loop and "(-750.0)" in loop for _, loop in loops)
        assert "cos(" in code
        assert not any(re.search(r"\bcos\(", loop) for _, loop in loops)
