"""The options of Inductor that differ from its defaults."""

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import fxtrain as fx
from fxtrain import tree
from fxtrain._torch_internals import inductor
from fxtrain.compiler.lowering import _inductor as lowering


def close(got, wanted):
    torch.testing.assert_close(tree.leaves(got), tree.leaves(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
class TestLayouts:
    def test_cpu_training_keeps_convolution_layouts(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        kept = []
        compiled = inductor.compile_graph

        def seen(graph, fakes, options):
            kept.append(options.get("layout_optimization", True) is False)
            return compiled(graph, fakes, options)

        monkeypatch.setattr(lowering, "compile_graph", seen)
        module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        tx = fx.optim.sgd(0.1)
        state, images = fx.init(module, tx), torch.randn(2, 1, 6, 6)
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        measure = fx.eval_step(lambda model, batch: {"loss": model(batch).square().mean()})
        close(fx.compile(step)(state, images)[0], step(state, images)[0])
        close(fx.compile(measure)(state, images).metrics, measure(state, images).metrics)
        assert kept == [True, False]


@pytest.mark.slow
class TestFusion:
    def test_fewer_attempts_to_fuse_give_the_same_code(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        tx = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(1e-3))
        # The gradients of 16 parameters share their norm, so they are more nodes than the attempts.
        module = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())))
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        codes, attempts = [], []
        compiled = inductor.compile_graph

        def seen(graph, fakes, options):
            attempts.append(options.get("max_fusion_buffer_group_pairwise_attempts"))
            return compiled(graph, fakes, options)

        monkeypatch.setattr(lowering, "compile_graph", seen)
        for own in ({}, {"max_fusion_buffer_group_pairwise_attempts": 10**6}):
            with config.patch(own):
                _, (code,) = run_and_get_code(fx.compile(step, check=False), fx.init(module, tx), torch.ones(2, 4))
            codes.append(code)
        assert attempts == [16, None]
        assert codes[0] == codes[1]
        assert "cpp_fused" in codes[0]
